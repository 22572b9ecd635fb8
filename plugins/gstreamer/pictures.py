"""GStreamer's raw pictures as :class:`~dgiqa_stream.types.Planes`, without a copy.

Knows nothing of GStreamer's objects: numbers and bytes in, planes out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

import numpy as np

from dgiqa_stream.types import ColorMatrix, HdrTags, Planes

_HD_WIDTH, _HD_HEIGHT = 1280, 576  # untagged pictures: BT.709 from HD on, else BT.601


@dataclass(frozen=True, slots=True)
class Format:
    """How one of GStreamer's raw formats lies in memory."""

    pix_fmt: str
    """FFmpeg's name, which messages carry."""
    kind: Literal["planar", "semi-planar", "grey", "rgb"]
    right: int = 0
    """Chroma has half the luma's columns for 1, all for 0."""
    down: int = 0
    order: tuple[int, int, int] = (0, 1, 2)
    """Planes (planar) or components (semi-planar, after luma) that hold luma, Cb and Cr."""
    bit_depth: int = 8


FORMATS: Mapping[str, Format] = MappingProxyType(
    {
        "I420": Format("yuv420p", "planar", 1, 1),
        "YV12": Format("yuv420p", "planar", 1, 1, (0, 2, 1)),
        "NV12": Format("nv12", "semi-planar", 1, 1),
        "NV21": Format("nv21", "semi-planar", 1, 1, (0, 2, 1)),
        "NV16": Format("nv16", "semi-planar", 1, 0),
        "Y42B": Format("yuv422p", "planar", 1, 0),
        "Y444": Format("yuv444p", "planar"),
        "I420_10LE": Format("yuv420p10le", "planar", 1, 1, bit_depth=10),
        "I422_10LE": Format("yuv422p10le", "planar", 1, 0, bit_depth=10),
        "Y444_10LE": Format("yuv444p10le", "planar", bit_depth=10),
        # ten bits at the upper end of sixteen: the same picture read as sixteen bits deep
        "P010_10LE": Format("p010le", "semi-planar", 1, 1, bit_depth=16),
        "GRAY8": Format("gray", "grey"),
        "RGB": Format("rgb24", "rgb"),
    }
)
"""By GStreamer's name: what the element takes."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the samples of a buffer are, and what colours they mean."""

    format: str
    """A name of ``FORMATS``."""
    width: int
    """As stored, before rotation, in pixels."""
    height: int
    offsets: tuple[int, ...]
    """First byte of each plane."""
    strides: tuple[int, ...]
    """Bytes from one row to the next of each plane."""
    matrix: ColorMatrix = ColorMatrix.BT709
    full_range: bool = False
    rotation: int = 0
    """Clockwise turn, in degrees, that shows the picture upright."""
    hdr: HdrTags | None = None


def planes_of(data: Any, layout: Layout) -> Planes:
    """Views into ``data``, a buffer of bytes that must outlive them.

    Raises ``ValueError`` where the layout reaches beyond the buffer.
    """
    try:
        samples = _samples(data, layout, FORMATS[layout.format])
    except (TypeError, ValueError) as exc:  # numpy's words for a buffer that is too small
        raise ValueError(
            f"a {layout.format} picture of {layout.width}x{layout.height} does not fit its buffer "
            f"of {len(data)} bytes (offsets {layout.offsets}, strides {layout.strides}): {exc}"
        ) from exc
    kind = FORMATS[layout.format]
    return Planes(
        samples,
        matrix=layout.matrix,
        full_range=layout.full_range or kind.kind == "rgb",
        bit_depth=kind.bit_depth,
        rotation=layout.rotation,
        hdr=layout.hdr,
    )


def untagged_matrix(width: int, height: int) -> ColorMatrix:
    """What a picture that says nothing of its colours is taken for; as for files."""
    is_hd = width >= _HD_WIDTH or height > _HD_HEIGHT
    return ColorMatrix.BT709 if is_hd else ColorMatrix.BT601


def _samples(data: Any, layout: Layout, kind: Format) -> tuple[Any, ...]:
    height, width = layout.height, layout.width
    if kind.kind == "rgb":
        return (_view(data, layout, 0, (height, width, 3)),)
    luma = _view(data, layout, 0, (height, width), kind.bit_depth)
    if kind.kind == "grey":
        return (luma,)
    chroma = -(-height >> kind.down), -(-width >> kind.right)
    if kind.kind == "semi-planar":
        both = _view(data, layout, 1, (*chroma, 2), kind.bit_depth)
        return luma, both[..., kind.order[1] - 1], both[..., kind.order[2] - 1]
    first, second = (_view(data, layout, n, chroma, kind.bit_depth) for n in kind.order[1:])
    return luma, first, second


def _view(
    data: Any, layout: Layout, plane: int, shape: tuple[int, ...], bit_depth: int = 8
) -> np.ndarray[Any, Any]:
    sample = np.dtype(np.uint8 if bit_depth == 8 else "<u2")
    pixel = sample.itemsize * (shape[2] if len(shape) == 3 else 1)
    strides = (layout.strides[plane], pixel, sample.itemsize)[: len(shape)]
    return np.ndarray(shape, sample, data, layout.offsets[plane], strides)
