"""A comparison as text for a terminal."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING

from dgiqa_stream.comparison import CAVEAT, NAMES, clock_text, overlap_text

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from dgiqa_stream.comparison import Comparison

_WIDTH = 80


def table_of(found: Comparison, notes: Sequence[str]) -> str:
    """The whole text, with a newline at its end."""
    return "\n".join(_lines(found, notes)) + "\n"


def _lines(found: Comparison, notes: Sequence[str]) -> Iterator[str]:
    yield f"A  {found.a.name}"
    yield f"B  {found.b.name}"
    yield overlap_text(found)
    yield from (f"note: {note}" for note in notes)
    yield ""
    yield f"{'':<22}{'A':>7}{'B':>7}{'B - A':>8}   95 % interval"
    for d in found.differences:
        yield (
            f"{NAMES[d.name]:<22}{d.a:7.1f}{d.b:7.1f}{d.difference:+8.1f}"
            f"   {d.low:+.1f} to {d.high:+.1f}"
        )
    yield ""
    if found.stretches:
        yield "B is worse than A by more than 1 point, on A's clock:"
    for s in found.stretches:
        span = f"{clock_text(s.begin_seconds)} - {clock_text(s.end_seconds)}"
        yield f"  {span:<22}{s.difference:+6.1f}   worst second {s.lowest:+.1f}"
    yield from [""] if found.stretches else []
    yield f"{found.verdict[0].upper()}{found.verdict[1:]}."
    yield from textwrap.wrap(CAVEAT, _WIDTH)
