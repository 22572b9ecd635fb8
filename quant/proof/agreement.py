"""How far two models' scores lie apart on the same pictures, and whether that is too far."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import numpy as np
from numpy.typing import NDArray

from dgiqa_stream.correlation import krcc, srcc
from dgiqa_stream.errors import ConfigError

Scores = NDArray[np.float64]
"""(N,) on 0..100."""
FEWEST_PICTURES = 2


@dataclass(frozen=True, slots=True)
class Agreement:
    """Scores of one model against another's, in points of 0..100."""

    num_pictures: int
    mean_points: float
    """Mean of |a - b|."""
    p99_points: float
    """99th percentile of |a - b|; of fewer than 100 pictures it leans on the worst one."""
    max_points: float
    bias_points: float
    """Mean of b - a: whether the second scores higher throughout."""
    srcc: float | None
    """None where one model gives every picture one score."""
    krcc: float | None
    worst: str
    """The picture on which they differ most."""


class Tolerance(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Bounds that an agreement must keep, ends included; None asks nothing."""

    max_mean: float | None = 0.5
    max_p99: float | None = 2.0
    max_max: float | None = None
    min_srcc: float | None = None

    def __post_init__(self) -> None:
        """Refuse bounds that no number could exceed."""
        for name in self.__struct_fields__:
            bound = getattr(self, name)
            if bound is not None and not math.isfinite(bound):
                raise ConfigError(f"{name.replace('_', '-')} {bound} is no bound: give a number")

    def exceeded(self, found: Agreement) -> list[str]:
        """What is out of bounds, each as a few words with both numbers."""
        above = {
            "mean": (found.mean_points, self.max_mean),
            "p99": (found.p99_points, self.max_p99),
            "max": (found.max_points, self.max_max),
        }
        told = [
            f"{name} |delta| {value:.3f} is above {bound:g} points"
            for name, (value, bound) in above.items()
            if bound is not None and value > bound
        ]
        if self.min_srcc is None:
            return told
        if found.srcc is None:
            return [*told, "no SRCC: one model gives every picture one score"]
        if found.srcc < self.min_srcc:
            told.append(f"SRCC {found.srcc:.4f} is below {self.min_srcc:g}")
        return told


def agreement(a: Scores, b: Scores, names: Sequence[str]) -> Agreement:
    """The agreement of two models' scores (N,) of the pictures with these names.

    Raises ``ValueError`` for fewer than two pictures and lists of several lengths.
    """
    if not len(a) == len(b) == len(names) >= FEWEST_PICTURES:
        raise ValueError(
            f"an agreement needs {FEWEST_PICTURES} or more scores of each model: got {len(a)} and "
            f"{len(b)} for {len(names)} pictures"
        )
    apart = np.abs(b - a)
    return Agreement(
        num_pictures=len(names),
        mean_points=float(apart.mean()),
        p99_points=float(np.percentile(apart, 99)),
        max_points=float(apart.max()),
        bias_points=float((b - a).mean()),
        srcc=_finite(srcc(a, b)),
        krcc=_finite(krcc(a, b)),
        worst=names[int(apart.argmax())],
    )


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
