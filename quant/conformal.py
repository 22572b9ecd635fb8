"""From a spread to an interval that keeps its promise on pictures like those it was measured on."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from dgiqa_stream.manifest import HalfWidthMapping

_SMALLEST_SPREAD = 1e-6

Array = NDArray[np.float64]


def fewest_for(coverage: float) -> int:
    """How many pictures :func:`points_per_spread` needs."""
    return math.ceil(round(coverage / (1 - coverage), 9))


def points_per_spread(errors: Array, spread: Array, *, coverage: float) -> float:
    """Half an interval's width per spread so that ``coverage`` of new pictures lie inside.

    Split conformal prediction (Lei et al., JASA 2018, section 2.2 and 5.2): of the ratios of
    |error| (points of 0..100) to spread, both (N,), the one of rank ceil((N + 1) coverage).

    Raises ``ValueError`` where N is too small for that rank.
    """
    num = len(errors)
    if num < fewest_for(coverage):
        raise ValueError(
            f"{num} pictures are too few for intervals that hold {coverage:.0%} of ratings: "
            f"{fewest_for(coverage)} or more with a rating are needed"
        )
    rank = math.ceil(round((num + 1) * coverage, 9))
    ratios = np.abs(errors) / np.maximum(spread, _SMALLEST_SPREAD)
    return float(np.sort(ratios)[rank - 1])


def half_widths(scale: float) -> HalfWidthMapping:
    """``scale`` points per spread, up to 100 points, as a manifest's mapping.

    Raises ``ValueError`` for a scale that is not above 0: no interval has no width.
    """
    if not scale > 0:
        raise ValueError(f"{scale} points per spread give intervals no width: errors are all 0")
    if scale > 100:
        return HalfWidthMapping([0.0, 100.0 / scale], [0.0, 100.0])
    return HalfWidthMapping([0.0, 1.0], [0.0, scale])


def threshold_for(unfamiliar: Array, *, share_flagged: float) -> float:
    """The least of the numbers (N,) on 0..1 above which no more than that share of them lie."""
    num_above = math.floor(round(share_flagged * len(unfamiliar), 9))
    return float(np.sort(unfamiliar)[len(unfamiliar) - 1 - num_above])


def cross_intervals(
    scores: Array, errors: Array, spread: Array, *, coverage: float, seed: int
) -> Array:
    """Intervals (N, 2) of each picture by the scale of the half it is not in, on 0..100.

    What they cover says what intervals do on pictures that took no part in measuring their scale.
    """
    order = np.random.default_rng(seed).permutation(len(scores))
    halves = order[::2], order[1::2]
    found = np.empty((len(scores), 2))
    for own, other in (halves, halves[::-1]):
        half = half_widths(points_per_spread(errors[other], spread[other], coverage=coverage))
        widths = np.array([half(float(s)) for s in spread[own]])
        found[own, 0] = np.maximum(scores[own] - widths, 0)
        found[own, 1] = np.minimum(scores[own] + widths, 100)
    return found
