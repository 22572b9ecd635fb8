"""The whole way: pictures to shards, a teacher, its labels, a student, and its ONNX.

Every step goes on where it stopped, so the chain does. What it makes lies in one folder:
``shards``, ``teacher``, ``labels``, ``run``, the models, and ``chain.json``, which tells how long
each step took and what came out.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from dgiqa_stream.errors import ConfigError
from distill.compute import Compute
from distill.data.build_shards import build_shards, plan_jobs
from distill.data.datasets import RatedItem, load_dataset
from distill.data.degradations import PICTURE_DEGRADATIONS
from distill.data.depth import PUBLISHED_DEPTH, DepthProvider, open_depth
from distill.data.loader import AnyRecord
from distill.data.packed import Record, write_pack
from distill.data.shard_records import CleanPicture, Job, ShardSettings
from distill.data.shards import sha256_of, write_json
from distill.data.training_data import ShardPictures, TrainingData, open_shards
from distill.labelling import label_shards
from distill.models.official import open_teacher
from distill.recipe import ChainConfig, Recipe
from distill.say import say
from distill.teacher_score import make_protocol, tell_other_depth
from distill.trainer import train

RESULT = "chain.json"
_STEPS = 5
_CROPS_AT_ONCE = {"cpu": 9, "cuda": 144}
_VALIDATION_SHARE = 4
_CALIBRATION_PICTURES = 160
Item = TypeVar("Item")
Export = Callable[[Path, Path, Path], Sequence[Path]]
"""Takes a student's weights, packs to calibrate on and the folder to write to; the models."""


@dataclass(frozen=True, slots=True)
class ChainRequest:
    """What a run of the command was asked for; see its options."""

    recipe: Recipe
    folder: Path
    backbone: Path
    pristine: Path | None = None
    rated: Mapping[str, Path] = field(default_factory=dict)
    teacher: Path | None = None
    """A checkpoint; None teaches one by the recipe's ``chain.teacher``."""
    num_steps: int | None = None
    workers: int = 2
    made_by: str = ""


def run_chain(request: ChainRequest, compute: Compute, export: Export) -> dict[str, Any]:
    """Make everything that is not there yet; returns what ``chain.json`` holds.

    Raises :class:`ConfigError` where the request cannot be, and what each step raises.
    """
    settings = request.recipe.chain or ChainConfig()
    if request.teacher is None and settings.teacher is None:
        raise ConfigError(
            f"recipe {request.recipe.name} teaches no teacher (chain.teacher): give --teacher"
        )
    depth_name = settings.depth or PUBLISHED_DEPTH
    folder, seconds = request.folder, dict[str, float]()
    with _timed(seconds, "shards"):
        _make_shards(request, settings)
    depth = open_depth(depth_name, device=str(compute.device), cache=folder / "depth")
    with _timed(seconds, "teacher"):
        teacher = request.teacher or _teach(request, settings, depth, compute)
    with _timed(seconds, "labels"):
        _label(request, settings, teacher, depth, compute)
    with _timed(seconds, "student"):
        data = open_shards(folder / "shards", folder / "labels")
        best = train(
            request.recipe,
            data,
            folder / "run",
            backbone=request.backbone,
            num_steps=request.num_steps,
            compute=compute,
        )
    with _timed(seconds, "onnx"):
        packs = _calibration_packs(data, folder / "calibration", request.made_by)
        models = export(folder / "run" / "best.pt", packs, folder)
    made = [teacher, folder / "run" / "best.pt", *models]
    result = {
        "made_by": request.made_by,
        "recipe": msgspec.to_builtins(request.recipe),
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
        "student": best,
        "sha256": {path.name: sha256_of(path) for path in made},
    }
    write_json(folder / RESULT, result)
    return result


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    say(f"{len(seconds) + 1}/{_STEPS} {name}")
    began = time.monotonic()
    yield
    seconds[name] = time.monotonic() - began


def _make_shards(request: ChainRequest, settings: ChainConfig) -> None:
    seed = request.recipe.data.seed
    rated = {
        name: _some_rated(load_dataset(name, root, seed=seed), settings.num_rated)
        for name, root in request.rated.items()
    }
    jobs = _some_clean(plan_jobs(request.pristine, rated), settings.num_clean)
    build_shards(
        request.folder / "shards",
        jobs,
        settings=ShardSettings(
            seed=seed,
            degradations=tuple(settings.degradations) or PICTURE_DEGRADATIONS,
            num_chains=settings.num_chains,
            pseudo_mos=settings.pseudo_mos,
            longest_px=settings.longest_px,
        ),
        made_by=request.made_by,
        workers=request.workers,
    )


def evenly(items: Sequence[Item], number: int) -> list[Item]:
    """So many of the items, spread over all of them; all where there are fewer."""
    if number >= len(items):
        return list(items)
    return [items[i * len(items) // number] for i in range(number)]


def _some_rated(items: Sequence[RatedItem], number: int | None) -> list[RatedItem]:
    if number is None:
        return list(items)
    for_validation = max(2, number // _VALIDATION_SHARE)
    return [
        item
        for split, count in (("train", number), ("validation", for_validation))
        for item in evenly([i for i in items if i.split == split], count)
    ]


def _some_clean(jobs: Sequence[Job], number: int | None) -> list[Job]:
    """At least one content for validation, where the folder has one."""
    if number is None:
        return list(jobs)
    clean = [job for job in jobs if isinstance(job, CleanPicture)]
    rest = [job for job in jobs if not isinstance(job, CleanPicture)]
    held_back = [job for job in clean if job.split == "validation"]
    held_back = evenly(held_back, max(1, number // 8))
    trained = evenly([job for job in clean if job.split == "train"], number - len(held_back))
    return [*trained, *held_back, *rest]


def _teach(
    request: ChainRequest, settings: ChainConfig, depth: DepthProvider, compute: Compute
) -> Path:
    from distill.teachers.pictures import LabelledShards
    from distill.teachers.recipe import TeacherRecipe
    from distill.teachers.teaching import teach

    try:
        recipe = msgspec.convert(settings.teacher, TeacherRecipe)
    except msgspec.ValidationError as exc:
        raise ConfigError(f"recipe {request.recipe.name}: chain.teacher: {exc}") from exc
    taught = teach(
        recipe,
        LabelledShards(request.folder / "shards"),
        request.folder / "teacher",
        depth=depth,
        backbone=request.backbone,
        device=str(compute.device),
    )
    say(f"the teacher's validation SRCC is {taught.srcc:.4f}")
    return taught.path


def _label(
    request: ChainRequest,
    settings: ChainConfig,
    teacher: Path,
    depth: DepthProvider,
    compute: Compute,
) -> None:
    opened = open_teacher(teacher)
    tell_other_depth(opened, depth)
    label_shards(
        opened,
        depth,
        make_protocol("grid", num_crops=settings.num_crops),
        request.folder / "shards",
        request.folder / "labels",
        teacher_name=teacher.name,
        made_by=request.made_by,
        device=compute.device,
        at_once=_CROPS_AT_ONCE.get(compute.device.type, 9),
    )


def _calibration_packs(data: TrainingData, folder: Path, made_by: str) -> Path:
    """Some training pictures as the packs that INT8 is calibrated on.

    Where no picture is rated, clean and degraded ones stand for both.
    """
    degraded = _of_training(data.unrated.records) if data.unrated else []
    rated = _of_training(data.rated.records)
    sets = (
        ("rated", data.rated if rated else data.unrated, rated or degraded),
        ("ladders", data.unrated if degraded else data.rated, degraded or rated),
    )
    for name, pictures, records in sets:
        assert isinstance(pictures, ShardPictures)
        write_pack(
            folder / name,
            (
                (Record(r.name, r.content, r.split, mos=r.mos), pictures.planes(r))
                for r in evenly(records, _CALIBRATION_PICTURES)
            ),
            made_by=made_by,
            settings={},
        )
    return folder


def _of_training(records: Sequence[AnyRecord]) -> list[Any]:
    return [r for r in records if r.split == "train"]
