"""Pieces of the page. What takes plain text escapes it."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping
from html import escape
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dgiqa_stream.report._pictures import Picture


def score_text(value: float | None) -> str:
    """One decimal, or a dash."""
    return "–" if value is None else f"{value:.1f}"


def number_or(value: float | None, otherwise: float) -> float:
    """The value, or another where there is none."""
    return otherwise if value is None else value


def note_lines(notes: list[str]) -> str:
    """Lines that a reader should not miss."""
    return "".join(f'<p class="note">{escape(note)}</p>' for note in notes)


def bar(score: float | None) -> str:
    """A score as a bar; empty where there is none."""
    return f'<span class="bar"><i style="width:{number_or(score, 0.0):.1f}%"></i></span>'


def meter(score: float | None) -> str:
    """A score as a number and a bar."""
    return f'<span class="meter"><b>{score_text(score)}</b>{bar(score)}</span>'


def table(heads: list[str], rows: list[list[str]], kind: str) -> str:
    """A table that scrolls sideways; cells are markup, escaped by the caller."""
    head = "".join(f'<th scope="col">{h}</th>' for h in heads)
    body = "".join(
        f'<tr><th scope="row">{first}</th>{"".join(f"<td>{cell}</td>" for cell in rest)}</tr>'
        for first, *rest in rows
    )
    return (
        f'<div class="scroll {kind}" tabindex="0"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def card(picture: Picture, name: str = "") -> str:
    """A picture with its score, and its time code or ``name``."""
    data = base64.b64encode(picture.jpeg).decode("ascii")
    when = "" if picture.pts_seconds is None else timecode(picture.pts_seconds)
    index = "" if picture.index is None else f"frame {picture.index}"
    where = escape(name) if name else f"<time>{when}</time> <span>{index}</span>"
    alt = escape(name or f"frame at {when}")
    return (
        f'<figure class="card"><img alt="{alt}" width="{picture.width}" height="{picture.height}"'
        f' src="data:image/jpeg;base64,{data}">'
        f"<figcaption><b>{score_text(picture.score)}</b> {where}</figcaption></figure>"
    )


def timecode(seconds: float) -> str:
    """Hours, minutes, seconds and milliseconds, as players show them."""
    sign, ms = ("-" if seconds < 0 else ""), round(abs(seconds) * 1000)
    return f"{sign}{ms // 3_600_000:02}:{ms // 60_000 % 60:02}:{ms // 1000 % 60:02}.{ms % 1000:03}"


def definitions(items: Iterable[tuple[str, Any]]) -> str:
    """Names and values, escaped."""
    return "".join(f"<dt>{escape(str(k))}</dt><dd>{escape(str(v))}</dd>" for k, v in items)


def flat(values: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    """Nested tables as ``table.key``; what is empty is left out."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{key}.")
        elif value not in ("", None, [], ()):
            yield f"{prefix}{key}", value
