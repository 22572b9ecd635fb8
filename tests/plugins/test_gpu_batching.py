"""plugins.torch_gpu: who shares a batch, by a clock that the tests hold, and the thread that runs.

Nothing here needs torch: a batcher knows frames, streams and times alone.
"""

from __future__ import annotations

import threading
import weakref
from collections import Counter, defaultdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dgiqa_stream.errors import ModelError
from plugins.torch_gpu.batching import Batcher, percentiles_of
from plugins.torch_gpu.service import BatchService

ARRIVALS = st.lists(  # stream, seconds since the one before
    st.tuples(st.integers(0, 5), st.floats(0, 0.02)), min_size=1, max_size=40
)
SETTINGS = st.tuples(st.integers(1, 9), st.floats(0, 0.03))


def taken(batcher, now):
    """The batch that is due, whose results are there at once."""
    batch = batcher.take(now)
    batcher.done(batch)
    return batch


def play(batcher, arrivals, run_seconds=0.0):
    """Give frames at their times to an engine that needs ``run_seconds`` for any batch.

    Returns each batch with the time when it left; the engine looks as soon as it is due and free.
    """
    now, free, batches, number = 0.0, 0.0, [], Counter()

    def until(end):
        nonlocal free
        while (due := batcher.due_seconds(max(free, 0.0))) is not None and max(due, free) <= end:
            leaves = max(due, free)
            batches.append((leaves, taken(batcher, leaves)))
            free = leaves + run_seconds

    for stream, gap in arrivals:
        until(now + gap)
        now += gap
        free = max(free, now)
        batcher.add(stream, (stream, number[stream]), now)
        number[stream] += 1
    until(float("inf"))
    return batches


@given(ARRIVALS, SETTINGS, st.floats(0, 0.05))
def test_nothing_is_lost_or_doubled(arrivals, settings, run_seconds):
    """Every frame leaves in exactly one batch, and none is larger than the largest."""
    batcher = Batcher(max_batch=settings[0], budget_seconds=settings[1])
    batches = play(batcher, arrivals, run_seconds)
    left = [w.item for _, batch in batches for w in batch]
    assert Counter(left) == Counter(set(left))
    assert len(left) == len(arrivals)
    assert all(1 <= len(batch) <= settings[0] for _, batch in batches)
    found = batcher.statistics(1e9)
    assert (found.num_added, found.num_taken, found.num_waiting) == (len(left), len(left), 0)
    assert found.num_batches == len(batches)


@given(ARRIVALS, SETTINGS, st.floats(0, 0.05))
def test_a_stream_keeps_its_order(arrivals, settings, run_seconds):
    """Frames of one stream leave in the order in which they came."""
    batcher = Batcher(max_batch=settings[0], budget_seconds=settings[1])
    of_stream = defaultdict(list)
    for _, batch in play(batcher, arrivals, run_seconds):
        for waiting in batch:
            of_stream[waiting.stream].append(waiting.item[1])
    assert all(numbers == sorted(numbers) for numbers in of_stream.values())


@given(ARRIVALS, st.floats(0, 0.03))
def test_the_budget_is_held_while_there_is_room(arrivals, budget):
    """With an engine that is free and batches that are never full, none waits past the budget."""
    batcher = Batcher(max_batch=len(arrivals) + 1, budget_seconds=budget)
    for leaves, batch in play(batcher, arrivals):
        assert max(leaves - w.added_seconds for w in batch) <= budget + 1e-9


@given(st.integers(1, 8), st.integers(2, 6), st.lists(st.integers(0, 40), min_size=6, max_size=6))
def test_no_stream_starves_however_much_the_others_give(max_batch, num_streams, backlogs):
    """A stream's first frame leaves within one round: no stream before it goes twice."""
    batcher = Batcher(max_batch=max_batch, budget_seconds=0.0)
    for stream in range(num_streams):
        for n in range(backlogs[stream] + 1):
            batcher.add(stream, n, 0.0)
    batcher.add("late", 0, 0.0)
    before = []
    while "late" not in before:
        before += [w.stream for w in taken(batcher, 0.0)]
    before = before[: before.index("late")]
    assert max(Counter(before).values(), default=0) <= 1


@given(st.integers(1, 7), st.integers(2, 5))
def test_streams_with_a_backlog_get_equal_shares(max_batch, num_streams):
    """However the backlogs came in, at no moment is one stream two frames ahead of another."""
    batcher = Batcher(max_batch=max_batch, budget_seconds=0.0)
    for stream in range(num_streams):
        for n in range(20):
            batcher.add(stream, n, 0.0)
    served = Counter(dict.fromkeys(range(num_streams), 0))
    while batch := taken(batcher, 0.0):
        served.update(w.stream for w in batch)
        assert max(served.values()) - min(served.values()) <= 1


def test_a_stream_that_was_away_gains_nothing_by_it():
    """After 50 rounds without it, a stream shares turns from now on, not from then on."""
    batcher = Batcher(max_batch=1, budget_seconds=0.0)
    batcher.add("away", 0, 0.0)
    for n in range(50):
        batcher.add("here", n, 0.0)
    for _ in range(51):
        taken(batcher, 0.0)
    for n in range(10):
        batcher.add("away", n, 0.1)
        batcher.add("here", n, 0.1)
    order = [taken(batcher, 0.1)[0].stream for _ in range(10)]
    assert Counter(order) == {"away": 5, "here": 5}


def test_a_batch_leaves_at_once_when_nobody_else_can_come():
    """One stream alone never waits; with two, the first waits for the other or for its budget."""
    batcher = Batcher(max_batch=8, budget_seconds=0.005)
    batcher.add("a", 0, 10.0)
    assert batcher.due_seconds(10.0) == 10.0
    assert len(taken(batcher, 10.0)) == 1
    batcher.add("b", 0, 10.001)
    assert batcher.due_seconds(10.001) == pytest.approx(10.006)
    assert taken(batcher, 10.002) == ()
    batcher.add("a", 1, 10.003)
    assert [w.stream for w in taken(batcher, 10.003)] == ["b", "a"]


def test_streams_whose_frames_are_being_scored_are_not_waited_for():
    """While one of two streams waits for its result, the other's frame leaves at once; once that
    result is there, the other waits for it again, until its budget is over.
    """
    batcher = Batcher(max_batch=8, budget_seconds=0.005)
    for stream in "ab":
        batcher.add(stream, 0, 10.0)
    both = batcher.take(10.0)
    assert len(both) == 2
    batcher.done(both[:1])
    batcher.add("a", 1, 10.001)
    assert batcher.due_seconds(10.001) == 10.001
    batcher.done(both[1:])
    assert batcher.due_seconds(10.001) == pytest.approx(10.006)


def test_streams_that_ended_are_not_waited_for():
    """A stream silent for longer than ``active_seconds`` delays nobody."""
    batcher = Batcher(max_batch=8, budget_seconds=0.5, active_seconds=1.0)
    batcher.add("gone", 0, 0.0)
    taken(batcher, 0.0)
    batcher.add("here", 0, 0.9)
    assert batcher.due_seconds(0.9) == pytest.approx(1.4)
    assert batcher.due_seconds(1.01) == 1.01
    assert batcher.statistics(1.01).num_streams == 1


@pytest.mark.parametrize("settings", [(0, 0.1), (-1, 0.1), (1, -0.1), (1, float("nan"))])
def test_settings_that_cannot_be_are_refused(settings):
    """No batch of nothing and no budget below zero: ValueError names both."""
    with pytest.raises(ValueError, match=f"max_batch {settings[0]}"):
        Batcher(max_batch=settings[0], budget_seconds=settings[1])


def test_percentiles_are_those_of_the_sample():
    """Of 1 to 100 ms the median is 50.5 ms and the 99th percentile 99.01 ms (linear, NumPy's)."""
    found = percentiles_of([n / 1000 for n in range(1, 101)])
    assert found.p50_seconds == pytest.approx(0.0505)
    assert found.p99_seconds == pytest.approx(0.09901)
    assert found.max_seconds == 0.1
    assert percentiles_of([]).p50_seconds is None


def test_every_caller_gets_its_own_results():
    """Eight threads with twenty items each get what belongs to their items, in batches."""
    sizes = []

    def run(items):
        sizes.append(len(items))
        return [2 * item for item in items]

    service = BatchService(run, Batcher(max_batch=16, budget_seconds=0.02))
    found = {}

    def work(stream):
        found[stream] = [
            service.submit(stream, [100 * stream + n])[0].result(timeout=30) for n in range(20)
        ]

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    told = service.statistics()
    service.close()
    assert found == {s: [2 * (100 * s + n) for n in range(20)] for s in range(8)}
    assert sum(sizes) == told.batches.num_taken == 160
    assert max(sizes) > 1
    assert told.answered.p99_seconds >= told.batches.waited.p50_seconds


def test_the_next_batch_is_made_ready_while_one_runs():
    """With two threads a second batch begins before the first has ended, and each caller gets its
    own result; with one thread it does not.
    """
    for num_threads, wanted in ((1, 1), (2, 2)):
        going, most, ends = [], [], threading.Event()

        def run(items, going=going, most=most, ends=ends):
            going.append(items)
            most.append(len(going))
            ends.wait(0.5)
            going.remove(items)
            return [item * 10 for item in items]

        service = BatchService(
            run, Batcher(max_batch=1, budget_seconds=0.0), num_threads=num_threads
        )
        try:
            futures = [service.submit(n, [n])[0] for n in range(2)]
            assert [future.result(30) for future in futures] == [0, 10]
        finally:
            ends.set()
            service.close()
        assert max(most) == wanted
        assert not [t for t in service._threads if t.is_alive()]


def test_a_failing_batch_fails_its_own_frames_alone():
    """What ``run`` raises reaches those who wait for that batch, and the next one runs."""

    def run(items):
        if "bad" in items:
            raise RuntimeError("no such frame")
        return items

    service = BatchService(run, Batcher(max_batch=1, budget_seconds=0.0))
    bad, good = service.submit("a", ["bad", "good"])
    with pytest.raises(ModelError, match="inference failed: no such frame"):
        bad.result(timeout=30)
    assert good.result(timeout=30) == "good"
    assert service.statistics().num_failed == 1
    service.close()


def test_where_memory_runs_out_batches_become_smaller():
    """A batch that is too large runs in halves, each frame gets its result, and it is counted."""

    def run(items):
        if len(items) > 3:
            raise MemoryError
        return items

    batcher = Batcher(max_batch=16, budget_seconds=0.0)
    service = BatchService(run, batcher, is_too_large=lambda exc: isinstance(exc, MemoryError))
    futures = service.submit("a", list(range(16)))
    assert [future.result(timeout=30) for future in futures] == list(range(16))
    told = service.statistics()
    assert told.max_batch <= 3 < 16
    assert told.num_shrunk >= 2
    assert told.num_failed == 0
    service.close()


class Memory:
    """Stands for a tensor: something that lives as long as it is referred to."""


def test_what_a_failed_try_allocated_is_gone_before_the_next():
    """When the halves run, nothing of the batch that was too large is alive any more."""
    tried, num_alive = [], []

    def run(items):
        num_alive.append(sum(ref() is not None for ref in tried))
        held = Memory()
        tried.append(weakref.ref(held))
        if len(items) > 1:
            raise MemoryError
        return items

    batcher = Batcher(max_batch=8, budget_seconds=0.0)
    service = BatchService(run, batcher, is_too_large=lambda exc: isinstance(exc, MemoryError))
    for future in service.submit("a", list(range(8))):
        future.result(timeout=30)
    service.close()
    assert len(num_alive) > 8
    assert set(num_alive) == {0}


def test_a_wrong_number_of_results_is_told_and_the_thread_lives():
    """One result for two frames is a ModelError of its own for each, which keeps nothing alive."""
    tried = []

    def run(items):
        held = Memory()
        tried.append(weakref.ref(held))
        if "fail" in items:
            raise ValueError("no")
        return items[:1]

    service = BatchService(run, Batcher(max_batch=2, budget_seconds=0.0))
    futures = service.submit("a", [1, 2])
    errors = [future.exception(timeout=30) for future in futures]
    failed = service.submit("a", ["fail"])[0].exception(timeout=30)
    assert service.submit("a", [3])[0].result(timeout=30) == 3
    service.close()
    assert [str(error) for error in errors] == ["the model gave 1 results for 2 frames"] * 2
    assert errors[0] is not errors[1]
    assert isinstance(failed.__cause__, ValueError)
    assert [ref() for ref in tried] == [None] * 3


def test_closing_refuses_what_waits_and_what_comes():
    """Frames that wait when the service closes are told so; so is whoever comes later."""
    began, go_on = threading.Event(), threading.Event()

    def run(items):
        began.set()
        go_on.wait(30)
        return items

    service = BatchService(run, Batcher(max_batch=1, budget_seconds=0.0))
    first, second = service.submit("a", [1, 2])
    began.wait(30)
    closing = threading.Thread(target=service.close)
    closing.start()
    while True:
        try:
            service.submit("a", [3])
        except ModelError:
            break
    go_on.set()
    closing.join(30)
    assert first.result(timeout=30) == 1
    with pytest.raises(ModelError, match="closed"):
        second.result(timeout=30)
    service.close()
