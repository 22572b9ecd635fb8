"""What PyAV's FFmpeg lacks, as ``srt://``: a child process receives it, PyAV reads its pipe."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import threading
import weakref
from collections.abc import Iterator
from typing import IO, TYPE_CHECKING

from dgiqa_stream.errors import SourceError, SourceUnavailable
from dgiqa_stream.sources._pacing import Patience
from dgiqa_stream.sources._pipe import PipeReader
from dgiqa_stream.sources._pyav import PyavSource
from dgiqa_stream.urls import redact, redact_text

if TYPE_CHECKING:
    from dgiqa_stream.config import SourceSettings
    from dgiqa_stream.types import Frame, StreamInfo

# The shell waits for the child and ends it when our end of its standard input closes, which the
# system does however we end; signals to our terminal do not reach it (own session).
_GUARD = """
exec 3<&0
"$@" 3<&- </dev/null &
child=$!
{ cat <&3 >/dev/null; kill $child; } >/dev/null 2>&1 &
exec 3<&-
wait $child
"""
_GRACE_SECONDS = 2.0
_MAX_COMPLAINT_LENGTH = 300
_MAX_LINES = 100
_LEVEL = re.compile(r"^(?:\[[\w,]+ @ 0x[0-9a-f]+\] )?\[(\w+)\] ")  # of `-loglevel level+…`
_ENDED_BY_US = "Immediate exit requested"  # what FFmpeg says of a SIGTERM
_COMPLAINTS = ("error", "fatal", "panic")
QUIETLY = ("-hide_banner", "-nostdin")


def open_url(url: str, settings: SourceSettings, *, stream: str) -> HelperSource:
    """See :func:`dgiqa_stream.sources.open_source`."""
    return HelperSource(url, command_for(url), settings, stream=stream)


def command_for(url: str) -> list[str]:
    """The command that writes the stream to its standard output, from what is installed."""
    if ffmpeg := _ffmpeg_with_srt():
        quiet = [*QUIETLY, "-loglevel", "error"]
        return [ffmpeg, *quiet, "-i", url, "-map", "0:v", "-c", "copy", "-f", "mpegts", "pipe:1"]
    if transmit := shutil.which("srt-live-transmit"):
        return [transmit, "-q", "-loglevel:error", url, "file://con"]
    raise SourceUnavailable(
        f"{redact(url)}: SRT needs a helper, and neither `srt-live-transmit` nor an `ffmpeg` with "
        "SRT is installed; on Debian: apt install srt-tools (or ffmpeg)"
    )


def _ffmpeg_with_srt() -> str | None:
    return ffmpeg_with("-protocols", "srt")


def ffmpeg_with(listing: str, name: str) -> str | None:
    """An ``ffmpeg`` program whose listing, such as ``-protocols``, has the name."""
    ffmpeg = shutil.which("ffmpeg")
    if not ffmpeg:
        return None
    try:
        asked = subprocess.run(
            [ffmpeg, "-hide_banner", listing],
            capture_output=True,
            text=True,
            timeout=20,  # an instant, but on a busy machine
            check=False,
            stdin=subprocess.DEVNULL,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return ffmpeg if name in asked.stdout.split() else None


class HelperSource:
    """A child process's standard output, decoded by PyAV; the child ends with the source."""

    def __init__(
        self, url: str, command: list[str], settings: SourceSettings, *, stream: str
    ) -> None:
        patience = Patience(settings.open_timeout_seconds, settings.read_timeout_seconds)
        self._shown = redact(url)
        self._child = _Child(command)
        pipe = PipeReader(os.dup(self._child.output.fileno()), patience)
        try:
            self._inner = PyavSource(url, settings, stream=stream, pipe=pipe, patience=patience)
        except SourceError as exc:
            pipe.close()
            self._child.end()
            raise self._explain(exc) from exc

    @property
    def info(self) -> StreamInfo:
        """See :class:`dgiqa_stream.sources.Source`."""
        return self._inner.info

    @property
    def num_corrupt(self) -> int:
        """See :class:`dgiqa_stream.sources.Source`."""
        return self._inner.num_corrupt

    @property
    def num_decode_errors(self) -> int:
        """See :class:`dgiqa_stream.sources.Source`."""
        return self._inner.num_decode_errors

    def frames(self) -> Iterator[Frame]:
        """See :class:`dgiqa_stream.sources.Source`."""
        return self._inner.frames()

    def close(self) -> None:
        """See :class:`dgiqa_stream.sources.Source`."""
        self._inner.close()
        self._child.end()

    def _explain(self, exc: SourceError) -> SourceError:
        """The helper's own complaint, where it had one: it knows why no data came."""
        complaint = self._child.complaint.removeprefix(f"{self._shown}: ")
        if not complaint or _ENDED_BY_US in complaint:
            return exc
        return SourceUnavailable(f"{self._shown}: {complaint}; check the address and the sender")


class _Child:
    """A process whose output we read, its last complaint, and its certain end."""

    def __init__(self, command: list[str]) -> None:
        guarded = ["/bin/sh", "-c", _GUARD, "sh", *command] if os.name == "posix" else command
        try:
            self._process = subprocess.Popen(
                guarded,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,
            )
        except OSError as exc:
            raise SourceUnavailable(
                f"the helper {command[0]} cannot be started: {exc.strerror}"
            ) from None
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        self.output: IO[bytes] = self._process.stdout
        self._complaint = ""
        self._lines: list[str] = []  # the first, without secrets
        self._has_news = threading.Condition()
        # The one thread outside the pipeline: a full pipe of complaints would stop the child.
        self._listener = threading.Thread(
            target=self._listen, args=(self._process.stderr,), name="helper-stderr", daemon=True
        )
        self._listener.start()
        self.end = weakref.finalize(self, _end, self._process)  # also at exit of the interpreter

    @property
    def complaint(self) -> str:
        """The last line that it wrote to standard error, without secrets; of FFmpeg's with levels,
        the last error.
        """
        self._listener.join(0.5)
        return self._complaint

    def wait_for_line(
        self, pattern: re.Pattern[str], *, timeout_seconds: float
    ) -> re.Match[str] | None:
        """The first line on standard error that begins so, waiting for it a while."""

        def found() -> re.Match[str] | None:
            return next(filter(None, map(pattern.match, self._lines)), None)

        with self._has_news:
            return self._has_news.wait_for(found, timeout_seconds)

    def _listen(self, errors: IO[bytes]) -> None:
        with contextlib.suppress(ValueError, OSError):  # closed under us at the end
            for line in errors:
                shown = redact_text(line.decode("utf-8", "replace"))[:_MAX_COMPLAINT_LENGTH]
                level = _LEVEL.match(shown)
                with self._has_news:
                    if shown and (level is None or level[1] in _COMPLAINTS):
                        self._complaint = shown[level.end() :] if level else shown
                    if len(self._lines) < _MAX_LINES:
                        self._lines.append(shown)
                        self._has_news.notify_all()


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the child and its guard, with force where it does not listen; release the pipes."""
    for how in (signal.SIGTERM, getattr(signal, "SIGKILL", signal.SIGTERM)):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if os.name == "posix":
                os.killpg(process.pid, how)
            else:
                process.terminate()
        try:
            process.wait(_GRACE_SECONDS)
            break
        except subprocess.TimeoutExpired:
            continue
    for pipe in (process.stdin, process.stdout, process.stderr):
        if pipe is not None:
            with contextlib.suppress(OSError):
                pipe.close()
