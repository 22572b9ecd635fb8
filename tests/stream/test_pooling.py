"""Each pooler against its formula, written out on a fine grid of equal ticks."""

from __future__ import annotations

import itertools
import math
import pickle
from collections.abc import Callable, Sequence
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from dgiqa_stream.config import PoolingSettings
from dgiqa_stream.pooling import POOLERS, Holds, TemporalPooling
from dgiqa_stream.types import FrameInfo, FrameScore, WindowScore

lawful = settings(deadline=None, max_examples=50)
TICK = 1.0 / 64  # every time here is a whole number of ticks, so that no sum is rounded
BEGIN = 7.25
PERIOD = 13
SETTINGS = PoolingSettings(
    windows_seconds=(1.0, 2.5, 10.0),
    hop_seconds=1.0,
    max_hold_seconds=2.0,
    ewma_seconds=5.0,
    hysteresis_seconds=1.25,  # a cell is 4 ticks
)
ORDER_FREE = ("mean", "median", "min", "max", "stdev", "harmonic_mean", "p5", "low5")
Ticks = NDArray[np.float64]

Step = tuple[int, float, bool]  # ticks since the frame before, its score, whether the clock jumped
scores = st.floats(0.0, 100.0)
steps = st.lists(
    st.tuples(st.integers(1, 90) | st.integers(128, 900), scores, st.booleans()),
    min_size=1,
    max_size=40,
)
holds = st.lists(st.tuples(st.integers(1, 160), scores), min_size=1, max_size=40)


# What each pooler means, of scores held one tick each. NaN: nothing was known at that tick.


def low_mean(q: Ticks, share: float) -> float:
    """The mean of the lowest share; the tick on its edge counts in part."""
    taken = np.sort(q)
    edges = np.arange(len(q) + 1)
    weights = np.diff(np.minimum(edges, share * len(q)))
    return float(np.average(taken, weights=weights))


def ewma(runs: Sequence[Ticks]) -> float:
    """Only the last run: the clock's jump before it cleared the memory."""
    a = 1.0 - math.exp(-TICK / SETTINGS.ewma_seconds)
    average = weight = 0.0
    for q in runs[-1]:
        average, weight = average * (1 - a), weight * (1 - a)
        if not math.isnan(q):
            average, weight = average + a * q, weight + a
    return average / weight


def hysteresis(runs: Sequence[Ticks]) -> float:
    """The formula of the docstring, cell by cell."""
    total = 0.0
    for run in (part for jump in runs for part in contiguous(jump)):
        cells = [run[at : at + 4] for at in range(0, len(run), 4)]
        means = [float(c.mean()) for c in cells]
        for k, cell in enumerate(cells):
            last = sorted(means[max(0, k - 19) : k + 1])
            n = len(last)
            s = (2 * n - 1) / 6
            w = [math.exp(-(j**2) / (2 * s**2)) for j in range(n)]
            softer = sum(wj * vj for wj, vj in zip(w, last, strict=True)) / sum(w)
            total += len(cell) * (0.2 * last[0] + 0.8 * softer)
    return total / sum(int(np.isfinite(r).sum()) for r in runs)


def contiguous(q: Ticks) -> list[Ticks]:
    """The stretches without a gap."""
    known = np.isfinite(q)
    parts = np.split(np.arange(len(q)), np.flatnonzero(np.diff(known)) + 1)
    return [q[p] for p in parts if len(p) and known[p[0]]]


FORMULAS: dict[str, Callable[[Ticks, Sequence[Ticks]], float]] = {
    "mean": lambda q, _: float(np.mean(q)),
    "median": lambda q, _: float(np.percentile(q, 50, method="inverted_cdf")),
    "min": lambda q, _: float(np.min(q)),
    "max": lambda q, _: float(np.max(q)),
    "stdev": lambda q, _: float(np.std(q)),
    "harmonic_mean": lambda q, _: len(q) / float((1 / (q + 1)).sum()) - 1,
    "p5": lambda q, _: float(np.percentile(q, 5, method="inverted_cdf")),
    "low5": lambda q, _: low_mean(q, 0.05),
    "ewma": lambda _, runs: ewma(runs),
    "hysteresis": lambda _, runs: hysteresis(runs),
}


class Trace:
    """Frames on ticks, and the score at every tick of the session."""

    def __init__(self, frames: Sequence[Step]) -> None:
        gaps, self.scores, self.jumps = zip(*frames, strict=True)
        self.at = np.cumsum([0, *gaps[1:]])
        until = np.append(self.at[1:], self.at[-1] + PERIOD)
        self.until = np.minimum(until, self.at + round(SETTINGS.max_hold_seconds / TICK))
        self.end = int(self.until[-1])
        self.q = np.full(self.end, np.nan)
        for first, last, q in zip(self.at, self.until, self.scores, strict=True):
            self.q[first:last] = q

    def pooled(self, begin: int, end: int) -> dict[str, float | None]:
        """Every formula, of the ticks from ``begin`` until ``end``."""
        q = self.q[begin:end]
        if not np.isfinite(q).any():
            return dict.fromkeys(FORMULAS)
        jumps = [a - begin for a, j in zip(self.at, self.jumps, strict=True) if j]
        cuts = [a for a in jumps if 0 < a < len(q)]
        runs = [r for r in np.split(q, cuts) if np.isfinite(r).any()]
        return {n: formula(q[np.isfinite(q)], runs) for n, formula in FORMULAS.items()}

    def frames(self) -> list[FrameScore]:
        """The frames as the pipeline would hand them on."""
        return [
            frame_score(n, BEGIN + at * TICK, q, jump)
            for n, (at, q, jump) in enumerate(zip(self.at, self.scores, self.jumps, strict=True))
        ]


def frame_score(index: int, pts_seconds: float, score: float, jump: bool = False) -> FrameScore:
    """A scored frame."""
    info = FrameInfo(
        index=index,
        pts_seconds=float(pts_seconds),
        duration_seconds=0.04,
        pts=None,
        time_base=Fraction(1, 90000),
        width=64,
        height=48,
        pix_fmt="yuv420p",
        discontinuity=jump,
    )
    return FrameScore(info, "cam1", score, score / 100)


def pooling(settings: PoolingSettings = SETTINGS) -> TemporalPooling:
    """A new object under test."""
    return TemporalPooling(settings, stream="cam1", period_seconds=PERIOD * TICK)


def run(frames: Sequence[FrameScore], pool: TemporalPooling | None = None) -> list[WindowScore]:
    """Every window and the session."""
    pool = pool or pooling()
    return [w for f in frames for w in pool.add(f)] + pool.finish()


def ticks_of(window: WindowScore) -> tuple[int, int]:
    """First and last tick of a window."""
    begin, end = window.begin_seconds - BEGIN, window.end_seconds - BEGIN
    return round(begin / TICK), round(end / TICK)


def as_holds(held: Sequence[tuple[int, float]]) -> Holds:
    """Ticks and scores, one after another."""
    edges = BEGIN + TICK * np.cumsum([0, *(ticks for ticks, _ in held)])
    return Holds(edges[:-1], edges[1:], np.array([q for _, q in held]))


def value(name: str, *parts: Holds) -> float:
    """What a pooler makes of stretches of holds."""
    pooler = POOLERS[name](SETTINGS)
    for part in parts:
        pooler.add(part)
    pooled = pooler.value()
    assert pooled is not None
    return pooled


def test_every_pooler_has_a_formula():
    """The table and the formulas it is checked against name the same poolers."""
    assert set(POOLERS) == set(FORMULAS)


@lawful
@given(steps)
def test_the_session_follows_the_formulas(frames: list[Step]):
    """Every pooled value of a session is its formula's, whatever the gaps and jumps, to 1e-6."""
    trace = Trace(frames)
    session = run(trace.frames())[-1]
    assert session.kind == "session"
    assert session.pool == pytest.approx(trace.pooled(0, trace.end), abs=1e-6)
    assert session.coverage == pytest.approx(np.isfinite(trace.q).mean())
    assert session.num_frames == len(frames)


@lawful
@given(steps)
def test_each_window_is_pooled_from_its_own_stretch_of_time(frames: list[Step]):
    """A window [t0, t1) follows the formulas over exactly that time, to 1e-6."""
    trace = Trace(frames)
    for window in run(trace.frames())[:-1]:
        begin, end = ticks_of(window)
        assert window.pool == pytest.approx(trace.pooled(begin, end), abs=1e-6)
        covered = np.isfinite(trace.q[begin:end]).sum() * TICK / window.length_seconds
        assert window.coverage == pytest.approx(covered)
        assert window.valid == (covered >= 0.5)
        assert window.num_frames == sum(begin <= at < end for at in trace.at)


@lawful
@given(steps)
def test_the_session_so_far_is_the_session_if_it_ended_now(frames: list[Step]):
    """``session()`` equals what ``finish`` gives last, and asking changes nothing."""
    asked, left_alone = pooling(), pooling()
    for frame in Trace(frames).frames():
        asked.add(frame)
        left_alone.add(frame)
        so_far = asked.session()
    assert so_far == left_alone.finish()[-1] == asked.finish()[-1]


@pytest.mark.parametrize("name", sorted(POOLERS))
@lawful
@given(held=holds, at=st.lists(st.integers(0, 40), max_size=4))
def test_how_time_is_cut_into_calls_changes_nothing(name: str, held: list, at: list[int]):
    """Holds given at once or in stretches pool to the same value."""
    whole = as_holds(held)
    cuts = sorted({0, *(a for a in at if a < len(whole)), len(whole)})
    parts = [whole[a:b] for a, b in itertools.pairwise(cuts)]
    assert value(name, *parts) == pytest.approx(value(name, whole), abs=1e-6)


@pytest.mark.parametrize("name", sorted(POOLERS))
@lawful
@given(held=holds, which=st.integers(0, 39))
def test_splitting_a_hold_changes_nothing(name: str, held: list, which: int):
    """A score held twice for half the time is the same score held once."""
    which %= len(held)
    ticks, q = held[which]
    split = [*held[:which], (ticks / 2, q), (ticks / 2, q), *held[which + 1 :]]
    assert value(name, as_holds(split)) == pytest.approx(value(name, as_holds(held)), abs=1e-6)


@pytest.mark.parametrize("name", sorted(set(POOLERS) - {"stdev"}))
@lawful
@given(held=holds)
def test_a_pooled_score_is_among_the_scores(name: str, held: list):
    """No pooler but stdev leaves the range of what it pooled."""
    of_all = [q for _, q in held]
    assert min(of_all) - 1e-9 <= value(name, as_holds(held)) <= max(of_all) + 1e-9


@pytest.mark.parametrize("name", sorted(POOLERS))
@lawful
@given(held=holds, q=scores)
def test_a_constant_stays_what_it_is(name: str, held: list, q: float):
    """A constant score pools to itself, and its stdev to 0."""
    constant = as_holds([(ticks, q) for ticks, _ in held])
    assert value(name, constant) == pytest.approx(0.0 if name == "stdev" else q, abs=1e-6)


@pytest.mark.parametrize("name", ORDER_FREE)
@lawful
@given(held=holds, data=st.data())
def test_order_does_not_matter_to_order_free_poolers(name: str, held: list, data: st.DataObject):
    """Mean, extremes, spread and percentiles do not ask when a score came."""
    shuffled = data.draw(st.permutations(held))
    assert value(name, as_holds(shuffled)) == pytest.approx(value(name, as_holds(held)), abs=1e-6)


@pytest.mark.parametrize("name", ["ewma", "hysteresis"])
def test_memory_makes_order_matter(name: str):
    """A dip counts differently for the poolers with memory when it comes first or last."""
    dip = [(64, 20.0), (640, 80.0)]
    assert abs(value(name, as_holds(dip)) - value(name, as_holds(dip[::-1]))) > 0.5


@pytest.mark.parametrize("name", ["p5", "low5", "median"])
def test_percentiles_of_a_long_session_stay_close_in_bounded_memory(name: str):
    """After 30000 holds a percentile is within 1/256 of the range, and few numbers are kept."""
    rng = np.random.default_rng(3)
    held = list(zip(rng.integers(1, 60, 30000).tolist(), rng.beta(5, 2, 30000) * 100, strict=True))
    whole = as_holds(held)
    pooler = POOLERS[name](SETTINGS)
    for at in range(0, len(whole), 256):
        pooler.add(whole[at : at + 256])
        assert len(pickle.dumps(pooler)) < 160_000
    q = np.repeat(whole.score, [ticks for ticks, _ in held])
    assert pooler.value() == pytest.approx(FORMULAS[name](q, [q]), abs=100 / 256)


def test_hysteresis_falls_at_once_and_recovers():
    """A bad second is felt for the memory's length after it, and not a moment longer."""
    good, bad = (64, 80.0), (64, 20.0)
    before = value("hysteresis", as_holds([good] * 4))
    assert before == pytest.approx(80.0)
    dip = value("hysteresis", as_holds([*[good] * 4, bad, *[good] * 4]))
    mean = value("mean", as_holds([*[good] * 4, bad, *[good] * 4]))
    assert dip < mean - 3.0
    # h is 80 again where no cell of the bad second is left: beyond it, each second adds 80
    longer = value("hysteresis", as_holds([*[good] * 4, bad, *[good] * 8]))
    assert longer * 13 - dip * 9 == pytest.approx(4 * 80.0)


def test_ewma_is_the_classic_recursion_once_settled():
    """After many time constants, holding q moves it by 1 - exp(-dt / tau) of the distance."""
    settled = [(64 * 100, 70.0)]
    a = 1 - math.exp(-1.0 / SETTINGS.ewma_seconds)
    assert value("ewma", as_holds([*settled, (64, 10.0)])) == pytest.approx(
        70.0 + a * (10.0 - 70.0), abs=1e-4
    )


def test_the_harmonic_mean_is_on_the_scale_of_a_hundred():
    """Half at 0 and half at 100 give libvmaf's 2/(1 + 1/101) - 1, not a mean near 50."""
    assert value("harmonic_mean", as_holds([(64, 0.0), (64, 100.0)])) == pytest.approx(
        2 / (1 + 1 / 101) - 1
    )
