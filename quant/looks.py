"""The looks that heads are fitted on: rounds of the rated pictures, then ladders.

Only commands import this module, as it joins training pictures to compression.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray

from dgiqa_stream.errors import ConfigError
from dgiqa_stream.manifest import LoadedModel
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
from quant.correction import outputs_of
from quant.head import (
    Features,
    HeadConfig,
    Labels,
    features_of,
    load_features,
    logits_of,
    origin_of,
    save_features,
)
from quant.proof.figures import read_graph

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

    def of_ladders(self, views: Sequence[ViewSpec]) -> Looks:
        """Those at pictures of ladders, in other views."""
        at = np.flatnonzero(self.labels.ladder >= 0)
        return Looks([self.drawn[i] for i in at.tolist()], self.labels.at(at), views)

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
    share = [
        0.0 if ladder[i] < 0 or kinds_of(r) & unsure else _share(r, settings)
        for i, (_, r, _) in enumerate(looks)
    ]
    pseudo = [
        _pseudo_mos(r) if part else np.nan for (_, r, _), part in zip(looks, share, strict=True)
    ]
    labels = Labels(
        np.array(mos, np.float32),
        np.array(ladder),
        np.array(level),
        np.array(pseudo, np.float32),
        np.array(share, np.float32),
    )
    return Looks(looks, labels, views)


def _share(record: AnyRecord, settings: HeadConfig) -> float:
    """How much pseudo-MOS says of a picture's fall, by its size."""
    is_large = max(record.height, record.width) >= settings.pseudo_mos_from_px
    return 1.0 if is_large else settings.pseudo_mos_share


def _pseudo_mos(record: AnyRecord) -> float:
    """NaN where a picture has none."""
    value = getattr(record, "pseudo_mos", None)
    return math.nan if value is None else float(value)


def features_at(
    looks: Looks, reference: onnx.ModelProto, quantised: onnx.ModelProto, *, cache: Path | None
) -> Features:
    """What the heads of a float graph and of its INT8 graph read of each look.

    ``cache``: a ``.npz`` to keep them in, or to take them from; :class:`ConfigError` where it has
    those of other looks, models or views, or its folder is not there.
    """
    if cache is None:
        return features_of(reference, quantised, looks.batches(), looks.labels)
    if not cache.parent.is_dir():
        raise ConfigError(f"--cache {cache}: {cache.parent} is no folder: make it first")
    origin = origin_of(reference, quantised, looks.views)
    if cache.is_file():
        features = load_features(cache, origin=origin)
        _check_labels(features.labels, looks.labels, cache)
        return features
    features = features_of(reference, quantised, looks.batches(), looks.labels)
    save_features(features, cache, origin=origin)
    return features


def _check_labels(found: Labels, wanted: Labels, cache: Path) -> None:
    """Refuse features of other looks."""
    for field in fields(Labels):
        a, b = getattr(found, field.name), getattr(wanted, field.name)
        if a.shape != b.shape or not np.array_equal(a, b, equal_nan=True):
            raise ConfigError(
                f"{cache.name} has features of {len(found.mos)} looks that are not the "
                f"{len(wanted.mos)} of these packs, shards and [head] settings: give those that "
                "`refit` had, or another --cache"
            )


def logits_on_ladders(student: LoadedModel, looks: Looks) -> NDArray[np.float64]:
    """Logits (N,) that a student's .onnx gives the pictures of ladders, in its own views; NaN else.

    Raises :class:`ModelError` where the file holds no graph.
    """
    degraded = looks.of_ladders(student.manifest.preprocess.views)
    logits = np.full(len(looks.drawn), np.nan)
    if degraded.drawn:
        said = outputs_of(read_graph(student), student.manifest.output.name, degraded.batches())
        logits[looks.labels.ladder >= 0] = logits_of(said[:, 0])
    return logits
