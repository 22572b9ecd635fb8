"""Which time of B shows what A shows."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from dgiqa_stream.comparison._values import Alignment

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from dgiqa_stream.comparison._values import ScoreCurve

    Array = NDArray[np.float64]

_MAX_LAGS = 1 << 20
_MIN_CORRELATION = 0.5  # of an offset that is believed
_TELLING = 0.02  # more correlation than at the own times is told, though not believed
_CLEAR_DEVIATIONS = 3.0  # by which it must beat the recordings' own times


def align(a: ScoreCurve, b: ScoreCurve, *, offset_seconds: float | None = None) -> Alignment:
    """The given offset, or the one at which the curves correlate best.

    Pearson's correlation over the common time is taken at every lag that leaves half of the shorter
    curve in common, as sums by FFT. An offset is believed from a correlation of 0.5 on. Where the
    recordings' own times have as much in common, they are kept unless it beats them by three
    standard deviations of Fisher's z, each second counting as one observation.
    """
    step = max(min(a.period_seconds, b.period_seconds), max(_length(a), _length(b)) / _MAX_LAGS)
    if offset_seconds is not None:
        return Alignment(offset_seconds, "given", _correlation_at(a, b, offset_seconds, step))
    own = _correlation_at(a, b, 0.0, step)
    lags, r = _correlations(_on_grid(a, step), _on_grid(b, step))
    if len(r):
        best = int(np.argmax(r))
        shared = _shared_seconds(a, b)
        is_rival = shared >= 0.5 * min(_length(a), _length(b)) and math.isfinite(own)
        offset = float(b.begin_seconds[0] - a.begin_seconds[0]) + float(lags[best]) * step
        if r[best] < _MIN_CORRELATION:
            return Alignment(0.0, "own times", own)
        if not is_rival or _is_clearly_higher(float(r[best]), own, seconds=shared):
            return Alignment(offset, "found", float(r[best]))
        if r[best] > own + _TELLING:
            return Alignment(0.0, "own times", own, rival_seconds=offset)
    return Alignment(0.0, "own times", own)


def _length(curve: ScoreCurve) -> float:
    return float(curve.end_seconds[-1] - curve.begin_seconds[0])


def _shared_seconds(a: ScoreCurve, b: ScoreCurve) -> float:
    """How long both last, on their own times."""
    last = min(a.end_seconds[-1], b.end_seconds[-1])
    return float(last - max(a.begin_seconds[0], b.begin_seconds[0]))


def _is_clearly_higher(r: float, other: float, *, seconds: float) -> bool:
    if seconds <= 4.0:
        return False
    z, other_z = (math.atanh(max(-0.999999, min(0.999999, value))) for value in (r, other))
    return z - other_z > _CLEAR_DEVIATIONS * math.sqrt(2.0 / (seconds - 3.0))


def _on_grid(curve: ScoreCurve, step: float) -> Array:
    """The curve every ``step`` from its begin, NaN where it has no score."""
    num = max(1, round(_length(curve) / step))
    return score_at(curve, curve.begin_seconds[0] + (np.arange(num) + 0.5) * step)


def score_at(curve: ScoreCurve, seconds: Array) -> Array:
    """The score at each time, NaN where there is none."""
    index = np.searchsorted(curve.begin_seconds, seconds, "right") - 1
    held = (index >= 0) & (seconds < curve.end_seconds[index])
    return np.where(held, curve.score[index], np.nan)


def _correlation_at(a: ScoreCurve, b: ScoreCurve, offset: float, step: float) -> float:
    """At one offset; NaN where the curves do not overlap there or one is constant."""
    first = max(a.begin_seconds[0], b.begin_seconds[0] - offset)
    last = min(a.end_seconds[-1], b.end_seconds[-1] - offset)
    if last - first < 2.0 * step:
        return math.nan
    at = np.arange(first + 0.5 * step, last, step)
    x, y = score_at(a, at), score_at(b, at + offset)
    both = np.isfinite(x) & np.isfinite(y)
    if both.sum() < 2 or np.ptp(x[both]) == 0.0 or np.ptp(y[both]) == 0.0:
        return math.nan
    return float(np.corrcoef(x[both], y[both])[0, 1])


def _correlations(x: Array, y: Array) -> tuple[NDArray[np.intp], Array]:
    """Lags of y against x, and Pearson's correlation over the common time at each."""
    size = 1 << (len(x) + len(y) - 1).bit_length()
    lags = np.arange(-(len(x) - 1), len(y))
    x_there, y_there = np.isfinite(x), np.isfinite(y)
    x, y = (np.where(there, v - np.nanmean(v), 0.0) for v, there in ((x, x_there), (y, y_there)))

    def lagged(p: Array, q: Array) -> Array:
        sums = np.fft.irfft(np.conj(np.fft.rfft(p, size)) * np.fft.rfft(q, size), size)
        return np.asarray(sums[lags], np.float64)  # negative lags wrap around

    mask_x, mask_y = x_there.astype(np.float64), y_there.astype(np.float64)
    num = np.maximum(lagged(mask_x, mask_y), 1e-9)
    sum_x, sum_y = lagged(x, mask_y), lagged(mask_x, y)
    var_x = lagged(x * x, mask_y) - sum_x * sum_x / num
    var_y = lagged(mask_x, y * y) - sum_y * sum_y / num
    least = 1e-6 * max(1.0, float((x * x).sum()), float((y * y).sum()))  # rounding of the FFT
    enough = num >= max(2.0, 0.5 * min(mask_x.sum(), mask_y.sum()))
    usable = enough & (var_x > least) & (var_y > least)
    r = (lagged(x, y) - sum_x * sum_y / num)[usable] / np.sqrt(var_x[usable] * var_y[usable])
    return lags[usable], np.clip(r, -1.0, 1.0)
