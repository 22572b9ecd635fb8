"""How far a difference may be off by chance: blocks of time drawn again, and how long they are."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from dgiqa_stream.comparison._values import Cells

    Array = NDArray[np.float64]

LOW_SHARE = 0.05
_CONFIDENCE = 0.95
_Z = 1.959964  # of the normal distribution, two-sided 95 %
_AT_ONCE = 1_000_000  # numbers, of the resamples


def block_cells(cells: Cells) -> int:
    """Cells per block: twice the longest that headline, mean or worst 5 % ask for, at most K/5.

    Each is linearised, as a series whose mean moves as the pooled value does; see
    :func:`block_length`. Twice, because that length is best for the variance, while intervals of
    short and strongly dependent series are too narrow with it: they hold the truth less often.
    """
    w = np.where(cells.weight > 0, cells.weight / cells.step_seconds, 0.0)
    headline = (cells.headline_b - cells.headline_a) / cells.step_seconds
    mean = w * (cells.b - cells.a)
    low = w * (_low_influence(cells.b, cells.weight) - _low_influence(cells.a, cells.weight))
    centred = (x - w * (x.sum() / w.sum()) for x in (headline, mean, low))
    longest = max(block_length(x) for x in centred)
    return max(1, min(2 * longest, len(w) // 5))


def block_length(series: Array) -> int:
    """The block length that makes the bootstrap's variance of the mean least wrong, 1..N/3.

    Politis and White, *Automatic block-length selection for the dependent bootstrap*, Econometric
    Reviews 23(1), 2004, section 3, for circular blocks, with the correction of Patton, Politis and
    White, 28(4), 2009: (2 G^2 / D)^(1/3) N^(1/3), where G = sum of |k| R(k), D = 4/3 (sum of
    R(k))^2 and R is the autocovariance, tapered flat-top. Also at most 3 sqrt(N), as there.
    """
    num = len(series)
    x = series - series.mean()
    variance = float(x @ x) / num
    if variance <= 1e-18:
        return 1
    run = max(5, math.ceil(math.sqrt(math.log10(num))))
    most = min(num - 1, math.ceil(math.sqrt(num)) + run)
    covariance = np.array([float(x[: num - k] @ x[k:]) / num for k in range(most + 1)])
    small = np.abs(covariance[1:] / variance) < 2.0 * math.sqrt(math.log10(num) / num)
    last = next((m for m in range(most - run + 1) if bool(small[m : m + run].all())), most)
    reach = min(most, 2 * max(1, last))
    k = np.arange(1, reach + 1)
    tapered = np.minimum(1.0, 2.0 * (1.0 - k / reach)) * covariance[1 : reach + 1]
    spectrum = variance + 2.0 * float(tapered.sum())
    if spectrum <= 0.0:
        return 1
    g = 2.0 * float((k * tapered).sum())
    wanted = (1.5 * (g / spectrum) ** 2 * num) ** (1.0 / 3.0)
    return max(1, math.ceil(min(float(wanted), 3.0 * math.sqrt(num), num / 3.0)))


def deviations(
    cells: Cells, *, block_cells: int, num_resamples: int, seed: int
) -> tuple[tuple[float, float], ...]:
    """Low and high of the 95 % interval, from the estimate, of headline, mean and worst 5 %.

    Moving blocks (Künsch, *The jackknife and the bootstrap for general stationary observations*,
    Annals of Statistics 17(3), 1989), wrapped around the end so that the first and last cells are
    drawn as often as the others (Politis and Romano, *A circular block-resampling procedure*,
    1992). Quantiles are taken of the resampled value less its estimate from the cells, and widened
    as Student's t is against the normal distribution with as many degrees of freedom as there are
    blocks less one, because few blocks show too little spread.
    """
    rng = np.random.default_rng(seed)
    num = len(cells.weight)
    once = _values(cells, np.ones((1, num)))
    drawn = np.concatenate(
        [
            _values(cells, counts) - once
            for counts in _counts(num, block_cells, num_resamples=num_resamples, rng=rng)
        ]
    )
    tail = (1.0 - _CONFIDENCE) / 2
    low, high = np.quantile(drawn, [tail, 1.0 - tail], axis=0) * _widening(num / block_cells)
    return tuple(zip(low.tolist(), high.tolist(), strict=True))


def _widening(num_blocks: float) -> float:
    """Student's t quantile over the normal one (Abramowitz and Stegun 26.7.5), and n/(n - 1)."""
    free = num_blocks - 1.0
    z = _Z
    t = z + (z**3 + z) / (4 * free) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * free**2)
    return t / z * math.sqrt(num_blocks / free)


def _counts(
    num: int, block: int, *, num_resamples: int, rng: np.random.Generator
) -> Iterator[Array]:
    """How often each resample holds each cell, some resamples at once, (R, N)."""
    num_blocks = math.ceil(num / block)
    lengths = np.full(num_blocks, block)
    lengths[-1] = num - (num_blocks - 1) * block
    at_once = max(1, _AT_ONCE // num)
    for done in range(0, num_resamples, at_once):
        rows = min(at_once, num_resamples - done)
        starts = rng.integers(0, num, (rows, num_blocks))
        base = np.arange(rows)[:, None] * (2 * num)
        size = rows * 2 * num + 1
        steps = np.bincount((base + starts).ravel(), minlength=size).astype(np.float64)
        steps -= np.bincount((base + starts + lengths).ravel(), minlength=size)
        laid = np.cumsum(steps[:-1].reshape(rows, 2 * num), axis=1)
        yield laid[:, :num] + laid[:, num:]


def _values(cells: Cells, counts: Array) -> Array:
    """B less A of headline, mean and worst 5 % of each resample, (R, 3)."""
    weights = counts * cells.weight
    seconds = np.maximum(weights.sum(axis=1), 1e-9)  # a resample may hit nothing but gaps
    headline = counts @ (cells.headline_b - cells.headline_a) / seconds
    mean = weights @ (cells.b - cells.a) / seconds
    low = _low_means(cells.b, weights) - _low_means(cells.a, weights)
    return np.stack([headline, mean, low], axis=1)


def _low_means(scores: Array, weights: Array) -> Array:
    """Mean of the worst 5 % of the time of each row of weights, (R,)."""
    order = np.argsort(scores)
    until = np.cumsum(weights[:, order], axis=1)
    wanted = LOW_SHARE * np.maximum(until[:, -1:], 1e-9)
    taken = np.diff(np.minimum(until, wanted), axis=1, prepend=0.0)
    return np.asarray(taken @ scores[order] / wanted[:, 0], np.float64)


def _low_influence(scores: Array, weights: Array) -> Array:
    """min(score - q, 0) / 5 %, q the 5th percentile: how a cell moves the worst 5 %'s mean."""
    order = np.argsort(scores)
    until = np.cumsum(weights[order])
    at = int(np.searchsorted(until, LOW_SHARE * until[-1]))
    edge = scores[order][min(at, len(order) - 1)]
    return np.asarray(np.minimum(scores - edge, 0.0) / LOW_SHARE, np.float64)
