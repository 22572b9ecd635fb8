"""From a PyAV frame to ours: its time, size, turn and tags."""

from __future__ import annotations

import dataclasses
import struct
import time
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import numpy as np

from dgiqa_stream.sources._planes import dynamic_range_of, planes_of
from dgiqa_stream.types import Frame, FrameInfo, Planes

if TYPE_CHECKING:
    import av

MAX_FPS = 480
"""Faster is taken for a container's clock that was mistaken for a frame rate (Matroska)."""

_UNTAGGED = (0, 2)  # reserved and unspecified TransferCharacteristics (ITU-T H.273)


def to_frame(
    raw: av.VideoFrame,
    *,
    stream: str,
    index: int,
    pts_seconds: float,
    average_fps: Fraction | None,
    jumped: bool,
    corrupt: bool,
    codec_context: Any,
) -> Frame:
    """One frame with views of the decoder's memory; ``codec_context`` has tags frames may lack."""
    width, height = upright_size(raw)
    tagged = codec_context if int(raw.color_trc) in _UNTAGGED else raw
    info = FrameInfo(
        index=index,
        pts_seconds=pts_seconds,
        duration_seconds=_shown_seconds(raw, average_fps),
        pts=raw.pts,
        time_base=raw.time_base,
        width=width,
        height=height,
        pix_fmt=raw.format.name,
        keyframe=raw.key_frame,
        corrupt=corrupt,
        interlaced=raw.interlaced_frame,
        rotation=upright_turn(raw),
        dynamic_range=dynamic_range_of(tagged),
        discontinuity=jumped,
        received_at_seconds=time.time(),
    )
    planes = planes_of(raw, rotation=info.rotation)
    return Frame(unmirrored(planes) if is_mirrored(raw) else planes, info, stream)


def upright_turn(raw: av.VideoFrame) -> int:
    """Clockwise turn that shows the frame upright; PyAV gives it counter-clockwise."""
    return round(-raw.rotation / 90) % 4 * 90


def is_mirrored(raw: av.VideoFrame) -> bool:
    """Whether the frame is to be shown mirrored: its rows from the bottom up, then turned."""
    from av.sidedata.sidedata import SideDataContainer

    try:
        # Not raw.side_data: the frame would hold what holds the frame, until the collector comes.
        container: Any = SideDataContainer
        matrix = container(raw).get("DISPLAYMATRIX")
    except ValueError:  # PyAV 18.1 trips over kinds that it does not know, as a photo's EXIF
        return False
    if matrix is None:
        return False
    a, b, _, c, d, *_ = struct.unpack("=9i", bytes(matrix))
    return bool(a * d - b * c < 0)


def unmirrored(planes: Planes) -> Planes:
    """Copies of the samples with the rows from the bottom up."""
    flipped: Any = tuple(np.ascontiguousarray(plane[::-1]) for plane in planes.samples)
    return dataclasses.replace(planes, samples=flipped)


def upright_size(raw: av.VideoFrame) -> tuple[int, int]:
    """Width and height as shown."""
    turned = upright_turn(raw) in (90, 270)
    return (raw.height, raw.width) if turned else (raw.width, raw.height)


def pts_seconds_of(raw: av.VideoFrame) -> float | None:
    """The container's presentation stamp, where there is one."""
    return _seconds(raw.pts, raw.time_base)


def dts_seconds_of(raw: av.VideoFrame) -> float | None:
    """The decoding stamp of the packet that the frame came from, where there is one."""
    return _seconds(raw.dts, raw.time_base)


def _seconds(stamp: int | None, time_base: Fraction | None) -> float | None:
    return None if stamp is None or not time_base else float(stamp * time_base)


def _shown_seconds(raw: av.VideoFrame, average_fps: Fraction | None) -> float:
    seconds = _seconds(raw.duration, raw.time_base) or 0.0
    if seconds >= 1 / MAX_FPS:
        return seconds
    return float(1 / average_fps) if average_fps else 0.0
