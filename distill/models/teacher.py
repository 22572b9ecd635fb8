"""The teacher: DGIQA, depth-guided no-reference picture quality (arXiv 2505.24002).

Two pyramids look at 224x224 of the picture and of its depth map. Transformer-CNN bridges bring
four stages of each to one size; depth then asks and the picture answers (Depth-CAR:
cross-attention, refined by self-attention); dilated convolutions and a mean give the score.

The names of modules are those of the published checkpoints, so that these load with nothing left
over. Where paper and published weights differ, the weights decide: maps are brought to one size by
bilinear interpolation, and the depth map comes three times, as a picture.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import count

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dgiqa_stream.errors import ConfigError
from distill.models.backbones import (
    NUM_STAGES,
    SWIN,
    make_pyramid,
    pyramid_channels,
    pyramid_maps,
)

CROP_PX = 224
_GATE_REDUCTION = 16
_DROPOUT = 0.1
_FFN_EXPANSION = 4
_PICTURE, _DEPTH = "", "_depth"
"""What the names of a stream's modules end in."""


@dataclass(frozen=True, slots=True)
class TeacherSpec:
    """What shape a teacher has; the defaults are the published one's."""

    backbone: str = SWIN
    bridge_channels: tuple[int, ...] = (64, 128, 256, 512)
    """Channels each stage is brought to; their sum is the width of the attention."""
    num_heads: int = 16
    pooled_channels: int = 1024

    def __post_init__(self) -> None:
        """Refuse widths that attention cannot share out among its heads."""
        numbers = (*self.bridge_channels, self.num_heads, self.pooled_channels)
        if len(self.bridge_channels) != NUM_STAGES or min(numbers) < 1:
            raise ConfigError(f"{self} must have {NUM_STAGES} bridges, and no number below 1")
        if self.width % self.num_heads:
            raise ConfigError(f"width {self.width} is not a multiple of {self.num_heads} heads")

    @property
    def width(self) -> int:
        """Channels of the fused map."""
        return sum(self.bridge_channels)


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class TeacherOutput:
    """What a teacher says of crops, and what a student can learn from."""

    score: Tensor
    """(B,) in 0..1, 1 best."""
    fused: Tensor
    """(B, 960, 7, 7): depth-guided features after refinement."""
    pooled: Tensor
    """(B, 1024): what the last layer reads."""

    def __repr__(self) -> str:
        """Shapes, not values."""
        shapes = (tuple(t.shape) for t in (self.score, self.fused, self.pooled))
        return "TeacherOutput(score {}, fused {}, pooled {})".format(*shapes)


class TransformerCnnBridge(nn.Module):
    """From a transformer's map to a convolutional one (the paper's TCB).

    The gate looks at one position at a time: nothing is pooled, so it is no squeeze-and-excitation.
    """

    def __init__(self, cin: int, cout: int) -> None:
        super().__init__()
        inner = max(1, cout // _GATE_REDUCTION)
        self.conv1 = nn.Conv2d(cin, cout, 1)
        self.attention = nn.Sequential(
            nn.Conv2d(cout, inner, 1), nn.ReLU(), nn.Conv2d(inner, cout, 1), nn.Sigmoid()
        )
        self.conv2 = nn.Conv2d(cout, cout, 3, padding=1)
        self.norm = nn.BatchNorm2d(cout)
        self.drop = nn.Dropout2d(_DROPOUT)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C', H, W), 0 or more."""
        x = self.conv1(x)  # (B, C', H, W)
        x = x * self.attention(x)  # (B, C', H, W)
        return self.drop(F.relu(self.norm(self.conv2(x))))


def _feed_forward(width: int) -> nn.Sequential:
    inner = _FFN_EXPANSION * width
    return nn.Sequential(nn.Linear(width, inner), nn.GELU(), nn.Linear(inner, width))


def _tokens(x: Tensor) -> Tensor:
    """(B, C, H, W) to one token for each position, (B, HW, C)."""
    return x.flatten(2).transpose(1, 2)


class DepthGuidedCrossAttention(nn.Module):
    """Depth asks, the picture answers; the residual runs along depth, normalised after each sum."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.multihead_attn = nn.MultiheadAttention(
            width, num_heads, dropout=_DROPOUT, batch_first=True
        )
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.fc = _feed_forward(width)
        self.dropout = nn.Dropout(_DROPOUT)

    def forward(self, depth: Tensor, picture: Tensor) -> Tensor:
        """Two maps (B, C, H, W) to one of the same shape."""
        query, seen = _tokens(depth), _tokens(picture)  # (B, HW, C) each
        answer, _ = self.multihead_attn(query, seen, seen, need_weights=False)  # (B, HW, C)
        x = self.norm1(query + self.dropout(answer))  # (B, HW, C)
        x = self.norm2(x + self.dropout(self.fc(x)))  # (B, HW, C)
        return x.transpose(1, 2).reshape(depth.shape)  # (B, C, H, W)


class RefinementAttention(nn.Module):
    """Every position of the fused map looks at all others; the same shape of block, one input."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.multihead_attn_spatial = nn.MultiheadAttention(
            width, num_heads, dropout=_DROPOUT, batch_first=True
        )
        self.norm1_spatial, self.norm2_spatial = nn.LayerNorm(width), nn.LayerNorm(width)
        self.fc_spatial = _feed_forward(width)
        self.dropout = nn.Dropout(_DROPOUT)

    def forward(self, fused: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C, H, W)."""
        x = _tokens(fused)  # (B, HW, C)
        answer, _ = self.multihead_attn_spatial(x, x, x, need_weights=False)  # (B, HW, C)
        x = self.norm1_spatial(x + self.dropout(answer))  # (B, HW, C)
        x = self.norm2_spatial(x + self.dropout(self.fc_spatial(x)))  # (B, HW, C)
        return x.transpose(1, 2).reshape(fused.shape)  # (B, C, H, W)


def _dilated_stack(cin: int, cout: int) -> nn.Sequential:
    """Two 3x3 convolutions of dilation 2 and 4: on 7x7, the second sees all of the map."""
    layers: list[nn.Module] = []
    for dilation in (2, 4):
        layers += [
            nn.Conv2d(cin, cout, 3, padding=dilation, dilation=dilation),
            nn.BatchNorm2d(cout),
            nn.ReLU(),
        ]
        cin = cout
    return nn.Sequential(*layers)


class Dgiqa(nn.Module):
    """Crops of a picture and of its depth map to quality in 0..1.

    As published it has 102.88 million parameters and 482 tensors. ``pretrained`` lets timm fetch
    ImageNet weights for both pyramids; else all weights are random.
    """

    def __init__(self, spec: TeacherSpec | None = None, *, pretrained: bool = False) -> None:
        super().__init__()
        self.spec = spec = spec or TeacherSpec()
        self.backbone = make_pyramid(spec.backbone, pretrained=pretrained)
        self.depth_backbone = make_pyramid(spec.backbone, pretrained=pretrained)
        for stream, pyramid in ((_PICTURE, self.backbone), (_DEPTH, self.depth_backbone)):
            stages = zip(pyramid_channels(pyramid), spec.bridge_channels, strict=True)
            for number, (cin, cout) in enumerate(stages, 1):
                self.add_module(f"tcb{number}{stream}", TransformerCnnBridge(cin, cout))
        self.depth_guided_cross_attention = DepthGuidedCrossAttention(spec.width, spec.num_heads)
        self.refinement_attention = RefinementAttention(spec.width, spec.num_heads)
        self.dilated_stack = _dilated_stack(spec.width, spec.pooled_channels)
        self.fc = nn.Linear(spec.pooled_channels, 1)

    def describe(self, picture: Tensor, depth: Tensor) -> TeacherOutput:
        """Score and features of crops.

        Both are float (B, 3, 224, 224), ImageNet-normalised; ``depth`` holds one map three times.
        """
        seen = self._bridged(pyramid_maps(self.backbone, picture), _PICTURE)  # (B, 960, 7, 7)
        near = self._bridged(pyramid_maps(self.depth_backbone, depth), _DEPTH)  # (B, 960, 7, 7)
        fused = self.depth_guided_cross_attention(near, seen)  # (B, 960, 7, 7)
        fused = self.refinement_attention(fused)  # (B, 960, 7, 7)
        pooled = self.dilated_stack(fused).mean((2, 3))  # (B, 1024)
        score = torch.sigmoid(self.fc(pooled)).squeeze(1)  # (B,)
        return TeacherOutput(score, fused, pooled)

    def forward(self, picture: Tensor, depth: Tensor) -> Tensor:
        """Quality (B,) in 0..1, 1 best; see :meth:`describe`."""
        return self.describe(picture, depth).score

    def _bridged(self, maps: list[Tensor], stream: str) -> Tensor:
        """Each stage through its bridge, all brought to the smallest map's size, side by side."""
        bridged = [
            self.get_submodule(f"tcb{number}{stream}")(stage)  # (B, C'_j, H_j, W_j)
            for number, stage in zip(count(1), maps, strict=False)
        ]
        size = min(m.shape[2] for m in bridged), min(m.shape[3] for m in bridged)
        resized = [
            F.interpolate(m, size=size, mode="bilinear", align_corners=False) for m in bridged
        ]  # no antialiasing: of 8x8 positions the first stage gives the middle 2x2
        return torch.cat(resized, 1)  # (B, sum of C'_j, 7, 7)
