"""A :class:`FastTrunk`'s front, taught to give the map that MobileNetV2's first stages give.

No label takes part: the teacher looks at the very views that the front looks at, rated pictures and
degraded ones. What is compared are the 24 channels after bottleneck 2, each in its own standard
deviations, place by place and in the mean over the picture, which is what the head reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill.compute import Compute
from distill.data.batches import BatchMaker
from distill.data.training_data import TrainingData
from distill.models.student import normalised_view
from distill.models.trunks import PlainFront, Trunk, load_imagenet_, make_front
from distill.optimising import Averaged, learning_rate_share
from distill.recipe import Recipe
from distill.run_folder import BEST, CHECKPOINT, LOG, RunFolder
from distill.say import say

_CHECKPOINT_EVERY_STEPS = 100
_LOG_EVERY_STEPS = 20
_NUM_MEASURED = 4  # batches that the channels' deviations are taken from
_SMALLEST_DEVIATION = 1e-3


def train_front(
    recipe: Recipe, data: TrainingData, run: Path, *, backbone: Path, compute: Compute | None = None
) -> float:
    """Teach a front; returns the share of the teacher's variance that it leaves unexplained.

    ``run`` receives ``checkpoint.pt`` (to resume), ``best.pt`` (the averaged front, its BatchNorms
    kept) and ``log.csv``. Raises ``ValueError`` where the backbone is none.
    """
    return _Imitation(recipe, data, RunFolder(run), backbone, compute or Compute()).run()


class _Imitation:
    def __init__(
        self, recipe: Recipe, data: TrainingData, folder: RunFolder, backbone: Path, where: Compute
    ) -> None:
        self.config, self.folder, self.compute = recipe.imitate, folder, where
        self.make = BatchMaker(data, recipe)
        self.teacher = Trunk().eval().requires_grad_(False)
        load_imagenet_(self.teacher, backbone)
        torch.manual_seed(recipe.train.seed)
        self.front = make_front(recipe.model)
        for net in (self.teacher, self.front):
            net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            net.to(where.device)
        self.optimiser = torch.optim.AdamW(
            self.front.parameters(), self.config.rate, weight_decay=self.config.weight_decay
        )
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimiser,
            lambda s: learning_rate_share(s, self.config.num_steps, self.config.warmup_steps),
        )
        self.averaged = Averaged(self.front, self.config.ema_decay)
        self.mean, self.deviation = self._measured()
        self.first = 0
        if folder.has_checkpoint():
            self._restore()

    def _measured(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the teacher's channels, (24, 1, 1) each."""
        end = self.config.num_steps + _NUM_MEASURED
        maps = [
            self._taught(batch.views["whole"])
            for batch in self.compute.batches(self.make, self.config.num_steps, end)
        ]
        y = torch.cat(maps)
        deviation = y.std((0, 2, 3), keepdim=True)[0].clamp_min(_SMALLEST_DEVIATION)
        return y.mean((0, 2, 3), keepdim=True)[0], deviation

    @torch.no_grad()
    def _taught(self, view: Tensor) -> Tensor:
        """uint8 (N, H, W, 3) to the teacher's map (N, 24, H/4, W/4), float32."""
        with self.compute.autocast():
            return self.teacher.early(normalised_view(view)).float()

    def _restore(self) -> None:
        state = self.folder.load_checkpoint()
        self.front.load_state_dict(state["front"])
        self.averaged.model.load_state_dict(state["averaged"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.schedule.load_state_dict(state["schedule"])
        self.first = state["step"]

    def _save(self, step: int) -> None:
        state = {
            "front": self.front.state_dict(),
            "averaged": self.averaged.model.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "schedule": self.schedule.state_dict(),
            "step": step,
        }
        self.folder.save(state, CHECKPOINT)

    def run(self) -> float:
        """Every step that is left; what the averaged front leaves unexplained."""
        self.folder.forget_after(self.first)
        num_steps = self.config.num_steps
        batches = self.compute.batches(self.make, self.first, num_steps)
        self.front.train()
        for step, batch in enumerate(batches, self.first):
            views = [view.to(self.compute.device) for view in batch.views.values()]
            loss, unexplained = self._losses(self.front, views)
            self.optimiser.zero_grad()
            loss.backward()
            self.optimiser.step()
            self.schedule.step()
            self.averaged.update(self.front, step)
            done = step + 1
            if done % _LOG_EVERY_STEPS == 0:
                row = {"step": done, "loss": loss.item(), "unexplained": unexplained.item()}
                self.folder.log(LOG, row)
                say(f"step {done}/{num_steps}  unexplained {unexplained.item():.4f}")
            if done % _CHECKPOINT_EVERY_STEPS == 0 or done == num_steps:
                self._save(done)
        self._denormalise(self.averaged.model)
        self.folder.save(self.averaged.model.state_dict(), BEST)
        return self._final()

    def _losses(self, front: nn.Module, views: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """What a step lowers, and the share of variance that is left."""
        total = torch.zeros((), device=self.compute.device)
        left = []
        for view in views:
            wanted = (self._taught(view) - self.mean) / self.deviation  # (N, 24, H/4, W/4)
            with self.compute.autocast():
                y = front(normalised_view(view))
            at_places = F.mse_loss(y.float(), wanted)
            of_means = F.mse_loss(y.float().mean((2, 3)), wanted.mean((2, 3)))
            total = total + at_places + self.config.mean_weight * of_means
            left.append(at_places.detach())
        return total, torch.stack(left).mean()

    @torch.no_grad()
    def _denormalise(self, front: PlainFront) -> None:
        """Make the front give the teacher's map as it is, not in standard deviations."""
        conv, deviation, mean = front.project, self.deviation.flatten(), self.mean.flatten()
        assert conv.bias is not None
        conv.weight.mul_(deviation[:, None, None, None])
        conv.bias.copy_(conv.bias * deviation + mean)

    @torch.no_grad()
    def _final(self) -> float:
        """Of the front that was kept, on batches that no step took."""
        end = self.config.num_steps + 2 * _NUM_MEASURED
        left = []
        for batch in self.compute.batches(self.make, end - _NUM_MEASURED, end):
            for view in batch.views.values():
                wanted = self._taught(view.to(self.compute.device))
                with self.compute.autocast():
                    y = self.averaged.model(normalised_view(view.to(self.compute.device)))
                left.append((((y.float() - wanted) / self.deviation) ** 2).mean())
        return float(torch.stack(left).mean())
