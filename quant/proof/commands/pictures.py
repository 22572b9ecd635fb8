"""Real pictures that a command is given: a folder's, or those of packs that no training saw."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dgiqa_stream.errors import ConfigError, SourceError
from distill.data.build import read_named
from distill.data.packed import Pack
from quant.proof.artefacts import NamedPicture

SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})
SPLIT = "validation"


def pictures_of_folder(folder: Path) -> Iterator[NamedPicture]:
    """Every picture file of a folder, in the order of their names.

    Raises :class:`SourceError` for a folder without any, and for a file that cannot be read.
    """
    if not folder.is_dir():
        raise SourceError(f"no folder {folder}: give one of pictures")
    paths = sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES)
    if not paths:
        raise SourceError(f"{folder} has no picture: {', '.join(sorted(SUFFIXES))} are known")
    for path in paths:
        yield path.name, read_named(path)


def drawn(records: Sequence[Any], number: int, *, seed: int = 1) -> list[Any]:
    """A seeded draw of records in their order; all of them where they are fewer."""
    rng = np.random.default_rng(seed)
    picks = rng.choice(len(records), min(number, len(records)), replace=False)
    return [records[i] for i in sorted(picks)]


def pictures_of_packs(packs: Path, number: int) -> Iterator[NamedPicture]:
    """Pictures of the validation split, half of them rated and half of ladders.

    Raises :class:`SourceError` for packs that are missing or damaged, and for a split that is
    empty.
    """
    if number < 1:
        raise ConfigError(f"{number} pictures: one is the fewest")
    for name in ("rated", "ladders"):
        pack = Pack(packs / name)
        records = [r for r in pack.records if r.split == SPLIT]
        if not records:
            raise SourceError(f"{pack.folder} has no {SPLIT} picture: make the packs again")
        for record in drawn(records, (number + 1) // 2):
            yield f"{name}/{record.name}", pack.planes(record)
