"""The chart of a comparison: both curves over each other, the difference beneath."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from dgiqa_stream.report._charts import PALETTE, _svg, _time_ticks

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from numpy.typing import NDArray

    from dgiqa_stream.comparison import Comparison

    Array = NDArray[np.float64]

_MOST_POINTS = 1500


def comparison_svg(
    found: Comparison, *, key: str, width_inches: float, height_inches: float
) -> str:
    """An inline SVG; ``key`` keeps its ids apart from other charts'."""
    return _svg(lambda axes: _draw(axes, found), key, width_inches, height_inches)


def _draw(axes: Axes, found: Comparison) -> None:
    figure = axes.figure
    axes.remove()  # one above the other, with one time axis
    top, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    _draw_scores(top, found)
    _draw_difference(below, found)
    below.set_xlim(found.begin_seconds, found.end_seconds)
    _time_ticks(below)


def _draw_scores(axes: Axes, found: Comparison) -> None:
    edges, a, b = traces(found)
    for score, color in ((a, "drop"), (b, "accent")):
        axes.stairs(score, edges, baseline=None, color=PALETTE[color], lw=1.2)
    axes.set_ylim(0, 100)
    axes.set_ylabel("score")


def _draw_difference(axes: Axes, found: Comparison) -> None:
    edges, difference = _seconds(found)
    mean = found.differences[1]
    axes.stairs(difference, edges, baseline=0.0, fill=True, color=PALETTE["soft"], lw=0)
    axes.axhspan(mean.low, mean.high, color=PALETTE["sure"], alpha=0.6, lw=0)
    axes.axhline(mean.difference, color=PALETTE["ink"], lw=0.9, ls=(0, (4, 3)))
    axes.axhline(0.0, color=PALETTE["muted"], lw=0.6)
    lowest = min(-1.0, float(np.nanmin(difference)), mean.low)
    highest = max(1.0, float(np.nanmax(difference)), mean.high)
    axes.set_ylim(1.1 * lowest, 1.1 * highest)
    axes.set_ylabel("B less A")
    axes.set_xlabel("stream time of A")


def _seconds(found: Comparison) -> tuple[Array, Array]:
    """Edges (S + 1,) and B less A (S,), NaN in gaps; of many seconds, means of several."""
    begin, difference = found.second_seconds, found.second_difference
    together = -(-len(begin) // _MOST_POINTS)
    starts = np.arange(0, len(begin), together)
    there = np.isfinite(difference)
    num = np.add.reduceat(there.astype(np.float64), starts)
    total = np.add.reduceat(np.where(there, difference, 0.0), starts)
    edges = begin[0] + np.append(starts, len(begin)).astype(np.float64)
    return edges, total / np.where(num > 0, num, np.nan)


def traces(found: Comparison) -> tuple[Array, Array, Array]:
    """Edges (P + 1,) and both scores (P,), NaN in gaps; of many cells, means of several."""
    cells = found.cells
    together = -(-len(cells.weight) // _MOST_POINTS)
    starts = np.arange(0, len(cells.weight), together)
    weight = np.add.reduceat(cells.weight, starts)
    safe = np.where(weight > 0, weight, np.nan)
    a, b = (np.add.reduceat(cells.weight * s, starts) / safe for s in (cells.a, cells.b))
    edges = found.begin_seconds + np.append(starts, len(cells.weight)) * cells.step_seconds
    return edges, a, b
