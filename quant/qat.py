"""Quantisation-aware training: a float model that rounds where the INT8 graph will.

MobileNetV2 loses several points to rounding after training; trained for a few hundred steps with
the rounding in place (straight-through gradients, Jacob et al. 2018, arXiv 1712.05877, section 3)
it does not. torch.ao.quantization is being removed and its successor's exporter leaves residual
additions in float, so the model names the layers that round; ONNX Runtime's static quantiser is
then told the very same ranges.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dgiqa_stream.errors import ConfigError

_ACTIVATION_LEVELS, WEIGHT_LEVELS = 255, 127
_SMALLEST_SCALE = 1e-8
_SAMPLED_ELEMENTS = 100_000


class QatConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How ranges are found. Saved in the artefact's manifest."""

    quantile: float = 0.9999
    """Activations beyond this quantile of a batch are clipped: a few outliers would coarsen all."""
    num_pictures: int = 64
    version: int = 1


class Ranges(msgspec.Struct, frozen=True):
    """Lowest and highest value of each quantised tensor, by the module that makes it.

    A module that both views pass has one range: their convolutions share weights and rounding.
    """

    conv: dict[str, tuple[float, float]]
    """After a convolution (``trunk.stem``), and its ReLU where one follows."""
    add: dict[str, tuple[float, float]]
    """After the addition that ends a block (``trunk.blocks.2``)."""


class FakeQuantConv2d(nn.Conv2d):
    """A convolution whose weights and output are rounded as INT8 will round them.

    An existing convolution becomes one by its class; its parameters stay what they were.
    """

    has_relu: bool
    low: float
    high: float

    def forward(self, x: Tensor) -> Tensor:
        """Like the convolution, with its ReLU where it has one."""
        unrounded = self.weight.detach()
        weight = self.weight + (on_grid(unrounded) - unrounded)  # gradients as if unrounded
        y = self._conv_forward(x, weight, self.bias)
        return rounded(F.relu(y) if self.has_relu else y, self.low, self.high)


def symmetric_scale(low: float, high: float) -> float:
    """The step of -127 to 127 that reaches both ends."""
    return max(max(abs(low), abs(high)) / WEIGHT_LEVELS, _SMALLEST_SCALE)


def on_grid(weight: Tensor) -> Tensor:
    """Weights (C, ...) at the nearest of INT8's steps, one scale for each output channel."""
    limit = weight.abs().amax(tuple(range(1, weight.ndim)), keepdim=True)
    scale = (limit / WEIGHT_LEVELS).clamp_min(_SMALLEST_SCALE)
    return (weight / scale).round() * scale


def snap_weights_(model: nn.Module) -> None:
    """Put the weights of every convolution on INT8's grid.

    A model trained with the rounding in place has biases that expect rounded weights; with the
    weights on the grid the float model is the one that was trained, and INT8 shares its weights.
    """
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                module.weight.copy_(on_grid(module.weight))


class _Rounding(torch.autograd.Function):
    """Round in the forward pass, let every gradient through in the backward pass.

    In place over one copy and without a saved mask: half the time of torch's fake_quantize on a
    CPU. What lies beyond the range is rare by the choice of the range.
    """

    @staticmethod
    def forward(_ctx: Any, x: Tensor, scale: float, lowest: int, highest: int) -> Tensor:
        return x.mul(1.0 / scale).round_().clamp_(lowest, highest).mul_(scale)

    @staticmethod
    def backward(_ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        return gradient, None, None, None


def rounded(x: Tensor, low: float, high: float) -> Tensor:
    """To the nearest of 256 steps between low and high, zero being one of them."""
    low, high = min(low, 0.0), max(high, 0.0)  # padding is zero, so zero must be exact
    scale = max((high - low) / _ACTIVATION_LEVELS, _SMALLEST_SCALE)
    zero_point = min(max(round(-low / scale), 0), _ACTIVATION_LEVELS)
    result: Tensor = _Rounding.apply(x, scale, -zero_point, _ACTIVATION_LEVELS - zero_point)
    return result


Point = tuple[str, nn.Module, Literal["relu", "linear", "add"]]
"""A module whose output is quantised, its name first, and what follows: a ReLU, nothing, a sum."""


def find_ranges(
    model: nn.Module,
    points: Sequence[Point],
    batches: Iterable[Sequence[Tensor]],
    config: QatConfig,
) -> Ranges:
    """Ranges of the float model's tensors over batches of real pictures."""
    found: dict[str, tuple[float, float]] = {}

    def note(name: str, kind: str) -> Any:
        def hook(_module: nn.Module, _input: Any, output: Tensor) -> None:
            y = F.relu(output) if kind == "relu" else output
            low, high = _quantiles(y.detach().float().flatten(), config.quantile)
            before = found.get(name, (0.0, 0.0))
            found[name] = min(before[0], low), max(before[1], high)

        return hook

    hooks = [module.register_forward_hook(note(name, kind)) for name, module, kind in points]
    try:
        with torch.no_grad():
            for batch in batches:
                model(*batch)
    finally:
        for handle in hooks:
            handle.remove()
    if len(found) != len(points):
        raise ValueError("ranges need pictures: the calibration set is empty")
    return Ranges(
        conv={name: found[name] for name, _, kind in points if kind != "add"},
        add={name: found[name] for name, _, kind in points if kind == "add"},
    )


def _quantiles(x: Tensor, quantile: float) -> tuple[float, float]:
    """The values that all but a share of the elements lie between, from an even sample of them."""
    sample = x[:: max(1, len(x) // _SAMPLED_ELEMENTS)]
    count = max(1, round(len(sample) * (1 - quantile)))
    high = sample.topk(count).values[-1]
    low = sample.topk(count, largest=False).values[-1]
    return float(low), float(high)


def prepare_qat_(points: Sequence[Point], ranges: Ranges) -> None:
    """Make the model round at its points."""
    for name, module, kind in points:
        if kind == "add":
            low, high = ranges.add[name]
            module.register_forward_hook(
                lambda _module, _input, output, low=low, high=high: rounded(output, low, high)
            )
            continue
        if type(module) is not nn.Conv2d:
            raise TypeError(f"only nn.Conv2d can be prepared, not {type(module).__name__}")
        module.__class__ = FakeQuantConv2d
        assert isinstance(module, FakeQuantConv2d)
        module.has_relu = kind == "relu"
        module.low, module.high = ranges.conv[name]


def save_ranges(ranges: Ranges, path: Path) -> None:
    """Write them as JSON."""
    path.write_text(json.dumps(msgspec.to_builtins(ranges), indent=1) + "\n")


def load_ranges(path: Path) -> Ranges:
    """Read what :func:`save_ranges` wrote; raises :class:`ConfigError` for anything else."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=Ranges)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError) as exc:
        raise ConfigError(f"{path} does not hold the ranges of a `qat` run: {exc}") from exc
