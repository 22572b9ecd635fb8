"""Agreement of scores with MOS, each figure with its bootstrap interval; two models compared.

Intervals are percentile bootstraps over pictures (Efron and Tibshirani 1993, section 13.3): they
say how much another draw of pictures would have changed the figure, not how other raters would.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dgiqa_stream.correlation import plcc, rmse, srcc
from distill.evaluation.logistic import Array, FittedCurve, LogisticKind, fit_curve

NUM_RESAMPLES = 1000
FEWEST_PICTURES = 5
"""Below this a correlation says nothing."""
KINDS: tuple[LogisticKind, ...] = ("logistic4", "logistic5")
_REFIT_EVALUATIONS = 100  # a resample's curve lies near that of the whole


@dataclass(frozen=True, slots=True)
class Estimate:
    """A figure and its 95 % interval; None where it is not defined, as for equal scores."""

    value: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True, slots=True)
class Agreement:
    """How scores agree with MOS on one set of pictures."""

    num_pictures: int
    srcc: Estimate
    krcc: Estimate
    plcc: Estimate
    """Of the scores as they are."""
    plcc_logistic4: Estimate
    plcc_logistic5: Estimate
    rmse_logistic4: Estimate
    """In units of the MOS that was given, as the next."""
    rmse_logistic5: Estimate
    curves: Mapping[LogisticKind, FittedCurve]
    """The fitted mapping of each kind; ``converged`` is false where a line took its place."""


def agreement(
    scores: Sequence[float] | Array,
    mos: Sequence[float] | Array,
    *,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> Agreement:
    """SRCC, KRCC, PLCC and RMSE after both logistics, with intervals; both (N,).

    Raises ``ValueError`` for fewer than five pictures, lists of two lengths, and NaN.
    """
    x, y = _checked(scores, mos)
    curves = {kind: fit_curve(x, y, kind) for kind in KINDS}
    figures = _figures(x, y, curves)
    drawn: dict[str, list[float]] = {name: [] for name in figures}
    for i in _resamples(len(x), num_resamples, seed):
        refitted = {k: _refitted(curves[k], x[i], y[i], k) for k in KINDS}
        for name, value in _figures(x[i], y[i], refitted).items():
            drawn[name].append(value)
    estimates = {name: _estimate(value, drawn[name]) for name, value in figures.items()}
    return Agreement(num_pictures=len(x), curves=curves, **estimates)


def estimate(
    figure: Callable[..., float],
    *columns: Sequence[float] | Array,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> Estimate:
    """Any figure of columns (N,) with its interval: all columns are drawn together."""
    given = [np.asarray(column, np.float64) for column in columns]
    draws = _resamples(len(given[0]), num_resamples, seed)
    return _estimate(figure(*given), [figure(*(c[i] for c in given)) for i in draws])


def by_group(
    scores: Sequence[float] | Array,
    mos: Sequence[float] | Array,
    groups: Sequence[str],
    *,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> dict[str, Agreement]:
    """The agreement within each group, such as a degradation, in alphabetical order.

    Groups of fewer than five pictures are left out.
    """
    x, y = _checked(scores, mos)
    if len(groups) != len(x):
        raise ValueError(f"{len(groups)} groups are given for {len(x)} pictures")
    members: dict[str, list[int]] = defaultdict(list)
    for i, group in enumerate(groups):
        members[group].append(i)
    return {
        group: agreement(x[i], y[i], num_resamples=num_resamples, seed=seed)
        for group, i in sorted(members.items())
        if len(i) >= FEWEST_PICTURES
    }


@dataclass(frozen=True, slots=True)
class Difference:
    """Two models on the same pictures."""

    srcc: Estimate
    """SRCC of the first less that of the second."""
    p_value: float
    """Two-sided: how often resamples contradict the sign; 1 for a model against itself."""


def compare(
    scores: Sequence[float] | Array,
    others: Sequence[float] | Array,
    mos: Sequence[float] | Array,
    *,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> Difference:
    """The paired bootstrap of an SRCC difference: both models see each draw of pictures.

    All three are (N,), in one order. The p value is 2 min(P(d <= 0), P(d >= 0)) over resamples,
    each counted with one more, so that it is never 0.
    """
    (x, y), (z, _) = _checked(scores, mos), _checked(others, mos)
    drawn = [srcc(x[i], y[i]) - srcc(z[i], y[i]) for i in _resamples(len(y), num_resamples, seed)]
    found = np.array([d for d in drawn if np.isfinite(d)])
    below, above = int((found <= 0).sum()), int((found >= 0).sum())
    p_value = min(1.0, 2 * (min(below, above) + 1) / (len(found) + 1))
    return Difference(_estimate(srcc(x, y) - srcc(z, y), drawn), p_value)


def _checked(scores: Sequence[float] | Array, mos: Sequence[float] | Array) -> tuple[Array, Array]:
    x, y = np.asarray(scores, np.float64), np.asarray(mos, np.float64)
    if x.ndim != 1 or x.shape != y.shape or len(x) < FEWEST_PICTURES:
        raise ValueError(
            f"agreement needs two lists of one length, {FEWEST_PICTURES} or more: got shapes "
            f"{x.shape} and {y.shape}"
        )
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise ValueError("agreement needs finite numbers: there is a NaN or an infinity")
    return x, y


def _resamples(number: int, num_resamples: int, seed: int) -> Iterator[np.ndarray]:
    rng = np.random.default_rng(seed)
    for _ in range(num_resamples):
        yield rng.integers(number, size=number)


def _refitted(curve: FittedCurve, x: Array, y: Array, kind: LogisticKind) -> FittedCurve:
    start = curve if curve.converged else None
    return fit_curve(x, y, kind, start=start, most_evaluations=_REFIT_EVALUATIONS)


def _figures(x: Array, y: Array, curves: Mapping[LogisticKind, FittedCurve]) -> dict[str, float]:
    from scipy.stats import kendalltau  # O(N log N); the runtime's own is O(N^2)

    return {
        "srcc": srcc(x, y),
        "krcc": float(kendalltau(x, y).statistic),
        "plcc": plcc(x, y),
        **{f"plcc_{kind}": curve.plcc(x, y) for kind, curve in curves.items()},
        **{f"rmse_{kind}": rmse(curve(x), y) for kind, curve in curves.items()},
    }


def _estimate(value: float, drawn: Sequence[float]) -> Estimate:
    finite = [d for d in drawn if np.isfinite(d)]  # a draw of one picture alone has no correlation
    if not np.isfinite(value) or not finite:
        return Estimate(value if np.isfinite(value) else None, None, None)
    low, high = np.percentile(finite, [2.5, 97.5])
    return Estimate(float(value), float(low), float(high))
