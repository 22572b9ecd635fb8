"""Makes the batches of a training run, each from its number alone, in any thread or process."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dgiqa_stream.errors import SourceError
from distill.data.batch import NO_LADDER, Batch
from distill.data.degradations import degradation
from distill.data.leave_out import kinds_of
from distill.data.loader import (
    AnyRecord,
    Draw,
    EpochDraws,
    LadderDraws,
    PictureSet,
    Views,
    stack,
    views_of,
)
from distill.data.shards import LeftOut
from distill.data.training_data import TrainingData
from distill.recipe import Recipe


class BatchMaker:
    """Batch ``number`` of a run: rated pictures, ladders, then unrated ones.

    A picture that cannot be read leaves a blank place that counts nothing, its ladder with it.
    Raises ``ValueError`` where the data lacks what the recipe asks for.
    """

    def __init__(self, data: TrainingData, recipe: Recipe) -> None:
        self.data, self.views = data, recipe.views
        config = recipe.train
        fragments = next(v for v in recipe.views if v.kind == "fragments")
        self._contents = data.numbered_contents()
        self._order_only = {degradation(name).name for name in recipe.losses.order_only}
        common: dict[str, Any] = {"seed": config.seed, "smallest_crop": config.smallest_crop}
        rated = [r for r in data.rated.records if r.split == "train"]
        unrated = [r for r in data.unrated.records if r.split == "train"] if data.unrated else []
        if not rated and not (unrated and config.unrated_batch):
            raise ValueError(f"{data.rated.folder} holds no training pictures")
        self._rated = (
            EpochDraws(rated, fragments, batch=config.rated_batch, **common) if rated else None
        )
        self._unrated: EpochDraws | None = None
        if unrated and config.unrated_batch:
            size = config.unrated_batch
            self._unrated = EpochDraws(
                unrated, fragments, batch=size, order_key=(17,), look_key=(19,), **common
            )
        groups, levels = config.ladder_groups, config.ladder_levels
        self._ladders: LadderDraws | None = None
        if config.ladder_weight or data.unrated is None:
            self._ladders = LadderDraws(
                data.ladders,
                fragments,
                groups=groups,
                levels=levels,
                mixed=config.mixed_ladders,
                from_clean=config.ladders_from_clean,
                **common,
            )

    def per_epoch(self) -> int:
        """Batches in one pass over the rated pictures, or over the others where none is rated."""
        passes = self._rated or self._unrated
        assert passes is not None
        return passes.steps_per_epoch()

    def __call__(self, number: int) -> Batch[NDArray[Any]]:
        """The batch of a number, from 0."""
        parts: list[tuple[PictureSet, list[Draw]]] = []
        for pictures, draws in (
            (self.data.rated, self._rated),
            (self.data.ladders, self._ladders),
            (self.data.unrated, self._unrated),
        ):
            if pictures is not None and draws is not None:
                parts.append((pictures, draws(number)))
        drawn = [draw for _, draws in parts for draw in draws]
        cuts, left_out = self._cut(parts)
        return self._told(drawn, cuts, left_out)

    def _cut(
        self, parts: Sequence[tuple[PictureSet, list[Draw]]]
    ) -> tuple[list[Views | None], list[LeftOut]]:
        """The views of every draw, None of those that cannot be read."""
        cuts: list[Views | None] = []
        left_out: list[LeftOut] = []
        for pictures, draw in _flat(parts):
            try:
                planes = pictures.planes(draw.record)
            except SourceError as exc:
                left_out.append(LeftOut(draw.record.name, str(exc)))
                cuts.append(None)
            else:
                cuts.append(views_of(planes, self.views, draw.look))
        return cuts, left_out

    def _told(
        self, drawn: Sequence[Draw], cuts: Sequence[Views | None], left_out: Sequence[LeftOut]
    ) -> Batch[NDArray[Any]]:
        blank = {v.name: np.zeros(v.shape, np.uint8) for v in self.views}
        is_read = [cut is not None for cut in cuts]
        broken = {d.ladder for d, ok in zip(drawn, is_read, strict=True) if not ok}
        ladders = [NO_LADDER if d.ladder in broken else d.ladder for d in drawn]
        records = [d.record if ok else None for d, ok in zip(drawn, is_read, strict=True)]
        known = [getattr(r, "pseudo_mos", None) for r in records]
        trust = [self._confidence(r) for r in records]
        batch: Batch[NDArray[Any]] = Batch(
            views=stack([cut or blank for cut in cuts]),
            mos=_numbers([None if r is None else r.mos for r in records]),
            pseudo_mos=_numbers(known),
            confidence=np.nan_to_num(_numbers(trust)),
            contents=np.array([self._contents[d.record.content] for d in drawn], np.int64),
            ladders=np.array(ladders, np.int64),
            levels=np.array([d.record.level or 0 if d.is_level else 0 for d in drawn], np.int64),
            num_ladders=len(set(ladders) - {NO_LADDER}),
            left_out=tuple(left_out),
        )
        if self.data.labels is None:
            return batch
        targets = self.data.labels.targets(drawn)
        targets.crop_scores[~np.array(is_read)] = np.nan
        return batch.with_teacher(targets)

    def _confidence(self, record: AnyRecord | None) -> float | None:
        """Of the picture's pseudo-MOS."""
        if record is None or not self._order_only.isdisjoint(kinds_of(record)):
            return None
        return getattr(record, "confidence", None)


def _flat(parts: Sequence[tuple[PictureSet, list[Draw]]]) -> Iterator[tuple[PictureSet, Draw]]:
    for pictures, draws in parts:
        for draw in draws:
            yield pictures, draw


def _numbers(values: Sequence[float | None]) -> NDArray[np.float32]:
    """NaN where nothing is known."""
    return np.array([np.nan if v is None else v for v in values], np.float32)
