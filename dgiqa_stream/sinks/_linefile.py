"""A file that grows by whole lines, each handed to the system at once.

Killing the program loses at most the line being written.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
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


@dataclass(slots=True)
class _Opened:
    """A file and how far it is."""

    file: FileIO
    identity: tuple[int, int] | None
    """Its device and number there; None for what has no name that could be given to another."""
    is_new: bool
    """Whether its first lines are still to come."""
    is_torn: bool
    """Whether it ends within a line, cut short by a kill."""
    num_bytes: int
    """At least so long it is, unless somebody cuts it."""

    def is_whole_at(self, path: str | Path) -> bool:
        """Whether it is the file under this name, with all that was written to it."""
        try:
            found = Path(path).stat()
        except OSError:  # none there, or none that can be seen
            return False
        return (found.st_dev, found.st_ino) == self.identity and found.st_size >= self.num_bytes

    def take_back(self, num_bytes: int) -> None:
        """Cut off its last bytes, the beginning of a line, unless others have written since."""
        number = self.file.fileno()
        with contextlib.suppress(OSError):
            if self.identity and os.fstat(number).st_size == self.num_bytes + num_bytes:
                os.ftruncate(number, self.num_bytes)
                self.file.seek(self.num_bytes)
                return
        self.is_torn = self.is_torn or num_bytes > 0


class LineFile:
    """A file that lines are appended to; ``-`` is standard output. Thread-safe.

    One that is moved away, removed or emptied, as ``logrotate`` does, is begun anew under its name
    by the next line. What a full disk leaves of a line is taken back.
    """

    def __init__(
        self, path: str | Path, *, append: bool, first_lines: Callable[[], bytes] = bytes
    ) -> None:
        """``first_lines`` gives what an empty file begins with.

        Raises SinkError, with the path, the reason and the next step, where it cannot open.
        """
        self._path, self._first_lines = path, first_lines
        self._name = "standard output" if str(path) == STDOUT else str(path)
        self._lock = threading.Lock()
        self.was_moved = False
        """Whether the file has been begun anew."""
        try:
            self._now = _open(path, append=append)
        except OSError as exc:
            raise self._error(exc) from exc
        try:
            self.write(b"")
        except SinkError:
            self.close()
            raise

    def write(self, lines: bytes) -> None:
        """Append; raises SinkError where not all of it could be written."""
        with self._lock:
            if self._now.file.closed:
                raise SinkError(f"{self._name} is closed: make a new sink")
            self._follow()
            now = self._now
            if now.is_new:
                lines = self._first_lines() + lines
            left = memoryview(b"\n" + lines if now.is_torn and lines else lines)
            num_done = 0
            try:
                while num_done < len(left):
                    num_done += now.file.write(left[num_done:]) or 0
            except OSError as exc:
                now.take_back(num_done)
                raise self._error(exc) from exc
            now.num_bytes += num_done
            now.is_new = False
            now.is_torn = now.is_torn and not lines

    def close(self) -> None:
        """Close; twice is fine."""
        with self._lock:
            self._now.file.close()

    def _follow(self) -> None:
        """Begin the file anew where it is no longer under its name, or shorter than it was.

        Where that cannot be, lines go on to where it is now; raises SinkError where it is nowhere.
        """
        if self._now.identity is None or self._now.is_whole_at(self._path):
            return
        if Path(self._path).is_fifo():  # whose opening would wait for a reader
            return
        try:
            opened = _open(self._path, append=True)
        except OSError as exc:
            if os.fstat(self._now.file.fileno()).st_nlink == 0:
                raise self._error(exc) from exc
            return
        self._now.file.close()
        self._now, self.was_moved = opened, True

    def _error(self, exc: OSError) -> SinkError:
        advice = _ADVICE.get(exc.errno or 0, "choose another path or change its permissions")
        return SinkError(f"cannot write {self._name}: {exc.strerror}; {advice}")


def _open(path: str | Path, *, append: bool) -> _Opened:
    if str(path) == STDOUT:
        return _Opened(FileIO(sys.stdout.fileno(), "w", closefd=False), None, True, False, 0)
    file = FileIO(path, "a" if append else "w")
    found = os.fstat(file.fileno())
    is_regular = stat.S_ISREG(found.st_mode)
    is_new = not (is_regular and found.st_size)
    return _Opened(
        file,
        identity=(found.st_dev, found.st_ino) if is_regular else None,
        is_new=is_new,
        is_torn=not is_new and not _ends_a_line(Path(path)),
        num_bytes=found.st_size if is_regular else 0,
    )


def _ends_a_line(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            file.seek(-1, os.SEEK_END)
            return file.read(1) == b"\n"
    except OSError:  # may be written but not read
        return True
