"""The training loop: resumable at any step, the same result whether or not it was interrupted."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from torch import Tensor, nn

from dgiqa_stream.errors import ConfigError, ModelError, SourceError
from distill.compute import Compute, make_compute
from distill.curves import CURVES, draw_curves
from distill.data.batch import Batch
from distill.data.batches import BatchMaker
from distill.data.leave_out import without_kinds
from distill.data.training_data import TrainingData, open_packs
from distill.data.twins import without_twins
from distill.head_fit import fit_head_
from distill.models.student import ONNX, Student, load_student, load_trunk
from distill.models.trunks import load_imagenet_, make_trunk
from distill.objective import Objective
from distill.optimising import Averaged, learning_rate_share, make_optimiser, take_step
from distill.recipe import Recipe
from distill.run_folder import BEST, CHECKPOINT, LOG, VALIDATION, RunFolder
from distill.say import say
from distill.validating import Validation

_CHECKPOINT_EVERY_STEPS = 50
_LOG_EVERY_STEPS = 10
_MOST_SKIPPED = 20
MAX_LEFT_OUT = 20


def train(
    recipe: Recipe,
    data: Path | TrainingData,
    run: Path,
    *,
    backbone: Path | None = None,
    weights: Path | None = None,
    prepare: Callable[[Student], None] | None = None,
    num_steps: int | None = None,
    compute: Compute | None = None,
) -> dict[str, Any]:
    """Fit the student; returns the validation figures of the best epoch.

    It starts from an ImageNet ``backbone``, whose head is fitted first, or from the ``weights`` of
    a trained student; of a float ``.onnx`` file the trunk is taken and the head fitted first.
    ``data`` are opened pictures or a folder of packs. ``prepare`` changes what the model computes,
    not its parameters, before the first step: quantisation-aware training rounds there. ``run``
    receives ``checkpoint.pt`` (to resume), ``best.pt`` (weights), ``log.csv``, ``validation.csv``
    and ``curves.png``. Raises ``ValueError`` where the data lack pictures, :class:`ConfigError`
    where they lack labels that the recipe's losses need, or where they or the recipe are not those
    the run began with, :class:`SourceError` where too many pictures cannot be read,
    :class:`SinkError` on a full disk, ``FloatingPointError`` where a loss or gradient is no longer
    a number.
    """
    if (backbone is None) == (weights is None):
        raise ValueError("training starts from a backbone or from weights: give one of them")
    folder = RunFolder(run)
    opened = open_packs(data) if isinstance(data, Path) else data
    if recipe.data.without_twins:
        opened = without_twins(opened)
    opened = without_kinds(opened, recipe.data.leave_out)
    where = compute or make_compute("cpu", recipe.train.precision)
    fit = _Fit(recipe, opened, folder, where, num_steps)
    fit.begin(backbone, weights)
    if prepare is not None:
        prepare(fit.model)
        prepare(fit.averaged.model)
    return fit.run()


class _Fit:
    """One training run: its data, its model and optimiser, and how far it is."""

    def __init__(
        self,
        recipe: Recipe,
        data: TrainingData,
        folder: RunFolder,
        compute: Compute,
        num_steps: int | None,
    ) -> None:
        self.recipe, self.config, self.folder = recipe, recipe.train, folder
        self.data, self.compute = data, compute
        self.make = BatchMaker(data, recipe)
        self.validation = Validation(data, recipe, compute)
        self.steps_per_epoch = max(1, self.make.per_epoch() // self.config.num_accumulated)
        whole_epochs = self.config.num_epochs * self.steps_per_epoch
        self.num_steps = num_steps or self.config.num_steps or whole_epochs
        self.first, self.best, self.num_skipped = 0, {"srcc": -1.0}, 0
        self.left_out: dict[str, str] = {}

    def begin(self, backbone: Path | None, weights: Path | None) -> None:
        """Make model and optimiser: where the last checkpoint stopped, or from the start."""
        torch.manual_seed(self.config.seed)
        trunk = make_trunk(self.recipe.model)
        self.model = Student(dropout=self.config.dropout, trunk=trunk)
        self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        is_new = not self.folder.has_checkpoint()
        if is_new and backbone is not None:
            load_imagenet_(trunk, backbone)
        elif is_new and weights is not None:
            self._begin_with(weights)
        self.model.to(self.compute.device)
        self.objective = Objective(self.recipe, self.data).to(self.compute.device)
        self.optimiser = make_optimiser(self.model, self.objective, self.config)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimiser,
            lambda s: learning_rate_share(s, self.num_steps, self.config.warmup_steps),
        )
        self.scaler = self.compute.scaler()
        if is_new and (weights is None or weights.suffix == ONNX):
            fit_head_(self.model, self.data, self.recipe, compute=self.compute)
        self.averaged = Averaged(self.model, self.config.ema_decay)
        if is_new:
            found = self.validation.agreement(self.model)
            say(f"before the first step: validation SRCC {found:.4f}")
        else:
            self._restore()

    def _begin_with(self, weights: Path) -> None:
        """Take over a student, or the trunk alone of one that was exported."""
        if weights.suffix == ONNX:
            net: nn.Module = self.model.trunk
            state = load_trunk(weights).state_dict()
        else:
            net, state = self.model, load_student(weights).state_dict()
        try:
            net.load_state_dict(state)
        except RuntimeError as exc:
            reason = str(exc).splitlines()[1].strip()
            raise ModelError(
                f"{weights.name} has another trunk than the recipe's [model]: {reason}"
            ) from exc

    def _restore(self) -> None:
        state = self.folder.load_checkpoint()
        if state.get("data", self.data.identity) != self.data.identity:
            raise ConfigError(
                f"{self.folder.folder} was begun with other data or a teacher's other labels "
                f"({state['data']}, now {self.data.identity}): give another --run folder"
            )
        self._refuse_other_recipe(state.get("recipe", {}))
        self.model.load_state_dict(state["model"])
        self.averaged.model.load_state_dict(state["averaged"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.schedule.load_state_dict(state["schedule"])
        self.objective.load_state_dict(state.get("objective", {}))
        self.scaler.load_state_dict(state.get("scaler", {}))
        self.first, self.best = state["step"], state["best"]

    def _recipe(self) -> dict[str, Any]:
        """What must be the same for a run to go on, by key of the recipe's file."""
        tables = msgspec.to_builtins(self.recipe)
        flat = {
            f"{table}.{key}": value for table in ("train", "losses")
            for key, value in tables[table].items()
        }  # fmt: skip
        return {**flat, "views": tables["views"], "steps": self.num_steps}

    def _refuse_other_recipe(self, begun: Mapping[str, Any]) -> None:
        now = self._recipe()
        for key, value in begun.items():
            if now.get(key) != value:
                raise ConfigError(
                    f"{self.folder.folder} was begun with {key} {value}, not {now.get(key)}: give "
                    "the same recipe and --steps, or another --run folder"
                )

    def _save_checkpoint(self, step: int) -> None:
        state = {
            "model": self.model.state_dict(),
            "averaged": self.averaged.model.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "schedule": self.schedule.state_dict(),
            "objective": self.objective.state_dict(),
            "scaler": self.scaler.state_dict(),
            "data": self.data.identity,
            "recipe": self._recipe(),
            "step": step,
            "best": self.best,
        }
        self.folder.save(state, CHECKPOINT)

    def run(self) -> dict[str, Any]:
        """Every step that is left; the figures of the best epoch."""
        self.folder.forget_after(self.first)
        each = self.config.num_accumulated
        clock = _Clock(self.first, self.num_steps)
        batches = clock.timed(
            self.compute.batches(self.make, self.first * each, self.num_steps * each)
        )
        self.model.train()
        for step in range(self.first, self.num_steps):
            losses = self._step(step, batches)
            done = step + 1
            if done % _LOG_EVERY_STEPS == 0:
                values = {name: loss.item() for name, loss in losses.items()}
                self.folder.log(LOG, {"step": done, **values})
                say(clock.told(done, values["loss"]))
            is_last = done == self.num_steps
            if done % self.steps_per_epoch == 0 or is_last:
                self._validate(done)
            if done % _CHECKPOINT_EVERY_STEPS == 0 or is_last:
                self._save_checkpoint(done)
        return self.best

    def _step(self, step: int, batches: Iterator[Batch[Tensor]]) -> dict[str, Tensor]:
        each = self.config.num_accumulated
        self.optimiser.zero_grad()
        total: dict[str, Tensor] = {}
        for part in range(each):
            batch = next(batches)
            self._note_left_out(batch)
            torch.manual_seed(self.config.seed + step * each + part)  # the same after a resume
            losses = train_step(self.model, self.objective, batch, self.compute)
            self.scaler.scale(losses["loss"] / each).backward()
            for name, loss in losses.items():
                share = loss.detach() / each
                total[name] = total[name] + share if name in total else share
        self._update(step, total["loss"])
        return total

    def _update(self, step: int, loss: Tensor) -> None:
        """Move the parameters, unless loss or gradient is no longer a number."""
        parameters = [*self.model.parameters(), *self.objective.parameters()]
        is_moved = take_step(
            self.optimiser,
            self.scaler,
            parameters,
            loss,
            may_pass_over=self.num_skipped < _MOST_SKIPPED,
            told=f"at step {step}: lower trunk_rate or head_rate and train in another --run folder "
            "(a checkpoint keeps the rates it began with)",
        )
        self.num_skipped = 0 if is_moved else self.num_skipped + 1
        if is_moved:
            self.schedule.step()
            self.averaged.update(self.model, step)

    def _note_left_out(self, batch: Batch[Tensor]) -> None:
        for left in batch.left_out:
            if left.name not in self.left_out:
                self.left_out[left.name] = left.reason
                say(f"left out: {left.reason}")
        if len(self.left_out) > MAX_LEFT_OUT:
            raise SourceError(
                f"{len(self.left_out)} pictures cannot be read and {MAX_LEFT_OUT} may be left out; "
                f"the last: {batch.left_out[-1].reason}"
            )

    def _validate(self, done: int) -> None:
        figures = self.validation.figures(self.averaged.model)
        self.folder.log(VALIDATION, {"step": done, **figures})
        names = self.validation.names()
        order = [value for name, value in figures.items() if name not in names]
        agreement = ", ".join(f"{name.upper()} {figures[name]:.4f}" for name in names)
        ladder_share = f"{np.mean(order):.4f}" if order else "none"
        say(f"step {done}: validation {agreement}, ladders {ladder_share}")
        found = figures[names[0]]
        rank = found if math.isfinite(found) else -1.0  # not a number where all scores are one
        if rank >= self.best["srcc"]:
            rest = {name: value for name, value in figures.items() if name != names[0]}
            self.best = {"srcc": rank, "step": done, **rest}
            self.folder.save(self.averaged.model.state_dict(), BEST)
        if not draw_curves(self.folder.folder) and done == self.num_steps:
            say(f"no {CURVES}: pip install 'dgiqa-stream[report]'")


def train_step(
    model: Student, objective: Objective, batch: Batch[Tensor], compute: Compute
) -> dict[str, Tensor]:
    """The weighted losses of one batch; ``loss`` is their sum."""
    sent = compute.upload(batch)
    with compute.autocast():
        told = model.describe(sent.views["whole"], sent.views["fragments"])
    parts = objective(told, sent, model.head)
    return {"loss": sum(parts.values(), torch.zeros((), device=told.logits.device)), **parts}


class _Clock:
    """How fast a run is, when it will end, and how much of it is waiting for pictures."""

    def __init__(self, first: int, num_steps: int) -> None:
        self.first, self.num_steps, self.waited = first, num_steps, 0.0
        self.began = time.monotonic()

    def timed(self, batches: Iterator[Batch[Tensor]]) -> Iterator[Batch[Tensor]]:
        """The same batches; the time each was waited for is added up."""
        while True:
            began = time.monotonic()
            batch = next(batches, None)
            self.waited += time.monotonic() - began
            if batch is None:
                return
            yield batch

    def told(self, done: int, loss: float) -> str:
        """A line for people."""
        took = time.monotonic() - self.began
        pace = took / (done - self.first)
        minutes = pace * (self.num_steps - done) / 60
        return (
            f"step {done}/{self.num_steps}  loss {loss:.4f}  {pace:.2f} s a step, "
            f"{100 * self.waited / took:.0f} % of it waiting for pictures; {minutes:.0f} min left"
        )
