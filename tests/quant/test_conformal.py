"""Intervals that keep their promise, and a threshold that flags no more than asked for."""

from __future__ import annotations

import numpy as np
import pytest

from quant.conformal import (
    cross_intervals,
    fewest_for,
    half_widths,
    points_per_spread,
    threshold_for,
)


@pytest.mark.parametrize(
    ("num", "coverage", "wanted"), [(9, 0.9, 9.0), (19, 0.9, 18.0), (99, 0.9, 90.0), (7, 0.5, 4.0)]
)
def test_the_scale_is_the_ratio_of_the_conformal_rank(num, coverage, wanted):
    """Of the ratios 1..N, shuffled, it is number ceil((N + 1) coverage), whatever the spreads."""
    rng = np.random.default_rng(num)
    ratios = rng.permutation(np.arange(1.0, num + 1))
    spread = rng.uniform(0.1, 0.9, num)
    errors = ratios * spread * rng.choice([-1, 1], num)
    assert points_per_spread(errors, spread, coverage=coverage) == pytest.approx(wanted)


@pytest.mark.parametrize(("coverage", "fewest"), [(0.9, 9), (0.5, 1), (0.99, 99)])
def test_too_few_pictures_promise_nothing(coverage, fewest):
    """One picture fewer than the rank asks for is refused with the number needed, which will do."""
    some = np.ones(fewest)
    assert fewest_for(coverage) == fewest
    assert points_per_spread(some, some, coverage=coverage) == 1
    with pytest.raises(ValueError, match=f"{fewest} or more"):
        points_per_spread(some[1:], some[1:], coverage=coverage)


def test_new_ratings_lie_inside_as_often_as_promised():
    """Over 300 draws of 100 pictures, a new one lies inside in 90 %: within 2 points, the standard
    error of 300 times 200 trials that share their scale being 0.2.
    """
    rng = np.random.default_rng(5)
    inside = []
    for _ in range(300):
        spread = rng.uniform(0.02, 0.3, 300)
        errors = 100 * spread * rng.laplace(size=300)
        scale = points_per_spread(errors[:100], spread[:100], coverage=0.9)
        inside.append(np.mean(np.abs(errors[100:]) <= scale * spread[100:]))
    assert np.mean(inside) == pytest.approx(0.9, abs=0.02)


@pytest.mark.parametrize(("scale", "at_half"), [(30.0, 15.0), (150.0, 75.0), (400.0, 100.0)])
def test_half_widths_are_proportional_up_to_the_scales_end(scale, at_half):
    """Half an interval is ``scale * spread``, and 100 points where that would be more."""
    mapping = half_widths(scale)
    assert mapping(0.0) == 0
    assert mapping(0.5) == pytest.approx(at_half)
    assert mapping(1.0) == pytest.approx(min(scale, 100))


def test_a_scale_of_nothing_is_refused():
    """Errors that are all 0 give no interval, and the error says so."""
    with pytest.raises(ValueError, match="errors are all 0"):
        half_widths(0.0)


@pytest.mark.parametrize(("share", "num_above"), [(0.04, 4), (0.001, 0), (0.25, 25)])
def test_no_more_are_flagged_than_asked_for(share, num_above):
    """Of a hundred different numbers exactly the share lies above the threshold; of equal numbers
    none does.
    """
    numbers = np.random.default_rng(2).permutation(100) / 100
    assert int((numbers > threshold_for(numbers, share_flagged=share)).sum()) == num_above
    equal = np.full(100, 0.7)
    assert not (equal > threshold_for(equal, share_flagged=share)).any()


def test_a_picture_has_no_part_in_its_own_interval():
    """One rating that is far off widens the intervals of the other half alone, not its own."""
    score, spread = np.full(40, 50.0), np.full(40, 0.1)
    error = np.random.default_rng(1).uniform(-5, 5, 40)
    before = cross_intervals(score, error, spread, coverage=0.95, seed=3)
    error[7] = 45.0
    after = cross_intervals(score, error, spread, coverage=0.95, seed=3)
    assert (after[7] == before[7]).all()
    assert int((after != before).any(1).sum()) == 20
