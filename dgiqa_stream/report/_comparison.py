"""The page of a comparison: both curves, the difference beneath, and how sure it is."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING, Any

from dgiqa_stream.comparison import CAVEAT, NAMES, clock_text, interval_facts, overlap_text
from dgiqa_stream.errors import SinkError
from dgiqa_stream.report._charts import require_matplotlib
from dgiqa_stream.report._comparison_chart import comparison_svg
from dgiqa_stream.report._markup import definitions, flat, note_lines, table
from dgiqa_stream.report._page import filled

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from dgiqa_stream.comparison import Comparison


def write_comparison(
    found: Comparison,
    out: Path,
    *,
    notes: Sequence[str] = (),
    details: Mapping[str, Mapping[str, Any]],
) -> None:
    """Write the page of a comparison; an existing file is replaced.

    ``details`` are groups of names and values, such as the model's, by title. Raises
    :class:`~dgiqa_stream.errors.SinkError` where matplotlib is missing or ``out`` cannot be
    written.
    """
    require_matplotlib()
    title = f"{found.b.name} against {found.a.name}"
    rest = f'<section id="stretches">{_stretches(found)}{_details(found, details)}</section>'
    sections = [_summary(found), _curves(found), rest]
    page = filled(title, summary=note_lines(list(notes)), sections="\n".join(sections))
    beside = out.with_name(out.name + ".part")
    try:
        beside.write_text(page, encoding="utf-8")
        beside.replace(out)
    except OSError as exc:
        raise SinkError(f"cannot write the report {out}: {exc.strerror}; choose another") from exc


def _summary(found: Comparison) -> str:
    rows = [
        [
            escape(NAMES[d.name]),
            f"{d.a:.1f}",
            f"{d.b:.1f}",
            f"<strong>{d.difference:+.1f}</strong><small>{d.low:+.1f} to {d.high:+.1f}</small>",
        ]
        for d in found.differences
    ]
    heads = ["", "A", "B", "B less A<small>95 % interval</small>"]
    verdict = found.verdict[0].upper() + found.verdict[1:]
    return (
        f'<section id="verdict"><h2>{escape(verdict)}.</h2>'
        f'<p class="sub">A: {escape(found.a.name)}<br>B: {escape(found.b.name)}</p>'
        f"{table(heads, rows, 'pool')}"
        f'<p class="sub">{escape(CAVEAT)}</p></section>'
    )


def _curves(found: Comparison) -> str:
    wide, narrow = (
        comparison_svg(found, key=key, width_inches=width, height_inches=height)
        for key, width, height in (("w", 11.0, 4.6), ("n", 4.2, 4.2))
    )
    return (
        '<section id="curves"><h2>Scores and their difference</h2>'
        '<figure role="img" aria-label="Scores of A and B over time, and B less A beneath">'
        f'<div class="wide">{wide}</div><div class="narrow">{narrow}</div></figure>'
        '<ul class="legend"><li class="drop">A</li><li class="accent">B</li>'
        '<li class="soft">B less A</li>'
        '<li class="dash">difference of the means</li>'
        '<li class="sure">its 95 % interval</li></ul>'
        f'<p class="sub">{escape(overlap_text(found))}. Times are A\'s.</p></section>'
    )


def _stretches(found: Comparison) -> str:
    heading = "<h2>Where B is worse than A</h2>"
    if not found.stretches:
        return heading + '<p class="sub">Nowhere by more than 1 point in a second.</p>'
    offset = found.alignment.offset_seconds
    rows = [
        [
            f"{clock_text(s.begin_seconds)} – {clock_text(s.end_seconds)}",
            f"<strong>{s.difference:+.1f}</strong>",
            f"{s.lowest:+.1f}",
            f"{s.end_seconds - s.begin_seconds:.1f} s",
            clock_text(s.begin_seconds + offset),
        ]
        for s in found.stretches
    ]
    heads = ["", "B less A", "worst second", "length", "begins in B"]
    return heading + table(heads, rows, "pool")


def _details(found: Comparison, details: Mapping[str, Mapping[str, Any]]) -> str:
    groups = {**details, "Interval": interval_facts(found)}
    lists = "".join(
        f"<div><h4>{escape(title)}</h4><dl>{definitions(flat(values))}</dl></div>"
        for title, values in groups.items()
        if values
    )
    return f"<details><summary>How this was made</summary><div>{lists}</div></details>"
