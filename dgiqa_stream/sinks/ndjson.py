"""Records every message, thumbnails too, as one line of JSON each."""

from __future__ import annotations

from pathlib import Path

from dgiqa_stream.sinks._linefile import LineFile
from dgiqa_stream.wire import FinalMessage, Message, MetaMessage, encode


class NdjsonSink:
    """A recording that survives the program: ``kill -9`` loses at most the last line.

    A file that is begun anew, because the one before was moved away or emptied, begins with what is
    watched: the ``meta`` messages of the streams that have not ended, as they were sent.
    """

    def __init__(self, path: str | Path, *, append: bool = True) -> None:
        """Append to the file, or replace it; ``-`` is standard output.

        Raises SinkError where it cannot be written.
        """
        self._metas: dict[str, bytes] = {}  # of each stream that has not ended
        self._file = LineFile(path, append=append, first_lines=self._watched)

    @property
    def was_moved(self) -> bool:
        """Whether the file has been begun anew, so that it has not all messages."""
        return self._file.was_moved

    def send(self, message: Message) -> None:
        """Write one line; raises SinkError where that fails, as on a full disk."""
        line = encode(message, "json") + b"\n"
        if isinstance(message, MetaMessage):  # before it is written: others may begin a file anew
            self._metas[message.stream] = line
        self._file.write(line)
        if isinstance(message, FinalMessage):
            self._metas.pop(message.stream, None)

    def _watched(self) -> bytes:
        return b"".join(list(self._metas.values()))  # a copy: other threads send, too

    def tick(self) -> None:
        """Nothing is due: each line is written at once."""

    def close(self) -> None:
        """Close the file; twice is fine."""
        self._file.close()
