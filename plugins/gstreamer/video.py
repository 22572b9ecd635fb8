"""What GStreamer says of its raw video, in the runtime's values."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import gi

for _namespace in ("Gst", "GstVideo"):
    gi.require_version(_namespace, "1.0")
from gi.repository import Gst, GstVideo  # noqa: E402

from dgiqa_stream.errors import SourceUnsupported  # noqa: E402
from dgiqa_stream.types import ColorMatrix, DynamicRange, Planes  # noqa: E402
from plugins.gstreamer.pictures import Layout, planes_of, untagged_matrix  # noqa: E402

_MATRIX = {
    GstVideo.VideoColorMatrix.BT601: ColorMatrix.BT601,
    GstVideo.VideoColorMatrix.FCC: ColorMatrix.BT601,  # K_R 0.30, K_B 0.11
    GstVideo.VideoColorMatrix.BT709: ColorMatrix.BT709,
    GstVideo.VideoColorMatrix.SMPTE240M: ColorMatrix.BT709,  # K_R 0.212, K_B 0.087
    GstVideo.VideoColorMatrix.BT2020: ColorMatrix.BT2020,
}
_DYNAMIC_RANGE: dict[Any, DynamicRange] = {
    GstVideo.VideoTransferFunction.SMPTE2084: "pq",
    GstVideo.VideoTransferFunction.ARIB_STD_B67: "hlg",
}
_FULL_RANGE = GstVideo.VideoColorRange(1)  # its name, 0_255, is none in Python
_ROTATION = {f"rotate-{degrees}": degrees for degrees in (0, 90, 180, 270)}


def layout_of(video: Any, *, rotation: int = 0) -> Layout:
    """The layout of buffers that have none of their own; ``video`` is a ``GstVideo.VideoInfo``."""
    colours = video.colorimetry
    return Layout(
        format=video.finfo.name,
        width=video.width,
        height=video.height,
        offsets=tuple(video.offset),
        strides=tuple(video.stride),
        matrix=_MATRIX.get(colours.matrix) or untagged_matrix(video.width, video.height),
        full_range=colours.range == _FULL_RANGE,
        rotation=rotation,
    )


def layout_in(buffer: Gst.Buffer, layout: Layout) -> Layout:
    """The layout with the rows and planes where a decoder says that it has put them."""
    meta = GstVideo.buffer_get_video_meta(buffer)
    if meta is None:
        return layout
    return replace(layout, offsets=tuple(meta.offset), strides=tuple(meta.stride))


@contextlib.contextmanager
def mapped(buffer: Gst.Buffer, layout: Layout) -> Iterator[Planes]:
    """The picture in a buffer, for the length of the block.

    Not copied, unless it lies in several memories, which GStreamer then merges. Raises
    :class:`SourceUnsupported` where it cannot be read or is not as large as it should be.
    """
    try:
        memory = buffer.map(Gst.MapFlags.READ)
    except Gst.MapError as exc:
        raise SourceUnsupported(
            f"a frame's memory cannot be read ({exc}): put videoconvert before dgiqaquality"
        ) from exc
    with memory as found:
        try:
            planes = planes_of(found.data, layout)
        except ValueError as exc:
            raise SourceUnsupported(str(exc)) from exc
        yield planes


def dynamic_range_of(video: Any) -> DynamicRange:
    """SDR, or which HDR transfer function the caps name."""
    return _DYNAMIC_RANGE.get(video.colorimetry.transfer, "sdr")


def is_interlaced(video: Any) -> bool:
    """Whether frames may hold two fields."""
    return bool(video.interlace_mode != GstVideo.VideoInterlaceMode.PROGRESSIVE)


def rotation_of(tags: Gst.TagList) -> int | None:
    """The clockwise turn that tags ask for; None where they do not speak of it.

    A mirrored picture is taken as it is.
    """
    found, text = tags.get_string("image-orientation")
    return _ROTATION.get(text, 0) if found else None
