"""Whether scores fall from step to step of ladders, with intervals over contents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from distill.evaluation.agreement import Estimate, estimate
from distill.evaluation.ladders import TOLERANCE_POINTS
from distill.evaluation.shares import Share, share_over_contents

Ladders = Mapping[str, Sequence[Sequence[float]]]
"""Content to its ladders, each the scores from clean to the worst level."""


@dataclass(frozen=True, slots=True)
class FallingSteps:
    """How scores follow the ladders of one kind, or of several together."""

    in_training: bool | None
    """False where training never saw this kind; None of seen and unseen kinds together."""
    num_contents: int
    num_ladders: int
    num_steps: int
    share_falling: Share
    """Of neighbouring steps, those that rise by the tolerance at most."""
    falling_by_step: list[float]
    """The same share of each step, the one from the clean picture first; empty for several kinds.
    """
    drop_points: Estimate
    """From the clean picture to the worst level, in the mean over ladders."""


def falling_steps(
    ladders: Ladders,
    *,
    in_training: bool | None = None,
    tolerance_points: float = TOLERANCE_POINTS,
) -> FallingSteps:
    """The share of falling steps over all ladders, and how far the score falls in all."""
    outcomes = {
        content: [[b - a <= tolerance_points for a, b in pairwise(ladder)] for ladder in several]
        for content, several in ladders.items()
    }
    every = [ladder for several in outcomes.values() for ladder in several]
    drops = [float(np.mean([ladder[0] - ladder[-1] for ladder in s])) for s in ladders.values()]
    is_one_kind = len(every) == len(outcomes) and len({len(ladder) for ladder in every}) == 1
    return FallingSteps(
        in_training=in_training,
        num_contents=len(outcomes),
        num_ladders=len(every),
        num_steps=sum(map(len, every)),
        share_falling=share_over_contents(
            [[step for ladder in several for step in ladder] for several in outcomes.values()]
        ),
        falling_by_step=np.mean(every, axis=0).tolist() if is_one_kind else [],
        drop_points=estimate(np.mean, drops),
    )


def together(kinds: Sequence[Mapping[str, Sequence[float]]]) -> dict[str, list[Sequence[float]]]:
    """Content to its ladders of all kinds, from each kind's content to its one ladder."""
    found: dict[str, list[Sequence[float]]] = {}
    for by_content in kinds:
        for content, ladder in by_content.items():
            found.setdefault(content, []).append(ladder)
    return found
