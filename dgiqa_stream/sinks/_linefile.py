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
        except OSError as exc:
            raise self._error(exc) from exc
        is_file = str(path) != STDOUT and self._file.seekable()
        self.is_empty = not is_file or self._file.seek(0, os.SEEK_END) == 0
        # A line that was cut short, by a kill or a full disk, must not swallow the next.
        self._is_torn = not self.is_empty and not _ends_a_line(Path(path))

    def write(self, lines: bytes) -> None:
        """Append; raises SinkError where not all of it could be written."""
        with self._lock:
            if self._file.closed:
                raise SinkError(f"{self._name} is closed: make a new sink")
            left = memoryview(b"\n" + lines if self._is_torn else lines)
            try:
                while left:
                    num_written = self._file.write(left) or 0
                    left = left[num_written:]
                    self._is_torn = bool(left) and (self._is_torn or num_written > 0)
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
    try:
        with path.open("rb") as file:
            file.seek(-1, os.SEEK_END)
            return file.read(1) == b"\n"
    except OSError:  # may be written but not read
        return True
