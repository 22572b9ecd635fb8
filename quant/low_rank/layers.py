"""What can be factored: its kind, what it costs at a rank, and the layers that take its place.

A rank is a tuple: (r,) of a linear layer or 1x1 convolution, (r_in, r_out) of a k x k convolution,
in each group of a grouped one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from torch import Tensor, nn
from torch.nn.utils import skip_init

Rank = tuple[int, ...]
Kind = Literal["linear", "conv1x1", "conv"]
Layer: TypeAlias = nn.Linear | nn.Conv2d


@dataclass(frozen=True, slots=True)
class Cost:
    """Of a layer, whole or factored."""

    num_parameters: int
    macs_per_position: float
    """Multiply-adds for one output position or token."""


def kind_of(module: nn.Module) -> Kind | None:
    """What a module is to factorization; None where it is nothing that can be factored.

    Subclasses compute something of their own, so they are none.
    """
    if type(module) is nn.Linear:
        return "linear"
    if type(module) is nn.Conv2d:
        return "conv1x1" if module.kernel_size == (1, 1) else "conv"
    return None


@dataclass(frozen=True, slots=True)
class Shape:
    """A layer as groups of matrices or of stacks of them."""

    groups: int
    outputs: int
    """Of one group."""
    inputs: int
    """Channels of one group."""
    window: int
    """Positions of the kernel."""
    area: int
    """Input positions for each output position: the stride, squared."""

    @property
    def largest_rank(self) -> Rank:
        """What represents any weight exactly."""
        if self.window > 1:
            return (
                min(self.inputs, self.outputs * self.window),
                min(self.outputs, self.inputs * self.window),
            )
        return (min(self.inputs, self.outputs),)


def shape_of(layer: Layer) -> Shape:
    """The shape of a layer."""
    if isinstance(layer, nn.Linear):
        return Shape(1, layer.out_features, layer.in_features, 1, 1)
    g = layer.groups
    return Shape(
        g,
        layer.out_channels // g,
        layer.in_channels // g,
        math.prod(layer.kernel_size),
        math.prod(layer.stride),
    )


def cost_of(layer: Layer, rank: Rank | None = None) -> Cost:
    """What a layer costs, whole (None) or at a rank."""
    s = shape_of(layer)
    bias = 0 if layer.bias is None else len(layer.bias)
    if rank is None:
        weights = s.groups * s.outputs * s.inputs * s.window
        return Cost(weights + bias, weights)
    if len(rank) == 1:
        weights = s.groups * rank[0] * (s.inputs + s.outputs)
        return Cost(weights + bias, weights)  # a stride is the first layer's
    into, out = rank
    first, core, last = (
        s.groups * n for n in (s.inputs * into, into * out * s.window, out * s.outputs)
    )
    return Cost(first + core + last + bias, first * s.area + core + last)


def pays(layer: Layer, rank: Rank, smallest_saving: float) -> bool:
    """Whether a rank saves enough parameters and multiply-adds."""
    whole, factored = cost_of(layer), cost_of(layer, rank)
    limit = 1 - smallest_saving
    return (
        factored.num_parameters <= limit * whole.num_parameters
        and factored.macs_per_position <= limit * whole.macs_per_position
    )


def empty_factors(layer: Layer, rank: Rank) -> nn.Sequential:
    """The layers that take a layer's place at a rank, their weights not yet filled.

    Only the last has a bias, so zeros that a convolution pads with stay zeros in between.
    """
    s = shape_of(layer)
    like = {"device": layer.weight.device, "dtype": layer.weight.dtype}
    biased = layer.bias is not None
    if isinstance(layer, nn.Linear):
        return nn.Sequential(
            skip_init(nn.Linear, s.inputs, rank[0], bias=False, **like),
            skip_init(nn.Linear, rank[0], s.outputs, bias=biased, **like),
        )

    def conv(cin: int, cout: int, *, has_bias: bool = False, **geometry: Any) -> nn.Module:
        made: nn.Module = skip_init(
            nn.Conv2d,
            s.groups * cin,
            s.groups * cout,
            **{"kernel_size": 1, **geometry},
            groups=s.groups,
            bias=has_bias,
            **like,
        )
        return made

    geometry: dict[str, Any] = {
        "kernel_size": layer.kernel_size,
        "stride": layer.stride,
        "padding": layer.padding,
        "dilation": layer.dilation,
        "padding_mode": layer.padding_mode,
    }
    if len(rank) == 1:
        first = conv(s.inputs, rank[0], **geometry)
        return nn.Sequential(first, conv(rank[0], s.outputs, has_bias=biased))
    into, out = rank
    return nn.Sequential(
        conv(s.inputs, into),
        conv(into, out, **geometry),
        conv(out, s.outputs, has_bias=biased),
    )


def grouped_weight(layer: Layer) -> Tensor:
    """The weight as (groups, outputs, inputs, window), float64."""
    s = shape_of(layer)
    return layer.weight.detach().double().reshape(s.groups, s.outputs, s.inputs, s.window)


def replace_(model: nn.Module, name: str, module: nn.Module) -> nn.Module:
    """Put a module at a name; returns the one that was there."""
    parent, _, attribute = name.rpartition(".")
    owner = model.get_submodule(parent)
    former: nn.Module = getattr(owner, attribute)
    setattr(owner, attribute, module)
    module.train(former.training)
    return former


def shape_like_(model: nn.Module, ranks: Mapping[str, Rank]) -> None:
    """Give a whole model the shape of a factored one, to load that one's weights."""
    from quant.low_rank.attention import SplitAttention

    for name, rank in ranks.items():
        owner = name.rpartition(".")[0]
        found = model.get_submodule(owner)
        if isinstance(found, nn.MultiheadAttention):
            replace_(model, owner, SplitAttention(found))
        layer = model.get_submodule(name)
        if not isinstance(layer, nn.Linear | nn.Conv2d):
            raise ValueError(f"{name} is a {type(layer).__name__}: no layer that can be factored")
        replace_(model, name, empty_factors(layer, rank))
