"""Holds as they come, one by one, and as arrays when they are pooled."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from dgiqa_stream.pooling._holds import INSTANT_SECONDS, Holds

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from dgiqa_stream.pooling.poolers import PoolerSet

_FIRST_ROOM = 64


class Hold(NamedTuple):
    """A score and the stretch of presentation time that it stands for, in seconds."""

    begin: float
    end: float
    score: float
    fresh: bool
    """The stream's clock jumped just before."""
    in_domain: bool


@dataclass(frozen=True, slots=True, eq=False)
class Stretch:
    """Holds, with where the stream's clock jumped."""

    holds: Holds
    fresh: NDArray[np.bool_]
    """The stream's clock jumped just before, (N,)."""
    in_domain: NDArray[np.bool_]
    """Nothing is known against the score, (N,)."""

    @property
    def in_domain_seconds(self) -> float:
        """For how long the scores that are in domain were held."""
        return float(self.holds.weights @ self.in_domain)

    def between(self, begin: float, end: float) -> Stretch:
        """The holds within [begin, end), cut at both."""
        first = int(self.holds.end_seconds.searchsorted(begin + INSTANT_SECONDS))
        last = int(self.holds.begin_seconds.searchsorted(end - INSTANT_SECONDS))
        part = slice(first, max(first, last))
        cut = Holds(
            np.maximum(self.holds.begin_seconds[part], begin),
            np.minimum(self.holds.end_seconds[part], end),
            self.holds.score[part],
        )
        return Stretch(cut, self.fresh[part], self.in_domain[part])

    def feed(self, poolers: PoolerSet) -> None:
        """Give the holds to poolers, and tell them of jumps."""
        if not len(self.holds):
            return
        jumps = self.fresh.nonzero()[0].tolist()
        if not jumps:
            poolers.add(self.holds)
            return
        for first, last in itertools.pairwise(sorted({0, *jumps, len(self.holds)})):
            if self.fresh[first]:
                poolers.forget()
            poolers.add(self.holds[first:last])


class Recent:
    """A queue of holds. Appending is O(1), and so is dropping the oldest, in the long run."""

    def __init__(self) -> None:
        self._columns = np.empty((len(Hold._fields), _FIRST_ROOM))
        self._first, self._last = 0, 0

    def __len__(self) -> int:
        """The number of holds."""
        return self._last - self._first

    def append(self, hold: Hold) -> None:
        """Add the newest."""
        if self._last == self._columns.shape[1]:
            self._make_room()
        self._columns[:, self._last] = hold
        self._last += 1

    def drop_until(self, seconds: float) -> None:
        """Drop the holds that end then or before."""
        ends = self._columns[1, self._first : self._last]
        self._first += int(ends.searchsorted(seconds, side="right"))

    def stretch(self) -> Stretch:
        """All of them, as views that nothing will write to."""
        begin, end, score, fresh, in_domain = self._columns[:, self._first : self._last]
        return Stretch(Holds(begin, end, score), fresh > 0, in_domain > 0)

    def clear(self) -> None:
        """Drop all; their views stay as they are."""
        self._first = self._last

    def _make_room(self) -> None:
        # never in place: views of the old columns may be in use
        kept = self._columns[:, self._first : self._last]
        self._columns = np.empty((len(kept), max(_FIRST_ROOM, 2 * kept.shape[1])))
        self._columns[:, : kept.shape[1]] = kept
        self._first, self._last = 0, kept.shape[1]
