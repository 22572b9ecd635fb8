"""The student: one network looking at two views of a frame.

One trunk, shared by the views; the fragments leave it before the last stages, whose large
receptive field says nothing about stitched squares, or pass a small trunk of their own. Spatial
means after several stages, because quality shows at every scale, then a small regression head. Only
Conv, ReLU, Add, mean pooling, Concat, Gemm and a final sigmoid: what INT8 engines run without
leaving integers.

Every BatchNorm of a trunk from ImageNet is folded into its convolution at the start: the statistics
stay those of ImageNet, which also makes training on few cores faster and leaves nothing to fold at
export.
"""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dgiqa_stream.errors import ModelError
from distill.models.fragment_trunk import FragmentTrunk, fragment_trunk_of
from distill.models.trunks import (
    CHANNELS,
    INPUT_MEAN,
    INPUT_STD,
    Bottleneck,
    SlimTrunk,
    Trunk,
)

HEAD_WIDTH = 64
ONNX = ".onnx"


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class StudentOutput:
    """What a student says of N frames, and what it can be taught by."""

    logits: Tensor
    """(N,): the quality before its sigmoid."""
    features: Tensor
    """(N, features), standardised: what the head reads, before dropout."""
    hidden: Tensor
    """(N, 64), or as wide as the head is: what the last layer reads."""
    whole_map: Tensor
    """(N, 96, H/16, W/16) of the whole view."""


class Student(nn.Module):
    """Two views of a frame to one quality in 0..1."""

    VIEWS = ("whole", "fragments")

    def __init__(
        self,
        *,
        dropout: float = 0.0,
        trunk: Trunk | None = None,
        fragment_trunk: FragmentTrunk | None = None,
        head_width: int = HEAD_WIDTH,
    ) -> None:
        """MobileNetV2's trunk unless another is given, for both views or for the whole one."""
        super().__init__()
        self.trunk = trunk or Trunk()
        self.fragment_trunk = fragment_trunk
        self.dropout = nn.Dropout(dropout)
        num_features = self.num_whole_features + (
            self.trunk.num_shared_features
            if fragment_trunk is None
            else fragment_trunk.num_features
        )
        self.hidden = nn.Linear(num_features, head_width)
        self.quality = nn.Linear(head_width, 1)
        self.register_buffer("feature_mean", torch.zeros(num_features))
        self.register_buffer("feature_std", torch.ones(num_features))

    @property
    def num_whole_features(self) -> int:
        """How many of the features, the first ones, are the whole view's."""
        return self.trunk.num_shared_features + self.trunk.num_late_features

    def features(self, whole: Tensor, fragments: Tensor) -> Tensor:
        """uint8 (N, H, W, 3) each, RGB; returns (N, features)."""
        return self._mapped(whole, fragments)[1]

    def _mapped(self, whole: Tensor, fragments: Tensor) -> tuple[Tensor, Tensor]:
        """The whole view's map (N, 96, H/16, W/16) and all features (N, features)."""
        return _features(self.trunk, self.fragment_trunk, whole, fragments)

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


Point = tuple[str, nn.Module, Literal["relu", "linear", "add"]]


def quantised_points(student: Student) -> list[Point]:
    """Modules whose output INT8 rounds, by name, in order of execution, and what follows each.

    ``relu`` and ``linear`` are convolutions with and without one; ``add`` is a block whose output
    is the sum with its shortcut. The pooled features and the head stay in float.
    """
    trunk = student.trunk
    points: list[Point] = [("trunk.stem", trunk.stem, "relu")]
    for j, block in enumerate(trunk.blocks):
        assert isinstance(block, Bottleneck)
        name = f"trunk.blocks.{j}"
        points.append((f"{name}.expand", block.expand, "relu"))
        points.append((f"{name}.depthwise", block.depthwise, "relu"))
        points.append((f"{name}.project", block.project, "linear"))
        if block.shortcut:
            points.append((name, block, "add"))
    if not isinstance(trunk, SlimTrunk):
        points.append(("trunk.last", trunk.last, "relu"))
    if student.fragment_trunk is not None:
        points += _points_of(student.fragment_trunk)
    return points


def _points_of(trunk: FragmentTrunk) -> list[Point]:
    at_quarter, at_eighth = trunk.at_quarter, trunk.at_eighth
    points: list[Point] = [
        ("stem", trunk.stem, "relu"),
        ("to_quarter", trunk.to_quarter, "relu"),
        ("at_quarter.first", at_quarter.first, "relu"),
        ("at_quarter.second", at_quarter.second, "linear"),
        ("at_quarter", at_quarter, "add"),
        ("to_eighth", trunk.to_eighth, "relu"),
        ("at_eighth.first", at_eighth.first, "relu"),
        ("at_eighth.second", at_eighth.second, "linear"),
        ("at_eighth", at_eighth, "add"),
        ("to_sixteenth", trunk.to_sixteenth, "relu"),
    ]
    return [(f"fragment_trunk.{name}", module, kind) for name, module, kind in points]


class Deployed(nn.Module):
    """A trained student as it is exported: the same numbers, nothing that only training needs.

    The standardisation of the features is folded into the head's first layer; the views pass the
    trunk one after the other, so that each can be of its own batch and leave where it must.
    """

    def __init__(self, student: Student) -> None:
        super().__init__()
        self.trunk, self.fragment_trunk = student.trunk, student.fragment_trunk
        self.hidden = nn.Linear(student.hidden.in_features, student.hidden.out_features)
        self.quality = student.quality
        with torch.no_grad():
            weight = student.hidden.weight / student.feature_std
            self.hidden.weight.copy_(weight)
            self.hidden.bias.copy_(student.hidden.bias - weight @ student.feature_mean)

    def forward(self, whole: Tensor, fragments: Tensor) -> Tensor:
        """uint8 (N, H, W, 3) each, RGB, to quality (N, 1) in 0..1, 1 best."""
        _, f = _features(self.trunk, self.fragment_trunk, whole, fragments)
        hidden = F.relu(self.hidden(f))  # (N, 64)
        return torch.sigmoid(self.quality(hidden))  # (N, 1)


def _features(
    trunk: Trunk, fragment_trunk: FragmentTrunk | None, whole: Tensor, fragments: Tensor
) -> tuple[Tensor, Tensor]:
    """The whole view's map (N, 96, H/16, W/16), and all features (N, features)."""
    x, of_whole = trunk.shared(normalised_view(whole))
    of_fragments = (
        trunk.shared(normalised_view(fragments))[1]
        if fragment_trunk is None
        else fragment_trunk(normalised_view(fragments))
    )
    return x, torch.cat([of_whole, trunk.late(x), of_fragments], 1)


def normalised_view(view: Tensor) -> Tensor:
    """uint8 (N, H, W, 3) to (N, 3, H, W)."""
    x = view.permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)
    return (x.float() - INPUT_MEAN) / INPUT_STD


def load_student(path: Path) -> Student:
    """A trained student from its weights; raises :class:`ModelError` where they are not one's.

    Which trunk it has, the weights tell.
    """
    try:
        state = torch.load(path, weights_only=True)
        student = Student(
            trunk=trunk_of(state),
            fragment_trunk=fragment_trunk_of(state),
            head_width=len(state["hidden.weight"]),
        )
        student.load_state_dict(state)
    except FileNotFoundError as exc:
        raise ModelError(f"no weights at {path}: give best.pt of a training run") from exc
    except (
        RuntimeError,
        pickle.UnpicklingError,
        EOFError,
        AttributeError,
        TypeError,
        IndexError,
        KeyError,
    ) as exc:
        reason = str(exc).splitlines()[0]
        raise ModelError(f"{path.name} does not hold a student's weights: {reason}") from exc
    return student


def load_trunk(path: Path) -> Trunk:
    """A student's trunk alone, of ``best.pt`` or of a float ONNX file, the shipped one's too.

    Raises :class:`ModelError` where the file is missing or holds no student's trunk.
    """
    return _exported_trunk(path) if path.suffix == ONNX else load_student(path).trunk


def _exported_trunk(path: Path) -> Trunk:
    import onnx  # type: ignore[import-not-found,unused-ignore]
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
    from onnx import numpy_helper

    try:
        stored = onnx.load(path).graph.initializer
    except FileNotFoundError as exc:
        raise ModelError(f"no model at {path}: give a float .onnx or best.pt of a run") from exc
    except DecodeError as exc:
        raise ModelError(f"{path.name} is not an ONNX file: {exc}") from exc
    state = {t.name: torch.from_numpy(numpy_helper.to_array(t).copy()) for t in stored}
    prefix = "trunk."
    weights = {n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)}
    try:
        trunk = trunk_of(state)
        trunk.load_state_dict(weights)
    except (RuntimeError, KeyError, TypeError, IndexError) as exc:
        reason = str(exc).splitlines()[0]
        raise ModelError(
            f"{path.name} holds no student's float trunk (an INT8 file has none): {reason}"
        ) from exc
    return trunk


def trunk_of(state: dict[str, Tensor]) -> Trunk:
    """One that the weights fit."""
    if "trunk.last.weight" in state:
        return Trunk()
    inner = (len(state[f"trunk.blocks.{j}.expand.weight"]) for j in range(len(CHANNELS)))
    return SlimTrunk([len(state["trunk.stem.weight"]), *inner])
