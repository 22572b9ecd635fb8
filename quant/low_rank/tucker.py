"""k x k convolutions: a Tucker-2 decomposition in the norm of what the layer reads.

W[t, s, k] ~ sum_ab U[t, a] G[a, b, k] V[s, b]: a 1x1 convolution, a k x k one between few channels,
a 1x1 one (Kim et al., arXiv 1511.06530, section 3). It begins with the truncated HOSVD of the
whitened weight and is refined by alternating least squares. With the moments of channels alone,
whitening makes it the plain problem; with those of whole windows each half step is solved in that
norm: U and G together in closed form, V by conjugate gradients.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quant.low_rank.linear import whitener

_GRADIENT_STEPS = 20
_TINY = 1e-30


@dataclass(frozen=True, slots=True, eq=False)
class TuckerFactors:
    """``into`` (S, r_in), ``core`` (r_out, r_in, K), ``out`` (T, r_out) and their error."""

    into: Tensor
    core: Tensor
    out: Tensor
    squared_error: float
    """Of the output, in the norm it was made for."""


def leading(matrix: Tensor, rank: int) -> Tensor:
    """The first left singular vectors of (N, M), as (N, rank)."""
    try:
        _, vectors = torch.linalg.eigh(matrix @ matrix.T)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]  # too many equal eigenvalues
        return torch.linalg.svd(matrix, full_matrices=False)[0][:, :rank]
    return vectors.flip(1)[:, :rank]


def mode_energies(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Squared singular values, largest first, of (T, S, K) unfolded by input and by output."""
    by_input, by_output = weight.transpose(0, 1).flatten(1), weight.flatten(1)
    into, out = (torch.linalg.svdvals(m).square() for m in (by_input, by_output))
    return into, out


def _outputs(weight: Tensor, into: Tensor, rank: int) -> Tensor:
    """Best U (T, r_out) for an orthonormal V."""
    return leading(torch.einsum("tsk,sb->tbk", weight, into).flatten(1), rank)


def _inputs(weight: Tensor, out: Tensor, rank: int) -> Tensor:
    """Best V (S, r_in) for an orthonormal U."""
    return leading(torch.einsum("tsk,ta->sak", weight, out).flatten(1), rank)


def hooi(
    weight: Tensor, ranks: tuple[int, int], num_sweeps: int, start: Tensor | None = None
) -> TuckerFactors:
    """Tucker-2 of (T, S, K) in the plain norm: HOSVD or ``start`` (S, r_in), then sweeps.

    ``into`` and ``out`` have orthonormal columns; no sweep makes the error larger (De Lathauwer et
    al. 2000, higher-order orthogonal iteration).
    """
    rank_in, rank_out = ranks
    into = leading(weight.transpose(0, 1).flatten(1), rank_in) if start is None else start
    out = _outputs(weight, into, rank_out)
    for _ in range(num_sweeps):
        into = _inputs(weight, out, rank_in)
        out = _outputs(weight, into, rank_out)
    core = torch.einsum("tsk,sb,ta->abk", weight, into, out)
    error = (weight.square().sum() - core.square().sum()).clamp_min(0)
    return TuckerFactors(into, core, out, float(error))


def weighted_tucker(
    weight: Tensor,
    moments: Tensor,
    ranks: tuple[int, int],
    *,
    num_sweeps: int,
    damping: float,
) -> TuckerFactors:
    """Tucker-2 of (T, S, K) that minimises the error of the output.

    ``moments`` are (S, S), the same at each of the window's positions, or (S K, S K). The error is
    never above that of the plain decomposition in the same norm: both are begun from, and the
    better is kept.
    """
    num_inputs = weight.shape[1]
    plain = hooi(weight, ranks, num_sweeps)
    is_full = len(moments) != num_inputs
    factor = whitener(of_channels(moments, num_inputs), damping)
    whitened = torch.einsum("tsk,sr->trk", weight, factor)
    start, _ = torch.linalg.qr(factor.T @ plain.into)
    found = [hooi(whitened, ranks, num_sweeps, at) for at in (None, start)]
    best = min(found, key=lambda f: f.squared_error)
    back = torch.linalg.solve_triangular(factor.T, best.into, upper=True)
    if not is_full:
        return TuckerFactors(back, best.core, best.out, best.squared_error)
    of_windows = whitener(moments, damping)
    norm = of_windows @ of_windows.T
    starts = [best_outputs(weight, norm, v, ranks[1]) for v in (back, plain.into)]
    return refined(weight, norm, min(starts, key=lambda f: f.squared_error), num_sweeps)


def refined(weight: Tensor, norm: Tensor, start: TuckerFactors, num_sweeps: int) -> TuckerFactors:
    """Alternating least squares of (T, S, K) in a norm (S K, S K): no sweep errs more."""
    factors, rank_out = start, start.out.shape[1]
    for _ in range(num_sweeps):
        into = _improved_inputs(weight, norm, factors)
        factors = best_outputs(weight, norm, into, rank_out)
    return factors


def of_channels(moments: Tensor, num_inputs: int) -> Tensor:
    """Moments of windows (S K, S K) to the mean of those of channels, (S, S); these as they are."""
    window = len(moments) // num_inputs
    blocks = moments.reshape(num_inputs, window, num_inputs, window)
    return blocks.diagonal(dim1=1, dim2=3).mean(-1)


def best_outputs(weight: Tensor, norm: Tensor, into: Tensor, rank_out: int) -> TuckerFactors:
    """U and G that are best for V, in the norm (S K, S K).

    With A = P' N P = C C' for P = V x I, they are the truncated SVD of W N P C'^-1.
    """
    num_outputs, num_inputs, window = weight.shape
    into, _ = torch.linalg.qr(into)  # the same span; keeps A well conditioned
    side = into.shape[1] * window
    normed = norm.reshape(-1, num_inputs, window)
    projected = torch.einsum("nsk,sb->nbk", normed, into).reshape(-1, side)  # N P
    inner = torch.einsum("skn,sb->bkn", projected.reshape(num_inputs, window, side), into)
    factor = torch.linalg.cholesky(inner.reshape(side, side))  # P' N P = C C'
    flat = weight.reshape(num_outputs, -1)
    crossed = flat @ projected  # (T, r_in K)
    seen = torch.linalg.solve_triangular(factor, crossed.T, upper=False)  # C^-1 (W N P)'
    out = leading(seen.T, rank_out)
    core = torch.cholesky_solve(crossed.T @ out, factor).T  # U' W N P A^-1
    total = ((flat @ norm) * flat).sum()
    error = (total - (seen @ out).square().sum()).clamp_min(0)
    return TuckerFactors(into, core.reshape(rank_out, -1, window), out, float(error))


def _improved_inputs(weight: Tensor, norm: Tensor, factors: TuckerFactors) -> Tensor:
    """V for U and G, by conjugate gradients from where it is: the error never grows."""
    _, num_inputs, window = weight.shape
    core = factors.core

    def pulled_back(change: Tensor) -> Tensor:
        """The gradient's linear map of an error of U' W, (r_out, S, K) to (S, r_in)."""
        weighted = (change.flatten(1) @ norm).reshape(-1, num_inputs, window)
        return torch.einsum("ask,abk->sb", weighted, core)

    wanted = torch.einsum("tsk,ta->ask", weight, factors.out)
    into = factors.into.clone()
    residual = pulled_back(wanted - torch.einsum("abk,sb->ask", core, into))
    direction, size = residual.clone(), residual.square().sum()
    for _ in range(_GRADIENT_STEPS):
        if float(size) < _TINY:
            break
        curved = pulled_back(torch.einsum("abk,sb->ask", core, direction))
        step = size / (direction * curved).sum().clamp_min(_TINY)
        into = into + step * direction
        residual = residual - step * curved
        former, size = size, residual.square().sum()
        direction = residual + size / former * direction
    return into
