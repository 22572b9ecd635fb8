"""preprocess: colour against formulae, geometry against plain NumPy."""

from __future__ import annotations

import numpy as np
import pytest

from dgiqa_stream.preprocess import (
    ViewSpec,
    _smooth,
    cut_view,
    make_batch,
    reduced_rgb,
    smoothing,
    stored_region,
)
from dgiqa_stream.types import ColorMatrix, Crop, Planes

WHOLE = ViewSpec("whole", "whole", 60, 80)
SMOOTH = ViewSpec("smooth", "whole", 60, 80, reduction="halved-smoothed")
GRID = ViewSpec("grid", "fragments", 64, 96, rows=2, columns=3)
# E'Y = KR R + KG G + KB B; E'CB = (B - Y) / 1.8556…: written out from the Recommendations, not
# taken from the code under test. (KR, KG, KB, B-Y divisor, R-Y divisor)
RECOMMENDATIONS = {
    ColorMatrix.BT601: (0.299, 0.587, 0.114, 1.772, 1.402),  # BT.601-7, 2.5.1 and 2.5.2
    ColorMatrix.BT709: (0.2126, 0.7152, 0.0722, 1.8556, 1.5748),  # BT.709-6, item 3
    ColorMatrix.BT2020: (0.2627, 0.6780, 0.0593, 1.8814, 1.4746),  # BT.2020-2, table 4
}
PATCHES = [
    (255, 255, 255),
    (0, 0, 0),
    (128, 128, 128),
    (255, 0, 0),
    (0, 255, 0),
    (0, 0, 255),
    (200, 120, 40),
    (12, 90, 160),
]


def coded(rgb, matrix, full, bits):
    """Y', Cb, Cr of one colour as integers (BT.601-7 2.5.3, BT.709-6 4.1, H.273 for full range)."""
    kr, kg, kb, for_b, for_r = RECOMMENDATIONS[matrix]
    r, g, b = (v / 255 for v in rgb)
    y = kr * r + kg * g + kb * b
    cb, cr = (b - y) / for_b, (r - y) / for_r
    scale = 2 ** (bits - 8)
    top = 2**bits - 1
    if full:
        values = 255 * scale * y, 255 * scale * cb + 128 * scale, 255 * scale * cr + 128 * scale
    else:
        values = (
            (219 * y + 16) * scale,
            (224 * cb + 128) * scale,
            (224 * cr + 128) * scale,
        )
    return [min(max(round(v), 0), top) for v in values]


def flat(values, bits, matrix, full, size=(96, 128)):
    """Planes of one colour, 4:2:0."""
    dtype = np.uint8 if bits == 8 else np.uint16
    height, width = size
    shapes = [(height, width), (height // 2, width // 2), (height // 2, width // 2)]
    samples = tuple(np.full(s, v, dtype) for s, v in zip(shapes, values, strict=True))
    return Planes(samples, matrix=matrix, full_range=full, bit_depth=bits)


def random_planes(height=180, width=320, *, bits=8, rotation=0, seed=0, chroma=2):
    """Smooth-ish random 4:2:0 (or 4:4:4) planes."""
    rng = np.random.default_rng(seed)
    dtype = np.uint8 if bits == 8 else np.uint16
    samples = []
    for step in (1, chroma, chroma):
        shape = -(-height // step), -(-width // step)
        samples.append((rng.integers(16, 235, shape) << (bits - 8)).astype(dtype))
    return Planes(tuple(samples), bit_depth=bits, rotation=rotation)


@pytest.mark.parametrize("view", [WHOLE, GRID], ids=["whole", "fragments"])
@pytest.mark.parametrize("bits", [8, 10, 12])
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("matrix", list(ColorMatrix))
@pytest.mark.parametrize("rgb", PATCHES)
def test_colours_come_back(rgb, matrix, full, bits, view):
    """A colour coded by the Recommendations' formulae comes back within what 8-bit coding loses.

    Half a step of each of Y', Cb and Cr, times the largest gains (2.15 for limited range), plus
    half a step of rounding: less than 3 of 255.
    """
    planes = flat(coded(rgb, matrix, full, bits), bits, matrix, full)
    out = cut_view(planes, view).astype(int)
    assert np.abs(out - np.array(rgb)).max() <= (3 if bits == 8 else 1)


@pytest.mark.parametrize("view", [WHOLE, GRID], ids=["whole", "fragments"])
@pytest.mark.parametrize("size", [(181, 321), (240, 426), (240, 427)])
def test_padded_views_equal_copies(size, view):
    """Rows with padding, as decoders give them, make the same view as contiguous samples."""
    whole = random_planes(*size)
    padded = []
    for s in whole.samples:
        room = np.full((s.shape[0], s.shape[1] + 37), 255, np.uint8)
        room[:, : s.shape[1]] = s
        padded.append(room[:, : s.shape[1]])
    np.testing.assert_array_equal(cut_view(Planes(tuple(padded)), view), cut_view(whole, view))


@pytest.mark.parametrize("crop", [None, Crop(20, 30, 120, 80)])
@pytest.mark.parametrize("kind", ["whole", "fragments"])
@pytest.mark.parametrize("rotation", [90, 180, 270])
def test_a_turned_picture_gives_the_upright_view(rotation, kind, crop):
    """The view of a picture stored turned equals the view of the same picture stored upright."""
    rows, columns = (2, 3) if kind == "fragments" else (1, 1)
    view = ViewSpec("v", kind, 64, 96, rows=rows, columns=columns)
    upright = random_planes(192, 288, chroma=1)
    stored = tuple(np.ascontiguousarray(np.rot90(s, rotation // 90)) for s in upright.samples)
    turned = Planes(stored, rotation=rotation)
    ours, wanted = cut_view(turned, view, crop=crop), cut_view(upright, view, crop=crop)
    # OpenCV rounds rows before columns: a step in Y and in Cb, whose gain is 2.1
    tolerance = 1 if kind == "fragments" else 4
    np.testing.assert_allclose(ours.astype(int), wanted.astype(int), atol=tolerance)


@pytest.mark.parametrize("rotation", [0, 90, 180, 270])
def test_reduced_rgb_is_upright_and_fits(rotation):
    """A reduced picture is turned upright, keeps its shape and is never enlarged."""
    planes = random_planes(180, 320, rotation=rotation)
    turned = rotation in (90, 270)
    assert reduced_rgb(planes, longest_px=160).shape == ((160, 90, 3) if turned else (90, 160, 3))
    assert max(reduced_rgb(planes, longest_px=9999).shape) == 320


def test_whole_view_is_the_area_average():
    """An exact reduction by four averages sixteen samples, within a step of rounding each time."""
    luma = np.random.default_rng(0).integers(0, 256, (240, 320), dtype=np.uint8)
    out = cut_view(Planes((luma,), full_range=True), WHOLE)[..., 0]
    wanted = luma.reshape(60, 4, 80, 4).mean(axis=(1, 3))
    assert np.abs(out - wanted).max() <= 1.01


def halved_then_bilinear(plane, length):
    """The rule along the first axis in float: pairs' means while twice the length, then bilinear
    with sample centres at half steps.
    """
    plane = plane.astype(float)
    while len(plane) >= 2 * length:
        even = plane[: len(plane) & ~1]
        plane = (even[0::2] + even[1::2]) / 2
    at = (np.arange(length) + 0.5) * len(plane) / length - 0.5
    low = np.clip(np.floor(at).astype(int), 0, len(plane) - 2)
    share = np.clip(at - low, 0, 1).reshape(-1, *[1] * (plane.ndim - 1))
    return plane[low] * (1 - share) + plane[low + 1] * share


@pytest.mark.parametrize("size", [(270, 480), (1080, 1920), (77, 501), (61, 90), (360, 41)])
def test_whole_view_is_halved_then_bilinear(size):
    """A reduction by any factor, or a side that grows, is that of the rule written in float: at
    most a step of rounding for each halving and one for the bilinear.
    """
    luma = np.random.default_rng(0).integers(0, 256, size, dtype=np.uint8)
    out = cut_view(Planes((luma,), full_range=True), WHOLE)[..., 0]
    wanted = halved_then_bilinear(halved_then_bilinear(luma, 60).T, 80).T
    assert np.abs(out - wanted).max() <= 3
    assert abs((out - wanted).mean()) < 0.6


def smoothed(plane, length):
    """The rule along the first axis in float: what is left of a plane once it is halved, weighted
    so that white noise keeps 2/3 of its power over the ratio.
    """
    plane = plane.astype(float)
    while len(plane) >= 2 * length:
        plane = (plane[0 : len(plane) & ~1 : 2] + plane[1::2]) / 2
    ratio = len(plane) / length
    if ratio < 1:
        return plane
    a = (3 - np.sqrt(16 / ratio - 7)) / 8 if ratio > 1 else (4 - np.sqrt(8)) / 12
    around = np.concatenate((plane[:1], plane, plane[-1:]))
    return around[1:-1] * (1 - 2 * a) + (around[:-2] + around[2:]) * a


@pytest.mark.parametrize("size", [(270, 480), (1080, 1920), (77, 501), (60, 90), (360, 41)])
@pytest.mark.parametrize("bits", [8, 10, 16])
def test_a_smoothed_view_is_that_of_the_rule(size, bits):
    """Halvings, smoothing and bilinear sampling are those of the rule written in float, at most a
    step of rounding each; an axis that grows is not smoothed.
    """
    dtype = np.uint8 if bits == 8 else np.uint16
    luma = np.random.default_rng(0).integers(0, 1 << bits, size, dtype=dtype)
    out = cut_view(Planes((luma,), full_range=True, bit_depth=bits), SMOOTH)[..., 0]
    rows = halved_then_bilinear(smoothed(luma, 60), 60)
    wanted = halved_then_bilinear(smoothed(rows.T, 80), 80).T * 2.0 ** (8 - bits)
    assert np.abs(out - wanted).max() <= 3
    assert abs((out - wanted).mean()) < 0.6


def noise_left(side, view):
    """Power of white noise in a view of a square of it, times the pixels that made one."""
    noise = np.random.default_rng(side).integers(0, 256, (side, side), dtype=np.uint8)
    power = cut_view(Planes((noise,), full_range=True), view)[..., 0].astype(float).var()
    return power * (max(side, view.width) / view.width) ** 2


@pytest.mark.parametrize("doubled", [128, 256, 512, 1024])
def test_sharpness_does_not_jump_where_a_halving_begins(doubled):
    """Around a view's very size, twice, four and eight times that, the power of white noise stays
    what the reduction alone makes it, within 15 %; without smoothing it is halved at once.
    """
    sides = [doubled + n for n in (-9, -3, 0, 3, 9)]
    for reduction, most in (("halved-smoothed", 1.15), ("halved-bilinear", 5.0)):
        view = ViewSpec("v", "whole", 128, 128, reduction=reduction)
        left = [noise_left(side, view) for side in sides]
        assert max(left) / min(left) < most
        if reduction == "halved-bilinear":
            assert max(left) / min(left) > 2


def test_a_smoothing_keeps_the_power_that_its_formula_says():
    """The weights' power over all places is 2/3 over the ratio, to the rounding of 256ths."""
    for num_in in range(129, 257, 7):
        a = smoothing(num_in, 128) / 256
        assert 2 / 3 - 2 * a + 8 / 3 * a * a == pytest.approx(2 / 3 * 128 / num_in, abs=0.004)
    assert smoothing(256, 128) == 64
    assert smoothing(127, 128) == 0


@pytest.mark.parametrize("weight", range(1, 65))
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_opencv_smooths_in_whole_numbers(weight, dtype):
    """What the GPU's kernels do exactly, OpenCV's Gaussian of that deviation does exactly."""
    side = next(n for n in range(100, 201) if smoothing(n, 100) >= weight)
    weight = smoothing(side, 100)
    plane = np.random.default_rng(weight).integers(0, np.iinfo(dtype).max + 1, (side, 31), dtype)
    around = np.pad(plane.astype(np.int64), ((1, 1), (0, 0)), mode="edge")
    wanted = around[1:-1] * (256 - 2 * weight) + (around[:-2] + around[2:]) * weight
    np.testing.assert_array_equal(_smooth(plane, 100, 40), (wanted + 128) >> 8)


@pytest.mark.parametrize("chroma", [(1, 1), (2, 2), (1, 2)])
@pytest.mark.parametrize("size", [(1080, 1920), (895, 897), (250, 161)])
@pytest.mark.parametrize("view", [WHOLE, SMOOTH])
def test_planes_are_reduced_as_if_alone(size, chroma, view):
    """Colour is, to the byte, what each plane reduced alone comes to, also where luma and chroma
    are halved a different number of times.
    """
    (height, width), (down, across) = size, chroma
    rng = np.random.default_rng(3)
    small = -(-height // down), -(-width // across)
    y, cb, cr = (rng.integers(0, 256, s, dtype=np.uint8) for s in (size, small, small))
    neutral = np.full(size, 128, np.uint8)
    alone = [  # of grey, R = G = B = luma
        cut_view(Planes((plane,), full_range=True), view)[..., 0] for plane in (y, cb, cr)
    ]
    wanted = cut_view(Planes(tuple(alone), full_range=True), ViewSpec("same", "whole", 60, 80))
    np.testing.assert_array_equal(cut_view(Planes((y, cb, cr), full_range=True), view), wanted)
    grey = cut_view(Planes((y, neutral, neutral), full_range=True), view)
    np.testing.assert_array_equal(grey, np.repeat(alone[0][..., None], 3, axis=2))


def test_crop_equals_cutting_first():
    """Cropping is the same as giving the cropped samples."""
    planes = random_planes(200, 320)
    crop = Crop(40, 20, 160, 120)
    y, cb, cr = planes.samples
    cut = Planes((y[20:140, 40:200], cb[10:70, 20:100], cr[10:70, 20:100]))
    for view in (WHOLE, GRID):
        np.testing.assert_array_equal(cut_view(planes, view, crop=crop), cut_view(cut, view))


def test_a_crop_that_leaves_nothing_is_refused():
    """A crop outside the picture says so, with both sizes."""
    with pytest.raises(ValueError, match=r"320,0,50,50 .* 320x180"):
        cut_view(random_planes(), WHOLE, crop=Crop(320, 0, 50, 50))


def test_crop_corners_are_even():
    """An odd corner moves to the even sample before it, so that chroma stays in place."""
    assert stored_region(random_planes(), Crop(11, 7, 100, 90)) == (6, 10, 97, 111)


def test_fragments_are_native_samples_in_the_middle_of_their_cells():
    """Each fragment is untouched samples from the even place nearest its cell's middle."""
    height, width = 201, 333
    luma = np.random.default_rng(0).integers(0, 256, (height, width), dtype=np.uint8)
    out = cut_view(Planes((luma,), full_range=True), GRID)[..., 0]
    for row in range(2):
        for column in range(3):
            top = int(row * height / 2 + (height / 2 - 32) / 2) & ~1
            left = int(column * width / 3 + (width / 3 - 32) / 2) & ~1
            piece = out[row * 32 : row * 32 + 32, column * 32 : column * 32 + 32]
            np.testing.assert_array_equal(piece, luma[top : top + 32, left : left + 32])


@pytest.mark.parametrize("size", [(20, 24), (64, 96), (33, 400), (9, 9)])
def test_small_pictures_have_fragments_too(size):
    """Where fragments overlap or stick out, the view still has its size and only real samples."""
    luma = np.random.default_rng(0).integers(100, 120, size, dtype=np.uint8)
    out = cut_view(Planes((luma,), full_range=True), GRID)
    assert out.shape == (64, 96, 3)
    assert out.min() >= 100
    assert out.max() < 120


def test_views_repeat_themselves():
    """The same frame gives the same batch, sample for sample."""
    planes = random_planes()
    first, second = (make_batch([planes], [WHOLE, GRID]) for _ in range(2))
    for name in ("whole", "grid"):
        assert first.views[name].tobytes() == second.views[name].tobytes()


@pytest.mark.parametrize("bits", [9, 10, 12, 14])
@pytest.mark.parametrize("view", [WHOLE, GRID], ids=["whole", "fragments"])
def test_deep_samples_equal_8_bit_ones(bits, view):
    """The same picture with more bits gives the same view, within a step of rounding."""
    plain, deep = random_planes(seed=3), random_planes(seed=3, bits=bits)
    # Roundings of the halving and of the bilinear at 8 bits, times the gain of B from Cb (2.1);
    # halvings round halves up, which deep samples do not feel.
    ours, wanted = cut_view(deep, view).astype(int), cut_view(plain, view).astype(int)
    assert np.abs(ours - wanted).max() <= (1 if view is GRID else 5)
    assert abs((ours - wanted).mean()) < (0.5 if view is GRID else 1)
