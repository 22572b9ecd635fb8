"""What a student is worth on pictures held back from training: the figures it is chosen by."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dgiqa_stream.correlation import srcc
from dgiqa_stream.errors import SourceError
from dgiqa_stream.preprocess import ViewSpec
from distill.compute import Compute
from distill.data.loader import (
    AnyRecord,
    Look,
    PictureSet,
    Views,
    ladders_of,
    read_ahead,
    stack,
    views_of,
)
from distill.data.training_data import TrainingData
from distill.models.student import Student
from distill.recipe import Recipe

_BATCH = 50
_FEWEST = 2
_TOLERANCE = 0.005


def tensors(views: Views) -> tuple[Tensor, Tensor]:
    """The two views as torch sees them, without a copy."""
    return torch.from_numpy(views["whole"]), torch.from_numpy(views["fragments"])


def mapped(
    function: Callable[[Tensor, Tensor], Tensor],
    pictures: PictureSet,
    records: Sequence[AnyRecord],
    views: Sequence[ViewSpec],
    *,
    compute: Compute | None = None,
    looks: dict[str, Look] | None = None,
) -> Tensor:
    """``function`` of the pictures' views, (N, ...) float32 on the CPU, without gradients.

    As served, or by the look that ``looks`` has for a record's name; NaN of pictures that cannot
    be read.
    """
    where = compute or Compute()
    blank: Views = {v.name: np.zeros(v.shape, np.uint8) for v in views}

    def cut(record: AnyRecord) -> tuple[Views, bool]:
        try:
            planes = pictures.planes(record)
        except SourceError:
            return blank, False
        return views_of(planes, views, looks[record.name] if looks else None), True

    def batch(i: int) -> tuple[Views, list[bool]]:
        cuts = [cut(r) for r in records[i * _BATCH : (i + 1) * _BATCH]]
        return stack([views for views, _ in cuts]), [is_read for _, is_read in cuts]

    out = []
    with torch.no_grad(), where.autocast():
        for made, is_read in read_ahead(batch, 0, math.ceil(len(records) / _BATCH)):
            whole, fragments = (view.to(where.device) for view in tensors(made))
            found = function(whole, fragments).float().cpu()
            found[~torch.tensor(is_read)] = torch.nan
            out.append(found)
    return torch.cat(out)


def predict(
    model: Student,
    pictures: PictureSet,
    records: Sequence[AnyRecord],
    views: Sequence[ViewSpec],
    *,
    compute: Compute | None = None,
) -> NDArray[np.float64]:
    """Quality in 0..1 of each picture as it is served, (N,); NaN of one that cannot be read."""
    was_training = model.training
    model.eval()
    found = mapped(model.logits, pictures, records, views, compute=compute)
    model.train(was_training)
    return torch.sigmoid(found).numpy().astype(np.float64)


def ladder_order(
    model: Student,
    pictures: PictureSet,
    views: Sequence[ViewSpec],
    *,
    compute: Compute | None = None,
) -> dict[str, float]:
    """Share of neighbouring levels that fall (tolerance 0.5 of 100), by degradation.

    Empty where the pictures have no content for validation.
    """
    steps: dict[str, list[bool]] = {}
    ladders = ladders_of(pictures.records, "validation")
    flat = [r for by_name in ladders.values() for ladder in by_name.values() for r in ladder]
    if not flat:
        return {}
    found = predict(model, pictures, flat, views, compute=compute)
    scores = dict(zip([r.name for r in flat], found, strict=True))
    for by_name in ladders.values():
        for name, ladder in by_name.items():
            read = [r for r in ladder if math.isfinite(scores[r.name])]
            falls = [scores[b.name] <= scores[a.name] + _TOLERANCE for a, b in pairwise(read)]
            steps.setdefault(name, []).extend(falls)
    return {
        name: float(np.mean(falls)) if falls else math.nan for name, falls in sorted(steps.items())
    }


@dataclass(frozen=True, slots=True, eq=False)
class Judged:
    """Pictures for validation with one kind of label."""

    name: str
    """Of the figure."""
    pictures: PictureSet
    records: list[AnyRecord]
    wanted: list[float]


class Validation:
    """Agreement on the pictures for validation; the first kind of label is chosen by.

    Human ratings where there are, else the teacher's scores, else pseudo-MOS. Raises ``ValueError``
    where there is none of them.
    """

    def __init__(self, data: TrainingData, recipe: Recipe, compute: Compute) -> None:
        self.data, self.views, self.compute = data, recipe.views, compute
        self.judged = _judged(data)
        if not self.judged:
            number = sum(r.split == "validation" for r in data.rated.records)
            raise ValueError(
                f"{data.rated.folder} holds {number} pictures for validation, "
                "2 is the least: raise num_validation and run `dgiqa-distill data` again, or give "
                "shards with some"
            )

    def agreement(self, model: Student) -> float:
        """SRCC to the labels that the best weights are chosen by."""
        return self._agreement(model, self.judged[0])

    def figures(self, model: Student) -> dict[str, float]:
        """SRCC to each kind of label, then the order of each degradation's ladders."""
        found = {judged.name: self._agreement(model, judged) for judged in self.judged}
        order = ladder_order(model, self.data.ladders, self.views, compute=self.compute)
        return {**found, **order}

    def names(self) -> tuple[str, ...]:
        """Of the figures of agreement."""
        return tuple(judged.name for judged in self.judged)

    def _agreement(self, model: Student, judged: Judged) -> float:
        found = predict(model, judged.pictures, judged.records, self.views, compute=self.compute)
        read = np.isfinite(found)
        if read.sum() < _FEWEST:
            if not all(bool(tensor.isfinite().all()) for tensor in model.state_dict().values()):
                raise FloatingPointError(
                    "the student's weights are no longer numbers: lower trunk_rate or head_rate "
                    "and train in another --run folder"
                )
            raise SourceError(
                f"{read.sum()} of {len(read)} pictures for validation in "
                f"{judged.pictures.folder} can be read, {_FEWEST} is the least: make them again"
            )
        return srcc(found[read], np.array(judged.wanted)[read])


def _judged(data: TrainingData) -> list[Judged]:
    rated = _held_back(data.rated)
    found = [_known("srcc", data.rated, rated, lambda r: r.mos)]
    if data.unrated is not None:
        unrated = _held_back(data.unrated)
        if data.labels is not None:
            told = data.labels.score
            found.append(_known("srcc_teacher", data.unrated, unrated, lambda r: told(r.name)))
            found.append(_known("srcc_teacher_rated", data.rated, rated, lambda r: told(r.name)))
        pseudo = _known("srcc_pseudo_mos", data.unrated, unrated, _pseudo_mos)
        found.append(pseudo)
    return [judged for judged in found if len(judged.records) >= _FEWEST]


def _held_back(pictures: PictureSet) -> list[AnyRecord]:
    return [r for r in pictures.records if r.split == "validation"]


def _pseudo_mos(record: AnyRecord) -> float | None:
    value: float | None = getattr(record, "pseudo_mos", None)
    return value


def _known(
    name: str,
    pictures: PictureSet,
    records: Sequence[AnyRecord],
    label: Callable[[AnyRecord], float | None],
) -> Judged:
    """The pictures that have a label."""
    pairs = [(r, value) for r in records if (value := label(r)) is not None]
    return Judged(name, pictures, [r for r, _ in pairs], [float(v) for _, v in pairs])
