"""One head for both precisions, taught to look away from what INT8 disturbs.

The pooled features of the INT8 trunk differ a little from those of the float trunk, and a head
fitted to the float ones alone amplifies some of those differences. Here the head is fitted again
on both at once: to the ratings, to its own former logits where there is no rating, and to itself
across the two precisions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import numpy as np
import onnx
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from quant.calibration import Views
from quant.correction import (
    constant_of,
    head_nodes,
    outputs_of,
    regression_lines,
    replace_constant,
)


class HeadConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How the head is fitted. Saved in the artefact's manifest."""

    num_rated: int = 4000
    num_degraded: int = 2000
    num_steps: int = 300
    batch: int = 256
    rate: float = 3e-4
    weight_decay: float = 0.02
    agreement_weight: float = 16.0
    """Weight of the squared difference between the logits of the two precisions."""
    former_weight: float = 1.0
    """Weight of the squared difference to the former logit, on pictures without a rating."""
    seed: int = 1
    version: int = 1


@dataclass(slots=True, eq=False)
class Head:
    """Two layers: weight (64, F) and bias (64,), then weight (1, 64) and bias (1,)."""

    hidden_weight: Tensor
    hidden_bias: Tensor
    quality_weight: Tensor
    quality_bias: Tensor

    def __call__(self, features: Tensor) -> Tensor:
        """Features (N, F) to logits (N,)."""
        hidden = F.relu(F.linear(features, self.hidden_weight, self.hidden_bias))
        return F.linear(hidden, self.quality_weight, self.quality_bias).squeeze(1)

    def tensors(self) -> list[Tensor]:
        """All four, in order."""
        return [self.hidden_weight, self.hidden_bias, self.quality_weight, self.quality_bias]


def refit_(
    head: Head,
    of_float: NDArray[np.float32],
    of_int8: NDArray[np.float32],
    mos: NDArray[np.float32],
    config: HeadConfig,
) -> None:
    """Fit the head to features (N, F) of both precisions; ``mos`` (N,) on 0..1, NaN: unrated."""
    a, b = torch.from_numpy(of_float), torch.from_numpy(of_int8)
    mean, std = a.mean(0), a.std(0).clamp_min(1e-6)
    a, b = (a - mean) / std, (b - mean) / std
    inner = _rescaled(head, mean, std)
    rated = torch.from_numpy(mos)
    with torch.no_grad():
        former = inner(a)
    parameters = [t.requires_grad_() for t in inner.tensors()]
    optimiser = torch.optim.AdamW(parameters, config.rate, weight_decay=config.weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, config.num_steps)
    generator = torch.Generator().manual_seed(config.seed)
    for _ in range(config.num_steps):
        chosen = torch.randint(len(a), (config.batch,), generator=generator)
        za, zb, target = inner(a[chosen]), inner(b[chosen]), rated[chosen]
        has = ~target.isnan()
        loss = config.agreement_weight * (za - zb).square().mean()
        for z in (za, zb):
            if bool(has.any()):
                loss = loss + F.binary_cross_entropy_with_logits(z[has], target[has])
            if not bool(has.all()):
                gap = z[~has] - former[chosen][~has]
                loss = loss + config.former_weight * gap.square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    with torch.no_grad():
        weight = inner.hidden_weight / std
        head.hidden_weight = weight
        head.hidden_bias = inner.hidden_bias - weight @ mean
        head.quality_weight = inner.quality_weight.detach()
        head.quality_bias = inner.quality_bias.detach()


def _rescaled(head: Head, mean: Tensor, std: Tensor) -> Head:
    """The same function of standardised features."""
    return Head(
        (head.hidden_weight * std).clone(),
        (head.hidden_bias + head.hidden_weight @ mean).clone(),
        head.quality_weight.clone(),
        head.quality_bias.clone(),
    )


def refit_graphs_(
    reference: onnx.ModelProto,
    quantised: onnx.ModelProto,
    batches: Sequence[Views],
    mos: NDArray[np.float32],
    config: HeadConfig,
) -> None:
    """Fit the head of a float graph and of its INT8 graph to be one and the same, in place.

    ``mos`` holds a rating on 0..1, or NaN, for each picture of the batches in order. Each INT8
    feature first goes through its regression line, which is folded into the INT8 graph's head.
    """
    hidden, quality = head_nodes(reference)
    names = (hidden.input[1], hidden.input[2], quality.input[1], quality.input[2])
    head = Head(*(torch.from_numpy(constant_of(reference, n).astype(np.float32)) for n in names))
    of_float = outputs_of(reference, hidden.input[0], batches)  # (N, F)
    of_int8 = outputs_of(quantised, head_nodes(quantised)[0].input[0], batches)  # (N, F)
    slope, offset = regression_lines(of_int8, of_float)  # (F,) each
    corrected = (of_int8 * slope + offset).astype(np.float32)
    refit_(head, of_float.astype(np.float32), corrected, mos, config)
    fitted = [t.numpy().astype(np.float64) for t in head.tensors()]
    for name, values in zip(names, fitted, strict=True):
        replace_constant(reference, name, values)
    hidden, quality = head_nodes(quantised)
    weight, bias = fitted[0] * slope, fitted[1] + fitted[0] @ offset
    for name, values in (
        (hidden.input[1], weight),
        (hidden.input[2], bias),
        (quality.input[1], fitted[2]),
        (quality.input[2], fitted[3]),
    ):
        replace_constant(quantised, name, values)
