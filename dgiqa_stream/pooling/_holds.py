"""What poolers take, and what they must do."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[np.float64]

total = np.add.reduce
"""``ndarray.sum`` without the checks that cost as much as the sum, where windows are short."""
INSTANT_SECONDS = 1e-6
"""What is closer together is at one time; ticks of a 90 kHz clock are further apart."""


@dataclass(frozen=True, slots=True, eq=False)
class Holds:
    """Scores and the stretches of presentation time they stand for, in time order.

    Three float64 arrays (N,); stretches may have gaps between them but do not overlap, and each is
    longer than 0. Who takes holds may keep the arrays: nobody writes to them again.
    """

    begin_seconds: Array
    end_seconds: Array
    score: Array
    """0..100."""
    weights: Array = field(init=False)
    """How long each score was held, in seconds, (N,)."""

    def __post_init__(self) -> None:
        """Work the weights out once, for all who need them."""
        object.__setattr__(self, "weights", self.end_seconds - self.begin_seconds)

    def __getitem__(self, part: slice) -> Holds:
        """The holds of a slice."""
        return Holds(self.begin_seconds[part], self.end_seconds[part], self.score[part])

    def __len__(self) -> int:
        """The number of holds."""
        return len(self.score)


class Summary(Protocol):
    """What is kept of the holds given so far, in bounded memory.

    Several pooled values may be read from one summary. How time is cut into calls of ``add``, or a
    hold into shorter holds of the same score, changes nothing.
    """

    def add(self, holds: Holds) -> None:
        """Take the next holds, one or more, none before those it has."""

    def forget(self) -> None:
        """The stream's clock jumped: what came before must not colour what comes."""


class Pooler(Summary, Protocol):
    """A summary that one value is read from."""

    def value(self) -> float | None:
        """The pooled score so far; None before the first hold. May be called at any time."""
