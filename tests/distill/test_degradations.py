"""Ladders of degradations: the same from the same seed, worse with every level, composable."""

from __future__ import annotations

import numpy as np
import pytest

from dgiqa_stream.errors import ConfigError
from distill.data import codecs, damage, optics
from distill.data.degradations import (
    DEGRADATIONS,
    PICTURE_DEGRADATIONS,
    chain,
    degradation,
    ladder,
    ladder_rng,
)

TIMING = sorted(set(DEGRADATIONS) - set(PICTURE_DEGRADATIONS))
SLACK_DB = {"packet_loss": 0.5, "packet_corruption": 0.5}
"""A slice more that is lost may by chance be concealed better than its damaged neighbours are."""


def psnr(clean, degraded) -> float:
    """In dB; 99 where nothing differs."""
    error = np.mean((np.asarray(clean, np.float64) - np.asarray(degraded)) ** 2)
    return 99.0 if error == 0 else 10 * np.log10(255**2 / error)


@pytest.fixture(scope="module")
def pictures(make_picture):
    """Two generated pictures of different size and structure."""
    return [make_picture(3, 128, 160), make_picture(11, 192, 144)]


@pytest.fixture(scope="module")
def clip(make_picture):
    """Twelve frames of a pan, three pixels a frame."""
    wide = make_picture(5, 96, 200)
    return [np.ascontiguousarray(wide[:, 3 * i : 3 * i + 128]) for i in range(12)]


@pytest.mark.parametrize("name", PICTURE_DEGRADATIONS)
def test_each_level_is_farther_from_the_clean_picture(name, pictures):
    """PSNR against the clean picture falls from level to level on both pictures."""
    for picture in pictures:
        values = [psnr(picture, degraded) for degraded in ladder(name, picture, seed=1)]
        assert len(values) == DEGRADATIONS[name].num_levels >= 5
        assert np.all(np.diff(values) < SLACK_DB.get(name, 0.0)), values
        assert values[0] - values[-1] > 2


@pytest.mark.parametrize("name", [*TIMING, "interlacing", "packet_loss", "packet_corruption"])
def test_each_level_is_farther_from_the_clean_clip(name, clip):
    """The mean error over a clip grows from level to level, and the clip keeps its length."""
    errors = []
    for degraded in ladder(name, clip, seed=4):
        assert len(degraded) == len(clip)
        errors.append(np.mean((np.float64(degraded) - np.float64(clip)) ** 2))
    assert np.all(np.diff(errors) > -0.1 * np.array(errors[:-1])), errors
    assert errors[-1] > 2 * errors[0] > 0


@pytest.mark.parametrize("name", DEGRADATIONS)
def test_the_same_seed_gives_the_same_bytes(name, clip):
    """Two generators in one state give one result, whatever was drawn or coded."""
    level = DEGRADATIONS[name].num_levels // 2
    first, again = (
        DEGRADATIONS[name].apply(clip[:4], level, ladder_rng(7, "content", name)) for _ in range(2)
    )
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", PICTURE_DEGRADATIONS)
def test_odd_sizes_keep_their_shape(name, make_picture):
    """A picture of 67x95 comes back as uint8 of 67x95 and is not the one that went in."""
    picture = make_picture(2, 67, 95)
    before = picture.copy()
    out = degradation(name).apply(picture, 3, ladder_rng(0, "", name))
    assert (out.shape, out.dtype) == (picture.shape, np.uint8)
    assert (out != picture).any()
    np.testing.assert_array_equal(picture, before)


@pytest.mark.parametrize("name", ["gaussian_noise", "motion_blur", "haze", "h264", "freeze"])
def test_level_0_is_a_copy(name, clip):
    """Level 0 changes no byte and shares no memory with its input."""
    out = DEGRADATIONS[name].apply(clip, 0, np.random.default_rng(0))
    for a, b in zip(out, clip, strict=True):
        np.testing.assert_array_equal(a, b)
        assert not np.shares_memory(a, b)


def test_a_ladder_is_one_grain_growing(pictures):
    """The noise of two levels of one ladder is the same field: correlation above 0.95."""
    flat = np.full((96, 96, 3), 128, np.uint8)
    low, high = (list(ladder("gaussian_noise", flat, seed=3))[i].ravel() / 1.0 for i in (2, 4))
    assert np.corrcoef(low, high)[0, 1] > 0.95


def test_a_clip_has_one_direction_of_blur_and_ever_new_grain(pictures):
    """Equal frames are blurred equally, but no two get the same noise."""
    still = [pictures[0]] * 3
    blurred = degradation("motion_blur").apply(still, 4, np.random.default_rng(1))
    np.testing.assert_array_equal(blurred[0], blurred[2])
    noisy = degradation("gaussian_noise").apply(still, 4, np.random.default_rng(1))
    assert (noisy[0] != noisy[1]).mean() > 0.5


def test_haze_follows_its_law():
    """Depth 0 shows the scene; t = 1/2 mixes scene and airlight half and half in linear light."""
    grey = np.full((64, 64, 3), 60, np.uint8)
    near = optics.haze_through(grey, np.zeros((64, 64), np.float32), 3.0, 0.8)
    np.testing.assert_array_equal(near, grey)
    depth = np.full((64, 64), np.log(2), np.float32)
    half = optics.to_linear(optics.haze_through(grey, depth, 1.0, 0.8))
    wanted = (optics.to_linear(grey) + 0.8) / 2
    np.testing.assert_allclose(half, wanted, atol=0.004)  # half of an 8-bit step at this light


def test_depth_is_from_0_to_1_and_farther_up():
    """The synthetic depth spans 0..1 and its upper third lies behind its lower third."""
    for seed in range(5):
        depth = optics.synthetic_depth(90, 120, np.random.default_rng(seed))
        assert (depth.min(), depth.max()) == (0.0, 1.0)
        assert depth[:30].mean() > depth[-30:].mean() + 0.3


def test_sensor_noise_has_the_variance_of_its_model():
    """On a grey of linear light x, green has variance gain (x + 1/25) in linear light."""
    grey = np.full((256, 256, 3), 150, np.uint8)
    light = float(optics.to_linear(grey)[0, 0, 1])
    noisy = optics.sensor_noise(grey, 2, np.random.default_rng(5))
    variance = optics.to_linear(noisy)[..., 1].var()
    wanted = optics.SENSOR_GAIN[1] * (light + 1 / 25)
    assert variance == pytest.approx(wanted, rel=0.03)  # five deviations of a variance of 65,536


def test_linear_light_goes_both_ways():
    """Every sRGB byte survives the way to linear light and back."""
    every = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, 2)
    np.testing.assert_array_equal(optics.from_linear(optics.to_linear(every)), every)


def test_banding_leaves_the_stated_number_of_steps():
    """A ramp of 256 greys has 40 to 6 of them left, black and white among them."""
    ramp = np.arange(256, dtype=np.uint8)[None, :, None].repeat(64, 0).repeat(3, 2)
    for level, steps in enumerate(optics.BANDING_STEPS, 1):
        left = np.unique(degradation("banding").apply(ramp, level, np.random.default_rng(0)))
        assert (len(left), left[0], left[-1]) == (steps, 0, 255)


def test_a_pan_ends_on_its_picture(pictures):
    """The last frame of the clip made from a picture is that picture, byte by byte."""
    pan = damage.moving(pictures[0], num_frames=6, step_px=2)
    np.testing.assert_array_equal(pan[-1], pictures[0])
    np.testing.assert_array_equal(pan[-2][2:, 2:], pictures[0][:-2, :-2])


def test_freeze_holds_one_run_of_frames(clip):
    """At each level the stated share of frames is one frame repeated, all others are untouched."""
    for level, share in enumerate(damage.FROZEN_SHARE, 1):
        out = degradation("freeze").apply(clip, level, np.random.default_rng(8))
        changed = [i for i, frame in enumerate(out) if (frame != clip[i]).any()]
        assert len(changed) == max(2, round(share * len(clip))) - 1
        held = clip[changed[0] - 1]
        assert changed == list(range(changed[0], changed[-1] + 1))
        assert all((out[i] == held).all() for i in changed)


def test_a_dropped_frame_is_the_one_before_again(clip):
    """Every frame is its own or the one shown before it, and higher levels drop these and more."""
    lost_before: set[int] = set()
    for level, share in enumerate(damage.DROPPED_SHARE, 1):
        out = degradation("dropped_frames").apply(clip, level, np.random.default_rng(8))
        lost = {i for i, frame in enumerate(out) if (frame != clip[i]).any()}
        assert all((out[i] == out[i - 1]).all() for i in lost)
        assert len(lost) == max(1, round(share * (len(clip) - 1)))
        assert lost_before <= lost
        lost_before = lost


def test_fields_are_woven_from_two_times(clip):
    """Every other row is the present frame's, the rest are those of an earlier frame."""
    out = degradation("interlacing").apply(clip, 3, np.random.default_rng(0))
    rows = [bool((out[6][row] == clip[6][row]).all()) for row in range(len(clip[6]))]
    assert rows[::2] != rows[1::2]
    late = rows.index(False)
    np.testing.assert_array_equal(out[6][late::2], clip[3][late::2])


def test_lost_packets_leave_the_first_frame_whole(clip):
    """Nothing of the first frame is lost at any level, and later frames are damaged."""
    alone = codecs.transcode(clip[:1], "h264", 24)
    for level in (1, 6):
        out = degradation("packet_loss").apply(clip, level, np.random.default_rng(2))
        assert psnr(clip[0], out[0]) > psnr(clip[0], alone[0]) - 1
        assert psnr(clip[-1], out[-1]) < psnr(clip[0], out[0]) - 1


@pytest.mark.parametrize("codec", codecs.CODECS)
def test_every_codec_codes_with_what_it_names(codec, clip):
    """The coded file says the codec asked for, is smaller at a worse point and keeps all frames."""
    frames, points = clip[:3], codecs.CODECS[codec].points
    even = [f[:96, :128] for f in frames]
    good, bad = (codecs.encode(even, codec, point) for point in (points[0], points[-1]))
    assert len(bad) < len(good)
    with codecs.av.open(codecs.io.BytesIO(good)) as container:
        names = {"mpeg2": "mpeg2video", "h265": "hevc"}
        assert container.streams.video[0].codec_context.codec.canonical_name == names.get(
            codec, codec
        )
    assert len(codecs.decode(good)) == 3


def test_the_best_point_of_a_codec_is_nearly_the_picture(clip):
    """Grey pictures (no chroma to halve) come back above 30 dB at each codec's first point."""
    grey = [frame[..., :1].repeat(3, 2) for frame in clip[:3]]
    for name, codec in codecs.CODECS.items():
        out = codecs.transcode(grey, name, codec.points[0])
        assert psnr(grey[-1], out[-1]) > 30, name


def test_a_chain_is_its_steps_one_after_another(pictures):
    """The chain's result is that of its steps by hand, and its components are the steps alone."""
    made = chain(("haze", 3), ("gaussian_noise", 2), ("mjpeg", 4))
    assert made.name == "haze:3+gaussian_noise:2+mjpeg:4"
    seeds = np.random.default_rng(6).integers(2**63, size=3)
    by_hand = pictures[0]
    for (step, level), seed in zip(made.steps, seeds, strict=True):
        by_hand = step.apply(by_hand, level, np.random.default_rng(seed))
    np.testing.assert_array_equal(made.apply(pictures[0], np.random.default_rng(6)), by_hand)
    alone = made.components(pictures[0], np.random.default_rng(6))
    hazy = degradation("haze").apply(pictures[0], 3, np.random.default_rng(seeds[0]))
    np.testing.assert_array_equal(alone[0], hazy)
    assert psnr(pictures[0], by_hand) < min(psnr(pictures[0], c) for c in alone)


def test_a_chain_works_on_clips(clip):
    """A chain of a still, a coded and a timing step keeps number and shape of frames."""
    made = chain(("low_light", 1), ("h264", 3), ("freeze", 4))
    out = made.apply(clip, np.random.default_rng(1))
    assert len(out) == len(clip)
    assert {f.shape for f in out} == {clip[0].shape}


@pytest.mark.parametrize("name", TIMING)
def test_a_picture_cannot_freeze(name, pictures):
    """A degradation in time says that it needs a clip."""
    with pytest.raises(ConfigError, match=f"{name} needs a clip"):
        degradation(name).apply(pictures[0], 1, np.random.default_rng(0))
    with pytest.raises(ConfigError, match=f"{name} needs a clip of 2 frames or more, not 1"):
        degradation(name).apply(pictures[:1], 1, np.random.default_rng(0))


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (np.zeros((80, 80), np.uint8), r"not uint8 \(80, 80\)"),
        (np.zeros((80, 80, 3), np.float32), "not float32"),
        (np.zeros((80, 40, 3), np.uint8), "64 px or more"),
        ([], "without frames"),
        ([np.zeros((80, 80, 3), np.uint8), np.zeros((82, 80, 3), np.uint8)], "one size"),
    ],
)
def test_frames_that_are_none_are_refused(wrong, told):
    """Another type, shape or size is one error that states it."""
    with pytest.raises(ValueError, match=told):
        degradation("banding").apply(wrong, 1, np.random.default_rng(0))


def test_unknown_names_and_levels_are_refused(pictures):
    """A misspelt ladder, a level beyond it and an empty chain are configuration errors."""
    with pytest.raises(ConfigError, match=r"no degradation 'fog'; known: gaussian_blur"):
        degradation("fog")
    with pytest.raises(ConfigError, match="haze has levels 0 to 6, not 7"):
        degradation("haze").apply(pictures[0], 7, np.random.default_rng(0))
    with pytest.raises(ConfigError, match="haze has levels 1 to 6, not 0"):
        chain(("haze", 0))
    with pytest.raises(ConfigError, match="one step or more"):
        chain()


def test_depth_of_another_size_is_refused(pictures):
    """A depth map that does not fit its picture is told with both sizes."""
    with pytest.raises(ValueError, match=r"depth of shape \(8, 8\)"):
        optics.haze_through(pictures[0], np.zeros((8, 8), np.float32), 1.0, 0.8)
