"""Each pooler against its formula, written out on a fine grid of equal ticks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from dgiqa_stream.config import PoolingSettings
from dgiqa_stream.pooling import POOLERS, TemporalPooling
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
    hysteresis_alpha=0.7,
    minkowski_p=3.0,
    vqpool_exponent=1.5,
    primacy_seconds=4.0,
    recency_seconds=3.0,
    p1203_seconds=10,
)
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


def vqpool(q: Ticks) -> float:
    """Park et al. 2013: every cut into two groups is tried; of equally good ones, the lowest."""
    ascending = np.sort(q)
    groups = [(ascending[ascending <= at], ascending[ascending > at]) for at in np.unique(q)[:-1]]
    if not groups:
        return float(q[0])
    spread = np.array([sum(float(((g - g.mean()) ** 2).sum()) for g in pair) for pair in groups])
    explained = float(((q - q.mean()) ** 2).sum()) - spread  # what is left lies between the two
    low, high = groups[int((explained >= explained.max() * (1 - 1e-9)).argmax())]
    w = (1.0 - low.mean() / high.mean()) ** SETTINGS.vqpool_exponent
    return float((low.sum() + w * high.sum()) / (len(low) + w * len(high)))


def fading(q: Ticks, tau_seconds: float) -> float:
    """Weights exp(-alpha t) of samples t = 0, 1, ..., alpha = TICK / tau; NaN has no weight."""
    weights = [0.0 if math.isnan(v) else math.exp(-t * TICK / tau_seconds) for t, v in enumerate(q)]
    return float(np.nansum(q * np.array(weights)) / sum(weights))


def ewma(runs: Sequence[Ticks]) -> float:
    """Only the last run: the clock's jump before it cleared the memory."""
    a = 1.0 - math.exp(-TICK / SETTINGS.ewma_seconds)
    average = weight = 0.0
    for q in runs[-1]:
        average, weight = average * (1 - a), weight * (1 - a)
        if not math.isnan(q):
            average, weight = average + a * q, weight + a
    return average / weight


def softer(v: Sequence[float]) -> float:
    """Sorted scores weighted by the falling half of a Gaussian 2n - 1 long, sigma (2n - 1) / 6."""
    n = len(v)
    s = (2 * n - 1) / 6
    w = [math.exp(-(j**2) / (2 * s**2)) for j in range(n)]
    return sum(wj * vj for wj, vj in zip(w, sorted(v), strict=True)) / sum(w)


def paper_hysteresis(q: Sequence[float], tau: int, alpha: float) -> list[float]:
    """Seshadrinathan and Bovik 2011, section 3, sample by sample; ``tau`` in samples."""
    found = []
    for t in range(len(q)):
        memory = min(q[max(0, t - tau) : t]) if t else q[0]
        found.append((1 - alpha) * memory + alpha * softer(q[t : t + tau]))
    return found


def causal_hysteresis(q: Sequence[float], tau: int, alpha: float) -> list[float]:
    """The same with both parts looking back, the sample itself included."""
    seen = [q[max(0, t - tau + 1) : t + 1] for t in range(len(q))]
    return [(1 - alpha) * min(v) + alpha * softer(v) for v in seen]


def hysteresis(runs: Sequence[Ticks], form: Callable[..., list[float]]) -> float:
    """One form of it on cells of 4 ticks, 20 to the memory, over every stretch without a gap."""
    total = 0.0
    for run in (part for jump in runs for part in contiguous(jump)):
        cells = [run[at : at + 4] for at in range(0, len(run), 4)]
        h = form([float(c.mean()) for c in cells], 20, SETTINGS.hysteresis_alpha)
        total += sum(len(c) * hk for c, hk in zip(cells, h, strict=True))
    return total / sum(int(np.isfinite(r).sum()) for r in runs)


def p1203_style(q: Ticks) -> float:
    """P.1203.3's base and negative bias, second by second, of the last 10 seconds."""
    known = np.flatnonzero(np.isfinite(q))
    q = q[known[0] : known[-1] + 1]
    seconds = [q[at : at + 64] for at in range(0, len(q), 64)][-SETTINGS.p1203_seconds :]
    duration = sum(len(s) for s in seconds) / 64
    heard = [(t, s[np.isfinite(s)]) for t, s in enumerate(seconds) if np.isfinite(s).any()]
    mos = [1 + 4 * float(s.mean()) / 100 for _, s in heard]
    share = [len(s) / 64 for _, s in heard]
    above = below = 0.0
    for (t, _), o, part in zip(heard, mos, share, strict=True):
        w1 = 0.00666620027943848 + 0.0000404018840273729 * math.exp(
            t / duration / 0.156497800436237
        )
        w = part * w1 * (0.143179744942738 - 0.0238641564518876 * o)
        above, below = above + w * o, below + w
    base = above / below
    steps = [max(0.0, duration - 1 - t) for t, _ in heard]
    fade = [1.87403625 + (1 - 1.87403625) * 0.5 ** (step / 7.85416481) for step in steps]
    away = sorted((f * (o - base), part) for f, o, part in zip(fade, mos, share, strict=True))
    middle = [sum(p for _, p in away[:i]) + away[i][1] / 2 for i in range(len(away))]
    at = middle[0] + 0.1 * (middle[-1] - middle[0])
    tenth = float(np.interp(at, middle, [value for value, _ in away]))
    return 25.0 * (base - 0.01853820 * max(0.0, -tenth) - 1.0)


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
    "p1": lambda q, _: float(np.percentile(q, 1, method="inverted_cdf")),
    "p5": lambda q, _: float(np.percentile(q, 5, method="inverted_cdf")),
    "p10": lambda q, _: float(np.percentile(q, 10, method="inverted_cdf")),
    "low1": lambda q, _: low_mean(q, 0.01),
    "low5": lambda q, _: low_mean(q, 0.05),
    "minkowski": lambda q, _: 100.0 - float(((100.0 - q) ** 3).mean() ** (1 / 3)),
    "vqpool": lambda q, _: vqpool(q),
    "ewma": lambda _, runs: ewma(runs),
    "hysteresis": lambda _, runs: hysteresis(runs, causal_hysteresis),
    "hysteresis_exact": lambda _, runs: hysteresis(runs, paper_hysteresis),
    "primacy": lambda _, runs: fading(np.concatenate(runs), SETTINGS.primacy_seconds),
    "recency": lambda _, runs: fading(np.concatenate(runs)[::-1], SETTINGS.recency_seconds),
    "p1203_style": lambda _, runs: p1203_style(np.concatenate(runs)),
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
