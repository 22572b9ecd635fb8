"""The convolutional networks that a student looks with.

The backbone follows MobileNetV2 (arXiv 1801.04381, table 2) in Gluon's variant: ReLU instead of
ReLU6 and stride 2 at bottlenecks 1, 3, 10, 13. :class:`SlimTrunk` is the same with fewer channels
inside each bottleneck, and without the last convolution.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dgiqa_stream.errors import ConfigError
from distill.recipe import ModelConfig

CHANNELS = (16, 24, 24, 32, 32, 32, 64, 64, 64, 64, 96, 96, 96, 160, 160, 160, 320)
STRIDED = frozenset({1, 3, 10, 13})
SHORTCUT = frozenset({2, 4, 5, 7, 8, 9, 11, 12, 14, 15})
EXPANSION = 6
STEM_CHANNELS, LAST_CHANNELS = 32, 1280
TAPPED: tuple[int, ...] = (2, 5, 9, 12, 15)
"""Bottlenecks whose spatial mean the head reads, beside the last convolution's."""
NUM_SHARED = 13
"""Bottlenecks that both views pass; the whole view alone passes the rest."""
BATCHNORM_EPSILON = 1e-5
INPUT_MEAN, INPUT_STD = 116.0, 57.63
"""One mean and one deviation for all colours, in 8-bit steps (the means over colours of
ImageNet's): an affine map of one scale and one zero point is exactly what a uint8 tensor carries,
so the INT8 graph takes the picture's bytes as they are."""
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class NormConv2d(nn.Conv2d):
    """A convolution without bias and its BatchNorm: one convolution once folded."""

    def __init__(
        self, cin: int, cout: int, kernel: int, stride: int, padding: int, *, groups: int
    ) -> None:
        super().__init__(cin, cout, kernel, stride, padding, groups=groups, bias=False)
        self.norm = nn.BatchNorm2d(cout, eps=BATCHNORM_EPSILON)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C', H/s, W/s)."""
        y: Tensor = self.norm(super().forward(x))
        return y


def convolution(
    cin: int, cout: int, kernel: int = 1, stride: int = 1, *, groups: int = 1, normalised: bool
) -> nn.Conv2d:
    """With its BatchNorm where ``normalised``."""
    if normalised:
        return NormConv2d(cin, cout, kernel, stride, kernel // 2, groups=groups)
    return nn.Conv2d(cin, cout, kernel, stride, kernel // 2, groups=groups)


class Bottleneck(nn.Module):
    """Inverted residual: expand 1x1, depthwise 3x3, project 1x1."""

    def __init__(
        self,
        cin: int,
        cout: int,
        *,
        inner: int,
        stride: int,
        shortcut: bool,
        normalised: bool = False,
    ) -> None:
        """``inner`` channels between the expansion and the projection."""
        super().__init__()
        self.expand = convolution(cin, inner, normalised=normalised)
        self.depthwise = convolution(inner, inner, 3, stride, groups=inner, normalised=normalised)
        self.project = convolution(inner, cout, normalised=normalised)
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C', H/s, W/s)."""
        y = F.relu(self.expand(x))  # (B, inner, H, W)
        y = F.relu(self.depthwise(y))  # (B, inner, H/s, W/s)
        y = self.project(y)  # (B, C', H/s, W/s)
        return x + y if self.shortcut else y


WIDTHS: tuple[int, ...] = (
    STEM_CHANNELS,
    STEM_CHANNELS,
    *(EXPANSION * channels for channels in CHANNELS[:-1]),
)
"""Channels of the stem, then those inside each bottleneck."""


def bottleneck(number: int, *, normalised: bool, widths: Sequence[int] = WIDTHS) -> Bottleneck:
    """MobileNetV2's, by its number from 0, as wide inside as ``widths`` say."""
    return Bottleneck(
        CHANNELS[number - 1] if number else widths[0],
        CHANNELS[number],
        inner=widths[number + 1],
        stride=2 if number in STRIDED else 1,
        shortcut=number in SHORTCUT,
        normalised=normalised,
    )


class Trunk(nn.Module):
    """Picture to means over space after several stages."""

    TAPPED: tuple[int, ...] = TAPPED

    def __init__(self, *, normalised: bool = False) -> None:
        super().__init__()
        self.stem = convolution(3, STEM_CHANNELS, 3, 2, normalised=normalised)
        self.blocks = nn.ModuleList(
            bottleneck(j, normalised=normalised) for j in range(len(CHANNELS))
        )
        self.last = convolution(CHANNELS[-1], LAST_CHANNELS, normalised=normalised)

    @property
    def num_shared_features(self) -> int:
        """Length of the vector that :meth:`shared` gives of one picture."""
        return sum(CHANNELS[j] for j in self.TAPPED if j < NUM_SHARED)

    @property
    def num_late_features(self) -> int:
        """Length of the vector that :meth:`late` gives of one picture."""
        return sum(CHANNELS[j] for j in self.TAPPED if j >= NUM_SHARED) + LAST_CHANNELS

    def shared(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The stages of every view: normalised RGB (B, 3, H, W) to (B, 96, H/16, W/16) and means.

        The means are (B, num_shared_features).
        """
        x = F.relu(self.stem(x))  # (B, widths[0], H/2, W/2)
        taps = []
        for j, block in enumerate(self.blocks[:NUM_SHARED]):
            x = block(x)  # (B, C_j, H/2..H/16, W/2..W/16)
            if j in self.TAPPED:
                taps.append(x.mean((2, 3)))  # (B, C_j)
        return x, torch.cat(taps, 1)

    def late(self, x: Tensor) -> Tensor:
        """The last stages: (B, 96, H/16, W/16) to means (B, num_late_features)."""
        x, taps = self._late_means(x)
        x = F.relu(self.last(x))  # (B, 1280, H/32, W/32)
        return torch.cat([*taps, x.mean((2, 3))], 1)

    def _late_means(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The last bottlenecks: (B, 96, H/16, W/16) to (B, 320, H/32, W/32), means on the way."""
        taps = []
        for j, block in enumerate(self.blocks[NUM_SHARED:], NUM_SHARED):
            x = block(x)  # (B, C_j, H/32, W/32)
            if j in self.TAPPED:
                taps.append(x.mean((2, 3)))  # (B, C_j)
        return x, taps


class SlimTrunk(Trunk):
    """MobileNetV2 with fewer channels in its stem and inside its bottlenecks, its end cut off.

    The whole view's features end with the means after the last bottleneck: the 1,280 of the last
    convolution cost a fifth of all parameters and agree no better with people.
    """

    TAPPED = (*TAPPED, len(CHANNELS) - 1)

    def __init__(self, widths: Sequence[int]) -> None:
        """``widths``: channels of the stem, then those inside each of the 17 bottlenecks."""
        super().__init__()
        if len(widths) != len(WIDTHS):
            raise ValueError(f"{len(widths)} widths, and a slim trunk has {len(WIDTHS)}")
        del self.last
        self.widths = tuple(widths)
        self.stem = convolution(3, widths[0], 3, 2, normalised=False)
        for j in range(len(CHANNELS)):
            self.blocks[j] = bottleneck(j, normalised=False, widths=widths)

    @property
    def num_late_features(self) -> int:
        """Length of the vector that :meth:`late` gives of one picture."""
        return sum(CHANNELS[j] for j in self.TAPPED if j >= NUM_SHARED)

    def late(self, x: Tensor) -> Tensor:
        """The last stages: (B, 96, H/16, W/16) to means (B, num_late_features)."""
        return torch.cat(self._late_means(x)[1], 1)


def make_trunk(config: ModelConfig) -> Trunk:
    """The trunk that a recipe asks for, its weights drawn at random."""
    return Trunk() if config.trunk == "mobilenetv2" else SlimTrunk(config.slim_widths or WIDTHS)


def load_imagenet_(trunk: Trunk, weights: Path) -> None:
    """Fill the trunk from the float32 ``.npz`` of MobileNetV2 with its BatchNorms.

    The ImageNet normalisation is re-expressed in :data:`INPUT_MEAN` and :data:`INPUT_STD` by the
    first convolution; only its outermost row and column of padding differ from the original.
    Raises ``ValueError`` where the file holds something else, :class:`ConfigError` for a slim
    trunk, which such weights do not fit.
    """
    with np.load(weights) as stored:
        arrays = {name.removeprefix("mobilenetv20_features_"): stored[name] for name in stored}
    if isinstance(trunk, SlimTrunk):
        raise ConfigError("a slim trunk begins with a student's weights: `imitate`, then --weights")
    if "linearbottleneck16_batchnorm2_running_var" not in arrays:
        raise ValueError(f"{weights} does not hold MobileNetV2 with its BatchNorms")
    convs: list[tuple[nn.Conv2d, str, int]] = [(trunk.stem, "", 0), (trunk.last, "", 1)]
    for j, block in enumerate(trunk.blocks):
        assert isinstance(block, Bottleneck)
        parts = (block.expand, block.depthwise, block.project)
        convs += [(conv, f"linearbottleneck{j}_", i) for i, conv in enumerate(parts)]
    with torch.no_grad():
        for conv, prefix, i in convs:
            gamma, beta, mean, var = (
                torch.from_numpy(arrays[f"{prefix}batchnorm{i}_{part}"])
                for part in ("gamma", "beta", "running_mean", "running_var")
            )
            weight = torch.from_numpy(arrays[f"{prefix}conv{i}_weight"])
            if conv is trunk.stem:
                # imagenet's normalised colour c = ours * gain[c] + shift[c]
                std = torch.tensor(IMAGENET_STD) * 255
                gain = INPUT_STD / std
                shift = (INPUT_MEAN - torch.tensor(IMAGENET_MEAN) * 255) / std
                mean = mean - (weight * shift[None, :, None, None]).sum((1, 2, 3))
                weight = weight * gain[None, :, None, None]
            _fill_(conv, weight, gamma, beta, mean, var)


def _fill_(
    conv: nn.Conv2d, weight: Tensor, gamma: Tensor, beta: Tensor, mean: Tensor, var: Tensor
) -> None:
    """Give a convolution its weights and BatchNorm, folded where it has none of its own."""
    if isinstance(conv, NormConv2d):
        conv.weight.copy_(weight)
        norm = conv.norm
        assert norm.running_mean is not None
        assert norm.running_var is not None
        norm.weight.copy_(gamma)
        norm.bias.copy_(beta)
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(var)
        return
    assert conv.bias is not None
    scale = gamma / torch.sqrt(var + BATCHNORM_EPSILON)
    conv.weight.copy_(weight * scale[:, None, None, None])
    conv.bias.copy_(beta - mean * scale)
