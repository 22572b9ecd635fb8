"""What is known of a stream that PyAV has opened, once its first frame is decoded."""

from __future__ import annotations

import dataclasses
from fractions import Fraction
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from dgiqa_stream.inputs import STILL_SUFFIXES
from dgiqa_stream.sources import is_still
from dgiqa_stream.sources._frames import MAX_FPS, stored_format, upright_size
from dgiqa_stream.types import StreamInfo
from dgiqa_stream.urls import scheme_of

if TYPE_CHECKING:
    import av
    from av.container import InputContainer
    from av.video.stream import VideoStream

_SEQUENCE = "image2pipe"
"""FFmpeg's name for pictures one after the other; not told by its demuxers, named by codec."""
_NUM_THREADS = 2  # more take more CPU and memory, and 1080p needs half of one
_QUICK_CODECS = ("h264", "mpeg2video")
_QUICK_SAMPLES_PER_SECOND = 1920 * 1088 * 30
"""Luma, which one core of a small board decodes in time where the codec is a quick one."""


def may_be_picture_sequence(container: InputContainer, url: str) -> bool:
    """Whether pictures may follow the first, as in a raw ``.mjpeg`` file or pipe.

    A file that is named like a picture is one: what follows in a photo is a thumbnail or a depth
    or gain map.
    """
    if not container.format.name.endswith("_pipe"):
        return False
    path = url if scheme_of(url) == "file" else urlsplit(url).path
    return PurePosixPath(path).suffix.lower() not in STILL_SUFFIXES


def describe(
    container: InputContainer,
    track: VideoStream,
    *,
    first: av.VideoFrame,
    url: str,
    realtime: bool,
    is_sequence: bool,
) -> StreamInfo:
    """The stream's size, rate, length and kind; ``first`` is its first decoded frame."""
    width, height = upright_size(first)
    info = StreamInfo(
        width=width,
        height=height,
        codec=track.codec_context.name,
        pix_fmt=stored_format(first),
        average_fps=_average_fps(track),
        duration_seconds=_duration_seconds(container, track),
        num_frames_from_header=track.frames or None,
        is_live=False,
        container=_SEQUENCE if is_sequence else container.format.name,
    )
    if is_still(info):
        changes: dict[str, Any] = {"average_fps": None, "duration_seconds": None}
    else:
        changes = {"is_live": _is_live(url, info.duration_seconds, realtime=realtime)}
    return dataclasses.replace(info, **changes)


def num_threads_for(
    container: InputContainer, track: VideoStream, *, url: str, realtime: bool
) -> int:
    """How many threads decode a stream that says nothing of it.

    One where that surely keeps pace with a live stream: a second one would hold every frame back
    until the next one has come, and a picture more in memory.
    """
    is_live = _is_live(url, _duration_seconds(container, track), realtime=realtime)
    fps = _average_fps(track)
    if not is_live or fps is None or track.codec_context.name not in _QUICK_CODECS:
        return _NUM_THREADS
    is_quick = track.width * track.height * fps <= _QUICK_SAMPLES_PER_SECOND
    return 1 if is_quick else _NUM_THREADS


def _is_live(url: str, duration_seconds: float | None, *, realtime: bool) -> bool:
    scheme = scheme_of(url)
    if scheme in ("file", "stdin"):
        return realtime
    return duration_seconds is None or scheme not in ("http", "https")


def _average_fps(track: VideoStream) -> Fraction | None:
    """The frame rate; Matroska without one has FFmpeg take its clock's, which is no rate."""
    rates = (track.average_rate, track.guessed_rate, track.base_rate)
    return next((rate for rate in rates if rate and 0 < rate <= MAX_FPS), None)


def _duration_seconds(container: InputContainer, track: VideoStream) -> float | None:
    if track.duration and track.time_base:
        return float(track.duration * track.time_base)
    return container.duration / 1e6 if container.duration else None
