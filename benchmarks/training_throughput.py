"""How fast pictures are made ready for training, against how fast a step learns from them.

    python benchmarks/training_throughput.py --recipe configs/distill/student.toml --packs DIR
    python benchmarks/training_throughput.py --recipe configs/distill/dgiqa.toml --shards DIR

The loader runs alone in one thread, then in each number of ``--workers`` processes, and training
steps run alone on batches that are already there. CPU seconds are those of the process and of its
workers (user and system): on a busy machine they say more than the clock. Writes
``benchmarks/results/training_throughput.json``, an entry for packs and one for shards.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import cv2
import torch

from distill.compute import make_compute
from distill.data.batches import BatchMaker
from distill.data.training_data import TrainingData, open_packs, open_shards
from distill.models.student import Student
from distill.objective import Objective
from distill.optimising import make_optimiser
from distill.process import command_line, keep_freed_memory
from distill.recipe import LossConfig, Recipe, load_recipe
from distill.trainer import train_step

RESULT = Path(__file__).parent / "results" / "training_throughput.json"
PACKAGES = ("torch", "numpy", "opencv-python-headless")


def cpu_seconds() -> float:
    """User and system time of this process and of the children that ended."""
    used = (resource.getrusage(w) for w in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(u.ru_utime + u.ru_stime for u in used)


def measured(num_pictures: int, began: float, cpu_began: float) -> dict[str, float]:
    """Pictures a second by the clock, and CPU milliseconds of each."""
    seconds, cpu = time.monotonic() - began, cpu_seconds() - cpu_began
    return {
        "pictures_per_second": round(num_pictures / seconds, 1),
        "cpu_ms_per_picture": round(1000 * cpu / num_pictures, 2),
    }


def loading(data: TrainingData, recipe: Recipe, workers: int, num_batches: int) -> dict[str, float]:
    """Batches one after the other; processes are started, and have made their first, before."""
    make = BatchMaker(data, recipe)
    if workers == 0:
        make(0)
        began, cpu_began = time.monotonic(), cpu_seconds()
        num_pictures = sum(len(make(number).mos) for number in range(1, num_batches + 1))
        return measured(num_pictures, began, cpu_began)
    ahead = 3 * workers  # what may lie ready when the clock is started
    batches = make_compute("cpu", num_workers=workers).batches(make, 0, ahead + num_batches)
    for _ in range(ahead):
        next(batches)
    began, num_pictures = time.monotonic(), sum(len(batch.mos) for batch in batches)
    return {"pictures_per_second": round(num_pictures / (time.monotonic() - began), 1)}


def learning(
    data: TrainingData, recipe: Recipe, device: str, num_steps: int
) -> dict[str, float | str]:
    """Steps on one batch that is already there."""
    compute = make_compute(device, recipe.train.precision)
    batch = next(compute.batches(BatchMaker(data, recipe), 0, 1))
    model, objective = Student(dropout=recipe.train.dropout), Objective(recipe, data)
    model.to(compute.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    objective.to(compute.device)
    optimiser = make_optimiser(model, objective, recipe.train)
    began, cpu_began = 0.0, 0.0
    for step in range(-1, num_steps):
        if step == 0:  # one to warm up
            began, cpu_began = time.monotonic(), cpu_seconds()
        train_step(model, objective, batch, compute)["loss"].backward()
        optimiser.step()
        optimiser.zero_grad()
    if compute.device.type == "cuda":
        torch.cuda.synchronize()
    found = measured(num_steps * len(batch.mos), began, cpu_began)
    return {"device": str(compute.device), **found}


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", type=Path, required=True)
    parser.add_argument("--packs", type=Path)
    parser.add_argument("--shards", type=Path)
    parser.add_argument("--labels", type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batches", type=int, default=8)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--workers", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    asked = parser.parse_args()
    keep_freed_memory()
    cv2.setNumThreads(1)
    torch.set_num_threads(asked.threads)
    recipe = load_recipe(asked.recipe)
    if asked.labels is None:  # the losses need labels; loading and the network do not
        recipe = Recipe(recipe.name, recipe.views, recipe.data, recipe.train, LossConfig())
    kind = "packs" if asked.packs else "shards"
    data = open_packs(asked.packs) if asked.packs else open_shards(asked.shards, asked.labels)
    entry: dict[str, Any] = {
        "command": f"python benchmarks/{command_line()}",
        "recipe": asked.recipe.stem,
        "has_labels": asked.labels is not None,
        "threads": asked.threads,
        "loader": {
            f"{n} workers" if n else "one thread": loading(data, recipe, n, asked.batches)
            for n in asked.workers
        },
        "training_step": learning(data, recipe, asked.device, asked.steps),
    }
    written = json.loads(RESULT.read_text()) if RESULT.is_file() else {}
    written["machine"] = {
        "cores": os.cpu_count(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "packages": {name: version(name) for name in PACKAGES},
    }
    written[kind] = entry
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(written, indent=1) + "\n")
    print(json.dumps(entry, indent=1))


if __name__ == "__main__":
    main()
