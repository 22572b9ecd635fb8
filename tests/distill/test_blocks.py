"""Ladders of blocks, gaps and faults of the signal: each damage is what its name says."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from distill.data import blocks, optics
from distill.data.degradations import degradation, ladder, ladder_rng

NAMES = (
    "pixelation", "lost_blocks", "partial_frame", "jpeg", "luma_blocks", "chroma_subsampling",
    "posterising", "oversaturation", "contrast_loss", "contrast_excess", "impulse_noise",
    "colour_noise", "stripes", "rolling_bars",
)  # fmt: skip
SEEDS = range(12)
"""Enough for every fill, size and direction to be drawn."""


def psnr(clean, degraded) -> float:
    """In dB; 99 where nothing differs."""
    error = np.mean((np.asarray(clean, np.float64) - np.asarray(degraded)) ** 2)
    return 99.0 if error == 0 else 10 * np.log10(255**2 / error)


def luma(rgb):
    """BT.601 luma as float64."""
    return np.asarray(rgb, np.float64) @ [0.299, 0.587, 0.114]


@pytest.fixture(scope="module")
def picture(make_picture):
    """A generated picture whose sides are no multiple of any block."""
    return make_picture(3, 150, 203)


@pytest.mark.parametrize("name", NAMES)
def test_neighbouring_levels_fall_in_psnr(name, make_picture):
    """On 4 clean pictures, 95 % of the steps or more lower the PSNR, and the whole ladder 3 dB."""
    falls = []
    for seed in range(4):
        clean = make_picture(20 + seed, 128, 144)
        values = [psnr(clean, made) for made in ladder(name, clean, seed=seed)]
        falls += list(np.diff(values) < 0)
        assert values[0] - values[-1] > 3
    assert np.mean(falls) >= 0.95


@pytest.mark.parametrize("name", NAMES)
def test_level_0_is_the_picture_and_others_keep_its_form(name, picture):
    """Level 0 is byte by byte the input; every other one is uint8 of the same odd size."""
    before = picture.copy()
    rng = np.random.default_rng(0)
    np.testing.assert_array_equal(degradation(name).apply(picture, 0, rng), picture)
    for made in ladder(name, picture, seed=2):
        assert (made.shape, made.dtype) == (picture.shape, np.uint8)
    np.testing.assert_array_equal(picture, before)


@pytest.mark.parametrize("name", NAMES)
def test_no_draw_depends_on_the_level(name, picture):
    """Every level leaves its generator in one state: it drew as often, so the same choices."""
    act = {n: getattr(blocks, n, None) or getattr(optics, n) for n in NAMES}[name]
    for seed in (1, 2):
        states = []
        for level in range(1, degradation(name).num_levels + 1):
            rng = ladder_rng(seed, "c", name)
            act(picture, level, rng)
            states.append(rng.bit_generator.state["state"])
        assert all(state == states[0] for state in states)


@pytest.mark.parametrize("seed", SEEDS)
def test_lost_blocks_stay_lost(seed, picture):
    """What one level damages every higher one damages alike, and the rest is untouched."""
    made = list(ladder("lost_blocks", picture, seed=seed))
    for low, high in itertools.pairwise(made):
        damaged = (low != picture).any(-1)
        np.testing.assert_array_equal(low[damaged], high[damaged])
    share = [(m != picture).any(-1).mean() for m in made]
    assert share[0] < 0.2
    assert 0.4 < share[-1] < 0.65  # half of the blocks; those at the edges are cut


def test_lost_blocks_have_several_fills(picture):
    """Over a dozen ladders some gaps have one colour (green among them) and some have texture."""
    deviations, greens = [], 0
    for seed in SEEDS:
        made = list(ladder("lost_blocks", picture, seed=seed))[-1]
        gap = made[(made != picture).any(-1)]
        deviations.append(gap.std(0).max())
        greens += int(deviations[-1] == 0 and gap[0, 1] > gap[0, [0, 2]].max())
    assert 0 < sum(d == 0 for d in deviations) < len(deviations)
    assert greens


@pytest.mark.parametrize("seed", SEEDS)
def test_a_partial_frame_is_whole_above_its_end(seed, picture):
    """All rows above the stated share are untouched, and below it hardly one is."""
    for level, share in enumerate(blocks.LOST_BELOW_SHARE, 1):
        made = degradation("partial_frame").apply(picture, level, np.random.default_rng(seed))
        begin = round((1 - share) * len(picture))
        np.testing.assert_array_equal(made[:begin], picture[:begin])
        assert (made[begin + 1 :] != picture[begin + 1 :]).any((1, 2)).mean() > 0.9


def test_pixels_become_squares(picture):
    """At 8 px a picture of 160x208 has 20x26 flat squares, each the mean of what was there."""
    whole = np.pad(picture, ((0, 10), (0, 5), (0, 0)), mode="edge")
    made = degradation("pixelation").apply(
        whole, blocks.PIXEL_PX.index(8.0) + 1, np.random.default_rng(0)
    )
    squares = made.reshape(20, 8, 26, 8, 3)
    assert (squares.max((1, 3)) == squares.min((1, 3))).all()
    means = whole.reshape(20, 8, 26, 8, 3).mean((1, 3))
    np.testing.assert_allclose(squares[:, 0, :, 0], means, atol=1)  # rounding


def test_baseline_jpeg_has_edges_between_its_blocks(picture):
    """At the last level steps across the 8x8 grid are twice those within it, or more."""
    made = luma(list(ladder("jpeg", picture, seed=1))[-1])
    steps = np.abs(np.diff(made, axis=1)).mean(0)
    across = steps[7::8].mean()
    within = np.delete(steps, np.s_[7::8]).mean()
    assert across > 2 * within


def test_a_fine_transform_step_is_nearly_the_picture():
    """Quantised with a step of 0.01, a plane comes back within 0.05: the transform inverts."""
    plane = np.random.default_rng(0).uniform(-128, 127, (32, 48)).astype(np.float32)
    for side in (4, 8, 16):
        np.testing.assert_allclose(blocks._quantised(plane, side, 0.01), plane, atol=0.05)


def test_luma_blocks_leave_the_colour(picture):
    """The mean of Cb and of Cr stays within 3 steps; the luma loses 5 dB or more on the way."""
    weights = np.array([[-0.169, -0.331, 0.5], [0.5, -0.419, -0.081]])
    made = list(ladder("luma_blocks", picture, seed=4))
    for one in (made[0], made[2]):
        moved = (one.astype(float) - picture).mean((0, 1)) @ weights.T
        assert np.abs(moved).max() < 3
    assert psnr(luma(picture), luma(made[0])) - psnr(luma(picture), luma(made[-1])) > 5


@pytest.mark.parametrize("name", ["chroma_subsampling", "colour_noise"])
def test_faults_of_colour_leave_the_luma(name, make_picture):
    """At a middle level the luma differs by 3 steps in the mean at most, the colour by more."""
    soft = (96 + make_picture(6, 128, 128) * 0.25).astype(np.uint8)  # nothing clips
    made = list(ladder(name, soft, seed=1))[2]
    assert np.abs(luma(made) - luma(soft)).mean() < 3
    assert np.abs(made.astype(float) - soft).mean() > 3 * np.abs(luma(made) - luma(soft)).mean()


def test_posterising_leaves_few_colours():
    """A ramp of greys keeps the stated number of levels, whichever way is drawn.

    A level that lies between two bytes, such as 127.5, may be rounded to either.
    """
    ramp = np.arange(256, dtype=np.uint8)[None, :, None].repeat(64, 0).repeat(3, 2)
    for seed in range(6):
        made = ladder("posterising", ramp, seed=seed)
        levels = [1 + int((np.diff(np.unique(m).astype(int)) > 1).sum()) for m in made]
        assert levels == list(optics.POSTER_STEPS)


def test_impulses_are_black_or_white_and_stay(picture):
    """The stated share of pixels is 0 or 255, and a pixel that was lost keeps its value."""
    made = list(ladder("impulse_noise", picture, seed=5))
    for share, low, high in zip(optics.IMPULSE_SHARE, made, made[1:], strict=False):
        hit = (low != picture).any(-1)
        assert set(np.unique(low[hit])) == {0, 255}
        assert hit.mean() == pytest.approx(share, rel=0.35)  # 3 deviations of 61 of 30,450 pixels
        np.testing.assert_array_equal(high[hit], low[hit])


def test_contrast_turns_about_one_grey():
    """Loss shrinks a ramp's span by its factor; excess widens it and clips both ends."""
    ramp = np.arange(256, dtype=np.uint8)[None, :, None].repeat(64, 0).repeat(3, 2)
    for left, made in zip(optics.CONTRAST_LEFT, ladder("contrast_loss", ramp, seed=1), strict=True):
        assert np.ptp(made) == pytest.approx(255 * left, abs=1)  # rounding of both ends
    clipped = [((m == 0) | (m == 255)).mean() for m in ladder("contrast_excess", ramp, seed=1)]
    assert all(np.diff(clipped) > 0)


def test_oversaturation_leaves_greys(picture):
    """Grey pixels stay within rounding; the mean distance of a colour from grey grows."""
    grey = picture[..., :1].repeat(3, 2)
    spread = [np.ptp(picture, axis=-1).mean()]
    for level, made in enumerate(ladder("oversaturation", picture, seed=1), 1):
        same = degradation("oversaturation").apply(grey, level, np.random.default_rng(0))
        assert np.abs(same.astype(int) - grey).max() <= 1
        spread.append(np.ptp(made, axis=-1).mean())
    assert all(np.diff(spread) > 0)


def test_stripes_run_along_one_direction():
    """On a flat grey each column, or each row, has one value, and they differ."""
    flat = np.full((96, 128, 3), 128, np.uint8)
    directions = set()
    for seed in SEEDS:
        made = list(ladder("stripes", flat, seed=seed))[2][..., 0]
        even = [bool((np.ptp(made, axis=axis) == 0).all()) for axis in (0, 1)]
        assert sum(even) == 1
        directions.add(even.index(True))
    assert directions == {0, 1}


def test_bars_lie_across_and_only_darken(picture):
    """No pixel gets lighter, and on a flat grey every row has one value."""
    for made in ladder("rolling_bars", picture, seed=3):
        assert (made <= picture).all()
    flat = np.full((96, 128, 3), 128, np.uint8)
    made = list(ladder("rolling_bars", flat, seed=3))[-1]
    assert (np.ptp(made, axis=1) == 0).all()
    assert np.ptp(made) > 60
