"""Training against semantic noise, inspired by QFM-IQM (ICML 2024, arXiv 2312.06158).

Certain of the paper, from its abstract: pictures of similar quality but different semantics are
matched, the difference of their features is taken as adversarial semantic noise, the model is
trained to be insensitive to it with channels chosen adaptively, and a distillation expands the
data with pseudo-labels. Its equations and module names are not public, nor is its code: every
formula below is a reconstruction, stated where it is used, and no figure of the paper is claimed.

All of this exists in training alone; nothing here enters a deployed graph. Features f are (B, C)
pooled vectors, quality y is (B,) on 0..1, 1 best. A picture without a partner in its batch gets no
noise and counts in no mean.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NO_PARTNER = -1


def match_pairs(semantics: Tensor, quality: Tensor, *, tolerance: float = 0.05) -> Tensor:
    """The partner of each picture: similar quality, most different semantics.

    j(i) = argmax_j (1 - cos(s_i, s_j)) over j != i with |y_i - y_j| < ``tolerance``.

    ``semantics`` is (B, C), taken without gradient. Returns int64 (B,), ``NO_PARTNER`` where no
    picture of similar quality is in the batch.
    """
    s = F.normalize(semantics.detach().float(), dim=1)  # (B, C)
    distance = 1 - s @ s.T  # (B, B), 0..2
    allowed = (quality[:, None] - quality[None, :]).abs() < tolerance  # (B, B)
    allowed = allowed & ~torch.eye(len(s), dtype=torch.bool, device=s.device)
    best = distance.masked_fill(~allowed, -1.0).argmax(1)  # (B,)
    return torch.where(allowed.any(1), best, NO_PARTNER)


def semantic_noise(features: Tensor, partners: Tensor) -> Tensor:
    """What leads from each picture's features to its partner's, as long as the features: (B, C).

    n_i = |f_i| (f_j(i) - f_i) / |f_j(i) - f_i|, without gradient; zero where there is no partner.
    """
    f = features.detach()
    towards = f[partners.clamp_min(0)] - f  # (B, C)
    length = f.norm(dim=1, keepdim=True)  # (B, 1)
    noise = F.normalize(towards, dim=1) * length  # (B, C); equal features give zero
    return noise * (partners != NO_PARTNER)[:, None]


class ChannelGate(nn.Module):
    """Which channels tell quality: g = sigmoid(W2 relu(W1 f)) in (0, 1)^C."""

    def __init__(self, width: int, *, reduction: int = 4) -> None:
        super().__init__()
        self.squeeze = nn.Linear(width, max(1, width // reduction))
        self.excite = nn.Linear(max(1, width // reduction), width)

    def forward(self, features: Tensor) -> Tensor:
        """(B, C) to (B, C) in 0..1."""
        return torch.sigmoid(self.excite(F.relu(self.squeeze(features))))


def insensitivity_loss(clean: Tensor, noisy: Tensor, has_partner: Tensor) -> Tensor:
    """Mean of |h(g f_i) - h(g f~_i)| over the pictures that have a partner; 0 without any.

    ``clean`` and ``noisy`` are logits (B,), ``has_partner`` is bool (B,).
    """
    moved = (clean - noisy).abs() * has_partner
    return moved.sum() / has_partner.sum().clamp_min(1)


def contrast_loss(
    features: Tensor,
    semantics: Tensor,
    quality: Tensor,
    *,
    tolerance: float = 0.05,
    far: float = 0.2,
    alike: float = 0.5,
    margin: float = 0.0,
) -> Tensor:
    """Pull what is of one quality together, push apart what only looks alike.

    With c_ij = cos(f_i, f_j) and s_ij = cos of the semantics, without gradient, over i < j:
    mean of (1 - c_ij) where |y_i - y_j| < ``tolerance`` and s_ij < ``alike``, plus
    mean of max(0, c_ij - ``margin``) where |y_i - y_j| > ``far`` and s_ij >= ``alike``.
    A kind of pair that the batch lacks adds 0.
    """
    f = F.normalize(features, dim=1)
    s = F.normalize(semantics.detach(), dim=1)
    i, j = torch.triu_indices(len(f), len(f), 1, device=f.device)  # (P,) each
    close = (f[i] * f[j]).sum(1)  # (P,), -1..1
    look_alike = (s[i] * s[j]).sum(1) >= alike
    gap = (quality[i] - quality[j]).abs()
    pull = (1 - close) * ((gap < tolerance) & ~look_alike)
    push = F.relu(close - margin) * ((gap > far) & look_alike)
    num_pull = ((gap < tolerance) & ~look_alike).sum().clamp_min(1)
    num_push = ((gap > far) & look_alike).sum().clamp_min(1)
    return pull.sum() / num_pull + push.sum() / num_push


@dataclass(frozen=True, slots=True, eq=False)
class QfmLosses:
    """The parts of one step; weigh and add them to the score loss of ``logits``."""

    logits: Tensor
    """(B,): the head on gated features, h(g f)."""
    insensitivity: Tensor
    contrast: Tensor
    num_matched: int
    """Pictures of the batch that found a partner."""


class QfmRegulariser(nn.Module):
    """Gate, noise and both losses, between a trunk's features and its head.

    f~_i = f_i + a n_i with a ~ U(0, ``most_noise``) for each picture; n of :func:`semantic_noise`.
    The whole loss of a step is then
    L = L_score(h(g f), y) + l1 insensitivity + l2 contrast, with l1 about 0.5 to 1.

    Without a gate g is 1: nothing is learnt here, and the head alone is what is deployed.
    """

    def __init__(
        self,
        width: int,
        *,
        tolerance: float = 0.05,
        most_noise: float = 0.5,
        gated: bool = True,
    ) -> None:
        super().__init__()
        if not (tolerance > 0 and most_noise > 0):
            raise ValueError(
                f"tolerance {tolerance} and most_noise {most_noise} must both be positive"
            )
        self.gate = ChannelGate(width) if gated else None
        self.tolerance, self.most_noise = tolerance, most_noise

    def forward(
        self,
        features: Tensor,
        quality: Tensor,
        head: Callable[[Tensor], Tensor],
        *,
        semantics: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> QfmLosses:
        """Features (B, C), quality (B,) and a head (B, C) -> (B,) to the losses.

        ``semantics`` (B, C') come from a frozen or averaged model; without them, the features
        themselves are taken, without gradient.
        """
        semantics = features.detach() if semantics is None else semantics
        partners = match_pairs(semantics, quality, tolerance=self.tolerance)  # (B,)
        drawn = torch.rand(len(features), 1, generator=generator, device=features.device)
        noisy = features + self.most_noise * drawn * semantic_noise(features, partners)  # (B, C)
        gate = torch.ones_like(features) if self.gate is None else self.gate(features)  # (B, C)
        gated = gate * features
        logits, logits_of_noisy = head(gated), head(gate * noisy)  # (B,) each
        matched = partners != NO_PARTNER
        return QfmLosses(
            logits=logits,
            insensitivity=insensitivity_loss(logits, logits_of_noisy, matched),
            contrast=contrast_loss(gated, semantics, quality, tolerance=self.tolerance),
            num_matched=int(matched.sum()),
        )


@torch.no_grad()
def sensitivity(
    features: Tensor,
    quality: Tensor,
    predict: Callable[[Tensor], Tensor],
    *,
    semantics: Tensor | None = None,
    tolerance: float = 0.05,
    noise: float = 0.25,
) -> float:
    """How far semantic noise moves predictions, as a share of their own spread; lower is better.

    mean |p(f_i) - p(f_i + ``noise`` n_i)| / SD(p(f)), over pictures with a partner. ``predict`` is
    (B, C) -> (B,). NaN where no picture has a partner or all predictions are one.
    """
    partners = match_pairs(
        features if semantics is None else semantics, quality, tolerance=tolerance
    )
    matched = partners != NO_PARTNER
    clean = predict(features)
    moved = predict(features + noise * semantic_noise(features, partners)) - clean
    spread = float(clean.std(correction=0))
    if spread == 0 or not matched.any():
        return float("nan")
    return float(moved[matched].abs().mean()) / spread


@dataclass(frozen=True, slots=True, eq=False)
class PseudoLabels:
    """Targets of pictures and how much each counts."""

    quality: Tensor
    """(N,), 0..1."""
    weights: Tensor
    """(N,), 0..1."""


def pseudo_labels(crop_scores: Tensor, *, temperature: float = 0.01) -> PseudoLabels:
    """A teacher's scores of several crops of each picture, (N, K), to targets of the student.

    Target: the mean over crops. Weight: exp(-Var / ``temperature``), Var over the K crops (of the
    population); one crop has no variance and weight 1. Raises ``ValueError`` for scores outside
    0..1 and for a temperature that is not positive.
    """
    if temperature <= 0:
        raise ValueError(f"temperature {temperature} must be positive")
    if crop_scores.ndim != 2 or not bool(((crop_scores >= 0) & (crop_scores <= 1)).all()):
        raise ValueError(
            f"crop scores must be (pictures, crops) within 0..1, not {tuple(crop_scores.shape)} "
            "with something outside"
        )
    scores = crop_scores.detach()
    variance = scores.var(1, correction=0)  # (N,)
    return PseudoLabels(scores.mean(1), torch.exp(-variance / temperature))


def expand(labelled: Tensor, pseudo: PseudoLabels) -> PseudoLabels:
    """One set of targets: human MOS (M,) at weight 1, then the teacher's (N,) at their own."""
    ones = torch.ones_like(labelled)
    return PseudoLabels(
        torch.cat([labelled, pseudo.quality]), torch.cat([ones, pseudo.weights.to(ones)])
    )
