"""The parts of the GStreamer element that need no GStreamer: planes, time, the worker."""

from __future__ import annotations

import contextlib
import threading
import time

import numpy as np
import pytest

from dgiqa_stream.backends import BackendStatus
from dgiqa_stream.backends._fallback import FallbackBackend
from dgiqa_stream.config import parse_config
from dgiqa_stream.errors import DeviceLost
from dgiqa_stream.manifest import LoadedModel
from dgiqa_stream.scorer import Scorer, load_scorer
from dgiqa_stream.sinks.memory import MemorySink
from dgiqa_stream.types import FrameInfo, Planes, StreamInfo
from dgiqa_stream.wire import FinalMessage, FrameMessage, StatusMessage
from plugins.gstreamer.clock import StreamClock
from plugins.gstreamer.pictures import Layout, planes_of
from plugins.gstreamer.worker import Picture, Worker

SOURCE = StreamInfo(64, 64, "rawvideo", "gray", None, None, None, True, "test")


def info(index, *, discontinuity=False):
    """A frame at 25 a second."""
    return FrameInfo(
        index, index / 25, 0.04, None, None, 64, 64, "gray", discontinuity=discontinuity
    )


class Gate:
    """Pictures whose opening waits until the test lets them through."""

    def __init__(self):
        self.opened = []
        self.closed = 0
        self.some_opened = threading.Semaphore(0)
        self.go_on = threading.Semaphore(0)

    def picture(self, index, *, error=None, discontinuity=False):
        """One that notes when it is opened and closed."""

        @contextlib.contextmanager
        def planes():
            self.opened.append(index)
            self.some_opened.release()
            assert self.go_on.acquire(timeout=30)
            if error is not None:
                raise error
            yield Planes((np.full((64, 64), 100, np.uint8),))
            self.closed += 1

        return Picture(info(index, discontinuity=discontinuity), planes)


@pytest.fixture
def make_worker():
    """Workers with the brightness as their model; ended after the test."""
    started = []

    def make(policy="drop_oldest", on_problem=lambda exc: None, scorer=None, **publish):
        config = parse_config(
            {
                "sampler": {"mode": "every"},
                "overload": {"policy": policy},
                "output": {"thumbnails": 0},
                "publish": publish,
            }
        )
        sink = MemorySink()
        scorer = scorer or load_scorer(backend="fake")
        worker = Worker(scorer, config, stream="s", source=SOURCE, sink=sink, on_problem=on_problem)
        started.append((worker, sink))
        return worker, sink

    yield make
    for worker, sink in started:
        if not sink.of(FinalMessage):
            worker.end("interrupted")


def test_the_newest_picture_wins(make_worker):
    """While one is scored a single other waits, the newest; the rest is dropped and counted."""
    worker, sink = make_worker()
    gate = Gate()
    worker.offer(gate.picture(0))
    assert gate.some_opened.acquire(timeout=30)
    for index in (1, 2, 3):
        worker.offer(gate.picture(index))
    gate.go_on.release(2)
    worker.end("end_of_stream")
    assert gate.opened == [0, 3]
    assert gate.closed == 2
    assert (worker.num_scored, worker.num_dropped) == (2, 2)
    (final,) = sink.of(FinalMessage)
    assert final.counts["decoded"] == 4
    assert final.counts["handed"] == 2
    assert [m.drops.queue for m in sink.of(FrameMessage)] == [2, 2]


def test_waiting_loses_nothing(make_worker):
    """With the policy ``wait`` each of many pictures is scored, in order."""
    worker, sink = make_worker("wait")
    gate = Gate()
    gate.go_on.release(100)
    for index in range(20):
        worker.offer(gate.picture(index))
    worker.end("end_of_stream")
    assert [m.frame.index for m in sink.of(FrameMessage)] == list(range(20))
    assert worker.num_dropped == 0


def test_a_jump_is_told_though_its_picture_was_dropped(make_worker):
    """The first picture scored after a jump carries it, and no other."""
    worker, sink = make_worker()
    gate = Gate()
    worker.offer(gate.picture(0))
    assert gate.some_opened.acquire(timeout=30)
    worker.offer(gate.picture(1, discontinuity=True))
    worker.offer(gate.picture(2))
    worker.discard()
    worker.offer(gate.picture(3))
    gate.go_on.release(2)
    worker.end("end_of_stream")
    assert [(m.frame.index, m.frame.discontinuity) for m in sink.of(FrameMessage)] == [
        (0, False),
        (3, True),
    ]


def test_an_interruption_does_not_wait_for_what_waits(make_worker):
    """Whoever stops has only the picture under way finished, and still gets a summary."""
    worker, sink = make_worker()
    gate = Gate()
    worker.offer(gate.picture(0))
    assert gate.some_opened.acquire(timeout=30)
    worker.offer(gate.picture(1))
    gate.go_on.release(1)
    worker.end("interrupted")
    assert gate.opened == [0]
    (final,) = sink.of(FinalMessage)
    assert (final.reason, final.n, worker.num_dropped) == ("interrupted", 1, 1)


def test_a_picture_that_cannot_be_read_is_counted_and_told(make_worker):
    """It is one failed frame and one report, and the next is scored."""
    told = []
    worker, sink = make_worker("wait", told.append)
    gate = Gate()
    gate.go_on.release(10)
    error = OSError("no memory")
    for index, fault in enumerate((None, error, None)):
        worker.offer(gate.picture(index, error=fault))
    worker.end("end_of_stream")
    assert told == [error]
    (final,) = sink.of(FinalMessage)
    assert (final.counts["scored"], final.counts["failed"], final.counts["handed"]) == (2, 1, 3)


class LostBackend:
    """Of a device that is gone."""

    status = BackendStatus("gpu:0", "gpu:0")

    def infer(self, batch):
        """In vain."""
        raise DeviceLost("the bus is empty")

    def close(self):
        """Nothing is open."""


def test_a_lost_device_is_counted_and_told(make_worker):
    """The device is lost with the first picture: another backend scores it, a status message names
    the reason, and the summary counts one loss.
    """
    fake = load_scorer(backend="fake")
    both = FallbackBackend(LostBackend(), lambda: fake._backend)
    worker, sink = make_worker("wait", scorer=Scorer(LoadedModel("x", fake.manifest), both))
    gate = Gate()
    gate.go_on.release(10)
    for index in range(2):
        worker.offer(gate.picture(index))
    worker.end("end_of_stream")
    assert worker.num_scored == 2
    assert any(m.backend.reason == "the bus is empty" for m in sink.of(StatusMessage))
    (final,) = sink.of(FinalMessage)
    assert final.counts["device_losses"] == 1


def test_without_pictures_there_are_heartbeats(make_worker):
    """A host that is paused still sends a status message each ``status_seconds``, here 0.1 s."""
    worker, sink = make_worker(status_seconds=0.1)
    ends = time.monotonic() + 20
    while len(sink.of(StatusMessage)) < 4 and time.monotonic() < ends:
        time.sleep(0.05)
    assert len(sink.of(StatusMessage)) >= 4
    worker.end("end_of_stream")


def test_time_is_the_streams_own():
    """Without jumps stream time passes through, and a missing stamp is one frame on."""
    clock = StreamClock()
    placed = [clock.place(seconds, 0.04) for seconds in (7.2, 7.24, None, 7.32)]
    assert [seconds for seconds, _ in placed] == pytest.approx([7.2, 7.24, 7.28, 7.32])
    assert not any(jumped for _, jumped in placed)


@pytest.mark.parametrize(("after", "is_jump"), [(3.0, True), (30.0, True), (10.5, False)])
def test_time_goes_on_after_a_jump(after, is_jump):
    """A step back, or far ahead, goes on one frame after the last; a gap is a gap."""
    clock = StreamClock()
    clock.place(10.0, 0.04)
    seconds, jumped = clock.place(after, 0.04)
    later, jumped_again = clock.place(after + 0.04, 0.04)
    assert jumped is is_jump
    assert not jumped_again
    assert seconds == pytest.approx(10.04 if is_jump else after)
    assert later == pytest.approx(seconds + 0.04)


def test_a_flush_is_a_jump_wherever_it_leads():
    """After a flush even a small step ahead does not follow what was before."""
    clock = StreamClock()
    clock.interrupt()
    assert clock.place(1.0, 0.04) == (1.0, False)  # nothing was before
    clock.interrupt()
    assert clock.place(1.5, 0.04) == (pytest.approx(1.04), True)
    assert clock.place(1.54, 0.04) == (pytest.approx(1.08), False)


def test_planes_follow_offsets_and_strides():
    """Padding between rows and planes is left out, and nothing is copied."""
    data = bytearray(b"\xff" * 200)
    for row in range(4):
        data[8 + 16 * row : 8 + 16 * row + 6] = bytes([row] * 6)  # 6x4 of luma in rows of 16
    for row in range(2):
        data[100 + 10 * row : 100 + 10 * row + 6] = bytes([50, 90] * 3)
    layout = Layout("NV12", 6, 4, (8, 100), (16, 10))
    planes = planes_of(memoryview(data), layout)
    assert [part.shape for part in planes.samples] == [(4, 6), (2, 3), (2, 3)]
    assert planes.samples[0].tolist() == [[row] * 6 for row in range(4)]
    assert {*planes.samples[1].flat} == {50}
    assert {*planes.samples[2].flat} == {90}
    data[8] = 77
    assert planes.samples[0][0, 0] == 77


def test_a_buffer_that_is_too_small_is_refused():
    """A layout that reaches beyond its buffer is an error, not a read of foreign memory."""
    with pytest.raises(ValueError, match=r"I420 picture of 64x64 .* buffer of 4096 bytes"):
        planes_of(bytes(4096), Layout("I420", 64, 64, (0, 4096, 5120), (64, 32, 32)))
