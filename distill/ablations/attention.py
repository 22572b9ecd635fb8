"""What a teacher's labels teach a student, kind after kind, by the trainer itself: trunk moving.

Unlike the other comparisons nothing is frozen here but the teacher's pyramids. The teacher is DGIQA
on the MobileNetV2 pyramid, a quarter of the published widths, taught in one pass over twice
the student's pictures.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from dgiqa_stream.preprocess import ViewSpec
from dgiqa_stream.types import Planes
from distill.ablations.comparisons import Comparison, told
from distill.ablations.features import choose
from distill.ablations.settings import Settings
from distill.compute import make_compute
from distill.data.depth import ClassicalDepth, Rgb
from distill.data.labels import LabelReader
from distill.data.packed import Pack, Record
from distill.data.shards import (
    MANIFEST,
    Manifest,
    ShardReader,
    ShardRecord,
    ShardWriter,
    write_json,
)
from distill.data.training_data import TrainingData
from distill.labelling import label_shards
from distill.models.official import open_teacher
from distill.models.teacher_file import LoadedTeacher
from distill.recipe import DataConfig, LossConfig, Recipe, TrainConfig
from distill.run_folder import VALIDATION, read_table
from distill.teacher_score import make_protocol
from distill.teachers.pictures import Labelled, PackPictures
from distill.teachers.recipe import DgiqaModel, FitConfig, TeacherRecipe
from distill.teachers.teaching import teach
from distill.trainer import train

VARIANTS = {
    "MOS alone": LossConfig(),
    "and the teacher's score": LossConfig(teacher_score=0.5),
    "and its fused map and pooled vector": LossConfig(teacher_score=0.5, fused=0.1, pooled=0.1),
    "and its attention and a gate": LossConfig(
        teacher_score=0.5, fused=0.1, pooled=0.1, attention=0.05, gated=0.05
    ),
}
"""Each has what the ones before it have; weights as in ``configs/distill/dgiqa.toml``."""
_TEACHERS_SHARE = 2
_NUM_CROPS = 4  # of 224 pixels out of 384: they see the whole picture
_MADE_BY = "python -m distill.ablations attention"


class _SomeOfPack:
    """Chosen pictures of a pack, for the trainer."""

    def __init__(self, pack: Pack, records: Sequence[Record]) -> None:
        self._pack, self.folder, self.records = pack, pack.folder, records

    def planes(self, record: Record) -> Planes:
        return self._pack.planes(record)


class _ForTeacher:
    """Chosen pictures of a pack, for a teacher's training."""

    def __init__(self, pictures: PackPictures, chosen: Sequence[int]) -> None:
        self._from, self._chosen = pictures, chosen
        self.pictures: list[Labelled] = [pictures.pictures[i] for i in chosen]

    def rgb(self, index: int) -> Rgb:
        return self._from.rgb(self._chosen[index])


def attention(settings: Settings) -> Comparison:
    """A student taught by MOS, by a teacher's score, its features, its depth-guided attention."""
    pictures = PackPictures(settings.pack)
    splits = [p.split for p in pictures.pictures]
    chosen = choose(splits, settings)
    key = hashlib.sha256(repr((chosen, settings.seed)).encode()).hexdigest()[:12]
    folder = settings.cache / f"attention-{key}"
    found: Comparison = {}
    most = min(_TEACHERS_SHARE * settings.num_train, splits.count("train"))
    seen = choose(splits, _with_train(settings, most))
    teacher = _teacher(_ForTeacher(pictures, seen), folder / "teacher", settings, found)
    data = _labelled(pictures, chosen, teacher, folder, settings)
    for seed in range(settings.num_seeds):
        for number, (name, losses) in enumerate(VARIANTS.items()):
            recipe = _recipe(losses, settings, seed=1 + seed)
            run = folder / f"run-{number}-{seed}"
            train(
                recipe, data, run, backbone=settings.backbone,
                compute=make_compute("cpu", recipe.train.precision),
            )  # fmt: skip
            last = {k: values[-1] for k, values in read_table(run / VALIDATION).items()}
            told(found, name, {"srcc": last["srcc"]})
    return found


def _with_train(settings: Settings, num_train: int) -> Settings:
    return replace(settings, num_train=num_train, num_validation=min(200, settings.num_validation))


def _teacher(
    pictures: _ForTeacher, run: Path, settings: Settings, found: Comparison
) -> LoadedTeacher:
    batch = max(2, settings.batch // 4)
    recipe = TeacherRecipe(
        name="attention",
        version="0.0.0",
        model=DgiqaModel("mobilenetv2", (16, 32, 64, 128), num_heads=8, pooled_channels=256),
        data=DataConfig(num_validation=0, seed=settings.seed),
        train=FitConfig(
            seed=settings.seed, num_epochs=1, batch=batch, head_rate=settings.rate,
            pyramid_rate=0.0, warmup_steps=5, weight_decay=0.05, ema_decay=0.95,
            plcc_weight=0.3, evaluation_crops=1,
        ),
    )  # fmt: skip
    depth = ClassicalDepth()
    taught = teach(recipe, pictures, run, depth=depth, backbone=settings.backbone, device="cpu")
    told(found, "the teacher itself", {"srcc": taught.srcc})
    return open_teacher(taught.path)


def _labelled(
    pictures: PackPictures,
    chosen: Sequence[int],
    teacher: LoadedTeacher,
    folder: Path,
    settings: Settings,
) -> TrainingData:
    """The chosen pictures, those for training with what the teacher says of them."""
    of_pack = pictures.records
    records = [of_pack[i] for i in chosen]
    shards = folder / "shards"
    if not (shards / MANIFEST).is_file():
        _write_shards(shards, pictures, chosen[: settings.num_train])
    label_shards(
        teacher, ClassicalDepth(), make_protocol("grid", num_crops=_NUM_CROPS), shards,
        folder / "labels", teacher_name="attention", made_by=_MADE_BY,
    )  # fmt: skip
    reader = ShardReader(shards)
    none = _SomeOfPack(pictures.pack, [])
    return TrainingData(
        rated=_SomeOfPack(pictures.pack, records),
        ladders=none,
        unrated=none,
        labels=LabelReader(folder / "labels", reader.manifest, reader.records),
        identity=teacher.sha256,
    )


def _write_shards(folder: Path, pictures: PackPictures, chosen: Sequence[int]) -> None:
    """What ``label_shards`` reads."""
    folder.mkdir(parents=True, exist_ok=True)
    writer = ShardWriter(folder, "shard-00000")
    for i in chosen:
        record = pictures.records[i]
        told_of = ShardRecord(record.name, record.content, record.split, "pack", mos=record.mos)
        writer.add(told_of, pictures.rgb(i))
    writer.flush()
    manifest = Manifest(_MADE_BY, {}, [], {}, {"train": len(chosen)}, writer.written, [])
    write_json(folder / MANIFEST, manifest)


def _recipe(losses: LossConfig, settings: Settings, *, seed: int) -> Recipe:
    """Small views, for the two cores that this is for; rated pictures alone."""
    return Recipe(
        name="attention",
        views=[
            ViewSpec("whole", "whole", 128, 128),
            ViewSpec("fragments", "fragments", 96, 96, 4, 4),
        ],
        data=DataConfig(num_validation=0, seed=settings.seed),
        train=TrainConfig(
            seed=seed, num_epochs=settings.num_epochs, rated_batch=max(2, settings.batch // 4),
            ladder_groups=1, ladder_levels=2, head_epochs=30, trunk_rate=1.5e-4, head_rate=2e-4,
            warmup_steps=5, weight_decay=0.02, dropout=0.3, ema_decay=0.9, plcc_weight=0.3,
            ladder_weight=0.0, ladder_margin=0.2, smallest_crop=0.85, precision="fp32",
        ),
        losses=losses,
    )  # fmt: skip
