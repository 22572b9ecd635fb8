"""The convolutional networks that a student looks with.

The backbone follows MobileNetV2 (arXiv 1801.04381, table 2) in Gluon's variant: ReLU instead of
ReLU6 and stride 2 at bottlenecks 1, 3, 10, 13. Half of its time in INT8 goes into the stem and the
first three bottlenecks, at large pictures and few channels; :class:`FastTrunk` has a few dense
convolutions in their place, taught to give the same map. :class:`SlimTrunk` is MobileNetV2 with
fewer channels inside each bottleneck.
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
NUM_EARLY = 3
"""Bottlenecks at full, half and a quarter of the picture's size: half of an INT8 trunk's time."""
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

    has_still_statistics = False
    """Whether the mean and variance stay what they are while everything else is trained."""

    def __init__(
        self, cin: int, cout: int, kernel: int, stride: int, padding: int, *, groups: int
    ) -> None:
        super().__init__(cin, cout, kernel, stride, padding, groups=groups, bias=False)
        self.norm = nn.BatchNorm2d(cout, eps=BATCHNORM_EPSILON)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C', H/s, W/s)."""
        if self.has_still_statistics:
            return self._conv_forward(x, *self.as_one())
        y: Tensor = self.norm(super().forward(x))
        return y

    def as_one(self) -> tuple[Tensor, Tensor]:
        """Weight and bias of the one convolution that both are while the statistics stand still."""
        norm = self.norm
        assert norm.running_mean is not None
        assert norm.running_var is not None
        scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)  # (C',)
        return self.weight * scale[:, None, None, None], norm.bias - norm.running_mean * scale


def still_statistics_(module: nn.Module) -> None:
    """Let every BatchNorm's statistics stand still: what is trained is as fast as if folded."""
    for conv in module.modules():
        if isinstance(conv, NormConv2d):
            conv.has_still_statistics = True


def fold_(module: nn.Module) -> None:
    """Put one plain convolution in place of every convolution with its BatchNorm."""
    for name, child in module.named_children():
        if not isinstance(child, NormConv2d):
            fold_(child)
            continue
        folded = nn.Conv2d(
            child.in_channels,
            child.out_channels,
            child.kernel_size,  # type: ignore[arg-type]  # (k, k), as its stride and padding
            child.stride,  # type: ignore[arg-type]
            child.padding,  # type: ignore[arg-type]
            groups=child.groups,
        )
        with torch.no_grad():
            weight, bias = child.as_one()
            folded.weight.copy_(weight)
            assert folded.bias is not None
            folded.bias.copy_(bias)
        setattr(module, name, folded)


def convolution(
    cin: int, cout: int, kernel: int = 1, stride: int = 1, *, groups: int = 1, normalised: bool
) -> nn.Conv2d:
    """With its BatchNorm where ``normalised``; padded unless its windows lie side by side."""
    padding = 0 if stride == kernel else kernel // 2
    if normalised:
        return NormConv2d(cin, cout, kernel, stride, padding, groups=groups)
    return nn.Conv2d(cin, cout, kernel, stride, padding, groups=groups)


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

    def early(self, x: Tensor) -> Tensor:
        """The first stages: normalised RGB (B, 3, H, W) to (B, 24, H/4, W/4)."""
        x = F.relu(self.stem(x))  # (B, 32, H/2, W/2)
        for block in self.blocks[:NUM_EARLY]:
            x = block(x)  # (B, C_j, H/2..H/4, W/2..W/4)
        return x

    def shared(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The stages of every view: normalised RGB (B, 3, H, W) to (B, 96, H/16, W/16) and means.

        The means are (B, num_shared_features).
        """
        x = self.early(x)
        taps = [x.mean((2, 3))]  # (B, 24)
        for j, block in enumerate(self.blocks[NUM_EARLY:NUM_SHARED], NUM_EARLY):
            x = block(x)  # (B, C_j, H/4..H/16, W/4..W/16)
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


class PlainFront(nn.Module):
    """Picture to the map that MobileNetV2 has after its bottleneck 2, by dense convolutions.

    Squares of 4 x 4 pixels, then 3 x 3 convolutions with ReLU: no depthwise convolution, nothing at
    full or half size.
    """

    PATCH_PX = 4

    def __init__(
        self, *, width: int, depth: int, patch_width: int | None = None, normalised: bool = False
    ) -> None:
        """``depth`` convolutions of ``width`` channels between the patches and the last one.

        A patch has 48 numbers: with fewer channels of its own (``patch_width``, as many as
        ``width`` unless given) the first convolution would lose some of what it sees.
        """
        super().__init__()
        self.width, self.patch_width = width, patch_width or width
        patch, out = self.PATCH_PX, CHANNELS[NUM_EARLY - 1]
        self.patches = convolution(3, self.patch_width, patch, patch, normalised=normalised)
        self.body = nn.ModuleList(
            convolution(width if j else self.patch_width, width, 3, normalised=normalised)
            for j in range(depth)
        )
        self.project = convolution(width, out, 3, normalised=False)

    def forward(self, x: Tensor) -> Tensor:
        """Normalised RGB (B, 3, H, W), sides divisible by 4, to (B, 24, H/4, W/4)."""
        x = F.relu(self.patches(x))  # (B, patch_width, H/4, W/4)
        for conv in self.body:
            x = F.relu(conv(x))  # (B, width, H/4, W/4)
        y: Tensor = self.project(x)  # (B, 24, H/4, W/4)
        return y


class ShortTrunk(Trunk):
    """MobileNetV2 without its last convolution.

    The whole view's features end with the means after the last bottleneck: the 1,280 of the last
    convolution cost a fifth of all parameters and agree no better with people.
    """

    TAPPED = (*TAPPED, len(CHANNELS) - 1)

    def __init__(self, *, normalised: bool = False) -> None:
        super().__init__(normalised=normalised)
        del self.last

    @property
    def num_late_features(self) -> int:
        """Length of the vector that :meth:`late` gives of one picture."""
        return sum(CHANNELS[j] for j in self.TAPPED if j >= NUM_SHARED)

    def late(self, x: Tensor) -> Tensor:
        """The last stages: (B, 96, H/16, W/16) to means (B, num_late_features)."""
        return torch.cat(self._late_means(x)[1], 1)


class SlimTrunk(ShortTrunk):
    """MobileNetV2 with fewer channels in its stem and inside its bottlenecks."""

    def __init__(self, widths: Sequence[int], *, normalised: bool = False) -> None:
        """``widths``: channels of the stem, then those inside each of the 17 bottlenecks."""
        super().__init__(normalised=normalised)
        if len(widths) != len(WIDTHS):
            raise ValueError(f"{len(widths)} widths, and a slim trunk has {len(WIDTHS)}")
        self.widths = tuple(widths)
        self.stem = convolution(3, widths[0], 3, 2, normalised=normalised)
        for j in range(len(CHANNELS)):
            self.blocks[j] = bottleneck(j, normalised=normalised, widths=widths)


class FastTrunk(ShortTrunk):
    """MobileNetV2 from bottleneck 3 on, behind a :class:`PlainFront`."""

    def __init__(
        self,
        *,
        width: int = 32,
        depth: int = 3,
        patch_width: int | None = None,
        normalised: bool = False,
    ) -> None:
        """Width and depth are the front's."""
        super().__init__(normalised=normalised)
        del self.stem
        self.front = PlainFront(
            width=width, depth=depth, patch_width=patch_width, normalised=normalised
        )
        for j in range(NUM_EARLY):
            self.blocks[j] = nn.Identity()  # the others keep their numbers

    def early(self, x: Tensor) -> Tensor:
        """As MobileNetV2's, by other means."""
        y: Tensor = self.front(x)
        return y


def make_front(config: ModelConfig) -> PlainFront:
    """The front of a fast trunk, its BatchNorms beside it."""
    return PlainFront(
        width=config.front_width,
        depth=config.front_depth,
        patch_width=config.front_patches,
        normalised=True,
    )


def make_trunk(config: ModelConfig) -> Trunk:
    """The trunk that a recipe asks for, its weights drawn at random."""
    if config.trunk == "mobilenetv2":
        return Trunk(normalised=config.normalised)
    if config.trunk == "slim":
        return SlimTrunk(config.slim_widths or WIDTHS, normalised=config.normalised)
    return FastTrunk(
        width=config.front_width,
        depth=config.front_depth,
        patch_width=config.front_patches,
        normalised=config.normalised,
    )


@torch.no_grad()
def copy_late_stages_(pupil: FastTrunk, teacher: Trunk) -> None:
    """Give a fast trunk the bottlenecks from 3 on of a trunk without BatchNorms.

    Where the pupil has BatchNorms, theirs become those that change nothing but add the bias.
    """
    for j in range(NUM_EARLY, len(CHANNELS)):
        mine, theirs = pupil.blocks[j], teacher.blocks[j]
        assert isinstance(mine, Bottleneck)
        assert isinstance(theirs, Bottleneck)
        for name in ("expand", "depthwise", "project"):
            conv, source = getattr(mine, name), getattr(theirs, name)
            channels = len(source.bias)
            ones, zeros = torch.ones(channels), torch.zeros(channels)
            _fill_(conv, source.weight, ones, source.bias, zeros, ones - BATCHNORM_EPSILON)


def load_imagenet_(trunk: Trunk, weights: Path) -> None:
    """Fill the trunk from the float32 ``.npz`` of MobileNetV2 with its BatchNorms.

    The ImageNet normalisation is re-expressed in :data:`INPUT_MEAN` and :data:`INPUT_STD` by the
    first convolution; only its outermost row and column of padding differ from the original. Of a
    :class:`FastTrunk` the bottlenecks from 3 on are filled; its front is trained.
    Raises ``ValueError`` where the file holds something else.
    """
    with np.load(weights) as stored:
        arrays = {name.removeprefix("mobilenetv20_features_"): stored[name] for name in stored}
    if isinstance(trunk, SlimTrunk):
        raise ConfigError("a slim trunk begins with a student's weights: `imitate`, then --weights")
    if "linearbottleneck16_batchnorm2_running_var" not in arrays:
        raise ValueError(f"{weights} does not hold MobileNetV2 with its BatchNorms")
    stem = None if isinstance(trunk, FastTrunk) else trunk.stem
    convs: list[tuple[nn.Conv2d, str, int]] = []
    for j, block in enumerate(trunk.blocks):
        if isinstance(block, Bottleneck):
            parts = (block.expand, block.depthwise, block.project)
            convs += [(conv, f"linearbottleneck{j}_", i) for i, conv in enumerate(parts)]
    if stem is not None:
        convs += [(stem, "", 0), (trunk.last, "", 1)]
    with torch.no_grad():
        for conv, prefix, i in convs:
            gamma, beta, mean, var = (
                torch.from_numpy(arrays[f"{prefix}batchnorm{i}_{part}"])
                for part in ("gamma", "beta", "running_mean", "running_var")
            )
            weight = torch.from_numpy(arrays[f"{prefix}conv{i}_weight"])
            if conv is stem:
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
