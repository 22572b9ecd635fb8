"""Frame scores as comma-separated values, for spreadsheets and data frames."""

from __future__ import annotations

import csv
import io
from pathlib import Path

from dgiqa_stream.errors import SinkError
from dgiqa_stream.sinks._linefile import STDOUT, LineFile
from dgiqa_stream.wire import FrameMessage, Message

COLUMNS = (
    *("stream", "index", "pts_seconds", "score", "raw", "in_domain", "wall"),
    *("interval_low", "interval_high", "out_of_domain"),
)


class CsvSink:
    """One line for each scored frame; other messages are left out."""

    def __init__(self, path: str | Path, *, append: bool = True) -> None:
        """Append to the file, or replace it; ``-`` is standard output.

        Raises SinkError where it cannot be written or holds other columns.
        """
        if append and str(path) != STDOUT:
            _check_columns(Path(path))
        self._file = LineFile(path, append=append, first_lines=lambda: _line(COLUMNS))

    def send(self, message: Message) -> None:
        """Write a frame's line; raises SinkError where that fails, as on a full disk."""
        if isinstance(message, FrameMessage):
            self._file.write(_line(_values(message)))

    def tick(self) -> None:
        """Nothing is due: each line is written at once."""

    def close(self) -> None:
        """Close the file; twice is fine."""
        self._file.close()


def _values(message: FrameMessage) -> tuple[object, ...]:
    quality = message.quality
    low, high = quality.interval or ("", "")
    return (
        message.stream,
        message.frame.index,
        message.frame.pts_seconds,
        quality.score,
        quality.raw,
        str(quality.in_domain).lower(),
        message.wall,
        low,
        high,
        " ".join(quality.out_of_domain),
    )


def _line(values: tuple[object, ...]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(values)
    return text.getvalue().encode("utf-8")


def _check_columns(path: Path) -> None:
    wanted = _line(COLUMNS)
    try:
        with path.open("rb") as file:
            found = file.read(len(wanted)) if path.is_file() else b""
    except OSError:  # not there yet; opening it for writing says what else is wrong
        return
    if found and found != wanted:
        raise SinkError(f"cannot append to {path}: its columns differ; choose another file")
