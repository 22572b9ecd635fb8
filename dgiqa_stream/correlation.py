"""How well two lists of numbers agree: SRCC, PLCC, KRCC, RMSE. numpy alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray


def _pair(a: ArrayLike, b: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    x, y = np.asarray(a, np.float64).ravel(), np.asarray(b, np.float64).ravel()
    if len(x) != len(y) or len(x) < 2:
        raise ValueError(
            f"agreement needs two lists of one length, 2 or more: got {len(x)} and {len(y)}"
        )
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise ValueError("agreement needs finite numbers: there is a NaN or an infinity")
    return x, y


def ranks(values: ArrayLike) -> NDArray[np.float64]:
    """Ranks from 1; equal values share the mean of theirs."""
    x = np.asarray(values, np.float64).ravel()
    _, inverse, counts = np.unique(x, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2.0)[inverse]


def plcc(a: ArrayLike, b: ArrayLike) -> float:
    """Pearson's linear correlation, -1..1; NaN where one list is constant."""
    x, y = _pair(a, b)
    x, y = x - x.mean(), y - y.mean()
    scale = float(np.sqrt((x * x).sum() * (y * y).sum()))
    return float((x * y).sum() / scale) if scale > 0 else float("nan")


def srcc(a: ArrayLike, b: ArrayLike) -> float:
    """Spearman's rank correlation, -1..1, ties at their mean rank."""
    x, y = _pair(a, b)
    return plcc(ranks(x), ranks(y))


def krcc(a: ArrayLike, b: ArrayLike) -> float:
    """Kendall's rank correlation tau-b, -1..1; O(n^2) time, O(n) memory."""
    x, y = _pair(a, b)
    concordance, ties_x, ties_y = 0.0, 0.0, 0.0
    for i in range(len(x) - 1):
        dx, dy = np.sign(x[i + 1 :] - x[i]), np.sign(y[i + 1 :] - y[i])
        concordance += float((dx * dy).sum())
        ties_x += float((dx == 0).sum())
        ties_y += float((dy == 0).sum())
    pairs = len(x) * (len(x) - 1) / 2.0
    scale = float(np.sqrt((pairs - ties_x) * (pairs - ties_y)))
    return concordance / scale if scale > 0 else float("nan")


def rmse(a: ArrayLike, b: ArrayLike) -> float:
    """Root of the mean squared difference."""
    x, y = _pair(a, b)
    return float(np.sqrt(((x - y) ** 2).mean()))
