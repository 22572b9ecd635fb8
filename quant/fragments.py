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
    head_width: Count = 256
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
    int8_share: Share = 0.5
    """Looks whose other features are INT8's."""
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
    """(N,): of all features."""
    own: Tensor
    """(N,): of the fragments alone."""
    kinds: Tensor
    """(N, kinds): logits of each kind of damage."""


class Beside(nn.Module):
    """A trunk for fragments and a head that reads it beside features that are given."""

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
        self.hidden = nn.Linear(num_given + num_own, config.head_width)
        self.quality = nn.Linear(config.head_width, 1)
        self.own = nn.Sequential(
            nn.Dropout(_OWN_DROPOUT),
            nn.Linear(num_own, _OWN_WIDTH),
            nn.ReLU(),
            nn.Linear(_OWN_WIDTH, 1),
        )
        self.kinds = nn.Linear(num_own, num_kinds)

    def forward(self, given: Tensor, pictures: Tensor, autocast: torch.autocast) -> Said:
        """Features (N, num_given), standardised, and fragments (N, 3, H, W), normalised."""
        with autocast:
            made = self.trunk(pictures)
        made = self.norm(made.float())  # (N, num_own)
        hidden = F.relu(self.hidden(self.dropout(torch.cat([given, made], 1))))
        return Said(self.quality(hidden).squeeze(1), self.own(made).squeeze(1), self.kinds(made))


@dataclass(frozen=True, slots=True, eq=False)
class Lesson:
    """Which looks a step takes."""

    chosen: Tensor
    """(N,): indices of looks, rated ones first."""
    worse_by: Tensor
    """(M, M) for the last M, of ladders: levels that the column is worse than the row."""
    is_int8: Tensor
    """(N, 1): whether the given features are INT8's."""
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
        chosen, worse_by = self._draw(generator)
        share = torch.rand((len(chosen), 1), generator=generator)
        return Lesson(chosen, worse_by, share < self._config.int8_share, rng)


def lesson_loss(
    said: Said,
    wanted: Tensor,
    kinds: Tensor,
    worse_by: Tensor,
    config: FragmentsConfig,
    head: HeadConfig,
) -> Tensor:
    """What a step lowers. ``wanted``: logits (N,); ``kinds``: numbers (N,), -1 where none is."""
    loss = head_loss(said.logits, wanted, worse_by, head)
    loss = loss + config.own_weight * head_loss(said.own, wanted, worse_by, head)
    is_known = kinds >= 0
    if config.kind_weight and bool(is_known.any()):
        of_kinds = F.cross_entropy(said.kinds[is_known], kinds[is_known])
        loss = loss + config.kind_weight * of_kinds
    return loss
