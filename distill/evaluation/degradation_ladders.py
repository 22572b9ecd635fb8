"""Ladders of every kind of damage on unseen contents; kinds that training left out apart."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dgiqa_stream.errors import ConfigError
from dgiqa_stream.scorer import Scorer
from distill.data.degradations import DEGRADATIONS, ladder
from distill.data.packed import as_planes_420
from distill.evaluation.falling import FallingSteps, falling_steps, together
from distill.evaluation.unseen import UnseenPicture, read_unseen, scores_of

Scores = dict[str, dict[str, list[float]]]
"""Kind to content to the scores of its ladder, clean first."""


@dataclass(frozen=True, slots=True)
class DegradationLadders:
    """Ladders of each kind, then of those seen in training, those left out, and all."""

    by_kind: Mapping[str, FallingSteps]
    seen: FallingSteps | None
    unseen: FallingSteps | None
    all: FallingSteps
    scores: Scores


def picture_kinds() -> list[str]:
    """The degradations that a single picture can have, of :data:`DEGRADATIONS`."""
    return [name for name, kind in DEGRADATIONS.items() if kind.kind != "timing"]


def degradation_scores(
    scorer: Scorer,
    paths: Sequence[Path],
    *,
    kinds: Sequence[str],
    contents_per_kind: int,
    seed: int = 0,
    on_content: Callable[[str], None] = lambda name: None,
) -> Scores:
    """The scores of each kind's ladders, on ``contents_per_kind`` pictures for each kind.

    Kinds take turns with the pictures, so that all of them are used. Raises ``ConfigError`` for a
    kind that does not exist or that only a clip can have.
    """
    refuse_unknown(kinds, among=picture_kinds())
    places = {
        kind: set(places_of_kind(i, contents_per_kind, len(paths))) for i, kind in enumerate(kinds)
    }
    scores: Scores = {kind: {} for kind in kinds}
    for place, path in enumerate(paths):
        picture = read_unseen(path)
        on_content(picture.name)
        for kind in kinds:
            if place in places[kind]:
                scores[kind][picture.name] = _scores(scorer, picture, kind, seed)
    return scores


def places_of_kind(index: int, number: int, num_contents: int) -> list[int]:
    """Which contents the kind of an index takes: so many, evenly spaced, another start for each."""
    number = min(number, num_contents)
    return sorted((index + k * num_contents // number) % num_contents for k in range(number))


def _scores(scorer: Scorer, picture: UnseenPicture, kind: str, seed: int) -> list[float]:
    levels = ladder(kind, picture.rgb, seed=seed, content=picture.name)
    return scores_of(scorer, [as_planes_420(rgb) for rgb in (picture.rgb, *levels)])


def sum_up_degradations(scores: Scores, *, left_out: Collection[str] = ()) -> DegradationLadders:
    """Shares of falling steps by kind and over kinds; ``left_out`` are unseen in training.

    Raises ``ConfigError`` for a kind left out of training that is none of these.
    """
    refuse_unknown(left_out, among=scores)
    seen = [ladders for kind, ladders in scores.items() if kind not in left_out]
    unseen = [ladders for kind, ladders in scores.items() if kind in left_out]
    return DegradationLadders(
        by_kind={
            kind: falling_steps(together([ladders]), in_training=kind not in left_out)
            for kind, ladders in scores.items()
        },
        seen=falling_steps(together(seen), in_training=True) if seen else None,
        unseen=falling_steps(together(unseen), in_training=False) if unseen else None,
        all=falling_steps(together([*seen, *unseen])),
        scores=scores,
    )


def refuse_unknown(kinds: Collection[str], *, among: Collection[str]) -> None:
    """Raise ``ConfigError`` where a kind (or section) is none of those, and name both."""
    strange = sorted(set(kinds) - set(among))
    if strange:
        raise ConfigError(f"there is no {', '.join(strange)} here; known: {', '.join(among)}")


def left_out_of_training(history: Sequence[Mapping[str, Any]]) -> list[str]:
    """The kinds that every training step of a manifest's history left out of its data."""
    trained = [step["recipe"] for step in history if isinstance(step.get("recipe"), dict)]
    left_out = [set(recipe.get("data", {}).get("leave_out", ())) for recipe in trained]
    return sorted(set.intersection(*left_out)) if left_out else []
