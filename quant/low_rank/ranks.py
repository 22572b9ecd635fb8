"""Which rank each layer gets: by energy, one for all, or greedily under a budget."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from dgiqa_stream.errors import ConfigError
from quant.low_rank.config import LowRankConfig
from quant.low_rank.layers import Layer, Rank, pays, shape_of


@dataclass(frozen=True, slots=True)
class Option:
    """One rank that a layer can have, and what it would mean; rank None is the layer as it is."""

    rank: Rank | None
    cost: float
    """In the budget's unit."""
    damage: float = 0.0
    """Mean square of the change of the score with this layer alone factored."""


def fixed_rank(layer: Layer, config: LowRankConfig) -> Rank | None:
    """``config.rank`` in every place, or what the layer has; None where it does not pay."""
    rank = tuple(min(config.rank, most) for most in shape_of(layer).largest_rank)
    return rank if pays(layer, rank, config.smallest_saving) else None


def energy_rank(
    layer: Layer, energies: tuple[list[Tensor], ...], config: LowRankConfig
) -> Rank | None:
    """The least rank whose share of each group's energy is ``config.energy``, rounded up."""
    largest = shape_of(layer).largest_rank
    step = _step(layer, config)
    rank = tuple(
        min(most, step * math.ceil(max(_needed(e, config.energy) for e in by_group) / step))
        for by_group, most in zip(energies, largest, strict=True)
    )
    return rank if pays(layer, rank, config.smallest_saving) else None


def rank_options(layer: Layer, config: LowRankConfig) -> list[Rank]:
    """Ranks to try, largest first: shares of what a layer can have that pay, rounded."""
    largest, step = shape_of(layer).largest_rank, _step(layer, config)
    found = {
        tuple(min(most, max(step, step * round(share * most / step))) for most in largest)
        for share in config.rank_shares
    }
    return sorted((r for r in found if pays(layer, r, config.smallest_saving)), reverse=True)


def choose(
    options: Mapping[str, Sequence[Option]], total: float, config: LowRankConfig
) -> dict[str, Rank]:
    """Greedily lower ranks until the budget holds: always the least damage for what is saved.

    Args:
        options: of each layer, the first as it is.
        total: what everything costs, unfactored.
        config: with the budget.

    Damages of layers are added, as if errors were independent. Raises :class:`ConfigError` where
    all layers at their cheapest still cost too much.
    """
    name, budget = config.budget
    least = total - sum(o[0].cost - min(x.cost for x in o) for o in options.values())
    if least > budget:
        raise ConfigError(
            f"{name} {budget:.6g} cannot be met: with all {len(options)} layers at their lowest "
            f"rank {least:.6g} is left of {total:.6g}; raise it, add a smaller rank_shares, or "
            "include more layers"
        )
    chosen = {layer: found[0] for layer, found in options.items()}
    while total > budget:
        layer, option = min(
            ((n, o) for n, found in options.items() for o in found if o.cost < chosen[n].cost),
            key=lambda move: _price(chosen[move[0]], move[1]),
        )
        total -= chosen[layer].cost - option.cost
        chosen[layer] = option
    return {layer: o.rank for layer, o in chosen.items() if o.rank is not None}


def _price(now: Option, then: Option) -> tuple[float, float]:
    """Damage for each unit that a move saves; of equal prices the larger saving comes first."""
    saved = now.cost - then.cost
    return (then.damage - now.damage) / saved, -saved


def _needed(energies: Tensor, share: float) -> int:
    """How many of the energies, largest first, hold a share of them; at least 1."""
    total = float(energies.sum())
    kept = energies.cumsum(0) >= share * total * (1 - 1e-12)
    return int((~kept).sum()) + 1 if total else 1


def _step(layer: Layer, config: LowRankConfig) -> int:
    """What the rank in one group is rounded to, so that all groups together are a multiple."""
    return config.multiple // math.gcd(config.multiple, shape_of(layer).groups)
