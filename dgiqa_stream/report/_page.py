"""The page: every value that comes from outside is escaped here."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from html import escape
from importlib import resources
from string import Template
from typing import TYPE_CHECKING

import numpy as np

from dgiqa_stream.report._charts import PALETTE, clock, curve_svg, histogram_svg, interval_label
from dgiqa_stream.report._markup import (
    bar,
    card,
    definitions,
    flat,
    meter,
    note_lines,
    number_or,
    score_text,
    table,
)
from dgiqa_stream.report._pictures import Picture, worst_pictures
from dgiqa_stream.report._story import Story, tell
from dgiqa_stream.versions import package_version

if TYPE_CHECKING:
    from dgiqa_stream.recording import FrameRow, Recording, Track
    from dgiqa_stream.types import WindowScore

_MOST_SECTIONS = 24
_POOL_NAMES = {
    "hysteresis": "hysteresis",
    "mean": "mean",
    "median": "median",
    "low5": "worst 5 % (mean)",
    "low1": "worst 1 % (mean)",
    "p1": "1st percentile",
    "p5": "5th percentile",
    "p10": "10th percentile",
    "min": "lowest",
    "max": "highest",
    "harmonic_mean": "harmonic mean",
    "minkowski": "Minkowski mean",
    "vqpool": "VQPooling",
    "ewma": "moving average",
    "hysteresis_exact": "hysteresis, looking ahead",
    "primacy": "primacy",
    "recency": "recency",
    "p1203_style": "P.1203.3 style",
    "stdev": "standard deviation",
}


def page_of(recording: Recording) -> str:
    """The whole page."""
    stories = [tell(t) for t in recording.tracks]
    timed = [s for s in stories if not s.track.is_still]
    stills = [s for s in stories if s.track.is_still]
    shown = _lowest(timed, _MOST_SECTIONS)
    sections = [_section(story, f"t{n}") for n, story in enumerate(shown)]
    if stills:
        sections.append(_stills_section(stills))
    return filled(
        recording.path.name,
        summary=_summary(recording, timed, shown),
        sections="\n".join(sections),
    )


def filled(title: str, *, summary: str, sections: str) -> str:
    """A page around markup; the title is plain text."""
    template = Template(_asset("page.html"))
    return template.substitute(
        title=escape(title),
        style=_asset("page.css"),
        light=_variables(PALETTE),
        summary=summary,
        sections=sections,
        version=escape(package_version()),
        made_at=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )


def _asset(name: str) -> str:
    return (resources.files("dgiqa_stream") / "report" / name).read_text(encoding="utf-8")


def _variables(palette: Mapping[str, str]) -> str:
    return " ".join(f"--{name}: {color};" for name, color in palette.items())


def _lowest(stories: list[Story], most: int) -> list[Story]:
    """All stories in their order, or, of too many, those with the lowest scores."""
    if len(stories) <= most:
        return stories
    kept = sorted(stories, key=lambda s: number_or(s.session.score, 101.0))[:most]
    return [s for s in stories if s in kept]


# The recording as a whole ---------------------------------------------------------------------


def _summary(recording: Recording, timed: list[Story], shown: list[Story]) -> str:
    notes = []
    if recording.num_cut_short:
        lines = "line" if recording.num_cut_short == 1 else "lines"
        notes.append(
            f"{recording.num_cut_short} {lines} of the recording, cut short as by a power failure, "
            f"{'is' if recording.num_cut_short == 1 else 'are'} left out."
        )
    if recording.num_unknown:
        notes.append(
            f"{recording.num_unknown} messages of kinds this version does not know are left out."
        )
    if len(timed) > len(shown):
        notes.append(f"Of {len(timed)} tracks, the {len(shown)} lowest are shown in full.")
    parts = [note_lines(notes)]
    if len(timed) > 1:
        parts.insert(0, _overview(timed, shown))
    return "".join(parts)


def _overview(timed: list[Story], shown: list[Story]) -> str:
    rows = []
    for story in timed:
        name = escape(story.track.name)
        if story in shown:
            name = f'<a href="#t{shown.index(story)}">{name}</a>'
        pool = story.session.pool
        rows.append(
            [
                name,
                meter(story.session.score),
                score_text(pool.get("mean")),
                score_text(pool.get("low5")),
                score_text(pool.get("min")),
                clock(story.session.length_seconds),
                str(len(story.track.frames)),
            ]
        )
    heads = ["", "score", "mean", "worst 5 %", "lowest", "length", "frames"]
    return f"<section>{table(heads, rows, 'overview')}</section>"


# One track ------------------------------------------------------------------------------------


def _section(story: Story, key: str) -> str:
    track = story.track
    begun = f" · session {escape(track.session)}" if track.session else ""
    parts = [
        f'<section id="{key}">',
        f"<h2>{escape(track.name)}</h2>",
        f'<p class="sub">{_described(track)}{begun}</p>',
        note_lines(_track_notes(story)),
    ]
    if len(story.score):
        parts += [_tiles(story), _curve(story, key), _distribution_and_pool(story, key)]
        parts.append(_pictures(*worst_pictures(track)))
    parts += [_details(story), "</section>"]
    return "\n".join(parts)


def _described(track: Track) -> str:
    if track.meta is None:
        return "file" if track.path else "stream"
    source, meta = track.meta.source, track.meta
    fps = source.average_fps
    rate = f" · {fps[0] / fps[1]:.5g} frames/s" if fps and fps[1] else ""
    return escape(f"{meta.url} · {source.codec} {source.width}×{source.height}{rate}")


def _track_notes(story: Story) -> list[str]:
    track, notes = story.track, []
    if not story.track.frames:
        notes.append(f"No frame was scored. {track.error or ''}")
    elif track.path is None and track.final is None:
        notes.append("The recording ends without a summary; values are pooled from its frames.")
    if track.final is not None and track.final.error is not None:
        notes.append(f"Ended with an error: {track.final.error.detail}")
    if story.out_of_domain_share:
        reasons = ", ".join(f"{r} {100 * s:.3g} %" for r, s in story.out_of_domain.items())
        notes.append(
            f"{100 * story.out_of_domain_share:.3g} % of the scored time is of a kind that the "
            f"model was not tried on ({reasons}): it is pooled with the rest; read it with care."
        )
    if track.frames and not story.session.valid:
        notes.append("Less than half of the time has a score.")
    return notes


def _tiles(story: Story) -> str:
    session, track = story.session, story.track
    score = (
        f'<div class="tile main"><span class="label">{escape(session.headline)} of the session'
        f'</span><span class="big">{score_text(session.score)}<small> / 100</small></span>'
        f"{bar(session.score)}</div>"
    )
    dropped = max((f.num_dropped for f in track.frames), default=0)
    tiles = [
        ("mean", score_text(session.pool.get("mean"))),
        ("worst 5 %", score_text(session.pool.get("low5"))),
        ("lowest", score_text(session.pool.get("min"))),
        ("length", clock(session.length_seconds)),
        ("frames", f"{len(track.frames):,}"),
        ("covered", f"{100 * session.coverage:.0f} %"),
    ]
    if track.path is None:
        tiles.append(("dropped", f"{dropped:,}"))
    if story.out_of_domain_share:
        tiles.append(("out of domain", f"{100 * story.out_of_domain_share:.3g} %"))
    small = "".join(
        f'<div class="tile"><span class="label">{label}</span><span class="value">{value}</span>'
        "</div>"
        for label, value in tiles
    )
    return f'<div class="tiles">{score}{small}</div>'


def _curve(story: Story, key: str) -> str:
    wide = curve_svg(story, key=f"{key}w", width_inches=11.0, height_inches=3.3)
    narrow = curve_svg(story, key=f"{key}n", width_inches=4.4, height_inches=3.0)
    legend = [("soft" if story.trend else "accent", "frame score")]
    if story.trend:
        window = story.trend[0]
        legend.append(("accent", f"{window.length_seconds:g} s window, {window.headline}"))
    legend.append(("dash", f"session, {story.session.headline}"))
    legend += [("sure", interval_label(story))] if np.isfinite(story.interval).any() else []
    legend += [("gap", "no score")] if story.gaps else []
    legend += [("drop", "frames dropped")] if story.drops else []
    legend += [("bad", "corrupt frame")] if len(story.corrupt_seconds) else []
    entries = "".join(f'<li class="{kind}">{escape(text)}</li>' for kind, text in legend)
    return (
        '<figure role="img" aria-label="Score over stream time">'
        f'<div class="wide">{wide}</div><div class="narrow">{narrow}</div>'
        f'<figcaption><ul class="legend">{entries}</ul></figcaption></figure>'
    )


def _distribution_and_pool(story: Story, key: str) -> str:
    weights = story.end_seconds - story.begin_seconds
    chart = histogram_svg(
        story.score,
        100.0 * weights / weights.sum(),
        "% of the time",
        key=f"{key}h",
        width_inches=4.4,
        height_inches=2.9,
    )
    return (
        '<div class="two"><div><h3>Distribution</h3>'
        f'<figure role="img" aria-label="Share of time by score">{chart}</figure></div>'
        f"<div><h3>Pooled</h3>{_pool_table(story)}</div></div>"
    )


def _pool_table(story: Story) -> str:
    windows = [story.session, *story.lowest_windows]
    heads = ["", "session", *(_window_head(w) for w in windows[1:])]
    names = [n for n in _POOL_NAMES if n in story.session.pool]
    names += sorted(set(story.session.pool) - set(names))
    rows = []
    for name in names:
        cells = [
            f"<strong>{score_text(w.pool.get(name))}</strong>"
            if w.headline == name
            else score_text(w.pool.get(name))
            for w in windows
        ]
        rows.append([escape(_POOL_NAMES.get(name, name)), *cells])
    return table(heads, rows, "pool")


def _window_head(window: WindowScore) -> str:
    return (
        f"lowest {window.length_seconds:g} s<small>{clock(window.begin_seconds)} – "
        f"{clock(window.end_seconds)}</small>"
    )


def _pictures(pictures: list[Picture], why_none: str) -> str:
    if not pictures:
        return f'<h3>Worst frames</h3><p class="sub">{escape(why_none)}</p>'
    cards = "".join(card(p) for p in pictures)
    return f'<h3>Worst frames</h3><div class="cards">{cards}</div>'


# Stills ---------------------------------------------------------------------------------------


def _stills_section(stills: list[Story]) -> str:
    ranked = sorted(stills, key=lambda s: s.track.frames[0].score)
    scores = np.array([s.track.frames[0].score for s in ranked])
    chart = histogram_svg(
        scores, np.ones(len(scores)), "pictures", key="s", width_inches=4.4, height_inches=2.9
    )
    rows = [[escape(s.track.name), _still_cell(s.track.frames[0])] for s in ranked]
    cards = []
    for story in ranked[:6]:
        pictures, _ = worst_pictures(story.track)
        cards += [card(p, story.track.name) for p in pictures]
    shown = f'<h3>Lowest</h3><div class="cards">{"".join(cards)}</div>' if cards else ""
    mean, median = float(scores.mean()), float(np.median(scores))
    return (
        f'<section id="stills"><h2>Pictures</h2><p class="sub">{len(ranked)} pictures · mean '
        f'{mean:.1f} · median {median:.1f}</p><div class="two"><div><h3>Distribution</h3>'
        f'<figure role="img" aria-label="Number of pictures by score">{chart}</figure></div>'
        f"<div><h3>Scores</h3>{table(['', 'score'], rows, 'overview tall')}</div></div>"
        f"{shown}</section>"
    )


def _still_cell(row: FrameRow) -> str:
    interval = "" if row.interval is None else "{:.0f} to {:.0f}".format(*row.interval)
    reasons = "" if row.in_domain else f"out of domain: {' '.join(row.out_of_domain)}"
    told = "; ".join(filter(None, (interval, reasons)))
    return meter(row.score) + (f"<small>{escape(told)}</small>" if told else "")


# How it was made ------------------------------------------------------------------------------


def _details(story: Story) -> str:
    track, groups = story.track, []
    if track.meta is not None:
        model = track.meta.model
        engine = model.backend.active + (
            f" ({model.backend.reason})" if model.backend.reason else ""
        )
        groups.append(
            (
                "Model",
                [
                    ("id", f"{model.id} {model.version}"),
                    ("precision", model.precision),
                    ("calibration", model.calibration),
                    ("engine", engine),
                    ("sha256", model.sha256),
                ],
            )
        )
        groups.append(("Versions", [("dgiqa-stream", track.meta.versions.package)]))
        groups.append(("Settings", list(flat(track.meta.settings))))
    if track.frames:
        groups.append(("Pooling", list(flat(dict(story.session.params)))))
    if track.final is not None:
        groups.append(("Counts", [("ended", track.final.reason), *flat(track.final.counts)]))
    states = [
        (s.wall, s.state + (f": {s.error.detail}" if s.error else "")) for s in track.statuses
    ]
    groups += [("States", states)] if states else []
    if not groups:
        return ""
    lists = "".join(
        f"<div><h4>{title}</h4><dl>{definitions(items)}</dl></div>" for title, items in groups
    )
    return f"<details><summary>How this was made</summary><div>{lists}</div></details>"
