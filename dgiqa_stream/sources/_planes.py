"""From a PyAV frame to :class:`~dgiqa_stream.types.Planes`, without a copy where that can be."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import numpy as np

from dgiqa_stream.errors import SourceUnsupported
from dgiqa_stream.types import ColorMatrix, Planes

if TYPE_CHECKING:
    import av
    from numpy.typing import NDArray

    from dgiqa_stream.sources._hardware import HardwareDecoder

_PLANAR_BITS = {  # planar Y'CbCr and grey formats whose planes are used as they are
    **dict.fromkeys(
        [f"yuv{j}{s}p" for j in ("", "j") for s in ("410", "411", "420", "422", "440", "444")], 8
    ),
    **{f"yuv{s}p{bits}le": bits for s in ("420", "422", "440", "444") for bits in (9, 10, 12, 14)},
    **{f"yuva{s}p": 8 for s in ("420", "422", "444")},
    **{f"yuva{s}p{bits}le": bits for s in ("420", "422", "444") for bits in (9, 10, 12)},
    "gray": 8,
    **{f"gray{bits}le": bits for bits in (9, 10, 12, 14, 16)},
}
_SEMI_PLANAR = ("nv12", "nv16", "nv24")
_RGB = ("rgb24",)
_MATRIX = {  # FFmpeg's AVColorSpace (ITU-T H.273 MatrixCoefficients)
    1: ColorMatrix.BT709,
    4: ColorMatrix.BT601,  # FCC: K_R 0.30, K_B 0.11
    5: ColorMatrix.BT601,
    6: ColorMatrix.BT601,
    7: ColorMatrix.BT709,  # SMPTE 240M: K_R 0.212, K_B 0.087
    9: ColorMatrix.BT2020,
    10: ColorMatrix.BT2020,
}
_FULL_RANGE = 2  # AVColorRange
_HD_WIDTH, _HD_HEIGHT = 1280, 576  # untagged pictures: BT.709 from HD on, else BT.601


def planes_of(frame: av.VideoFrame, *, rotation: int = 0) -> Planes:
    """The samples of a decoded frame with its colour tags.

    8- to 14-bit planar and semi-planar Y'CbCr and grey are taken as they are; every other format
    goes through swscale once, to full-range RGB or to 8- or 12-bit 4:4:4 of the same matrix.
    """
    name = frame.format.name
    if name in _PLANAR_BITS:
        return _from_planar(frame, _PLANAR_BITS[name], rotation)
    if name in _SEMI_PLANAR:
        return _from_semi_planar(frame, rotation)
    if name in _RGB:
        samples = _plane(frame, 0, frame.width * 3, 8)
        rgb = samples.reshape(frame.height, frame.width, 3)
        return Planes((rgb,), full_range=True, rotation=rotation)
    if frame.format.is_rgb or name.startswith(("pal", "mono", "xyz", "ya", "bayer")):
        target = "rgb24"
    else:
        deep = max(component.bits for component in frame.format.components) > 8
        target = "yuv444p12le" if deep else "yuv444p"
    try:
        converted = frame.reformat(format=target)
    except (ValueError, OSError) as exc:
        raise SourceUnsupported(
            f"pixel format {name!r} cannot be converted to {target}: {exc}"
        ) from exc
    converted.colorspace = frame.colorspace
    converted.color_range = frame.color_range if target != "rgb24" else _FULL_RANGE
    return planes_of(converted, rotation=rotation)


def planes_on_device(
    frame: av.VideoFrame, hardware: HardwareDecoder, *, rotation: int, is_mirrored: bool
) -> Planes:
    """The samples of a frame that lies on a device, where they are, with its colour tags."""
    return hardware.planes_of(frame, rotation=rotation, is_mirrored=is_mirrored, **_tags(frame))


def _tags(frame: av.VideoFrame) -> dict[str, Any]:
    matrix = _MATRIX.get(int(frame.colorspace))
    if matrix is None:
        is_hd = frame.width >= _HD_WIDTH or frame.height > _HD_HEIGHT
        matrix = ColorMatrix.BT709 if is_hd else ColorMatrix.BT601
    full = int(frame.color_range) == _FULL_RANGE or frame.format.name.startswith("yuvj")
    return {"matrix": matrix, "full_range": full}


def _plane(frame: av.VideoFrame, index: int, row_bytes: int, bits: int) -> NDArray[Any]:
    """One plane as a strided view of the decoder's memory; the view keeps the memory alive."""
    plane = frame.planes[index]
    raw: NDArray[np.uint8] = np.frombuffer(cast("Any", plane), np.uint8)
    rows = raw.reshape(-1, abs(plane.line_size))
    if plane.line_size < 0:  # stored bottom up; OpenCV cannot read negative strides
        rows = rows[::-1].copy()
    return rows[:, :row_bytes].view(np.uint8 if bits == 8 else np.dtype("<u2"))


def _from_planar(frame: av.VideoFrame, bits: int, rotation: int) -> Planes:
    components = 1 if frame.format.name.startswith("gray") else 3
    size = 1 if bits == 8 else 2
    samples = []
    for index in range(components):
        plane = frame.planes[index]
        picture = _plane(frame, index, plane.width * size, bits)
        samples.append(picture[: plane.height])
    return Planes(tuple(samples), bit_depth=bits, rotation=rotation, **_tags(frame))


def _from_semi_planar(frame: av.VideoFrame, rotation: int) -> Planes:
    luma, chroma = frame.planes[0], frame.planes[1]
    y = _plane(frame, 0, luma.width, 8)[: luma.height]
    both = _plane(frame, 1, chroma.width * 2, 8)[: chroma.height]
    return Planes((y, both[:, 0::2], both[:, 1::2]), rotation=rotation, **_tags(frame))
