"""A smaller trunk taught to give the maps that MobileNetV2 gives.

No label takes part: the teacher looks at the very views that the pupil looks at, rated pictures
and degraded ones. What is compared are the channels after the bottlenecks that a head reads, each
in its own standard deviations, place by place and in the mean over the picture. A slim trunk begins
with what :func:`distill.slimming.slim_` leaves of its teacher. Of a fast trunk the front alone
learns first, from the map after bottleneck 2; then the whole trunk makes up for what it does not
explain.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dgiqa_stream.errors import ConfigError
from distill.compute import Compute
from distill.data.batches import BatchMaker
from distill.data.training_data import TrainingData
from distill.head_fit import fit_head_
from distill.models.student import Student, load_front_, load_student, normalised_view
from distill.models.trunks import (
    NUM_EARLY,
    NUM_SHARED,
    FastTrunk,
    PlainFront,
    ShortTrunk,
    SlimTrunk,
    Trunk,
    copy_late_stages_,
    load_imagenet_,
    make_front,
    make_trunk,
    still_statistics_,
)
from distill.optimising import Averaged, learning_rate_share, relative_rates
from distill.recipe import ImitationConfig, Recipe
from distill.run_folder import BEST, CHECKPOINT, LOG, RunFolder
from distill.say import say
from distill.slimming import slim_

_CHECKPOINT_EVERY_STEPS = 100
_LOG_EVERY_STEPS = 20
_NUM_MEASURED = 4  # batches that the channels' deviations are taken from
_NUM_SLIMMED_ON = 4  # batches that channels are chosen on
_SMALLEST_DEVIATION = 1e-3


def train_front(
    recipe: Recipe,
    data: TrainingData,
    run: Path,
    *,
    backbone: Path,
    teacher: Path | None = None,
    num_steps: int | None = None,
    compute: Compute | None = None,
) -> float:
    """Teach a front; returns the share of the teacher's variance that it leaves unexplained.

    The teacher is the ImageNet ``backbone``, or the trunk of a trained student (``teacher``: its
    weights) that knows already what people see.

    ``num_steps`` ends before the recipe's last step: the average has settled earlier than the rates
    have fallen. ``run`` receives ``checkpoint.pt`` (to resume), ``best.pt`` (the averaged front,
    its BatchNorms kept) and ``log.csv``. Raises ``ValueError`` where the backbone is none.
    """
    trunk = _teacher(backbone, teacher)
    imitation = _FrontImitation(recipe, data, RunFolder(run), trunk, compute or Compute())
    return imitation.run(num_steps)


def train_trunk(
    recipe: Recipe,
    data: TrainingData,
    run: Path,
    *,
    backbone: Path,
    front: Path | None = None,
    teacher: Path | None = None,
    num_steps: int | None = None,
    compute: Compute | None = None,
) -> float:
    """Teach a whole trunk; returns what it leaves unexplained.

    A fast trunk begins with a ``front`` that was taught and the teacher's late stages, a slim one
    with the teacher's own channels, the less needed ones left out. As :func:`train_front`, but
    ``best.pt`` is a student: the averaged trunk, its BatchNorms kept, and a head fitted to the
    ratings. Raises :class:`ModelError` where the front or the teacher does not fit.
    """
    where, folder = compute or Compute(), RunFolder(run)
    trunk = make_trunk(recipe.model)
    taught_by = _teacher(backbone, teacher)
    if isinstance(trunk, SlimTrunk):
        if not folder.has_checkpoint():
            _slim_(trunk, taught_by, recipe, data, where)
    elif isinstance(trunk, FastTrunk):
        load_imagenet_(trunk, backbone)
        if teacher is not None:
            copy_late_stages_(trunk, taught_by)
        load_front_(trunk, front)
    else:
        raise ConfigError('a smaller trunk imitates: set trunk = "slim" or "fast" in [model]')
    still_statistics_(trunk)
    return _TrunkImitation(recipe, data, folder, taught_by, where, trunk).run(num_steps)


def _slim_(
    trunk: SlimTrunk, teacher: Trunk, recipe: Recipe, data: TrainingData, where: Compute
) -> None:
    """Take the teacher's channels over, chosen on batches that no step takes."""
    if recipe.model.normalised:
        raise ConfigError("a slim trunk has no BatchNorms: set normalised = false in [model]")
    first = recipe.imitate_trunk.num_steps + 2 * _NUM_MEASURED
    views: dict[str, list[Tensor]] = {}
    for batch in where.batches(BatchMaker(data, recipe), first, first + _NUM_SLIMMED_ON):
        for name, view in batch.views.items():
            views.setdefault(name, []).append(normalised_view(view))
    for lost in slim_(trunk, teacher, views["whole"], views["fragments"], seed=recipe.train.seed):
        say(
            f"bottleneck {lost.bottleneck}: {lost.num_kept} of {lost.num_channels} channels, "
            f"{lost.unexplained:.3f} of the variance of its map unexplained"
        )


def _teacher(backbone: Path, weights: Path | None) -> Trunk:
    """A trunk without BatchNorms that is not to move."""
    if weights is None:
        trunk = Trunk()
        load_imagenet_(trunk, backbone)
    else:
        trunk = load_student(weights).trunk
    return trunk.eval().requires_grad_(False)


class _Imitation(ABC):
    """One run: a pupil, its teacher, and how far it is."""

    def __init__(
        self,
        recipe: Recipe,
        data: TrainingData,
        folder: RunFolder,
        teacher: Trunk,
        where: Compute,
        config: ImitationConfig,
    ) -> None:
        self.recipe, self.data, self.config = recipe, data, config
        self.folder, self.compute = folder, where
        self.make = BatchMaker(data, recipe)
        self.teacher = teacher
        torch.manual_seed(recipe.train.seed)
        self.pupil = self._pupil()
        for net in (self.teacher, self.pupil):
            net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            net.to(where.device)
        self.optimiser = torch.optim.AdamW(
            self._rates(), self.config.rate, weight_decay=self.config.weight_decay
        )
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimiser,
            lambda s: learning_rate_share(s, self.config.num_steps, self.config.warmup_steps),
        )
        self.averaged = Averaged(self.pupil, self.config.ema_decay)
        self.scales = self._measured()
        self.first = 0
        if folder.has_checkpoint():
            self._restore()

    @abstractmethod
    def _pupil(self) -> nn.Module:
        """What is taught."""

    @abstractmethod
    def _rates(self) -> list[dict[str, Any]]:
        """Its parameters, in groups."""

    @abstractmethod
    def _maps(self, net: nn.Module, x: Tensor, name: str) -> list[Tensor]:
        """What is compared, of the pupil or the teacher, for a view of that name."""

    @abstractmethod
    def _kept(self) -> Mapping[str, Tensor]:
        """What ``best.pt`` is to hold when the last step is done."""

    def _scaled(self, y: Tensor, at: tuple[str, int]) -> Tensor:
        """The teacher's map in its channels' standard deviations."""
        mean, deviation = self.scales[at]
        return (y - mean) / deviation

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
            return [y.float() for y in self._maps(self.teacher, normalised_view(view), name)]

    def _restore(self) -> None:
        state = self.folder.load_checkpoint()
        self.pupil.load_state_dict(state["pupil"])
        self.averaged.model.load_state_dict(state["averaged"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.schedule.load_state_dict(state["schedule"])
        self.first = state["step"]

    def _save(self, step: int) -> None:
        state = {
            "pupil": self.pupil.state_dict(),
            "averaged": self.averaged.model.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "schedule": self.schedule.state_dict(),
            "step": step,
        }
        self.folder.save(state, CHECKPOINT)

    def run(self, last: int | None) -> float:
        """Every step that is left; what the averaged pupil leaves unexplained."""
        self.folder.forget_after(self.first)
        num_steps = max(self.first, last or self.config.num_steps)
        self.pupil.train()
        batches = self.compute.batches(self.make, self.first, num_steps)
        for step, batch in enumerate(batches, self.first):
            loss, unexplained = self._losses(self.pupil, batch.views)
            self.optimiser.zero_grad()
            loss.backward()
            self.optimiser.step()
            self.schedule.step()
            self.averaged.update(self.pupil, step)
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

    def _losses(self, pupil: nn.Module, views: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """What a step lowers, and the share of variance left in each map, views after views."""
        total = torch.zeros((), device=self.compute.device)
        left = []
        for name, cut in views.items():
            view = cut.to(self.compute.device)
            wanted = self._taught(view, name)
            with self.compute.autocast():
                found = self._maps(pupil, normalised_view(view), name)
            for k, (y, target) in enumerate(zip(found, wanted, strict=True)):
                z, aim = self._told(y.float(), (name, k)), self._scaled(target, (name, k))
                at_places = F.mse_loss(z, aim)
                of_means = F.mse_loss(z.mean((2, 3)), aim.mean((2, 3)))
                total = total + at_places + self.config.mean_weight * of_means
                left.append(at_places.detach())
        return total, torch.stack(left)

    def _told(self, y: Tensor, at: tuple[str, int]) -> Tensor:
        """The pupil's map in the same units."""
        return self._scaled(y, at)

    @torch.no_grad()
    def _final(self) -> float:
        """Of the pupil that is kept, on batches that no step took."""
        first = self.config.num_steps + _NUM_MEASURED
        left = [
            self._losses(self.averaged.model, batch.views)[1].mean()
            for batch in self.compute.batches(self.make, first, first + _NUM_MEASURED)
        ]
        return float(torch.stack(left).mean())


class _FrontImitation(_Imitation):
    def __init__(
        self, recipe: Recipe, data: TrainingData, folder: RunFolder, teacher: Trunk, where: Compute
    ) -> None:
        super().__init__(recipe, data, folder, teacher, where, recipe.imitate)

    def _pupil(self) -> PlainFront:
        return make_front(self.recipe.model)

    def _rates(self) -> list[dict[str, Any]]:
        return [{"params": list(self.pupil.parameters())}]

    def _maps(self, net: nn.Module, x: Tensor, name: str) -> list[Tensor]:
        return [net.early(x) if isinstance(net, Trunk) else net(x)]

    def _told(self, y: Tensor, at: tuple[str, int]) -> Tensor:
        return y  # learnt in standard deviations; the front that is kept gives the map as it is

    @torch.no_grad()
    def _kept(self) -> Mapping[str, Tensor]:
        front = self.averaged.model
        assert isinstance(front, PlainFront)
        mean, deviation = (scale.flatten() for scale in self.scales["whole", 0])
        assert front.project.bias is not None
        front.project.weight.mul_(deviation[:, None, None, None])
        front.project.bias.copy_(front.project.bias * deviation + mean)
        return front.state_dict()

    def _scaled(self, y: Tensor, at: tuple[str, int]) -> Tensor:
        return super()._scaled(y, ("whole", 0))  # one front for both views


class _TrunkImitation(_Imitation):
    def __init__(
        self,
        recipe: Recipe,
        data: TrainingData,
        folder: RunFolder,
        teacher: Trunk,
        where: Compute,
        trunk: ShortTrunk,
    ) -> None:
        self.trunk = trunk
        super().__init__(recipe, data, folder, teacher, where, recipe.imitate_trunk)

    def _pupil(self) -> ShortTrunk:
        return self.trunk

    def _rates(self) -> list[dict[str, Any]]:
        """What is pretrained each by its own size, a front by the rate itself."""
        if not isinstance(self.trunk, FastTrunk):
            return relative_rates(self.trunk, self.config.rate)
        late = relative_rates(self.trunk.blocks, self.config.rate)
        return [{"params": list(self.trunk.front.parameters())}, *late]

    def _maps(self, net: nn.Module, x: Tensor, name: str) -> list[Tensor]:
        assert isinstance(net, Trunk)
        end = ShortTrunk.TAPPED[-1] + 1 if name == "whole" else NUM_SHARED
        y = net.early(x)
        maps = [y]
        for j in range(NUM_EARLY, end):
            y = net.blocks[j](y)
            if j in ShortTrunk.TAPPED:
                maps.append(y)
        return maps

    def _kept(self) -> Mapping[str, Tensor]:
        trunk = self.averaged.model
        assert isinstance(trunk, ShortTrunk)
        student = Student(trunk=trunk).to(self.compute.device)
        fit_head_(student, self.data, self.recipe, compute=self.compute)
        return student.state_dict()
