"""What GStreamer says of its raw video, in the runtime's values."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Literal

import gi

for _namespace in ("Gst", "GstVideo"):
    gi.require_version(_namespace, "1.0")
from gi.repository import Gst, GstVideo  # noqa: E402

from dgiqa_stream.errors import SourceUnsupported  # noqa: E402
from dgiqa_stream.types import ColorMatrix, HdrTags, Planes  # noqa: E402
from plugins.gstreamer.pictures import Layout, planes_of, untagged_matrix  # noqa: E402

_MATRIX = {
    GstVideo.VideoColorMatrix.BT601: ColorMatrix.BT601,
    GstVideo.VideoColorMatrix.FCC: ColorMatrix.BT601,  # K_R 0.30, K_B 0.11
    GstVideo.VideoColorMatrix.BT709: ColorMatrix.BT709,
    GstVideo.VideoColorMatrix.SMPTE240M: ColorMatrix.BT709,  # K_R 0.212, K_B 0.087
    GstVideo.VideoColorMatrix.BT2020: ColorMatrix.BT2020,
}
_TRANSFER: dict[Any, Literal["pq", "hlg"]] = {
    GstVideo.VideoTransferFunction.SMPTE2084: "pq",
    GstVideo.VideoTransferFunction.ARIB_STD_B67: "hlg",
}
_PRIMARIES: dict[Any, Literal["bt709", "p3"]] = {
    GstVideo.VideoColorPrimaries.BT709: "bt709",
    GstVideo.VideoColorPrimaries.SMPTEEG432: "p3",
}
_DEFAULT_PEAK_CD_M2 = 1000.0
_PEAKS_CD_M2 = (1.0, 10_000.0)  # what lies outside is a field left empty or in another unit
_FULL_RANGE = GstVideo.VideoColorRange(1)  # its name, 0_255, is none in Python
_ROTATION = {f"rotate-{degrees}": degrees for degrees in (0, 90, 180, 270)}


def layout_of(caps: Gst.Caps, *, rotation: int = 0) -> Layout:
    """The layout of buffers that have none of their own."""
    video = GstVideo.VideoInfo.new_from_caps(caps)
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
        hdr=_hdr_tags(colours, caps.get_structure(0)),
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


def is_interlaced(video: Any) -> bool:
    """Whether frames may hold two fields."""
    return bool(video.interlace_mode != GstVideo.VideoInterlaceMode.PROGRESSIVE)


def rotation_of(tags: Gst.TagList) -> int | None:
    """The clockwise turn that tags ask for; None where they do not speak of it.

    A mirrored picture is taken as it is.
    """
    found, text = tags.get_string("image-orientation")
    return _ROTATION.get(text, 0) if found else None


def _hdr_tags(colours: Any, caps: Gst.Structure) -> HdrTags | None:
    transfer = _TRANSFER.get(colours.transfer)
    if transfer is None:
        return None
    return HdrTags(transfer, _peak_of(caps), _PRIMARIES.get(colours.primaries, "bt2020"))


def _peak_of(caps: Gst.Structure) -> float:
    """The brightest light in cd/m²: the lower of the mastering display's peak and MaxCLL."""
    display = caps.get_string("mastering-display-info") or ""  # .. its peak and its black, in 1e-4
    content = caps.get_string("content-light-level") or ""  # MaxCLL:MaxFALL
    numbers = [(display.split(":")[-2:-1], 1e-4), (content.split(":")[:1], 1.0)]
    told = [float(text) * unit for texts, unit in numbers for text in texts if text]
    low, high = _PEAKS_CD_M2
    return min((peak for peak in told if low <= peak <= high), default=_DEFAULT_PEAK_CD_M2)
