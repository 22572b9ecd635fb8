"""frame_scoring.InFlight: a few frames of a stream in scoring at once, published one by one."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dgiqa_stream import pipeline
from dgiqa_stream.backends import BackendStatus
from dgiqa_stream.backends._fallback import FallbackBackend
from dgiqa_stream.config import parse_config
from dgiqa_stream.errors import (
    ConfigError,
    DeviceLost,
    FrameLost,
    ModelError,
    SourceError,
    SourceUnavailable,
)
from dgiqa_stream.frame_scoring import FrameScoring, InFlight
from dgiqa_stream.manifest import LoadedModel
from dgiqa_stream.pipeline import Monitor, score_frames
from dgiqa_stream.scorer import Scorer
from dgiqa_stream.sinks.memory import MemorySink
from dgiqa_stream.telemetry import Count, Stage, Telemetry
from dgiqa_stream.types import Frame, FrameInfo, Planes, StreamInfo
from dgiqa_stream.wire import FinalMessage, FrameMessage, StatusMessage, WindowMessage

NUM = 4
LEVELS = [10 * n for n in range(1, 22)]  # of grey: each frame has a score of its own


class GreySource:
    """Grey frames, 10 to the second, as fast as they are taken; what is raised or waited for comes
    between them.
    """

    num_corrupt = 0
    num_decode_errors = 0

    def __init__(self, script):
        self.info = StreamInfo(64, 48, "grey", "gray", Fraction(10), None, None, False, "grey")
        self._script = script

    def frames(self):
        """As the script says; every seventh frame is damaged, every ninth follows a jump."""
        index = 0
        for item in self._script:
            if isinstance(item, BaseException):
                raise item
            if isinstance(item, threading.Event):
                assert item.wait(30)
                continue
            info = FrameInfo(
                index=index,
                pts_seconds=index / 10,
                duration_seconds=0.1,
                pts=index,
                time_base=Fraction(1, 10),
                width=64,
                height=48,
                pix_fmt="gray",
                keyframe=True,
                corrupt=index % 7 == 6,
                discontinuity=index % 9 == 8,
                received_at_seconds=time.time(),
            )
            yield Frame(Planes((np.full((48, 64), item, np.uint8),), full_range=True), info, "grey")
            index += 1

    def close(self):
        """Nothing is open."""


class LateBackend:
    """Answers of another backend, each after a time of its own: the later of two may come first.

    ``fails`` maps the number of a frame to what its answer raises.
    """

    def __init__(self, backend, *, delays=(0.03, 0.02, 0.01, 0.0), fails=None, num=NUM):
        self._backend, self._delays, self._fails = backend, delays, fails or {}
        self.frames_in_flight = num
        self.status = BackendStatus("late:x", "late:x")
        self._threads = ThreadPoolExecutor(16)
        self.started = self.taken = self.most = 0
        self.answered = []

    def infer(self, batch):
        """At once."""
        return self.start(batch, lambda: None)()

    def start(self, batch, on_done):
        """In a thread, after its time."""
        number, self.started = self.started, self.started + 1
        self.most = max(self.most, self.started - self.taken)
        future = self._threads.submit(self._answer, number, batch)
        future.add_done_callback(lambda _: on_done())

        def answer():
            self.taken += 1
            return future.result()

        return answer

    def _answer(self, number, batch):
        time.sleep(self._delays[number % len(self._delays)])
        self.answered.append(number)
        if number in self._fails:
            raise self._fails[number]
        return self._backend.infer(batch)

    def close(self):
        """End the threads."""
        self._threads.shutdown()


@pytest.fixture
def late(fake_scorer):
    """A scorer whose answers come late, and its backend; closed at the end."""
    opened = []

    def opens(**settings):
        backend = LateBackend(fake_scorer._backend, **settings)
        opened.append(backend)
        return scorer_of(fake_scorer, backend), backend

    yield opens
    for backend in opened:
        backend.close()


def scorer_of(scorer, backend):
    """A scorer of the same model on another backend."""
    return Scorer(LoadedModel("x", scorer.manifest), backend)


def watch(script, scorer, *, on_score=None, **tables):
    """Run a monitor to its end; its result and the messages."""
    memory = MemorySink()
    monitor = Monitor(
        lambda: GreySource(script),
        stream="s",
        config=parse_config({"sampler": {"mode": "every"}, **tables}),
        scorer=scorer,
        sinks=[memory],
        on_score=on_score,
    )
    return monitor.run(), memory


def told(memory):
    """What frames, windows and the summary say, without times of the clock."""
    final = memory.of(FinalMessage)[0]
    return (
        [(m.seq, m.frame, m.quality) for m in memory.of(FrameMessage)],
        [(m.seq, m.window, m.n, m.score, m.pool) for m in memory.of(WindowMessage)],
        (final.n, final.score, final.pool, final.worst, final.reason),
    )


def indices(memory):
    """Of the frames that were published, in order."""
    return [m.frame.index for m in memory.of(FrameMessage)]


def check_laws(result, memory):
    """Handed over is scored or failed; what was scored was published; ``final`` says the same."""
    counts = result.counts
    assert counts[Count.HANDED] == counts[Count.SCORED] + counts[Count.FAILED]
    assert counts[Count.SCORED] == len(memory.of(FrameMessage))
    assert indices(memory) == sorted(indices(memory))
    assert memory.of(FinalMessage)[0].counts == {str(k): v for k, v in counts.items()}
    assert [m.kind for m in memory.messages[-2:]] == ["final", "status"]


def test_answers_out_of_order_are_published_in_order(fake_scorer, late):
    """Four in flight, of which the last is answered first: frames, windows and summary are those
    of one at a time, damaged frames and jumps included; never more than four are in flight.
    """
    _, one_by_one = watch(LEVELS, fake_scorer)
    scorer, backend = late()
    result, memory = watch(LEVELS, scorer)
    assert backend.answered != sorted(backend.answered)
    assert backend.most == NUM
    assert backend.taken == len(LEVELS)
    assert told(memory) == told(one_by_one)
    check_laws(result, memory)
    assert result.counts[Count.FAILED] == 0


def test_frames_are_let_go_without_the_collector(fake_scorer, late):
    """Four in flight and no garbage collection: of forty frames at most a dozen are ever alive,
    those that are read ahead among them, and none at the end.
    """
    scorer, _ = late(delays=(0.0,))
    seen, counts = [], []
    cut = scorer.cut

    def num_alive():
        return sum(samples() is not None for samples in seen)

    def noted(pictures, **how):
        seen.extend(weakref.ref(planes.samples[0]) for planes in pictures)
        counts.append(num_alive())
        return cut(pictures, **how)

    scorer.cut = noted
    gc.collect()
    gc.disable()
    try:
        watch(list(range(1, 41)), scorer)
        at_the_end = num_alive()
    finally:
        gc.enable()
    assert len(counts) == 40
    assert max(counts) <= 12
    assert at_the_end <= 1


def test_the_time_in_the_network_holds_no_wait(late):
    """Of four frames in flight the first takes 0.3 s and the others none: the stage ``infer`` has
    the time of one, though all four are taken after it, and not that of cutting their views.
    """
    scorer, _ = late(delays=(0.3, 0.0, 0.0, 0.0))
    cut = scorer.cut

    def slowly(pictures, **how):
        time.sleep(0.1)
        return cut(pictures, **how)

    scorer.cut = slowly
    scoring = FrameScoring(scorer, parse_config({}).picture, telemetry := Telemetry())
    with InFlight(scoring, on_done=lambda: None) as in_flight:
        frames = GreySource(LEVELS[:4]).frames()
        found = [one for f in frames for one in in_flight.scored(f)]
        time.sleep(0.2)
        found += in_flight.scored(None, is_last=True)
    assert len(found) == 4
    times = telemetry.snapshot().stages[Stage.INFER]
    assert times.num_calls == 4
    assert 0.3 <= times.sum_seconds < 0.55  # with the waits it would be 0.9


def test_one_at_a_time_is_never_started(fake_scorer, late):
    """A backend that wants one frame is asked for each by ``infer``, in the stream's own thread."""
    scorer, backend = late(num=1, delays=(0.0,))
    threads = set()
    infer = backend.infer
    backend.infer = lambda batch: threads.add(threading.get_ident()) or infer(batch)
    watch(LEVELS, scorer)
    assert threads == {threading.get_ident()}
    assert backend.most == 1


def test_a_fault_of_the_source_comes_after_the_frames_in_flight(late):
    """Six frames and a fault: all six are published, then the session fails with the fault."""
    scorer, _ = late()
    result, memory = watch([*LEVELS[:6], SourceUnavailable("gone")], scorer)
    assert indices(memory) == list(range(6))
    assert isinstance(result.error, SourceUnavailable)
    check_laws(result, memory)


def test_a_failed_frame_in_the_middle_ends_in_its_turn(late):
    """Frame 5 is the first to be answered of those in flight, by an error: those before it are
    published, it and those behind it count as failed, and the error is the session's.
    """
    scorer, backend = late(fails={5: ModelError("bad news")}, delays=(0.05, 0.0))
    result, memory = watch(LEVELS, scorer)
    assert str(result.error) == "bad news"
    assert indices(memory) == [0, 1, 2, 3, 4]
    assert result.counts[Count.SCORED] == 5
    assert 1 <= result.counts[Count.FAILED] <= NUM
    assert backend.started < len(LEVELS)
    check_laws(result, memory)


def test_a_frame_that_cannot_be_cut_fails_in_its_turn(late, monkeypatch):
    """Views of frame 5 cannot be cut, while those before it are in flight: they are published."""
    scorer, _ = late(delays=(0.05, 0.0))
    cut, num = scorer.cut, []

    def cuts(pictures, *, crop):
        num.append(crop)
        if len(num) == 6:
            raise ValueError("smaller than the crop")
        return cut(pictures, crop=crop)

    monkeypatch.setattr(scorer, "cut", cuts)
    result, memory = watch(LEVELS, scorer)
    assert isinstance(result.error, ConfigError)
    assert indices(memory) == [0, 1, 2, 3, 4]
    check_laws(result, memory)


def test_a_frame_that_is_lost_is_passed_over(late):
    """Frame 5 cannot be read any more: it counts as failed, and all others are published."""
    scorer, _ = late(fails={5: FrameLost("its device is gone")})
    result, memory = watch(LEVELS, scorer)
    assert result.error is None
    assert indices(memory) == [n for n in range(len(LEVELS)) if n != 5]
    assert result.counts[Count.FAILED] == 1
    check_laws(result, memory)


def test_a_score_does_not_wait_for_the_next_frame(late, monkeypatch):
    """A source that gives its next frame once the score of the last is out goes on at once, though
    nothing else would end the waiting for 20 s.
    """
    monkeypatch.setattr(pipeline, "_IDLE_SECONDS", 20.0)
    gates = [threading.Event() for _ in range(3)]
    script = [item for gate in gates for item in (100, gate)]
    scorer, _ = late()
    begin = time.monotonic()
    result, memory = watch(script, scorer, on_score=lambda s: gates[s.info.index].set())
    assert time.monotonic() - begin < 10
    assert indices(memory) == [0, 1, 2]
    check_laws(result, memory)


def test_stopping_publishes_what_is_in_flight(late):
    """Stopped at the first score, a session publishes what was handed over, at once."""
    scorer, backend = late(delays=(0.05,))
    memory = MemorySink()
    monitor = Monitor(
        lambda: GreySource([100] * 50),
        stream="s",
        config=parse_config({"sampler": {"mode": "every"}}),
        scorer=scorer,
        sinks=[memory],
        on_score=lambda _: monitor.stop(),
    )
    result = monitor.run()
    assert result.reason == "interrupted"
    assert backend.started == backend.taken == len(memory.of(FrameMessage)) <= 2 * NUM
    assert result.counts[Count.FAILED] == 0
    check_laws(result, memory)


def test_what_a_callback_raises_lets_go_of_those_in_flight(late):
    """An error of the host leaves ``run`` with the frames in flight counted as failed."""
    scorer, _ = late(delays=(0.01,))
    memory = MemorySink()

    def fail(score):
        raise RuntimeError("a bug")

    monitor = Monitor(
        lambda: GreySource(LEVELS),
        stream="s",
        config=parse_config({"sampler": {"mode": "every"}}),
        scorer=scorer,
        sinks=[memory],
        on_score=fail,
    )
    with pytest.raises(RuntimeError, match="a bug"):
        monitor.run()
    counts = monitor.telemetry.counts()
    assert counts[Count.SCORED] == 1
    assert counts[Count.HANDED] == counts[Count.SCORED] + counts[Count.FAILED]


def test_a_lost_device_with_frames_in_flight_loses_none(fake_scorer):
    """From frame 6 on the device is lost: the second backend scores what was in flight and all that
    follows, one by one, and messages are those of a session without a loss.
    """
    _, wanted = watch(LEVELS, fake_scorer)
    lossy = LateBackend(
        fake_scorer._backend, fails={n: DeviceLost("the bus is empty") for n in range(6, 40)}
    )
    both = FallbackBackend(lossy, lambda: fake_scorer._backend)
    assert both.frames_in_flight == NUM
    result, memory = watch(LEVELS, scorer_of(fake_scorer, both))
    assert told(memory) == told(wanted)
    assert both.frames_in_flight == 1
    assert result.counts[Count.DEVICE_LOSSES] == 1
    assert any(m.backend.reason == "the bus is empty" for m in memory.of(StatusMessage))
    check_laws(result, memory)


def test_iterated_scores_are_in_order_and_end_with_the_fault(late, monkeypatch):
    """``score_frames`` yields every frame before the fault, in order, then raises it; the time in
    the network is noted for each.
    """
    monkeypatch.setattr(
        pipeline, "open_source", lambda *_, **__: GreySource([*LEVELS[:7], SourceError("torn")])
    )
    scorer, _ = late()
    telemetry = Telemetry()
    config = parse_config({"sampler": {"mode": "every"}})
    scores = score_frames("x.mp4", scorer, config=config, telemetry=telemetry)
    assert [next(scores).info.index for _ in range(7)] == list(range(7))
    with pytest.raises(SourceError, match="torn"):
        next(scores)
    assert telemetry.snapshot().stages[Stage.INFER].num_calls == 7


@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    num_frames=st.integers(0, 16),
    num=st.integers(1, 5),
    delays=st.lists(st.sampled_from([0.0, 0.002, 0.008]), min_size=1, max_size=5),
    policy=st.sampled_from(["wait", "drop_oldest"]),
    ending=st.sampled_from(["end", "fault", "model", "stop"]),
    at=st.integers(0, 15),
)
def test_nothing_is_lost_however_it_ends(fake_scorer, num_frames, num, delays, policy, ending, at):
    """Whatever is in flight, answered in whatever order, and however it ends: each frame handed
    over is published or counted as failed, in order, and no more are in flight than is wanted.
    """
    script = [100] * num_frames
    if ending == "fault":
        script.insert(min(at, num_frames), SourceUnavailable("gone"))
    fails = {at: ModelError("bad news")} if ending == "model" else {}
    backend = LateBackend(fake_scorer._backend, delays=delays, fails=fails, num=num)
    memory = MemorySink()

    def stop(score):
        if ending == "stop" and score.info.index >= at:
            monitor.stop()

    monitor = Monitor(
        lambda: GreySource(script),
        stream="s",
        config=parse_config(
            {"sampler": {"mode": "every"}, "overload": {"policy": policy, "queue_frames": 2}}
        ),
        scorer=scorer_of(fake_scorer, backend),
        sinks=[memory],
        on_score=stop,
    )
    result = monitor.run()
    backend.close()
    check_laws(result, memory)
    assert backend.most <= num
    if ending != "model":
        assert result.counts[Count.FAILED] == 0
