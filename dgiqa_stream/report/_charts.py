"""The charts, drawn by matplotlib as SVG for the page and as PNG."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from dgiqa_stream.errors import SinkError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

    from dgiqa_stream.report._story import Array, Story

PALETTE: Mapping[str, str] = MappingProxyType(
    {  # CSS variable of the page: its colour in daylight, which is also the PNG's
        "ink": "#1b2430",
        "muted": "#5c6876",
        "line": "#dde2e8",
        "accent": "#1f6feb",
        "soft": "#8fb8f5",
        "sure": "#a9c6a4",
        "gap": "#c9ced6",
        "drop": "#e8a33d",
        "bad": "#c93c37",
        "paper": "#fffffe",
    }
)
_MOST_POINTS = 1500  # beyond that, a line is drawn as the mean and range of that many stretches
_BIN_WIDTH = 5.0
_TICK_SECONDS = (
    *(0.1, 0.2, 0.5, 1, 2, 5, 10, 15, 30),
    *(60 * minutes for minutes in (1, 2, 5, 10, 15, 30)),
    *(3600 * hours for hours in (1, 2, 3, 6, 12, 24, 48)),
)
_STYLE = MappingProxyType(
    {
        "svg.fonttype": "none",
        "font.size": 8.5,
        "axes.edgecolor": PALETTE["muted"],
        "axes.labelcolor": PALETTE["muted"],
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.grid.axis": "y",
        "axes.axisbelow": True,
        "axes.linewidth": 0.6,
        "grid.color": PALETTE["line"],
        "grid.linewidth": 0.6,
        "text.color": PALETTE["ink"],
        "text.parse_math": False,
        "xtick.color": PALETTE["muted"],
        "ytick.color": PALETTE["muted"],
    }
)


def require_matplotlib() -> None:
    """Raise :class:`SinkError` saying what to install where matplotlib is missing."""
    try:
        import matplotlib as mpl
    except ImportError as exc:
        raise SinkError(
            "the report needs 'matplotlib': pip install 'dgiqa-stream[report]'"
        ) from exc
    del mpl


def curve_svg(story: Story, *, key: str, width_inches: float, height_inches: float) -> str:
    """Score over time, with gaps and drops; ``key`` keeps its ids apart from other charts'."""
    return _svg(lambda axes: draw_curve(axes, story), key, width_inches, height_inches)


def histogram_svg(
    scores: Array, weights: Array, unit: str, *, key: str, width_inches: float, height_inches: float
) -> str:
    """How much of the time, or how many pictures, got which score."""
    return _svg(
        lambda axes: _draw_histogram(axes, scores, weights, unit), key, width_inches, height_inches
    )


def save_png(stories: list[Story], out: Path) -> None:
    """The curves below each other, 1650 pixels wide."""
    with _styled():
        figure = _new_figure(11.0, 3.2 * len(stories))
        all_axes = figure.subplots(len(stories), 1, squeeze=False)[:, 0]
        for axes, story in zip(all_axes, stories, strict=True):
            draw_curve(axes, story)
            axes.set_title(_title(story), loc="left", fontsize=10, color=PALETTE["ink"])
            _legend(axes)
        figure.savefig(out, format="png", dpi=150, facecolor="white")


def draw_curve(axes: Axes, story: Story) -> None:
    """Frames as steps or as a band, the trend, the session's score, gaps and drops."""
    for begin, end in story.gaps:
        axes.axvspan(begin, end, color=PALETTE["gap"], alpha=0.45, lw=0, label="no score")
    for begin, end in story.drops:
        axes.axvspan(begin, end, color=PALETTE["drop"], alpha=0.35, lw=0, label="frames dropped")
    _draw_intervals(axes, story)
    if len(story.score) > _MOST_POINTS:
        _draw_band(axes, story)
    else:
        x, y = _steps(story, story.score)
        is_alone = not story.trend
        color = PALETTE["accent"] if is_alone else PALETTE["soft"]
        axes.plot(x, y, color=color, lw=1.3 if is_alone else 0.9, label="frame score")
    _draw_trend(axes, story)
    if story.session.score is not None:
        label = f"session, {story.session.headline}"
        axes.axhline(story.session.score, color=PALETTE["ink"], lw=0.9, ls=(0, (4, 3)), label=label)
    if len(story.corrupt_seconds):
        low = np.full(len(story.corrupt_seconds), 1.5)
        axes.plot(
            story.corrupt_seconds, low, "|", color=PALETTE["bad"], ms=6, label="corrupt frame"
        )
    axes.set_ylim(0, 100)
    axes.set_ylabel("score")
    axes.set_xlabel("stream time")
    if len(story.score):
        axes.set_xlim(story.begin_seconds[0], story.end_seconds[-1])
    _time_ticks(axes)


def _time_ticks(axes: Axes) -> None:
    """Ticks on round times, as many as have room."""
    first, last = axes.get_xlim()
    most = max(2.0, axes.get_window_extent().width / 90.0)
    step = next((s for s in _TICK_SECONDS if (last - first) / s <= most), (last - first) / most)
    axes.set_xticks(np.arange(math.ceil(first / step), math.floor(last / step) + 1) * step)
    axes.set_xlim(first, last)
    axes.xaxis.set_major_formatter(lambda value, _: clock(value))


def clock(seconds: float) -> str:
    """``1:02:03``, ``2:03`` or, with a part of a second, ``2:03.5``."""
    tenths = round(abs(seconds) * 10)
    whole, part = divmod(tenths, 10)
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    shown = f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
    return ("-" if seconds < 0 else "") + shown + (f".{part}" if part else "")


def _draw_trend(axes: Axes, story: Story) -> None:
    trend = story.trend
    if len(trend) < 2:
        return
    x = np.array([w.end_seconds for w in trend])
    y = np.array([np.nan if w.score is None else w.score for w in trend])
    for begin, end in story.gaps:  # windows go on there while they hold enough of what was before
        y[(x > begin) & (x <= end)] = np.nan
    breaks = np.flatnonzero(np.diff(x) > 1.5 * trend[0].hop_seconds) + 1
    label = f"{trend[0].length_seconds:g} s window, {trend[0].headline}"
    axes.plot(
        np.insert(x, breaks, np.nan),
        np.insert(y, breaks, np.nan),
        color=PALETTE["accent"],
        lw=1.6,
        label=label,
    )


def _stretches(story: Story) -> tuple[Array, NDArray[np.intp], NDArray[np.bool_], NDArray[np.intp]]:
    """As many even stretches of time as are drawn: their middles, the first frame of each that has
    any, which have any, and how many frames each has.
    """
    edges = np.linspace(story.begin_seconds[0], story.end_seconds[-1], _MOST_POINTS + 1)
    starts = np.searchsorted(story.begin_seconds, edges[:-1])
    counts = np.diff(np.append(starts, len(story.score)))
    filled = counts > 0
    return (edges[:-1] + edges[1:]) / 2, starts[filled], filled, counts


def _draw_band(axes: Axes, story: Story) -> None:
    middle, at, filled, counts = _stretches(story)
    low, high, mean = (np.full(_MOST_POINTS, np.nan) for _ in range(3))
    low[filled] = np.minimum.reduceat(story.score, at)
    high[filled] = np.maximum.reduceat(story.score, at)
    mean[filled] = np.add.reduceat(story.score, at) / counts[filled]
    axes.fill_between(
        middle, low, high, color=PALETTE["soft"], alpha=0.6, lw=0, label="frame scores, range"
    )
    if not story.trend:
        axes.plot(middle, mean, color=PALETTE["accent"], lw=1.2, label="frame scores, mean")


def _draw_intervals(axes: Axes, story: Story) -> None:
    """Where mean opinions are likely to lie; of many frames, the mean of each stretch's bounds."""
    if not np.isfinite(story.interval).any():
        return
    label = interval_label(story)
    if len(story.score) <= _MOST_POINTS:
        x, low = _steps(story, story.interval[0])
        high = _steps(story, story.interval[1])[1]
    else:
        x, at, filled, counts = _stretches(story)
        low, high = (np.full(_MOST_POINTS, np.nan) for _ in range(2))
        low[filled], high[filled] = (
            np.add.reduceat(bound, at) / counts[filled] for bound in story.interval
        )
    axes.fill_between(x, low, high, color=PALETTE["sure"], alpha=0.35, lw=0, label=label)


def interval_label(story: Story) -> str:
    """Such as ``90 % interval``."""
    coverage = story.interval_coverage
    return "interval" if coverage is None else f"{100 * coverage:g} % interval"


def _steps(story: Story, values: Array) -> tuple[Array, Array]:
    """Each value from its begin to its end, and a break where the next does not follow."""
    x = np.stack([story.begin_seconds, story.end_seconds, story.end_seconds], axis=1)
    y = np.repeat(values[:, None], 3, axis=1)
    follows = np.append(story.begin_seconds[1:] - story.end_seconds[:-1] < 1e-6, True)
    y[~follows[: len(y)], 2] = np.nan
    return x.ravel(), y.ravel()


def _draw_histogram(axes: Axes, scores: Array, weights: Array, unit: str) -> None:
    edges = np.arange(0.0, 100.0 + _BIN_WIDTH, _BIN_WIDTH)
    shown, _ = np.histogram(np.minimum(scores, 100.0 - 1e-9), edges, weights=weights)
    axes.bar(edges[:-1], shown, width=_BIN_WIDTH * 0.9, align="edge", color=PALETTE["accent"], lw=0)
    axes.set_xlim(0, 100)
    axes.set_xlabel("score")
    axes.set_ylabel(unit)


def _title(story: Story) -> str:
    score = story.session.score
    return f"{story.track.name}   " + ("no score" if score is None else f"{score:.1f} / 100")


def _legend(axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    once = dict(zip(labels, handles, strict=True))
    axes.legend(
        once.values(),
        once.keys(),
        loc="lower right",
        bbox_to_anchor=(1.0, 1.0),
        ncols=len(once),
        frameon=False,
        fontsize=8,
        borderaxespad=0.2,
    )


def _svg(draw: Callable[[Axes], None], key: str, width: float, height: float) -> str:
    """The chart as an inline SVG whose colours are the page's variables."""
    with _styled():
        figure = _new_figure(width, height)
        draw(figure.subplots())
        out = io.StringIO()
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    for name, color in PALETTE.items():
        text = text.replace(color, f"var(--{name})")
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{key}-", text)
    opening, rest = text.split(">", 1)
    return re.sub(r'\s(width|height)="[^"]*"', "", opening) + ">" + rest


def _new_figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _styled() -> Any:
    """matplotlib with this file's style, whatever the user's own settings are."""
    import matplotlib as mpl

    defaults: Any = mpl.rcParamsDefault
    settings: Any = {**defaults, **_STYLE}
    del settings["backend"]  # figures are made without pyplot: the caller's backend stays
    return mpl.rc_context(settings)
