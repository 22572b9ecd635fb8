"""What a student learns from a teacher: the losses of distillation, one function each.

Every loss is a mean, zero where the student has what the teacher has, and takes ``weights`` (B,):
how much each picture counts. Weight 0 counts nothing, even where the picture's teacher gave NaN,
and a batch without any weight has loss 0. The teacher's side never receives a gradient.

The adapters and the gate are modules of training alone: no deployed graph holds them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_TINY = 1e-6


def _kept(weights: Tensor | None, *values: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Weights and values of the pictures that count; a row of weight 0 must not even be read."""
    if weights is None:
        return values[0].new_ones(len(values[0])), list(values)
    kept = weights > 0
    return weights[kept], [value[kept] for value in values]


def _mean(values: Tensor, weights: Tensor) -> Tensor:
    """Weighted mean of (B,) by (B,); 0 of nothing."""
    return (values * weights).sum() / weights.sum().clamp_min(_TINY)


def teacher_score_loss(logits: Tensor, scores: Tensor, weights: Tensor | None = None) -> Tensor:
    """Soft targets: KL(Bernoulli(t) || Bernoulli(sigmoid(z))), weighted mean.

    ``logits`` z (B,) of the student, ``scores`` t (B,) of the teacher on 0..1. After Hinton et al.,
    arXiv 1503.02531, section 2, with two classes and the quality as the probability of "good".
    """
    w, (z, t) = _kept(weights, logits, scores.detach())
    cross = F.binary_cross_entropy_with_logits(z, t, reduction="none")
    return _mean(cross - _entropy(t), w)


def _entropy(p: Tensor) -> Tensor:
    return -(torch.special.xlogy(p, p) + torch.special.xlogy(1 - p, 1 - p))


class FeatureAdapter(nn.Module):
    """A student's map to a teacher's channels and size: 1x1 convolution, adaptive mean pooling."""

    def __init__(self, student_channels: int, teacher_channels: int) -> None:
        super().__init__()
        self.project = nn.Conv2d(student_channels, teacher_channels, 1)

    def forward(self, features: Tensor, *, size: tuple[int, int]) -> Tensor:
        """(B, Cs, h, w) to (B, Ct, *size)."""
        pooled = F.adaptive_avg_pool2d(features, size)  # (B, Cs, H, W): pooling first is cheaper
        adapted: Tensor = self.project(pooled)  # (B, Ct, H, W)
        return adapted


def fused_loss(adapted: Tensor, fused: Tensor, weights: Tensor | None = None) -> Tensor:
    """sum_i w_i |a_i - t_i|^2 / sum_i w_i |t_i|^2 over channels and positions.

    ``adapted`` of :class:`FeatureAdapter` and the teacher's ``fused``, both (B, C, H, W). The hint
    of FitNets, arXiv 1412.6550, equation 3, in proportion to the teacher's own energy, so that one
    weight in a recipe means the same for any teacher: scaling both changes nothing.
    """
    w, (a, t) = _kept(weights, adapted, fused.detach())
    error = (a - t).square().flatten(1).mean(1)  # (B,)
    energy = t.square().flatten(1).mean(1)
    return _mean(error, w) / _mean(energy, w).clamp_min(_TINY)


class VectorAdapter(nn.Linear):
    """A student's pooled vector (B, Ds) to a teacher's width (B, Dt)."""


def pooled_loss(
    adapted: Tensor,
    pooled: Tensor,
    weights: Tensor | None = None,
    *,
    kind: Literal["cosine", "standardised"] = "cosine",
) -> Tensor:
    """How far pooled vectors (B, D) differ; the teacher's is ``pooled``.

    * ``cosine``: 1 - cos(a, t) of each picture; blind to the length of either vector (0 where both
      are zero);
    * ``standardised``: squared error after each dimension is brought to mean 0 and deviation 1 over
      the batch, on both sides; blind to shift and scale of every dimension. It is 2 - 2 PLCC of
      each dimension, so a dimension that is constant on both sides adds 0.
    """
    w, (a, t) = _kept(weights, adapted, pooled.detach())
    if not len(a):
        return adapted.sum() * 0.0
    if kind == "cosine":
        both_zero = (a.norm(dim=1) == 0) & (t.norm(dim=1) == 0)
        return _mean((1 - F.cosine_similarity(a, t, eps=_TINY)) * ~both_zero, w)
    if kind == "standardised":
        return _mean((_standardised(a, w) - _standardised(t, w)).square().mean(1), w)
    raise ValueError(f"pooled loss {kind!r}: known are 'cosine' and 'standardised'")


def _standardised(x: Tensor, weights: Tensor) -> Tensor:
    share = (weights / weights.sum())[:, None]  # (B, 1)
    mean = (share * x).sum(0)
    centred = x - mean
    deviation = (share * centred.square()).sum(0).clamp_min(_TINY**2).sqrt()
    # of a constant dimension only float32's rounding is left, which must not become its signal
    return centred / deviation.clamp_min(1e-5 * mean.detach().abs())


def relation_distance_loss(
    student: Tensor, teacher: Tensor, weights: Tensor | None = None
) -> Tensor:
    """RKD-D: Huber loss between distances of all pairs, each side's divided by its own mean.

    Vectors (B, Ds) and (B, Dt); the widths may differ. Park et al., arXiv 1904.05068, equations 4
    to 6. Blind to rotation, shift and scale of either side. A pair weighs the product of its
    pictures' weights.
    """
    w, (s, t) = _kept(weights, student, teacher.detach())
    if len(s) < 2:
        return student.sum() * 0.0
    of_pair = torch.outer(w, w)[_pairs(s)]
    ds, dt = (_relative_distances(x, of_pair) for x in (s, t))
    return _mean(F.huber_loss(ds, dt, reduction="none"), of_pair)


def _pairs(x: Tensor) -> tuple[Tensor, Tensor]:
    i, j = torch.triu_indices(len(x), len(x), 1, device=x.device)
    return i, j


def _relative_distances(x: Tensor, of_pair: Tensor) -> Tensor:
    distances = F.pdist(x.float())  # (P,) in the order of _pairs; its gradient at 0 is 0
    return distances / _mean(distances, of_pair).clamp_min(_TINY)


def relation_similarity_loss(
    student: Tensor, teacher: Tensor, weights: Tensor | None = None
) -> Tensor:
    """Similarity-preserving: mean squared difference of row-normalised Gram matrices.

    G = X X^T, each row divided by its length; (1/B^2) |G_S - G_T|_F^2 (arXiv 1907.09682, equations
    1 to 4). Vectors (B, Ds) and (B, Dt). Blind to rotation and to one common scale, not to a shift.
    An entry weighs the product of its pictures' weights.
    """
    w, (s, t) = _kept(weights, student, teacher.detach())
    gs, gt = (F.normalize(x @ x.T, dim=1) for x in (s, t))  # (B, B)
    return _mean((gs - gt).square().flatten(), torch.outer(w, w).flatten())


def ranking_loss(
    logits: Tensor,
    quality: Tensor,
    weights: Tensor | None = None,
    *,
    contents: Tensor | None = None,
    kind: Literal["fidelity", "bradley_terry"] = "fidelity",
    dead_zone: float = 0.05,
    scale: float = 0.25,
) -> Tensor:
    """Which of two pictures is better, over all pairs whose quality differs enough.

    p_ij = sigmoid((y_i - y_j) / ``scale``) of the teacher or pseudo-MOS, q_ij = sigmoid(z_i - z_j)
    of the student's logits (Bradley and Terry 1952); pairs with |y_i - y_j| <= ``dead_zone`` count
    nothing, every other w_i w_j.

    * ``fidelity``: 1 - sqrt(p q) - sqrt((1 - p)(1 - q)), bounded by 1 (FRank, Tsai et al. 2007;
      for quality: UNIQUE, arXiv 2005.13983, equation 6);
    * ``bradley_terry``: KL(p || q), steeper far from the target.

    ``logits``, ``quality`` (0..1) and ``contents`` are (B,); with ``contents`` only pairs of
    different contents count, those within one being :func:`distill.losses.ladder_loss`'s. Blind to
    a constant added to all logits; zero where z = y / ``scale`` + a constant.
    """
    if kind not in _RANKING:
        raise ValueError(f"ranking loss {kind!r}: known are {sorted(_RANKING)}")
    labels = torch.arange(len(logits), device=logits.device) if contents is None else contents
    w, (z, y, c) = _kept(weights, logits, quality.detach(), labels)
    i, j = _pairs(z)
    gap = y[i] - y[j]  # (P,)
    counts = (gap.abs() > dead_zone) & (c[i] != c[j])
    wanted, given = gap[counts] / scale, (z[i] - z[j])[counts]
    return _mean(_RANKING[kind](wanted, given), (w[i] * w[j])[counts])


def _fidelity(wanted: Tensor, given: Tensor) -> Tensor:
    # in logarithms: the root's own gradient is infinite where a probability is 0
    both = torch.exp((F.logsigmoid(wanted) + F.logsigmoid(given)) / 2)
    neither = torch.exp((F.logsigmoid(-wanted) + F.logsigmoid(-given)) / 2)
    return 1 - both - neither


def _bradley_terry(wanted: Tensor, given: Tensor) -> Tensor:
    p = torch.sigmoid(wanted)
    cross = F.binary_cross_entropy_with_logits(given, p, reduction="none")
    return cross - F.binary_cross_entropy_with_logits(wanted, p, reduction="none")


_RANKING: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "fidelity": _fidelity,
    "bradley_terry": _bradley_terry,
}


def attention_target(attention: Tensor) -> Tensor:
    """Where the teacher looks, guided by depth: (B, heads, N, N) to (B, side, side), sum 1.

    ``attention`` are the weights of the depth-guided cross-attention (49 tokens in DGIQA): row q,
    a depth token, divides 1 among columns k, the picture's tokens. The target is the mean over
    heads and rows: how much each position of the picture is read. Raises ``ValueError`` where N is
    no square or the rows do not sum to 1.
    """
    num_tokens = attention.shape[-1]
    side = math.isqrt(num_tokens)
    if attention.ndim != 4 or attention.shape[-2] != num_tokens or side * side != num_tokens:
        raise ValueError(
            f"attention weights of shape {tuple(attention.shape)}: (B, heads, N, N) with N the "
            "square of a side is needed"
        )
    rows = attention.detach().float()
    if not torch.allclose(rows.sum(-1), torch.ones((), device=rows.device), atol=1e-2):
        raise ValueError(
            "attention weights must sum to 1 over the last axis: give them after softmax"
        )
    read = rows.mean((1, 2))  # (B, N)
    return (read / read.sum(1, keepdim=True)).unflatten(1, (side, side))  # (B, side, side)


def cross_attention_weights(attention: nn.MultiheadAttention, run: Callable[[], object]) -> Tensor:
    """The weights (B, heads, N, N) of one attention while ``run`` calls the network it is part of.

    ``attention`` is batch-first. Networks ask torch for no weights, because that is slower; this
    computes them a second time from the same inputs. Raises ``ValueError`` where ``run`` does not
    pass through ``attention`` exactly once.
    """
    asked: list[tuple[Tensor, Tensor]] = []
    hook = attention.register_forward_pre_hook(lambda _, inputs: asked.append(inputs[:2]))
    try:
        with torch.no_grad():
            run()
    finally:
        hook.remove()
    if len(asked) != 1:
        raise ValueError(f"the network passed {len(asked)} times through its attention, not once")
    [(query, key)] = asked
    with torch.no_grad():
        _, weights = attention(query, key, key, need_weights=True, average_attn_weights=False)
    assert weights is not None
    return weights.detach()


@dataclass(frozen=True, slots=True, eq=False)
class Gated:
    """What the gate makes of a student's feature map."""

    log_map: Tensor
    """(B, side, side): logarithm of a distribution over positions."""
    pooled: Tensor
    """(B, C): the mean of the features under that distribution."""


class DepthGuidedGate(nn.Module):
    """Learns, without depth, where the teacher looks with it; training alone.

    The map is a softmax over positions of a 1x1 convolution; ``pooled`` can be matched to the
    teacher's pooled vector, so that what the student says of those places counts, too.
    """

    def __init__(self, channels: int, *, side: int = 7) -> None:
        super().__init__()
        self.side = side
        self.look = nn.Conv2d(channels, 1, 1)

    def forward(self, features: Tensor) -> Gated:
        """(B, C, h, w) to the map and the features under it."""
        x = F.adaptive_avg_pool2d(features, self.side)  # (B, C, side, side)
        log_map = self.look(x).flatten(1).log_softmax(1)  # (B, side^2)
        pooled = torch.einsum("bcn,bn->bc", x.flatten(2), log_map.exp())  # (B, C)
        return Gated(log_map.unflatten(1, (self.side, self.side)), pooled)


def attention_loss(log_map: Tensor, target: Tensor, weights: Tensor | None = None) -> Tensor:
    """KL(target || map) over positions of each picture, weighted mean; both (B, side, side).

    ``log_map`` of :class:`DepthGuidedGate`, ``target`` of :func:`attention_target`. In the spirit
    of attention transfer (Zagoruyko and Komodakis, arXiv 1612.03928), whose maps are sums over
    channels of a CNN's features; here they are the teacher's own weights, a distribution.
    """
    w, (given, wanted) = _kept(weights, log_map, target.detach())
    kl = torch.special.xlogy(wanted, wanted) - wanted * given
    return _mean(kl.flatten(1).sum(1), w)
