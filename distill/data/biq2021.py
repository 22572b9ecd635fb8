"""BIQ2021 (Ahmed and Asif 2022): 12,000 pictures rated by about 30 people each, in a laboratory.

The official tables are ``Train (Images and MOS).csv`` (10,000) and ``Test (Images and MOS).csv``
(2,000), with names relative to ``Images/`` and MOS on 0..1, higher is better. A validation part is
held back from the official training part by a seeded draw; the test part chooses nothing.

The set has near-duplicate photographs under different names, and the draw knows names only: with
seed 1, 39 of the first 500 validation pictures have a twin in the training part (thumbnails of
16x16 correlate above 0.99), so SRCC on the validation part is flattered. The draw stays as it is
because the released student was chosen on it; ``twins_together`` draws twins as one.
"""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from distill.data.label_files import HOW_TO_GO_ON, Missing
from distill.say import say

TABLES = {"train": "Train (Images and MOS).csv", "test": "Test (Images and MOS).csv"}


@dataclass(frozen=True, slots=True)
class RatedPicture:
    """A picture and its human rating."""

    path: Path
    mos: float
    """0..1, 1 best."""
    split: str


def load_biq2021(
    root: Path,
    *,
    num_validation: int,
    seed: int,
    missing: Missing = "refuse",
    twins_together: bool = False,
) -> list[RatedPicture]:
    """Every picture of the set with its split: train, validation or test.

    With ``twins_together`` no twin of a validation picture is left in training: another draw, by
    :func:`distill.data.twins.draw_by_group`, for which every training picture is read.

    ``missing`` says what to do where a row has no file: stop, or go on without it and say so; no
    other picture changes its split. Raises ``FileNotFoundError`` naming the tables or how many
    pictures are missing, ``ValueError`` where a table cannot be right.
    """
    by_lower_name = {p.name.lower(): p for p in (root / "Images").glob("*")}
    rated: list[RatedPicture] = []
    absent: list[Path] = []
    for split, table in TABLES.items():
        for name, mos in _rows(root, table):
            path = by_lower_name.get(name.lower())  # one file is .JPG where the table says .jpg
            if path is None:
                path = root / "Images" / name
                absent.append(path)
            rated.append(RatedPicture(path, mos, split))
    if absent and (missing == "refuse" or len(absent) == len(rated)):
        raise FileNotFoundError(
            f"{len(absent)} pictures of BIQ2021 are missing in {root / 'Images'}, "
            f"first {absent[0].name!r}. {HOW_TO_GO_ON}"
        )
    [(most_named, times)] = Counter(r.path for r in rated).most_common(1) or [(root, 0)]
    if times > 1:
        raise ValueError(f"BIQ2021's tables name {most_named.name} {times} times: once is right")
    training = [i for i, r in enumerate(rated) if r.split == "train"]
    if num_validation >= len(training):
        raise ValueError(
            f"num_validation {num_validation} leaves nothing of {len(training)} training pictures: "
            "lower it in the recipe, or by --num-validation where there is none"
        )
    if twins_together:
        held_back = _drawn_by_twins(rated, training, num_validation, seed)
    else:
        rng = np.random.default_rng(seed)
        held_back = rng.choice(training, num_validation, replace=False).tolist()
    for i in held_back:
        rated[i] = RatedPicture(rated[i].path, rated[i].mos, "validation")
    if absent:  # after the draw: it knows no gaps
        say(f"{len(absent)} pictures of BIQ2021 have no file and are left out: {absent[0].name} …")
    gone = set(absent)
    return [picture for picture in rated if picture.path not in gone]


def _drawn_by_twins(
    rated: Sequence[RatedPicture], training: Sequence[int], number: int, seed: int
) -> list[int]:
    """The training pictures to hold back, each with its twins."""
    from distill.data.twins import draw_by_group, thumbnails_of_files, twin_groups

    groups = twin_groups(thumbnails_of_files([rated[i].path for i in training]))
    return [training[place] for place in sorted(draw_by_group(groups.tolist(), number, seed=seed))]


def _rows(root: Path, table: str) -> Iterator[tuple[str, float]]:
    """Name and MOS of every row of a table."""
    if not (root / table).is_file():
        raise FileNotFoundError(f"BIQ2021 needs {table!r} in {root}: it is not there")
    with (root / table).open(newline="", encoding="utf-8-sig") as rows:
        for number, row in enumerate(csv.DictReader(rows), 2):
            try:
                name, mos = row["Image Name"].strip(), float(row["MOS"])
            except (KeyError, TypeError, AttributeError, ValueError) as exc:
                raise ValueError(
                    f"{table}, line {number}: no 'Image Name' and 'MOS' in {row}"
                ) from exc
            if not 0.0 <= mos <= 1.0:
                raise ValueError(f"{table}: MOS {mos} of {name} is outside 0..1")
            yield name, mos
