"""Whether scores fall as a picture gets worse, step by step, by kind of degradation."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import pairwise

TOLERANCE_POINTS = 0.5


@dataclass(frozen=True, slots=True)
class Rung:
    """One picture of a ladder: a content, degraded to a level."""

    content: str
    degradation: str
    level: int
    """Higher is worse."""
    score: float
    """0..100."""


@dataclass(frozen=True, slots=True)
class LadderOrder:
    """How scores follow the ladders of one degradation, or of several together."""

    degradation: str
    in_training: bool | None
    """False where this type took no part in training, None of both kinds together."""
    num_ladders: int
    num_steps: int
    share_falling: float
    """Share of neighbouring steps that rise by the tolerance at most."""
    mean_drop_points: float
    """From the mildest level to the worst."""


def ladder_order(
    rungs: Sequence[Rung],
    *,
    left_out: Collection[str] = (),
    tolerance_points: float = TOLERANCE_POINTS,
) -> list[LadderOrder]:
    """The order of each degradation, then of those in training, those left out, and all.

    ``left_out`` are the types that a leave-one-type-out model never saw. A ladder is the rungs of
    one content and one degradation; one rung alone is none. Raises ``ValueError`` where two rungs
    have one level, and for a left-out type that does not occur.
    """
    ladders = _ladders(rungs)
    unknown = set(left_out) - {kind for kind, _ in ladders}
    if unknown:
        raise ValueError(f"types left out of training have no ladder here: {sorted(unknown)}")
    by_kind: dict[str, list[list[float]]] = defaultdict(list)
    for (kind, _), scores in sorted(ladders.items()):
        by_kind[kind].append(scores)
    rows = [
        _order(kind, kind not in left_out, ladders_of_kind, tolerance_points)
        for kind, ladders_of_kind in by_kind.items()
    ]
    seen = [s for kind, many in by_kind.items() if kind not in left_out for s in many]
    unseen = [s for kind, many in by_kind.items() if kind in left_out for s in many]
    if seen and unseen:
        rows.append(_order("all in training", True, seen, tolerance_points))
        rows.append(_order("all left out", False, unseen, tolerance_points))
    if ladders:
        whole = None if seen and unseen else bool(seen)
        rows.append(_order("all", whole, [*seen, *unseen], tolerance_points))
    return rows


def _ladders(rungs: Sequence[Rung]) -> dict[tuple[str, str], list[float]]:
    """Scores from the mildest level on, by degradation and content."""
    levels: dict[tuple[str, str], dict[int, float]] = defaultdict(dict)
    for rung in rungs:
        found = levels[rung.degradation, rung.content]
        if rung.level in found:
            raise ValueError(
                f"two pictures of {rung.content}, {rung.degradation}, have level {rung.level}"
            )
        found[rung.level] = rung.score
    return {
        key: [scores[level] for level in sorted(scores)]
        for key, scores in levels.items()
        if len(scores) > 1
    }


def _order(
    name: str, in_training: bool | None, ladders: list[list[float]], tolerance: float
) -> LadderOrder:
    steps = [b - a for scores in ladders for a, b in pairwise(scores)]
    drops = [scores[0] - scores[-1] for scores in ladders]
    return LadderOrder(
        degradation=name,
        in_training=in_training,
        num_ladders=len(ladders),
        num_steps=len(steps),
        share_falling=sum(step <= tolerance for step in steps) / len(steps),
        mean_drop_points=sum(drops) / len(drops),
    )
