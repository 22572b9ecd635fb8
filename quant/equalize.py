"""Channel equalisation before INT8: the same float function, easier to quantise.

One scale and zero point must serve all channels of an activation, and a folded MobileNet's channels
differ by orders of magnitude. Where only ReLU (positively homogeneous) or additions lie between
layers, each channel may be divided by a factor that the next layers multiply back: cross-layer
equalisation (Nagel et al. 2019, arXiv 1906.04721, section 4.1), here with measured activation
ranges. A depthwise layer's weights have a scale for each channel, so they take any factor for free;
before a full convolution the factor balances activation range against weight range.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

_SMALLEST_RANGE = 1e-6
_LARGEST_FACTOR = 256.0


@dataclass(frozen=True, slots=True, eq=False)
class ChannelGroup:
    """Layers that write and read one set of channels, with ReLU or additions alone between them.

    ``readers`` pairs a layer with the first of its input channels (0 but for a head that reads
    several groups); all of the group's tensors are inputs of one of its convolutions.
    """

    writers: Sequence[nn.Conv2d]
    readers: Sequence[tuple[nn.Conv2d | nn.Linear, int]]

    @property
    def num_channels(self) -> int:
        """How many channels are shared."""
        return self.writers[0].out_channels


def equalize_(
    model: nn.Module, groups: Sequence[ChannelGroup], batches: Iterable[Sequence[Tensor]]
) -> None:
    """Divide every channel of each group by its factor and multiply it back in its readers.

    ``batches`` are arguments of the model, real pictures to measure activation ranges on.
    """
    ranges = _input_ranges(model, groups, batches)
    for group in groups:
        convolutions = [m for m, _ in group.readers if isinstance(m, nn.Conv2d)]
        activation = torch.stack([ranges[m] for m in convolutions]).amax(0)
        factor = _factors(activation.clamp_min(_SMALLEST_RANGE), convolutions)
        with torch.no_grad():
            for writer in group.writers:
                writer.weight /= factor[:, None, None, None]
                if writer.bias is not None:
                    writer.bias /= factor
            for reader, first in group.readers:
                _multiply_inputs_(reader, first, factor)


def _factors(activation: Tensor, readers: Sequence[nn.Conv2d]) -> Tensor:
    """What each channel is divided by, about 1 in the geometric mean, (C,)."""
    if all(r.groups == r.in_channels for r in readers):
        factor = activation  # every channel gets one range
    else:
        weight = torch.stack([r.weight.detach().abs().amax((0, 2, 3)) for r in readers]).amax(0)
        factor = (activation / weight.clamp_min(_SMALLEST_RANGE)).sqrt()
    factor = factor / factor.log().mean().exp()
    return factor.clamp(1 / _LARGEST_FACTOR, _LARGEST_FACTOR)


def _multiply_inputs_(reader: nn.Conv2d | nn.Linear, first: int, factor: Tensor) -> None:
    if isinstance(reader, nn.Linear):
        reader.weight[:, first : first + len(factor)] *= factor
    elif reader.groups == reader.in_channels:
        reader.weight *= factor[:, None, None, None]
    else:
        reader.weight *= factor[None, :, None, None]


def _input_ranges(
    model: nn.Module, groups: Sequence[ChannelGroup], batches: Iterable[Sequence[Tensor]]
) -> dict[nn.Module, Tensor]:
    """Largest magnitude of each input channel of every reading convolution, (C,)."""
    ranges: dict[nn.Module, Tensor] = {}

    def note(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        seen = arguments[0].detach().abs().amax((0, 2, 3))
        ranges[module] = torch.maximum(ranges[module], seen) if module in ranges else seen

    readers = [m for group in groups for m, _ in group.readers if isinstance(m, nn.Conv2d)]
    hooks = [m.register_forward_pre_hook(note) for m in readers]
    try:
        with torch.no_grad():
            for batch in batches:
                model(*batch)
    finally:
        for hook in hooks:
            hook.remove()
    if len(ranges) != len(readers):
        raise ValueError("equalisation needs pictures: the calibration set is empty")
    return ranges
