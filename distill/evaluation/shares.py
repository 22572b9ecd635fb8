"""Shares with their 95 % intervals, also where the trials of one content hang together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from distill.evaluation.agreement import NUM_RESAMPLES

_Z = 1.959963984540054  # the normal quantile of 0.975


@dataclass(frozen=True, slots=True)
class Share:
    """How many of how many, and the 95 % interval of the share, 0..1."""

    num_true: int
    num: int
    value: float
    low: float
    high: float


def wilson(num_true: int, num: int) -> Share:
    """A share of independent trials with its score interval (Wilson 1927; Newcombe 1998, method 3).

    Raises ``ValueError`` where there is no trial, or more came true than there were.
    """
    if not 0 <= num_true <= num or num == 0:
        raise ValueError(f"{num_true} of {num} is no share: give one trial or more")
    share, z2 = num_true / num, _Z * _Z
    centre = (share + z2 / (2 * num)) / (1 + z2 / num)
    reach = _Z / (1 + z2 / num) * math.sqrt(share * (1 - share) / num + z2 / (4 * num * num))
    low, high = max(0.0, centre - reach), min(1.0, centre + reach)
    return Share(num_true, num, share, min(low, share), max(high, share))


def share_over_contents(
    outcomes: Sequence[Sequence[bool]], *, num_resamples: int = NUM_RESAMPLES, seed: int = 0
) -> Share:
    """A share of trials, those of one content together: ``outcomes[i]`` are of content i.

    The interval is that of a bootstrap that draws contents (Efron and Tibshirani 1993, section
    8.6), or Wilson's where that one reaches further: where every trial came true no draw differs,
    and the bootstrap alone would claim certainty. Raises ``ValueError`` as :func:`wilson`.
    """
    trues = np.array([sum(map(bool, of_content)) for of_content in outcomes])
    sizes = np.array([len(of_content) for of_content in outcomes])
    alone = wilson(int(trues.sum()), int(sizes.sum()))
    rng = np.random.default_rng(seed)
    draws = rng.integers(len(sizes), size=(num_resamples, len(sizes)))
    low, high = np.percentile(trues[draws].sum(1) / sizes[draws].sum(1), [2.5, 97.5])
    return Share(alone.num_true, alone.num, alone.value, min(alone.low, low), max(alone.high, high))
