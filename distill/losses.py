"""The training losses, one function each. Lower is better; all are means over the batch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from distill.distilling import teacher_score_loss


def score_loss(logits: Tensor, mos: Tensor) -> Tensor:
    """Binary cross-entropy against MOS on 0..1, both (N,): smallest where sigmoid equals MOS."""
    return F.binary_cross_entropy_with_logits(logits, mos) - _entropy(mos).mean()


def _entropy(p: Tensor) -> Tensor:
    p = p.clamp(1e-6, 1 - 1e-6)
    return -(p * p.log() + (1 - p) * (1 - p).log())


def plcc_loss(scores: Tensor, mos: Tensor) -> Tensor:
    """(1 - PLCC) / 2 over the batch, both (N,); 0 when they lie on one rising line."""
    s = scores - scores.mean()
    m = mos - mos.mean()
    return (1 - (s * m).sum() / (s.norm() * m.norm()).clamp_min(1e-6)) / 2


def ladder_loss(logits: Tensor, levels: Tensor, margin: float) -> Tensor:
    """Hinge over every pair of one content and one degradation, both (G, L).

    A picture ``d`` levels worse should lie ``d * margin`` logits lower; pairs of one level count
    nothing.
    """
    gap = logits.unsqueeze(2) - logits.unsqueeze(1)  # (G, L, L): row minus column
    steps = (levels.unsqueeze(1) - levels.unsqueeze(2)).to(logits.dtype)  # column worse: > 0
    worse = steps > 0
    hinge = torch.relu(steps * margin - gap) * worse
    return hinge.sum() / worse.sum().clamp_min(1)


def falls_loss(logits: Tensor, pseudo_mos: Tensor, confidence: Tensor) -> Tensor:
    """How far pictures lie below the clean picture of their content, all (G, L), it first.

    Each should have the clean picture's quality times its pseudo-MOS, which is 1 for a picture as
    good as the clean one. The clean picture's quality is taken as the student has it: no gradient
    goes into it. Binary cross-entropy less its smallest value, weighed by ``confidence`` 0..1;
    pictures without a pseudo-MOS count nothing.
    """
    clean = torch.sigmoid(logits[:, :1]).detach()  # (G, 1)
    wanted, weights = clean * pseudo_mos[:, 1:], confidence[:, 1:]
    return teacher_score_loss(logits[:, 1:].flatten(), wanted.flatten(), weights.flatten())


def pseudo_mos_loss(logits: Tensor, pseudo_mos: Tensor, confidence: Tensor) -> Tensor:
    """Binary cross-entropy less its smallest value, against labels that were computed, all (N,).

    Each picture counts by its ``confidence``, 0..1; one of confidence 0 is not even read.
    """
    return teacher_score_loss(logits, pseudo_mos, confidence)
