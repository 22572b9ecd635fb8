"""A teacher looks at every picture in shards and leaves its labels: once, for any student.

The work is cut by shards. What is finished stays; after an interruption, however hard, the same
command goes on and makes again only what is missing or damaged.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dgiqa_stream.errors import ConfigError, ModelError, SourceError
from distill.data.depth import DepthProvider, three_channels
from distill.data.labels import (
    LabelFile,
    LabelManifest,
    LabelShapes,
    TeacherIdentity,
    label_dtype,
    shards_digest,
)
from distill.data.loader import read_ahead
from distill.data.shards import (
    MANIFEST,
    LeftOut,
    ShardReader,
    ShardRecord,
    is_whole,
    sha256_of,
    whole_or_none,
    write_json,
)
from distill.describing import CropOutput, describe_crops, over_picture
from distill.models.teacher import CROP_PX, Dgiqa
from distill.models.teacher_file import LoadedTeacher, Teacher
from distill.say import say, show_progress
from distill.teacher_score import CropProtocol, normalised, with_smallest_side

_LARGEST_FLOAT16 = 65504.0


class _Done(msgspec.Struct, frozen=True):
    """What the labelling of one shard left."""

    file: LabelFile
    left_out: list[LeftOut]


@dataclass(frozen=True, slots=True, eq=False)
class _Seen:
    """A picture cut for the teacher."""

    record: ShardRecord
    crops: Tensor
    """(K, 3, 224, 224) of the picture."""
    depth: Tensor
    """(K, 3, 224, 224) of its depth map."""
    places: list[tuple[int, int]]
    size: tuple[int, int]
    """Height and width the places are in."""


def label_shards(
    teacher: LoadedTeacher,
    depth: DepthProvider,
    protocol: CropProtocol,
    shards: Path,
    folder: Path,
    *,
    teacher_name: str,
    made_by: str,
    device: torch.device | None = None,
    at_once: int = 9,
    max_left_out: int = 20,
) -> LabelManifest:
    """Label every picture, or go on labelling, and write the manifest last.

    Args:
        at_once: crops that pass the network together.
        max_left_out: so many pictures may be unreadable; they are named, left out and told at the
            end. One more stops the run.

    Raises :class:`ConfigError` where the folder holds labels of another teacher or other shards,
    :class:`SourceError` where too many pictures cannot be read, :class:`ModelError` where the
    teacher's output is no number, :class:`SinkError` on a full disk.
    """
    reader = ShardReader(shards)
    identity = TeacherIdentity(
        name=teacher_name,
        sha256=teacher.sha256,
        version=teacher.version,
        backbone=teacher.backbone,
        protocol=protocol.identity,
        depth=depth.identity,
    )
    digest = shards_digest(reader.manifest)
    (folder / "jobs").mkdir(parents=True, exist_ok=True)
    _keep_plan(folder, identity, digest)
    model = teacher.model.to(device or torch.device("cpu")).eval()
    job = _Labelling(model, depth, protocol, reader, folder, at_once, max_left_out)
    done = job.run()
    filled = [d.file for d in done if d.file.num_pictures]
    if not filled:
        raise SourceError(f"no picture of {shards} can be read: make the shards again")
    manifest = LabelManifest(
        made_by=made_by,
        teacher=identity,
        shards_sha256=digest,
        shapes=job.shapes_of(filled[0]),
        num_pictures=sum(d.file.num_pictures for d in done),
        files=[d.file for d in done],
        left_out=[left for d in done for left in d.left_out],
    )
    write_json(folder / MANIFEST, manifest)
    if manifest.left_out:
        first = manifest.left_out[0]
        say(f"{len(manifest.left_out)} pictures could not be read, {first.name} first")
    return manifest


def _keep_plan(folder: Path, identity: TeacherIdentity, digest: str) -> None:
    """Remember what is being made here; refuse to mix it with something else."""
    plan = {"teacher": msgspec.to_builtins(identity), "shards": digest}
    path = folder / "jobs" / "plan.json"
    if not path.is_file():
        write_json(path, plan)
        return
    kept = msgspec.json.decode(path.read_bytes())
    if kept == plan:
        return
    if kept.get("shards") != digest:
        what = "of other shards"
    elif kept.get("teacher", {}).get("sha256") != identity.sha256:
        what = f"of another teacher ({kept.get('teacher', {}).get('name')})"
    else:
        what = "made with another protocol or depth"
    raise ConfigError(f"{folder} holds labels {what}: give another folder")


class _Labelling:
    """One run over all shards."""

    def __init__(
        self,
        model: Teacher,
        depth: DepthProvider,
        protocol: CropProtocol,
        reader: ShardReader,
        folder: Path,
        at_once: int,
        max_left_out: int,
    ) -> None:
        self.model, self.depth, self.protocol = model, depth, protocol
        self.reader, self.folder, self.at_once = reader, folder, at_once
        self.max_left_out, self.num_left_out = max_left_out, 0
        self.began, self.num_pictures = time.monotonic(), 0
        self.by_shard: dict[str, list[ShardRecord]] = {}
        for record in reader.records:
            self.by_shard.setdefault(record.shard, []).append(record)

    def run(self) -> list[_Done]:
        """What every shard left, in the shards' order."""
        done: list[_Done] = []
        num_seen = 0
        for shard, records in self.by_shard.items():
            found = self._finished(shard)
            if found is None:
                found = self._label(shard, records, num_seen)
            self.num_left_out += len(found.left_out)
            if self.num_left_out > self.max_left_out:
                raise SourceError(
                    f"{self.num_left_out} pictures cannot be read and {self.max_left_out} may be "
                    f"left out, the last {found.left_out[-1].reason}"
                )
            done.append(found)
            num_seen += len(records)
        show_progress(None)
        return done

    def shapes_of(self, file: LabelFile) -> LabelShapes:
        """How large the targets are, from a file of them."""
        rows = np.load(self.folder / file.name, mmap_mode="r", allow_pickle=False)
        channels, side, _ = rows.dtype["fused"].shape
        return LabelShapes(
            num_crops=rows.dtype["crop_scores"].shape[0],
            channels=channels,
            side=side,
            pooled=rows.dtype["pooled"].shape[0],
            has_attention=isinstance(self.model, Dgiqa),
        )

    def _finished(self, shard: str) -> _Done | None:
        path = self.folder / "jobs" / f"{Path(shard).stem}.json"
        try:
            done = msgspec.json.decode(path.read_bytes(), type=_Done)
        except (OSError, msgspec.DecodeError, UnicodeDecodeError):
            return None
        whole = not done.left_out and is_whole(self.folder, done.file)
        return done if whole else None

    def _label(self, shard: str, records: Sequence[ShardRecord], num_seen: int) -> _Done:
        rows: list[tuple[_Seen, CropOutput]] = []
        left_out: list[LeftOut] = []
        for group in self._groups(self._seen(records, left_out)):
            crops, depth = (
                torch.cat(x) for x in ([s.crops for s in group], [s.depth for s in group])
            )
            made = describe_crops(self.model, crops, depth, at_once=self.at_once)
            rows += zip(group, made.divided([len(s.places) for s in group]), strict=True)
            self.num_pictures += len(group)
            self._tell(num_seen + len(rows) + len(left_out))
        done = _Done(self._write(shard, rows), left_out)
        write_json(self.folder / "jobs" / f"{Path(shard).stem}.json", done)
        return done

    def _groups(self, found: Iterator[_Seen]) -> Iterator[list[_Seen]]:
        """Pictures whose crops fill the network together."""
        waiting: list[_Seen] = []
        for seen in found:
            waiting.append(seen)
            if sum(len(s.places) for s in waiting) >= self.at_once:
                yield waiting
                waiting = []
        if waiting:
            yield waiting

    def _tell(self, num_done: int) -> None:
        total = len(self.reader.records)
        pace = (time.monotonic() - self.began) / self.num_pictures
        minutes = pace * (total - num_done) / 60
        show_progress(f"{num_done}/{total} pictures  {pace:.2f} s each, {minutes:.0f} min left ")

    def _seen(self, records: Sequence[ShardRecord], left_out: list[LeftOut]) -> Iterator[_Seen]:
        """Pictures cut for the teacher, by a thread, while it looks at the one before."""

        def cut(number: int) -> _Seen | LeftOut:
            record = records[number]
            try:
                rgb = self.reader.picture(record)
            except SourceError as exc:
                return LeftOut(record.name, str(exc))
            near = three_channels(self.depth(rgb, path=record.name))
            whole, far = (normalised(with_smallest_side(x)) for x in (rgb, near))
            height, width = whole.shape[1:]
            places = self.protocol.places(height, width)
            crops, depth = (
                torch.stack([x[:, t : t + CROP_PX, s : s + CROP_PX] for t, s in places])
                for x in (whole, far)
            )
            return _Seen(record, crops, depth, places, (height, width))

        for made in read_ahead(cut, 0, len(records)):
            if isinstance(made, LeftOut):
                left_out.append(made)
            else:
                yield made

    def _write(self, shard: str, rows: Sequence[tuple[_Seen, CropOutput]]) -> LabelFile:
        name = f"{Path(shard).stem}.npy"
        longest = max((len(seen.record.name) for seen, _ in rows), default=1)
        array = np.zeros(len(rows), label_dtype(_shapes(rows), longest_name=longest))
        for i, (seen, made) in enumerate(rows):
            _fill_(array, i, seen, made)
        with whole_or_none(self.folder / name) as partial, partial.open("wb") as out:
            np.save(out, array, allow_pickle=False)
        path = self.folder / name
        return LabelFile(name, shard, sha256_of(path), path.stat().st_size, len(rows))


def _shapes(rows: Sequence[tuple[_Seen, CropOutput]]) -> LabelShapes:
    if not rows:
        return LabelShapes(num_crops=1, channels=1, side=1, pooled=1)
    made = rows[0][1]
    _, channels, side, _ = made.fused.shape
    return LabelShapes(len(made.scores), channels, side, made.pooled.shape[1])


def _fill_(array: NDArray[Any], i: int, seen: _Seen, made: CropOutput) -> None:
    """One row; raises :class:`ModelError` where the teacher's output cannot be kept."""
    fused = over_picture(made.fused, seen.places, seen.size)
    pooled = made.pooled.mean(0)
    if not (np.isfinite(made.scores).all() and _fits(fused) and _fits(pooled)):
        raise ModelError(
            f"the teacher's output for {seen.record.name} is not finite, or beyond float16: its "
            "weights cannot be taught from"
        )
    attention = over_picture(made.attention, seen.places, seen.size)
    array[i]["name"] = seen.record.name
    array[i]["score"] = made.scores.mean()
    array[i]["spread"] = made.scores.std()
    array[i]["crop_scores"] = made.scores
    array[i]["pooled"] = pooled
    array[i]["fused"] = fused
    array[i]["attention"] = attention / attention.sum()


def _fits(values: NDArray[np.float32]) -> bool:
    return bool((np.abs(values) <= _LARGEST_FLOAT16).all())  # false of NaN
