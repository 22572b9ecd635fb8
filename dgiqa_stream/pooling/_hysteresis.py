"""Temporal hysteresis: a quality that falls at once and recovers slowly, live and as published."""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING

import numpy as np

from dgiqa_stream.pooling._holds import INSTANT_SECONDS, Holds, total

if TYPE_CHECKING:
    from dgiqa_stream.pooling._holds import Array

_NUM_CELLS = 20  # how finely the hysteresis sees its memory
_ABSENT = 1e3  # above every score: sorts last and meets weight 0
_ZERO = np.zeros(1)
_NOTHING = np.full(_NUM_CELLS - 1, _ABSENT)
_MAX_CELLS = 4096  # taken at once; a hold may be as long as a user likes


class Hysteresis:
    """Mean over time of a quality that falls at once and recovers over ``tau`` seconds.

    Seshadrinathan and Bovik, *Temporal hysteresis model of time varying subjective video quality*,
    ICASSP 2011, section 3, with its alpha = 0.8 and tau = 2 s as defaults. The paper takes one
    score per frame; so that time counts rather than frames, it is cut into N = 20 cells per tau
    from the begin of a run, and c_k, the mean score over cell k, stands for the frames. ::

        l = the lowest of the memory
        m = sum of w_j v_j;  v_0 <= .. <= v_(n-1) are n cells in order of score,
            w_j ~ exp(-j^2 / (2 s^2)),  s = (2n - 1) / 6,  sum of w_j = 1
        h_k = (1 - alpha) l + alpha m

    (w is the falling half of a Gaussian 2n - 1 long.) The pooled value is the mean of h_k over
    time. The two forms differ in where l and m come from:

    * :meth:`exact`, the paper's: l from the N cells before k (of k itself where there are none), m
      from cell k and the N - 1 after it, as far as there are any. What comes within tau still
      changes h_k, so it is final tau later. With one frame per cell this is the paper, to rounding.
    * :meth:`causal`: both from the last N cells, k itself included, so that h_k is final at once.

    A last cell cut short is a cell to those that look at it, and counts for as long as it is. A
    gap, or a jump of the clock, ends a run and its memory; the h_k of earlier runs still count.
    The weights follow the order of scores, not their scale. O(N) memory.
    """

    def __init__(self, tau_seconds: float, alpha: float, *, num_cells: int = _NUM_CELLS) -> None:
        """``num_cells``: N, at most 20."""
        self._alpha, self._span = alpha, num_cells
        self._cell_seconds = tau_seconds / num_cells
        self._weights = _WEIGHTS if num_cells == _NUM_CELLS else _falling_half_gaussians(num_cells)
        self._nothing = _NOTHING[: num_cells - 1]
        self._causal, self._exact, self._seconds = 0.0, 0.0, 0.0  # of runs that have ended
        self._begin_run(-math.inf)

    def _begin_run(self, begin: float) -> None:
        self._begin, self._end = begin, begin
        self._num_cells = 0  # complete ones, of this run
        self._recent = self._nothing  # the last N - 1 of them, oldest first
        self._open_integral, self._open_seconds = 0.0, 0.0  # the cell not yet complete
        self._first_cell, self._last_lowest = 0.0, 0.0
        self._sum_lowest, self._sum_softer = 0.0, 0.0  # of every complete cell, looking back
        self._sum_full = 0.0  # of the softer ones that see as much as they may
        self._so_far: tuple[float, float, float] | None = None

    def forget(self) -> None:
        """End the run and its memory."""
        self._causal, self._exact, self._seconds = self._sums()
        self._begin_run(-math.inf)

    def add(self, holds: Holds) -> None:
        """Take the next holds."""
        gaps = (holds.begin_seconds[1:] - holds.end_seconds[:-1] > INSTANT_SECONDS).nonzero()[0]
        for first, last in itertools.pairwise([0, *(gaps + 1).tolist(), len(holds)]):
            run = holds[first:last] if len(gaps) else holds
            if run.begin_seconds[0] - self._end > INSTANT_SECONDS:
                self.forget()
                self._begin_run(float(run.begin_seconds[0]))
            self._continue_run(run)

    def _continue_run(self, run: Holds) -> None:
        self._so_far = None
        cell = self._cell_seconds
        knots = np.concatenate([run.begin_seconds[:1], run.end_seconds]) - self._begin
        # of the score over time, since the last cell was complete
        integral = np.concatenate([_ZERO, (run.weights * run.score).cumsum()]) + self._open_integral
        end = float(knots[-1])
        complete = max(self._num_cells, int(end / cell + 1e-9))
        spent = 0.0
        while self._num_cells < complete:
            last = min(complete, self._num_cells + _MAX_CELLS)
            edges = cell * np.arange(self._num_cells, last + 1)
            at_edges = np.interp(edges, knots, integral)
            at_edges[0] = spent
            self._remember((at_edges[1:] - at_edges[:-1]) / cell)
            spent = float(at_edges[-1])
        self._open_integral = float(integral[-1]) - spent
        self._open_seconds = end - complete * cell
        self._end = float(run.end_seconds[-1])

    def _remember(self, cells: Array) -> None:
        seen = np.concatenate([self._recent, cells])
        lowest, softer = self._of_windows(seen, self._num_cells)
        if not self._num_cells:
            self._first_cell = float(cells[0])
        self._last_lowest = float(lowest[-1])
        self._sum_lowest += float(total(lowest))
        self._sum_softer += float(total(softer))
        self._sum_full += float(total(softer[max(0, self._span - 1 - self._num_cells) :]))
        self._num_cells += len(cells)
        self._recent = seen[len(seen) - self._span + 1 :]

    def _of_windows(self, seen: Array, num_before: int) -> tuple[Array, Array]:
        """Lowest and softer of each N cells in a row, (len - N + 1,).

        The first N - 1 cells are absent where fewer than that come before.
        """
        ascending = _windows(seen, self._span)
        ascending.sort(axis=1)
        softer = ascending @ self._weights[-1]
        num_short = min(self._span - 1 - num_before, len(softer))
        if num_short > 0:
            weights = self._weights[num_before : num_before + num_short]
            softer[:num_short] = np.einsum("ij,ij->i", ascending[:num_short], weights)
        return ascending[:, 0], softer

    def _sums(self) -> tuple[float, float, float]:
        """Both forms over time, and the time, of all runs as if this one had ended."""
        if self._so_far is None:
            self._so_far = self._sum_up()
        return self._so_far

    def _sum_up(self) -> tuple[float, float, float]:
        num, cell, cut = self._num_cells, self._cell_seconds, self._open_seconds
        is_cut = cut > INSTANT_SECONDS * cell
        if not (num or is_cut):
            return self._causal, self._exact, self._seconds
        tail = self._recent[max(0, len(self._recent) - num) :]  # may yet look at what comes
        after = cell * self._sum_full
        lowest, softer = cell * self._sum_lowest, cell * self._sum_softer  # looking back
        before = cell * (self._first_cell + self._sum_lowest - self._last_lowest) if num else 0.0
        if is_cut:
            last = self._open_integral / cut
            back = self._of_windows(np.concatenate([self._recent, [last]]), num)
            lowest, softer = lowest + cut * float(back[0][0]), softer + cut * float(back[1][0])
            before += cut * (self._last_lowest if num else last)
            tail = np.concatenate([tail, [last]])
        if len(tail):
            # from the end, each looks at those before it
            _, to_come = self._of_windows(np.concatenate([self._nothing, tail[::-1]]), 0)
            after += cell * float(total(to_come))
            after -= (cell - cut) * float(to_come[0]) if is_cut else 0.0
        return (
            self._causal + (1.0 - self._alpha) * lowest + self._alpha * softer,
            self._exact + (1.0 - self._alpha) * before + self._alpha * after,
            self._seconds + cell * num + (cut if is_cut else 0.0),
        )

    def causal(self) -> float | None:
        """The mean of h so far, each looking back."""
        integral, _, seconds = self._sums()
        return integral / seconds if seconds else None

    def exact(self) -> float | None:
        """The mean of h as if all ended now, each looking at what came after it."""
        _, integral, seconds = self._sums()
        return integral / seconds if seconds else None


def _windows(values: Array, width: int) -> Array:
    """Each ``width`` values in a row, (len - width + 1, width); a copy."""
    step = values.itemsize  # as sliding_window_view, whose checks would be half of the cost here
    shape = (len(values) - width + 1, width)
    return np.ndarray(shape, np.float64, values, strides=(step, step)).copy()


def _falling_half_gaussians(num_cells: int) -> Array:
    """Row n - 1 holds the n weights w_j of :class:`Hysteresis`, then zeros."""
    table = np.zeros((num_cells, num_cells))
    for n in range(1, num_cells + 1):
        weights = np.exp(-0.5 * (np.arange(n) / ((2 * n - 1) / 6.0)) ** 2)
        table[n - 1, :n] = weights / weights.sum()
    return table


_WEIGHTS = _falling_half_gaussians(_NUM_CELLS)
