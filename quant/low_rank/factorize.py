"""The verb: a model's layers become thinner ones, in place."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from dgiqa_stream.errors import ModelError
from quant.low_rank.attention import SplitAttention
from quant.low_rank.batchnorm import reestimate_batchnorm_
from quant.low_rank.config import LowRankConfig
from quant.low_rank.factors import LayerFactors
from quant.low_rank.layers import Layer, Rank, cost_of, kind_of, pays, shape_of
from quant.low_rank.ranks import Option, choose, energy_rank, fixed_rank, rank_options
from quant.low_rank.report import LayerReport, LowRankReport
from quant.low_rank.selection import (
    Changes,
    evaluating,
    selected_layers,
    split_attentions_,
    undone_on_error,
)
from quant.low_rank.sensitivity import Score, latency_seconds, mean_square, scores_of, swapped
from quant.low_rank.statistics import Batch, LayerInputs, gather, positions_per_input


@dataclass(frozen=True, slots=True, eq=False)
class _Made:
    """A layer's factors, ready to be put in."""

    rank: Rank
    module: nn.Module
    weighted_error: float


def factorize_(
    model: nn.Module,
    config: LowRankConfig,
    batches: Iterable[Batch],
    *,
    score: Score | None = None,
) -> LowRankReport:
    """Factor a model's layers in place; returns what was done to each.

    Args:
        model: its plain ``nn.Linear`` and ``nn.Conv2d`` layers can be factored, and the
            projections of ``nn.MultiheadAttention``, as ``q``, ``k``, ``v`` and ``out``.
        config: which layers, in which norm, to which ranks.
        batches: calibration data, the arguments of the model for each batch.
        score: takes the model and a batch, gives the scores whose change counts; what the model
            returns unless given.

    Where anything is refused the model stays as it was. Raises ``ValueError`` without calibration
    data, :class:`ConfigError` for a budget that cannot be met and for a pattern without a match,
    :class:`ModelError` for a layer that cannot be factored and for values that are not finite.
    """
    given = [tuple(batch) for batch in batches]
    if not given or not all(len(batch) and len(batch[0]) for batch in given):
        raise ValueError("factorization needs calibration data: the set, or a batch, is empty")
    with evaluating(model), undone_on_error(model) as changes:
        try:
            return _Factorization(model, config, given, score or _returned, changes).run()
        except AttributeError as exc:
            if not isinstance(exc.obj, nn.Sequential | SplitAttention):
                raise
            raise ModelError(
                f"something in the model reads the weights of a layer itself ({exc}): exclude "
                "that layer"
            ) from exc


def _returned(model: nn.Module, *batch: Tensor) -> Tensor:
    told: Tensor = model(*batch)
    return told


class _Factorization:
    """One call of :func:`factorize_`: the model, what was measured on it, and its changes."""

    def __init__(
        self,
        model: nn.Module,
        config: LowRankConfig,
        batches: Sequence[Batch],
        score: Score,
        changes: Changes,
    ) -> None:
        self.model, self.config, self.batches = model, config, batches
        self.score, self.changes = score, changes
        self.reference = scores_of(model, batches, score)
        self.num_parameters = _num_parameters(model)
        self.attentions = split_attentions_(model, changes)
        self.layers = selected_layers(model, config)
        self.positions = positions_per_input(model, batches[0])
        self.macs = {name: self._macs(name, m) for name, m in _all_layers(model).items()}
        worth = {n: layer for n, layer in self.layers.items() if self._could_pay(n, layer)}
        self.inputs = gather(model, worth, batches, largest_side=config.largest_covariance_side)

    def run(self) -> LowRankReport:
        """Find ranks, put the factors in, give BatchNorms new statistics."""
        made = self._searched() if self.config.choice == "sensitivity" else self._ruled()
        for name, part in made.items():
            self.changes.replace(name, part.module)
        for name in self.attentions:
            if not any(layer.rpartition(".")[0] == name for layer in made):
                self.changes.undo(name)
        num_batchnorms = 0
        if made and self.config.reestimate_batchnorm:
            num_batchnorms = reestimate_batchnorm_(self.model, self.batches)
        change = mean_square(scores_of(self.model, self.batches, self.score), self.reference)
        layers = tuple(self._told(name, layer, made) for name, layer in self.layers.items())
        saved = sum(told.macs_before - told.macs_after for told in layers)
        macs = round(sum(self.macs.values()))
        return LowRankReport(
            config=self.config,
            layers=layers,
            num_parameters_before=self.num_parameters,
            num_parameters_after=_num_parameters(self.model),
            macs_before=macs,
            macs_after=macs - saved,
            score_change_rms=change**0.5,
            num_batchnorms=num_batchnorms,
        )

    def _ruled(self) -> dict[str, _Made]:
        """By energy, or one rank for all."""
        made = {}
        for name, inputs in self.inputs.items():
            factors = LayerFactors(self.layers[name], inputs, self.config)
            if self.config.choice == "fixed":
                rank = fixed_rank(factors.layer, self.config)
            else:
                rank = energy_rank(factors.layer, factors.energies(), self.config)
            if rank is not None:
                made[name] = _Made(rank, factors.module(rank), factors.weighted_error(rank))
        return made

    def _searched(self) -> dict[str, _Made]:
        """By what each layer alone does to the score, under the budget."""
        options: dict[str, list[Option]] = {}
        made: dict[tuple[str, Rank], _Made] = {}
        for name, inputs in self.inputs.items():
            factors = LayerFactors(self.layers[name], inputs, self.config)
            options[name] = [Option(None, self._cost(name, self.layers[name], None))]
            for rank in rank_options(factors.layer, self.config):
                part = _Made(rank, factors.module(rank), factors.weighted_error(rank))
                with swapped(self.model, name, part.module):
                    found = scores_of(self.model, self.batches, self.score)
                damage = mean_square(found, self.reference)
                cost = self._cost(name, part.module, rank)
                options[name].append(Option(rank, cost, damage))
                made[name, rank] = part
        chosen = choose(options, self._total(), self.config)
        return {name: made[name, rank] for name, rank in chosen.items()}

    def _cost(self, name: str, module: nn.Module, rank: Rank | None) -> float:
        """Of one layer, whole or as the factors ``module``, in the budget's unit."""
        budget, _ = self.config.budget
        if budget == "max_parameters":
            return cost_of(self.layers[name], rank).num_parameters
        if budget == "max_macs":
            return cost_of(self.layers[name], rank).macs_per_position * self.positions[name]
        inputs: LayerInputs = self.inputs[name]
        calls = inputs.num_positions / inputs.example_positions / len(self.batches)
        return calls * latency_seconds(lambda: module(inputs.example))

    def _total(self) -> float:
        budget, _ = self.config.budget
        if budget == "max_parameters":
            return self.num_parameters
        if budget == "max_macs":
            return sum(self.macs.values())
        return latency_seconds(lambda: self.model(*self.batches[0]))

    def _macs(self, name: str, layer: Layer) -> float:
        return cost_of(layer).macs_per_position * self.positions.get(name, 0.0)

    def _told(self, name: str, layer: Layer, made: Mapping[str, _Made]) -> LayerReport:
        kind = kind_of(layer)
        assert kind is not None
        part = made.get(name)
        whole = cost_of(layer)
        after = cost_of(layer, part.rank) if part else whole
        positions = self.positions.get(name, 0.0)
        return LayerReport(
            name=name,
            kind=kind,
            rank=part.rank if part else None,
            num_parameters_before=whole.num_parameters,
            num_parameters_after=after.num_parameters,
            macs_before=round(whole.macs_per_position * positions),
            macs_after=round(after.macs_per_position * positions),
            weighted_error=part.weighted_error if part else 0.0,
            reason="" if part else self._reason(name, layer),
        )

    def _could_pay(self, name: str, layer: Layer) -> bool:
        """Whether a layer runs, and its smallest rank would save enough."""
        least = tuple(1 for _ in shape_of(layer).largest_rank)
        return name in self.positions and pays(layer, least, self.config.smallest_saving)

    def _reason(self, name: str, layer: Layer) -> str:
        """Why a layer was left alone."""
        if name not in self.positions:
            return "not reached by calibration data"
        if self.config.choice == "sensitivity" and rank_options(layer, self.config):
            return "the budget is met without it"
        return "does not pay at its size"


def _all_layers(model: nn.Module) -> dict[str, Layer]:
    """Everything that multiplies, by name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}


def _num_parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())
