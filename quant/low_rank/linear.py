"""Linear layers and 1x1 convolutions: the best low-rank product for what the layer reads.

Of the error E|(W - W~) x|^2 = |(W - W~) L|^2 (Frobenius), with L L' = E[x x'], the least at a rank
is that of the truncated SVD of W L (Eckart and Young 1936, in the whitened norm; SVD-LLM, arXiv
2403.07378, section 3). With U its first left vectors the product is U (U' W): nothing is inverted.
"""

from __future__ import annotations

import torch
from torch import Tensor


def whitener(moments: Tensor, damping: float) -> Tensor:
    """L (S, S), lower triangular and regular, with L L' = moments + damping mean(diagonal) I.

    The identity where there are no moments: then the norm is the plain one.
    """
    mean = moments.diagonal().mean()
    unit = torch.eye(len(moments), dtype=moments.dtype)
    if not bool(mean > 0):
        return unit
    # a Cholesky factor, as eigenvalues of a matrix with many zeros may not converge
    factor: Tensor = torch.linalg.cholesky(moments / mean + damping * unit)
    return factor * mean.sqrt()


class LinearFactors:
    """The factors of one matrix W (T, S) at any rank, for one whitener of what it reads."""

    def __init__(self, weight: Tensor, factor: Tensor) -> None:
        self._weight = weight
        found = torch.linalg.svd(weight @ factor, full_matrices=False)
        self._left, self.singular_values = found[0], found[1]

    def factors(self, rank: int) -> tuple[Tensor, Tensor]:
        """(T, r) with orthonormal columns, and (r, S)."""
        left = self._left[:, :rank]
        return left, left.T @ self._weight
