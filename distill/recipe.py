"""What a training run is: one frozen, strict TOML file."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from dgiqa_stream.errors import ConfigError
from dgiqa_stream.preprocess import ViewSpec

Positive = Annotated[float, msgspec.Meta(gt=0)]
Rate = Annotated[float, msgspec.Meta(gt=0, le=1)]
"""Of learning: AdamW moves each weight by about its rate, so above 1 nothing is learnt."""
Share = Annotated[float, msgspec.Meta(ge=0, le=1)]
Count = Annotated[int, msgspec.Meta(ge=1)]
Weight = Annotated[float, msgspec.Meta(ge=0)]


class DataConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How the packs are made."""

    num_validation: Annotated[int, msgspec.Meta(ge=0)]
    """Pictures held back from BIQ2021's training part to choose on."""
    seed: int
    without_twins: bool = False
    """Whether a student's training leaves out pictures with a twin in the validation part."""
    leave_out: list[str] = []
    """Degradations that no ladder and no unrated picture of a student's training may have."""


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
    trunk_rate: Rate
    """Largest step of the trunk's tensors, as a share of each one's own RMS."""
    head_rate: Rate
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
    num_steps: Count | None = None
    """Steps instead of ``num_epochs``; the schedule of the rates ends there."""
    mixed_ladders: Share = 0.0
    """Share of the contents of a step that give pictures of any damage instead of one ladder; their
    order is what pseudo-MOS says, so only ``falls`` reads them."""
    ladders_from_clean: bool = False
    """Whether the clean picture is always among those of a ladder."""
    unrated_batch: Annotated[int, msgspec.Meta(ge=0)] = 0
    """Pictures without a human rating that a step takes from shards, beside its ladders."""
    num_accumulated: Count = 1
    """Batches whose gradients make one step."""
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """Of convolutions and products; auto is bf16, or fp16 on a GPU that lacks it."""


class ModelConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which network the student looks with."""

    trunk: Literal["mobilenetv2", "slim"] = "mobilenetv2"
    """slim: fewer channels in its stem and inside its bottlenecks, and no last convolution."""
    slim_widths: list[Count] = []
    """Channels of a slim trunk's stem, then those inside each of its 17 bottlenecks."""


class ImitationConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How a slim trunk is taught."""

    num_steps: Annotated[int, msgspec.Meta(ge=0)] = 1500
    """0 for a trunk as wide as its teacher, which it takes over, or for what slimming leaves."""
    rate: Rate = 2e-3
    warmup_steps: int = 100
    weight_decay: Weight = 0.01
    ema_decay: Annotated[float, msgspec.Meta(ge=0, lt=1)] = 0.998
    mean_weight: Positive = 3.0
    """Of the means over the picture, beside the map place by place."""


class LossConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Weights of what the student learns beside MOS and the order on ladders; 0 leaves a loss out.

    The first eight need a teacher's labels, those of pseudo-MOS need shards that were made with it.
    """

    teacher_score: Weight = 0.0
    fused: Weight = 0.0
    """The teacher's map of features, 7x7."""
    pooled: Weight = 0.0
    """The teacher's pooled vector, from what the student's head reads."""
    attention: Weight = 0.0
    """Where the teacher looks, guided by depth."""
    gated: Weight = 0.0
    """The teacher's pooled vector, from the places where the student learnt to look."""
    relation_distance: Weight = 0.0
    relation_similarity: Weight = 0.0
    rank_teacher: Weight = 0.0
    """Order of different contents by the teacher's score; likewise the next two."""
    rank_mos: Weight = 0.0
    rank_pseudo_mos: Weight = 0.0
    pseudo_mos: Weight = 0.0
    falls: Weight = 0.0
    """On ladders from the clean picture: its score, as the student has it, times the pseudo-MOS."""
    order_only: list[str] = []
    """Degradations whose pseudo-MOS counts nothing, only the order of their levels: full-reference
    measures punish what people who see no original hardly mind."""
    gated_score: Weight = 0.0
    """The score from features whose channels a gate weighs, for the next two."""
    insensitivity: Weight = 0.0
    """To the semantics of other pictures of similar quality."""
    contrast: Weight = 0.0
    pooled_kind: Literal["cosine", "standardised"] = "cosine"
    ranking_kind: Literal["fidelity", "bradley_terry"] = "fidelity"
    confidence_temperature: Positive = 0.01
    """Variance over a teacher's crops at which a picture counts 1/e."""

    def needing_teacher(self) -> list[str]:
        """The losses that are asked for and need a teacher's labels."""
        return [name for name in TEACHER_LOSSES if getattr(self, name)]

    def needing_pseudo_mos(self) -> list[str]:
        """The losses that are asked for and need pseudo-MOS."""
        return [name for name in ("pseudo_mos", "rank_pseudo_mos", "falls") if getattr(self, name)]


TEACHER_LOSSES = (
    "teacher_score", "fused", "pooled", "attention", "gated", "relation_distance",
    "relation_similarity", "rank_teacher",
)  # fmt: skip


class ChainConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What comes before the student in ``dgiqa-distill chain``."""

    num_clean: Count | None = None
    """Clean pictures to degrade, evenly out of the folder; all where absent."""
    num_rated: Count | None = None
    """Of each rated set, evenly out of its training and validation part; all where absent."""
    degradations: list[str] = []
    """Ladders to make; all of still pictures where empty."""
    num_chains: Annotated[int, msgspec.Meta(ge=0)] = 4
    """Random pairs of degradations for each clean picture."""
    pseudo_mos: bool = True
    longest_px: Annotated[int, msgspec.Meta(ge=224)] = 1088
    depth: str | None = None
    """The teacher's depth maps, as of ``score --depth``; the published network where absent."""
    num_crops: Literal[1, 4, 9, 16, 25] = 9
    """Of the teacher's grid on each picture."""
    teacher: dict[str, Any] | None = None
    """A teacher's recipe, for a chain that is not given a teacher."""


class Recipe(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One student, from data to weights."""

    name: str
    views: list[ViewSpec]
    """The student's two, in its order; their sizes may differ."""
    data: DataConfig
    train: TrainConfig
    model: ModelConfig = ModelConfig()
    imitate: ImitationConfig = ImitationConfig()
    losses: LossConfig = LossConfig()
    chain: ChainConfig | None = None

    def __post_init__(self) -> None:
        """Refuse views that the student would take for one another."""
        kinds = [(view.name, view.kind) for view in self.views]
        if kinds != [("whole", "whole"), ("fragments", "fragments")]:
            raise ValueError(
                f"views {[name for name, _ in kinds]} must be 'whole' of kind whole, then "
                "'fragments' of kind fragments"
            )


def load_recipe(path: Path) -> Recipe:
    """Read a recipe; every key must be known and present."""
    try:
        return msgspec.convert(tomllib.loads(path.read_text()), Recipe)
    except FileNotFoundError as exc:
        raise ConfigError(f"no recipe at {path}: give a file of configs/distill/") from exc
    except (msgspec.ValidationError, tomllib.TOMLDecodeError, ValueError) as exc:
        raise ConfigError(f"{path}: {exc}") from exc
