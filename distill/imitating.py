"""A slim trunk taught to give the maps that a trained student's trunk, or MobileNetV2, gives.

No label takes part: the teacher looks at the very views that the pupil looks at, rated pictures
and degraded ones. What is compared are the channels after the bottlenecks that a head reads, each
in its own standard deviations, place by place and in the mean over the picture. The pupil begins
with what :func:`distill.slimming.slim_` leaves of its teacher; one as wide as that takes all over
but the teacher's last convolution.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import torch
import torch.nn.functional as F
from torch import Tensor

from dgiqa_stream.errors import ConfigError
from distill.compute import Compute
from distill.data.batches import BatchMaker
from distill.data.shards import sha256_of
from distill.data.training_data import TrainingData
from distill.head_fit import fit_head_
from distill.models.student import Student, load_trunk, normalised_view
from distill.models.trunks import (
    NUM_SHARED,
    WIDTHS,
    SlimTrunk,
    Trunk,
    load_imagenet_,
    make_trunk,
)
from distill.optimising import Averaged, learning_rate_share, relative_rates, take_step
from distill.recipe import Recipe
from distill.run_folder import BEST, CHECKPOINT, LOG, RunFolder
from distill.say import say
from distill.slimming import slim_

_CHECKPOINT_EVERY_STEPS = 100
_LOG_EVERY_STEPS = 20
_NUM_MEASURED = 4  # batches that the channels' deviations are taken from
_NUM_SLIMMED_ON = 4  # batches that channels are chosen on
_SMALLEST_DEVIATION = 1e-3
_TAPPED = SlimTrunk.TAPPED


def imitate(
    recipe: Recipe,
    data: TrainingData,
    run: Path,
    *,
    backbone: Path | None = None,
    teacher: Path | None = None,
    num_steps: int | None = None,
    compute: Compute | None = None,
) -> float:
    """Teach a slim trunk; returns the share of the teacher's variance that it leaves unexplained.

    The teacher is an ImageNet ``backbone``, or the trunk of a trained student (``teacher``: its
    weights, or a float ``.onnx`` such as the shipped one) that knows already what people see.

    ``num_steps`` ends before the recipe's last step. ``run`` receives ``checkpoint.pt`` (to
    resume), ``best.pt`` (a student: the averaged trunk, and a head fitted to the ratings) and
    ``log.csv``. Raises :class:`ConfigError` for a recipe without a slim trunk or other than one
    teacher, or where the run was begun with something else, :class:`ModelError` where the teacher
    holds none, ``FloatingPointError`` where a loss is no longer a number.
    """
    where, folder = compute or Compute(), RunFolder(run)
    pupil = make_trunk(recipe.model)
    if not isinstance(pupil, SlimTrunk):
        raise ConfigError('a slim trunk imitates: set trunk = "slim" in [model]')
    taught_by = _teacher(backbone, teacher)
    begun_with = _about(recipe, data, teacher or backbone)
    if folder.has_checkpoint():
        _refuse_other(folder, begun_with)
    else:
        _slim_(pupil, taught_by, recipe, data, where)
    imitation = _Imitation(recipe, data, folder, taught_by, where, pupil, about=begun_with)
    return imitation.run(num_steps)


def _teacher(backbone: Path | None, weights: Path | None) -> Trunk:
    """A trunk that is not to move."""
    if (backbone is None) == (weights is None):
        raise ConfigError("a trunk imitates one teacher: give --teacher or --backbone, one of them")
    if weights is not None:
        trunk = load_trunk(weights)
    else:
        assert backbone is not None
        trunk = Trunk()
        load_imagenet_(trunk, backbone)
    return trunk.eval().requires_grad_(False)


def _about(recipe: Recipe, data: TrainingData, teacher: Path | None) -> dict[str, Any]:
    """What must be the same for a run to go on."""
    assert teacher is not None
    tables = msgspec.to_builtins(recipe)
    return {
        "the teacher": sha256_of(teacher),
        "the data": data.identity,
        **{f"[{name}]": tables[name] for name in ("model", "imitate", "views", "train")},
    }


def _refuse_other(folder: RunFolder, now: Mapping[str, Any]) -> None:
    begun = folder.load_checkpoint().get("about")
    if begun is None:
        raise ConfigError(
            f"{folder.folder} has the checkpoint of another command: give another --run"
        )
    for name, value in now.items():
        if begun.get(name) != value:
            raise ConfigError(
                f"{folder.folder} was begun with something else as {name}: give the same again, or "
                "another --run folder"
            )


def _slim_(
    trunk: SlimTrunk, teacher: Trunk, recipe: Recipe, data: TrainingData, where: Compute
) -> None:
    """Take the teacher's channels over, chosen on batches that no step takes; or all of them."""
    if trunk.widths == WIDTHS:
        trunk.load_state_dict(
            {k: v for k, v in teacher.state_dict().items() if k in trunk.state_dict()}
        )
        say("as wide as its teacher: its bottlenecks are taken over")
        return
    first = recipe.imitate.num_steps + 2 * _NUM_MEASURED
    views: dict[str, list[Tensor]] = {}
    for batch in where.batches(BatchMaker(data, recipe), first, first + _NUM_SLIMMED_ON):
        for name, view in batch.views.items():
            views.setdefault(name, []).append(normalised_view(view))
    for lost in slim_(trunk, teacher, views["whole"], views["fragments"], seed=recipe.train.seed):
        say(
            f"bottleneck {lost.bottleneck}: {lost.num_kept} of {lost.num_channels} channels, "
            f"{lost.unexplained:.3f} of the variance of its map unexplained"
        )


class _Imitation:
    """One run: a pupil, its teacher, and how far it is."""

    def __init__(
        self,
        recipe: Recipe,
        data: TrainingData,
        folder: RunFolder,
        teacher: Trunk,
        where: Compute,
        pupil: SlimTrunk,
        *,
        about: Mapping[str, Any],
    ) -> None:
        """``about`` is kept in checkpoints: what a run that goes on must share."""
        self.about = about
        self.recipe, self.data, self.config = recipe, data, recipe.imitate
        self.folder, self.compute = folder, where
        self.make = BatchMaker(data, recipe)
        self.teacher, self.pupil = teacher, pupil
        torch.manual_seed(recipe.train.seed)
        for net in (self.teacher, self.pupil):
            net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            net.to(where.device)
        self.optimiser = torch.optim.AdamW(
            relative_rates(pupil, self.config.rate),
            self.config.rate,
            weight_decay=self.config.weight_decay,
        )
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimiser,
            lambda s: learning_rate_share(s, self.config.num_steps, self.config.warmup_steps),
        )
        self.averaged = Averaged(self.pupil, self.config.ema_decay)
        self.scales = self._measured()
        self.scaler = where.scaler()
        self.first = 0
        if folder.has_checkpoint():
            self._restore()

    def _measured(self) -> dict[tuple[str, int], tuple[Tensor, Tensor]]:
        """Mean and standard deviation of each map's channels, (C, 1, 1) each."""
        first = self.config.num_steps
        seen: dict[tuple[str, int], list[Tensor]] = {}
        for batch in self.compute.batches(self.make, first, first + _NUM_MEASURED):
            for name, view in batch.views.items():
                for k, y in enumerate(self._taught(view.to(self.compute.device), name)):
                    seen.setdefault((name, k), []).append(y)
        found = {}
        for at, maps in seen.items():
            y = torch.cat(maps)
            deviation = y.std((0, 2, 3), keepdim=True)[0].clamp_min(_SMALLEST_DEVIATION)
            found[at] = y.mean((0, 2, 3), keepdim=True)[0], deviation
        return found

    @torch.no_grad()
    def _taught(self, view: Tensor, name: str) -> list[Tensor]:
        """uint8 (N, H, W, 3) to the teacher's maps, float32."""
        with self.compute.autocast():
            return [y.float() for y in _maps(self.teacher, normalised_view(view), name)]

    def _restore(self) -> None:
        state = self.folder.load_checkpoint()
        self.pupil.load_state_dict(state["pupil"])
        self.averaged.model.load_state_dict(state["averaged"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.schedule.load_state_dict(state["schedule"])
        self.scaler.load_state_dict(state["scaler"])
        self.first = state["step"]

    def _save(self, step: int) -> None:
        state = {
            "pupil": self.pupil.state_dict(),
            "averaged": self.averaged.model.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "schedule": self.schedule.state_dict(),
            "scaler": self.scaler.state_dict(),
            "about": dict(self.about),
            "step": step,
        }
        self.folder.save(state, CHECKPOINT)

    def run(self, last: int | None) -> float:
        """Every step that is left; what the averaged pupil leaves unexplained."""
        self.folder.forget_after(self.first)
        num_steps = max(self.first, self.config.num_steps if last is None else last)
        self.pupil.train()
        batches = self.compute.batches(self.make, self.first, num_steps)
        for step, batch in enumerate(batches, self.first):
            loss, unexplained = self._losses(self.pupil, batch.views)
            self.optimiser.zero_grad()
            self.scaler.scale(loss).backward()
            self._update(step, loss)
            done = step + 1
            if done % _LOG_EVERY_STEPS == 0:
                told = unexplained.mean().item()
                self.folder.log(LOG, {"step": done, "loss": loss.item(), "unexplained": told})
                each = ", ".join(f"{value:.3f}" for value in unexplained.tolist())
                say(f"step {done}/{num_steps}  unexplained {told:.4f} ({each})")
            if done % _CHECKPOINT_EVERY_STEPS == 0 or done == num_steps:
                self._save(done)
        left = self._final()
        self.folder.save(self._kept(), BEST)
        return left

    def _update(self, step: int, loss: Tensor) -> None:
        """Move the pupil, unless loss or gradient is no longer a number."""
        told = f"at step {step}: lower the rate in [imitate] and imitate in another --run folder"
        parameters = self.pupil.parameters()
        if take_step(self.optimiser, self.scaler, parameters, loss, may_pass_over=True, told=told):
            self.schedule.step()
            self.averaged.update(self.pupil, step)

    def _losses(self, pupil: Trunk, views: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """What a step lowers, and the share of variance left in each map, views after views."""
        total = torch.zeros((), device=self.compute.device)
        left = []
        for name, cut in views.items():
            view = cut.to(self.compute.device)
            wanted = self._taught(view, name)
            with self.compute.autocast():
                found = _maps(pupil, normalised_view(view), name)
            for k, (y, target) in enumerate(zip(found, wanted, strict=True)):
                mean, deviation = self.scales[name, k]
                z, aim = (y.float() - mean) / deviation, (target - mean) / deviation
                at_places = F.mse_loss(z, aim)
                of_means = F.mse_loss(z.mean((2, 3)), aim.mean((2, 3)))
                total = total + at_places + self.config.mean_weight * of_means
                left.append(at_places.detach())
        return total, torch.stack(left)

    @torch.no_grad()
    def _final(self) -> float:
        """Of the pupil that is kept, on batches that no step took."""
        first = self.config.num_steps + _NUM_MEASURED
        left = [
            self._losses(self.averaged.model, batch.views)[1].mean()
            for batch in self.compute.batches(self.make, first, first + _NUM_MEASURED)
        ]
        return float(torch.stack(left).mean())

    def _kept(self) -> Mapping[str, Tensor]:
        """The averaged trunk with a head of its own."""
        student = Student(trunk=self.averaged.model).to(self.compute.device)
        fit_head_(student, self.data, self.recipe, compute=self.compute)
        return student.state_dict()


def _maps(net: Trunk, x: Tensor, name: str) -> list[Tensor]:
    """What is compared, of the pupil or the teacher, for a view of that name."""
    end = _TAPPED[-1] + 1 if name == "whole" else NUM_SHARED
    y, maps = F.relu(net.stem(x)), []
    for j in range(end):
        y = net.blocks[j](y)
        if j in _TAPPED:
            maps.append(y)
    return maps
