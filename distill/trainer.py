"""The training loop: resumable at any step, the same result whether or not it was interrupted."""

from __future__ import annotations

import csv
import math
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dgiqa_stream.correlation import srcc
from dgiqa_stream.preprocess import ViewSpec
from distill.data.loader import (
    LadderBatch,
    LadderLoader,
    RatedBatch,
    RatedLoader,
    Views,
    ladders_of,
    random_look,
    read_ahead,
    stack,
    views_of,
)
from distill.data.packed import Pack, Record
from distill.losses import ladder_loss, plcc_loss, score_loss
from distill.models.student import Student, load_imagenet_, load_student
from distill.recipe import Recipe, TrainConfig
from distill.say import say

CHECKPOINT = "checkpoint.pt"
BEST = "best.pt"
_CHECKPOINT_EVERY_STEPS = 50
_EVALUATION_BATCH = 50


def tensors(views: Views) -> tuple[Tensor, Tensor]:
    """The two views as torch sees them, without a copy."""
    return torch.from_numpy(views["whole"]), torch.from_numpy(views["fragments"])


def predict(
    model: Student, pack: Pack, records: Sequence[Record], views: Sequence[ViewSpec]
) -> NDArray[np.float64]:
    """Quality in 0..1 of each picture as it is served, (N,)."""
    return np.concatenate(
        [
            torch.sigmoid(logits.float()).numpy().astype(np.float64)
            for logits in _map(model, model.logits, pack, records, views)
        ]
    )


def _map(
    model: Student,
    function: Callable[[Tensor, Tensor], Tensor],
    pack: Pack,
    records: Sequence[Record],
    views: Sequence[ViewSpec],
) -> list[Tensor]:
    def batch(i: int) -> Views:
        part = records[i * _EVALUATION_BATCH : (i + 1) * _EVALUATION_BATCH]
        return stack([views_of(pack.planes(r), views, None) for r in part])

    model.eval()
    out = []
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for made in read_ahead(batch, 0, math.ceil(len(records) / _EVALUATION_BATCH)):
            out.append(function(*tensors(made)))
    model.train()
    return out


def ladder_order(model: Student, pack: Pack, views: Sequence[ViewSpec]) -> dict[str, float]:
    """Share of neighbouring levels that fall (tolerance 0.5 of 100), by degradation.

    Empty where the pack holds no content for validation.
    """
    steps: dict[str, list[bool]] = {}
    ladders = ladders_of(pack.records, "validation")
    flat = [r for by_name in ladders.values() for ladder in by_name.values() for r in ladder]
    if not flat:
        return {}
    scores = dict(zip([r.name for r in flat], predict(model, pack, flat, views), strict=True))
    for by_name in ladders.values():
        for name, ladder in by_name.items():
            falls = [scores[b.name] <= scores[a.name] + 0.005 for a, b in pairwise(ladder)]
            steps.setdefault(name, []).extend(falls)
    return {name: float(np.mean(falls)) for name, falls in sorted(steps.items())}


def fit_head_(model: Student, rated: Pack, recipe: Recipe) -> None:
    """Fit the head on frozen features of training pictures, mirrored and not."""
    config = recipe.train
    fragments = next(v for v in recipe.views if v.kind == "fragments")
    records = [r for r in rated.records if r.split == "train"]
    mos = torch.tensor([r.mos for r in records], dtype=torch.float32)
    rng = np.random.default_rng([config.seed, 3])
    looks = {r.name: random_look(rng, 0.999, fragments) for r in records}

    def batch(i: int) -> Views:
        part = records[i * _EVALUATION_BATCH : (i + 1) * _EVALUATION_BATCH]
        return stack([views_of(rated.planes(r), recipe.views, looks[r.name]) for r in part])

    features = []
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for made in read_ahead(batch, 0, math.ceil(len(records) / _EVALUATION_BATCH)):
            features.append(model.features(*tensors(made)).float())
    x = torch.cat(features)
    model.feature_mean.copy_(x.mean(0))
    model.feature_std.copy_(x.std(0).clamp_min(1e-3))
    x = (x - model.feature_mean) / model.feature_std
    head = [*model.hidden.parameters(), *model.quality.parameters()]
    steps = config.head_epochs * max(1, len(x) // 100)
    optimiser = torch.optim.AdamW(head, config.head_rate, weight_decay=config.weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    generator = torch.Generator().manual_seed(config.seed)
    for _ in range(steps):
        chosen = torch.randint(len(x), (100,), generator=generator)
        hidden = torch.relu(model.hidden(model.dropout(x[chosen])))
        loss = score_loss(model.quality(hidden).squeeze(1), mos[chosen])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()


class Averaged:
    """An exponential moving average of a model's parameters."""

    def __init__(self, model: Student, decay: float) -> None:
        self.decay = decay
        self.model = Student(dropout=0.0)
        self.model.load_state_dict(model.state_dict())

    def update(self, model: Student, step: int) -> None:
        """Move towards the model; early steps move faster."""
        decay = min(self.decay, (1 + step) / (10 + step))
        with torch.no_grad():
            for mine, theirs in zip(self.model.parameters(), model.parameters(), strict=True):
                mine.lerp_(theirs, 1 - decay)


def learning_rate_share(step: int, num_steps: int, warmup: int) -> float:
    """Linear warm-up, then half a cosine to zero."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, num_steps - warmup)))


def relative_rates(module: torch.nn.Module, rate: float) -> list[dict[str, Any]]:
    """A parameter group for each tensor, its rate in proportion to its own size (RMS).

    Without BatchNorm nothing absorbs a step's shift, and folded tensors differ by a factor of 30 in
    size: one rate for all moved the small ones (the 1x1 expansions) by percents a step.
    """
    return [
        {"params": [p], "lr": rate * max(1e-3, float(p.detach().square().mean().sqrt()))}
        for p in module.parameters()
    ]


def train_step(
    model: Student, rated: RatedBatch, ladder: LadderBatch, config: TrainConfig
) -> dict[str, Tensor]:
    """The weighted losses of one step; ``loss`` is their sum."""
    whole = np.concatenate([rated.views["whole"], ladder.views["whole"]])
    fragments = np.concatenate([rated.views["fragments"], ladder.views["fragments"]])
    with torch.autocast("cpu", torch.bfloat16):
        logits = model.logits(torch.from_numpy(whole), torch.from_numpy(fragments))
    logits = logits.float()
    mos = torch.from_numpy(rated.mos)
    of_rated, of_ladder = logits[: len(mos)], logits[len(mos) :]
    levels = torch.from_numpy(ladder.levels)
    parts = {
        "score": score_loss(of_rated, mos),
        "plcc": config.plcc_weight * plcc_loss(torch.sigmoid(of_rated), mos),
        "ladder": config.ladder_weight
        * ladder_loss(of_ladder.view_as(levels), levels, config.ladder_margin),
    }
    return {"loss": sum(parts.values(), torch.zeros(())), **parts}


def train(
    recipe: Recipe,
    packs: Path,
    run: Path,
    *,
    backbone: Path | None = None,
    weights: Path | None = None,
    prepare: Callable[[Student], None] | None = None,
    num_steps: int | None = None,
) -> dict[str, Any]:
    """Fit the student; returns the validation figures of the best epoch.

    It starts from an ImageNet ``backbone`` (the head is fitted first) or from the ``weights`` of a
    trained student. ``prepare`` changes what the model computes, not its parameters, before the
    first step: quantisation-aware training rounds there. ``run`` receives ``checkpoint.pt`` (to
    resume), ``best.pt`` (weights), ``log.csv`` and ``validation.csv``. Raises ``ValueError`` where
    a pack lacks pictures, ``FloatingPointError`` where a loss or gradient is no longer a number.
    """
    if (backbone is None) == (weights is None):
        raise ValueError("training starts from a backbone or from weights: give one of them")
    config = recipe.train
    run.mkdir(parents=True, exist_ok=True)
    rated_pack, ladder_pack = Pack(packs / "rated"), Pack(packs / "ladders")
    rated = RatedLoader(
        rated_pack,
        recipe.views,
        batch=config.rated_batch,
        seed=config.seed,
        smallest_crop=config.smallest_crop,
    )
    ladders = LadderLoader(
        ladder_pack,
        recipe.views,
        groups=config.ladder_groups,
        levels=config.ladder_levels,
        seed=config.seed,
        smallest_crop=config.smallest_crop,
    )
    validation = [r for r in rated_pack.records if r.split == "validation"]
    if len(validation) < 2:
        raise ValueError(
            f"{rated_pack.folder} holds {len(validation)} pictures for validation, 2 is the least: "
            "raise num_validation and run `dgiqa-distill data` again"
        )
    mos = [float(r.mos or 0.0) for r in validation]
    total = num_steps or config.num_epochs * rated.steps_per_epoch()

    torch.manual_seed(config.seed)
    model = Student(dropout=config.dropout)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    head = [*model.hidden.parameters(), *model.quality.parameters()]
    is_new = not (run / CHECKPOINT).is_file()
    if is_new and backbone is not None:
        load_imagenet_(model.trunk, backbone)
    elif is_new and weights is not None:
        model.load_state_dict(load_student(weights).state_dict())
    optimiser = torch.optim.AdamW(
        [
            *relative_rates(model.trunk, config.trunk_rate),
            {"params": head, "lr": config.head_rate},
        ],
        weight_decay=config.weight_decay,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda s: learning_rate_share(s, total, config.warmup_steps)
    )
    first, best = 0, {"srcc": -1.0}
    if not is_new:
        state = torch.load(run / CHECKPOINT, weights_only=True)
        model.load_state_dict(state["model"])
        optimiser.load_state_dict(state["optimiser"])
        schedule.load_state_dict(state["schedule"])
        first, best = state["step"], state["best"]
        averaged = Averaged(model, config.ema_decay)
        averaged.model.load_state_dict(state["averaged"])
    else:
        if backbone is not None:
            fit_head_(model, rated_pack, recipe)
        averaged = Averaged(model, config.ema_decay)
        found = srcc(predict(model, rated_pack, validation, recipe.views), mos)
        say(f"before the first step: validation SRCC {found:.4f}")
    if prepare is not None:
        prepare(model)
        prepare(averaged.model)

    def save(step: int) -> None:
        state = {
            "model": model.state_dict(),
            "averaged": averaged.model.state_dict(),
            "optimiser": optimiser.state_dict(),
            "schedule": schedule.state_dict(),
            "step": step,
            "best": best,
        }
        _save(state, run / CHECKPOINT)

    for name in ("log.csv", "validation.csv"):
        _forget_after(run / name, first)
    began = time.monotonic()
    batches = read_ahead(lambda s: (rated(s), ladders(s)), first, total)
    model.train()
    for step, (rated_batch, ladder_batch) in enumerate(batches, first):
        torch.manual_seed(config.seed + step)  # dropout: the same after a resume
        losses = train_step(model, rated_batch, ladder_batch, config)
        optimiser.zero_grad()
        losses["loss"].backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        if not (torch.isfinite(losses["loss"]) and torch.isfinite(norm)):
            raise FloatingPointError(
                f"the loss became {losses['loss'].item()} and its gradient {norm.item()} at step "
                f"{step}: lower trunk_rate or head_rate and train in another --run folder (a "
                "checkpoint keeps the rates it began with)"
            )
        optimiser.step()
        schedule.step()
        averaged.update(model, step)
        done = step + 1
        if done % 10 == 0:
            _log(run / "log.csv", {"step": done, **{k: v.item() for k, v in losses.items()}})
            pace = (time.monotonic() - began) / (done - first)
            say(f"step {done}/{total}  loss {losses['loss']:.4f}  {pace:.2f} s a step")
        if done % rated.steps_per_epoch() == 0 or done == total:
            found = srcc(predict(averaged.model, rated_pack, validation, recipe.views), mos)
            order = ladder_order(averaged.model, ladder_pack, recipe.views)
            _log(run / "validation.csv", {"step": done, "srcc": found, **order})
            ladder_share = f"{np.mean(list(order.values())):.4f}" if order else "none"
            say(f"step {done}: validation SRCC {found:.4f}, ladders {ladder_share}")
            rank = found if math.isfinite(found) else -1.0  # not a number where all scores are one
            if rank >= best["srcc"]:
                best = {"srcc": rank, "step": done, **order}
                _save(averaged.model.state_dict(), run / BEST)
        if done % _CHECKPOINT_EVERY_STEPS == 0 or done == total:
            save(done)
    return best


def _save(state: dict[str, Any], path: Path) -> None:
    """Write beside, then rename: a kill leaves the old file whole."""
    temporary = path.with_suffix(".part")
    torch.save(state, temporary)
    temporary.replace(path)


def _forget_after(path: Path, step: int) -> None:
    """Drop what a killed run logged after its last checkpoint: those steps are made again."""
    if not path.is_file():
        return
    header, *rows = path.read_text().splitlines(keepends=True) or [""]
    kept = [r for r in rows if r.endswith("\n") and int(r.split(",")[0]) <= step]
    if kept:
        path.write_text(header + "".join(kept))
    else:
        path.unlink()


def _log(path: Path, row: dict[str, Any]) -> None:
    is_new = not path.exists()
    with path.open("a", newline="") as out:
        writer = csv.DictWriter(out, row.keys(), lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerow(row)
