"""What a factorization did, as plain values that go into an artefact's history."""

from __future__ import annotations

import msgspec

from quant.low_rank.config import LowRankConfig
from quant.low_rank.layers import Kind, Rank


class LayerReport(msgspec.Struct, frozen=True):
    """One layer that could have been factored."""

    name: str
    kind: Kind
    rank: Rank | None
    """None where it was left alone; ``reason`` says why."""
    num_parameters_before: int
    num_parameters_after: int
    macs_before: int
    """Multiply-adds for one input."""
    macs_after: int
    weighted_error: float = 0.0
    """RMS error of its output on calibration data as a share of the output, biases aside."""
    reason: str = ""


class LowRankReport(msgspec.Struct, frozen=True):
    """A whole model; what is per input is multiply-adds of convolutions and linear layers."""

    config: LowRankConfig
    layers: tuple[LayerReport, ...]
    num_parameters_before: int
    num_parameters_after: int
    macs_before: int
    macs_after: int
    score_change_rms: float
    """Root mean square of the change of the scores of the calibration data, nothing tuned yet."""
    num_batchnorms: int = 0
    """How many BatchNorms got new statistics."""

    @property
    def ranks(self) -> dict[str, Rank]:
        """Of the layers that were factored, by name."""
        return {layer.name: layer.rank for layer in self.layers if layer.rank is not None}

    def __str__(self) -> str:
        """One line for people."""
        return (
            f"{len(self.ranks)} of {len(self.layers)} layers factored: "
            f"{self.num_parameters_before} to {self.num_parameters_after} parameters, "
            f"{self.macs_before / 1e6:.1f} to {self.macs_after / 1e6:.1f} million multiply-adds; "
            f"scores move by {self.score_change_rms:.4f} (RMS)"
        )
