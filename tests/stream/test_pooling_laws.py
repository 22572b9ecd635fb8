"""Laws that poolers keep whatever they are given: bounds, constants, scale, order, time."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dgiqa_stream.config import PoolingSettings
from dgiqa_stream.pooling import POOLERS, Holds

lawful = settings(deadline=None, max_examples=50)
TICK = 1.0 / 64  # every time here is a whole number of ticks, so that no sum is rounded
BEGIN = 7.25
SETTINGS = PoolingSettings(hysteresis_seconds=1.25, primacy_seconds=4.0, recency_seconds=3.0)
ORDER_FREE = (
    "mean", "median", "min", "max", "stdev", "harmonic_mean", "p1", "p5", "p10", "low1", "low5",
    "minkowski", "vqpool",
)  # fmt: skip
# What a x + b does to the value: the same, where nothing else is said.
SCALE_ONLY = ("vqpool",)  # a x: the weight of the good group is a ratio
NEITHER = ("harmonic_mean", "minkowski", "p1203_style")  # they bend the scale

Held = list[tuple[float, float]]
scores = st.floats(0.0, 100.0)
holds = st.lists(st.tuples(st.integers(1, 160), scores), min_size=1, max_size=40)


def as_holds(held: Sequence[tuple[float, float]]) -> Holds:
    """Ticks and scores, one after another."""
    edges = BEGIN + TICK * np.cumsum([0, *(ticks for ticks, _ in held)])
    return Holds(edges[:-1], edges[1:], np.array([q for _, q in held]))


def value(name: str, *parts: Holds, settings: PoolingSettings = SETTINGS) -> float:
    """What a pooler makes of stretches of holds."""
    pooler = POOLERS[name](settings)
    for part in parts:
        pooler.add(part)
    pooled = pooler.value()
    assert pooled is not None
    return pooled


@lawful
@given(held=holds, at=st.lists(st.integers(0, 40), max_size=4))
def test_how_time_is_cut_into_calls_changes_nothing(held: Held, at: list[int]):
    """Holds given at once or in stretches pool to the same value."""
    for name in sorted(POOLERS):
        whole = as_holds(held)
        cuts = sorted({0, *(a for a in at if a < len(whole)), len(whole)})
        parts = [whole[a:b] for a, b in itertools.pairwise(cuts)]
        assert value(name, *parts) == pytest.approx(value(name, whole), abs=1e-6)


@lawful
@given(held=holds, which=st.integers(0, 39))
def test_splitting_a_hold_changes_nothing(held: Held, which: int):
    """A score held twice for half the time is the same score held once."""
    for name in sorted(POOLERS):
        which %= len(held)
        ticks, q = held[which]
        split = [*held[:which], (ticks / 2, q), (ticks / 2, q), *held[which + 1 :]]
        assert value(name, as_holds(split)) == pytest.approx(value(name, as_holds(held)), abs=1e-6)


@lawful
@given(held=holds)
def test_a_pooled_score_is_among_the_scores(held: Held):
    """No pooler but stdev leaves the range of what it pooled."""
    for name in sorted(set(POOLERS) - {"stdev"}):
        of_all = [q for _, q in held]
        assert min(of_all) - 1e-9 <= value(name, as_holds(held)) <= max(of_all) + 1e-9


@lawful
@given(held=holds, q=scores)
def test_a_constant_stays_what_it_is(held: Held, q: float):
    """A constant score pools to itself, and its stdev to 0."""
    for name in sorted(POOLERS):
        constant = as_holds([(ticks, q) for ticks, _ in held])
        assert value(name, constant) == pytest.approx(0.0 if name == "stdev" else q, abs=1e-6)


@lawful
@given(held=holds, data=st.data())
def test_order_does_not_matter_to_order_free_poolers(held: Held, data: st.DataObject):
    """Mean, extremes, spread and percentiles do not ask when a score came."""
    for name in ORDER_FREE:
        shuffled = data.draw(st.permutations(held))
        assert value(name, as_holds(shuffled)) == pytest.approx(
            value(name, as_holds(held)), abs=1e-6
        )


@pytest.mark.parametrize("name", sorted(set(POOLERS) - set(ORDER_FREE)))
def test_memory_makes_order_matter(name: str):
    """A dip counts differently for the poolers with memory when it comes first or last."""
    dip = [(64, 20.0), (640, 80.0)]
    assert abs(value(name, as_holds(dip)) - value(name, as_holds(dip[::-1]))) > 0.5


@lawful
@given(held=holds, scale=st.floats(0.1, 1.0), share=st.floats(0.0, 1.0))
def test_another_scale_is_the_same_value_on_that_scale(held: Held, scale: float, share: float):
    """Pooling a x + b gives a pool(x) + b; a times the spread, and b = 0 for what uses ratios."""
    for name in sorted(set(POOLERS) - set(NEITHER)):
        if name == "vqpool" and not is_cut_clear([q for _, q in held], [t for t, _ in held]):
            continue
        shift = 0.0 if name in SCALE_ONLY else share * (100.0 - 100.0 * scale)
        moved = [(ticks, scale * q + shift) for ticks, q in held]
        expected = scale * value(name, as_holds(held)) + (0.0 if name == "stdev" else shift)
        assert value(name, as_holds(moved)) == pytest.approx(expected, abs=1e-6)


def is_cut_clear(q: Sequence[float], ticks: Sequence[int]) -> bool:
    """Whether rounding cannot choose between two cuts into a low and a high group."""
    order = np.argsort(q)
    sorted_q, w = np.array(q)[order], np.array(ticks, float)[order]
    low = w.cumsum()[:-1]
    away = (w * (sorted_q - np.average(sorted_q, weights=w))).cumsum()[:-1]
    between = np.sort(away**2 / (low * (w.sum() - low)))
    return len(between) < 2 or between[-2] < between[-1] * (1 - 1e-6)


@lawful
@given(held=holds, scale=st.floats(0.1, 1.0))
def test_minkowski_scales_with_the_impairment(held: Held, scale: float):
    """An impairment 100 - q times a gives a times the pooled impairment."""
    milder = [(ticks, 100.0 - scale * (100.0 - q)) for ticks, q in held]
    pooled = 100.0 - value("minkowski", as_holds(held))
    assert 100.0 - value("minkowski", as_holds(milder)) == pytest.approx(scale * pooled, abs=1e-6)


@lawful
@given(held=holds)
def test_twice_the_time_is_two_frames(held: Held):
    """Each frame held twice as long is each frame shown twice, one after the other."""
    for name in sorted(POOLERS):
        longer = [(2 * ticks, q) for ticks, q in held]
        twice = [hold for hold in held for _ in range(2)]
        assert value(name, as_holds(longer)) == pytest.approx(
            value(name, as_holds(twice)), abs=1e-6
        )


@lawful
@given(held=holds)
def test_the_worst_come_in_their_order(held: Held):
    """min <= low1 <= p1 <= p5 <= p10 <= median <= max, and low1 <= low5 <= the mean."""
    names = ("min", "low1", "p1", "p5", "p10", "median", "max")
    rising = [value(n, as_holds(held)) for n in names]
    assert all(a <= b + 1e-9 for a, b in itertools.pairwise(rising))
    lows = [value(n, as_holds(held)) for n in ("low1", "low5", "mean")]
    assert all(a <= b + 1e-9 for a, b in itertools.pairwise(lows))


@lawful
@given(held=holds, exponents=st.tuples(st.floats(1.0, 32.0), st.floats(1.0, 32.0)))
def test_a_larger_exponent_listens_more_to_the_worst(held: Held, exponents: tuple[float, float]):
    """Minkowski falls as p rises, from the mean at p = 1, and stays above the lowest score."""
    one, two = sorted(exponents)
    of = [PoolingSettings(minkowski_p=p) for p in (1.0, one, two)]
    pooled = [value("minkowski", as_holds(held), settings=s) for s in of]
    assert pooled[0] == pytest.approx(value("mean", as_holds(held)), abs=1e-6)
    assert pooled[0] + 1e-9 >= pooled[1] >= pooled[2] - 1e-9 >= value("min", as_holds(held)) - 2e-9


@lawful
@given(held=holds)
def test_settings_at_their_ends_are_simpler_poolers(held: Held):
    """vqpool with exponent 0 is the mean; hysteresis without memory's minimum keeps its order."""
    whole = as_holds(held)
    even = PoolingSettings(vqpool_exponent=0.0)
    assert value("vqpool", whole, settings=even) == pytest.approx(value("mean", whole), abs=1e-6)
    forms = ("hysteresis", "hysteresis_exact")
    for name in forms:
        worst, soft = (
            value(name, whole, settings=PoolingSettings(hysteresis_alpha=a)) for a in (0.0, 1.0)
        )
        between = value(name, whole, settings=PoolingSettings(hysteresis_alpha=0.25))
        assert between == pytest.approx(0.75 * worst + 0.25 * soft, abs=1e-6)


@lawful
@given(held=holds)
def test_primacy_is_recency_seen_from_the_other_end(held: Held):
    """With one time constant, primacy of a session is recency of the session played backwards."""
    both = PoolingSettings(primacy_seconds=2.0, recency_seconds=2.0)
    first = value("primacy", as_holds(held), settings=both)
    assert value("recency", as_holds(held[::-1]), settings=both) == pytest.approx(first, abs=1e-6)


@pytest.mark.parametrize("name", ["primacy", "recency"])
def test_a_very_slow_memory_is_the_mean(name: str):
    """With a time constant of a million times the session, every moment counts alike."""
    slow = PoolingSettings(primacy_seconds=1e7, recency_seconds=1e7)
    held = as_holds([(64, 20.0), (640, 80.0), (9, 3.0)])
    assert value(name, held, settings=slow) == pytest.approx(value("mean", held), abs=1e-4)
