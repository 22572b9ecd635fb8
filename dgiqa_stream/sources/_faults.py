"""From what FFmpeg raises to one clear line, and floods of errors to one line a second."""

from __future__ import annotations

import errno
import logging
import socket
import time
from collections.abc import Callable
from urllib.parse import urlsplit

from dgiqa_stream.errors import SourceError, SourceUnavailable, SourceUnsupported
from dgiqa_stream.urls import path_of, redact, redact_text, scheme_of

_Kind = type[SourceError]

_BY_CLASS: tuple[tuple[str, _Kind, str], ...] = (  # av.error class, kind, what to tell
    ("FileNotFoundError", SourceUnavailable, "does not exist; check the name"),
    ("IsADirectoryError", SourceUnsupported, "is a folder; name a file in it"),
    ("NotADirectoryError", SourceUnavailable, "does not exist; check the folders in the path"),
    ("PermissionError", SourceUnavailable, "may not be read by this user; check its permissions"),
    (
        "ConnectionRefusedError",
        SourceUnavailable,
        "the host refused the connection; check the port and that the server runs",
    ),
    (
        "ConnectionResetError",
        SourceUnavailable,
        "the host closed the connection; check the server's log",
    ),
    ("BrokenPipeError", SourceUnavailable, "the connection broke; check the server"),
    (
        "HTTPUnauthorizedError",
        SourceUnavailable,
        "the server wants a login (401); give scheme://USER:PASSWORD@HOST",
    ),
    ("HTTPForbiddenError", SourceUnavailable, "the server forbids it (403); check the account"),
    ("HTTPNotFoundError", SourceUnavailable, "the server has no such stream (404); check the path"),
    (
        "HTTPTooManyRequestsError",
        SourceUnavailable,
        "the server wants fewer requests (429); try again later",
    ),
    ("HTTPClientError", SourceUnavailable, "the server refused the request (4xx)"),
    ("HTTPServerError", SourceUnavailable, "the server failed (5xx); check its log"),
    (
        "ProtocolNotFoundError",
        SourceUnsupported,
        "this FFmpeg has no such protocol, or a playlist asks for one that is not allowed",
    ),
    (
        "DecoderNotFoundError",
        SourceUnsupported,
        "this FFmpeg has no decoder for its video; convert it to H.264, HEVC, AV1 or VP9",
    ),
    ("DemuxerNotFoundError", SourceUnsupported, "this FFmpeg does not know the format"),
    (
        "InvalidDataError",
        SourceUnsupported,
        "is no video or picture that FFmpeg can read; check it with `ffprobe`",
    ),
    ("PatchWelcomeError", SourceUnsupported, "uses a feature that FFmpeg does not have"),
    (
        "ArgumentError",
        SourceUnavailable,
        "the address or an option is not valid; check source.options",
    ),
    ("EOFError", SourceUnsupported, "is empty or ends before its first frame"),
)


def source_error(exc: BaseException, url: str, *, waited_seconds: float) -> SourceError:
    """What FFmpeg raised while opening or reading, as one of this package's errors.

    ``waited_seconds`` is the deadline that applied, named where it ran out.
    """
    import av

    shown = redact(url)
    if isinstance(exc, SourceError):
        return exc
    if isinstance(exc, TimeoutError | av.error.ExitError):
        return SourceUnavailable(
            f"{shown}: no data within {waited_seconds:g} s; check the sender, or raise "
            "source.open_timeout_seconds and source.read_timeout_seconds"
        )
    for name, kind, advice in _BY_CLASS:
        if isinstance(exc, getattr(av.error, name)):
            if name == "InvalidDataError" and _looks_encrypted(url):
                advice = "is encrypted; give its key by --stream-option decryption_key=HEX"
            return kind(f"{shown}: {advice}")
    unknown = _unknown_host(url)
    if unknown:
        return SourceUnavailable(f"{shown}: no address for the host {unknown!r}; check its name")
    secure = scheme_of(url) in ("https", "rtsps", "rtmps")
    hint = "; check that the server speaks TLS and its certificate" if secure else ""
    reason = getattr(exc, "strerror", None) or str(exc) or type(exc).__name__
    if getattr(exc, "errno", None) == errno.EIO:
        reason = "reading failed or broke off; check the sender and the network"
    return SourceUnavailable(f"{shown}: {redact_text(reason)}{hint}")


def _looks_encrypted(url: str) -> bool:
    """Whether the start of a local file has the marks of MP4 Common Encryption."""
    if scheme_of(url) != "file":
        return False
    try:
        with path_of(url).open("rb") as file:
            start = file.read(1 << 16)
    except OSError:
        return False
    return any(mark in start for mark in (b"encv", b"pssh", b"sinf"))


def _unknown_host(url: str) -> str | None:
    """The URL's host where it has no address (FFmpeg reports that as an I/O error)."""
    try:
        host = urlsplit(url).hostname if "://" in url else None
        if host:
            socket.getaddrinfo(host, None)
    except socket.gaierror:
        return host
    except (ValueError, OSError):  # a malformed URL, or no resolver: no better reason to give
        return None
    return None


class ErrorFlood:
    """Logs repeated errors as one line a second: ``decode: 214 errors in 1.0 s, last: …``."""

    def __init__(
        self,
        logger: logging.Logger,
        what: str,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._logger, self._what, self._clock = logger, what, clock
        self._count, self._since, self._last = 0, 0.0, ""

    def add(self, reason: object) -> None:
        """Count one error; logs the first at once and then what has gathered in a second."""
        now = self._clock()
        self._count += 1
        self._last = redact_text(str(reason))
        if now - self._since >= 1.0:
            self.flush()
            self._since = now

    def flush(self) -> None:
        """Log what has gathered."""
        if self._count:
            self._logger.warning(
                "%s: %d error%s, last: %s",
                self._what,
                self._count,
                "" if self._count == 1 else "s",
                self._last,
            )
        self._count = 0
