"""Two score curves of the same content: aligned, subtracted, and how sure the difference is.

Numbers alone; reading, scoring and showing are others' work.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from dgiqa_stream.comparison._alignment import align
from dgiqa_stream.comparison._bootstrap import block_cells, deviations
from dgiqa_stream.comparison._cells import cells_of, joint, pooled, step_seconds_of
from dgiqa_stream.comparison._told import (
    CAVEAT,
    NAMES,
    clock_text,
    document_of,
    interval_facts,
    overlap_text,
)
from dgiqa_stream.comparison._values import (
    HEADLINE,
    LOW5,
    MEAN,
    Alignment,
    Cells,
    Comparison,
    Difference,
    ScoreCurve,
    Stretch,
    curve_of,
    verdict_of,
)
from dgiqa_stream.config import PoolingSettings
from dgiqa_stream.errors import ConfigError, SourceError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[np.float64]

__all__ = [
    "CAVEAT",
    "NAMES",
    "Alignment",
    "Cells",
    "Comparison",
    "Difference",
    "ScoreCurve",
    "Stretch",
    "align",
    "clock_text",
    "compare_curves",
    "curve_of",
    "document_of",
    "interval_facts",
    "overlap_text",
    "verdict_of",
]

_MAX_PERIOD_RATIO = 2.0  # beyond, the worst 5 % of both are not the same kind of thing
_MIN_CELLS = 20
_MIN_LOSS_POINTS = 1.0
_MAX_STRETCHES = 5


def compare_curves(
    a: ScoreCurve,
    b: ScoreCurve,
    *,
    offset_seconds: float | None = None,
    num_resamples: int = 2000,
    seed: int = 0,
    pooling: PoolingSettings | None = None,
) -> Comparison:
    """Compare B with A; the same seed gives the same intervals.

    ``offset_seconds`` is B's time less A's for the same picture; None finds it. Raises
    :class:`ConfigError` where they are not sampled alike and :class:`SourceError` where they do not
    overlap, or by less than 20 cells.
    """
    _refuse_other_sampling(a, b)
    settings = pooling or PoolingSettings()
    alignment = align(a, b, offset_seconds=offset_seconds)
    offset = alignment.offset_seconds
    common = joint(a, b, offset)
    if not len(common.begin_seconds):
        raise SourceError(
            f"{a.name} and {b.name} do not overlap at offset {offset:g} s: A has {_span(a)}, B "
            f"{_span(b)}; give another --offset, B's time less A's"
        )
    cells = cells_of(common, step_seconds=step_seconds_of(a, b, common), pooling=settings)
    _refuse_short(a, b, int(np.count_nonzero(cells.weight)), cells.step_seconds)
    block = block_cells(cells)
    spread = deviations(cells, block_cells=block, num_resamples=num_resamples, seed=seed)
    differences = []
    for name, (low, high) in zip((HEADLINE, MEAN, LOW5), spread, strict=True):
        of_a, of_b = (pooled(name, common, score, settings) for score in (common.a, common.b))
        change = of_b - of_a
        differences.append(Difference(name, of_a, of_b, change, change + low, change + high))
    seconds = cells_of(common, step_seconds=1.0, pooling=None)
    at = common.begin_seconds[0] + np.arange(len(seconds.weight), dtype=np.float64)
    by_second = np.where(seconds.weight > 0, seconds.b - seconds.a, np.nan)
    return Comparison(
        a=a,
        b=b,
        alignment=alignment,
        begin_seconds=float(common.begin_seconds[0]),
        end_seconds=float(common.end_seconds[-1]),
        overlap_seconds=float((common.end_seconds - common.begin_seconds).sum()),
        differences=tuple(differences),
        second_seconds=at,
        second_difference=by_second,
        stretches=worst_stretches(at, by_second, end_seconds=float(common.end_seconds[-1])),
        cells=cells,
        block_seconds=block * cells.step_seconds,
        num_blocks=math.ceil(len(cells.weight) / block),
        num_resamples=num_resamples,
        seed=seed,
    )


def worst_stretches(
    begin_seconds: Array, difference: Array, *, end_seconds: float
) -> tuple[Stretch, ...]:
    """At most five runs of seconds that lose more than 1 point each; most point-seconds first."""
    losing = np.concatenate([[False], difference < -_MIN_LOSS_POINTS, [False]])  # NaN loses nothing
    starts, stops = (np.flatnonzero(np.diff(losing.astype(np.int8)) == turn) for turn in (1, -1))
    found = [
        Stretch(
            begin_seconds=float(begin_seconds[first]),
            end_seconds=min(float(begin_seconds[last - 1]) + 1.0, end_seconds),
            difference=float(difference[first:last].mean()),
            lowest=float(difference[first:last].min()),
        )
        for first, last in zip(starts.tolist(), stops.tolist(), strict=True)
    ]
    found.sort(key=lambda s: s.difference * (s.end_seconds - s.begin_seconds))
    return tuple(found[:_MAX_STRETCHES])


def _refuse_other_sampling(a: ScoreCurve, b: ScoreCurve) -> None:
    fast, slow = sorted((a, b), key=lambda curve: curve.period_seconds)
    if slow.period_seconds > _MAX_PERIOD_RATIO * fast.period_seconds * (1 + 1e-9):
        raise ConfigError(
            f"{fast.name} has a score every {fast.period_seconds:.3g} s and {slow.name} every "
            f"{slow.period_seconds:.3g} s, more than {_MAX_PERIOD_RATIO:g} times apart: score both "
            "alike, as with --fps"
        )


def _refuse_short(a: ScoreCurve, b: ScoreCurve, num_cells: int, step: float) -> None:
    if num_cells < _MIN_CELLS:
        raise SourceError(
            f"{a.name} and {b.name} have {num_cells} cells of {step:g} s in common, of which an "
            f"interval needs {_MIN_CELLS}: compare longer clips, score more frames, or check "
            "--offset"
        )


def _span(curve: ScoreCurve) -> str:
    return f"{curve.begin_seconds[0]:.1f} to {curve.end_seconds[-1]:.1f} s"
