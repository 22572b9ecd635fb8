"""What a comparison takes and gives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from dgiqa_stream.errors import SourceError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    Array = NDArray[np.float64]


HEADLINE, MEAN, LOW5 = "hysteresis", "mean", "low5"


@dataclass(frozen=True, slots=True, eq=False)
class ScoreCurve:
    """Scores over presentation time: each stands from its begin to its end."""

    name: str
    begin_seconds: Array
    """(N,), rising."""
    end_seconds: Array
    """(N,)."""
    score: Array
    """0..100, (N,)."""
    period_seconds: float
    """The median time from one score to the next."""


@dataclass(frozen=True, slots=True)
class Alignment:
    """Which time of B shows what A shows: B's time is A's plus the offset."""

    offset_seconds: float
    how: str
    """``given``, ``found`` from the curves, or ``own times`` where the curves tell nothing better.
    """
    correlation: float
    """Pearson's, -1..1, of both curves at that offset; NaN where one is constant."""
    rival_seconds: float | None = None
    """Another offset that fits better, but not clearly."""


@dataclass(frozen=True, slots=True, eq=False)
class Common:
    """Pieces of time for which both curves have one score; on A's clock, in order."""

    begin_seconds: Array
    """(M,)."""
    end_seconds: Array
    a: Array
    """A's score, (M,)."""
    b: Array


@dataclass(frozen=True, slots=True, eq=False)
class Cells:
    """The time that both curves cover, cut into even cells; the blocks are made of them."""

    step_seconds: float
    weight: Array
    """Seconds that both cover, (K,); 0 in gaps."""
    a: Array
    """A's mean score over each, (K,); 0 in gaps."""
    b: Array
    headline_a: Array
    """What each cell adds to A's hysteresis, in score-seconds, (K,)."""
    headline_b: Array


@dataclass(frozen=True, slots=True)
class Difference:
    """A pooled value of both, and B's less A's with its 95 % interval; score points."""

    name: str
    a: float
    b: float
    difference: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Stretch:
    """Seconds in a row in which B is worse than A."""

    begin_seconds: float
    """On A's clock."""
    end_seconds: float
    difference: float
    """Mean of B less A."""
    lowest: float
    """The worst second's."""


@dataclass(frozen=True, slots=True, eq=False)
class Comparison:
    """What two curves of one content say of each other; times are A's."""

    a: ScoreCurve
    b: ScoreCurve
    alignment: Alignment
    begin_seconds: float
    end_seconds: float
    overlap_seconds: float
    """Time that both have scores for."""
    differences: tuple[Difference, ...]
    """Of the headline, the mean and the worst 5 %."""
    second_seconds: Array
    """Where each second begins, (S,)."""
    second_difference: Array
    """B less A in each second, (S,); NaN where they do not both have scores."""
    stretches: tuple[Stretch, ...]
    """The worst first."""
    cells: Cells
    block_seconds: float
    num_blocks: int
    num_resamples: int
    seed: int

    @property
    def headline(self) -> Difference:
        """The difference to look at first."""
        return self.differences[0]

    @property
    def verdict(self) -> str:
        """One sentence of the headline."""
        return verdict_of(self.headline)


def verdict_of(found: Difference) -> str:
    """``B is better by 3.1 points (95 % interval 2.2 to 4.0)``, or that no difference shows."""
    if found.low <= 0.0 <= found.high:
        return f"no difference can be told (95 % interval {found.low:.1f} to {found.high:.1f})"
    better = found.difference > 0
    low, high = (found.low, found.high) if better else (-found.high, -found.low)
    word = "better" if better else "worse"
    return (
        f"B is {word} by {abs(found.difference):.1f} points (95 % interval {low:.1f} to {high:.1f})"
    )


def curve_of(
    name: str, pts_seconds: Sequence[float], scores: Sequence[float], *, max_hold_seconds: float
) -> ScoreCurve:
    """A curve of frame scores; each stands until the next, at most ``max_hold_seconds``.

    Of several at one time the last counts. Raises :class:`SourceError` for fewer than two times.
    """
    timed = dict(zip(pts_seconds, scores, strict=True))
    begin = np.array(sorted(timed), np.float64)
    if len(begin) < 2:
        raise SourceError(f"{name} has {len(begin)} scores with a time; a comparison needs a video")
    period = float(np.median(np.diff(begin)))
    until = np.append(begin[1:], begin[-1] + period)
    end = np.minimum(until, begin + max_hold_seconds)
    score = np.array([timed[at] for at in begin.tolist()], np.float64)
    return ScoreCurve(name, begin, end, score, period)
