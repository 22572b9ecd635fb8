"""How far ``score`` is, on a terminal."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any


class Progress:
    """A bar with an estimate for each input in work on a terminal; nothing elsewhere."""

    def __init__(self, bar: Any) -> None:
        """``bar`` is rich's, or None for nothing."""
        self._bar = bar

    def begin(self, path: str) -> InputProgress:
        """Another input is in work."""
        return InputProgress(self._bar, path)


class InputProgress:
    """One input's part of it."""

    def __init__(self, bar: Any, path: str) -> None:
        """Show the bar."""
        self._bar = bar
        self._task = None if bar is None else bar.add_task(path, total=None)
        self._first: float | None = None

    def opened(self, info: Any) -> None:
        """The length is known, or will never be."""
        if self._bar is not None and info.duration_seconds:
            self._bar.update(self._task, total=info.duration_seconds)

    def scored(self, pts_seconds: float) -> None:
        """A frame is done."""
        if self._bar is not None:
            self._first = pts_seconds if self._first is None else self._first
            self._bar.update(self._task, completed=pts_seconds - self._first)

    def ended(self) -> None:
        """The input is done, well or not."""
        if self._bar is not None:
            self._bar.remove_task(self._task)


@contextlib.contextmanager
def shown_progress(*, quiet: bool) -> Iterator[Progress]:
    """Bars on standard error, where that is a terminal and nobody asked for quiet."""
    if quiet or not sys.stderr.isatty():
        yield Progress(None)
        return
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.completed:.1f} s"),
        TimeRemainingColumn(),
    )
    with Bars(
        *columns,
        console=Console(stderr=True),
        transient=True,
        redirect_stdout=False,  # the data go there, not above the bar
    ) as bar:
        yield Progress(bar)
