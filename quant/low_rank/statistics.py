"""What layers read on calibration data: second moments of their inputs, and how often they run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dgiqa_stream.errors import ModelError
from quant.low_rank.layers import Layer, Shape, shape_of

Batch = Sequence[Tensor]
"""The arguments of a model; the first dimension of the first counts the inputs."""


class LayerInputs:
    """What one layer read: kept up to date by hooks while batches pass."""

    def __init__(self, layer: Layer, *, largest_side: int) -> None:
        self.shape: Shape = shape_of(layer)
        side = self.shape.inputs * self.shape.window
        self.is_full = self.shape.window == 1 or side <= largest_side
        """Whether moments are of whole windows (S K), not of channels (S) alone."""
        side = side if self.is_full else self.shape.inputs
        self.moments = torch.zeros(self.shape.groups, side, side, dtype=torch.float64)
        """(G, S K, S K) or (G, S, S): sums of x x'."""
        self.num_positions = 0
        """Output positions or tokens of all inputs."""
        self.example: Tensor | None = None
        """The first input, to measure latency on."""
        self.example_positions = 0

    def add(self, layer: Layer, x: Tensor, y: Tensor) -> None:
        """One call: input ``x`` gave ``y``."""
        positions = y.numel() // (self.shape.groups * self.shape.outputs)
        self.num_positions += positions
        if self.example is None:
            self.example, self.example_positions = x.detach().clone(), positions
        rows = self._rows(layer, x.detach())
        self.moments += (rows @ rows.transpose(1, 2)).cpu()

    def _rows(self, layer: Layer, x: Tensor) -> Tensor:
        """The input as (G, side, positions), float64."""
        s, groups = self.shape, self.shape.groups
        if isinstance(layer, nn.Linear):
            return x.reshape(-1, s.inputs).T[None].double()
        x = x if x.ndim == 4 else x[None]
        if not self.is_full:
            return x.transpose(0, 1).reshape(groups, s.inputs, -1).double()
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        padded = F.pad(x, layer._reversed_padding_repeated_twice, mode=mode)
        size, stride, dilation = layer.kernel_size, layer.stride, layer.dilation
        if s.window == 1:
            seen = padded[:, :, :: stride[0], :: stride[1]].flatten(2)  # (B, G S, L)
        else:
            seen = F.unfold(padded, size, dilation, 0, stride)  # (B, G S K, L)
        by_group = seen.transpose(0, 1).reshape(groups, s.inputs * s.window, -1)
        return by_group.double()


def gather(
    model: nn.Module,
    layers: Mapping[str, Layer],
    batches: Sequence[Batch],
    *,
    largest_side: int,
) -> dict[str, LayerInputs]:
    """Run the batches through the model, which must be in evaluation mode; what each layer read.

    Raises :class:`ModelError` where a layer read something that is not a number.
    """
    found = {n: LayerInputs(layer, largest_side=largest_side) for n, layer in layers.items()}

    def noting(inputs: LayerInputs) -> Callable[..., None]:
        def hook(layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            assert isinstance(layer, nn.Linear | nn.Conv2d)
            inputs.add(layer, args[0], output)

        return hook

    handles = [layers[n].register_forward_hook(noting(i)) for n, i in found.items()]
    try:
        with torch.no_grad():
            for batch in batches:
                model(*batch)
    finally:
        for handle in handles:
            handle.remove()
    for name, inputs in found.items():
        if not bool(inputs.moments.isfinite().all()):
            raise ModelError(
                f"layer {name} read values that are not finite numbers: look for them in the "
                "calibration pictures and in the model's weights"
            )
    return found


def positions_per_input(model: nn.Module, batch: Batch) -> dict[str, float]:
    """Output positions or tokens of every convolution and linear layer for one of the batch."""
    found: dict[str, float] = {}

    def noting(name: str, channels: int) -> Callable[..., None]:
        def hook(_layer: nn.Module, _args: tuple[Any, ...], output: Tensor) -> None:
            found[name] = found.get(name, 0.0) + output.numel() / channels / len(batch[0])

        return hook

    handles = [
        m.register_forward_hook(noting(name, m.weight.shape[0]))
        for name, m in model.named_modules()
        if isinstance(m, nn.Linear | nn.Conv2d)
    ]
    try:
        with torch.no_grad():
            model(*batch)
    finally:
        for handle in handles:
            handle.remove()
    return found
