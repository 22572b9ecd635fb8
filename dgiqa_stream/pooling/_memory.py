"""Poolers that remember: what came last, or what was bad, counts more."""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from dgiqa_stream.pooling._holds import Holds

if TYPE_CHECKING:
    from dgiqa_stream.pooling._holds import Array

_NUM_CELLS = 20  # how finely the hysteresis sees its memory
_MIN_SHARE = 0.2  # of the lowest; 1 - alpha of the paper, whose alpha is 0.8
_ABSENT = 1e3  # above every score: sorts last and meets weight 0
_INSTANT_SECONDS = 1e-6


class Ewma:
    """Exponentially weighted moving average at the end of what was given, by time.

    A moment t ago weighs exp(-t / tau); the result is divided by the sum of the weights. Once some
    tau have passed, holding q for dt moves the average by a = 1 - exp(-dt / tau) of its distance
    to q. Before that, the division keeps the first score from standing for all the time before it
    (the bias correction of Kingma and Ba, arXiv 1412.6980, section 3, in continuous time).
    """

    def __init__(self, tau_seconds: float) -> None:
        self._tau = tau_seconds
        self.forget()

    def forget(self) -> None:
        """Start anew."""
        self._sum, self._weight, self._end = 0.0, 0.0, 0.0

    def add(self, holds: Holds) -> None:
        """Take the next holds."""
        end = float(holds.end_seconds[-1])
        kept = math.exp((self._end - end) / self._tau) if self._weight else 0.0
        weights = np.exp((holds.end_seconds - end) / self._tau)
        weights *= -np.expm1(-holds.weights / self._tau)
        self._sum = self._sum * kept + float(weights @ holds.score)
        self._weight = self._weight * kept + float(weights.sum())
        self._end = end

    def value(self) -> float | None:
        """The average now."""
        return self._sum / self._weight if self._weight else None


class Hysteresis:
    """Mean over time of a quality that falls at once and recovers over ``tau`` seconds.

    After Seshadrinathan and Bovik, *Temporal hysteresis model of time varying subjective video
    quality*, ICASSP 2011, made causal, so that it can be given live. Time is cut into cells of
    tau/20 from the begin of a run; c_k is the mean score over cell k, by time. Of the last
    n = min(k + 1, 20) cells, k itself included, ::

        l_k = the lowest
        m_k = sum of w_j v_j;  v_0 <= .. <= v_(n-1) are the cells in order of score,
              w_j ~ exp(-j^2 / (2 s^2)),  s = (2n - 1) / 6,  sum of w_j = 1
        h_k = 0.2 l_k + 0.8 m_k

    and the result is the mean of h_k over time. (w is the falling half of a Gaussian 2n - 1 long.
    The paper takes m_k from the tau seconds to come; here both look back.) A last cell cut short
    counts for as long as it is. A gap, or a jump of the clock, ends a run and its memory; the h_k
    of earlier runs still count. The weights follow the order of scores, not their scale.
    """

    def __init__(self, tau_seconds: float) -> None:
        self._cell_seconds = tau_seconds / _NUM_CELLS
        self._sum, self._weight = 0.0, 0.0
        self._begin_run(-math.inf)

    def _begin_run(self, begin: float) -> None:
        self._begin, self._end = begin, begin
        self._num_cells = 0  # complete ones, of this run
        self._recent = np.full(_NUM_CELLS - 1, _ABSENT)  # the last of them, oldest first
        self._open_integral, self._open_seconds = 0.0, 0.0  # the cell not yet complete

    def forget(self) -> None:
        """End the run and its memory."""
        self._sum, self._weight = self._with_open_cell()
        self._begin_run(-math.inf)

    def add(self, holds: Holds) -> None:
        """Take the next holds."""
        gaps = holds.begin_seconds[1:] - holds.end_seconds[:-1] > _INSTANT_SECONDS
        edges = [0, *(np.flatnonzero(gaps) + 1).tolist(), len(holds)]
        for first, last in itertools.pairwise(edges):
            run = holds[first:last]
            if run.begin_seconds[0] - self._end > _INSTANT_SECONDS:
                self.forget()
                self._begin_run(float(run.begin_seconds[0]))
            self._continue_run(run)

    def _continue_run(self, run: Holds) -> None:
        cell = self._cell_seconds
        knots = np.append(run.begin_seconds[0], run.end_seconds) - self._begin
        # of the score over time, since the last cell was complete
        integral = np.append(0.0, np.cumsum(run.weights * run.score)) + self._open_integral
        complete = max(self._num_cells, int(knots[-1] / cell + 1e-9))
        at_edges = np.interp(cell * np.arange(self._num_cells + 1, complete + 1), knots, integral)
        if len(at_edges):
            self._remember(np.diff(at_edges, prepend=0.0) / cell)
        self._open_integral = float(integral[-1] - (at_edges[-1] if len(at_edges) else 0.0))
        self._open_seconds = float(knots[-1]) - complete * cell
        self._num_cells = complete
        self._end = float(run.end_seconds[-1])

    def _remember(self, cells: Array) -> None:
        seen = np.concatenate([self._recent, cells])
        self._sum += self._cell_seconds * float(_remembered(seen, self._num_cells).sum())
        self._weight += self._cell_seconds * len(cells)
        self._recent = seen[-(_NUM_CELLS - 1) :]

    def _with_open_cell(self) -> tuple[float, float]:
        """The sums, with the cell that is not complete counted for as long as it is."""
        if self._open_seconds <= _INSTANT_SECONDS * self._cell_seconds:
            return self._sum, self._weight
        seen = np.append(self._recent, self._open_integral / self._open_seconds)
        h = float(_remembered(seen, self._num_cells)[0])
        return self._sum + h * self._open_seconds, self._weight + self._open_seconds

    def value(self) -> float | None:
        """The mean of h so far."""
        total, weight = self._with_open_cell()
        return total / weight if weight else None


def _falling_half_gaussians() -> Array:
    """Row n - 1 holds the n weights w_j of :class:`Hysteresis`, then zeros."""
    table = np.zeros((_NUM_CELLS, _NUM_CELLS))
    for n in range(1, _NUM_CELLS + 1):
        weights = np.exp(-0.5 * (np.arange(n) / ((2 * n - 1) / 6.0)) ** 2)
        table[n - 1, :n] = weights / weights.sum()
    return table


_WEIGHTS = _falling_half_gaussians()


def _remembered(seen: Array, first: int) -> Array:
    """h of each cell after the 19 it may look back on; the first of them is cell ``first``."""
    ascending = np.sort(sliding_window_view(seen, _NUM_CELLS), axis=1)
    rows = np.minimum(np.arange(first, first + len(ascending)), _NUM_CELLS - 1)
    softer = (ascending * _WEIGHTS[rows]).sum(axis=1)
    h: Array = _MIN_SHARE * ascending[:, 0] + (1.0 - _MIN_SHARE) * softer
    return h
