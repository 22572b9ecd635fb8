"""DASH (``.mpd``), which PyAV's FFmpeg lacks: an ``ffmpeg`` program reads it, PyAV its pipe."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

import msgspec

from dgiqa_stream.errors import SourceUnavailable
from dgiqa_stream.sources._helper import QUIETLY, HelperSource, ffmpeg_with
from dgiqa_stream.sources._pyav import PyavSource
from dgiqa_stream.urls import path_of, redact, scheme_of

if TYPE_CHECKING:
    from dgiqa_stream.config import SourceSettings
    from dgiqa_stream.types import StreamInfo

_DURATION = re.compile(r"^\[info\] +Duration: (?:(\d+):(\d+):([\d.]+)|N/A)")
_DURATION_WAIT_SECONDS = 2.0  # it was written before the first frame, maybe not yet read
# A manifest from the network names no local file.
_REMOTE = ("-protocol_whitelist", "http,https,httpproxy,tcp,tls,crypto,data")
# Copied without re-coding into NUT, which holds any codec and writes each packet at once.
_TO_PIPE = ("-an", "-sn", "-dn", "-c", "copy", "-f", "nut", "pipe:1")


def open_url(url: str, settings: SourceSettings, *, stream: str) -> PyavSource | HelperSource:
    """See :func:`dgiqa_stream.sources.open_source`."""
    if _pyav_knows_dash():
        return PyavSource(url, settings, stream=stream)
    return DashSource(url, settings, stream=stream)


def _pyav_knows_dash() -> bool:
    """Not in the wheels of PyPI, whose FFmpeg is built without libxml2."""
    from av.format import ContainerFormat

    try:
        ContainerFormat("dash", "r")
    except ValueError:
        return False
    return True


class DashSource(HelperSource):
    """What ``ffmpeg`` reads from the manifest's best video; options go to that program."""

    def __init__(self, url: str, settings: SourceSettings, *, stream: str) -> None:
        command = command_for(url, settings.options, track=settings.track)
        own = msgspec.structs.replace(settings, options={}, track=None)
        super().__init__(url, command, own, stream=stream)
        told = self._child.wait_for_line(_DURATION, timeout_seconds=_DURATION_WAIT_SECONDS)
        self._info = dataclasses.replace(
            super().info,
            container="dash",
            duration_seconds=(duration := _seconds(told)),
            is_live=duration is None or settings.realtime,
        )

    @property
    def info(self) -> StreamInfo:
        """See :class:`dgiqa_stream.sources.Source`."""
        return self._info


def command_for(url: str, options: Mapping[str, str], *, track: int | None) -> list[str]:
    """The command that writes a video track, the best where None, to its standard output."""
    ffmpeg = ffmpeg_with("-demuxers", "dash")
    if not ffmpeg:
        raise SourceUnavailable(
            f"{redact(url)}: DASH needs a helper, and no `ffmpeg` with DASH is installed; on "
            "Debian: apt install ffmpeg"
        )
    is_remote = scheme_of(url) != "file"
    given = [part for name, value in options.items() for part in (f"-{name}", value)]
    return [
        *(ffmpeg, *QUIETLY, "-loglevel", "level+info", "-nostats"),
        *(_REMOTE if is_remote else ()),
        *given,
        *("-i", url if is_remote else _local(url)),
        *(() if track is None else ("-map", f"0:v:{track}")),
        *_TO_PIPE,
    ]


def _local(url: str) -> str:
    path = path_of(url)
    if not path.is_file():
        raise SourceUnavailable(f"{path}: does not exist; check the name")
    return str(path.resolve())  # segments are looked up beside it


def _seconds(told: re.Match[str] | None) -> float | None:
    """Seconds of FFmpeg's ``Duration: 00:00:08.00``; None where it is live."""
    if told is None or told[1] is None:
        return None
    return 3600 * int(told[1]) + 60 * int(told[2]) + float(told[3])
