"""Poolers whose result does not depend on the order of the holds. ``w`` is a hold's length."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from dgiqa_stream.pooling._holds import Array, Holds

_EXACT_HOLDS = 8192  # 60 s at 60 fps is 3600
_NUM_BINS = 4096  # beyond that many holds, scores are known to 100/4096


class _OrderFree:
    """Base: a jump of the clock means nothing."""

    def forget(self) -> None:
        """Nothing to forget."""


class Mean(_OrderFree):
    """Sum of w q over sum of w."""

    def __init__(self) -> None:
        self._sum, self._weight = 0.0, 0.0

    def add(self, holds: Holds) -> None:
        """Take the next holds."""
        self._sum += float(holds.weights @ holds.score)
        self._weight += float(holds.weights.sum())

    def value(self) -> float | None:
        """The mean so far."""
        return self._sum / self._weight if self._weight else None


class HarmonicMean(_OrderFree):
    """Sum of w over sum of w/(q + 1), less 1, on the 0-100 scale.

    The ``harmonic_mean`` of libvmaf (Netflix/vmaf), with each frame weighted by its time. The added
    1 keeps a score of 0 finite.
    """

    def __init__(self) -> None:
        self._sum, self._weight = 0.0, 0.0

    def add(self, holds: Holds) -> None:
        """Take the next holds."""
        self._sum += float((holds.weights / (holds.score + 1.0)).sum())
        self._weight += float(holds.weights.sum())

    def value(self) -> float | None:
        """The harmonic mean so far."""
        return self._weight / self._sum - 1.0 if self._weight else None


class Minimum(_OrderFree):
    """The lowest score, however short."""

    def __init__(self) -> None:
        self._lowest = math.inf

    def add(self, holds: Holds) -> None:
        """Take the next holds."""
        self._lowest = min(self._lowest, float(holds.score.min()))

    def value(self) -> float | None:
        """The lowest score so far."""
        return self._lowest if math.isfinite(self._lowest) else None


class Maximum(_OrderFree):
    """The highest score, however short."""

    def __init__(self) -> None:
        self._highest = -math.inf

    def add(self, holds: Holds) -> None:
        """Take the next holds."""
        self._highest = max(self._highest, float(holds.score.max()))

    def value(self) -> float | None:
        """The highest score so far."""
        return self._highest if math.isfinite(self._highest) else None


class Stdev(_OrderFree):
    """Root of the weighted mean squared distance from the weighted mean (no small-sample factor).

    Stretches are joined as in Chan, Golub and LeVeque, *Algorithms for computing the sample
    variance*, The American Statistician 37(3), 1983: no two large sums of squares are subtracted.
    """

    def __init__(self) -> None:
        self._weight, self._mean, self._squares = 0.0, 0.0, 0.0

    def add(self, holds: Holds) -> None:
        """Take the next holds."""
        weight = float(holds.weights.sum())
        mean = float(holds.weights @ holds.score) / weight
        squares = float(holds.weights @ (holds.score - mean) ** 2)
        joined, away = self._weight + weight, mean - self._mean
        self._squares += squares + away * away * self._weight * weight / joined
        self._mean += away * weight / joined
        self._weight = joined

    def value(self) -> float | None:
        """The standard deviation so far."""
        return math.sqrt(self._squares / self._weight) if self._weight else None


class _Distribution(_OrderFree):
    """How long each score was held: exact for 8192 holds, then in 4096 bins of 0..100.

    A bin stands at the mean of its scores, so that a constant stays exact.
    """

    def __init__(self) -> None:
        self._scores: list[Array] = []
        self._weights: list[Array] = []
        self._num_holds = 0

    def add(self, holds: Holds) -> None:
        """Take the next holds."""
        self._scores.append(holds.score)
        self._weights.append(holds.weights)
        self._num_holds += len(holds)
        if self._num_holds > _EXACT_HOLDS:
            self._put_in_bins()

    def _put_in_bins(self) -> None:
        scores, weights = np.concatenate(self._scores), np.concatenate(self._weights)
        bins = np.clip((scores * (_NUM_BINS / 100.0)).astype(np.intp), 0, _NUM_BINS - 1)
        total = np.asarray(np.bincount(bins, weights, _NUM_BINS), np.float64)
        used = total > 0
        means = np.bincount(bins, weights * scores, _NUM_BINS)[used] / total[used]
        self._scores, self._weights = [means], [total[used]]
        self._num_holds = len(means)

    def _ascending(self) -> tuple[Array, Array]:
        """Scores from the lowest, and how long each was held."""
        scores, weights = np.concatenate(self._scores), np.concatenate(self._weights)
        order = np.argsort(scores, kind="stable")
        return scores[order], weights[order]


class Percentile(_Distribution):
    """The lowest score q such that scores of q or less make up at least ``share`` of the time.

    Exact for 8192 holds; beyond that within 100/4096 of a score.
    """

    def __init__(self, share: float) -> None:
        super().__init__()
        self._share = share

    def value(self) -> float | None:
        """The percentile so far."""
        if not self._num_holds:
            return None
        scores, weights = self._ascending()
        until = np.cumsum(weights)
        wanted = self._share * until[-1] * (1.0 - 1e-9)  # sums are not exact: 0.1 + 0.2 > 0.3
        return float(scores[np.searchsorted(until, wanted)])


class LowMean(_Distribution):
    """Mean of the worst ``share`` of the time; a hold on its edge counts in part.

    Exact for 8192 holds; beyond that within 100/4096.
    """

    def __init__(self, share: float) -> None:
        super().__init__()
        self._share = share

    def value(self) -> float | None:
        """The mean of the worst so far."""
        if not self._num_holds:
            return None
        scores, weights = self._ascending()
        until = np.cumsum(weights)
        taken = np.clip(self._share * until[-1] - (until - weights), 0.0, weights)
        return float(taken @ scores / taken.sum())
