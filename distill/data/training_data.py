"""Where a student's pictures and labels come from: packs, or shards with a teacher's labels."""

from __future__ import annotations

import copy
import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dgiqa_stream.errors import ConfigError, SourceError
from dgiqa_stream.types import Planes
from distill.data.codecs import Rgb
from distill.data.labels import LabelReader, shards_digest
from distill.data.loader import AnyRecord, PictureSet
from distill.data.packed import Pack, as_planes_420
from distill.data.shards import ShardReader, ShardRecord


class ShardPictures:
    """Some pictures of a folder of shards, as RGB or, as a pack has them, by 4:2:0 planes.

    Threads may share it: each opens the shards anew.
    """

    def __init__(self, reader: ShardReader, records: Sequence[ShardRecord]) -> None:
        self.folder, self.records = reader.folder, list(records)
        self._reader, self._of_thread = reader, threading.local()

    def planes(self, record: ShardRecord) -> Planes:
        """The samples of one picture; raises :class:`SourceError` where it cannot be read."""
        return as_planes_420(self.rgb(record))

    def rgb(self, record: ShardRecord) -> Rgb:
        """uint8 (H, W, 3) of one picture; raises as :meth:`planes`."""
        reader = getattr(self._of_thread, "reader", None)
        if reader is None:
            reader = self._of_thread.reader = copy.copy(self._reader)
        return reader.picture(record)

    def __reduce__(self) -> tuple[type[ShardPictures], tuple[Any, ...]]:
        """Another process opens the shards anew."""
        return type(self), (self._reader, self.records)


@dataclass(frozen=True, slots=True, eq=False)
class TrainingData:
    """Pictures by what they are good for; one may be in several."""

    rated: PictureSet
    """With a human rating."""
    ladders: PictureSet
    """On ladders of degradations."""
    unrated: PictureSet | None = None
    """Without a human rating: with a pseudo-MOS, a teacher's labels or neither."""
    labels: LabelReader | None = None
    identity: str = ""
    """Of pictures and labels; a training goes on with the same alone."""

    def numbered_contents(self) -> dict[str, int]:
        """A number for each scene, the same wherever the data is opened."""
        parts = (self.rated, self.ladders, *([self.unrated] if self.unrated else []))
        return {
            name: i for i, name in enumerate(sorted({r.content for p in parts for r in p.records}))
        }


class JoinedPictures:
    """The pictures of several sets, one set after the other."""

    def __init__(self, parts: Sequence[PictureSet]) -> None:
        """Raises :class:`ConfigError` where two sets have a picture of one name."""
        self.folder = parts[0].folder
        self.records: list[AnyRecord] = []
        self._part_of: dict[str, PictureSet] = {}
        for part in parts:
            for record in part.records:
                other = self._part_of.setdefault(record.name, part)
                if other is not part:
                    raise ConfigError(
                        f"{record.name} is in {other.folder} and in {part.folder}: give shards of "
                        "different pictures"
                    )
            self.records += part.records

    def planes(self, record: AnyRecord) -> Planes:
        """The samples of one picture; raises :class:`SourceError` where it cannot be read."""
        return self._part_of[record.name].planes(record)


def open_packs(packs: Path, shards: Path | Sequence[Path] | None = None) -> TrainingData:
    """The packs that ``dgiqa-distill data`` wrote.

    With ``shards``, one folder or several, everything but rated pictures comes from there: packs
    are read faster. Raises as :func:`open_shards`, and :class:`ConfigError` where two folders have
    a picture of one name.
    """
    folders = [shards] if isinstance(shards, Path) else list(shards or ())
    if folders:
        rated, made = Pack(packs / "rated"), [open_shards(folder) for folder in folders]
        _check(rated.folder, rated.records)
        pictures = [part.unrated or part.ladders for part in made]
        joined = pictures[0] if len(made) == 1 else JoinedPictures(pictures)
        identity = " ".join(part.identity for part in made)
        return TrainingData(rated, joined, joined, identity=identity)
    rated, ladders = Pack(packs / "rated"), Pack(packs / "ladders")
    for pack in (rated, ladders):
        _check(pack.folder, pack.records)
    return TrainingData(rated, ladders)


def open_shards(folder: Path, labels: Path | None = None, *, verify: bool = False) -> TrainingData:
    """Shards that ``dgiqa-distill shards`` made, with the labels of ``dgiqa-distill label``.

    ``verify`` compares every shard with the SHA-256 it was written with. Raises
    :class:`SourceError` for damaged data and ratings off the scale, :class:`ConfigError` for
    labels of other shards.
    """
    reader = ShardReader(folder, verify=verify)
    _check(folder, reader.records)
    digest = shards_digest(reader.manifest)
    of_teacher = None if labels is None else LabelReader(labels, reader.manifest, reader.records)
    who = "" if of_teacher is None else of_teacher.manifest.teacher.sha256
    on_ladder = [r for r in reader.records if r.ladder or r.degradation == "clean"]
    return TrainingData(
        rated=ShardPictures(reader, [r for r in reader.records if r.mos is not None]),
        ladders=ShardPictures(reader, [r for r in on_ladder if r.mos is None]),
        unrated=ShardPictures(reader, [r for r in reader.records if r.mos is None]),
        labels=of_teacher,
        identity=f"shards {digest} labels {who or 'none'}",
    )


def _check(folder: Path, records: Sequence[AnyRecord]) -> None:
    """Refuse labels off their scale."""
    for record in records:
        for what in ("mos", "pseudo_mos", "confidence"):
            value = getattr(record, what, None)
            if value is not None and not (math.isfinite(value) and 0 <= value <= 1):
                raise SourceError(
                    f"{record.name} in {folder} has {what} {value}, and 0 to 1 is the scale: "
                    "correct its table and make the set again"
                )
