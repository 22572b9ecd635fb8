from __future__ import annotations

import math

import numpy as np
import pytest

from dgiqa_stream.comparison import (
    Cells,
    Difference,
    align,
    compare_curves,
    curve_of,
    document_of,
    verdict_of,
    worst_stretches,
)
from dgiqa_stream.comparison._bootstrap import block_cells, block_length, deviations
from dgiqa_stream.errors import ConfigError, SourceError


def ar1(num: int, *, rho: float, rng: np.random.Generator, rows: int = 1) -> np.ndarray:
    """Stationary AR(1) noise of variance 1, (rows, num)."""
    x = np.empty((rows, num))
    x[:, 0] = rng.normal(size=rows)
    steps = rng.normal(scale=math.sqrt(1 - rho * rho), size=(rows, num))
    for k in range(1, num):
        x[:, k] = rho * x[:, k - 1] + steps[:, k]
    return x


def wavy(num: int, *, seed: int = 1) -> np.ndarray:
    """Scores that wander as those of real content do, 0..100."""
    return 60.0 + 10.0 * ar1(num, rho=0.97, rng=np.random.default_rng(seed))[0]


def curve(name, scores, *, begin=0.0, fps=10.0):
    """A curve of evenly spaced scores."""
    times = begin + np.arange(len(scores)) / fps
    return curve_of(name, times.tolist(), list(scores), max_hold_seconds=2.0)


@pytest.mark.parametrize(
    ("begin", "skipped"), [(0.0, 0), (0.0, 37), (95443.7, 0), (95443.7, 37), (-12.0, 5)]
)
def test_a_known_offset_and_shift_are_recovered(begin, skipped):
    """B starts ``skipped`` frames later in the content, on a clock of its own, and 3 points up:
    offset and differences come out to rounding, whatever is pooled.
    """
    content = wavy(600)
    a, b = curve("a", content), curve("b", content[skipped:] + 3.0, begin=begin)
    found = compare_curves(a, b, num_resamples=200)
    assert found.alignment.offset_seconds == pytest.approx(begin - skipped / 10, abs=1e-6)
    assert found.overlap_seconds == pytest.approx((600 - skipped) / 10, abs=1e-6)
    for difference in found.differences:
        assert difference.difference == pytest.approx(3.0, abs=1e-6)
        assert difference.low == pytest.approx(3.0, abs=1e-6)
        assert difference.high == pytest.approx(3.0, abs=1e-6)
    assert found.stretches == ()


def test_a_given_offset_is_taken():
    """--offset is not second-guessed, even where another fits better."""
    content = wavy(400)
    found = align(curve("a", content), curve("b", content[50:]), offset_seconds=1.5)
    assert (found.how, found.offset_seconds) == ("given", 1.5)
    assert found.correlation < 0.9


def test_flat_curves_keep_their_own_times():
    """Where no offset can be told from the curves, the recordings' own times are kept."""
    rng = np.random.default_rng(5)
    a, b = (curve(name, 70.0 + 0.1 * rng.normal(size=400)) for name in "ab")
    assert align(a, b).how == "own times"
    constant = align(curve("a", np.full(300, 50.0)), curve("b", np.full(300, 60.0)))
    assert constant.how == "own times"
    assert math.isnan(constant.correlation)


def test_an_offset_that_is_not_clear_is_told_but_not_taken():
    """With much noise of its own B fits better 0.5 s later, but not by three deviations."""
    content, rng = wavy(150), np.random.default_rng(3)
    b = curve("b", content + 4.0 * rng.normal(size=150), begin=0.5)
    found = align(curve("a", content), b)
    assert (found.how, found.offset_seconds) == ("own times", 0.0)
    assert found.rival_seconds == pytest.approx(0.5, abs=0.5)


def test_a_few_seconds_do_not_move_the_own_times():
    """Of three seconds, some shift nearly always fits better by chance; it is not believed."""
    rng = np.random.default_rng(8)
    for _ in range(20):
        a, b = (curve(name, 60 + 5 * ar1(30, rho=0.9, rng=rng)[0]) for name in "ab")
        assert align(a, b).how == "own times"


def test_curves_of_constants_differ_by_the_constant():
    """Without any variation the interval is the difference itself, not a failure or NaN."""
    found = compare_curves(curve("a", np.full(100, 50.0)), curve("b", np.full(100, 57.0)))
    for d in found.differences:
        assert (d.a, d.b) == (pytest.approx(50.0), pytest.approx(57.0))
        assert (d.low, d.high) == (pytest.approx(7.0), pytest.approx(7.0))
    assert "NaN" not in str(document_of(found))


@pytest.mark.parametrize("rho", [0.0, 0.6])
def test_the_interval_covers_the_truth(rho):
    """Of 200 seeded series of AR(1) differences about a known mean, about 95 % of the intervals
    hold it: within three standard deviations of such a count, 3 x 1.5 %, and not near 100 %.
    """
    true, num, rng = 1.3, 400, np.random.default_rng(11)
    held = 0
    for noise in ar1(num, rho=rho, rng=rng, rows=200):
        a = 60.0 + rng.normal(size=num)
        cells = Cells(
            0.5, np.full(num, 0.5), a, a + true + noise, 0.5 * a, 0.5 * (a + true + noise)
        )
        block = block_cells(cells)
        low, high = deviations(cells, block_cells=block, num_resamples=300, seed=3)[1]
        estimate = true + float(noise.mean())
        held += estimate + low <= true <= estimate + high
    assert 0.905 <= held / 200 <= 0.995


def test_ignoring_autocorrelation_would_be_too_sure():
    """The same series with blocks of one cell are covered far less: the blocks do the work."""
    num, rng = 400, np.random.default_rng(12)
    held = 0
    for noise in ar1(num, rho=0.8, rng=rng, rows=100):
        a = np.full(num, 60.0)
        cells = Cells(0.5, np.full(num, 0.5), a, a + noise, 0.5 * a, 0.5 * (a + noise))
        low, high = deviations(cells, block_cells=1, num_resamples=200, seed=3)[1]
        held += float(noise.mean()) + low <= 0.0 <= float(noise.mean()) + high
    assert held / 100 < 0.7


def test_the_block_length_is_the_theory_s():
    """For AR(1) the optimum is (2 G^2/D)^(1/3) N^(1/3) with G = 2 rho/(1-rho)^2 and
    D = 4/3 ((1+rho)/(1-rho))^2; the median of 20 estimates is within a third of it.
    """
    rho, num = 0.6, 4000
    g, spectrum = 2 * rho / (1 - rho) ** 2, (1 + rho) / (1 - rho)
    wanted = (2 * g * g / (4 / 3 * spectrum**2) * num) ** (1 / 3)
    noise = ar1(num, rho=rho, rng=np.random.default_rng(2), rows=20)
    assert np.median([block_length(x) for x in noise]) == pytest.approx(wanted, rel=1 / 3)
    white = np.random.default_rng(3).normal(size=(20, num))
    assert np.median([block_length(x) for x in white]) <= 5


def test_the_same_seed_gives_the_same_interval():
    """Intervals are reproducible, and another seed moves them little."""
    a, b = curve("a", wavy(500)), curve("b", wavy(500, seed=9))
    first, again, other = (
        compare_curves(a, b, offset_seconds=0.0, num_resamples=500, seed=s) for s in (1, 1, 2)
    )
    assert first.differences == again.differences
    assert first.differences != other.differences
    width = first.headline.high - first.headline.low
    assert first.headline.low == pytest.approx(other.headline.low, abs=0.2 * width)


def test_pooled_values_are_the_poolers_own():
    """Mean and worst 5 % over the common time are numpy's, and gaps of either count for neither."""
    a_scores, b_scores = wavy(300), wavy(300, seed=4)
    a = curve("a", a_scores)
    times = np.arange(300) / 10
    kept = (times < 10.0) | (times >= 20.0)
    b = curve_of("b", times[kept].tolist(), b_scores[kept].tolist(), max_hold_seconds=0.1)
    found = compare_curves(a, b, offset_seconds=0.0, num_resamples=200)
    _, mean, low5 = found.differences
    assert found.overlap_seconds == pytest.approx(20.0)
    assert mean.a == pytest.approx(a_scores[kept].mean())
    assert low5.b == pytest.approx(np.sort(b_scores[kept])[:10].mean())
    assert np.isnan(found.second_difference).sum() == 10


def test_the_worst_stretch_is_where_b_was_damaged():
    """Three seconds that lose 20 points are the worst stretch, with their times and depth."""
    content = wavy(600)
    damaged = content + 0.2
    damaged[200:230] -= 20.0
    found = compare_curves(curve("a", content), curve("b", damaged), num_resamples=200)
    (stretch,) = found.stretches
    assert (stretch.begin_seconds, stretch.end_seconds) == (pytest.approx(20), pytest.approx(23))
    assert stretch.difference == pytest.approx(-19.8)
    assert stretch.lowest == pytest.approx(-19.8)


def test_stretches_are_ranked_by_what_they_cost():
    """A long shallow loss ranks before a short deep one that costs less; NaN ends a stretch."""
    difference = np.array([-9.0, 0.0, -4.0, -4.0, -4.0, np.nan, -2.0, -0.5])
    found = worst_stretches(np.arange(8.0), difference, end_seconds=8.0)
    assert [(s.begin_seconds, s.end_seconds) for s in found] == [(2, 5), (0, 1), (6, 7)]


def test_curves_that_do_not_overlap_are_refused():
    """The error names both spans and the option that helps."""
    a, b = curve("a.mp4", wavy(100)), curve("b.mp4", wavy(100))
    with pytest.raises(SourceError, match=r"do not overlap at offset 50 s.*0\.0 to 10\.0 s.*--off"):
        compare_curves(a, b, offset_seconds=50.0)
    with pytest.raises(SourceError, match=r"5 cells of 0\.1 s in common.*needs 20"):
        compare_curves(a, b, offset_seconds=9.5)


def test_unlike_sampling_is_refused():
    """A curve with 10 scores a second and one with 2 have no common kind of worst 5 %."""
    with pytest.raises(ConfigError, match=r"a score every 0\.1 s and slow every 0\.5 s.*--fps"):
        compare_curves(curve("fast", wavy(300)), curve("slow", wavy(60), fps=2.0))


@pytest.mark.parametrize(
    ("low", "difference", "high", "said"),
    [
        (2.2, 3.1, 4.0, "B is better by 3.1 points (95 % interval 2.2 to 4.0)"),
        (-4.0, -3.1, -2.2, "B is worse by 3.1 points (95 % interval 2.2 to 4.0)"),
        (-0.4, 0.1, 0.7, "no difference can be told (95 % interval -0.4 to 0.7)"),
    ],
)
def test_the_verdict_says_what_the_interval_allows(low, difference, high, said):
    """A difference is told only where its interval leaves zero out."""
    assert verdict_of(Difference("hysteresis", 60.0, 60.0 + difference, difference, low, high)) == (
        said
    )
