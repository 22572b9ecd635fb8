"""Whether a model says of strange pictures that it does not know their kind, and only of those."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from dgiqa_stream.scorer import Prediction, Scorer, planes_of_rgb
from dgiqa_stream.types import Planes
from distill.data.build import content_split, read_named
from distill.evaluation.shares import Share, wilson
from distill.evaluation.strange_pictures import STRANGE

_BATCH = 8


@dataclass(frozen=True, slots=True)
class Flagged:
    """How many pictures of one group are flagged as out of the model's domain."""

    num_pictures: int
    flagged: Share | None
    """None where the model has no flag."""
    mean_score: float
    lowest_score: float
    highest_score: float


@dataclass(frozen=True, slots=True)
class Familiarity:
    """Groups of pictures that were made or found, and those that training may have degraded."""

    groups: Mapping[str, Flagged]
    screens_in_training: list[str]
    """Screens whose name puts them into the training split: that one knows them is no surprise."""


def has_flag(scorer: Scorer) -> bool:
    """Whether the model tells pictures that it does not know."""
    return scorer.manifest.domain is not None


def judge_familiarity(
    scorer: Scorer, *, screens: Sequence[Path] = (), photographs: Sequence[Path] = (), seed: int = 0
) -> Familiarity:
    """Flags and scores of every group of :data:`STRANGE`, of screens and of unseen photographs."""
    given = {"screens": screens, "photographs": photographs}
    found: dict[str, Iterable[Planes]] = {
        name: map(planes_of_rgb, make(seed)) for name, make in STRANGE.items()
    }
    found |= {name: map(read_named, paths) for name, paths in given.items() if paths}
    return Familiarity(
        groups={
            name: flagged_of(predictions(scorer, pictures), has_flag=has_flag(scorer))
            for name, pictures in found.items()
        },
        screens_in_training=[p.stem for p in screens if content_split(p.name) == "train"],
    )


def screen_paths(folders: Sequence[Path]) -> list[Path]:
    """GB82's screens: its photographs end in ``-lossless``."""
    found = (path for folder in folders for path in sorted(folder.glob("gb82_*")))
    return [path for path in found if not path.stem.endswith("-lossless")]


def predictions(scorer: Scorer, pictures: Iterable[Planes]) -> Iterator[Prediction]:
    """What the model says of each; only a few pictures are held at a time."""
    waiting = iter(pictures)
    while batch := list(islice(waiting, _BATCH)):
        yield from scorer.predict(batch)


def flagged_of(found: Iterable[Prediction], *, has_flag: bool) -> Flagged:
    """The share of pictures that are flagged; raises ``ValueError`` where there is none."""
    kept = list(found)
    if not kept:
        raise ValueError("a group without pictures has no share of flagged ones")
    scores = [p.score for p in kept]
    return Flagged(
        num_pictures=len(kept),
        flagged=wilson(sum(not p.in_domain for p in kept), len(kept)) if has_flag else None,
        mean_score=float(np.mean(scores)),
        lowest_score=min(scores),
        highest_score=max(scores),
    )
