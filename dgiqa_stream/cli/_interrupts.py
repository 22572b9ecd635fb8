"""Ctrl-C and SIGTERM, which mean the same: at once, or at a place of the command's choosing.

A ``KeyboardInterrupt`` out of the blue may hit an import, half a row or a ``finally``. So nothing
is raised: before there is something to save, the process leaves; then a command looks for itself.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from types import FrameType, TracebackType
from typing import Any

INTERRUPTED = 130
"""The exit code."""

_SHOW_CURSOR = b"\x1b[?25h"  # which a bar or a table may have hidden
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_SAME_SECONDS = 1.0
"""``timeout`` and terminals may send a signal to a process and once more to its group."""


def leave_when_interrupted() -> None:
    """From here on either signal ends the process at once: one line, exit code 130."""
    for number in _SIGNALS:
        # A shell has jobs in the background of a script ignore Ctrl-C, and that stays so.
        if number != signal.SIGINT or signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _leave)


def _leave(number: int, frame: FrameType | None) -> None:
    with contextlib.suppress(OSError):
        if os.isatty(2):
            os.write(2, _SHOW_CURSOR)
        os.write(2, b"error: interrupted\n")  # sys.stderr may be in the middle of a line
    os._exit(INTERRUPTED)


class Interrupts:
    """A block in which signals are noted, to be looked for; a later second one leaves at once."""

    def __init__(self) -> None:
        """Nothing is changed before the block is entered."""
        # No Event: a handler runs in the main thread, and set() would wait for the lock that
        # wait() holds in the very same thread.
        self._noted_at: float | None = None
        self._before: list[Any] = []

    def __enter__(self) -> Interrupts:
        """Listen; also where a shell has had Ctrl-C ignored, as services do in the background."""
        self._before = [signal.signal(number, self._note) for number in _SIGNALS]
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Handle signals as before."""
        for number, before in zip(_SIGNALS, self._before, strict=True):
            signal.signal(number, before)

    def __bool__(self) -> bool:
        """Whether there was one."""
        return self._noted_at is not None

    def check(self) -> None:
        """Raise ``KeyboardInterrupt`` where there was one: here, and nowhere else."""
        if self:
            raise KeyboardInterrupt

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._noted_at is None:
            self._noted_at = now
        elif now - self._noted_at > _SAME_SECONDS:
            _leave(number, frame)
