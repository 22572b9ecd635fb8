"""Choosing among compressed candidates under a budget, or saying which bound cannot be met."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Annotated, Any, Literal

import msgspec

from dgiqa_stream.errors import ConfigError
from quant.calibration_methods import METHODS

Count = Annotated[int, msgspec.Meta(ge=1)]
Whole = Annotated[int, msgspec.Meta(ge=0)]
Prefer = Literal["ms", "mb", "drop"]


class Budget(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a user can afford; None asks nothing."""

    max_ms: float | None = None
    """Of one picture, inference alone."""
    max_mb: float | None = None
    """Of the file, in millions of bytes."""
    max_drop: float | None = None
    """Of SRCC with MOS below the float model's."""

    def __post_init__(self) -> None:
        """Refuse what no model can keep."""
        for name in ("max_ms", "max_mb", "max_drop"):
            bound = getattr(self, name)
            smallest = 0.0 if name == "max_drop" else 1e-6
            if bound is not None and not (math.isfinite(bound) and bound >= smallest):
                wanted = "0 or more" if name == "max_drop" else "a number above 0"
                raise ConfigError(
                    f"--{name.replace('_', '-')} {bound:g} is no budget: give {wanted}"
                )

    def bounds(self) -> dict[str, float]:
        """Those that are set, by the figure's name."""
        found = {"ms": self.max_ms, "mb": self.max_mb, "drop": self.max_drop}
        return {name: bound for name, bound in found.items() if bound is not None}


class SearchSpace(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The grid that is walked and how its points are measured. Saved with the search."""

    methods: tuple[str, ...] = METHODS
    """Of calibration; ``trained`` takes the ranges of a ``qat`` run."""
    num_float_layers: tuple[Whole, ...] = (0, 1, 2, 4, 8)
    """How many of the most sensitive layers are left in float."""
    threads: Count = 1
    num_rounds: Count = 9
    """Of the timing, interleaved with the float model."""
    num_rated: Count = 300
    """Rated validation pictures that say how far SRCC drops."""
    num_sensitivity_pictures: Count = 16
    version: int = 1


@dataclass(frozen=True, slots=True)
class Candidate:
    """One point of the grid."""

    variant: str
    """The float model it is made of."""
    precision: Literal["fp32", "int8"]
    method: str = ""
    num_float_layers: int = 0

    @property
    def key(self) -> str:
        """Its name, and its file's."""
        if self.precision == "fp32":
            return f"{self.variant}-fp32"
        return f"{self.variant}-int8-{self.method}-float{self.num_float_layers}"


class Measured(msgspec.Struct, frozen=True):
    """A candidate and what it costs and loses."""

    key: str
    precision: str
    method: str
    float_nodes: list[str]
    """Nodes left in float."""
    ms: float
    mb: float
    drop: float
    """Of SRCC with MOS; below 0 where it agrees better than the float model."""
    times_faster: float
    """Than the float model, interleaved: to be trusted more than ``ms`` on a busy machine."""
    sha256: str


def grid(variants: Sequence[str], space: SearchSpace) -> list[Candidate]:
    """Every point, float models first, then what leaves the fewest layers in float."""
    found = [Candidate(variant, "fp32") for variant in variants]
    for number in sorted(set(space.num_float_layers)):
        for variant in variants:
            found += [Candidate(variant, "int8", m, number) for m in space.methods]
    return found


def best(measured: Sequence[Measured], budget: Budget, *, prefer: Prefer = "ms") -> Measured | None:
    """Of those within the budget the quickest, smallest or most faithful one."""
    within = [m for m in measured if not _exceeded(m, budget)]
    order = [prefer, *(name for name in ("ms", "drop", "mb") if name != prefer)]
    return min(within, key=lambda m: [getattr(m, name) for name in order], default=None)


def _exceeded(one: Measured, budget: Budget) -> set[str]:
    return {name for name, bound in budget.bounds().items() if getattr(one, name) > bound}


def unmet(measured: Sequence[Measured], budget: Budget) -> str:
    """One sentence: which bound no candidate keeps, or keeps together with the others."""
    bounds = budget.bounds()
    alone = [name for name in bounds if all(name in _exceeded(m, budget) for m in measured)]
    if alone:
        each = [f"{_option(name, bounds)}: {_nearest(name, measured)}" for name in alone]
        return f"no candidate of {len(measured)} keeps {'; nor '.join(each)}"
    near: list[tuple[float, str]] = []
    for name in bounds:
        rest = [m for m in measured if _exceeded(m, budget) == {name}]
        if rest:
            others = " and ".join(_option(o, bounds) for o in bounds if o != name)
            told = f"where {others} hold, {_option(name, bounds)} does not: {_nearest(name, rest)}"
            excess = min(getattr(m, name) for m in rest) / max(bounds[name], 1e-6)
            near.append((excess, told))
    if near:
        return f"no candidate of {len(measured)} keeps all bounds: {min(near)[1]}"
    named = ", ".join(_option(name, bounds) for name in bounds)
    return f"no candidate of {len(measured)} keeps more than one of {named}"


def _option(name: str, bounds: Mapping[str, float]) -> str:
    return f"--max-{name} {bounds[name]:g}"


_SUPERLATIVES: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "ms": ("the quickest, {key}, takes {value:.3g} ms", "ms"),
        "mb": ("the smallest, {key}, has {value:.3g} MB", "mb"),
        "drop": ("the most faithful, {key}, drops {value:.4f}", "drop"),
    }
)


def _nearest(name: str, measured: Sequence[Measured]) -> str:
    text, field = _SUPERLATIVES[name]
    nearest = min(measured, key=lambda m: getattr(m, field))
    return text.format(key=nearest.key, value=getattr(nearest, field))


def search_page(state: Mapping[str, Any], chosen: str | None) -> str:
    """Markdown: every candidate, and the layers by what their rounding costs."""
    rows = sorted(state["measured"].values(), key=lambda m: m["ms"])
    lines = ["| candidate | ms | × float | MB | drop of SRCC | layers in float |", "|" + 6 * "---|"]
    for m in rows:
        name = f"**{m['key']}**" if m["key"] == chosen else m["key"]
        left = "all" if m["precision"] == "fp32" else ", ".join(m["float_nodes"]) or "none"
        figures = f"{m['ms']:.2f} | {m['times_faster']:.2f} | {m['mb']:.2f} | {m['drop']:+.4f}"
        lines.append(f"| {name} | {figures} | {left} |")
    for variant, layers in state["sensitivity"].items():
        lines += ["", f"Layers of {variant} by what their rounding alone does to the score:", ""]
        lines += ["| layer | nodes | mean delta, points |", "|---|---|---|"]
        lines += [
            f"| {x['layer']} | {', '.join(x['nodes'])} | {x['mean_points']:.3f} |" for x in layers
        ]
    return "\n".join(lines) + "\n"
