"""_planes: the decoder's samples and tags, taken without loss."""

from __future__ import annotations

import av
import numpy as np
import pytest

from dgiqa_stream.sources._planes import planes_of
from dgiqa_stream.types import ColorMatrix

FORMATS_8_BIT = ["yuv420p", "yuv422p", "yuv444p", "yuv411p", "yuvj420p", "nv12", "nv16", "gray"]
FORMATS_DEEP = ["yuv420p10le", "yuv422p10le", "yuv444p12le", "yuv420p12le", "gray12le"]
FORMATS_CONVERTED = ["yuyv422", "yuv420p10be", "p010le", "gbrp", "rgba", "bgr24", "rgb48le", "pal8"]


def random_frame(pix_fmt, width=42, height=30, seed=0):
    """A frame filled with random bytes, its row padding with 255."""
    frame = av.VideoFrame(width, height, pix_fmt)
    rng = np.random.default_rng(seed)
    bits = max(c.bits for c in frame.format.components)
    for plane in frame.planes:
        if bits > 8:
            samples = rng.integers(0, 1 << bits, plane.buffer_size // 2).astype("<u2")
            plane.update(samples.tobytes())
        else:
            plane.update(rng.integers(0, 256, plane.buffer_size).astype(np.uint8).tobytes())
    return frame


@pytest.mark.parametrize("size", [(42, 30), (426, 240), (161, 121)])
@pytest.mark.parametrize("pix_fmt", FORMATS_8_BIT + FORMATS_DEEP)
def test_samples_equal_a_packed_copy(pix_fmt, size):
    """Views of padded planes hold what their rows without padding hold, odd sizes included."""
    frame = random_frame(pix_fmt, *size)
    packed = b"".join(bytes(p) for p in _packed(frame))
    planes = planes_of(frame)
    if pix_fmt in ("nv12", "nv16"):
        luma, cb, cr = planes.samples
        ours = luma.tobytes() + np.stack([cb, cr], axis=-1).tobytes()
    else:
        ours = b"".join(s.tobytes() for s in planes.samples)
    assert ours == packed


def _packed(frame):
    """Rows of each plane without their padding."""
    planes = zip(frame.planes, _first_components(frame), strict=True)
    for index, (plane, component) in enumerate(planes):
        pairs = 2 if index and frame.format.name in ("nv12", "nv16") else 1
        row = plane.width * pairs * (2 if component.bits > 8 else 1)
        rows = np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)
        yield rows[: plane.height, :row].tobytes()


def _first_components(frame):
    return [
        next(c for c in frame.format.components if c.plane == i) for i in range(len(frame.planes))
    ]


def test_planes_are_views():
    """No samples are copied: what the decoder's memory holds is what is seen."""
    frame = random_frame("yuv420p")
    planes = planes_of(frame)
    assert all(not s.flags.owndata for s in planes.samples)
    assert not any(s.flags.c_contiguous for s in planes.samples)  # 42 px wide: rows are padded


@pytest.mark.parametrize("pix_fmt", FORMATS_CONVERTED)
def test_other_formats_become_planes(pix_fmt):
    """Packed, big-endian, palette and planar RGB formats all give a picture of the same size."""
    planes = planes_of(random_frame(pix_fmt))
    assert planes.size == (30, 42)
    assert planes.is_rgb == (not pix_fmt.startswith(("yu", "p0")))
    if planes.is_rgb:
        assert planes.full_range


def test_rgb_is_not_altered():
    """Packed and planar RGB keep every sample."""
    rgb = np.random.default_rng(1).integers(0, 256, (30, 42, 3), dtype=np.uint8)
    frame = av.VideoFrame.from_ndarray(rgb, format="rgb24")
    for pix_fmt in ("rgb24", "bgr24", "rgba", "gbrp"):
        converted = frame.reformat(format=pix_fmt)
        np.testing.assert_array_equal(planes_of(converted).samples[0], rgb)


@pytest.mark.parametrize(
    ("tag", "size", "matrix"),
    [
        (1, (64, 48), ColorMatrix.BT709),
        (6, (1920, 1080), ColorMatrix.BT601),
        (9, (64, 48), ColorMatrix.BT2020),
        (2, (720, 576), ColorMatrix.BT601),
        (2, (1280, 720), ColorMatrix.BT709),
        (2, (720, 1280), ColorMatrix.BT709),
    ],
)
def test_matrix_follows_tag_then_size(tag, size, matrix):
    """A tagged matrix is used; without one, HD is BT.709 and smaller is BT.601."""
    frame = av.VideoFrame(*size, "yuv420p")
    frame.colorspace = tag
    assert planes_of(frame).matrix is matrix


@pytest.mark.parametrize(("tag", "full"), [(0, False), (1, False), (2, True)])
def test_range_follows_tag(tag, full):
    """Full range only where tagged; untagged is limited. The old yuvj formats are always full."""
    frame = av.VideoFrame(64, 48, "yuv420p")
    frame.color_range = tag
    assert planes_of(frame).full_range is full
    assert planes_of(av.VideoFrame(64, 48, "yuvj420p")).full_range
