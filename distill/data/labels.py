"""A teacher's labels of the pictures in shards: files that are mapped, one for each shard.

A folder of labels has ``<shard>.npy`` for every shard and ``manifest.json``. A file is one array
of records (:func:`label_dtype`), a row for each picture, which names its picture. The manifest
says which teacher looked at which shards, and has the SHA-256 of each file.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from dgiqa_stream.errors import ConfigError, SourceError
from distill.data.batch import TeacherTargets
from distill.data.loader import AnyRecord, Draw, Look
from distill.data.shards import MANIFEST, LeftOut, Manifest

_AGAIN = "run `dgiqa-distill label` again"
_OPEN_FILES = 64
_ROUNDING = 1e-6


class TeacherIdentity(msgspec.Struct, frozen=True):
    """Which teacher made labels, and how it was asked."""

    name: str
    """The file's."""
    sha256: str
    version: str
    backbone: str
    protocol: str
    """Where its crops lie."""
    depth: str
    """What made its depth maps."""


class LabelShapes(msgspec.Struct, frozen=True):
    """How large a teacher's targets are."""

    num_crops: int
    channels: int
    """Of the fused map."""
    side: int
    """Of the fused and the attention map."""
    pooled: int
    has_attention: bool = True
    """Whether the teacher asks by depth; else its attention maps are NaN."""


class LabelFile(msgspec.Struct, frozen=True):
    """The labels of one shard, as their maker left them."""

    name: str
    shard: str
    sha256: str
    num_bytes: int
    num_pictures: int


class LabelManifest(msgspec.Struct, frozen=True):
    """What is in a folder of labels and what made it."""

    made_by: str
    teacher: TeacherIdentity
    shards_sha256: str
    """Of the shards they label: :func:`shards_digest`."""
    shapes: LabelShapes
    num_pictures: int
    files: list[LabelFile]
    left_out: list[LeftOut]
    schema: Literal["dgiqa.labels/1"] = "dgiqa.labels/1"


def shards_digest(manifest: Manifest) -> str:
    """SHA-256 over the names and digests of all shards: what they hold, not who made them."""
    listing = "\n".join(f"{shard.name} {shard.sha256}" for shard in manifest.shards)
    return hashlib.sha256(listing.encode()).hexdigest()


def label_dtype(shapes: LabelShapes, *, longest_name: int) -> np.dtype[Any]:
    """A row: score and spread over crops (float32, 0..1), and what a student can learn from.

    float16 holds features to a thousandth of their size, which is less than crops differ by.
    """
    side = shapes.side
    return np.dtype(
        [
            ("name", f"U{max(1, longest_name)}"),
            ("score", "f4"),
            ("spread", "f4"),
            ("crop_scores", "f4", (shapes.num_crops,)),
            ("pooled", "f2", (shapes.pooled,)),
            ("attention", "f2", (side, side)),
            ("fused", "f2", (shapes.channels, side, side)),
        ]
    )


def overlap(begin: float, end: float, num_out: int, num_in: int) -> NDArray[np.float32]:
    """(num_out, num_in): how much of each output cell lies in each input cell; rows sum to 1.

    Input cells divide 0..1, output cells divide ``begin``..``end``, which lies within it.
    """
    edges = begin + (end - begin) * np.arange(num_out + 1) / num_out
    cells = np.arange(num_in + 1) / num_in
    low = np.maximum(edges[:-1, None], cells[None, :-1])
    high = np.minimum(edges[1:, None], cells[None, 1:])
    share = np.clip(high - low, 0, None)  # (num_out, num_in)
    return (share / share.sum(1, keepdims=True)).astype(np.float32)


def as_looked_at(maps: NDArray[Any], look: Look) -> NDArray[np.float32]:
    """Maps (..., S, S) over a whole picture as a training look sees it: its crop, mirrored or not.

    Each place of the result is the mean of what it covers.
    """
    top, left, tall, wide = look.crop_share
    side = maps.shape[-1]
    rows = overlap(top, min(1.0, top + tall), side, side)
    columns = overlap(left, min(1.0, left + wide), side, side)
    if look.mirrored:
        columns = columns[::-1]
    return np.asarray(rows @ maps.astype(np.float32) @ columns.T, np.float32)


class LabelReader:
    """A folder of labels: the targets of any picture that was labelled.

    Raises :class:`SourceError` where manifest or files are missing, damaged or name a picture that
    ``records`` lack, :class:`ConfigError` where they are of other shards.
    """

    def __init__(self, folder: Path, shards: Manifest, records: Sequence[AnyRecord]) -> None:
        self.folder, self.manifest = folder, read_label_manifest(folder)
        if self.manifest.shards_sha256 != shards_digest(shards):
            raise ConfigError(
                f"the labels in {folder} are of other shards (of digest "
                f"{self.manifest.shards_sha256[:12]}…): label these with `dgiqa-distill label`"
            )
        self._rows: dict[str, tuple[LabelFile, int]] = {}
        for file in self.manifest.files:
            named = enumerate(self._open(file)["name"].tolist())
            self._rows |= {str(name): (file, row) for row, name in named}
        strange = self._rows.keys() - {record.name for record in records}
        if strange:
            raise SourceError(
                f"{folder} labels {len(strange)} pictures that the shards lack, {min(strange)} "
                f"among them: {_AGAIN}"
            )

    def __len__(self) -> int:
        return len(self._rows)

    def score(self, name: str) -> float | None:
        """The teacher's score of a picture, 0..1; None where it has no label."""
        row = self._row(name)
        return None if row is None else float(row["score"])

    def targets(self, draws: Sequence[Draw]) -> TeacherTargets[NDArray[Any]]:
        """What the teacher says of pictures as they are looked at; NaN of those without a label."""
        shapes = self.manifest.shapes
        side, count = shapes.side, len(draws)
        scores = np.full((count, shapes.num_crops), np.nan, np.float32)
        fused = np.full((count, shapes.channels, side, side), np.nan, np.float16)
        pooled = np.full((count, shapes.pooled), np.nan, np.float16)
        attention = np.full((count, side, side), np.nan, np.float32)
        for i, draw in enumerate(draws):
            row = self._row(draw.record.name)
            if row is None:
                continue
            scores[i], pooled[i] = row["crop_scores"], row["pooled"]
            fused[i] = as_looked_at(row["fused"], draw.look)
            seen = as_looked_at(row["attention"], draw.look)
            attention[i] = seen / seen.sum()
        return TeacherTargets(scores, fused, pooled, attention)

    def _row(self, name: str) -> Any:
        place = self._rows.get(name)
        if place is None:
            return None
        file, number = place
        row = self._open(file)[number]
        crops = row["crop_scores"]
        if row["name"] != name or not ((crops >= 0) & (crops <= 1 + _ROUNDING)).all():
            raise SourceError(f"{self.folder / file.name} has no label of {name}: {_AGAIN}")
        return row

    def _open(self, file: LabelFile) -> NDArray[Any]:
        return _mapped(self.folder / file.name, file)


@lru_cache(maxsize=_OPEN_FILES)
def _mapped(path: Path, file: LabelFile) -> NDArray[Any]:
    """The rows of one file; kept open for each process."""
    if not path.is_file() or path.stat().st_size != file.num_bytes:
        raise SourceError(f"{path} is missing or not as it was written: {_AGAIN}")
    try:
        rows: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OSError) as exc:
        raise SourceError(f"{path} cannot be read: {exc}; {_AGAIN}") from exc
    if rows.dtype.names is None or len(rows) != file.num_pictures:
        raise SourceError(f"{path} does not hold {file.num_pictures} labels: {_AGAIN}")
    return rows


def read_label_manifest(folder: Path) -> LabelManifest:
    """What is in a folder of labels; raises :class:`SourceError` where it is not whole."""
    try:
        return msgspec.json.decode((folder / MANIFEST).read_bytes(), type=LabelManifest)
    except FileNotFoundError as exc:
        raise SourceError(f"no whole set of labels at {folder}: {_AGAIN}") from exc
    except (msgspec.DecodeError, UnicodeDecodeError) as exc:
        raise SourceError(f"{folder / MANIFEST} is no manifest of labels: {exc}; {_AGAIN}") from exc
