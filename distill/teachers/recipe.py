"""What a teacher's training is: one frozen, strict TOML file.

Only the crops are the published protocol's (224 pixels out of a picture whose smaller side is 384,
ImageNet normalisation): losses, rates and length of DGIQA's training were not published as code, so
those here are this project's own.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from dgiqa_stream.errors import ConfigError
from distill.models.backbones import SWIN
from distill.models.glint import GlintConfig
from distill.models.teacher import CROP_PX, TeacherSpec
from distill.recipe import Count, DataConfig, Positive, Rate, Share

NotNegative = Annotated[float, msgspec.Meta(ge=0)]
Squares = Literal[1, 4, 9, 16, 25]


class DgiqaModel(
    msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="architecture", tag="dgiqa"
):
    """DGIQA on any pyramid; the defaults are the published shape."""

    backbone: str = SWIN
    bridge_channels: tuple[int, int, int, int] = (64, 128, 256, 512)
    num_heads: Count = 16
    pooled_channels: Count = 1024
    pretrained: bool = False
    """Let timm fetch ImageNet weights of the pyramids, where no file of them is given."""

    @property
    def spec(self) -> TeacherSpec:
        """The architecture."""
        return TeacherSpec(
            self.backbone, self.bridge_channels, self.num_heads, self.pooled_channels
        )


class GlintModel(
    msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="architecture", tag="glint"
):
    """The reconstruction of GlintIQA: a ViT, a CNN and their progressive integration."""

    vit: str = "vit_base_patch16_224"
    cnn: str = "resnet50"
    first_block: int | None = None
    vit_options: dict[str, Any] = {}
    pretrained: bool = False

    @property
    def config(self) -> GlintConfig:
        """The architecture, for crops of the published size."""
        return GlintConfig(
            self.vit, self.cnn, CROP_PX, self.first_block, self.pretrained, self.vit_options
        )


class FitConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How a teacher is fitted."""

    seed: int
    num_epochs: Count
    """Passes over the training pictures, one random crop of each."""
    batch: Count
    """Crops that go through the network at once; pairs of pictures are formed within them."""
    head_rate: Rate
    """Largest rate (AdamW) of bridges, attention and head."""
    pyramid_rate: Annotated[float, msgspec.Meta(ge=0, le=1)]
    """Of the pyramids; 0 freezes them, statistics included."""
    warmup_steps: Annotated[int, msgspec.Meta(ge=0)]
    weight_decay: NotNegative
    ema_decay: Share
    accumulate: Count = 1
    """Batches whose gradients are added up before a step."""
    loss: Literal["mse", "l1", "bce"] = "mse"
    """Between score and MOS, both 0..1."""
    plcc_weight: NotNegative = 0.0
    largest_gradient: Positive = 1.0
    precision: Literal["bfloat16", "float32"] = "bfloat16"
    num_steps: Count | None = None
    """Steps instead of ``num_epochs``; the schedule of the rates ends there."""
    validate_every: Count | None = None
    """Steps; an epoch where absent."""
    checkpoint_every: Count = 100
    evaluation_crops: Squares = 4
    """Crops on a grid whose mean is the score of a validation picture."""
    num_evaluated: Count | None = None
    """The first so many validation pictures choose the best weights; all where absent."""


class QfmConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Training against semantic noise (inspired by QFM-IQM); weights of 0 leave it out."""

    weight: NotNegative = 0.0
    """Of the insensitivity loss."""
    contrast_weight: NotNegative = 0.0
    tolerance: Positive = 0.05
    """Pictures whose MOS differ by less are of similar quality."""
    most_noise: Positive = 0.5

    @property
    def is_on(self) -> bool:
        """Whether any of it counts."""
        return self.weight > 0 or self.contrast_weight > 0


class ExpansionConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Unrated pictures that learn from another teacher's scores (inspired by QFM-IQM)."""

    num_crops: Squares = 4
    temperature: Positive = 0.01
    """A picture weighs exp(-variance over crops / temperature)."""


class TeacherRecipe(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One teacher, from data to weights."""

    name: str
    version: str
    """What the weights are called; a change that moves scores changes it."""
    model: DgiqaModel | GlintModel
    data: DataConfig
    train: FitConfig
    qfm: QfmConfig = QfmConfig()
    expansion: ExpansionConfig = ExpansionConfig()


def load_teacher_recipe(path: Path) -> TeacherRecipe:
    """Read a recipe; raises :class:`ConfigError` for a key or value that cannot be."""
    try:
        recipe = msgspec.convert(tomllib.loads(path.read_text()), TeacherRecipe)
        if isinstance(recipe.model, DgiqaModel):
            _ = recipe.model.spec  # refuses widths that its heads cannot share
    except FileNotFoundError as exc:
        raise ConfigError(f"no recipe at {path}: give a configs/distill/teacher-*.toml") from exc
    except (msgspec.ValidationError, tomllib.TOMLDecodeError, ConfigError, ValueError) as exc:
        raise ConfigError(f"{path}: {exc}") from exc
    return recipe
