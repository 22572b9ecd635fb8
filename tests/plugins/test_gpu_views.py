"""plugins.torch_gpu: views cut by torch against those of the runtime, from the same planes."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")

# ruff: noqa: E402 - what follows needs torch
from dgiqa_stream.preprocess import ViewSpec, cut_view, make_batch
from dgiqa_stream.types import ColorMatrix, Crop, HdrTags, Planes
from plugins.torch_gpu.planes import TorchPlanes, tensors_of
from plugins.torch_gpu.views import cut_views

WHOLE = ViewSpec("whole", "whole", 224, 224)
GRID = ViewSpec("fragments", "fragments", 160, 160, rows=4, columns=4)
NARROW = ViewSpec("narrow", "fragments", 96, 156, rows=3, columns=2)
SMOOTH = ViewSpec("smooth", "whole", 224, 224, reduction="halved-smoothed")
VIEWS = [WHOLE, SMOOTH, GRID, NARROW]
CHROMA = {"420": (2, 2), "422": (1, 2), "444": (1, 1), "440": (2, 1), "411": (1, 4), "410": (4, 4)}
SIZES = [(1080, 1920), (448, 896), (720, 576), (721, 1281), (449, 447), (135, 241), (9, 8)]


def picture(size, *, chroma="420", bits=8, seed=0, **tags):
    """Structure and noise in limited range, as planes of the kind that a decoder gives."""
    rng = np.random.default_rng(seed)
    height, width = size
    down, across = CHROMA[chroma]
    shapes = [size, *[(-(-height // down), -(-width // across))] * 2]
    top = 2**bits
    planes = []
    for number, (h, w) in enumerate(shapes):
        y, x = np.mgrid[:h, :w]
        wave = np.sin(x / (7 + number)) * np.cos(y / 11) * 0.3 + 0.5
        noise = rng.normal(0, 0.08, (h, w))
        planes.append(((wave + noise).clip(0, 1) * (top - 1)).astype("u1" if bits == 8 else "u2"))
    return Planes(tuple(planes), bit_depth=bits, **tags)


def grey(size, *, bits=8):
    """Luma alone."""
    return Planes(picture(size, bits=bits).samples[:1], bit_depth=bits)


def rgb(size, seed=0):
    """Packed RGB noise."""
    samples = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    return Planes((samples,), full_range=True)


def largest_difference(pictures, views=VIEWS, crops=None):
    """Of any sample of any view, in steps of 255, between torch's views and the runtime's."""
    found = cut_views([tensors_of(p) for p in pictures], views, crops=crops)
    crops = crops or [None] * len(pictures)
    return max(
        int(np.abs(found[v.name][n].numpy().astype(int) - cut_view(p, v, crop=crops[n])).max())
        for v in views
        for n, p in enumerate(pictures)
    )


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("bits", [8, 10])
def test_views_of_any_size_are_those_of_the_runtime(size, bits):
    """4:2:0 of common, odd and tiny sizes gives the runtime's views, at most one step apart."""
    assert largest_difference([picture(size, bits=bits)]) <= 1


@pytest.mark.parametrize("chroma", CHROMA)
@pytest.mark.parametrize("bits", [8, 9, 10, 12])
def test_every_chroma_format_is_that_of_the_runtime(chroma, bits):
    """Each subsampling and bit depth gives the runtime's views, at most one step apart."""
    assert largest_difference([picture((271, 483), chroma=chroma, bits=bits)]) <= 1


@pytest.mark.parametrize("matrix", ColorMatrix)
@pytest.mark.parametrize("full_range", [False, True])
@pytest.mark.parametrize("bits", [8, 10])
def test_every_colour_tag_is_that_of_the_runtime(matrix, full_range, bits):
    """Each matrix and range gives the runtime's colours, at most one step apart."""
    tags = {"matrix": matrix, "full_range": full_range}
    assert largest_difference([picture((270, 480), bits=bits, **tags)]) <= 1


@pytest.mark.parametrize("rotation", [90, 180, 270])
def test_a_turned_picture_is_cut_upright(rotation):
    """Each turn gives the runtime's upright views, with and without a crop."""
    turned = picture((240, 400), rotation=rotation)
    assert largest_difference([turned]) <= 1
    assert largest_difference([turned], crops=[Crop(13, 7, 201, 190)]) <= 1


@pytest.mark.parametrize("made", [grey((333, 250)), grey((333, 250), bits=10), rgb((301, 450))])
def test_grey_and_rgb_are_those_of_the_runtime(made):
    """Pictures without chroma, and packed RGB, give the runtime's views."""
    assert largest_difference([made]) <= 1


@pytest.mark.parametrize(
    "hdr", [HdrTags("pq", 1000.0), HdrTags("pq", 4000.0, "p3"), HdrTags("hlg")]
)
def test_hdr_is_tone_mapped_as_by_the_runtime(hdr):
    """PQ and HLG pictures become the runtime's SDR views, at most one step apart."""
    tags = {"matrix": ColorMatrix.BT2020, "hdr": hdr}
    assert largest_difference([picture((270, 480), bits=10, **tags)], [WHOLE, GRID]) <= 1


def test_eight_bit_views_are_the_very_same():
    """8-bit views equal OpenCV's bit for bit: where they did not, colours could differ by two."""
    pictures = [picture(size, seed=n) for n, size in enumerate(SIZES[1:])]
    assert largest_difference(pictures) == 0


def test_a_mixed_batch_is_cut_as_one_by_one():
    """Formats, sizes, tags and crops in one batch leave each picture where it was."""
    pictures = [
        picture((270, 480), seed=1),
        picture((270, 480), seed=2, matrix=ColorMatrix.BT601, full_range=True),
        rgb((120, 90)),
        picture((270, 480), seed=3, bits=10),
        picture((270, 480), seed=4),
        picture((480, 270), seed=5, chroma="444", rotation=90),
    ]
    crops = [None, None, None, None, Crop(20, 30, 200, 100), None]
    assert largest_difference(pictures, crops=crops) <= 1


def test_nv12_and_p010_are_their_planar_twins():
    """Interleaved chroma, and ten bits at the top of a word, give the views of the planar twin."""
    for bits in (8, 10):
        planar = picture((271, 481), bits=bits)
        y, cb, cr = (torch.from_numpy(p << (6 if bits == 10 else 0)) for p in planar.samples)
        packed = TorchPlanes((y, torch.stack((cb, cr), -1)), bit_depth=16 if bits == 10 else 8)
        found = cut_views([packed], VIEWS)
        wanted = make_batch([planar], VIEWS).views
        for name, view in found.items():
            assert np.abs(view.numpy().astype(int) - wanted[name]).max() <= 1
        assert np.array_equal(packed.on_cpu().samples[2], planar.samples[2] << (bits == 10) * 6)


def test_planes_with_padding_are_read_in_place():
    """A padded plane, as decoders give them, is neither copied nor misread."""
    wide = np.random.default_rng(0).integers(0, 256, (100, 192), dtype=np.uint8)
    planes = Planes((wide[:, :150],))
    tensors = tensors_of(planes)
    assert tensors.tensors[0].data_ptr() == wide.ctypes.data
    assert largest_difference([planes]) == 0


def test_a_crop_that_leaves_nothing_is_refused():
    """A crop outside the picture raises ValueError, as in the runtime."""
    with pytest.raises(ValueError, match="leaves less than 8 pixels"):
        cut_views([tensors_of(rgb((60, 60)))], VIEWS, crops=[Crop(100, 0, 20, 20)])


@pytest.mark.parametrize(
    ("shapes", "bits", "dtype"),
    [
        ([(4, 4), (2, 2)], 8, torch.uint8),
        ([(4, 4), (2, 2), (2, 1)], 8, torch.uint8),
        ([(4, 4, 4)], 8, torch.uint8),
        ([(0, 4)], 8, torch.uint8),
        ([(4, 4)], 10, torch.uint8),
    ],
)
def test_tensors_that_are_no_picture_are_refused(shapes, bits, dtype):
    """Shapes or types that form no picture raise ValueError when built."""
    with pytest.raises(ValueError, match=r"neither RGB|must be"):
        TorchPlanes(tuple(torch.zeros(s, dtype=dtype) for s in shapes), bit_depth=bits)
