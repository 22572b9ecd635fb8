"""Agreement with people and order on ladders, of several models on the same pictures of packs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from dgiqa_stream.correlation import srcc
from dgiqa_stream.errors import SourceError
from distill.data.loader import AnyRecord, PictureSet, ladders_of
from distill.data.training_data import open_packs
from distill.evaluation.agreement import FEWEST_PICTURES, compare, estimate
from distill.evaluation.ladders import TOLERANCE_POINTS
from distill.evaluation.pictures import rounded
from distill.evaluation.shares import share_over_contents
from quant.proof.agreement import Scores
from quant.proof.artefacts import NamedPicture
from quant.proof.commands.pictures import SPLIT, drawn


@dataclass(frozen=True, slots=True, eq=False)
class RatedPictures:
    """Rated pictures and whole ladders of the validation split, in one order."""

    rated: PictureSet
    rated_records: Sequence[AnyRecord]
    degraded: PictureSet
    ladders: Sequence[tuple[str, Sequence[AnyRecord]]]
    """Content, and its pictures from the mildest on."""

    def __iter__(self) -> Iterator[NamedPicture]:
        """Names and pictures: the rated ones first, then ladder after ladder."""
        for record in self.rated_records:
            yield f"rated/{record.name}", self.rated.planes(record)
        for _, ladder in self.ladders:
            for record in ladder:
                yield f"ladders/{record.name}", self.degraded.planes(record)

    @property
    def mos(self) -> Scores:
        """Ratings on 0..100 of the rated ones."""
        return np.array([100 * (r.mos or 0.0) for r in self.rated_records])

    def of_ladders(self, scores: Scores) -> list[tuple[str, list[float]]]:
        """Content and scores from the mildest on, of each ladder."""
        found, begin = [], len(self.rated_records)
        for content, ladder in self.ladders:
            found.append((content, [float(x) for x in scores[begin : begin + len(ladder)]]))
            begin += len(ladder)
        return found


def rated_pictures(packs: Path, *, num_rated: int, num_ladders: int) -> RatedPictures:
    """A seeded draw of packs; raises :class:`SourceError` where there is too little to judge on."""
    data = open_packs(packs)
    rated = [r for r in data.rated.records if r.split == SPLIT and r.mos is not None]
    by_content = ladders_of(data.ladders.records, SPLIT)
    ladders = [
        (content, ladder)
        for content, by_name in sorted(by_content.items())
        for _, ladder in sorted(by_name.items())
        if len(ladder) > 1
    ]
    if len(rated) < FEWEST_PICTURES or num_rated < FEWEST_PICTURES:
        raise SourceError(
            f"{packs} has {len(rated)} rated {SPLIT} pictures, of which {num_rated} are asked for: "
            f"{FEWEST_PICTURES} are the fewest to judge on"
        )
    chosen = [ladders[i] for i in drawn(range(len(ladders)), num_ladders)]
    return RatedPictures(data.rated, drawn(rated, num_rated), data.ladders, chosen)


def mos_figures(reference: Scores, scores: Scores, mos: Scores) -> dict[str, Any]:
    """SRCC with MOS, and how it differs from the reference's; all (N,).

    Intervals are 95 %, over draws of pictures which both models see.
    """
    found = compare(scores, reference, mos)
    return {
        "num_pictures": len(mos),
        "srcc": rounded(asdict(estimate(srcc, scores, mos))),
        "difference": rounded(asdict(found.srcc)),
        "p_value": rounded(found.p_value),
    }


def ladder_figures(
    reference: list[tuple[str, list[float]]], found: list[tuple[str, list[float]]]
) -> dict[str, Any] | None:
    """Steps that fall, and of those that fall in the reference how many still do.

    None where there are no ladders. A step falls where it rises by 0.5 point at most.
    """
    if not found:
        return None
    falling: dict[str, list[bool]] = {}
    kept: dict[str, list[bool]] = {}
    for (content, before), (_, after) in zip(reference, found, strict=True):
        was, now = _falls(before), _falls(after)
        falling.setdefault(content, []).extend(now)
        kept.setdefault(content, []).extend(n for w, n in zip(was, now, strict=True) if w)
    held = [outcomes for outcomes in kept.values() if outcomes]
    return {
        "num_ladders": len(found),
        "tolerance_points": TOLERANCE_POINTS,
        "falling": rounded(asdict(share_over_contents(list(falling.values())))),
        "kept": rounded(asdict(share_over_contents(held))) if held else None,
    }


def _falls(scores: Sequence[float]) -> list[bool]:
    return [b - a <= TOLERANCE_POINTS for a, b in pairwise(scores)]
