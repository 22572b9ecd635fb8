"""A score of a session in the style of ITU-T P.1203.3."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from dgiqa_stream.pooling._holds import total

if TYPE_CHECKING:
    from dgiqa_stream.pooling._holds import Array, Holds

# Coefficients of the Recommendation, by its names.
_T1, _T2, _T3 = 0.00666620027943848, 0.0000404018840273729, 0.156497800436237
_T4, _T5 = 0.143179744942738, 0.0238641564518876
_C1, _C2, _C23 = 1.87403625, 7.85416481, 0.01853820


class SessionInSeconds:
    """The last ``length`` seconds, one mean score each, and P.1203.3's integration of them.

    A second is counted from the first hold; what of it has no score does not count. O(length)
    memory.
    """

    def __init__(self, length: int) -> None:
        self._length = length
        self._begin: float | None = None
        self._first = 0  # which second the arrays begin with
        self._end = 0.0  # in seconds since the begin
        self._mass, self._weight = np.zeros(0), np.zeros(0)

    def forget(self) -> None:
        """A jump of the clock does not begin a session."""

    def add(self, holds: Holds) -> None:
        """Take the next holds."""
        if self._begin is None:
            self._begin = float(holds.begin_seconds[0])
        begin, end = holds.begin_seconds - self._begin, holds.end_seconds - self._begin
        self._end = float(end[-1])
        last = max(self._first + len(self._weight), math.ceil(self._end - 1e-9))
        first = max(int(begin[0] + 1e-9), last - self._length)
        edges = np.arange(first, last + 1, dtype=np.float64)
        edges[-1] = np.inf  # what rounding puts beyond the last second is of that second
        mass, weight = _of_seconds(begin, end, holds, edges)
        self._make_room(last)
        self._mass[first - self._first :] += mass
        self._weight[first - self._first :] += weight

    def _make_room(self, last: int) -> None:
        """Extend the arrays to so many seconds since the begin, and drop those that are too old."""
        first = max(self._first, last - self._length)
        more = np.zeros(last - max(first, self._first + len(self._weight)))
        dropped = first - self._first
        self._mass = np.concatenate([self._mass[dropped:], more])
        self._weight = np.concatenate([self._weight[dropped:], more])
        self._first = first

    def value(self) -> float | None:
        """ITU-T P.1203.3, clause 8, as far as it is about quality over time::

            base = sum of w1 w2 O / sum of w1 w2,  w1 = t1 + t2 exp((t / T) / t3),  w2 = t4 - t5 O
            bias = c23 max(0, -P10[(O - base) w]),  w = c1 + (1 - c1) 0.5^((T - 1 - t) / c2)

        with t = 0 .. T - 1 as in the authors' software and O(t) = 1 + 4 q / 100, q the mean score
        of second t. The value is base - bias, back on 0..100. For whole seconds these two terms are
        exact. Ours are: the scale of O (the Recommendation's O.34 joins audio and its own video
        model), that a second counts for what it holds (in P10 as in the sums), and that of a longer
        session only the end counts. Left out: stalling, the compensations for oscillation and
        adaptation, which a score that moves with content would set off, and the random forest.
        """
        t = self._weight.nonzero()[0]
        if not len(t):
            return None
        weight, mass = self._weight, self._mass
        if len(t) < len(weight):
            weight, mass = weight[t], mass[t]
        score = 1.0 + 0.04 * mass / weight
        seconds = self._end - self._first
        w1 = _T1 + _T2 * np.exp(t / seconds / _T3)
        w = w1 * (_T4 - _T5 * score) * weight
        base = float(w @ score / total(w))
        fading = _C1 + (1.0 - _C1) * np.exp2(np.minimum(t + 1.0 - seconds, 0.0) / _C2)
        tenth = _percentile((score - base) * fading, weight, 0.1)
        return 25.0 * (base - _C23 * max(0.0, -tenth) - 1.0)


def _of_seconds(begin: Array, end: Array, holds: Holds, edges: Array) -> tuple[Array, Array]:
    """Score-time and time between each two edges, (len(edges) - 1,)."""
    knots = np.concatenate([begin, end])
    knots[0::2], knots[1::2] = begin, end
    so_far = []
    for amounts in (holds.weights * holds.score, holds.weights):
        until = np.zeros(len(knots))
        until[1::2] = amounts.cumsum()
        until[2::2] = until[1:-1:2]
        at_edges = np.interp(edges, knots, until)
        so_far.append(at_edges[1:] - at_edges[:-1])
    return so_far[0], so_far[1]


def _percentile(values: Array, weights: Array, share: float) -> float:
    """Linear between the middles of the sorted values' weights; the usual one for equal weights."""
    order = np.argsort(values)
    ascending, sorted_weights = values[order], weights[order]
    middle = sorted_weights.cumsum() - 0.5 * sorted_weights
    return float(np.interp(middle[0] + share * (middle[-1] - middle[0]), middle, ascending))
