"""How a student's parameters move: rates, their schedule, and the average that is kept."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from distill.models.student import Student
from distill.recipe import TrainConfig

Network = TypeVar("Network", bound=nn.Module)
LARGEST_GRADIENT = 5.0
"""Norm over all parameters, to which a larger one is cut."""


class Averaged(Generic[Network]):
    """An exponential moving average of what training moves, running statistics included.

    ``model`` is a network like the one that is trained, in evaluation mode.
    """

    def __init__(self, model: Network, decay: float) -> None:
        self.decay = decay
        self.model = copy.deepcopy(model).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, model: Network, step: int) -> None:
        """Move towards the model; early steps move faster."""
        decay = min(self.decay, (1 + step) / (10 + step))
        theirs = dict(model.named_parameters())
        for name, mine in self.model.named_parameters():
            if theirs[name].requires_grad:
                mine.lerp_(theirs[name], 1 - decay)
        for averaged, other in zip(self.model.buffers(), model.buffers(), strict=True):
            if averaged.dtype.is_floating_point:
                averaged.lerp_(other, 1 - decay)
            else:
                averaged.copy_(other)


def learning_rate_share(step: int, num_steps: int, warmup: int) -> float:
    """Linear warm-up, then half a cosine to zero."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, num_steps - warmup)))


def relative_rates(module: nn.Module, rate: float) -> list[dict[str, Any]]:
    """A parameter group for each tensor, its rate in proportion to its own size (RMS).

    Without BatchNorm nothing absorbs a step's shift, and folded tensors differ by a factor of 30 in
    size: one rate for all moved the small ones (the 1x1 expansions) by percents a step.
    """
    return [
        {"params": [p], "lr": rate * max(1e-3, float(p.detach().square().mean().sqrt()))}
        for p in module.parameters()
    ]


def take_step(
    optimiser: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    parameters: Iterable[nn.Parameter],
    loss: Tensor,
    *,
    may_pass_over: bool,
    told: str,
) -> bool:
    """Move the parameters by gradients cut to ``LARGEST_GRADIENT``; whether they moved.

    float16 passes a step over where its range was left, as long as ``may_pass_over``. Raises
    ``FloatingPointError``, which ``told`` ends, where loss or gradient is otherwise no number.
    """
    scaler.unscale_(optimiser)
    norm = torch.nn.utils.clip_grad_norm_(list(parameters), LARGEST_GRADIENT)
    is_finite = bool(torch.isfinite(norm))
    overflow = scaler.is_enabled() and may_pass_over
    if not (torch.isfinite(loss) and (is_finite or overflow)):
        raise FloatingPointError(
            f"the loss became {loss.item()} and its gradient {norm.item()} {told}"
        )
    scaler.step(optimiser)
    scaler.update()
    return is_finite


def make_optimiser(model: Student, objective: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW over the student, and over the objective's own parts at the head's rate."""
    head = [*model.hidden.parameters(), *model.quality.parameters()]
    groups = relative_rates(model.trunk, config.trunk_rate)
    groups.append({"params": head, "lr": config.head_rate})
    own = list(objective.parameters())
    if own:
        groups.append({"params": own, "lr": config.head_rate})
    return torch.optim.AdamW(groups, weight_decay=config.weight_decay)
