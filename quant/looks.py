"""The looks that heads are fitted on: rounds of the rated pictures, then ladders.

Only commands import this module, as it joins training pictures to compression.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from dgiqa_stream.preprocess import ViewSpec
from distill.data.degradations import degradation
from distill.data.leave_out import kinds_of, without_kinds
from distill.data.loader import (
    AnyRecord,
    Look,
    PictureSet,
    ladders_of,
    random_look,
    read_ahead,
    stack,
    views_of,
)
from distill.data.training_data import TrainingData
from distill.data.twins import without_twins
from distill.say import say
from quant.calibration import Views
from quant.head import HeadConfig, Labels

_BATCH = 8


@dataclass(frozen=True, slots=True, eq=False)
class Looks:
    """Pictures with how each is looked at, and what is known of it, in one order."""

    drawn: Sequence[tuple[PictureSet, AnyRecord, Look | None]]
    labels: Labels
    views: Sequence[ViewSpec]

    def contents(self) -> list[str]:
        """The scene that each shows."""
        return [record.content for _, record, _ in self.drawn]

    def batches(self) -> Iterator[Views]:
        """Views of all, read ahead of who asks for them."""
        return read_ahead(self._batch, 0, math.ceil(len(self.drawn) / _BATCH))

    def _batch(self, number: int) -> Views:
        if number % 50 == 0:
            say(f"{number * _BATCH} of {len(self.drawn)} looks")
        part = self.drawn[number * _BATCH : (number + 1) * _BATCH]
        return stack([views_of(pack.planes(r), self.views, look) for pack, r, look in part])


def looks_at(data: TrainingData, views: Sequence[ViewSpec], settings: HeadConfig) -> Looks:
    """The looks that settings ask for; the same of the same data.

    Raises :class:`ConfigError` for a kind to leave out that no picture has.
    """
    if settings.without_twins:
        data = without_twins(data)
    data = without_kinds(data, settings.leave_out)
    fragments = next(v for v in views if v.kind == "fragments")
    rng = np.random.default_rng(settings.seed)
    rated, degraded = data.rated, data.ladders
    pictures = [r for r in rated.records if r.split == "train"]
    looks: list[tuple[PictureSet, AnyRecord, Look | None]] = [(rated, r, None) for r in pictures]
    for _ in range(1, settings.num_looks):
        looks += [(rated, r, random_look(rng, settings.smallest_crop, fragments)) for r in pictures]
    ladder, level = [-1] * len(looks), [0] * len(looks)
    by_content = ladders_of(degraded.records, "train")
    ladders = [found for by_name in by_content.values() for found in by_name.values()]
    for number, chosen in enumerate(rng.permutation(len(ladders))[: settings.num_ladders]):
        looks += [(degraded, record, None) for record in ladders[chosen]]
        ladder += [number] * len(ladders[chosen])
        level += [record.level or 0 for record in ladders[chosen]]
    mos = [np.nan if r.mos is None else r.mos for _, r, _ in looks]
    unsure = {degradation(name).name for name in settings.order_only}
    pseudo = [
        np.nan if ladder[i] < 0 or kinds_of(r) & unsure else _pseudo_mos(r)
        for i, (_, r, _) in enumerate(looks)
    ]
    labels = Labels(
        np.array(mos, np.float32),
        np.array(ladder),
        np.array(level),
        np.array(pseudo, np.float32),
    )
    return Looks(looks, labels, views)


def _pseudo_mos(record: AnyRecord) -> float:
    value = getattr(record, "pseudo_mos", None)
    return math.nan if value is None else float(value)
