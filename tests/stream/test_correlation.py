"""Agreement measures against scipy."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from dgiqa_stream.correlation import krcc, plcc, ranks, rmse, srcc

lawful = settings(deadline=None, max_examples=50)
stats = pytest.importorskip("scipy.stats")

# Few distinct values, so that ties are common.
pairs = st.integers(2, 40).flatmap(
    lambda n: st.tuples(
        *[
            st.lists(st.integers(-5, 5) | st.floats(-1e3, 1e3), min_size=n, max_size=n)
            for _ in range(2)
        ]
    )
)


def spread(values: list[float]) -> bool:
    """Whether the values differ by more than rounding."""
    return max(values) - min(values) > 1e-6


@lawful
@given(pairs)
def test_ranks_are_scipys(pair: tuple[list[float], list[float]]):
    """Equal values share the mean of their ranks, as in ``scipy.stats.rankdata``."""
    np.testing.assert_array_equal(ranks(pair[0]), stats.rankdata(pair[0]))


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [(plcc, "pearsonr"), (srcc, "spearmanr"), (krcc, "kendalltau")],
    ids=["plcc", "srcc", "krcc"],
)
@lawful
@given(pair=pairs)
def test_correlations_are_scipys(ours, theirs: str, pair: tuple[list[float], list[float]]):
    """PLCC, SRCC and KRCC equal scipy's to 1e-9, with and without ties."""
    assume(spread(pair[0]) and spread(pair[1]))
    truth = getattr(stats, theirs)(*pair)
    assert ours(*pair) == pytest.approx(truth.statistic, abs=1e-9)


@pytest.mark.parametrize("measure", [plcc, srcc, krcc])
@lawful
@given(pair=pairs)
def test_agreement_is_symmetric_and_bounded(measure, pair: tuple[list[float], list[float]]):
    """Swapping the lists changes nothing, and no value leaves -1..1."""
    assume(spread(pair[0]) and spread(pair[1]))
    there, back = measure(*pair), measure(*pair[::-1])
    assert there == pytest.approx(back, abs=1e-12)
    assert abs(there) <= 1 + 1e-9


@pytest.mark.parametrize("measure", [srcc, krcc])
@lawful
@given(values=st.lists(st.integers(-300, 300), min_size=3, max_size=30, unique=True))
def test_rank_measures_see_order_alone(measure, values: list[int]):
    """Any rising curve agrees in full, any falling one not at all."""
    assert measure(values, np.exp(np.array(values) / 100)) == pytest.approx(1.0)
    assert measure(values, [-v for v in values]) == pytest.approx(-1.0)


@pytest.mark.parametrize("measure", [plcc, srcc, krcc])
def test_a_constant_list_agrees_with_nothing(measure):
    """Against a constant there is no correlation: NaN, not 0 and not a warning."""
    assert math.isnan(measure([1, 1, 1], [1, 2, 3]))


@lawful
@given(pairs)
def test_rmse_is_the_root_of_the_mean_square(pair: tuple[list[float], list[float]]):
    """RMSE is numpy's norm over the root of the count."""
    difference = np.subtract(*pair)
    assert rmse(*pair) == pytest.approx(np.linalg.norm(difference) / math.sqrt(len(pair[0])))


@pytest.mark.parametrize("measure", [plcc, srcc, krcc, rmse])
@pytest.mark.parametrize(
    ("a", "b", "rule"),
    [
        ([1, 2], [1, 2, 3], "one length"),
        ([1], [1], "2 or more"),
        ([1, float("nan")], [1, 2], "finite"),
        ([1, 2], [1, float("inf")], "finite"),
    ],
)
def test_lists_that_cannot_be_compared_are_refused(measure, a, b, rule: str):
    """Different lengths, single values, NaN and infinity are errors that name the rule."""
    with pytest.raises(ValueError, match=rule):
        measure(a, b)
