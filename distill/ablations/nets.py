"""The networks that ablations compare: heads and fusions over frozen maps, and how they are fitted.

Each takes indices of pictures and crops, so that every one sees the same cached maps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from dgiqa_stream.correlation import plcc, srcc
from distill.ablations.features import LATE, SIDE, STAGES, Seen
from distill.ablations.settings import Settings
from distill.models.glint import NUM_BLOCKS, ProgressiveIntegration
from distill.models.qfm import QfmRegulariser
from distill.models.teacher import Dgiqa, TeacherSpec
from distill.models.trunks import CHANNELS
from distill.optimising import learning_rate_share
from distill.teachers.training import weighted_plcc_loss

STAGE_CHANNELS = [CHANNELS[j] for j in STAGES]
LATE_CHANNELS = [CHANNELS[j] for j in LATE]
SPEC = TeacherSpec("mobilenetv2", (8, 16, 32, 64), 4, 128)
"""An eighth of DGIQA's widths: what a few thousand pictures and two cores can fit."""
_WIDTH = 96
_WARMUP_SHARE, _PLCC_WEIGHT, _WEIGHT_DECAY, _DROPOUT = 0.05, 0.3, 0.05, 0.1


@dataclass(frozen=True, slots=True, eq=False)
class Look:
    """One crop of each of B pictures."""

    seen: Seen
    pictures: Tensor
    """(B,)."""
    crops: Tensor
    """(B,)."""

    def stages(self) -> Tensor:
        """float32 (B, 504, 7, 7)."""
        return self.seen.stages[self.pictures, self.crops].float()

    def late(self) -> Tensor:
        """float32 (B, 480, 7, 7)."""
        return self.seen.late[self.pictures, self.crops].float()

    def depth(self) -> Tensor:
        """float32 (B, 504, 7, 7)."""
        return self.seen.depth[self.pictures, self.crops].float()

    def semantics(self) -> Tensor:
        """float32 (B, 320): the last stage's means."""
        return self.stages()[:, -STAGE_CHANNELS[-1] :].mean((2, 3))


class Pooling(nn.Module):
    """A network with pooled features and a head."""

    def pooled(self, look: Look) -> Tensor:
        """(B, D)."""
        raise NotImplementedError

    def head(self, pooled: Tensor) -> Tensor:
        """(B, D) to logits (B,)."""
        raise NotImplementedError


class _Split(nn.Module):
    """Stands where a pyramid was: its maps were computed before."""

    def forward(self, maps: Tensor) -> list[Tensor]:
        return list(maps.split(STAGE_CHANNELS, 1))


class DepthCar(Pooling):
    """DGIQA's bridges, cross-attention, refinement and head, with depth of a kind.

    ``constant`` is what the network sees of a map of zeros, ``picture`` asks with the picture
    itself: the same weights and sums, no depth.
    """

    def __init__(self, depth: Literal["map", "constant", "picture"], nothing: Tensor) -> None:
        super().__init__()
        self.dgiqa, self.depth = Dgiqa(SPEC), depth
        self.dgiqa.backbone, self.dgiqa.depth_backbone = _Split(), _Split()
        self.register_buffer("nothing", nothing.float(), persistent=False)

    def pooled(self, look: Look) -> Tensor:
        """See :class:`Pooling`."""
        picture = look.stages()
        asking = {
            "map": look.depth,
            "constant": lambda: self.nothing.expand_as(picture),
            "picture": lambda: picture,
        }[self.depth]()
        return self.dgiqa.describe(picture, asking).pooled

    def head(self, pooled: Tensor) -> Tensor:
        """See :class:`Pooling`."""
        return self.dgiqa.fc(pooled).squeeze(1)


class PlainHead(Pooling):
    """Means over space of all stages, one hidden layer."""

    def __init__(self, hidden: int = 256) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(sum(STAGE_CHANNELS))
        self.hidden = nn.Linear(sum(STAGE_CHANNELS), hidden)
        self.quality = nn.Linear(hidden, 1)

    def pooled(self, look: Look) -> Tensor:
        """See :class:`Pooling`."""
        return self.norm(look.stages().mean((2, 3)))

    def head(self, pooled: Tensor) -> Tensor:
        """See :class:`Pooling`."""
        x = F.dropout(F.relu(self.hidden(pooled)), _DROPOUT, self.training)
        return self.quality(x).squeeze(1)


class Integration(Pooling):
    """Local maps and four late ones to one: progressively (GlintIQA's order) or side by side.

    The four last bottlenecks stand where the blocks of a ViT would.
    """

    def __init__(self, kind: Literal["progressive", "concatenated", "local"]) -> None:
        super().__init__()
        self.kind = kind
        local, late = STAGE_CHANNELS[:-1], [*LATE_CHANNELS, STAGE_CHANNELS[-1]]
        self.embed = nn.ModuleList(nn.Linear(c, _WIDTH) for c in (*local, *late))
        self.norms = nn.ModuleList(nn.LayerNorm(c) for c in (*local, *late))
        self.num_local = len(local)
        num_maps = self.num_local + (NUM_BLOCKS if kind == "concatenated" else 0)
        if kind == "progressive":
            self.integrate = ProgressiveIntegration(_WIDTH)
        else:
            self.merge = nn.Linear(num_maps * _WIDTH, _WIDTH)
        self.hidden, self.quality = nn.Linear(_WIDTH, _WIDTH), nn.Linear(_WIDTH, 1)

    def pooled(self, look: Look) -> Tensor:
        """See :class:`Pooling`."""
        *local, last = look.stages().split(STAGE_CHANNELS, 1)
        maps = [*local, *look.late().split(LATE_CHANNELS, 1), last]
        tokens = [
            embed(norm(m.flatten(2).transpose(1, 2)))  # (B, 49, d)
            for embed, norm, m in zip(self.embed, self.norms, maps, strict=True)
        ]
        near, wide = tokens[: self.num_local], tokens[self.num_local :]
        if self.kind == "progressive":
            return self.integrate(near, wide, grid=(SIDE, SIDE)).mean(1)
        return self.merge(torch.cat(near if self.kind == "local" else tokens, -1)).mean(1)

    def head(self, pooled: Tensor) -> Tensor:
        """See :class:`Pooling`."""
        return self.quality(F.relu(self.hidden(pooled))).squeeze(1)


@dataclass(frozen=True, slots=True, eq=False)
class Targets:
    """What some pictures of ``seen`` are to score."""

    pictures: Tensor
    """(N,) indices."""
    quality: Tensor
    """(N,), 0..1."""
    weight: Tensor
    """(N,), 0..1."""


def all_targets(seen: Seen) -> Targets:
    """Every picture at its MOS."""
    return Targets(torch.arange(len(seen.mos)), seen.mos, torch.ones_like(seen.mos))


@dataclass(frozen=True, slots=True)
class Noise:
    """QFM's losses in a fit."""

    weight: float
    contrast_weight: float = 0.0
    gated: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Fitted:
    """A fitted network; ``head`` holds the gate where there is one."""

    net: Pooling
    head: Callable[[Tensor], Tensor]


def fit(
    make: Callable[[], Pooling],
    seen: Seen,
    targets: Targets,
    settings: Settings,
    *,
    seed: int,
    noise: Noise | None = None,
) -> Fitted:
    """Fit to the end of the schedule; nothing is chosen on the way."""
    torch.manual_seed(seed)
    net = make()
    width = net.pooled(Look(seen, torch.arange(2), torch.zeros(2, dtype=torch.int64))).shape[1]
    regulariser = QfmRegulariser(width, gated=noise.gated) if noise else None
    parameters = [*net.parameters(), *(regulariser.parameters() if regulariser else ())]
    optimiser = torch.optim.AdamW(parameters, settings.rate, weight_decay=_WEIGHT_DECAY)
    per_epoch = max(1, len(targets.pictures) // settings.batch)
    num_steps = settings.num_epochs * per_epoch
    warmup = max(1, round(_WARMUP_SHARE * num_steps))
    net.train()
    for step in range(num_steps):
        if step % per_epoch == 0:
            order = torch.randperm(len(targets.pictures))
        for group in optimiser.param_groups:
            group["lr"] = settings.rate * learning_rate_share(step, num_steps, warmup)
        chosen = order[step % per_epoch * settings.batch :][: settings.batch]
        loss = _loss(net, seen, targets, chosen, noise, regulariser)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
    net.eval()
    gate = regulariser.gate if regulariser else None
    return Fitted(net, net.head if gate is None else lambda f: net.head(gate(f) * f))


def _loss(
    net: Pooling,
    seen: Seen,
    targets: Targets,
    chosen: Tensor,
    noise: Noise | None,
    regulariser: QfmRegulariser | None,
) -> Tensor:
    num_crops = seen.stages.shape[1]
    look = Look(seen, targets.pictures[chosen], torch.randint(num_crops, (len(chosen),)))
    quality, weight = targets.quality[chosen], targets.weight[chosen]
    with torch.autocast("cpu", torch.bfloat16):
        pooled = net.pooled(look)
    pooled, extra = pooled.float(), torch.zeros(())
    if noise is None or regulariser is None:
        logits = net.head(pooled)
    else:
        found = regulariser(pooled, quality, net.head, semantics=look.semantics())
        logits = found.logits
        extra = noise.weight * found.insensitivity + noise.contrast_weight * found.contrast
    score = torch.sigmoid(logits)
    error = ((score - quality).square() * weight).sum() / weight.sum().clamp_min(1e-6)
    return error + _PLCC_WEIGHT * weighted_plcc_loss(score, quality, weight) + extra


@torch.no_grad()
def pooled_of(fitted: Fitted, seen: Seen, pictures: Tensor | None = None) -> Tensor:
    """(N, K, D) pooled features of every crop."""
    indices = torch.arange(len(seen.mos)) if pictures is None else pictures
    found = []
    with torch.autocast("cpu", torch.bfloat16):
        for part in indices.split(64):
            crops = [
                fitted.net.pooled(Look(seen, part, torch.full_like(part, k))).float()
                for k in range(seen.stages.shape[1])
            ]
            found.append(torch.stack(crops, 1))
    return torch.cat(found)


@torch.no_grad()
def crop_scores(fitted: Fitted, seen: Seen, pictures: Tensor | None = None) -> Tensor:
    """(N, K) scores of every crop, 0..1."""
    pooled = pooled_of(fitted, seen, pictures)
    return torch.sigmoid(fitted.head(pooled.flatten(0, 1))).view(pooled.shape[:2])


def agreement(fitted: Fitted, seen: Seen) -> dict[str, float]:
    """SRCC and PLCC of the mean over crops to MOS."""
    scores: NDArray[np.float32] = crop_scores(fitted, seen).mean(1).numpy()
    return {"srcc": srcc(scores, seen.mos.numpy()), "plcc": plcc(scores, seen.mos.numpy())}
