"""Summaries that fade: what came last, or first, counts more."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from dgiqa_stream.pooling._holds import total

if TYPE_CHECKING:
    from dgiqa_stream.pooling._holds import Holds


class Recency:
    """Mean in which a moment t before the end weighs exp(-t / tau); O(1) memory and exact.

    The recency pooling of Rimac-Drlje, Vranješ and Žagar (BMSB 2009) as Tu et al. write it (*A
    comparative evaluation of temporal pooling methods for blind video quality assessment*, ICIP
    2020: exp(-alpha (L - t)), with alpha = 1 / tau and L all that was given), in continuous time.
    """

    def __init__(self, tau_seconds: float) -> None:
        self._tau = tau_seconds
        self._sum, self._weight, self._end = 0.0, 0.0, 0.0

    def forget(self) -> None:
        """A jump of the clock does not end a session."""

    def add(self, holds: Holds) -> None:
        """Take the next holds."""
        end = float(holds.end_seconds[-1])
        kept = math.exp((self._end - end) / self._tau) if self._weight else 0.0
        weights = np.exp((holds.end_seconds - end) / self._tau)
        weights *= -np.expm1(holds.weights / -self._tau)
        self._sum = self._sum * kept + float(weights @ holds.score)
        self._weight = self._weight * kept + float(total(weights))
        self._end = end

    def value(self) -> float | None:
        """The mean so far."""
        return self._sum / self._weight if self._weight else None


class Ewma(Recency):
    """Exponentially weighted moving average at the end of what was given, by time.

    A moment t ago weighs exp(-t / tau); the result is divided by the sum of the weights. Once some
    tau have passed, holding q for dt moves the average by a = 1 - exp(-dt / tau) of its distance
    to q: the recursion of Roberts (*Control chart tests based on geometric moving averages*,
    Technometrics 1(3), 1959). Before that, the division keeps the first score from standing for all
    the time before it (the bias correction of Kingma and Ba, arXiv 1412.6980, section 3, in
    continuous time).
    """

    def forget(self) -> None:
        """Start anew."""
        self._sum, self._weight, self._end = 0.0, 0.0, 0.0


class Primacy:
    """Mean in which a moment t after the begin weighs exp(-t / tau); O(1) memory and exact.

    The mirror of :class:`Recency`, from the same papers.
    """

    def __init__(self, tau_seconds: float) -> None:
        self._tau = tau_seconds
        self._sum, self._weight = 0.0, 0.0
        self._begin: float | None = None

    def forget(self) -> None:
        """A jump of the clock does not begin a session."""

    def add(self, holds: Holds) -> None:
        """Take the next holds."""
        if self._begin is None:
            self._begin = float(holds.begin_seconds[0])
        weights = np.exp((self._begin - holds.begin_seconds) / self._tau)
        weights *= -np.expm1(holds.weights / -self._tau)
        self._sum += float(weights @ holds.score)
        self._weight += float(total(weights))

    def value(self) -> float | None:
        """The mean so far."""
        return self._sum / self._weight if self._weight else None
