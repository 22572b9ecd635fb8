"""Whether ratings lie inside the intervals that a model gives, where it is sure and where not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from distill.evaluation.logistic import Array
from distill.evaluation.shares import Share, wilson

NUM_PARTS = 4


@dataclass(frozen=True, slots=True)
class Coverage:
    """Ratings inside their intervals."""

    share_inside: Share
    mean_width_points: float


@dataclass(frozen=True, slots=True)
class IntervalCoverage:
    """Coverage of all pictures, and of each quarter of them by the width of their interval."""

    nominal: float
    """What the manifest promises."""
    all: Coverage
    by_width: list[Coverage]
    """From the narrowest quarter to the widest: an honest model covers alike in each."""


def judge_intervals(
    mos: Sequence[float] | Array,
    intervals: Sequence[tuple[float, float]] | Array,
    *,
    nominal: float = 0.9,
) -> IntervalCoverage:
    """How many MOS (N,) lie within their intervals (N, 2), both on 0..100, ends included.

    Raises ``ValueError`` for fewer than four pictures, other shapes and numbers that are not
    finite.
    """
    rated, ends = np.asarray(mos, np.float64), np.asarray(intervals, np.float64)
    if rated.ndim != 1 or ends.shape != (len(rated), 2) or len(rated) < NUM_PARTS:
        raise ValueError(
            f"coverage needs {NUM_PARTS} MOS or more with an interval each, not shapes "
            f"{rated.shape} and {ends.shape}"
        )
    if not (np.isfinite(rated).all() and np.isfinite(ends).all()):
        raise ValueError("coverage needs finite numbers: there is a NaN or an infinity")
    inside = (ends[:, 0] <= rated) & (rated <= ends[:, 1])
    widths = ends[:, 1] - ends[:, 0]
    parts = np.array_split(np.argsort(widths, kind="stable"), NUM_PARTS)
    return IntervalCoverage(
        nominal=nominal,
        all=_coverage(inside, widths),
        by_width=[_coverage(inside[part], widths[part]) for part in parts],
    )


def _coverage(inside: NDArray[np.bool_], widths: Array) -> Coverage:
    return Coverage(wilson(int(inside.sum()), len(inside)), float(widths.mean()))
