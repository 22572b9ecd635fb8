"""Decoded frames against FFmpeg's own program: samples, colours, turns and sizes.

That program is of another version and build than the library, and its colours are made from a chart
that is known; nothing here is compared with ourselves.
"""

from __future__ import annotations

import itertools

import media_servers as servers
import numpy as np
import pytest
from ffmpeg_clips import (
    VP9,
    X264,
    X265,
    difference,
    make,
    packed,
    raw_all,
    read,
)

from dgiqa_stream.preprocess import reduced_rgb

pytestmark = pytest.mark.servers


@pytest.fixture(autouse=True)
def needs_ffmpeg(missing_server):
    """The reference of every test here."""
    servers.require_ffmpeg(missing_server)


# Samples --------------------------------------------------------------------------------------

CODED = {  # name: (encoding, suffix, size)
    "h264-420": (f"{X264} -pix_fmt yuv420p", "mp4", (320, 180)),
    "h264-422": (f"{X264} -pix_fmt yuv422p", "mp4", (426, 240)),
    "h264-444": (f"{X264} -pix_fmt yuv444p", "mkv", (322, 178)),
    "h264-420-10": (f"{X264} -pix_fmt yuv420p10le", "ts", (320, 180)),
    "h264-422-10": (f"{X264} -pix_fmt yuv422p10le", "mp4", (426, 240)),
    "hevc-420-10": (f"{X265} -pix_fmt yuv420p10le", "mp4", (426, 240)),
    "hevc-420-12": (f"{X265} -pix_fmt yuv420p12le", "mkv", (320, 180)),
    "hevc-444-12": (f"{X265} -pix_fmt yuv444p12le", "mp4", (320, 180)),
    "vp9-odd": (f"{VP9} -pix_fmt yuv420p", "webm", (35, 17)),
    "ffv1-odd-420": ("-c:v ffv1 -pix_fmt yuv420p", "mkv", (427, 241)),
    "ffv1-odd-422-10": ("-c:v ffv1 -pix_fmt yuv422p10le", "mkv", (161, 121)),
    "ffv1-odd-410": ("-c:v ffv1 -pix_fmt yuv410p", "mkv", (163, 121)),
    "ffv1-odd-411": ("-c:v ffv1 -pix_fmt yuv411p", "mkv", (163, 121)),
    "ffv1-440": ("-c:v ffv1 -pix_fmt yuv440p", "mkv", (163, 121)),
    "ffv1-9": ("-c:v ffv1 -pix_fmt yuv444p9le", "mkv", (161, 121)),
    "ffv1-14": ("-c:v ffv1 -pix_fmt yuv444p14le", "mkv", (161, 121)),
    "grey": ("-c:v ffv1 -pix_fmt gray", "mkv", (161, 121)),
    "grey-12": ("-c:v ffv1 -pix_fmt gray12le", "mkv", (161, 121)),
    "prores": ("-c:v prores -pix_fmt yuv422p10le", "mov", (320, 180)),
    "mpeg2-422": ("-c:v mpeg2video -pix_fmt yuv422p -q:v 4", "ts", (320, 180)),
    "mjpeg": ("-c:v mjpeg -pix_fmt yuvj422p -q:v 3", "avi", (161, 121)),
    "rgb": ("-c:v rawvideo -pix_fmt rgb24", "nut", (161, 121)),
}
LOSSY_BY_DESIGN = ("prores", "mpeg2-422", "mjpeg")
"""Their inverse transforms are not defined to the bit; builds may differ by a step."""


@pytest.fixture(scope="module")
def coded(tmp_path_factory):
    """Name to the clip and its frames as FFmpeg's program decodes them."""
    folder = tmp_path_factory.mktemp("coded")
    paths = make(folder, {name: (*clip, "null") for name, clip in CODED.items()})
    formats = {paths[name]: _word_after("-pix_fmt", CODED[name][0]) for name in CODED}
    theirs = raw_all(folder, formats)
    return {name: (path, theirs[path]) for name, path in paths.items()}


def _word_after(option, encoding):
    words = encoding.split()
    return words[words.index(option) + 1]


@pytest.mark.parametrize("name", CODED)
def test_samples_are_ffmpegs(coded, name):
    """Every sample of every frame is what FFmpeg's own program decodes: 4:1:0 to 4:4:4, 8 to 14
    bits, odd and padded sizes.
    """
    path, theirs = coded[name]
    info, frames = read(path)
    assert (info.width, info.height, len(frames)) == (*CODED[name][2], 10)
    assert info.pix_fmt == _word_after("-pix_fmt", CODED[name][0])
    off = difference(packed(frames), theirs, frames[0].planes.bit_depth)
    assert off.max() <= (name in LOSSY_BY_DESIGN)


ODD, EVEN = (97, 63), (98, 64)
CONVERTED = {  # what has no planes of our kind, or has alpha: (compared as, encoding, suffix, size)
    "argb": ("rgb24", "-c:v qtrle -pix_fmt argb", "mov", ODD),
    "rgba": ("rgb24", "-c:v png -pix_fmt rgba", "mov", ODD),
    "gbrp": ("rgb24", "-c:v ffv1 -pix_fmt gbrp", "mkv", ODD),
    "gbrap": ("rgb24", "-c:v ffv1 -pix_fmt gbrap", "mkv", ODD),
    "bgr24": ("rgb24", "-c:v rawvideo -pix_fmt bgr24", "avi", ODD),
    "yuyv422": ("yuv422p", "-c:v rawvideo -pix_fmt yuyv422", "nut", EVEN),
    "yuva420p": ("yuv420p", "-c:v ffv1 -pix_fmt yuva420p", "mkv", ODD),
    "yuva444p": ("yuv444p", "-c:v ffv1 -pix_fmt yuva444p", "mkv", ODD),
    "prores4444": ("yuv444p12le", "-c:v prores_ks -pix_fmt yuva444p10le", "mov", EVEN),
}


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """As ``coded``, with transparency that grows from left to right."""
    folder = tmp_path_factory.mktemp("converted")
    fade = "format=rgba,geq=r='r(X,Y)':g='g(X,Y)':b='b(X,Y)':a='X*2'"
    paths = make(folder, {n: (*clip[1:], fade) for n, clip in CONVERTED.items()}, seconds=0.12)
    theirs = raw_all(folder, {paths[name]: CONVERTED[name][0] for name in CONVERTED})
    return {name: (path, theirs[path]) for name, path in paths.items()}


@pytest.mark.parametrize("name", CONVERTED)
def test_alpha_and_packed_formats(converted, name):
    """Transparency is dropped and the colours under it untouched; packed formats keep luma whole
    and chroma as finely as it was.
    """
    path, theirs = converted[name]
    info, frames = read(path)
    width, height = CONVERTED[name][3]
    assert (info.width, info.height, len(frames)) == (width, height, 3)
    planes = frames[0].planes
    if name == "yuyv422":  # to 4:4:4: the chroma in between is the converter's choice
        ours = b"".join(
            plane.tobytes()
            for f in frames
            for plane in (f.planes.samples[0], *(c[:, ::2] for c in f.planes.samples[1:]))
        )
        off = difference(ours, theirs, 8)
        assert off.reshape(3, -1)[:, : width * height].max() == 0
        assert np.median(off) <= 2
    else:
        off = difference(packed(frames), theirs, planes.bit_depth)
        assert off.max() <= (4 if name == "prores4444" else 0)  # of 4095; lossy by design


# Colours --------------------------------------------------------------------------------------

MATRICES = {"bt601": "smpte170m", "bt709": "bt709", "bt2020": "bt2020nc"}  # scale's, the tag's
DEPTHS = {8: "", 10: "10le", 12: "12le"}
SAMPLINGS = ("420", "422", "444")
RANGES = {"limited": "tv", "full": "pc"}
COLOURS = [
    *itertools.product((0, 128, 255), repeat=3),
    *((200, 120, 40), (12, 90, 160), (235, 16, 128), (240, 230, 200), (34, 52, 21)),
]
PATCH = 16


def chart():
    """Patches of known colours, in rows of eight: uint8 (H, W, 3)."""
    colours = np.array(COLOURS, np.uint8).reshape(4, 8, 3)
    return colours.repeat(PATCH, axis=0).repeat(PATCH, axis=1)


CHARTS = list(itertools.product(MATRICES, RANGES, SAMPLINGS, DEPTHS))


def coding_of(matrix, span):
    """How FFmpeg's program turns the chart into a matrix and range, and tags it."""
    exact = "flags=accurate_rnd+full_chroma_int+full_chroma_inp+bitexact"
    scale = f"scale=out_color_matrix={matrix}:out_range={RANGES[span]}:{exact}"
    return f"-vf {scale} -colorspace {MATRICES[matrix]} -color_range {RANGES[span]}".split()


def make_charts(outputs):
    """The chart into each path, as its arguments say, by one run of FFmpeg's program."""
    picture = chart()
    height, width = picture.shape[:2]
    command = f"-f rawvideo -pix_fmt rgb24 -s {width}x{height} -i pipe:0".split()
    for path, arguments in outputs.items():
        command += ["-map", "0:v", *arguments, path]
    servers.ffmpeg(*command, stdin=picture.tobytes())


@pytest.fixture(scope="module")
def charts(tmp_path_factory):
    """The chart in every matrix, range, sampling and depth, each tagged."""
    folder = tmp_path_factory.mktemp("charts")
    make_charts(
        {
            folder / f"{matrix}-{span}-{sampling}-{bits}.mkv": (
                *coding_of(matrix, span),
                *("-c:v", "ffv1", "-pix_fmt", f"yuv{sampling}p{DEPTHS[bits]}"),
            )
            for matrix, span, sampling, bits in CHARTS
        }
    )
    return folder


@pytest.mark.parametrize(("matrix", "span", "sampling", "bits"), CHARTS)
def test_colours_are_the_charts(charts, matrix, span, sampling, bits):
    """A chart that FFmpeg's program coded in a matrix, range, sampling and depth comes back.

    Rounding at 8 bits costs half a step of each component, times gains up to 2.15, twice (theirs
    and ours); deeper samples keep a rounding of the result, and swscale's own step at 10 bits.
    """
    _, frames = read(charts / f"{matrix}-{span}-{sampling}-{bits}.mkv")
    planes = frames[0].planes
    assert (planes.bit_depth, planes.full_range) == (bits, span == "full")
    assert planes.matrix.value == matrix
    rgb = reduced_rgb(planes, longest_px=999).astype(int)
    patches = rgb.reshape(4, PATCH, 8, PATCH, 3)[:, PATCH // 2, :, PATCH // 2]
    off = np.abs(patches.reshape(-1, 3) - np.array(COLOURS))
    assert off.max() <= (4 if bits == 8 else 2)
    assert off.mean() < 1


LOSSLESS = {"libx264": "-qp 0", "libx265": "-x265-params lossless=1:log-level=none:pools=none"}
TAGGED = list(itertools.product(LOSSLESS, MATRICES, ("ts", "mp4")))


@pytest.fixture(scope="module")
def tagged_charts(tmp_path_factory):
    """The chart, coded without loss and in full range, where the coded video alone may tell so."""
    folder = tmp_path_factory.mktemp("tagged")
    make_charts(
        {
            folder / f"{coder}-{matrix}.{suffix}": (
                *coding_of(matrix, "full"),
                *f"-c:v {coder} {LOSSLESS[coder]} -preset ultrafast -pix_fmt yuv444p".split(),
            )
            for coder, matrix, suffix in TAGGED
        }
    )
    return folder


@pytest.mark.parametrize(("coder", "matrix", "suffix"), TAGGED)
def test_tags_of_the_bitstream_count(tagged_charts, coder, matrix, suffix):
    """Matrix and range that only the coded video tells (a transport stream has no place for them)
    are used.
    """
    planes = read(tagged_charts / f"{coder}-{matrix}.{suffix}")[1][0].planes
    rgb = reduced_rgb(planes, longest_px=999).astype(int)
    assert np.abs(rgb - chart()).max() <= 4
