"""Small comparisons of the teacher's parts and its relatives; ``python -m distill.ablations NAME``.

BIQ2021's training part alone: a part of it trains, pictures held back from it judge, the official
test part is never read. The backbone is frozen and computed once (:mod:`ablation_features`), depth
is the classical stand-in, and the widths are an eighth of the published ones: what is compared is
the parts with each other, not with any published figure.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any

import numpy as np
import torch
import typer

from dgiqa_stream.correlation import plcc, srcc
from dgiqa_stream.errors import ConfigError
from distill.ablation_features import Seen, depth_of_nothing, features
from distill.ablation_nets import (
    DepthCar,
    Fitted,
    Integration,
    Noise,
    PlainHead,
    Pooling,
    Targets,
    agreement,
    all_targets,
    crop_scores,
    fit,
    pooled_of,
)
from distill.ablation_settings import Settings
from distill.data.content_similarity import transfer_labels
from distill.data.shards import write_json
from distill.models.qfm import pseudo_labels, sensitivity
from distill.process import command_line, keep_freed_memory
from distill.say import say

Figures = dict[str, float]
Comparison = dict[str, list[Figures]]
"""Variant to its figures, one for each seed."""
_SIZES = Settings(Path(), Path(), Path())


def depth(train: Seen, validation: Seen, settings: Settings) -> Comparison:
    """DGIQA's fusion with depth, with a constant map, with the picture asking itself; no fusion."""
    nothing = depth_of_nothing(settings)
    variants: dict[str, Callable[[], Pooling]] = {
        "depth": lambda: DepthCar("map", nothing),
        "constant depth": lambda: DepthCar("constant", nothing),
        "picture asks itself": lambda: DepthCar("picture", nothing),
        "plain pooled head": PlainHead,
    }
    return _compare(variants, train, validation, settings)


def integration(train: Seen, validation: Seen, settings: Settings) -> Comparison:
    """GlintIQA's progressive integration against plain concatenation and local maps alone.

    No weights of a ViT are at hand: the last four bottlenecks stand where its blocks would.
    """
    variants: dict[str, Callable[[], Pooling]] = {
        "progressive": lambda: Integration("progressive"),
        "concatenated": lambda: Integration("concatenated"),
        "local maps alone": lambda: Integration("local"),
    }
    return _compare(variants, train, validation, settings)


def qfm(train: Seen, validation: Seen, settings: Settings) -> Comparison:
    """Training against semantic noise, on DGIQA's fusion with depth."""
    nothing = depth_of_nothing(settings)
    variants = {
        "none": None,
        "insensitivity 0.5": Noise(0.5),
        "insensitivity 0.5, gated": Noise(0.5, gated=True),
        "insensitivity 0.5, contrast 0.05": Noise(0.5, 0.05),
    }
    found: Comparison = {name: [] for name in variants}
    for seed in range(settings.num_seeds):
        for name, noise in variants.items():
            fitted = fit(
                lambda: DepthCar("map", nothing),
                train, all_targets(train), settings, seed=seed, noise=noise,
            )  # fmt: skip
            figures = agreement(fitted, validation)
            figures["sensitivity"] = _sensitivity(fitted, validation)
            _told(found, name, figures)
    return found


def _sensitivity(fitted: Fitted, seen: Seen) -> float:
    return sensitivity(
        pooled_of(fitted, seen)[:, 0],
        seen.mos,
        lambda f: torch.sigmoid(fitted.head(f)),
        semantics=seen.semantics()[:, 0],
    )


def transfer(train: Seen, validation: Seen, settings: Settings) -> Comparison:
    """Half of the ratings hidden, taken from similar content: ridge regression with and without."""
    x, y = train.pooled().mean(1).numpy(), train.mos.numpy()
    found: Comparison = {}
    for seed in range(settings.num_seeds):
        order = np.random.default_rng([settings.seed, seed]).permutation(len(y))
        known, hidden = np.split(order, 2)
        cases = {"rated half": (known, y[known], np.ones(len(known)))}
        for number in (1, 8):
            made = transfer_labels(x[hidden], x[known], y[known], num_neighbours=number)
            confidence = np.clip(made.similarity, 0, 1)
            for name, weight in (("by similarity", confidence), ("at full weight", 1.0)):
                cases[f"and {number} neighbours, {name}"] = (
                    order,
                    np.concatenate([y[known], made.labels]),
                    np.concatenate([np.ones(len(known)), weight * np.ones(len(hidden))]),
                )
            labels = {"srcc": srcc(made.labels, y[hidden]), "plcc": plcc(made.labels, y[hidden])}
            _told(found, f"labels of {number} neighbours themselves", labels)
        cases["all ratings"] = (order, y[order], np.ones(len(y)))
        for name, (rows, labels_of, weight) in cases.items():
            _told(found, name, _ridge(x[rows], labels_of, weight, validation))
    return found


def _ridge(x: Any, y: Any, weight: Any, validation: Seen) -> Figures:
    """Weighted ridge regression, a penalty of a third of the rows on standardised features."""
    mean, deviation = x.mean(0), x.std(0) + 1e-6
    rows = (x - mean) / deviation
    centre = np.average(y, weights=weight)
    weighted = rows * weight[:, None]
    gram = weighted.T @ rows + len(rows) / 3 * np.eye(rows.shape[1])
    solved = np.linalg.solve(gram, weighted.T @ (y - centre))
    scores = (validation.pooled().mean(1).numpy() - mean) / deviation @ solved + centre
    mos = validation.mos.numpy()
    return {"srcc": srcc(scores, mos), "plcc": plcc(scores, mos)}


def expansion(train: Seen, validation: Seen, settings: Settings) -> Comparison:
    """A teacher on a part of the ratings labels the other pictures for a student on all of them.

    The teacher is DGIQA's fusion with depth, the student a plain head. A quarter is rated.
    """
    nothing = depth_of_nothing(settings)
    found: Comparison = {}
    for seed in range(settings.num_seeds):
        order = torch.randperm(len(train.mos), generator=torch.Generator().manual_seed(1000 + seed))
        rated, unrated = order[: len(order) // 4], order[len(order) // 4 :]
        human = Targets(rated, train.mos[rated], torch.ones(len(rated)))
        teacher = fit(lambda: DepthCar("map", nothing), train, human, settings, seed=seed)
        _told(found, "teacher on a quarter", agreement(teacher, validation))
        pseudo = pseudo_labels(crop_scores(teacher, train, unrated))
        # as many steps for every student: more labels must not mean more training
        longer = replace(settings, num_epochs=4 * settings.num_epochs)
        cases = {"student on a quarter": (human, longer)}
        for name, weights in (("weighted", pseudo.weights), ("unweighted", None)):
            extra = torch.ones_like(pseudo.weights) if weights is None else weights
            joined = Targets(
                torch.cat([rated, unrated]),
                torch.cat([human.quality, pseudo.quality]),
                torch.cat([human.weight, extra]),
            )
            cases[f"student, expanded, {name}"] = (joined, settings)
        cases["student on all ratings"] = (all_targets(train), settings)
        for name, (targets, chosen) in cases.items():
            fitted = fit(PlainHead, train, targets, chosen, seed=100 + seed)
            _told(found, name, agreement(fitted, validation))
    return found


def _compare(
    variants: Mapping[str, Callable[[], Pooling]],
    train: Seen,
    validation: Seen,
    settings: Settings,
) -> Comparison:
    found: Comparison = {}
    for seed in range(settings.num_seeds):
        for name, make in variants.items():
            fitted = fit(make, train, all_targets(train), settings, seed=seed)
            figures = agreement(fitted, validation)
            figures["num_parameters"] = sum(p.numel() for p in make().parameters())
            _told(found, name, figures)
    return found


def _told(found: Comparison, name: str, figures: Figures) -> None:
    found.setdefault(name, []).append(figures)
    say(f"{name}: " + ", ".join(f"{k} {v:.4g}" for k, v in figures.items()))


ABLATIONS: Mapping[str, Callable[[Seen, Seen, Settings], Comparison]] = MappingProxyType(
    {
        "depth": depth,
        "qfm": qfm,
        "integration": integration,
        "transfer": transfer,
        "expansion": expansion,
    }
)


def summary(found: Comparison) -> dict[str, Any]:
    """Mean and (for two seeds or more) standard deviation of every figure, and each seed's own."""
    return {
        name: {
            key: {
                "mean": round(float(np.mean([r[key] for r in rows])), 4),
                "sd": round(float(np.std([r[key] for r in rows], ddof=1)), 4)
                if len(rows) > 1
                else None,
                "seeds": [round(r[key], 4) for r in rows],
            }
            for key in rows[0]
        }
        for name, rows in found.items()
    }


def run_ablation(name: str, settings: Settings, output: Path) -> dict[str, Any]:
    """Run one comparison and write its JSON; returns what was written."""
    began = time.monotonic()
    found = ABLATIONS[name](*features(settings), settings)
    sizes = {k: v for k, v in asdict(settings).items() if not isinstance(v, Path)}
    result = {
        "ablation": name,
        "question": (ABLATIONS[name].__doc__ or "").strip().splitlines()[0],
        "date": datetime.now(UTC).date().isoformat(),
        "command": command_line().replace("ablations.py", "python -m distill.ablations", 1),
        "machine": machine(),
        "settings": sizes,
        "depth": "classical cues, a stand-in: no depth network's weights were at hand",
        "seconds": round(time.monotonic() - began, 1),
        "results": summary(found),
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    write_json(output, result)
    return result


def machine() -> dict[str, Any]:
    """What the figures were computed on."""
    cpus = Path("/proc/cpuinfo")
    lines = cpus.read_text().splitlines() if cpus.is_file() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "processor": models[0] if models else platform.processor() or platform.machine(),
        "num_cores": len(models) or None,
        "num_threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
        "python": platform.python_version(),
    }


def main(
    name: Annotated[str, typer.Argument(help=f"{', '.join(ABLATIONS)}.")],
    *,
    packs: Annotated[Path, typer.Option(help="What `dgiqa-distill data` wrote.")],
    backbone: Annotated[Path, typer.Option(help="MobileNetV2 with BatchNorm, .npz.")],
    cache: Annotated[Path, typer.Option(help="Folder that keeps frozen features.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="JSON result.")],
    num_train: Annotated[int, typer.Option(help="Training pictures.")] = _SIZES.num_train,
    num_validation: Annotated[int, typer.Option(help="Judging ones.")] = _SIZES.num_validation,
    num_crops: Annotated[int, typer.Option(help="Crops of each.")] = _SIZES.num_crops,
    num_seeds: Annotated[int, typer.Option(help="Repetitions.")] = _SIZES.num_seeds,
    num_epochs: Annotated[int, typer.Option(help="Of each fit.")] = _SIZES.num_epochs,
    rate: Annotated[float, typer.Option(help="Largest rate of AdamW.")] = _SIZES.rate,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 1,
) -> None:
    """Compare the parts of a teacher on frozen features."""
    import cv2

    if name not in ABLATIONS:
        raise ConfigError(f"no ablation {name!r}: {', '.join(ABLATIONS)}")
    keep_freed_memory()
    cv2.setNumThreads(1)
    torch.set_num_threads(threads)
    settings = Settings(
        packs / "rated",
        backbone,
        cache,
        num_train=num_train,
        num_validation=num_validation,
        num_crops=num_crops,
        num_seeds=num_seeds,
        num_epochs=num_epochs,
        rate=rate,
    )
    result = run_ablation(name, settings, output)
    for variant, figures in result["results"].items():
        say(f"{variant}: SRCC {figures['srcc']['mean']:.4f} ± {figures['srcc']['sd'] or 0:.4f}")


if __name__ == "__main__":
    typer.run(main)
