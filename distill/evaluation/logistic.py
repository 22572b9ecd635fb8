"""The curve from scores to MOS that the field fits before PLCC and RMSE.

* 4 parameters: f(x) = (b1 - b2) / (1 + exp(-(x - b3) / |b4|)) + b2 (VQEG FR-TV phase I, 2000, and
  ITU-T's tutorial on objective perceptual assessment of video quality, 2004);
* 5 parameters: f(x) = b1 (1/2 - 1 / (1 + exp(b2 (x - b3)))) + b4 x + b5 (Sheikh, Sabir and Bovik,
  IEEE TIP 2006, equation 9).

A model has learned its own scale from other people than those of a test set; the curve takes that
out, and only that. It is fitted on the pictures it is then judged on, as everybody does.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from dgiqa_stream.correlation import plcc, srcc

Array = NDArray[np.float64]
LogisticKind = Literal["logistic4", "logistic5"]
_WORSE_THAN_A_LINE = 1.01
"""A fit with more squared error than this times a straight line's has not converged."""


def logistic4(x: Array, b1: float, b2: float, b3: float, b4: float) -> Array:
    """The logistic of 4 parameters; b1 and b2 are the ends, b3 the middle, b4 the width."""
    from scipy.special import expit

    width = max(abs(b4), 1e-12)
    return np.asarray((b1 - b2) * expit((x - b3) / width) + b2, np.float64)


def logistic5(x: Array, b1: float, b2: float, b3: float, b4: float, b5: float) -> Array:
    """The logistic of 5 parameters: a centred logistic and a straight line."""
    from scipy.special import expit

    return np.asarray(b1 * (0.5 - expit(-b2 * (x - b3))) + b4 * x + b5, np.float64)


@dataclass(frozen=True, slots=True)
class FittedCurve:
    """A curve from scores to MOS."""

    kind: Literal["logistic4", "logistic5", "linear"]
    """``linear`` where the logistic that was asked for did not converge."""
    parameters: tuple[float, ...]
    """b1, b2, ... of the formula; of a line its slope and intercept."""
    converged: bool

    def __call__(self, scores: Array) -> Array:
        """MOS that the curve gives, of the shape of ``scores``."""
        if self.kind == "linear":
            return np.asarray(self.parameters[0] * scores + self.parameters[1], np.float64)
        curve = logistic4 if self.kind == "logistic4" else logistic5
        return curve(scores, *self.parameters)

    def plcc(self, scores: Array, mos: Array) -> float:
        """PLCC of mapped scores to MOS, with the sign of SRCC; NaN where the curve is flat.

        A fitted curve follows MOS whichever way the scores run: without a sign it would turn a
        reversed model into a perfect one. The sign is that of the data's own order (of plain PLCC
        where SRCC is 0), not of the curve's ends: the curve of 5 parameters need not be monotone,
        and its ends may lie against all pictures between them.
        """
        mapped = self(scores)
        if np.ptp(scores) == 0 or np.ptp(mapped) == 0:
            return float("nan")
        direction = srcc(scores, mos) or plcc(scores, mos)
        return float(np.sign(direction)) * abs(plcc(mapped, mos))


def fit_curve(
    scores: Array,
    mos: Array,
    kind: LogisticKind,
    *,
    start: FittedCurve | None = None,
    most_evaluations: int = 4000,
) -> FittedCurve:
    """Fit by least squares, from several starts or from a curve of the same kind.

    ``scores`` and ``mos`` are (N,). A fit that does not converge, or that is worse than a straight
    line, gives that line with ``converged`` false; so do fewer pictures than parameters and scores
    that are all one.
    """
    x, y = np.asarray(scores, np.float64), np.asarray(mos, np.float64)
    line = _line(x, y)
    if len(x) <= int(kind[-1]) or np.ptp(x) == 0 or np.ptp(y) == 0:
        return line
    frame = _Frame(float(x.mean()), float(x.std()), float(y.mean()), float(y.std()))
    u, v = (x - frame.x0) / frame.sx, (y - frame.y0) / frame.sy
    if start is not None and start.kind == kind:
        starts = [frame.inwards(start.parameters)]
    else:
        starts = _starts(u, v, kind)
    fits = [_least_squares(u, v, kind, begin, most_evaluations) for begin in starts]
    curves = [FittedCurve(kind, frame.outwards(fit), True) for fit in fits if fit is not None]
    best = min(curves, key=lambda curve: _error(curve, x, y), default=line)
    return best if _error(best, x, y) <= _WORSE_THAN_A_LINE * _error(line, x, y) else line


def _error(curve: FittedCurve, x: Array, y: Array) -> float:
    # the smallest error that counts is float64's rounding of y, squared
    floor = len(y) * (1e-9 * float(np.ptp(y))) ** 2
    return max(float(((curve(x) - y) ** 2).sum()), floor)


def _line(x: Array, y: Array) -> FittedCurve:
    variance = float(((x - x.mean()) ** 2).sum())
    slope = float(((x - x.mean()) * (y - y.mean())).sum()) / variance if variance > 0 else 0.0
    return FittedCurve("linear", (slope, float(y.mean()) - slope * float(x.mean())), False)


def _starts(u: Array, v: Array, kind: LogisticKind) -> list[tuple[float, ...]]:
    """Where to begin, in standardised numbers: a wide and a narrow step of the right direction."""
    rho = plcc(u, v)
    low, high = (float(v.min()), float(v.max())) if rho >= 0 else (float(v.max()), float(v.min()))
    if kind == "logistic4":
        return [(high, low, 0.0, width) for width in (1.0, 0.3)]
    return [(high - low, 1.0, 0.0, 0.0, 0.0), (0.1 * (high - low), 3.0, 0.0, rho, 0.0)]


def _least_squares(
    u: Array, v: Array, kind: LogisticKind, begin: tuple[float, ...], most_evaluations: int
) -> list[float] | None:
    from scipy.optimize import OptimizeWarning, curve_fit

    curve, slopes = (logistic4, _slopes4) if kind == "logistic4" else (logistic5, _slopes5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", OptimizeWarning)  # of the covariance, which is not used
        warnings.simplefilter("ignore", RuntimeWarning)  # an overflow on the way is no result
        try:
            found, _ = curve_fit(curve, u, v, p0=begin, jac=slopes, maxfev=most_evaluations)
        except RuntimeError:  # more evaluations than that
            return None
    return [float(value) for value in found] if np.isfinite(found).all() else None


def _slopes4(x: Array, b1: float, b2: float, b3: float, b4: float) -> Array:
    """Derivatives of :func:`logistic4` by its parameters, (N, 4)."""
    from scipy.special import expit

    width = max(abs(b4), 1e-12)
    t = (x - b3) / width
    s = expit(t)
    steep = (b1 - b2) * s * (1 - s) / width
    return np.stack([s, 1 - s, -steep, -steep * t * (1 if b4 >= 0 else -1)], 1)


def _slopes5(x: Array, b1: float, b2: float, b3: float, b4: float, b5: float) -> Array:
    """Derivatives of :func:`logistic5` by its parameters, (N, 5)."""
    from scipy.special import expit

    s = expit(-b2 * (x - b3))
    bend = b1 * s * (1 - s)
    return np.stack([0.5 - s, bend * (x - b3), -bend * b2, x, np.ones_like(x)], 1)


@dataclass(frozen=True, slots=True)
class _Frame:
    """Mean and deviation of both axes: fits are made in standardised numbers."""

    x0: float
    sx: float
    y0: float
    sy: float

    def outwards(self, p: list[float]) -> tuple[float, ...]:
        """Parameters of standardised axes to those of the real ones."""
        if len(p) == 4:
            ends = self.y0 + self.sy * p[0], self.y0 + self.sy * p[1]
            return (*ends, self.x0 + self.sx * p[2], self.sx * abs(p[3]))
        slope = self.sy * p[3] / self.sx
        intercept = self.y0 + self.sy * p[4] - slope * self.x0
        return (self.sy * p[0], p[1] / self.sx, self.x0 + self.sx * p[2], slope, intercept)

    def inwards(self, q: tuple[float, ...]) -> tuple[float, ...]:
        """Parameters of the real axes to those of standardised ones."""
        if len(q) == 4:
            ends = (q[0] - self.y0) / self.sy, (q[1] - self.y0) / self.sy
            return (*ends, (q[2] - self.x0) / self.sx, q[3] / self.sx)
        intercept = (q[4] + q[3] * self.x0 - self.y0) / self.sy
        slope = q[3] * self.sx / self.sy
        return (q[0] / self.sy, q[1] * self.sx, (q[2] - self.x0) / self.sx, slope, intercept)
