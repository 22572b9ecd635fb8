"""``label`` and ``train``: commands to be registered with an app by ``app.command()(label)``."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dgiqa_stream.errors import ConfigError
from distill.options import Depth, DepthCache, Device, Threads
from distill.process import command_line, use_threads
from distill.say import say

if TYPE_CHECKING:
    from distill.compute import Compute, Precision
    from distill.data.training_data import TrainingData

SlimRecipe = Annotated[Path, typer.Argument(help="Of a student with a slim trunk.")]
Backbone = Annotated[Path | None, typer.Option(help="MobileNetV2 with BatchNorm, .npz.")]
Run = Annotated[Path, typer.Option(help="Folder for checkpoints and logs; resumes from it.")]
Packs = Annotated[Path | None, typer.Option(help="What `data` wrote.")]
Shards = Annotated[Path | None, typer.Option(help="What `shards` wrote.")]
EndEarly = Annotated[int | None, typer.Option(help="End early, at the recipe's rates.")]
Teacher = Annotated[
    Path | None, typer.Option(help="best.pt or float .onnx of a student to imitate.")
]
_GPU_CROPS, _CPU_CROPS = 144, 9
_MOST_WORKERS = 8


def label(
    *,
    teacher: Annotated[Path, typer.Option(help="Its .safetensors, or a published .pth.")],
    shards: Annotated[Path, typer.Option(help="What `shards` wrote.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder; goes on with it.")],
    backbone: Annotated[
        str | None, typer.Option(help="What a .pth was trained with; a safetensors knows.")
    ] = None,
    depth: Depth = None,
    depth_cache: DepthCache = None,
    crops: Annotated[int | None, typer.Option(help="Of the grid: 1, 4, 9, 16 …")] = None,
    device: Device = "auto",
    threads: Threads = 0,
    max_left_out: Annotated[
        int, typer.Option(help="So many unreadable pictures are passed over.")
    ] = 20,
) -> None:
    """Let a teacher look at every picture in shards and keep what a student can learn from.

    Interrupt it at will: the same command goes on where it stopped.
    """

    from distill.data.depth import PUBLISHED_DEPTH, open_depth
    from distill.labelling import label_shards
    from distill.models.official import open_teacher
    from distill.teacher_score import make_protocol, tell_other_depth, torch_device

    use_threads(threads)
    where = torch_device(device)
    opened = open_teacher(teacher, backbone=backbone)
    maps = open_depth(depth or PUBLISHED_DEPTH, device=str(where), cache=depth_cache)
    tell_other_depth(opened, maps)
    manifest = label_shards(
        opened,
        maps,
        make_protocol("grid", num_crops=crops),
        shards,
        output,
        teacher_name=teacher.name,
        made_by=command_line(),
        device=where,
        at_once=_GPU_CROPS if where.type == "cuda" else _CPU_CROPS,
        max_left_out=max_left_out,
    )
    say(f"{manifest.num_pictures} pictures labelled in {output}")


def train(
    recipe: Annotated[Path, typer.Argument()],
    *,
    run: Run,
    backbone: Backbone = None,
    weights: Annotated[
        Path | None, typer.Option(help="To begin with: best.pt of a student, or a float .onnx.")
    ] = None,
    packs: Packs = None,
    shards: Shards = None,
    labels: Annotated[Path | None, typer.Option(help="What `label` wrote, of the shards.")] = None,
    steps: Annotated[int | None, typer.Option(help="Stop early; for trials.")] = None,
    device: Device = "auto",
    workers: Annotated[
        int | None, typer.Option(help="Processes that cut views; 0 is a thread.")
    ] = None,
    threads: Threads = 0,
) -> None:
    """Fit the student of a recipe, to packs, to shards and a teacher's labels, or to both.

    Of packs and shards given together, the rated pictures are the packs'.
    Interrupt it at will: it goes on from its last checkpoint.
    """
    from distill.recipe import load_recipe
    from distill.trainer import train as fit

    if (backbone is None) == (weights is None):
        raise ConfigError("training begins with --backbone or with --weights: give one of them")
    settings = load_recipe(recipe)
    compute = begin_training(device, settings.train.precision, threads=threads, workers=workers)
    opened = _opened(packs, shards, labels)
    best = fit(
        settings,
        opened,
        run,
        backbone=backbone,
        weights=weights,
        num_steps=steps,
        compute=compute,
    )
    typer.echo(json.dumps(best, indent=1))


def imitate(
    recipe: SlimRecipe,
    *,
    run: Run,
    backbone: Backbone = None,
    packs: Packs = None,
    shards: Shards = None,
    teacher: Teacher = None,
    steps: EndEarly = None,
    device: Device = "auto",
    threads: Threads = 0,
) -> None:
    """Teach a slim trunk to imitate a larger one, and fit a head: a whole student.

    Interrupt it at will: it goes on from its last checkpoint.
    """
    from distill.imitating import imitate as teach
    from distill.recipe import load_recipe

    settings = load_recipe(recipe)
    compute = begin_training(device, settings.train.precision, threads=threads)
    left = teach(
        settings,
        _opened(packs, shards, None),
        run,
        backbone=backbone,
        teacher=teacher,
        num_steps=steps,
        compute=compute,
    )
    say(f"{left:.4f} of the variance is left unexplained; the student is in {run}")


def _opened(packs: Path | None, shards: Path | None, labels: Path | None) -> TrainingData:
    from distill.data.training_data import open_packs, open_shards

    if (packs is None and shards is None) or (labels is not None and (shards is None or packs)):
        raise ConfigError(
            "training learns from --packs, from --shards with or without --labels, or from packs "
            "and shards"
        )
    return open_packs(packs, shards) if packs else open_shards(shards or Path(), labels)


def begin_training(
    device: str, precision: Precision, *, threads: int = 0, workers: int | None = None
) -> Compute:
    """Set this process's threads and memory; where to compute.

    Without a number of ``workers``, a GPU gets one for each core but one, a CPU none: there they
    would take from the training what they give.
    """
    from distill.compute import make_compute

    cores = len(os.sched_getaffinity(0))
    use_threads(threads)
    compute = make_compute(device, precision, num_workers=workers or 0)
    if workers is None and compute.device.type == "cuda":
        return replace(compute, num_workers=min(_MOST_WORKERS, max(1, cores - 1)))
    return compute
