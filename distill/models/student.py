"""The student: MobileNetV2 looking at two views of a frame.

One trunk, shared by the views; the fragments leave it before the last stages, whose large
receptive field says nothing about stitched squares. Spatial means after several stages, because
quality shows at every scale, then a small regression head. Only Conv, ReLU, Add, mean pooling,
Concat, Gemm and a final sigmoid: what INT8 engines run without leaving integers.

Every BatchNorm is folded into its convolution at the start: the statistics stay those of ImageNet,
which also makes training on few cores faster and leaves nothing to fold at export. A trunk that is
to keep them, for a teacher, is made with ``normalised=True``.

The backbone follows MobileNetV2 (arXiv 1801.04381, table 2) in Gluon's variant: ReLU instead of
ReLU6 and stride 2 at bottlenecks 1, 3, 10, 13.
"""

from __future__ import annotations

import pickle
from dataclasses import dataclass
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
NUM_SHARED = 13
"""Bottlenecks that both views pass; the whole view alone passes the rest."""
HEAD_WIDTH = 64
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


def _conv(
    cin: int, cout: int, kernel: int = 1, stride: int = 1, *, groups: int = 1, normalised: bool
) -> nn.Conv2d:
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
        expansion: int,
        stride: int,
        shortcut: bool,
        normalised: bool = False,
    ) -> None:
        super().__init__()
        inner = cin * expansion
        self.expand = _conv(cin, inner, normalised=normalised)
        self.depthwise = _conv(inner, inner, 3, stride, groups=inner, normalised=normalised)
        self.project = _conv(inner, cout, normalised=normalised)
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C', H/s, W/s)."""
        y = F.relu(self.expand(x))  # (B, 6C, H, W)
        y = F.relu(self.depthwise(y))  # (B, 6C, H/s, W/s)
        y = self.project(y)  # (B, C', H/s, W/s)
        return x + y if self.shortcut else y


class Trunk(nn.Module):
    """Picture to means over space after several stages."""

    def __init__(self, *, normalised: bool = False) -> None:
        super().__init__()
        self.stem = _conv(3, STEM_CHANNELS, 3, 2, normalised=normalised)
        blocks, cin = [], STEM_CHANNELS
        for j, cout in enumerate(CHANNELS):
            blocks.append(
                Bottleneck(
                    cin,
                    cout,
                    expansion=1 if j == 0 else EXPANSION,
                    stride=2 if j in STRIDED else 1,
                    shortcut=j in SHORTCUT,
                    normalised=normalised,
                )
            )
            cin = cout
        self.blocks = nn.ModuleList(blocks)
        self.last = _conv(cin, LAST_CHANNELS, normalised=normalised)

    @property
    def num_shared_features(self) -> int:
        """Length of the vector that :meth:`shared` gives of one picture."""
        return sum(CHANNELS[j] for j in TAPPED if j < NUM_SHARED)

    @property
    def num_late_features(self) -> int:
        """Length of the vector that :meth:`late` gives of one picture."""
        return sum(CHANNELS[j] for j in TAPPED if j >= NUM_SHARED) + LAST_CHANNELS

    def shared(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The stages of every view: normalised RGB (B, 3, H, W) to (B, 96, H/16, W/16) and means.

        The means are (B, num_shared_features).
        """
        taps = []
        x = F.relu(self.stem(x))  # (B, 32, H/2, W/2)
        for j, block in enumerate(self.blocks[:NUM_SHARED]):
            x = block(x)  # (B, C_j, H/2..H/16, W/2..W/16)
            if j in TAPPED:
                taps.append(x.mean((2, 3)))  # (B, C_j)
        return x, torch.cat(taps, 1)

    def late(self, x: Tensor) -> Tensor:
        """The last stages: (B, 96, H/16, W/16) to means (B, num_late_features)."""
        taps = []
        for j, block in enumerate(self.blocks[NUM_SHARED:], NUM_SHARED):
            x = block(x)  # (B, C_j, H/32, W/32)
            if j in TAPPED:
                taps.append(x.mean((2, 3)))  # (B, C_j)
        x = F.relu(self.last(x))  # (B, 1280, H/32, W/32)
        return torch.cat([*taps, x.mean((2, 3))], 1)


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class StudentOutput:
    """What a student says of N frames, and what it can be taught by."""

    logits: Tensor
    """(N,): the quality before its sigmoid."""
    features: Tensor
    """(N, features), standardised: what the head reads, before dropout."""
    hidden: Tensor
    """(N, 64): what the last layer reads."""
    whole_map: Tensor
    """(N, 96, H/16, W/16) of the whole view."""


class Student(nn.Module):
    """Two views of a frame to one quality in 0..1."""

    VIEWS = ("whole", "fragments")

    def __init__(self, *, dropout: float = 0.0) -> None:
        super().__init__()
        self.trunk = Trunk()
        self.dropout = nn.Dropout(dropout)
        num_features = 2 * self.trunk.num_shared_features + self.trunk.num_late_features
        self.hidden = nn.Linear(num_features, HEAD_WIDTH)
        self.quality = nn.Linear(HEAD_WIDTH, 1)
        self.register_buffer("feature_mean", torch.zeros(num_features))
        self.register_buffer("feature_std", torch.ones(num_features))

    def features(self, whole: Tensor, fragments: Tensor) -> Tensor:
        """uint8 (N, H, W, 3) each, RGB; returns (N, features)."""
        return self._mapped(whole, fragments)[1]

    def _mapped(self, whole: Tensor, fragments: Tensor) -> tuple[Tensor, Tensor]:
        """The whole view's map (N, 96, H/16, W/16) and all features (N, features)."""
        x, of_whole = self.trunk.shared(_normalised(whole))
        _, of_fragments = self.trunk.shared(_normalised(fragments))
        return x, torch.cat([of_whole, self.trunk.late(x), of_fragments], 1)  # (N, features)

    def describe(self, whole: Tensor, fragments: Tensor) -> StudentOutput:
        """uint8 (N, H, W, 3) each, RGB: the quality and what led to it."""
        seen, f = self._mapped(whole, fragments)
        f = (f.float() - self.feature_mean) / self.feature_std  # (N, features)
        hidden = F.relu(self.hidden(self.dropout(f)))  # (N, 64)
        return StudentOutput(self.quality(hidden).squeeze(1), f, hidden, seen)

    def head(self, features: Tensor) -> Tensor:
        """Standardised features (N, features) to logits (N,)."""
        logits: Tensor = self.quality(F.relu(self.hidden(self.dropout(features)))).squeeze(1)
        return logits

    def logits(self, whole: Tensor, fragments: Tensor) -> Tensor:
        """The quality before its sigmoid, (N,)."""
        return self.describe(whole, fragments).logits

    def forward(self, whole: Tensor, fragments: Tensor) -> Tensor:
        """uint8 (N, H, W, 3) each, RGB, to quality (N,) in 0..1, 1 best."""
        return torch.sigmoid(self.logits(whole, fragments))


def quantised_points(
    student: Student,
) -> list[tuple[str, nn.Module, Literal["relu", "linear", "add"]]]:
    """Modules whose output INT8 rounds, by name, in order of execution, and what follows each.

    ``relu`` and ``linear`` are convolutions with and without one; ``add`` is a block whose output
    is the sum with its shortcut. The pooled features and the head stay in float.
    """
    trunk = student.trunk
    points: list[tuple[str, nn.Module, Literal["relu", "linear", "add"]]] = [
        ("trunk.stem", trunk.stem, "relu")
    ]
    for j, block in enumerate(trunk.blocks):
        assert isinstance(block, Bottleneck)
        name = f"trunk.blocks.{j}"
        points.append((f"{name}.expand", block.expand, "relu"))
        points.append((f"{name}.depthwise", block.depthwise, "relu"))
        points.append((f"{name}.project", block.project, "linear"))
        if block.shortcut:
            points.append((name, block, "add"))
    return [*points, ("trunk.last", trunk.last, "relu")]


class Deployed(nn.Module):
    """A trained student as it is exported: the same numbers, nothing that only training needs.

    The standardisation of the features is folded into the head's first layer; the views pass the
    trunk one after the other, so that each can be of its own batch and leave where it must.
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
        x, of_whole = self.trunk.shared(_normalised(whole))
        _, of_fragments = self.trunk.shared(_normalised(fragments))
        f = torch.cat([of_whole, self.trunk.late(x), of_fragments], 1)  # (N, features)
        hidden = F.relu(self.hidden(f))  # (N, 64)
        return torch.sigmoid(self.quality(hidden))  # (N, 1)


def _normalised(view: Tensor) -> Tensor:
    """uint8 (N, H, W, 3) to (N, 3, H, W)."""
    x = view.permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)
    return (x.float() - INPUT_MEAN) / INPUT_STD


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
