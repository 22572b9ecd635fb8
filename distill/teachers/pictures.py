"""Rated pictures for a teacher, whatever they come from, and batches of random crops.

The official test part of a set is never among them: no training and no choice may see it.
"""

from __future__ import annotations

import csv
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dgiqa_stream.errors import ConfigError, SourceError
from dgiqa_stream.preprocess import reduced_rgb
from dgiqa_stream.types import Planes
from distill.data.biq2021 import load_biq2021
from distill.data.build import LONGEST_PX, NOT_A_PICTURE
from distill.data.depth import DepthProvider, Rgb, three_channels
from distill.data.label_files import Missing
from distill.data.packed import Pack
from distill.data.shard_records import read_rgb as read_whole_rgb
from distill.data.shards import ShardReader, ShardRecord
from distill.data.training_data import ShardPictures
from distill.models.teacher import CROP_PX
from distill.say import say
from distill.teacher_score import normalised, with_smallest_side

LEARNT_FROM = ("train", "validation")
MAX_LEFT_OUT = 20
LABEL_COLUMNS = ("name", "quality", "weight")


@dataclass(frozen=True, slots=True)
class Labelled:
    """A picture and the quality a teacher is to give it."""

    name: str
    split: str
    """train or validation."""
    quality: float
    """0..1, 1 best: MOS, or a pseudo-label of ``weight``."""
    weight: float = 1.0
    """How much it counts; 1 for a human rating."""


class PictureSet(Protocol):
    """Labelled pictures that can be read in any order, from several threads."""

    @property
    def pictures(self) -> Sequence[Labelled]:
        """All of them, in a fixed order."""

    def rgb(self, index: int) -> Rgb:
        """uint8 (H, W, 3) of one; raises :class:`SourceError` where it cannot be read."""


class PackPictures:
    """The rated pack that ``dgiqa-distill data`` writes: quick, colours at half resolution."""

    def __init__(self, folder: Path) -> None:
        """Raises :class:`SourceError` where there is no whole pack."""
        self.pack = Pack(folder)
        self.records = [
            r for r in self.pack.records if r.mos is not None and r.split in LEARNT_FROM
        ]
        self.pictures = [Labelled(r.name, r.split, r.mos or 0.0) for r in self.records]

    def rgb(self, index: int) -> Rgb:
        """See :class:`PictureSet`."""
        return _rgb_of(self.pack.planes(self.records[index]))


class BiqPictures:
    """BIQ2021 as it is published, but for its test part."""

    def __init__(
        self, root: Path, *, num_validation: int, seed: int, missing: Missing = "refuse"
    ) -> None:
        """Raises ``FileNotFoundError`` or ``ValueError`` as ``load_biq2021`` does."""
        rated = load_biq2021(root, num_validation=num_validation, seed=seed, missing=missing)
        self._rated = [r for r in rated if r.split in LEARNT_FROM]
        self.pictures = [Labelled(r.path.name, r.split, r.mos) for r in self._rated]

    def rgb(self, index: int) -> Rgb:
        """See :class:`PictureSet`."""
        return read_rgb(self._rated[index].path)


class LabelledShards:
    """Shards of ``dgiqa-distill shards``: ratings, and pseudo-MOS at their confidence.

    People choose the best weights where they rated any validation picture, else pseudo-MOS does.
    """

    def __init__(self, folder: Path) -> None:
        """Raises :class:`SourceError` where there are no whole shards."""
        reader = ShardReader(folder)
        labelled = [r for r in reader.records if r.mos is not None or r.pseudo_mos is not None]
        by_people = any(r.split == "validation" and r.mos is not None for r in labelled)
        self._records = [
            r
            for r in labelled
            if r.split == "train"
            or (r.split == "validation" and (r.mos is not None or not by_people))
        ]
        self.pictures = [Labelled(r.name, r.split, _quality(r), _weight(r)) for r in self._records]
        self._from = ShardPictures(reader, self._records)

    def rgb(self, index: int) -> Rgb:
        """See :class:`PictureSet`."""
        return self._from.rgb(self._records[index])


def _quality(record: ShardRecord) -> float:
    return float((record.pseudo_mos if record.mos is None else record.mos) or 0.0)


def _weight(record: ShardRecord) -> float:
    return 1.0 if record.mos is not None or record.confidence is None else record.confidence


class LabelledFolder:
    """Pictures of a folder with labels of a CSV file: name, quality (0..1), weight (0..1)."""

    def __init__(self, folder: Path, labels: Path) -> None:
        """Raises :class:`SourceError` for labels that cannot be, or of absent pictures."""
        self._folder = folder
        self.pictures = read_labels(labels)
        absent = [p.name for p in self.pictures if not (folder / p.name).is_file()]
        if absent:
            raise SourceError(
                f"{len(absent)} pictures of {labels} are not in {folder}, first {absent[0]}"
            )

    def rgb(self, index: int) -> Rgb:
        """See :class:`PictureSet`."""
        return read_rgb(self._folder / self.pictures[index].name)


def read_labels(path: Path) -> list[Labelled]:
    """Training labels of a CSV file with at least :data:`LABEL_COLUMNS`."""
    try:
        with path.open(newline="") as rows:
            found = [
                Labelled(row["name"], "train", float(row["quality"]), float(row["weight"]))
                for row in csv.DictReader(rows)
            ]
    except OSError as exc:
        raise SourceError(f"labels {path} cannot be read: {exc.strerror}") from exc
    except (KeyError, TypeError, ValueError) as exc:
        columns = ", ".join(LABEL_COLUMNS)
        raise SourceError(f"labels {path}: every row needs {columns}; {exc}") from exc
    wrong = [p for p in found if not (0 <= p.quality <= 1 and 0 <= p.weight <= 1)]
    if wrong or not found:
        which = f"not those of {wrong[0].name}" if wrong else "and there must be some"
        raise SourceError(f"labels {path}: quality and weight lie within 0..1, {which}")
    return found


class JoinedPictures:
    """Several sets as one."""

    def __init__(self, *sets: PictureSet) -> None:
        self.pictures = [p for s in sets for p in s.pictures]
        self._places = [(s, i) for s in sets for i in range(len(s.pictures))]

    def rgb(self, index: int) -> Rgb:
        """See :class:`PictureSet`."""
        where, i = self._places[index]
        return where.rgb(i)


def _rgb_of(planes: Planes) -> Rgb:
    return np.asarray(reduced_rgb(planes, longest_px=LONGEST_PX), np.uint8)


def read_rgb(path: Path) -> Rgb:
    """A still picture, uint8 (H, W, 3); raises :class:`SourceError` for anything else."""
    try:
        return read_whole_rgb(path, longest_px=LONGEST_PX)
    except NOT_A_PICTURE as exc:
        raise SourceError(f"{path} is no picture that can be read: {exc}") from exc


@dataclass(frozen=True, slots=True, eq=False)
class Crops:
    """What a teacher sees of some pictures, and what it should say."""

    picture: Tensor
    """(B, 3, 224, 224), ImageNet-normalised."""
    depth: Tensor | None
    """The same of the depth maps; None for a teacher that reads none."""
    quality: Tensor
    """(B,), 0..1."""
    weight: Tensor
    """(B,), 0..1."""

    def to(self, device: torch.device) -> Crops:
        """On another device."""
        depth = None if self.depth is None else self.depth.to(device, non_blocking=True)
        return Crops(
            self.picture.to(device, non_blocking=True),
            depth,
            self.quality.to(device),
            self.weight.to(device),
        )


def crop(picture: NDArray[np.uint8], top: int, left: int, *, mirrored: bool = False) -> Tensor:
    """Normalised (3, 224, 224) out of a picture whose smaller side is already 384."""
    cut = picture[top : top + CROP_PX, left : left + CROP_PX]
    return normalised(np.ascontiguousarray(cut[:, ::-1] if mirrored else cut))


@dataclass(frozen=True, slots=True, eq=False)
class _Cut:
    index: int
    picture: Tensor
    depth: Tensor | None


class CropLoader:
    """Batches of random crops, decided by (seed, batch number) alone.

    The next picture stands in for one that cannot be read; more than :data:`MAX_LEFT_OUT` of those
    raise :class:`SourceError`.
    """

    def __init__(
        self,
        pictures: PictureSet,
        depth: DepthProvider | None,
        *,
        batch: int,
        seed: int,
        workers: int = 1,
    ) -> None:
        """Raises :class:`ConfigError` for fewer training pictures than one batch."""
        self._set, self._depth, self._batch, self._seed = pictures, depth, batch, seed
        self._train = [i for i, p in enumerate(pictures.pictures) if p.split == "train"]
        if len(self._train) < batch:
            raise ConfigError(
                f"{len(self._train)} training pictures are no batch of {batch}: lower train.batch"
            )
        self._pool, self._lock = ThreadPoolExecutor(workers), threading.Lock()
        self.left_out: dict[str, str] = {}
        """Pictures that could not be read, and why."""

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown()

    @property
    def batches_per_epoch(self) -> int:
        """Whole batches of one pass."""
        return len(self._train) // self._batch

    def __call__(self, number: int) -> Crops:
        """The batch of this number, from 0."""
        epoch, within = divmod(number, self.batches_per_epoch)
        order = np.random.default_rng([self._seed, epoch]).permutation(len(self._train))
        chosen = [self._train[i] for i in order[within * self._batch :][: self._batch]]
        draws = np.random.default_rng([self._seed, 13, number]).random((len(chosen), 3))
        cuts = list(self._pool.map(self._cut, chosen, draws))
        labels = [self._set.pictures[cut.index] for cut in cuts]
        depths = [cut.depth for cut in cuts if cut.depth is not None]
        return Crops(
            torch.stack([cut.picture for cut in cuts]),
            torch.stack(depths) if self._depth else None,
            torch.tensor([p.quality for p in labels]),
            torch.tensor([p.weight for p in labels]),
        )

    def read(self, index: int) -> Rgb | None:
        """A picture, or None where it cannot be read; raises where those are too many."""
        try:
            return self._set.rgb(index)
        except SourceError as exc:
            with self._lock:
                name = self._set.pictures[index].name
                if name not in self.left_out:
                    say(f"left out: {exc}")
                self.left_out[name] = str(exc)
                if len(self.left_out) > MAX_LEFT_OUT:
                    raise SourceError(
                        f"{len(self.left_out)} pictures cannot be read and {MAX_LEFT_OUT} may be "
                        f"left out; the last: {exc}"
                    ) from exc
            return None

    def _cut(self, index: int, draw: NDArray[np.float64]) -> _Cut:
        """One random crop of a picture, or of the next one that can be read, and of its depth."""
        place = self._train.index(index)
        while (rgb := self.read(index)) is None:
            place = (place + 1) % len(self._train)
            index = self._train[place]
        views = [with_smallest_side(rgb)]
        if self._depth is not None:
            near = self._depth(rgb, path=self._set.pictures[index].name)
            views.append(with_smallest_side(three_channels(near)))
        height, width = views[0].shape[:2]
        top, left = int(draw[0] * (height - CROP_PX + 1)), int(draw[1] * (width - CROP_PX + 1))
        cuts = [crop(view, top, left, mirrored=bool(draw[2] < 0.5)) for view in views]
        return _Cut(index, cuts[0], cuts[1] if len(cuts) > 1 else None)
