from __future__ import annotations

import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dgiqa_stream.telemetry import Count, Stage, Telemetry

lawful = settings(deadline=None, max_examples=50)


class Clock:
    """Time that passes when told to."""

    def __init__(self, now: float = 1000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        """The time now."""
        return self.now


def test_every_count_and_stage_starts_at_zero():
    """A new snapshot names each count and stage, with nothing in them."""
    snapshot = Telemetry().snapshot()
    assert dict(snapshot.counts) == dict.fromkeys(Count, 0)
    assert set(snapshot.stages) == set(Stage)
    idle = snapshot.stages[Stage.INFER]
    assert (idle.num_calls, idle.p50_seconds, idle.mean_seconds) == (0, None, None)
    assert snapshot.fps_in == snapshot.fps_scored == 0.0


def test_counts_print_as_text():
    """A dict of counts, as a session's result holds, reads as text and is looked up by text."""
    counts = dict(Telemetry().counts())
    assert repr(counts).startswith("{'decoded': 0, 'skipped': 0, ")
    assert "Count" not in repr(counts)
    assert counts["scored"] == counts[Count.SCORED] == 0


def test_no_count_is_lost_between_threads():
    """Four threads that count at once lose nothing, in counts or latencies."""
    telemetry = Telemetry()

    def work() -> None:
        for _ in range(5000):
            telemetry.count(Count.DECODED)
            telemetry.count(Count.SKIPPED, 2)
            telemetry.observe(Stage.DECODE, 0.001)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    snapshot = telemetry.snapshot()
    assert snapshot.counts[Count.DECODED] == 20000
    assert snapshot.counts[Count.SKIPPED] == 40000
    assert telemetry.counts() == snapshot.counts
    assert snapshot.stages[Stage.DECODE].num_calls == 20000
    assert snapshot.stages[Stage.DECODE].sum_seconds == pytest.approx(20.0)


def test_a_snapshot_does_not_change():
    """Counting on leaves an older snapshot as it was, and nobody can write into one."""
    telemetry = Telemetry()
    telemetry.count(Count.DROPPED_QUEUE, 3)
    snapshot = telemetry.snapshot()
    telemetry.count(Count.DROPPED_QUEUE)
    telemetry.count(Count.DROPPED_STALE)
    assert snapshot.dropped == 3
    assert telemetry.snapshot().dropped == 5
    with pytest.raises(TypeError):
        snapshot.counts[Count.DECODED] = 1  # type: ignore[index]


@lawful
@given(st.lists(st.floats(2e-6, 200.0), min_size=1, max_size=200))
def test_latency_quantiles_are_within_five_percent(latencies: list[float]):
    """p50, p95 and p99 are within 4.5 % of a latency that was seen, at the right rank."""
    telemetry = Telemetry()
    for seconds in latencies:
        telemetry.observe(Stage.INFER, seconds)
    stage = telemetry.snapshot().stages[Stage.INFER]
    found = stage.p50_seconds, stage.p95_seconds, stage.p99_seconds
    for share, quantile in zip((50, 95, 99), found, strict=True):
        exact = float(np.percentile(latencies, share, method="inverted_cdf"))
        assert quantile == pytest.approx(exact, rel=0.0451)
    assert stage.max_seconds == max(latencies)
    assert stage.sum_seconds == pytest.approx(sum(latencies))
    assert stage.mean_seconds == pytest.approx(sum(latencies) / len(latencies))


@pytest.mark.parametrize("seconds", [0.0, -1e-9, 1e-9, 1e6])
def test_odd_latencies_are_taken(seconds: float):
    """A latency of nothing, just below nothing or of days is counted, not an error."""
    telemetry = Telemetry()
    telemetry.observe(Stage.POOL, seconds)
    stage = telemetry.snapshot().stages[Stage.POOL]
    assert stage.num_calls == 1
    assert stage.p95_seconds is not None
    assert 0.0 <= stage.p95_seconds <= max(seconds, 0.0)


def test_timed_records_even_where_the_block_raises():
    """A stage that raises has taken its time too."""
    clock = Clock()
    telemetry = Telemetry(clock=clock)

    def fail() -> None:
        with telemetry.timed(Stage.PREPROCESS):
            clock.now += 0.25
            raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        fail()
    assert telemetry.snapshot().stages[Stage.PREPROCESS].sum_seconds == pytest.approx(0.25)


@pytest.mark.parametrize("rate", [1.0, 25.0, 59.94])
@pytest.mark.parametrize("seconds", [6.0, 30.3, 1000.0])
def test_rates_are_of_the_last_seconds(rate: float, seconds: float):
    """A steady stream shows its own rate, however long it has run."""
    clock = Clock()
    telemetry = Telemetry(clock=clock)
    begin = clock.now
    for n in range(int(seconds * rate)):
        clock.now = begin + n / rate
        telemetry.count(Count.DECODED)
        if n % 5 == 0:
            telemetry.count(Count.SCORED)
    clock.now = begin + seconds
    snapshot = telemetry.snapshot()
    assert snapshot.fps_in == pytest.approx(rate, abs=0.3 + rate * 0.02)
    assert snapshot.fps_scored == pytest.approx(rate / 5, abs=0.5)
    assert snapshot.uptime_seconds == pytest.approx(seconds)


def test_rates_fall_to_zero_when_the_stream_stops():
    """Six seconds after the last frame both rates are 0."""
    clock = Clock()
    telemetry = Telemetry(clock=clock)
    telemetry.count(Count.DECODED, 100)
    assert telemetry.snapshot().fps_in > 0
    clock.now += 6.0
    assert telemetry.snapshot().fps_in == 0.0
