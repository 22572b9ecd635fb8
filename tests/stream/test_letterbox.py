"""letterbox: bars found, steady, never too much."""

from __future__ import annotations

import numpy as np
import pytest

from dgiqa_stream.letterbox import LetterboxDetector
from dgiqa_stream.types import Crop, Planes


def planes(luma, *, bits=8, full=False, rotation=0):
    """Grey planes of 8-bit luma, deepened to ``bits``."""
    samples = luma.astype(np.uint8 if bits == 8 else np.uint16)
    return Planes((samples << (bits - 8),), full_range=full, bit_depth=bits, rotation=rotation)


def barred(bars, *, height=360, width=640, black=16, seed=0):
    """Textured luma with black bars: top, right, bottom, left."""
    rng = np.random.default_rng(seed)
    luma = rng.integers(40, 220, (height, width))
    top, right, bottom, left = bars
    luma[:top] = luma[height - bottom :] = black
    luma[:, :left] = luma[:, width - right :] = black
    return luma


@pytest.mark.parametrize(
    ("bars", "crop"),
    [
        ((0, 0, 0, 0), None),
        ((46, 0, 46, 0), Crop(0, 46, 640, 268)),
        ((0, 80, 0, 80), Crop(80, 0, 480, 360)),
        ((30, 40, 50, 60), Crop(60, 30, 540, 280)),
        ((46, 0, 0, 0), Crop(0, 46, 640, 314)),
        ((6, 12, 7, 3), None),  # under 2 % of 360 and 640
        ((8, 13, 8, 13), Crop(13, 8, 614, 344)),
        ((0, 250, 0, 250), Crop(192, 0, 256, 360)),  # never more than 30 % from a side
    ],
)
def test_bars_are_found(bars, crop):
    """Each bar is cut to the pixel, unless it is tiny; at most 30 % of a side goes."""
    assert LetterboxDetector().update(planes(barred(bars)), 0.0) == crop


def test_light_between_the_lines_looked_at_first_is_no_darkness():
    """A frame with two bright bands, in none of the few lines that usually show that a frame is
    not dark, has its bars cut all the same; wholly dark, it has none known.
    """
    luma = np.full((1080, 1920), 16)
    assert LetterboxDetector().update(planes(luma), 0.0) is None
    luma[400:420] = luma[700:710] = 180  # coarse lines are 9 apart, every eighth of them 72
    assert LetterboxDetector().update(planes(luma), 0.0) == Crop(0, 324, 1920, 432)


@pytest.mark.parametrize("bits", [8, 10, 12, 16])
@pytest.mark.parametrize(("full", "black"), [(False, 16), (False, 22), (True, 0), (True, 7)])
def test_black_follows_range_and_depth(bits, full, black):
    """Black is what the range and depth say it is, with some coding noise."""
    found = LetterboxDetector().update(
        planes(barred((46, 0, 46, 0), black=black), bits=bits, full=full), 0.0
    )
    assert found == Crop(0, 46, 640, 268)


def test_dark_grey_is_no_bar_in_full_range():
    """A flat band of luma 16 is black in limited range, but picture in full range."""
    luma = barred((46, 0, 46, 0), black=16)
    assert LetterboxDetector().update(planes(luma, full=True), 0.0) is None


def test_blue_edges_are_picture():
    """In RGB a saturated blue edge is not taken for a bar, though its green is 0."""
    rgb = np.repeat(barred((0, 0, 0, 0))[..., None], 3, axis=2).astype(np.uint8)
    rgb[:60] = (0, 0, 200)
    rgb[-60:] = 0
    found = LetterboxDetector().update(Planes((rgb,), full_range=True), 0.0)
    assert found == Crop(0, 0, 640, 300)


@pytest.mark.parametrize("rotation", [0, 90, 180, 270])
def test_crop_is_upright(rotation):
    """The crop of a picture stored turned equals the crop of the same picture stored upright."""
    upright = barred((30, 40, 50, 60))
    stored = np.ascontiguousarray(np.rot90(upright, rotation // 90))
    found = LetterboxDetector().update(planes(stored, rotation=rotation), 0.0)
    assert found == Crop(60, 30, 540, 280)


def test_dark_frames_change_nothing():
    """Black frames, however many, neither cut nor end the memory of what was seen."""
    detector = LetterboxDetector()
    picture, black = planes(barred((46, 0, 46, 0))), planes(np.full((360, 640), 16))
    assert detector.update(black, 0.0) is None
    detector.update(picture, 1.0)
    for second in range(2, 60):
        assert detector.update(black, float(second)) == Crop(0, 46, 640, 268)
    fading_in = planes(barred((100, 180, 100, 180)))
    assert detector.update(fading_in, 60.0) == Crop(0, 46, 640, 268)


def test_grows_at_once_and_shrinks_after_ten_seconds():
    """A full picture ends the cut with its first frame; bars count again ten seconds later."""
    detector = LetterboxDetector()
    full, wide = planes(barred((0, 0, 0, 0))), planes(barred((46, 0, 46, 0)))
    assert detector.update(wide, 0.0) is not None
    assert detector.update(full, 0.5) is None
    found = {t: detector.update(wide, t) for t in np.arange(1.0, 15.0, 0.5)}
    assert all(crop is None for t, crop in found.items() if t <= 10.0)
    assert all(crop == Crop(0, 46, 640, 268) for t, crop in found.items() if t >= 12.5)


def test_a_subtitle_in_the_bar_is_picture():
    """Text in the lower bar keeps the bar from being cut."""
    luma = barred((46, 0, 46, 0))
    luma[325:345, 200:440:3] = 235
    found = LetterboxDetector().update(planes(luma), 0.0)
    assert found == Crop(0, 46, 640, 345 - 46)


def test_a_new_size_starts_anew():
    """When the resolution changes, the old bars are forgotten."""
    detector = LetterboxDetector()
    detector.update(planes(barred((46, 0, 46, 0))), 0.0)
    assert detector.update(planes(barred((0, 0, 0, 0), height=180, width=320)), 0.1) is None


@pytest.mark.parametrize("shape", [(1, 1), (2, 300), (9, 9)])
def test_tiny_pictures_do_no_harm(shape):
    """Pictures of a few pixels are left whole."""
    assert LetterboxDetector().update(planes(np.full(shape, 100)), 0.0) is None
