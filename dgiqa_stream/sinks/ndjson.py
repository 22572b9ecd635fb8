"""Records every message, thumbnails too, as one line of JSON each."""

from __future__ import annotations

from pathlib import Path

from dgiqa_stream.sinks._linefile import LineFile
from dgiqa_stream.wire import Message, encode


class NdjsonSink:
    """A recording that survives the program: ``kill -9`` loses at most the last line."""

    def __init__(self, path: str | Path, *, append: bool = True) -> None:
        """Append to the file, or replace it; ``-`` is standard output.

        Raises SinkError where it cannot be written.
        """
        self._file = LineFile(path, append=append)

    def send(self, message: Message) -> None:
        """Write one line; raises SinkError where that fails, as on a full disk."""
        self._file.write(encode(message, "json") + b"\n")

    def tick(self) -> None:
        """Nothing is due: each line is written at once."""

    def close(self) -> None:
        """Close the file; twice is fine."""
        self._file.close()
