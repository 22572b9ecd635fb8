"""BatchNorm statistics of a changed network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from quant.low_rank.statistics import Batch

_FEWEST_VALUES = 64


class _Sums:
    """Sums of what one BatchNorm reads, by channel."""

    def __init__(self, num_channels: int) -> None:
        self.count = 0
        self.first = torch.zeros(num_channels, dtype=torch.float64)
        self.second = torch.zeros(num_channels, dtype=torch.float64)

    def add(self, _module: nn.Module, args: tuple[Any, ...]) -> None:
        """One call: (B, C, ...)."""
        values = args[0].detach().double().transpose(0, 1).flatten(1).cpu()  # (C, B ...)
        self.count += values.shape[1]
        self.first += values.sum(1)
        self.second += values.square().sum(1)

    def statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and unbiased variance, (C,) each."""
        mean = self.first / self.count
        spread = (self.second - self.count * mean.square()).clamp_min(0)
        return mean, spread / max(1, self.count - 1)


def reestimate_batchnorm_(model: nn.Module, batches: Sequence[Batch]) -> int:
    """Give every BatchNorm the mean and variance of what it reads now; returns how many got them.

    Each batch is normalised by its own statistics on the way, as in training, so batches should be
    of several pictures; mean and variance are those of all batches together. A BatchNorm that
    keeps no statistics, is never called or sees fewer than 64 values stays as it is. Raises
    ``ValueError`` for batches that give a BatchNorm one value for each channel.
    """
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    found = {norm: _Sums(norm.num_features) for norm in norms}
    kept = {norm: (norm.momentum, norm.training) for norm in norms}
    handles = [norm.register_forward_pre_hook(sums.add) for norm, sums in found.items()]
    try:
        for norm in norms:
            norm.momentum = 0.0
            norm.train()
        with torch.no_grad():
            for batch in batches:
                model(*batch)
    except ValueError as exc:  # torch's, of one value for each channel
        raise ValueError(
            f"BatchNorms cannot be re-estimated ({exc}): give batches of several pictures, or set "
            "reestimate_batchnorm = false"
        ) from exc
    finally:
        for handle in handles:
            handle.remove()
        for norm, (momentum, training) in kept.items():
            norm.momentum = momentum
            norm.train(training)
    seen = {norm: sums for norm, sums in found.items() if sums.count >= _FEWEST_VALUES}
    for norm, sums in seen.items():
        assert norm.running_mean is not None
        assert norm.running_var is not None
        mean, variance = sums.statistics()
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(variance)
    return len(seen)
