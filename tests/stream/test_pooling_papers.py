"""Poolers against published outputs, closed forms and the batch formulas of their papers."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest

from dgiqa_stream.config import POOLER_NAMES, PoolingSettings
from dgiqa_stream.pooling import POOLERS, Holds
from dgiqa_stream.pooling._hysteresis import Hysteresis

TICK = 1.0 / 64
SETTINGS = PoolingSettings(hysteresis_seconds=1.25)
# Inputs, and outputs to all their digits, from the README of Zhengzhong Tu's Temporal_Pooling, the
# implementation behind Tu et al., ICIP 2020. One score is one second here, as it is there.
SPIKES = [
    8, 8, 9, 9, 10, 10, 9, 9, 5, 5, 6, 6, 7, 7, 8, 8, 10, 10, 2, 2, 3, 3, 1, 1, 1, 2, 2, 2, 3, 3, 4,
    45, 5, 5, 6, 6, 6, 4, 23, 1, 3, 43, 4, 23, 43, 2, 30, 2, 1000, 1222, 2, 2, 2, 2, 2, 2,
]  # fmt: skip
RAMP = list(range(100))
HYBRID_ALPHA = 0.01


def as_holds(held: Sequence[tuple[float, float]], tick: float = TICK) -> Holds:
    """Ticks and scores, one after another."""
    edges = tick * np.cumsum([0, *(ticks for ticks, _ in held)])
    return Holds(edges[:-1], edges[1:], np.array([q for _, q in held], np.float64))


def value(name: str, held: Holds, settings: PoolingSettings = SETTINGS) -> float:
    """What a pooler makes of holds."""
    pooler = POOLERS[name](settings)
    pooler.add(held)
    pooled = pooler.value()
    assert pooled is not None
    return pooled


def in_seconds(scores: Sequence[float]) -> Holds:
    """One score per second."""
    return as_holds([(1, q) for q in scores], tick=1.0)


@pytest.mark.parametrize(
    ("scores", "published"), [(SPIKES, 27.1638829291158), (RAMP, 49.20040871424151)]
)
def test_exact_hysteresis_gives_the_published_value(scores: list[int], published: float):
    """With a score per cell and two cells to the memory, the paper's form is the published one."""
    memory = Hysteresis(2.0, 0.8, num_cells=2)
    memory.add(in_seconds(scores))
    assert memory.exact() == pytest.approx(published, abs=1e-9)


def test_vqpooling_gives_the_published_value():
    """The best cut is the one that the published k-means found, to its last digit."""
    assert value("vqpool", in_seconds(SPIKES)) == pytest.approx(46.913926267214485, abs=1e-9)


def test_vqpooling_of_a_ramp_is_the_best_cut_and_the_published_one_beside_it():
    """The published search stopped at 49 low scores of 100; the optimum, which is ours, is 50."""
    published = 40.105642912001294
    assert at_cut(RAMP, 49) == pytest.approx(published, abs=1e-9)
    assert value("vqpool", in_seconds(RAMP)) == pytest.approx(at_cut(RAMP, 50), abs=1e-9)


def at_cut(ascending: Sequence[float], num_low: int) -> float:
    """The paper's formula for two given groups."""
    low, high = ascending[:num_low], ascending[num_low:]
    w = (1 - (sum(low) / len(low)) / (sum(high) / len(high))) ** 2
    return (sum(low) + w * sum(high)) / (len(low) + w * len(high))


def test_primacy_and_recency_add_up_to_the_published_hybrid():
    """Both memories, weighted as published, are the "hybrid" of that README to its last digit."""
    both = PoolingSettings(primacy_seconds=1 / HYBRID_ALPHA, recency_seconds=1 / HYBRID_ALPHA)
    for scores, published in ((SPIKES, 47.77485231254695), (RAMP, 49.459016154756526)):
        first, last = (value(n, in_seconds(scores), both) for n in ("primacy", "recency"))
        late = math.exp(-HYBRID_ALPHA)  # its weights of recency begin with t = 1
        assert (first + late * last) / (1 + late) == pytest.approx(published, abs=1e-9)


def test_the_mean_of_the_worst_tenth_gives_the_published_value():
    """The ramp's mean below the 10th percentile is 4.5, there as "percentile", here of ``low``."""
    from dgiqa_stream.pooling._order_free import Distribution

    kept = Distribution()
    kept.add(in_seconds(RAMP))
    assert kept.low_mean(0.1) == pytest.approx(4.5, abs=1e-9)


def test_minkowski_is_the_published_one_of_the_impairment():
    """Its root mean square of the ramp, 57.30, is ours of the ramp's mirror image."""
    mirrored = [100 - q for q in RAMP]
    published = 57.301832431432764
    assert 100 - value("minkowski", in_seconds(mirrored)) == pytest.approx(published, abs=1e-9)


def test_p1203_weights_the_end_and_the_bad():
    """A bad last second costs more than a bad first, and ratios of weights are the standard's."""
    good, bad = [80.0] * 59, [20.0]
    first, last = (value("p1203_style", in_seconds(q)) for q in (bad + good, good + bad))
    assert last < first < value("mean", in_seconds(bad + good)) < 80.0
    # a slightly better second moves the score by its weight: t1 + t2 exp(t / T / t3)
    better = [80.01]
    up = [value("p1203_style", in_seconds(q)) - 80 for q in (better + good, good + better)]
    weights = [0.0066662 + 0.0000404018840 * math.exp(x / 0.1564978) for x in (0, 59 / 60)]
    assert up[1] / up[0] == pytest.approx(weights[1] / weights[0], rel=1e-3)


def test_p1203_of_a_long_session_is_that_of_its_end():
    """What came more than ``p1203_seconds`` before the end no longer counts, however bad."""
    settings = PoolingSettings(p1203_seconds=60)
    rng = np.random.default_rng(5)
    end = rng.uniform(40, 90, 60).tolist()
    assert value("p1203_style", in_seconds([0.0] * 500 + end), settings) == pytest.approx(
        value("p1203_style", in_seconds(end), settings), abs=1e-9
    )


def test_exact_hysteresis_looks_ahead_and_causal_does_not():
    """Just before a dip only the paper's form is lower; just after it, both are."""
    before = as_holds([(64 * 4, 80.0)])
    dip = as_holds([(64 * 4, 80.0), (16, 20.0)])
    sums = []
    for held in (before, dip):
        memory = Hysteresis(2.0, 0.8)
        memory.add(held)
        sums.append((memory.causal(), memory.exact()))
    assert sums[0] == pytest.approx((80.0, 80.0))
    causal, exact = sums[1]
    # 4 s at 80 are final for the causal form: only the last quarter of a second is lower
    assert causal * 4.25 > 4 * 80.0 + 0.25 * 20.0
    assert exact < causal


def test_the_configuration_knows_every_pooler():
    """The names that a file may hold are those of the table, in its order."""
    assert tuple(POOLERS) == POOLER_NAMES


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
