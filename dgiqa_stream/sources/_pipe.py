"""Reading a pipe with a deadline, so that neither a silent sender nor close() can hang us."""

from __future__ import annotations

import os
import select
import stat
import sys
import threading
import time
from pathlib import Path
from typing import BinaryIO, SupportsFloat

from dgiqa_stream.errors import SourceUnavailable

_POLL_SECONDS = 0.1


class PipeReader:
    """A file-like object for PyAV over a file descriptor, which it owns.

    ``patience`` is asked before each read how many seconds it may take; ``read`` raises
    ``TimeoutError`` after that, and gives the end of the stream once :meth:`stop` was called.
    """

    def __init__(self, descriptor: int, patience: SupportsFloat) -> None:
        self._descriptor: int | None = descriptor
        self._patience = patience
        self._stopped = threading.Event()

    def readable(self) -> bool:
        """PyAV asks."""
        return True

    def seekable(self) -> bool:
        """A pipe has no way back."""
        return False

    def read(self, size: int) -> bytes:
        """Up to ``size`` bytes, as soon as there are some; empty at the end."""
        descriptor = self._descriptor
        if descriptor is None:
            return b""
        if os.name != "nt":  # Windows cannot wait for a pipe: there the read itself waits
            end = time.monotonic() + float(self._patience)
            while not select.select([descriptor], [], [], _POLL_SECONDS)[0]:
                if self._stopped.is_set():
                    return b""
                if time.monotonic() > end:
                    raise TimeoutError("the sender of the pipe is silent")
        return b"" if self._stopped.is_set() else os.read(descriptor, size)

    def stop(self) -> None:
        """End a read in another thread within a tenth of a second."""
        self._stopped.set()

    def close(self) -> None:
        """Release the descriptor; calling twice is fine."""
        self.stop()
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)


def open_stdin(patience: SupportsFloat) -> PipeReader | BinaryIO:
    """Standard input: seekable where it is a file, else a pipe; refuses a terminal."""
    try:
        descriptor = sys.stdin.fileno()
        mode = os.fstat(descriptor).st_mode
    except (AttributeError, OSError, ValueError):
        raise SourceUnavailable("-: there is no standard input; pipe a stream into it") from None
    if os.isatty(descriptor):
        raise SourceUnavailable(
            "-: standard input is a terminal; pipe a stream into it, as `cat a.ts | … -`"
        )
    copy = os.dup(descriptor)
    return os.fdopen(copy, "rb") if stat.S_ISREG(mode) else PipeReader(copy, patience)


def open_named_pipe(path: Path, patience: SupportsFloat) -> PipeReader:
    """A FIFO, without waiting for its writer to come; the first read waits."""
    return PipeReader(os.open(path, os.O_RDONLY | os.O_NONBLOCK), patience)
