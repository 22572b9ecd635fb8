"""What a training run is: one frozen, strict TOML file."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated

import msgspec

from dgiqa_stream.errors import ConfigError
from dgiqa_stream.preprocess import ViewSpec

Positive = Annotated[float, msgspec.Meta(gt=0)]
Share = Annotated[float, msgspec.Meta(ge=0, le=1)]
Count = Annotated[int, msgspec.Meta(ge=1)]


class DataConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How the packs are made."""

    num_validation: Annotated[int, msgspec.Meta(ge=0)]
    """Pictures held back from BIQ2021's training part to choose on."""
    seed: int


class TrainConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How the student is fitted."""

    seed: int
    num_epochs: Count
    """Passes over the rated training pictures."""
    rated_batch: Count
    ladder_groups: Count
    """Contents a step takes from the ladders; each gives ``ladder_levels`` pictures."""
    ladder_levels: Annotated[int, msgspec.Meta(ge=2)]
    head_epochs: Count
    """Epochs of the head alone on frozen features, before the trunk moves."""
    trunk_rate: Positive
    """Largest step of the trunk's tensors, as a share of each one's own RMS."""
    head_rate: Positive
    warmup_steps: int
    weight_decay: float
    dropout: Share
    ema_decay: Share
    plcc_weight: float
    ladder_weight: float
    ladder_margin: Positive
    """Logits by which neighbouring levels of a ladder should differ."""
    smallest_crop: Share
    """Training crops keep at least this share of each side."""


class Recipe(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One student, from data to weights."""

    name: str
    views: list[ViewSpec]
    data: DataConfig
    train: TrainConfig


def load_recipe(path: Path) -> Recipe:
    """Read a recipe; every key must be known and present."""
    try:
        return msgspec.convert(tomllib.loads(path.read_text()), Recipe)
    except FileNotFoundError as exc:
        raise ConfigError(f"no recipe at {path}: give a file of configs/distill/") from exc
    except (msgspec.ValidationError, tomllib.TOMLDecodeError, ValueError) as exc:
        raise ConfigError(f"{path}: {exc}") from exc
