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
_LARGEST_GRADIENT = 5.0
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
    run.mkdir(parents=True, exist_ok=True)
    fit = _Fit(recipe, packs, run, num_steps)
    fit.begin(backbone, weights)
    if prepare is not None:
        prepare(fit.model)
        prepare(fit.averaged.model)
    return fit.run()


class _Fit:
    """One training run: its data, its model and optimiser, and how far it is."""

    def __init__(self, recipe: Recipe, packs: Path, run: Path, num_steps: int | None) -> None:
        self.recipe, self.config, self.folder = recipe, recipe.train, run
        self.rated_pack, self.ladder_pack = Pack(packs / "rated"), Pack(packs / "ladders")
        self.rated, self.ladders = self._loaders()
        self.validation = [r for r in self.rated_pack.records if r.split == "validation"]
        if len(self.validation) < 2:
            raise ValueError(
                f"{self.rated_pack.folder} holds {len(self.validation)} pictures for validation, "
                "2 is the least: raise num_validation and run `dgiqa-distill data` again"
            )
        whole_epochs = self.config.num_epochs * self.rated.steps_per_epoch()
        self.num_steps = num_steps or self.config.num_steps or whole_epochs
        self.first, self.best = 0, {"srcc": -1.0}

    def _loaders(self) -> tuple[RatedLoader, LadderLoader]:
        config, views = self.config, self.recipe.views
        rated = RatedLoader(
            self.rated_pack,
            views,
            batch=config.rated_batch,
            seed=config.seed,
            smallest_crop=config.smallest_crop,
        )
        ladders = LadderLoader(
            self.ladder_pack,
            views,
            groups=config.ladder_groups,
            levels=config.ladder_levels,
            seed=config.seed,
            smallest_crop=config.smallest_crop,
        )
        return rated, ladders

    def begin(self, backbone: Path | None, weights: Path | None) -> None:
        """Make model and optimiser: where the last checkpoint stopped, or from the start."""
        torch.manual_seed(self.config.seed)
        self.model = Student(dropout=self.config.dropout)
        self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        is_new = not (self.folder / CHECKPOINT).is_file()
        if is_new and backbone is not None:
            load_imagenet_(self.model.trunk, backbone)
        elif is_new and weights is not None:
            self.model.load_state_dict(load_student(weights).state_dict())
        head = [*self.model.hidden.parameters(), *self.model.quality.parameters()]
        self.optimiser = torch.optim.AdamW(
            [
                *relative_rates(self.model.trunk, self.config.trunk_rate),
                {"params": head, "lr": self.config.head_rate},
            ],
            weight_decay=self.config.weight_decay,
        )
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimiser,
            lambda s: learning_rate_share(s, self.num_steps, self.config.warmup_steps),
        )
        if is_new and backbone is not None:
            fit_head_(self.model, self.rated_pack, self.recipe)
        self.averaged = Averaged(self.model, self.config.ema_decay)
        if is_new:
            say(f"before the first step: validation SRCC {self.agreement(self.model):.4f}")
        else:
            self._restore()

    def _restore(self) -> None:
        state = torch.load(self.folder / CHECKPOINT, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.averaged.model.load_state_dict(state["averaged"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.schedule.load_state_dict(state["schedule"])
        self.first, self.best = state["step"], state["best"]

    def _save_checkpoint(self, step: int) -> None:
        state = {
            "model": self.model.state_dict(),
            "averaged": self.averaged.model.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "schedule": self.schedule.state_dict(),
            "step": step,
            "best": self.best,
        }
        _save(state, self.folder / CHECKPOINT)

    def agreement(self, model: Student) -> float:
        """SRCC to MOS on the validation pictures, served as a user's pictures are."""
        mos = [float(r.mos or 0.0) for r in self.validation]
        return srcc(predict(model, self.rated_pack, self.validation, self.recipe.views), mos)

    def run(self) -> dict[str, Any]:
        """Every step that is left; the figures of the best epoch."""
        for name in ("log.csv", "validation.csv"):
            _forget_after(self.folder / name, self.first)
        began = time.monotonic()
        batches = read_ahead(lambda s: (self.rated(s), self.ladders(s)), self.first, self.num_steps)
        self.model.train()
        for step, (rated, ladder) in enumerate(batches, self.first):
            losses = self._step(step, rated, ladder)
            done = step + 1
            if done % 10 == 0:
                values = {name: loss.item() for name, loss in losses.items()}
                _log(self.folder / "log.csv", {"step": done, **values})
                pace = (time.monotonic() - began) / (done - self.first)
                say(f"step {done}/{self.num_steps}  loss {values['loss']:.4f}  {pace:.2f} s a step")
            is_last = done == self.num_steps
            if done % self.rated.steps_per_epoch() == 0 or is_last:
                self._validate(done)
            if done % _CHECKPOINT_EVERY_STEPS == 0 or is_last:
                self._save_checkpoint(done)
        return self.best

    def _step(self, step: int, rated: RatedBatch, ladder: LadderBatch) -> dict[str, Tensor]:
        torch.manual_seed(self.config.seed + step)  # dropout: the same after a resume
        losses = train_step(self.model, rated, ladder, self.config)
        self.optimiser.zero_grad()
        losses["loss"].backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), _LARGEST_GRADIENT)
        if not (torch.isfinite(losses["loss"]) and torch.isfinite(norm)):
            raise FloatingPointError(
                f"the loss became {losses['loss'].item()} and its gradient {norm.item()} at step "
                f"{step}: lower trunk_rate or head_rate and train in another --run folder (a "
                "checkpoint keeps the rates it began with)"
            )
        self.optimiser.step()
        self.schedule.step()
        self.averaged.update(self.model, step)
        return losses

    def _validate(self, done: int) -> None:
        found = self.agreement(self.averaged.model)
        order = ladder_order(self.averaged.model, self.ladder_pack, self.recipe.views)
        _log(self.folder / "validation.csv", {"step": done, "srcc": found, **order})
        ladder_share = f"{np.mean(list(order.values())):.4f}" if order else "none"
        say(f"step {done}: validation SRCC {found:.4f}, ladders {ladder_share}")
        rank = found if math.isfinite(found) else -1.0  # not a number where all scores are one
        if rank >= self.best["srcc"]:
            self.best = {"srcc": rank, "step": done, **order}
            _save(self.averaged.model.state_dict(), self.folder / BEST)


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
