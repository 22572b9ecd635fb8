"""A trunk for the fragments, taught beside a head whose other features are there already.

The whole view's trunk does not move, so what it says of each look is measured once. The fragments
are cut at new places each time they are looked at, as there are few contents and many places. The
new trunk is asked for three things: what the head wants of all features together, the same of the
fragments alone, and which kind of damage a ladder shows. The last two keep it from leaning on what
the other features say anyway (`distill/EXPERIMENTS.md`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import msgspec
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quant.head import Count, Draw, HeadConfig, Labels, Positive, head_loss

_OWN_WIDTH = 96
_OWN_DROPOUT = 0.1
Share = Annotated[float, msgspec.Meta(ge=0, le=1)]


class FragmentsConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How a fragment trunk is taught. What a head is to say, and its losses, are the head's."""

    widths: tuple[Count, Count, Count, Count] = (24, 48, 96, 128)
    """Channels at a half, a quarter, an eighth and a sixteenth of the fragments' size."""
    num_heads: Count = 5
    """Heads that are taught on their own, whose mean logit is the answer."""
    head_width: Count = 64
    """Hidden units of each."""
    num_steps: Count = 4000
    batch: Count = 96
    """Looks at rated pictures in a step."""
    ladders_at_once: Annotated[int, msgspec.Meta(ge=0)] = 14
    """Whole ladders in a step, beside them."""
    places: Count = 3
    """Sets of places that a ladder's fragments are cut at; rated pictures have new ones always."""
    rate: Positive = 2.5e-3
    """The highest, after a tenth of the steps; it falls by a cosine after that."""
    weight_decay: Annotated[float, msgspec.Meta(ge=0)] = 0.05
    dropout: Annotated[float, msgspec.Meta(ge=0, lt=1)] = 0.3
    rating_share: Share = 0.5
    """How much people say of what a rated picture is to get; who teaches the head says the rest."""
    agreement_weight: Annotated[float, msgspec.Meta(ge=0)] = 75.0
    """Weight of the squared difference between a head's logits beside the float trunk's features
    and beside INT8's."""
    own_weight: Annotated[float, msgspec.Meta(ge=0)] = 1.0
    """Weight of a head that reads the fragments alone."""
    kind_weight: Annotated[float, msgspec.Meta(ge=0)] = 0.15
    """Weight of the cross-entropy of the kind of damage."""
    seed: int = 1
    version: int = 1


@dataclass(frozen=True, slots=True, eq=False)
class Said:
    """What a :class:`Beside` says of N looks."""

    logits: Tensor
    """(heads, 2, N): of all features, the float trunk's and INT8's."""
    own: Tensor
    """(N,): of the fragments alone."""
    kinds: Tensor
    """(N, kinds): logits of each kind of damage."""


class Beside(nn.Module):
    """A trunk for fragments and heads that read it beside features that are given."""

    def __init__(
        self,
        trunk: nn.Module,
        *,
        num_own: int,
        num_given: int,
        num_kinds: int,
        config: FragmentsConfig,
    ) -> None:
        """``trunk`` makes ``num_own`` features of pictures (N, 3, H, W)."""
        super().__init__()
        self.trunk = trunk
        self.norm = nn.BatchNorm1d(num_own, affine=False)
        self.dropout = nn.Dropout(config.dropout)
        self.hidden, self.quality = nn.ModuleList(), nn.ModuleList()
        for _ in range(config.num_heads):
            self.hidden.append(nn.Linear(num_given + num_own, config.head_width))
            self.quality.append(nn.Linear(config.head_width, 1))
        self.own = nn.Sequential(
            nn.Dropout(_OWN_DROPOUT),
            nn.Linear(num_own, _OWN_WIDTH),
            nn.ReLU(),
            nn.Linear(_OWN_WIDTH, 1),
        )
        self.kinds = nn.Linear(num_own, num_kinds)

    def forward(self, given: Tensor, pictures: Tensor, autocast: torch.autocast) -> Said:
        """Features (2, N, num_given), standardised, and fragments (N, 3, H, W), normalised."""
        with autocast:
            made = self.trunk(pictures)
        made = self.norm(made.float())  # (N, num_own)
        features = torch.cat([given, made.expand(len(given), -1, -1)], 2)
        logits = []
        for hidden, quality in zip(self.hidden, self.quality, strict=True):
            # one mask for both: what is dropped must not count as disagreement
            kept = self.dropout(torch.ones_like(features[0]))
            logits.append(quality(F.relu(hidden(features * kept))).squeeze(2))  # (2, N)
        return Said(torch.stack(logits), self.own(made).squeeze(1), self.kinds(made))

    def hidden_state(self) -> dict[str, Tensor]:
        """Weight and bias of the first layer of all heads as one."""
        layers = [layer.state_dict() for layer in self.hidden]
        return {name: torch.cat([each[name] for each in layers]) for name in ("weight", "bias")}

    def quality_state(self) -> dict[str, Tensor]:
        """Weight and bias of the last layer of all heads as one, whose logit is their mean."""
        layers = [layer.state_dict() for layer in self.quality]
        return {
            "weight": torch.cat([each["weight"] for each in layers], 1) / len(layers),
            "bias": torch.stack([each["bias"] for each in layers]).mean(0),
        }


@dataclass(frozen=True, slots=True, eq=False)
class Lesson:
    """Which looks a step takes."""

    chosen: Tensor
    """(N,): indices of looks, rated ones first."""
    worse_by: Tensor
    """(M, M) for the last M, of ladders: levels that the column is worse than the row."""
    rng: np.random.Generator
    """For what else the step draws."""


class Lessons:
    """The steps of a run, each decided by (seed, number) alone."""

    def __init__(self, labels: Labels, config: FragmentsConfig) -> None:
        self._draw = Draw(labels, batch=config.batch, ladders_at_once=config.ladders_at_once)
        self._config = config

    def __call__(self, number: int) -> Lesson:
        """The one of this number."""
        rng = np.random.default_rng([self._config.seed, number])
        generator = torch.Generator().manual_seed(int(rng.integers(1 << 62)))
        return Lesson(*self._draw(generator), rng)


def lesson_loss(
    said: Said,
    wanted: Tensor,
    kinds: Tensor,
    worse_by: Tensor,
    config: FragmentsConfig,
    head: HeadConfig,
) -> Tensor:
    """What a step lowers. ``wanted``: logits (N,); ``kinds``: numbers (N,), -1 where none is."""
    loss = config.agreement_weight * said.logits.diff(dim=1).square().mean()
    each = said.logits.flatten(0, 1)  # (heads * 2, N)
    for logits in each:
        loss = loss + head_loss(logits, wanted, worse_by, head) / len(each)
    loss = loss + config.own_weight * head_loss(said.own, wanted, worse_by, head)
    is_known = kinds >= 0
    if config.kind_weight and bool(is_known.any()):
        of_kinds = F.cross_entropy(said.kinds[is_known], kinds[is_known])
        loss = loss + config.kind_weight * of_kinds
    return loss
