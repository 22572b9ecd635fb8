"""Playing at the stream's own pace, and its remaining patience."""

from __future__ import annotations

import threading
import time
from dataclasses import replace

from dgiqa_stream.types import Frame


class Pacer:
    """Holds frames back until their time has come, counted from the first."""

    def __init__(self, stop: threading.Event) -> None:
        self._stop = stop
        self._ahead_seconds: float | None = None

    def wait_for(self, frame: Frame) -> Frame:
        """Sleep until the frame is due; ends at once when the source is closed.

        The frame is then received, as from a live source: what it waited here is no lag.
        """
        now, pts_seconds = time.monotonic(), frame.info.pts_seconds
        if self._ahead_seconds is None:
            self._ahead_seconds = pts_seconds - now
        remaining = pts_seconds - self._ahead_seconds - now
        if remaining <= 0:
            return frame
        self._stop.wait(remaining)
        return replace(frame, info=replace(frame.info, received_at_seconds=time.time()))


class Patience:
    """How many seconds the next wait may take: what is left to open, then the read timeout.

    PyAV asks anew (by ``float()``) for each of its blocking phases, and gives each the whole
    answer; with this, all phases of opening share one deadline.
    """

    def __init__(self, open_seconds: float, read_seconds: float) -> None:
        self.open_seconds, self.read_seconds = open_seconds, read_seconds
        self._deadline: float | None = time.monotonic() + open_seconds

    @property
    def limit_seconds(self) -> float:
        """The timeout that applies now, for messages."""
        return self.read_seconds if self._deadline is None else self.open_seconds

    @property
    def is_over(self) -> bool:
        """Whether the time to open has run out."""
        return self._deadline is not None and time.monotonic() > self._deadline

    def opened(self) -> None:
        """From now on the read timeout applies."""
        self._deadline = None

    def __float__(self) -> float:
        """Seconds; never below a small positive number, since PyAV takes 0 and less as forever."""
        if self._deadline is None:
            return self.read_seconds
        return max(0.01, self._deadline - time.monotonic())
