"""A file that grows by whole lines, each handed to the system at once.

Killing the program loses at most the line being written.
"""

from __future__ import annotations

import errno
import os
import sys
import threading
from io import FileIO
from pathlib import Path

from dgiqa_stream.errors import SinkError

STDOUT = "-"
_ADVICE = {
    errno.ENOSPC: "free some space or choose another disk",
    errno.EDQUOT: "free some of your quota or choose another disk",
    errno.ENOENT: "make its folder first",
    errno.EISDIR: "name a file, not a folder",
    errno.EPIPE: "whoever read it has gone",
}


class LineFile:
    """A file opened for appending; ``-`` is standard output. Thread-safe."""

    def __init__(self, path: str | Path, *, append: bool) -> None:
        """Raises SinkError, with the path, the reason and the next step, where it cannot open."""
        self._name = "standard output" if str(path) == STDOUT else str(path)
        self._lock = threading.Lock()
        try:
            self._file = _open(path, append)
            self.is_empty = not self._file.seekable() or self._file.seek(0, os.SEEK_END) == 0
            if not self.is_empty and not _ends_a_line(Path(path)):
                self.write(b"\n")  # a killed writer's line must not swallow the next
        except OSError as exc:
            raise self._error(exc) from exc

    def write(self, lines: bytes) -> None:
        """Append; raises SinkError where not all of it could be written."""
        with self._lock:
            if self._file.closed:
                raise SinkError(f"{self._name} is closed: make a new sink")
            try:
                left = memoryview(lines)
                while left:
                    left = left[self._file.write(left) or 0 :]
            except OSError as exc:
                raise self._error(exc) from exc

    def close(self) -> None:
        """Close; twice is fine."""
        with self._lock:
            self._file.close()

    def _error(self, exc: OSError) -> SinkError:
        advice = _ADVICE.get(exc.errno or 0, "choose another path or change its permissions")
        return SinkError(f"cannot write {self._name}: {exc.strerror}; {advice}")


def _open(path: str | Path, append: bool) -> FileIO:
    if str(path) == STDOUT:
        return FileIO(sys.stdout.fileno(), "w", closefd=False)
    return FileIO(path, "a" if append else "w")


def _ends_a_line(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"
