"""From a PyAV frame to ours: its time, size, turn and tags."""

from __future__ import annotations

import dataclasses
import struct
import time
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import numpy as np

from dgiqa_stream.sources._hardware import refuse_on_device
from dgiqa_stream.sources._hdr import hdr_tags_of, side_data_of
from dgiqa_stream.sources._planes import planes_of, planes_on_device
from dgiqa_stream.types import Frame, FrameInfo, Planes

if TYPE_CHECKING:
    import av

    from dgiqa_stream.sources._hardware import HardwareDecoder

MAX_FPS = 480
"""Faster is taken for a container's clock that was mistaken for a frame rate (Matroska)."""


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
    is_ipt: bool = False,
    hardware: HardwareDecoder | None = None,
) -> Frame:
    """One frame with views of the decoder's memory; ``codec_context`` has tags frames may lack.

    A frame that lies on the device of ``hardware`` has its samples there.

    ``is_ipt``: the samples are Dolby Vision's own IPT, whatever the tags say. They are flagged as
    PQ, which they are, and not tone mapped, because they are no colours of BT.2020.
    """
    width, height = upright_size(raw)
    hdr = None if is_ipt else hdr_tags_of(raw, codec_context)
    info = FrameInfo(
        index=index,
        pts_seconds=pts_seconds,
        duration_seconds=_shown_seconds(raw, average_fps),
        pts=raw.pts,
        time_base=raw.time_base,
        width=width,
        height=height,
        pix_fmt=stored_format(raw),
        keyframe=raw.key_frame,
        corrupt=corrupt,
        interlaced=raw.interlaced_frame,
        rotation=upright_turn(raw),
        dynamic_range="pq" if is_ipt else hdr.transfer if hdr else "sdr",
        discontinuity=jumped,
        received_at_seconds=time.time(),
    )
    turned = is_mirrored(raw)
    if hardware is not None and hardware.has(raw):
        planes = planes_on_device(raw, hardware, rotation=info.rotation, is_mirrored=turned)
        turned = False
    else:
        refuse_on_device(raw)
        planes = planes_of(raw, rotation=info.rotation)
    if hdr:
        planes = dataclasses.replace(planes, hdr=hdr)
    return Frame(unmirrored(planes) if turned else planes, info, stream)


def stored_format(raw: av.VideoFrame) -> str:
    """FFmpeg's name of the layout of the samples, wherever they lie."""
    return (raw.sw_format or raw.format).name


def upright_turn(raw: av.VideoFrame) -> int:
    """Clockwise turn that shows the frame upright; PyAV gives it counter-clockwise."""
    return round(-raw.rotation / 90) % 4 * 90


def is_mirrored(raw: av.VideoFrame) -> bool:
    """Whether the frame is to be shown mirrored: its rows from the bottom up, then turned."""
    matrix = side_data_of(raw, "DISPLAYMATRIX")
    if matrix is None:
        return False
    a, b, _, c, d, *_ = struct.unpack("=9i", matrix)
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


def clock_seconds_of(raw: av.VideoFrame) -> float | None:
    """Either of these, the first for choice."""
    shown = pts_seconds_of(raw)
    return dts_seconds_of(raw) if shown is None else shown


def _seconds(stamp: int | None, time_base: Fraction | None) -> float | None:
    return None if stamp is None or not time_base else float(stamp * time_base)


def _shown_seconds(raw: av.VideoFrame, average_fps: Fraction | None) -> float:
    seconds = _seconds(raw.duration, raw.time_base) or 0.0
    if seconds >= 1 / MAX_FPS:
        return seconds
    return float(1 / average_fps) if average_fps else 0.0
