"""Summaries that do not ask when a score came. ``w`` is a hold's length, ``q`` its score."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from dgiqa_stream.pooling._holds import total

if TYPE_CHECKING:
    from dgiqa_stream.pooling._holds import Array, Holds

_EXACT_HOLDS = 8192  # 60 s at 60 fps is 3600
_TIE = 1e-9  # closer than that, rounding would choose between two cuts
_NUM_BINS = 4096  # beyond that many holds, scores are known to 100/4096


class Moments:
    """Sums and extremes; O(1) memory and exact.

    Squares are joined as in Chan, Golub and LeVeque, *Algorithms for computing the sample
    variance*, The American Statistician 37(3), 1983: no two large sums of squares are subtracted.
    """

    def __init__(self, minkowski_p: float) -> None:
        self._p = minkowski_p
        self._weight, self._sum, self._inverse, self._impairment = 0.0, 0.0, 0.0, 0.0
        self._mean, self._squares = 0.0, 0.0
        self._lowest, self._highest = math.inf, -math.inf

    def forget(self) -> None:
        """A jump of the clock means nothing."""

    def add(self, holds: Holds) -> None:
        """Take the next holds."""
        q, w = holds.score, holds.weights
        weight, mass = float(total(w)), float(w @ q)
        mean = mass / weight
        squares = float(w @ (q - mean) ** 2)
        joined, away = self._weight + weight, mean - self._mean
        self._squares += squares + away * away * self._weight * weight / joined
        self._mean += away * weight / joined
        self._weight, self._sum = joined, self._sum + mass
        self._inverse += float(total(w / (q + 1.0)))
        self._impairment += float(w @ (1.0 - 0.01 * q) ** self._p)
        self._lowest = min(self._lowest, float(np.minimum.reduce(q)))
        self._highest = max(self._highest, float(np.maximum.reduce(q)))

    def mean(self) -> float | None:
        """Sum of w q over sum of w."""
        return self._sum / self._weight if self._weight else None

    def stdev(self) -> float | None:
        """Root of the weighted mean squared distance from the mean (no small-sample factor)."""
        return math.sqrt(self._squares / self._weight) if self._weight else None

    def lowest(self) -> float | None:
        """The lowest score, however short."""
        return self._lowest if self._weight else None

    def highest(self) -> float | None:
        """The highest score, however short."""
        return self._highest if self._weight else None

    def harmonic_mean(self) -> float | None:
        """Sum of w over sum of w/(q + 1), less 1, on the 0-100 scale.

        The ``harmonic_mean`` of libvmaf (Netflix/vmaf), with each frame weighted by its time. The
        added 1 keeps a score of 0 finite.
        """
        return self._weight / self._inverse - 1.0 if self._weight else None

    def minkowski(self) -> float | None:
        """100 - (mean of (100 - q)^p)^(1/p): of the impairment, so that the worst counts more.

        Minkowski's mean as Rimac-Drlje, Vranješ and Žagar use it over time (*Influence of temporal
        pooling method on the objective video quality evaluation*, BMSB 2009). Of the score itself
        it would reward peaks.
        """
        if not self._weight:
            return None
        mean: float = (self._impairment / self._weight) ** (1.0 / self._p)
        return 100.0 - 100.0 * mean


@dataclass(frozen=True, slots=True, eq=False)
class _Ascending:
    """Scores from the lowest, (N,), with the time and the score-time up to and with each."""

    scores: Array
    weights: Array
    until: Array
    mass: Array


class Distribution:
    """How long each score was held: exact for 8192 holds, then in 4096 bins of 0..100.

    A bin stands at the mean of its scores, so that a constant and a mean stay exact; a score is
    known within 100/4096 then.
    """

    def __init__(self) -> None:
        self._scores: list[Array] = []
        self._weights: list[Array] = []
        self._num_holds = 0
        self._sorted: _Ascending | None = None

    def forget(self) -> None:
        """A jump of the clock means nothing."""

    def add(self, holds: Holds) -> None:
        """Take the next holds."""
        self._scores.append(holds.score)
        self._weights.append(holds.weights)
        self._num_holds += len(holds)
        self._sorted = None
        if self._num_holds > _EXACT_HOLDS:
            self._put_in_bins()

    def _put_in_bins(self) -> None:
        scores, weights = np.concatenate(self._scores), np.concatenate(self._weights)
        bins = np.clip((scores * (_NUM_BINS / 100.0)).astype(np.intp), 0, _NUM_BINS - 1)
        held = np.asarray(np.bincount(bins, weights, _NUM_BINS), np.float64)
        used = held > 0
        means = np.bincount(bins, weights * scores, _NUM_BINS)[used] / held[used]
        self._scores, self._weights = [means], [held[used]]
        self._num_holds = len(means)

    def _ascending(self) -> _Ascending | None:
        if self._sorted is None and self._num_holds:
            scores, weights = self._scores[0], self._weights[0]
            if len(self._scores) > 1:
                scores, weights = np.concatenate(self._scores), np.concatenate(self._weights)
                self._scores, self._weights = [scores], [weights]
            order = np.argsort(scores)
            scores, weights = scores[order], weights[order]
            self._sorted = _Ascending(
                scores, weights, weights.cumsum(), (weights * scores).cumsum()
            )
        return self._sorted

    def percentile(self, share: float) -> float | None:
        """The lowest score q such that scores of q or less make up at least ``share`` of time."""
        if (known := self._ascending()) is None:
            return None
        wanted = share * float(known.until[-1]) * (1.0 - 1e-9)  # 0.1 + 0.2 > 0.3
        return float(known.scores[known.until.searchsorted(wanted)])

    def low_mean(self, share: float) -> float | None:
        """Mean of the worst ``share`` of the time; a hold on its edge counts in part."""
        if (known := self._ascending()) is None:
            return None
        wanted = share * float(known.until[-1])
        edge = min(int(known.until.searchsorted(wanted)), len(known.scores) - 1)
        before, mass = (0.0, 0.0) if not edge else (known.until[edge - 1], known.mass[edge - 1])
        return float((mass + (wanted - before) * known.scores[edge]) / wanted)

    def vqpool(self, exponent: float) -> float | None:
        """Mean of the two groups of scores, the higher one weighted down the further away it is.

        After Park, Seshadrinathan, Lee and Bovik, *Video quality pooling adaptive to perceptual
        distortion severity*, IEEE Transactions on Image Processing 22(2), 2013, over time::

            Q = (sum over L of w q + v * sum over H of w q) / (w of L + v * w of H)
            v = (1 - mean of L / mean of H)^2

        L and H are the two clusters of k-means; here its optimum, which in one dimension is the cut
        of the sorted scores that leaves most of the variance between the groups (of several, the
        lowest), not the result of a search. ``exponent`` stands for the paper's 2.
        """
        if (known := self._ascending()) is None:
            return None
        if len(known.scores) == 1:
            return float(known.scores[0])
        time, mass = known.until[-1], known.mass[-1]
        low = known.until[:-1]
        away = (known.weights * (known.scores - mass / time)).cumsum()[:-1]  # from the mean
        between = away * away / (low * (time - low))
        cut = int((between >= between.max() * (1.0 - _TIE)).argmax())
        low_time, low_mass = float(low[cut]), float(known.mass[cut])
        high_time, high_mass = float(time - low[cut]), float(mass - known.mass[cut])
        if high_mass <= 0.0:
            return 0.0
        ratio = (low_mass / low_time) / (high_mass / high_time)
        v: float = max(0.0, 1.0 - ratio) ** exponent
        return (low_mass + v * high_mass) / (low_time + v * high_time)
