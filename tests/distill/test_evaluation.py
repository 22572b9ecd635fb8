"""The statistics of agreement, against scipy, known parameters and closed forms."""

from __future__ import annotations

import numpy as np
import pytest

stats = pytest.importorskip("scipy.stats")

from dgiqa_stream.correlation import srcc  # noqa: E402
from distill.evaluation.agreement import agreement, by_group, compare, estimate  # noqa: E402
from distill.evaluation.ladders import Rung, ladder_order  # noqa: E402
from distill.evaluation.logistic import fit_curve, logistic4, logistic5  # noqa: E402

KNOWN = {"logistic4": (90.0, 10.0, 55.0, 9.0), "logistic5": (60.0, 0.15, 45.0, 0.2, 30.0)}
FORMULA = {"logistic4": logistic4, "logistic5": logistic5}


def noisy(number, spread, *, seed=0):
    """Scores on 0..100 and MOS that follow them but for normal noise."""
    rng = np.random.default_rng(seed)
    mos = rng.uniform(0, 100, number)
    return mos + rng.normal(0, spread, number), mos


def test_the_formulas_are_those_of_the_reports():
    """At its middle a logistic of 4 parameters is the mean of its ends and has slope
    (b1 - b2) / (4 b4); that of 5 parameters is b4 b3 + b5 there, with slope b1 b2 / 4 + b4.
    """
    x = np.array([55.0 - 1e-4, 55.0, 55.0 + 1e-4])
    four = logistic4(x, *KNOWN["logistic4"])
    assert four[1] == pytest.approx(50)
    assert (four[2] - four[0]) / 2e-4 == pytest.approx(80 / 36)
    x = x - 10
    five = logistic5(x, *KNOWN["logistic5"])
    assert five[1] == pytest.approx(0.2 * 45 + 30)
    assert (five[2] - five[0]) / 2e-4 == pytest.approx(60 * 0.15 / 4 + 0.2)


@pytest.mark.parametrize("kind", KNOWN)
@pytest.mark.parametrize("scale", [1.0, 0.01])
def test_known_parameters_are_recovered(kind, scale):
    """From exact points the fit finds the very parameters, whether scores are on 0..100 or 0..1;
    with a noise of 2 points its curve stays within one point of the true one.
    """
    x = np.linspace(0, 100, 120)
    y = FORMULA[kind](x, *KNOWN[kind])
    found = fit_curve(x * scale, y, kind)
    expected = np.array(KNOWN[kind])
    if kind == "logistic4":
        expected[2:] *= scale
    else:
        expected[1:4] *= [1 / scale, scale, 1 / scale]
    assert found.converged
    np.testing.assert_allclose(found.parameters, expected, rtol=1e-6)
    rough = fit_curve(x * scale, y + np.random.default_rng(1).normal(0, 2, 120), kind)
    assert rough.converged
    assert np.abs(rough(x * scale) - y).max() < 1.5


@pytest.mark.parametrize("kind", KNOWN)
def test_a_fit_goes_on_from_another(kind):
    """Started from the fit of the whole, a resample's fit is as good as one from scratch."""
    x, y = noisy(80, 12)
    whole = fit_curve(x, y, kind)
    i = np.random.default_rng(2).integers(80, size=80)
    again, anew = fit_curve(x[i], y[i], kind, start=whole), fit_curve(x[i], y[i], kind)
    errors = [((curve(x[i]) - y[i]) ** 2).sum() for curve in (again, anew)]
    assert errors[0] == pytest.approx(errors[1], rel=0.01)


@pytest.mark.parametrize("kind", KNOWN)
def test_what_cannot_be_fitted_gives_a_flagged_line(kind):
    """Four pictures, equal scores, and too few evaluations each give the line of least squares
    (numpy's) or the mean, marked as not converged.
    """
    x, y = np.array([1.0, 2.0, 3.0, 5.0]), np.array([2.0, 4.0, 5.0, 9.0])
    found = fit_curve(x, y, kind)
    assert (found.kind, found.converged) == ("linear", False)
    np.testing.assert_allclose(found.parameters, np.polyfit(x, y, 1))
    flat = fit_curve(np.full(9, 3.0), np.arange(9.0), kind)
    assert (flat.converged, flat.parameters) == (False, (0.0, 4.0))
    assert not fit_curve(*noisy(50, 9), kind, most_evaluations=2).converged


def test_a_perfect_model_agrees_perfectly():
    """Scores equal to MOS: every correlation 1, RMSE 0, intervals of no width."""
    mos = np.linspace(5, 95, 40)
    found = agreement(mos, mos, num_resamples=20)
    for each in (found.srcc, found.krcc, found.plcc, found.plcc_logistic5):
        np.testing.assert_allclose([each.value, each.low, each.high], 1, atol=1e-6)
    assert found.rmse_logistic5.value == pytest.approx(0, abs=1e-5)
    # a logistic of 4 parameters is straight only in the limit
    assert found.plcc_logistic4.value == pytest.approx(1, abs=1e-4)


def test_a_curved_perfect_model_is_perfect_after_the_logistic():
    """Where MOS is a logistic of the scores, PLCC is below 0.97 before the mapping, 1 after it."""
    x = np.linspace(0, 100, 60)
    found = agreement(x, logistic4(x, 100, 0, 50, 5), num_resamples=5)
    assert found.plcc.value < 0.97
    assert found.plcc_logistic4.value == pytest.approx(1)
    assert found.rmse_logistic4.value == pytest.approx(0, abs=1e-6)


def test_a_reversed_model_does_not_become_perfect():
    """Scores that fall with quality have -1 throughout: the mapping's direction is told."""
    mos = np.linspace(5, 95, 40)
    found = agreement(100 - mos, mos, num_resamples=5)
    for each in (found.srcc, found.krcc, found.plcc, found.plcc_logistic4):
        assert each.value == pytest.approx(-1, abs=1e-4)
    assert found.plcc_logistic5.value == pytest.approx(-1, abs=1e-4)


@pytest.mark.parametrize("seed", [17, 39, 48, 86])
def test_a_curve_that_bends_back_keeps_the_sign_of_the_ranks(seed):
    """Eight pictures whose fitted curve of 5 parameters ends against their rank order: PLCC has the
    sign of SRCC and scipy's size of the mapped scores; scores reversed have the opposite.
    """
    rng = np.random.default_rng(seed)
    mos = rng.uniform(0, 100, 8)
    scores = np.round(mos + rng.normal(0, (30, 45, 60)[seed % 3], 8))
    curve = fit_curve(scores, mos, "logistic5")
    first, last = curve(np.array([scores.min(), scores.max()]))
    direction = np.sign(stats.spearmanr(scores, mos).statistic)
    assert np.sign(last - first) == -direction  # else this would show nothing
    size = abs(stats.pearsonr(curve(scores), mos).statistic)
    assert curve.plcc(scores, mos) == pytest.approx(direction * size)
    reversed_curve = fit_curve(100 - scores, mos, "logistic5")
    assert np.sign(reversed_curve.plcc(100 - scores, mos)) == -direction


def test_figures_are_scipys():
    """SRCC, KRCC and PLCC equal scipy's, with ties; RMSE is that of the mapped scores."""
    scores, mos = noisy(50, 20)
    scores, mos = np.round(scores, -1), np.round(mos)
    found = agreement(scores, mos, num_resamples=2)
    assert found.srcc.value == pytest.approx(stats.spearmanr(scores, mos).statistic)
    assert found.krcc.value == pytest.approx(stats.kendalltau(scores, mos).statistic)
    assert found.plcc.value == pytest.approx(stats.pearsonr(scores, mos).statistic)
    mapped = found.curves["logistic4"](scores)
    assert found.rmse_logistic4.value == pytest.approx(np.sqrt(np.mean((mapped - mos) ** 2)))


def test_rmse_is_in_the_units_of_the_mos():
    """MOS on 1..5 instead of 0..100 divides RMSE by 25 and changes no correlation."""
    scores, mos = noisy(60, 15)
    wide = agreement(scores, mos, num_resamples=2)
    narrow = agreement(scores, 1 + mos / 25, num_resamples=2)
    assert narrow.rmse_logistic5.value == pytest.approx(wide.rmse_logistic5.value / 25, rel=1e-3)
    assert narrow.plcc_logistic5.value == pytest.approx(wide.plcc_logistic5.value, abs=1e-4)


def test_the_interval_covers_the_truth():
    """Of 40 draws of 100 pictures, the 95 % interval holds the SRCC of the whole population (its
    value over 200,000 pictures) in 33 or more: fewer has a chance below 1 in 1,000.
    """
    truth = stats.spearmanr(*noisy(200_000, 25, seed=99)).statistic
    held = 0
    for seed in range(40):
        found = estimate(srcc, *noisy(100, 25, seed=seed), num_resamples=200, seed=seed)
        held += found.low <= truth <= found.high
    assert held >= 33


def test_the_same_seed_gives_the_same_interval():
    """Intervals are reproducible, and another seed gives another."""
    scores, mos = noisy(30, 20)
    first, again = (agreement(scores, mos, num_resamples=15, seed=4).srcc for _ in range(2))
    assert first == again
    assert agreement(scores, mos, num_resamples=15, seed=5).srcc != first


def test_more_pictures_narrow_the_interval():
    """Sixteen times the pictures make the interval about four times narrower (2 to 8)."""

    def width(number):
        found = agreement(*noisy(number, 25), num_resamples=60).srcc
        assert found.low < found.value < found.high
        return found.high - found.low

    assert 2 < width(40) / width(640) < 8


def test_equal_scores_have_no_correlation():
    """A model that says 50 of everything has no SRCC, and RMSE is the MOS's own deviation."""
    mos = np.linspace(0, 100, 20)
    found = agreement(np.full(20, 50.0), mos, num_resamples=5)
    assert found.srcc.value is None
    assert found.plcc_logistic4.value is None
    assert found.rmse_logistic4.value == pytest.approx(mos.std())


@pytest.mark.parametrize(
    ("scores", "mos", "words"),
    [
        ([1, 2, 3], [1, 2, 3], "5 or more"),
        ([1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5], "one length"),
        ([1, 2, 3, 4, float("nan")], [1, 2, 3, 4, 5], "NaN"),
    ],
)
def test_what_cannot_be_judged_is_refused(scores, mos, words):
    """Three pictures, unequal lengths and NaN each end in an error."""
    with pytest.raises(ValueError, match=words):
        agreement(scores, mos)


def test_groups_are_judged_by_themselves():
    """Of a model that knows blur and reverses noise, each group shows its own; four pictures of a
    third kind are too few.
    """
    mos = np.tile(np.linspace(0, 100, 20), 2)
    scores = np.where(np.arange(40) < 20, mos, -mos)
    kinds = ["blur"] * 20 + ["noise"] * 20
    found = by_group(
        [*scores, 1, 2, 3, 4], [*mos, 1, 2, 3, 4], [*kinds, *["hail"] * 4], num_resamples=5
    )
    assert {kind: a.srcc.value for kind, a in found.items()} == {"blur": 1, "noise": -1}
    assert {a.num_pictures for a in found.values()} == {20}
    with pytest.raises(ValueError, match=r"40 groups .* 44"):
        by_group([*scores, 1, 2, 3, 4], [*mos, 1, 2, 3, 4], kinds)


def test_a_model_does_not_differ_from_itself():
    """The difference is exactly 0 in every resample, and p is 1."""
    scores, mos = noisy(60, 20)
    found = compare(scores, scores.copy(), mos, num_resamples=100)
    assert (found.srcc.value, found.srcc.low, found.srcc.high) == (0, 0, 0)
    assert found.p_value == 1


def test_a_better_model_is_told_from_a_worse_one():
    """Noise of 10 against 40 points: the difference is that of both SRCC, its interval is above 0
    and p the smallest that 400 resamples can give; the other way round the sign turns.
    """
    good, mos = noisy(150, 10)
    poor = mos + np.random.default_rng(8).normal(0, 40, 150)
    found, turned = (
        compare(*pair, mos, num_resamples=400) for pair in ((good, poor), (poor, good))
    )
    expected = stats.spearmanr(good, mos).statistic - stats.spearmanr(poor, mos).statistic
    assert found.srcc.value == pytest.approx(expected)
    assert found.srcc.low > 0
    assert found.p_value == pytest.approx(2 / 401)
    assert turned.srcc.value == pytest.approx(-expected)
    assert turned.srcc.high < 0


def test_pairing_narrows_the_difference():
    """Two models that err alike differ within a narrower interval than two that err each in their
    own way, though all four are equally good.
    """
    rng = np.random.default_rng(3)
    mos = rng.uniform(0, 100, 200)
    common, own = rng.normal(0, 25, 200), rng.normal(0, 25, 200)
    alike = compare(mos + common, mos + common + rng.normal(0, 3, 200), mos, num_resamples=200)
    apart = compare(mos + common, mos + own, mos, num_resamples=200)
    assert alike.srcc.high - alike.srcc.low < (apart.srcc.high - apart.srcc.low) / 2


def ladder(kind, content, scores):
    """Rungs of levels 1, 2, ..., handed over in no order."""
    return [Rung(content, kind, level, s) for level, s in reversed([*enumerate(scores, 1)])]


def test_ladders_count_steps_that_fall():
    """A step up of 0.5 counts as falling, one of 0.6 does not; drops are from first to last."""
    rungs = [
        *ladder("blur", "a", [80, 60, 60.5, 20]),
        *ladder("blur", "b", [70, 70.6, 30]),
        *ladder("noise", "a", [10, 30]),
        Rung("c", "noise", 1, 50.0),  # a rung alone is no ladder
    ]
    blur, noise, whole = ladder_order(rungs)
    assert (blur.num_ladders, blur.num_steps, blur.share_falling) == (2, 5, 0.8)
    assert blur.mean_drop_points == (60 + 40) / 2
    assert (noise.num_ladders, noise.share_falling, noise.mean_drop_points) == (1, 0.0, -20)
    assert (whole.degradation, whole.in_training) == ("all", True)
    assert whole.share_falling == pytest.approx(4 / 6)


def test_types_left_out_of_training_are_told_apart():
    """With noise left out, its row and a sum of its own say so, and the sum of all is of both."""
    rungs = [*ladder("blur", "a", [9, 5, 1]), *ladder("noise", "a", [1, 5, 9])]
    rows = {row.degradation: row for row in ladder_order(rungs, left_out=["noise"])}
    assert [*rows] == ["blur", "noise", "all in training", "all left out", "all"]
    assert [rows[k].in_training for k in rows] == [True, False, True, False, None]
    assert rows["all in training"].share_falling == 1
    assert rows["all left out"].share_falling == 0
    assert rows["all"].share_falling == 0.5
    assert [r.in_training for r in ladder_order(rungs, left_out=["noise", "blur"])] == [False] * 3


def test_ladders_that_cannot_be_are_refused():
    """A type left out that has no ladder, and two pictures of one level, are errors."""
    with pytest.raises(ValueError, match="'hail'"):
        ladder_order(ladder("blur", "a", [2, 1]), left_out=["hail"])
    with pytest.raises(ValueError, match="two pictures of a, blur, have level 1"):
        ladder_order([*ladder("blur", "a", [2, 1]), Rung("a", "blur", 1, 3.0)])
    assert ladder_order([]) == []
