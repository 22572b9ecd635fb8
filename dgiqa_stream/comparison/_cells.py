"""The time that two curves have in common, in pieces and in even cells."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from dgiqa_stream.comparison._alignment import score_at
from dgiqa_stream.comparison._values import HEADLINE, Cells, Common
from dgiqa_stream.pooling import POOLERS, Holds

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from dgiqa_stream.comparison._values import ScoreCurve
    from dgiqa_stream.config import PoolingSettings

    Array = NDArray[np.float64]

_MAX_CELLS = 20_000
_TICK_SECONDS = 0.1  # cells are whole multiples: the hysteresis has such cells itself
_INSTANT_SECONDS = 1e-6


def joint(a: ScoreCurve, b: ScoreCurve, offset_seconds: float) -> Common:
    """The time that both have scores for; empty where they do not overlap."""
    knots = np.concatenate([a.begin_seconds, a.end_seconds])
    of_b = np.concatenate([b.begin_seconds, b.end_seconds]) - offset_seconds
    common = _cut(np.sort(np.concatenate([knots, of_b])))
    middle = (common[0] + common[1]) / 2
    x, y = score_at(a, middle), score_at(b, middle + offset_seconds)
    both = np.isfinite(x) & np.isfinite(y)
    return Common(common[0][both], common[1][both], x[both], y[both])


def _cut(knots: Array) -> tuple[Array, Array]:
    """Begin and end between sorted knots; those closer together than an instant are one."""
    kept = knots[np.diff(knots, prepend=-np.inf) > _INSTANT_SECONDS]
    return kept[:-1], kept[1:]


def step_seconds_of(a: ScoreCurve, b: ScoreCurve, common: Common) -> float:
    """As long as the slower sampling, in whole ticks, or longer so that cells do not get many."""
    length = float(common.end_seconds[-1] - common.begin_seconds[0])
    wanted = max(a.period_seconds, b.period_seconds, length / _MAX_CELLS)
    return max(1, math.ceil(wanted / _TICK_SECONDS - 1e-3)) * _TICK_SECONDS


def cells_of(common: Common, *, step_seconds: float, pooling: PoolingSettings | None) -> Cells:
    """Common time, not empty, in cells; without ``pooling`` the headline's shares are 0."""
    first, last = common.begin_seconds[0], common.end_seconds[-1]
    num = max(1, math.ceil((last - first) / step_seconds - 1e-6))
    edges = first + np.arange(1, num) * step_seconds
    begin, end = _cut(np.sort(np.concatenate([common.begin_seconds, common.end_seconds, edges])))
    middle = (begin + end) / 2
    index = np.searchsorted(common.begin_seconds, middle, "right") - 1
    held = middle < common.end_seconds[index]
    begin, end, index = begin[held], end[held], index[held]
    where = np.clip(((begin + end) / 2 - first) // step_seconds, 0, num - 1).astype(np.intp)
    scores = common.a[index], common.b[index]
    weight = np.asarray(np.bincount(where, end - begin, num), np.float64)
    safe = np.where(weight > 0, weight, 1.0)
    means = [np.bincount(where, (end - begin) * s, num) / safe for s in scores]
    shares = [_headline_shares(Holds(begin, end, s), where, num, pooling) for s in scores]
    return Cells(step_seconds, weight, *means, *shares)


def pooled(name: str, common: Common, score: Array, settings: PoolingSettings) -> float:
    """What one of both scores pools to over the common time."""
    pooler = POOLERS[name](settings)
    pooler.add(Holds(common.begin_seconds, common.end_seconds, score))
    value = pooler.value()
    assert value is not None  # there is a hold
    return value


def _headline_shares(
    holds: Holds, where: NDArray[np.intp], num: int, pooling: PoolingSettings | None
) -> Array:
    """By how much each cell lets the integral of the hysteresis grow; the cells sum to it."""
    shares = np.zeros(num)
    if pooling is None:
        return shares
    hysteresis, so_far, elapsed = POOLERS[HEADLINE](pooling), 0.0, 0.0
    for cell, part in _runs(where):
        hysteresis.add(holds[part])
        elapsed += float(holds.weights[part].sum())
        integral = (hysteresis.value() or 0.0) * elapsed
        shares[cell], so_far = integral - so_far, integral
    return shares


def _runs(where: NDArray[np.intp]) -> Iterator[tuple[int, slice]]:
    """Each cell that has pieces, and which."""
    starts = np.flatnonzero(np.diff(where, prepend=-1))
    for first, last in zip(starts.tolist(), [*starts[1:].tolist(), len(where)], strict=True):
        yield int(where[first]), slice(first, last)
