"""One layer's factors at any rank, in the norm of what it reads: the same for every kind."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from quant.low_rank.config import LowRankConfig
from quant.low_rank.layers import (
    Layer,
    Rank,
    empty_factors,
    grouped_weight,
    kind_of,
    shape_of,
)
from quant.low_rank.linear import LinearFactors, whitener
from quant.low_rank.statistics import LayerInputs
from quant.low_rank.tucker import (
    TuckerFactors,
    hooi,
    mode_energies,
    of_channels,
    weighted_tucker,
)


class LayerFactors:
    """How one layer can be factored; what it takes long to compute is computed once."""

    def __init__(self, layer: Layer, inputs: LayerInputs, config: LowRankConfig) -> None:
        self.layer, self.inputs, self.config = layer, inputs, config
        self.shape, self.kind = shape_of(layer), kind_of(layer)
        self._weight = grouped_weight(layer).cpu()  # (G, T, S, K)
        self._moments = [m / max(1, inputs.num_positions) for m in inputs.moments]
        self._linear: list[LinearFactors] = []
        self._parts: dict[Rank, list[Tensor]] = {}

    def module(self, rank: Rank) -> nn.Sequential:
        """The layers that take this one's place."""
        made = empty_factors(self.layer, rank)
        with torch.no_grad():
            for target, weight in zip(made, self._weights(rank), strict=True):
                assert isinstance(target, nn.Linear | nn.Conv2d)
                target.weight.copy_(weight.reshape(target.weight.shape))
            if self.layer.bias is not None:
                made[-1].bias.copy_(self.layer.bias)  # type: ignore[arg-type]
        return made

    def weighted_error(self, rank: Rank) -> float:
        """Root mean square error of the output as a share of the output's own, biases aside.

        In the norm of the (damped) calibration data, whatever norm the factors were made in.
        """
        wrong, whole = 0.0, 0.0
        pairs = zip(self._weight, self._product(rank), self._moments, strict=True)
        for weight, product, moments in pairs:
            factor = whitener(moments, self.config.damping)
            wrong += _energy(weight - product, factor)
            whole += _energy(weight, factor)
        return math.sqrt(wrong / whole) if whole else 0.0

    def energies(self) -> tuple[list[Tensor], ...]:
        """Squared weighted singular values of each group, for each of the rank's numbers."""
        if self.kind != "conv":
            return ([f.singular_values.square() for f in self._svd()],)
        pairs = [
            mode_energies(torch.einsum("tsk,sr->trk", w, self._factor(of_channels(m, w.shape[1]))))
            for w, m in zip(self._weight, self._moments, strict=True)
        ]
        return [into for into, _ in pairs], [out for _, out in pairs]

    def _weights(self, rank: Rank) -> list[Tensor]:
        """Weights of the layers in order, groups one after the other."""
        if rank not in self._parts:
            make = self._tucker_weights if self.kind == "conv" else self._linear_weights
            self._parts[rank] = make(rank)
        return self._parts[rank]

    def _linear_weights(self, rank: Rank) -> list[Tensor]:
        pairs = [f.factors(rank[0]) for f in self._svd()]
        return [torch.cat([right for _, right in pairs]), torch.cat([left for left, _ in pairs])]

    def _tucker_weights(self, rank: Rank) -> list[Tensor]:
        pairs = zip(self._weight, self._moments, strict=True)
        found = [self._tucker(weight, moments, (rank[0], rank[1])) for weight, moments in pairs]
        into = torch.cat([f.into.T for f in found])  # (G r_in, S)
        core = torch.cat([f.core for f in found])  # (G r_out, r_in, K)
        return [into, core, torch.cat([f.out for f in found])]  # (G T, r_out)

    def _product(self, rank: Rank) -> Tensor:
        """What the layers together multiply with, (G, T, S, K)."""
        groups = self.shape.groups
        parts = [p.unflatten(0, (groups, -1)) for p in self._weights(rank)]
        if len(parts) == 2:
            return (parts[1] @ parts[0])[..., None]
        return torch.einsum("gbs,gabk,gta->gtsk", *parts)

    def _svd(self) -> list[LinearFactors]:
        if not self._linear:
            pairs = zip(self._weight[..., 0], self._moments, strict=True)
            self._linear = [LinearFactors(w, self._factor(moments)) for w, moments in pairs]
        return self._linear

    def _tucker(self, weight: Tensor, moments: Tensor, rank: tuple[int, int]) -> TuckerFactors:
        sweeps, damping = self.config.num_sweeps, self.config.damping
        if self.config.weighting == "none":
            return hooi(weight, rank, sweeps)
        return weighted_tucker(weight, moments, rank, num_sweeps=sweeps, damping=damping)

    def _factor(self, moments: Tensor) -> Tensor:
        if self.config.weighting == "none":
            return torch.eye(len(moments), dtype=torch.float64)
        return whitener(moments, self.config.damping)


def _energy(weight: Tensor, factor: Tensor) -> float:
    """Mean square of the output of (T, S, K) for a whitener of windows or of channels."""
    if len(factor) == weight.shape[1]:
        return float(torch.einsum("tsk,sr->trk", weight, factor).square().sum())
    return float((weight.flatten(1) @ factor).square().sum())
