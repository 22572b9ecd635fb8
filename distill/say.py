"""Words for people, on standard error."""

from __future__ import annotations

import sys


def say(text: str) -> None:
    """One line."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def show_progress(text: str | None) -> None:
    """A line that the next call writes over; None ends it."""
    sys.stderr.write("\n" if text is None else f"\r{text}")
    sys.stderr.flush()
