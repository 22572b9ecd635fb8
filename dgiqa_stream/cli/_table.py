"""Streams as a table that is redrawn: a terminal's view of messages, published or received."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from types import TracebackType
from typing import Any, TextIO

from dgiqa_stream import wire
from dgiqa_stream.cli._rows import interval_text

_REDRAW_SECONDS = 0.25
_LINE_SECONDS = 5.0
_WORDS = ((80.0, "excellent"), (60.0, "good"), (40.0, "fair"), (20.0, "poor"), (0.0, "bad"))
_BAR = 20
_HEADINGS = (
    "stream", "state", "time", "score", "", "ewma", "worst 5 %", "session", "fps", "lost",
)  # fmt: skip


def word_for(score: float) -> str:
    """The word for a score, as in the documentation of the scale."""
    return next(word for least, word in _WORDS if score >= least)


@dataclass(slots=True)
class _Row:
    state: str = "-"
    time_seconds: float | None = None
    score: float | None = None
    interval: tuple[float, float] | None = None
    out_of_domain: tuple[str, ...] = ()
    ewma: float | None = None
    low5: float | None = None
    session: float | None = None
    """The headline of the whole session, once it has ended."""
    fps: float | None = None
    dropped: int = 0
    is_opened: bool = False


class LiveTable:
    """A sink that shows: a redrawn table on a terminal, a line every few seconds elsewhere."""

    def __init__(self, out: TextIO, *, only_opened: bool = False) -> None:
        """Nothing is drawn before the block is entered.

        ``only_opened`` leaves no trace of streams that were never opened: an error tells of them.
        """
        self._out, self._rows, self._only_opened = out, dict[str, _Row](), only_opened
        self._lock = threading.Lock()
        self._live: Any = None
        self._drawn_at = self._told_at = 0.0

    def __enter__(self) -> LiveTable:
        """Begin to draw."""
        if self._out.isatty():
            from rich.console import Console
            from rich.live import Live

            self._live = Live(console=Console(file=self._out), auto_refresh=False, transient=False)
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Draw a last time and let go of the terminal."""
        self._told_at = self._drawn_at = 0.0
        self.refresh()
        if self._live is not None:
            self._live.transient = not self._told_rows()
            self._live.stop()

    def send(self, message: wire.Message) -> None:
        """Take what a message tells."""
        with self._lock:
            row = self._rows.setdefault(message.stream, _Row())
            if isinstance(message, wire.FrameMessage):
                quality = message.quality
                row.time_seconds, row.score = message.frame.pts_seconds, quality.score
                row.interval, row.out_of_domain = quality.interval, tuple(quality.out_of_domain)
                row.dropped = message.drops.queue + message.drops.stale
            elif isinstance(message, wire.WindowMessage):
                if message.window.len_s >= 10 or row.ewma is None:
                    row.ewma, row.low5 = message.pool.get("ewma"), message.pool.get("low5")
            elif isinstance(message, wire.FinalMessage):
                row.session = message.score
                row.low5 = message.pool.get("low5", row.low5)
            elif isinstance(message, wire.StatusMessage):
                row.state = message.state
                # The first status comes with the stream, before there is a rate.
                row.fps = message.fps_scored if message.counts.get("scored") else None
            elif isinstance(message, wire.MetaMessage):
                row.is_opened = True

    def tick(self) -> None:
        """Drawing has its own pace."""

    def close(self) -> None:
        """Nothing to release."""

    def refresh(self) -> None:
        """Redraw where it is time to."""
        now = time.monotonic()
        if self._live is not None and now - self._drawn_at >= _REDRAW_SECONDS:
            self._drawn_at = now
            self._live.update(self._table(), refresh=True)
        elif self._live is None and now - self._told_at >= _LINE_SECONDS:
            for stream, row in self._told_rows():
                self._told_at = now
                self._out.write(f"{stream}: {_as_line(row)}\n")
            self._out.flush()

    def _told_rows(self) -> list[tuple[str, _Row]]:
        with self._lock:
            rows = list(self._rows.items())
        return [(name, row) for name, row in rows if row.is_opened or not self._only_opened]

    def _table(self) -> Any:
        from rich.table import Table

        table = Table(box=None, pad_edge=False)
        for heading in _HEADINGS:
            table.add_column(heading, justify="left" if heading in ("stream", "state") else "right")
        with self._lock:
            rows = list(self._rows.items())
        for stream, row in rows:
            filled = round((row.score or 0.0) / 100 * _BAR)
            bar = "█" * filled + "░" * (_BAR - filled) if row.score is not None else ""
            word = f" {_judged(row, '!')}"
            table.add_row(
                stream,
                row.state,
                _number(row.time_seconds, " s"),
                _number(row.score) + interval_text(row.interval) + word,
                bar,
                _number(row.ewma),
                _number(row.low5),
                _number(row.session),
                _number(row.fps),
                str(row.dropped),
            )
        return table


def _number(value: float | None, unit: str = "") -> str:
    return "-" if value is None else f"{value:.1f}{unit}"


def _judged(row: _Row, odd: str) -> str:
    """The score's word, or, after ``odd``, why it deserves none."""
    if row.score is None:
        return ""
    return f"{odd} {' '.join(row.out_of_domain)}" if row.out_of_domain else word_for(row.score)


def _as_line(row: _Row) -> str:
    score = _number(row.score) + interval_text(row.interval)
    score += "" if row.score is None else f" ({_judged(row, 'out of domain:')})"
    return (
        f"{row.state}, {_number(row.time_seconds, ' s')}: score {score}, "
        f"ewma {_number(row.ewma)}, worst 5 % {_number(row.low5)}, "
        + ("" if row.session is None else f"session {_number(row.session)}, ")
        + f"{row.dropped} lost"
    )
