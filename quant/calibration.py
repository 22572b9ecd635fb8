"""The pictures INT8 ranges are measured on: rated, degraded, black, noise and letterboxed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, overload

import msgspec
import numpy as np
from numpy.typing import NDArray

from dgiqa_stream.preprocess import ViewSpec, cut_view
from dgiqa_stream.types import Planes

if TYPE_CHECKING:
    from distill.data.loader import PictureSet

Views = dict[str, NDArray[np.uint8]]


class CalibrationConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How many pictures of each kind; saved in the artefact's manifest."""

    num_rated: int = 160
    num_degraded: int = 160
    num_noise: int = 2
    num_letterboxed: int = 8
    seed: int = 1
    version: int = 1


def views_batch(planes: Planes, views: Sequence[ViewSpec]) -> Views:
    """One picture as a batch of one."""
    return {view.name: cut_view(planes, view)[None] for view in views}


def synthetic(config: CalibrationConfig, views: Sequence[ViewSpec]) -> list[Views]:
    """Black, white and noise: what real streams send when something is wrong."""
    rng = np.random.default_rng(config.seed)
    flat = [np.full((512, 512, 3), value, np.uint8) for value in (0, 255)]
    noise = [rng.integers(0, 256, (512, 512, 3), dtype=np.uint8) for _ in range(config.num_noise)]
    return [views_batch(Planes((rgb,), full_range=True), views) for rgb in flat + noise]


def letterboxed(planes: Planes) -> Planes:
    """The picture with black bars over its upper and lower eighth."""
    luma, cb, cr = (plane.copy() for plane in planes.samples)
    for plane, black in ((luma, 0), (cb, 128), (cr, 128)):
        bar = len(plane) // 8
        plane[:bar] = black
        plane[-bar:] = black
    return dataclasses.replace(planes, samples=(luma, cb, cr))


def calibration_set(
    config: CalibrationConfig,
    views: Sequence[ViewSpec],
    *,
    rated: Sequence[Planes],
    degraded: Sequence[Planes],
) -> list[Views]:
    """Batches of one picture: a seeded draw of each kind, and the synthetic ones.

    Of the sequences only what is drawn is read.

    Raises ``ValueError`` where there is no real picture to measure ranges on.
    """
    if not rated or not degraded:
        raise ValueError(
            f"calibration needs real pictures: got {len(rated)} rated, {len(degraded)} degraded"
        )
    rng = np.random.default_rng(config.seed)
    chosen: list[Planes] = []
    for pictures, number in ((rated, config.num_rated), (degraded, config.num_degraded)):
        picks = rng.choice(len(pictures), min(number, len(pictures)), replace=False)
        chosen += [pictures[i] for i in picks]
    first = range(min(config.num_letterboxed, len(rated)))
    chosen += [letterboxed(rated[i]) for i in first]
    return [views_batch(p, views) for p in chosen] + synthetic(config, views)


def training_batches(
    views: Sequence[ViewSpec],
    *,
    rated: Sequence[Planes],
    degraded: Sequence[Planes],
    batch: int,
    seed: int,
) -> Callable[[int], Views]:
    """Gives the views of a step: pictures drawn of both kinds in turn, by seed and step alone.

    Every other step ends by a black, a white or a noise picture.
    """
    strange = synthetic(CalibrationConfig(seed=seed), views)

    def of_step(step: int) -> Views:
        rng = np.random.default_rng([seed, step])
        kinds = [(rated, degraded)[i % 2] for i in range(batch)]
        parts = [views_batch(kind[int(rng.integers(len(kind)))], views) for kind in kinds]
        if step % 2:
            parts[-1] = strange[step // 2 % len(strange)]
        return {view.name: np.concatenate([p[view.name] for p in parts]) for view in views}

    return of_step


class TrainingPlanes(Sequence[Planes]):
    """The planes of a set's training pictures, each read when it is asked for."""

    def __init__(self, pictures: PictureSet) -> None:
        self._pictures = pictures
        self._records = [r for r in pictures.records if r.split == "train"]

    def __len__(self) -> int:
        return len(self._records)

    @overload
    def __getitem__(self, index: int) -> Planes: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Planes]: ...
    def __getitem__(self, index: int | slice) -> Planes | Sequence[Planes]:
        if isinstance(index, slice):
            return [self._pictures.planes(r) for r in self._records[index]]
        return self._pictures.planes(self._records[index])
