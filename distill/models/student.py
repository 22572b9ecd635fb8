"""The first student: MobileNetV2 looking at two views of a frame.

One trunk, shared by the views, with every BatchNorm folded into its convolution at the start
(the statistics stay those of ImageNet, which also makes training on few cores twice as fast and
leaves nothing to fold at export). Spatial means after several stages, because quality shows at
every scale, then a small regression head. Only Conv, ReLU, Add, mean pooling, Concat, Gemm and a
final sigmoid: what INT8 engines run without leaving integers.

The backbone follows MobileNetV2 (arXiv 1801.04381, table 2) in Gluon's variant: ReLU instead of
ReLU6 and stride 2 at bottlenecks 1, 3, 10, 13.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dgiqa_stream.errors import ModelError

CHANNELS = (16, 24, 24, 32, 32, 32, 64, 64, 64, 64, 96, 96, 96, 160, 160, 160, 320)
STRIDED = frozenset({1, 3, 10, 13})
SHORTCUT = frozenset({2, 4, 5, 7, 8, 9, 11, 12, 14, 15})
EXPANSION = 6
STEM_CHANNELS, LAST_CHANNELS = 32, 1280
TAPPED = (2, 5, 9, 12, 15)
"""Bottlenecks whose spatial mean the head reads, beside the last convolution's."""
HEAD_WIDTH = 64
BATCHNORM_EPSILON = 1e-5
INPUT_MEAN, INPUT_STD = 116.0, 57.63
"""One mean and one deviation for all colours, in 8-bit steps (the means over colours of
ImageNet's): an affine map of one scale and one zero point is exactly what a uint8 tensor carries,
so the INT8 graph takes the picture's bytes as they are."""
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Bottleneck(nn.Module):
    """Inverted residual: expand 1x1, depthwise 3x3, project 1x1."""

    def __init__(self, cin: int, cout: int, *, expansion: int, stride: int, shortcut: bool) -> None:
        super().__init__()
        inner = cin * expansion
        self.expand = nn.Conv2d(cin, inner, 1)
        self.depthwise = nn.Conv2d(inner, inner, 3, stride, 1, groups=inner)
        self.project = nn.Conv2d(inner, cout, 1)
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C', H/s, W/s)."""
        y = F.relu(self.expand(x))  # (B, 6C, H, W)
        y = F.relu(self.depthwise(y))  # (B, 6C, H/s, W/s)
        y = self.project(y)  # (B, C', H/s, W/s)
        return x + y if self.shortcut else y


class Trunk(nn.Module):
    """Picture to means over space after several stages."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, STEM_CHANNELS, 3, 2, 1)
        blocks, cin = [], STEM_CHANNELS
        for j, cout in enumerate(CHANNELS):
            blocks.append(
                Bottleneck(
                    cin,
                    cout,
                    expansion=1 if j == 0 else EXPANSION,
                    stride=2 if j in STRIDED else 1,
                    shortcut=j in SHORTCUT,
                )
            )
            cin = cout
        self.blocks = nn.ModuleList(blocks)
        self.last = nn.Conv2d(cin, LAST_CHANNELS, 1)

    @property
    def num_features(self) -> int:
        """Length of the vector that one picture gives."""
        return sum(CHANNELS[j] for j in TAPPED) + LAST_CHANNELS

    def forward(self, x: Tensor) -> Tensor:
        """Normalised RGB (B, 3, H, W) to means (B, num_features)."""
        taps = []
        x = F.relu(self.stem(x))  # (B, 32, H/2, W/2)
        for j, block in enumerate(self.blocks):
            x = block(x)  # (B, C_j, H/2..H/32, W/2..W/32)
            if j in TAPPED:
                taps.append(x.mean((2, 3)))  # (B, C_j)
        x = F.relu(self.last(x))  # (B, 1280, H/32, W/32)
        taps.append(x.mean((2, 3)))
        return torch.cat(taps, 1)  # (B, features)


class Student(nn.Module):
    """Two views of a frame to one quality in 0..1."""

    VIEWS = ("whole", "fragments")

    def __init__(self, *, dropout: float = 0.0) -> None:
        super().__init__()
        self.trunk = Trunk()
        self.dropout = nn.Dropout(dropout)
        self.hidden = nn.Linear(len(self.VIEWS) * self.trunk.num_features, HEAD_WIDTH)
        self.quality = nn.Linear(HEAD_WIDTH, 1)
        self.register_buffer("feature_mean", torch.zeros(self.hidden.in_features))
        self.register_buffer("feature_std", torch.ones(self.hidden.in_features))

    def features(self, whole: Tensor, fragments: Tensor) -> Tensor:
        """uint8 (N, H, W, 3) each, RGB; returns (N, 2 * features)."""
        x = torch.cat([whole, fragments], 0)  # (2N, H, W, 3)
        x = x.permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)
        x = (x.float() - INPUT_MEAN) / INPUT_STD  # (2N, 3, H, W)
        f = self.trunk(x)  # (2N, features)
        return torch.cat([f[: len(whole)], f[len(whole) :]], 1)  # (N, 2 * features)

    def logits(self, whole: Tensor, fragments: Tensor) -> Tensor:
        """The quality before its sigmoid, (N,)."""
        f = self.features(whole, fragments)
        f = (f.float() - self.feature_mean) / self.feature_std
        return self.quality(F.relu(self.hidden(self.dropout(f)))).squeeze(1)

    def forward(self, whole: Tensor, fragments: Tensor) -> Tensor:
        """uint8 (N, H, W, 3) each, RGB, to quality (N,) in 0..1, 1 best."""
        return torch.sigmoid(self.logits(whole, fragments))


def quantised_points(
    trunk: Trunk,
) -> list[tuple[nn.Module, Literal["relu", "linear", "add"]]]:
    """Modules whose output INT8 rounds, in order of execution, and what follows each.

    ``relu`` and ``linear`` are convolutions with and without one; ``add`` is a block whose output
    is the sum with its shortcut. The pooled features and the head stay in float.
    """
    points: list[tuple[nn.Module, Literal["relu", "linear", "add"]]] = [(trunk.stem, "relu")]
    for block in trunk.blocks:
        assert isinstance(block, Bottleneck)
        points += [(block.expand, "relu"), (block.depthwise, "relu"), (block.project, "linear")]
        if block.shortcut:
            points.append((block, "add"))
    return [*points, (trunk.last, "relu")]


class Deployed(nn.Module):
    """A trained student as it is exported: the same numbers, nothing that only training needs.

    The standardisation of the features is folded into the head's first layer.
    """

    def __init__(self, student: Student) -> None:
        super().__init__()
        self.trunk = student.trunk
        self.hidden = nn.Linear(student.hidden.in_features, student.hidden.out_features)
        self.quality = student.quality
        with torch.no_grad():
            weight = student.hidden.weight / student.feature_std
            self.hidden.weight.copy_(weight)
            self.hidden.bias.copy_(student.hidden.bias - weight @ student.feature_mean)

    def forward(self, whole: Tensor, fragments: Tensor) -> Tensor:
        """uint8 (N, H, W, 3) each, RGB, to quality (N, 1) in 0..1, 1 best."""
        x = torch.stack([whole, fragments], 1).flatten(0, 1)  # (2N, H, W, 3): whole, fragments, …
        x = x.permute(0, 3, 1, 2)  # (2N, 3, H, W)
        f = self.trunk((x.float() - INPUT_MEAN) / INPUT_STD)  # (2N, features)
        f = f.reshape(-1, self.hidden.in_features)  # (N, 2 * features)
        hidden = F.relu(self.hidden(f))  # (N, 64)
        return torch.sigmoid(self.quality(hidden))  # (N, 1)


def load_imagenet_(trunk: Trunk, weights: Path) -> None:
    """Fill the trunk from the float32 ``.npz`` of MobileNetV2 with its BatchNorms.

    The ImageNet normalisation is re-expressed in :data:`INPUT_MEAN` and :data:`INPUT_STD` by the
    first convolution; only its outermost row and column of padding differ from the original.
    Raises ``ValueError`` where the file holds something else.
    """
    with np.load(weights) as stored:
        arrays = {name.removeprefix("mobilenetv20_features_"): stored[name] for name in stored}
    if "linearbottleneck16_batchnorm2_running_var" not in arrays:
        raise ValueError(f"{weights} does not hold MobileNetV2 with its BatchNorms")
    convs: list[tuple[nn.Conv2d, str, int]] = [(trunk.stem, "", 0)]
    bottlenecks = [block for block in trunk.blocks if isinstance(block, Bottleneck)]
    for j, block in enumerate(bottlenecks):
        prefix = f"linearbottleneck{j}_"
        parts = (block.expand, block.depthwise, block.project)
        convs += [(conv, prefix, i) for i, conv in enumerate(parts)]
    convs.append((trunk.last, "", 1))
    with torch.no_grad():
        for conv, prefix, i in convs:
            gamma, beta, mean, var = (
                torch.from_numpy(arrays[f"{prefix}batchnorm{i}_{part}"])
                for part in ("gamma", "beta", "running_mean", "running_var")
            )
            scale = gamma / torch.sqrt(var + BATCHNORM_EPSILON)
            weight = torch.from_numpy(arrays[f"{prefix}conv{i}_weight"])
            conv.weight.copy_(weight * scale[:, None, None, None])
            conv.bias.copy_(beta - mean * scale)
        # imagenet's normalised colour c = ours * gain[c] + shift[c]
        std = torch.tensor(IMAGENET_STD) * 255
        gain = INPUT_STD / std
        shift = (INPUT_MEAN - torch.tensor(IMAGENET_MEAN) * 255) / std
        trunk.stem.bias += (trunk.stem.weight * shift[None, :, None, None]).sum((1, 2, 3))
        trunk.stem.weight *= gain[None, :, None, None]


def load_student(path: Path) -> Student:
    """A trained student from its weights; raises :class:`ModelError` where they are not one's."""
    student = Student()
    try:
        student.load_state_dict(torch.load(path, weights_only=True))
    except FileNotFoundError as exc:
        raise ModelError(f"no weights at {path}: give best.pt of a training run") from exc
    except (RuntimeError, pickle.UnpicklingError, EOFError, AttributeError, TypeError) as exc:
        reason = str(exc).splitlines()[0]
        raise ModelError(f"{path.name} does not hold a student's weights: {reason}") from exc
    return student
