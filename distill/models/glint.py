"""A second teacher, inspired by GlintIQA (Global and Local INTegration; arXiv 2408.03885).

Public is the framework figure: which extractors there are, how local maps come to the grid of the
global tokens, and the order of the modules. Not public is what is inside CWSA and SEM, which four
blocks of the ViT are taken, and how the head pools. What was chosen for those:

* the last four blocks of the ViT, unless ``first_block`` says otherwise; their tokens before the
  final LayerNorm, class token left out;
* CWSA (channel-wise self-attention): the inputs side by side through one linear layer to width d,
  LayerNorm, linear queries, keys and values, a softmax over d x d channels, residual;
* SEM (spatial enhancement module): tokens as a map, depthwise 3x3, 1x1, ReLU, residual;
* head: mean over space, then two linear layers, the first of width d, and a sigmoid.

So a checkpoint of the authors does not fit, and none of their figures is claimed. Depth plays no
part; the argument exists because a teacher is called with one.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dgiqa_stream.errors import BackendUnavailable, ConfigError
from distill.models.backbones import MOBILENETV2, MobileNetPyramid, hush_hub, not_fetched
from distill.models.teacher import TeacherOutput

NUM_BLOCKS = 4
"""Consecutive blocks of the ViT whose tokens are read."""
LOCAL_STRIDES = (4, 8, 16)
"""Strides of the three CNN stages that are read."""


@dataclass(frozen=True, slots=True)
class GlintConfig:
    """Which timm models the teacher is made of; ``vit_options`` go to the ViT's constructor.

    ``cnn`` may also be ``mobilenetv2``, this project's own.
    """

    vit: str = "vit_base_patch16_224"
    cnn: str = "resnet50"
    picture_px: int = 224
    """Side of the square picture; a multiple of the ViT's patch, itself a multiple of 16."""
    first_block: int | None = None
    """Index of the first of the four blocks; None takes the last four."""
    pretrained: bool = False
    """Ask timm for ImageNet weights of both extractors."""
    vit_options: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Both extractors."""
        return f"{self.vit}+{self.cnn}"


class GlobalExtractor(nn.Module):
    """VGFE: the tokens of four consecutive blocks of a ViT."""

    def __init__(self, config: GlintConfig) -> None:
        super().__init__()
        self.vit = _vit(config)
        depth, first = len(self.vit.blocks), config.first_block
        first = depth - NUM_BLOCKS if first is None else first
        if not 0 <= first <= depth - NUM_BLOCKS:
            raise ConfigError(
                f"first_block {first} of {config.vit}: {NUM_BLOCKS} consecutive blocks of "
                f"{depth} begin at 0..{depth - NUM_BLOCKS}"
            )
        self.blocks = list(range(first, first + NUM_BLOCKS))
        self.width = int(self.vit.embed_dim)
        self.patch_px = int(self.vit.patch_embed.patch_size[0])
        if self.patch_px % LOCAL_STRIDES[-1]:
            raise ConfigError(
                f"{config.vit} has patches of {self.patch_px} px, and local maps of stride 16 "
                "reach its grid only where that is a multiple of 16: take a patch16 or patch32 ViT"
            )
        if config.picture_px % self.patch_px:
            raise ConfigError(
                f"picture_px {config.picture_px} is no multiple of {config.vit}'s patch of "
                f"{self.patch_px} px"
            )
        self.vit.prune_intermediate_layers(self.blocks, prune_norm=True, prune_head=True)

    def forward(self, picture: Tensor) -> list[Tensor]:
        """(B, 3, H, W) to four of (B, N, d), N = HW / patch^2."""
        tokens: list[Tensor] = self.vit.forward_intermediates(
            picture, indices=self.blocks, norm=False, output_fmt="NLC", intermediates_only=True
        )
        return tokens


class LocalExtractor(nn.Module):
    """CLFE: three stages of a CNN, each embedded on the ViT's grid."""

    def __init__(self, config: GlintConfig, *, width: int, patch_px: int) -> None:
        super().__init__()
        self.cnn, channels = _cnn(config)
        self.embed = nn.ModuleList(
            nn.Conv2d(cin, width, patch_px // stride, patch_px // stride)
            for cin, stride in zip(channels, LOCAL_STRIDES, strict=True)
        )

    def forward(self, picture: Tensor) -> list[Tensor]:
        """(B, 3, H, W) to three of (B, N, d)."""
        maps = self.cnn(picture)[: len(LOCAL_STRIDES)]  # (B, C_s, H/s, W/s) for s = 4, 8, 16
        return [
            embed(x).flatten(2).transpose(1, 2)  # (B, d, h, w) -> (B, N, d)
            for embed, x in zip(self.embed, maps, strict=True)
        ]


class ChannelSelfAttention(nn.Module):
    """CWSA: several token maps to one, by attention between channels; linear in the tokens.

    X = W [X_1 .. X_n];  Q, K, V = W' LN(X);  A = softmax(Q^T K / sqrt(N)) in R^(d x d), over its
    last axis;  out = X + V A^T. Blind to the order of the tokens: see the tests.
    """

    def __init__(self, width: int, *, num_inputs: int) -> None:
        super().__init__()
        self.merge = nn.Linear(num_inputs * width, width)
        self.norm = nn.LayerNorm(width)
        self.to_qkv = nn.Linear(width, 3 * width)

    def forward(self, *inputs: Tensor) -> Tensor:
        """``num_inputs`` of (B, N, d) to (B, N, d)."""
        x = self.merge(torch.cat(inputs, -1))  # (B, N, num_inputs d) -> (B, N, d)
        q, k, v = self.to_qkv(self.norm(x)).chunk(3, -1)  # (B, N, d) each
        attention = q.transpose(1, 2) @ k / x.shape[1] ** 0.5  # (B, d, d)
        attention = attention.softmax(-1)  # channel i asks, channels j answer
        out: Tensor = x + v @ attention.transpose(1, 2)  # (B, N, d)
        return out


class SpatialEnhancement(nn.Module):
    """SEM: what neighbours in space add to each token; residual."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.pointwise = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor, *, grid: tuple[int, int]) -> Tensor:
        """(B, N, d) to (B, N, d); ``grid`` is (h, w) with h w = N."""
        y = x.transpose(1, 2).unflatten(2, grid)  # (B, d, h, w)
        y = F.relu(self.pointwise(self.depthwise(y)))  # (B, d, h, w)
        return x + y.flatten(2).transpose(1, 2)  # (B, N, d)


class ProgressiveIntegration(nn.Module):
    """PFI: the local maps become one, which then meets the global maps one after the other."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.of_local = ChannelSelfAttention(width, num_inputs=len(LOCAL_STRIDES))
        self.steps = nn.ModuleList(
            ChannelSelfAttention(width, num_inputs=2) for _ in range(NUM_BLOCKS)
        )
        self.enhance = nn.ModuleList(SpatialEnhancement(width) for _ in range(NUM_BLOCKS))

    def forward(self, local: list[Tensor], wide: list[Tensor], *, grid: tuple[int, int]) -> Tensor:
        """Three local and four global maps (B, N, d) to one (B, N, d)."""
        x = self.of_local(*local)  # (B, N, d)
        for step, enhance, tokens in zip(self.steps, self.enhance, wide, strict=True):
            x = enhance(step(x, tokens), grid=grid)  # (B, N, d)
        return x


class GlintIQA(nn.Module):
    """A picture to its quality in 0..1.

    Raises :class:`ConfigError` where timm has no such model or the two extractors do not fit each
    other, :class:`BackendUnavailable` without timm, and :class:`ModelError` where it cannot fetch
    weights.
    """

    def __init__(self, config: GlintConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or GlintConfig()
        self.picture_px = config.picture_px
        self.wide = GlobalExtractor(config)
        width = self.wide.width
        self.local = LocalExtractor(config, width=width, patch_px=self.wide.patch_px)
        self.integrate = ProgressiveIntegration(width)
        self.hidden = nn.Linear(width, width)
        self.quality = nn.Linear(width, 1)
        side = config.picture_px // self.wide.patch_px
        self.grid = (side, side)

    def describe(self, picture: Tensor, depth: Tensor | None = None) -> TeacherOutput:
        """ImageNet-normalised RGB (B, 3, S, S), S = ``picture_px``, to score and features.

        ``fused`` is (B, d, h, w), the tokens after the last integration, h = w = S / patch;
        ``pooled`` is its mean over space, (B, d). Raises ``ValueError`` for another size.
        """
        if picture.shape[1:] != (3, self.picture_px, self.picture_px):
            raise ValueError(
                f"a batch of shape {tuple(picture.shape)}: this teacher takes "
                f"(B, 3, {self.picture_px}, {self.picture_px})"
            )
        tokens = self.integrate(self.local(picture), self.wide(picture), grid=self.grid)
        fused = tokens.transpose(1, 2).unflatten(2, self.grid)  # (B, N, d) -> (B, d, h, w)
        pooled = tokens.mean(1)  # (B, d)
        return TeacherOutput(torch.sigmoid(self.head(pooled)), fused, pooled)

    def head(self, pooled: Tensor) -> Tensor:
        """Pooled features (B, d) to logits of quality (B,)."""
        logits: Tensor = self.quality(F.relu(self.hidden(pooled))).squeeze(1)  # (B,)
        return logits

    def forward(self, picture: Tensor, depth: Tensor | None = None) -> Tensor:
        """Quality (B,) in 0..1, 1 best; see :meth:`describe`. ``depth`` is not read."""
        return self.describe(picture, depth).score


def _cnn(config: GlintConfig) -> tuple[nn.Module, list[int]]:
    """A network whose first maps are of the three strides, and their channels."""
    if config.cnn == MOBILENETV2:
        own = MobileNetPyramid()
        return own, list(own.channels[: len(LOCAL_STRIDES)])
    with torch.device("meta"):  # only to read its strides
        probe = _create(config.cnn, features_only=True).feature_info
    strides, channels = probe.reduction(), probe.channels()
    if not set(LOCAL_STRIDES) <= set(strides):
        raise ConfigError(
            f"{config.cnn} has stages of strides {strides}: take a CNN with {LOCAL_STRIDES}"
        )
    stages = tuple(strides.index(stride) for stride in LOCAL_STRIDES)
    cnn = _create(config.cnn, pretrained=config.pretrained, features_only=True, out_indices=stages)
    return cnn, [channels[stage] for stage in stages]


def _vit(config: GlintConfig) -> Any:
    options = {"num_classes": 0, "img_size": config.picture_px, **config.vit_options}
    try:
        return _create(config.vit, pretrained=config.pretrained, **options)
    except TypeError as exc:  # a CNN knows neither blocks nor img_size
        raise ConfigError(f"{config.vit} is no ViT that takes {sorted(options)}: {exc}") from exc


def _create(name: str, **options: Any) -> Any:
    """timm's ``create_model``, with errors that say what to do."""
    try:
        import timm
    except ImportError as exc:
        raise BackendUnavailable(
            f"model {name!r} needs {exc.name!r}: pip install 'dgiqa-stream[teacher]'"
        ) from exc
    if not timm.is_model(name.partition(".")[0]):
        raise ConfigError(f"timm {timm.__version__} has no model {name!r}: see timm.list_models()")
    hush_hub()
    try:
        return timm.create_model(name, **options)
    except OSError as exc:
        raise not_fetched(name, exc) from exc
