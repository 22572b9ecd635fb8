"""Training without some kinds of damage: what a student makes of them then says how it generalises.

Leave-one-degradation-out: train with ``leave_out`` in the recipe, then ``dgiqa-distill judge
robustness``, which finds the kinds in the model's manifest and sums them up apart.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection

from dgiqa_stream.errors import ConfigError
from distill.data.loader import AnyRecord, PictureSet
from distill.data.training_data import TrainingData
from distill.data.twins import SomePictures


def without_kinds(data: TrainingData, kinds: Collection[str]) -> TrainingData:
    """The data less ladders and unrated pictures of some degradations, in every split.

    A chain goes with any of its steps. Rated pictures stay. With no kind the data come back as they
    are, so that runs begun before go on. Raises :class:`ConfigError` for a kind that no picture
    has: a misspelt one would be trained on.
    """
    if not kinds:
        return data
    parts = [data.ladders, *([data.unrated] if data.unrated else [])]
    known = {kind for part in parts for record in part.records for kind in kinds_of(record)}
    strange = sorted(set(kinds) - known)
    if strange:
        raise ConfigError(
            f"data.leave_out names {', '.join(strange)}, and no picture here has it; known: "
            f"{', '.join(sorted(known))}"
        )
    return dataclasses.replace(
        data,
        ladders=_without(data.ladders, kinds),
        unrated=None if data.unrated is None else _without(data.unrated, kinds),
        identity=f"{data.identity} without {', '.join(sorted(set(kinds)))}".strip(),
    )


def kinds_of(record: AnyRecord) -> set[str]:
    """The degradations of a picture: none of a clean one, both of ``haze:3+h264:5``."""
    steps = record.degradation.split("+")
    return {name for step in steps if (name := step.partition(":")[0]) not in ("", "clean")}


def _without(pictures: PictureSet, kinds: Collection[str]) -> SomePictures:
    return SomePictures(pictures, [r for r in pictures.records if kinds_of(r).isdisjoint(kinds)])
