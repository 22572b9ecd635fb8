"""Where frames come from: the :class:`Source` protocol and the table of schemes."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Protocol

from dgiqa_stream.errors import SourceUnsupported
from dgiqa_stream.urls import redact, scheme_of
from dgiqa_stream.versions import entry_points_for

if TYPE_CHECKING:
    from dgiqa_stream.config import SourceSettings
    from dgiqa_stream.types import Frame, StreamInfo

ENTRY_POINT_GROUP = "dgiqa_stream.sources"
"""Entry points of other packages: a scheme, and a callable like ``open_url`` below."""

SOURCES: Mapping[str, str] = MappingProxyType(
    {  # scheme: module with open_url(url, settings, *, stream) -> Source
        "file": "dgiqa_stream.sources._pyav",
        "stdin": "dgiqa_stream.sources._pyav",
        "sdp": "dgiqa_stream.sources._pyav",
        "http": "dgiqa_stream.sources._pyav",
        "https": "dgiqa_stream.sources._pyav",
        "rtmp": "dgiqa_stream.sources._pyav",
        "rtmps": "dgiqa_stream.sources._pyav",
        "rtp": "dgiqa_stream.sources._pyav",
        "rtsp": "dgiqa_stream.sources._pyav",
        "rtsps": "dgiqa_stream.sources._pyav",
        "tcp": "dgiqa_stream.sources._pyav",
        "udp": "dgiqa_stream.sources._pyav",
        "srt": "dgiqa_stream.sources._helper",
        "camera": "dgiqa_stream.sources._opencv",
        "pattern": "dgiqa_stream.sources.pattern",
    }
)

_DASH = "dgiqa_stream.sources._dash"
_MANIFEST = re.compile(r"\.mpd(?:[?#].*)?$", re.IGNORECASE | re.DOTALL)
_FFMPEG = ("dgiqa_stream.sources._pyav", "dgiqa_stream.sources._helper")

_ADVICE = {"srt": "options of SRT go into the address, as srt://HOST:PORT?latency=200000"}


class Source(Protocol):
    """An opened stream. ``frames`` is for one thread; ``close`` may be called from any."""

    @property
    def info(self) -> StreamInfo:
        """What was known when it was opened, and what decodes it now."""

    @property
    def num_corrupt(self) -> int:
        """Frames so far in which the decoder concealed damage."""

    @property
    def num_decode_errors(self) -> int:
        """Packets so far that could not be read or decoded."""

    def frames(self) -> Iterator[Frame]:
        """Frames in presentation order, each once; ends at the end of the stream or on close.

        Raises :class:`~dgiqa_stream.errors.SourceUnavailable` where the stream goes away and
        :class:`~dgiqa_stream.errors.SourceUnsupported` where it can no longer be decoded.
        """

    def close(self) -> None:
        """Release everything; calling twice is fine.

        While ``frames`` waits for data in another thread, it ends as soon as that read returns,
        at the latest after the read timeout.
        """


class Opener(Protocol):
    """What a module of ``SOURCES`` has as ``open_url``, and what an entry point names."""

    def __call__(self, url: str, settings: SourceSettings, *, stream: str) -> Source:
        """See :func:`open_source`."""


def open_source(url: str, settings: SourceSettings, *, stream: str) -> Source:
    """Open a stream, file, picture, camera or pattern; the scheme of ``url`` picks how.

    Blocks at most ``settings.open_timeout_seconds`` (and one second). ``stream`` is the id that
    its frames carry. Raises :class:`~dgiqa_stream.errors.SourceUnavailable` where retrying may
    help, :class:`~dgiqa_stream.errors.SourceUnsupported` where it will not, and
    :class:`~dgiqa_stream.errors.ConfigError` for options that FFmpeg does not have.
    """
    check_options(url, settings.options)
    return _opener(url)(url, settings, stream=stream)


def check_scheme(url: str) -> None:
    """Raise :class:`~dgiqa_stream.errors.SourceUnsupported` where nothing here opens such a URL."""
    _opener(url)


def _opener(url: str) -> Opener:
    scheme = scheme_of(url)
    found: Opener | None = None
    if module := _module_of(url):
        found = importlib.import_module(module).open_url
    elif entries := entry_points_for(ENTRY_POINT_GROUP, scheme):
        found = entries[0].load()
    if found is not None:
        return found
    known = ", ".join(sorted(SOURCES.keys() - {"stdin"}))
    raise SourceUnsupported(
        f"{redact(url)}: unknown scheme {scheme!r}; known here: {known}, a path, or - for "
        "standard input"
    )


def _module_of(url: str) -> str | None:
    scheme = scheme_of(url)
    if scheme in ("file", "http", "https") and _MANIFEST.search(url):
        return _DASH
    return SOURCES.get(scheme)


def check_options(url: str, options: Mapping[str, str], *, key: str = "source.options") -> None:
    """Raise :class:`~dgiqa_stream.errors.ConfigError` for options that FFmpeg would ignore.

    ``key`` is the setting that holds them. Sources that are not FFmpeg's judge their own.
    """
    if options and SOURCES.get(scheme_of(url)) in _FFMPEG:
        from dgiqa_stream.sources._options import refuse_unknown_options

        refuse_unknown_options(options, key=key, advice=_ADVICE.get(scheme_of(url), ""))


def is_still(info: StreamInfo) -> bool:
    """Whether it is a picture (one frame at time 0) rather than a video; a GIF counts as one."""
    return info.container.endswith("_pipe") or info.container in ("image2", "gif")


def why_no_hardware(settings: SourceSettings) -> str:
    """Why streams cannot be decoded on the device that the settings name; empty: they can be.

    The first call for a device loads what it needs, which may take seconds.
    """
    from dgiqa_stream.sources._hardware import hardware_of

    return hardware_of(settings)[1]
