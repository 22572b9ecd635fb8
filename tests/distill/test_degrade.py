"""Ladders of degradations: every level further from the clean picture than the one before."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from dgiqa_stream.preprocess import reduced_rgb
from distill.data.degrade import (
    CODEC_LADDERS,
    KEPT_FRAME,
    PICTURE_LADDERS,
    coded_frame,
    pan,
)

SIZE = (130, 170)


def mse(a, b):
    """Mean squared difference in 8-bit steps."""
    return float(((a.astype(np.float64) - b) ** 2).mean())


def degraded(name, rgb, seed):
    """Every level of a picture ladder, drawn one after the other."""
    degrade, num_levels = PICTURE_LADDERS[name]
    rng = np.random.default_rng(seed)
    return [degrade(rgb, level, rng) for level in range(1, num_levels + 1)]


@pytest.fixture(scope="module")
def coded(make_picture):
    """Codec to every level of its ladder of one picture, the uncoded frame first, as RGB."""
    rgb = make_picture(1, *SIZE)
    return {
        name: [
            reduced_rgb(coded_frame(rgb, name, level), longest_px=1 << 20)
            for level in range(len(rates) + 1)
        ]
        for name, (_, rates) in CODEC_LADDERS.items()
    }


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("name", PICTURE_LADDERS)
def test_each_level_is_worse_than_the_last(make_picture, name, seed):
    """The squared error against the clean picture rises from level to level, all drawn alike."""
    rgb = make_picture(seed, *SIZE)
    degrade, num_levels = PICTURE_LADDERS[name]
    levels = range(1, num_levels + 1)
    errors = [mse(degrade(rgb, level, np.random.default_rng(seed)), rgb) for level in levels]
    assert errors[0] > 0
    assert all(b > a for a, b in pairwise(errors)), errors


@pytest.mark.parametrize("seed", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("name", PICTURE_LADDERS)
def test_two_levels_on_is_worse_whatever_was_drawn(make_picture, name, seed):
    """A new direction or filter at every level may swap neighbours, but never levels two apart."""
    rgb = make_picture(seed, *SIZE)
    errors = [mse(picture, rgb) for picture in degraded(name, rgb, seed)]
    assert all(b > a for a, b in zip(errors, errors[2:], strict=False)), errors


@pytest.mark.parametrize("name", PICTURE_LADDERS)
def test_the_shape_stays(make_picture, name):
    """Every level of a picture ladder is uint8 of the clean picture's shape, odd sides included."""
    rgb = make_picture(4, 97, 131)
    for picture in degraded(name, rgb, 1):
        assert (picture.dtype, picture.shape) == (np.uint8, rgb.shape)


@pytest.mark.parametrize("name", PICTURE_LADDERS)
def test_the_clean_picture_is_not_written(make_picture, name):
    """Degrading leaves its input as it was."""
    rgb = make_picture(5, *SIZE)
    before = rgb.copy()
    degraded(name, rgb, 1)
    np.testing.assert_array_equal(rgb, before)


@pytest.mark.parametrize("name", PICTURE_LADDERS)
def test_a_seed_repeats_a_ladder(make_picture, name):
    """One seed gives the same pixels twice."""
    rgb = make_picture(6, *SIZE)
    for first, second in zip(degraded(name, rgb, 8), degraded(name, rgb, 8), strict=True):
        np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("name", ["noise", "low_light_noise", "motion_blur"])
def test_another_seed_is_another_ladder(make_picture, name):
    """What is drawn by chance differs from seed to seed."""
    rgb = make_picture(6, *SIZE)
    assert mse(degraded(name, rgb, 8)[2], degraded(name, rgb, 9)[2]) > 0


@pytest.mark.parametrize("name", CODEC_LADDERS)
def test_codecs_are_ordered(coded, name):
    """The squared error against the uncoded frame rises with every step of the rate factor."""
    clean, *levels = coded[name]
    errors = [mse(picture, clean) for picture in levels]
    assert all(b > a for a, b in pairwise(errors)), errors


@pytest.mark.parametrize("name", CODEC_LADDERS)
def test_the_first_codec_level_shows_the_same_picture(coded, name):
    """Coding at the best rate keeps colours, range and the frame: over 33 dB to the uncoded one."""
    clean, first = coded[name][:2]
    assert 10 * np.log10(255**2 / mse(first, clean)) > 33


@pytest.mark.parametrize("name", ["jpeg", *CODEC_LADDERS])
def test_the_last_level_is_much_worse_than_the_first(make_picture, coded, name):
    """A lossy codec's last level has at least four times the squared error of its first."""
    rgb = make_picture(1, *SIZE)
    clean, *levels = coded[name] if name in coded else [rgb, *degraded(name, rgb, 1)]
    assert mse(levels[-1], clean) > 4 * mse(levels[0], clean)


@pytest.mark.parametrize("name", CODEC_LADDERS)
@pytest.mark.parametrize("size", [(131, 170), (130, 171), (97, 133)])
def test_coded_planes_are_even_frames_of_the_pan(make_picture, name, size):
    """Both ends of a codec ladder are 4:2:0 planes of even sides, as large as the pan's frames."""
    rgb = make_picture(7, *size)
    frame = list(pan(rgb))[KEPT_FRAME]
    for level in (0, len(CODEC_LADDERS[name][1])):
        planes = coded_frame(rgb, name, level)
        assert planes.size == frame.shape[:2]
        assert planes.size[0] % 2 == planes.size[1] % 2 == 0
        assert planes.samples[1].shape == (planes.size[0] // 2, planes.size[1] // 2)


def test_the_pan_moves_by_its_step(make_picture):
    """Each frame of the pan is the one before, moved by two pixels right and down."""
    rgb = make_picture(8, *SIZE)
    for before, after in pairwise(pan(rgb, step_px=2)):
        np.testing.assert_array_equal(before[2:, 2:], after[:-2, :-2])
