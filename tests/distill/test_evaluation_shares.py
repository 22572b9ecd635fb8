"""Shares, falling steps and coverage: intervals against published and hand-computed values."""

from __future__ import annotations

import numpy as np
import pytest

stats = pytest.importorskip("scipy.stats")

from dgiqa_stream.errors import ConfigError  # noqa: E402
from distill.evaluation.degradation_ladders import (  # noqa: E402
    left_out_of_training,
    places_of_kind,
    sum_up_degradations,
)
from distill.evaluation.falling import falling_steps, together  # noqa: E402
from distill.evaluation.interval_coverage import judge_intervals  # noqa: E402
from distill.evaluation.shares import share_over_contents, wilson  # noqa: E402

NEWCOMBE = [  # Newcombe 1998, Table I, method 3: r, n, lower, upper
    (81, 263, 0.2553, 0.3662),
    (15, 148, 0.0624, 0.1605),
    (0, 20, 0.0, 0.1611),
    (1, 29, 0.0061, 0.1718),
]


@pytest.mark.parametrize(("num_true", "num", "low", "high"), NEWCOMBE)
def test_wilson_gives_the_published_intervals(num_true, num, low, high):
    """The score interval is that of Newcombe's table, to its four digits."""
    found = wilson(num_true, num)
    assert found.value == num_true / num
    assert (found.low, found.high) == (pytest.approx(low, abs=5e-5), pytest.approx(high, abs=5e-5))


@pytest.mark.parametrize(("num_true", "num"), [(7, 7), (12, 340), (339, 340)])
def test_wilson_agrees_with_scipy(num_true, num):
    """Scipy's Wilson interval is the same to rounding, also at both ends of the scale."""
    known = stats.binomtest(num_true, num).proportion_ci(method="wilson")
    found = wilson(num_true, num)
    assert found.low == pytest.approx(known.low, abs=1e-12)
    assert found.high == pytest.approx(known.high, abs=1e-12)


@pytest.mark.parametrize(("num_true", "num"), [(0, 0), (3, 2), (-1, 5)])
def test_what_is_no_share_is_refused(num_true, num):
    """No trial at all, or more that came true than there were, is an error with both numbers."""
    with pytest.raises(ValueError, match=f"{num_true} of {num}"):
        wilson(num_true, num)


def test_steps_that_hang_together_widen_the_interval():
    """Ten contents of ten equal steps, half of them true, tell as much as ten trials: the interval
    is near the binomial's of 5 in 10 (0.19 to 0.81 by percentiles) and not that of 50 in 100.
    """
    found = share_over_contents([[i < 5] * 10 for i in range(10)])
    low, high = stats.binom(10, 0.5).ppf([0.025, 0.975]) / 10
    assert found.value == 0.5
    assert (found.low, found.high) == (pytest.approx(low, abs=0.1), pytest.approx(high, abs=0.1))
    assert found.high - found.low > 2 * (wilson(50, 100).high - wilson(50, 100).low)


def test_a_share_of_all_is_not_certain():
    """Where every step of every content falls, the lower end is Wilson's, below 1."""
    found = share_over_contents([[True] * 6] * 4)
    assert (found.value, found.high) == (1.0, 1.0)
    assert found.low == wilson(24, 24).low < 0.9


def test_falling_steps_are_counted_by_hand():
    """Of a's steps (-10, +0.5, +0.6) two fall within the tolerance, of b's (-1, -1, 0) all; the
    drops are 8.9 and 2 points.
    """
    found = falling_steps({"a": [[50, 40, 40.5, 41.1]], "b": [[9, 8, 7, 7]]}, in_training=False)
    assert (found.num_contents, found.num_ladders, found.num_steps) == (2, 2, 6)
    assert (found.share_falling.num_true, found.share_falling.num) == (5, 6)
    assert found.falling_by_step == [1.0, 1.0, 0.5]
    assert found.drop_points.value == pytest.approx((8.9 + 2) / 2)
    assert found.in_training is False


def test_kinds_left_out_are_summed_up_apart():
    """Blur falls and was seen, haze rises and was not: their shares are 1 and 0, of all half."""
    scores = {
        "blur": {"a": [9.0, 5.0], "b": [8.0, 5.0]},
        "haze": {"b": [5.0, 9.0], "c": [5.0, 9.0]},
    }
    found = sum_up_degradations(scores, left_out=["haze"])
    assert found.seen.share_falling.value == 1.0
    assert found.unseen.share_falling.value == 0.0
    assert (found.all.share_falling.num_true, found.all.share_falling.num) == (2, 4)
    assert found.all.num_contents == 3  # b is one content, with a ladder of each kind
    assert {kind: row.in_training for kind, row in found.by_kind.items()} == {
        "blur": True,
        "haze": False,
    }
    assert sum_up_degradations(scores).unseen is None


def test_an_unknown_kind_left_out_is_refused():
    """A misspelt kind is an error that names those there are."""
    with pytest.raises(ConfigError, match=r"haxe.*known: blur"):
        sum_up_degradations({"blur": {"a": [9.0, 5.0]}}, left_out=["haxe"])


def test_ladders_of_one_content_lie_together():
    """A content's ladders of two kinds are one group, for they are not independent."""
    kinds = [{"a": [3.0, 2.0]}, {"a": [5.0, 1.0], "b": [4.0, 4.0]}]
    assert together(kinds) == {"a": [[3.0, 2.0], [5.0, 1.0]], "b": [[4.0, 4.0]]}


@pytest.mark.parametrize(("number", "contents"), [(12, 24), (5, 24), (12, 26), (3, 3), (9, 4)])
def test_kinds_take_turns_with_the_contents(number, contents):
    """Each kind has as many contents as asked for, or all, and over kinds all contents are used."""
    places = [places_of_kind(i, number, contents) for i in range(contents)]
    assert all(len(set(p)) == min(number, contents) for p in places)
    assert set().union(*places) == set(range(contents))


def test_what_every_training_step_left_out_is_unseen():
    """A kind that one of two training steps saw is not unseen; steps without a recipe, as an
    export, say nothing of it, and a history without training has no unseen kind.
    """

    def step(*kinds):
        return {"step": "train", "recipe": {"data": {"leave_out": list(kinds)}}}

    history = [step("haze", "vp9"), step("vp9", "flare"), {"step": "export"}]
    assert left_out_of_training(history) == ["vp9"]
    assert left_out_of_training([*history, {"step": "train", "recipe": {"data": {}}}]) == []
    assert left_out_of_training([{"step": "export"}]) == []


def test_coverage_is_counted_by_hand():
    """Of eight ratings seven lie inside, an end counting as inside; the one outside has the
    narrowest interval but one, so only the narrowest quarter covers by half.
    """
    mos = [50.0, 50, 50, 50, 50, 50, 50, 50]
    halves = [1.0, 2, 3, 4, 5, 6, 7, 8]
    intervals = [(50 - h, 50 + h) for h in halves]
    intervals[0] = (50.0, 52.0)  # an end
    intervals[1] = (51.0, 55.0)
    found = judge_intervals(mos, intervals)
    assert (found.all.share_inside.num_true, found.all.share_inside.num) == (7, 8)
    assert [part.share_inside.value for part in found.by_width] == [0.5, 1.0, 1.0, 1.0]
    assert [part.mean_width_points for part in found.by_width] == [3.0, 7.0, 11.0, 15.0]
    assert found.all.mean_width_points == 9.0


def test_normal_errors_are_covered_as_promised():
    """Intervals of 1.645 standard deviations hold 90 % of normal errors, whatever their width; the
    tolerance is three standard errors of a quarter of 4,000.
    """
    rng = np.random.default_rng(2)
    spread = rng.uniform(1, 10, 4000)
    mos = 50 + spread * rng.standard_normal(4000)
    half = stats.norm.ppf(0.95) * spread
    found = judge_intervals(mos, np.stack([50 - half, 50 + half], 1))
    assert found.all.share_inside.value == pytest.approx(0.9, abs=0.0142)
    for part in found.by_width:
        assert part.share_inside.value == pytest.approx(0.9, abs=0.0285)


@pytest.mark.parametrize(
    ("mos", "intervals", "words"),
    [
        ([1.0, 2, 3], [(0, 1)] * 3, "4 MOS or more"),
        ([1.0] * 4, [(0, 1)] * 3, "interval each"),
        ([1.0, 2, 3, np.nan], [(0, 1)] * 4, "finite"),
    ],
)
def test_what_has_no_coverage_is_refused(mos, intervals, words):
    """Too few ratings, a missing interval and NaN are errors that say so."""
    with pytest.raises(ValueError, match=words):
        judge_intervals(mos, intervals)
