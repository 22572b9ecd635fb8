"""What fixed ranks come to, without data and without weights: shapes alone, on any device."""

from __future__ import annotations

from torch import nn

from quant.low_rank.config import LowRankConfig
from quant.low_rank.layers import Rank, cost_of
from quant.low_rank.ranks import fixed_rank
from quant.low_rank.selection import Changes, selected_layers, split_attentions_


def planned_ranks(model: nn.Module, config: LowRankConfig) -> dict[str, Rank]:
    """The layers that ``factorize_`` would factor and their ranks; the model stays as it is.

    It may lie on the meta device. Raises ``ValueError`` unless ``config.choice`` is ``fixed``,
    and as ``factorize_`` for names that match nothing.
    """
    return {name: rank for name, rank, _ in _plan(model, config)}


def planned_size(model: nn.Module, config: LowRankConfig) -> tuple[int, int]:
    """Parameters of the whole model before and after; as :func:`planned_ranks`."""
    before = sum(p.numel() for p in model.parameters())
    return before, before - sum(saved for _, _, saved in _plan(model, config))


def _plan(model: nn.Module, config: LowRankConfig) -> list[tuple[str, Rank, int]]:
    """Name, rank and saved parameters of each layer."""
    if config.choice != "fixed":
        raise ValueError(
            f"choice is {config.choice!r}, and only fixed ranks are known without data: factorize_"
        )
    changes = Changes(model)
    split_attentions_(model, changes)
    try:
        found = []
        for name, layer in selected_layers(model, config).items():
            rank = fixed_rank(layer, config)
            if rank is not None:
                saved = cost_of(layer).num_parameters - cost_of(layer, rank).num_parameters
                found.append((name, rank, saved))
        return found
    finally:
        changes.undo()
