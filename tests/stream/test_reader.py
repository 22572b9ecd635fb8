"""reader: decodes ahead in a thread, loses frames only by policy, and counts each of them."""

from __future__ import annotations

import contextlib
import threading
import time
import weakref
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dgiqa_stream import reader as reader_module
from dgiqa_stream.config import OverloadSettings, SamplerSettings
from dgiqa_stream.errors import SourceUnavailable
from dgiqa_stream.reader import ReadAhead
from dgiqa_stream.sampler import make_sampler
from dgiqa_stream.telemetry import Count, Telemetry
from dgiqa_stream.types import Frame, FrameInfo, Planes, StreamInfo

PLANES = Planes((np.zeros((16, 16, 3), np.uint8),), full_range=True)
ALL = SamplerSettings(mode="every")
UNTIL_CLOSED = object()


def make_frame(index, *, jumped=False, corrupt=False):
    """A black frame, 25 to the second."""
    info = FrameInfo(
        index=index,
        pts_seconds=index / 25,
        duration_seconds=1 / 25,
        pts=None,
        time_base=None,
        width=16,
        height=16,
        pix_fmt="rgb24",
        keyframe=index % 5 == 0,
        discontinuity=jumped,
        corrupt=corrupt,
    )
    return Frame(PLANES, info, "s")


class ScriptedSource:
    """A source that gives frames, raises what it finds among them, and waits at gates."""

    num_corrupt = 0

    def __init__(self, script, *, is_live=False, errors_at_end=0):
        self.info = StreamInfo(16, 16, "none", "rgb24", Fraction(25), None, None, is_live, "none")
        self.num_decode_errors = 0
        self.closed = threading.Event()
        self._script, self._errors_at_end = script, errors_at_end

    def frames(self):
        """As the script says."""
        for item in self._script:
            if self.closed.is_set():
                return
            if isinstance(item, BaseException):
                raise item
            if item is UNTIL_CLOSED:
                self.closed.wait(60)
            elif isinstance(item, threading.Event):
                item.wait(60)
            else:
                yield item
            del item
        self.num_decode_errors += self._errors_at_end

    def close(self):
        """Tell that it was closed."""
        self.closed.set()


def read_ahead(source, telemetry, *, sampler=ALL, open_timeout_seconds=5.0, **overload):
    """A reader of a source that is there, or of what a function opens."""
    return ReadAhead(
        source if callable(source) else lambda: source,
        sampler=make_sampler(sampler) if isinstance(sampler, SamplerSettings) else sampler,
        overload=OverloadSettings(**overload),
        telemetry=telemetry,
        open_timeout_seconds=open_timeout_seconds,
        name="test",
    )


@pytest.fixture(autouse=True)
def patient_exit(monkeypatch):
    """A thread that ends is not taken for a left one, however busy the machine."""
    monkeypatch.setattr(reader_module, "_JOIN_SECONDS", 30.0)


@pytest.fixture
def short_exit(monkeypatch, patient_exit):
    """What blocks is left soon, as in the product."""
    monkeypatch.setattr(reader_module, "_JOIN_SECONDS", 0.3)


def readers():
    """Reader threads that are alive."""
    return [t for t in threading.enumerate() if t.name.startswith("reader ")]


def wait_until(holds, seconds=30.0):
    """Wait for something that another thread brings about."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.005)


def check_law(counts, num_handed):
    """Each decoded frame is accounted for once."""
    assert counts[Count.HANDED] == num_handed
    assert counts[Count.DECODED] == (
        counts[Count.SKIPPED]
        + counts[Count.DROPPED_QUEUE]
        + counts[Count.DROPPED_STALE]
        + counts[Count.HANDED]
    )


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    num_frames=st.integers(0, 40),
    jumps=st.sets(st.integers(0, 39), max_size=6),
    every=st.integers(1, 4),
    policy=st.sampled_from(["auto", "wait", "drop_oldest"]),
    queue_frames=st.integers(1, 5),
    staleness_seconds=st.sampled_from([0.001, 2.0]),
    stop_after=st.integers(0, 45),
    pauses=st.sets(st.integers(0, 39), max_size=4),
    live=st.booleans(),
)
def test_no_frame_and_no_jump_is_lost_silently(
    num_frames, jumps, every, policy, queue_frames, staleness_seconds, stop_after, pauses, live
):
    """Whatever the policy, the queue, the sampler, pauses of the consumer and its early end:
    decoded = skipped + dropped + handed; frames come in order; and a frame is marked as the first
    after a jump of the clock exactly where one lies between it and the frame handed before.
    """
    script = [make_frame(i, jumped=i in jumps) for i in range(num_frames)]
    telemetry = Telemetry()
    handed = []
    with read_ahead(
        ScriptedSource(script, is_live=live),
        telemetry,
        sampler=SamplerSettings(mode="every", every=every),
        policy=policy,
        queue_frames=queue_frames,
        staleness_seconds=staleness_seconds,
    ) as reader:
        frames = (f for f in reader.frames(idle_seconds=0.5) if f is not None)
        while len(handed) < stop_after and (frame := next(frames, None)) is not None:
            handed.append(frame.info)
            if frame.info.index in pauses:
                time.sleep(0.003)
    check_law(telemetry.counts(), len(handed))
    assert not readers()
    before = -1
    for info in handed:
        assert info.index > before
        assert info.discontinuity == any(before < jump <= info.index for jump in jumps)
        before = info.index
    if (policy == "wait" or (policy == "auto" and not live)) and stop_after > num_frames:
        assert [i.index for i in handed] == list(range(0, num_frames, every))


@pytest.mark.parametrize("queue_frames", [1, 2, 5])
def test_a_jump_survives_the_drop_of_its_frame(queue_frames):
    """With a consumer that takes nothing until the end, the oldest frame left carries the jump
    that was dropped, even from a queue of one.
    """
    telemetry = Telemetry()
    source = ScriptedSource([make_frame(i, jumped=i == 3) for i in range(12)])
    with read_ahead(source, telemetry, policy="drop_oldest", queue_frames=queue_frames) as reader:
        wait_until(source.closed.is_set)
        left = [f.info for f in reader.frames(idle_seconds=0.5) if f is not None]
    assert [i.index for i in left] == list(range(12 - queue_frames, 12))
    assert [i.discontinuity for i in left] == [True] + [False] * (queue_frames - 1)
    assert telemetry.counts()[Count.DROPPED_QUEUE] == 12 - queue_frames
    assert telemetry.counts()[Count.DISCONTINUITIES] == 1


def test_stale_frames_are_dropped_but_never_the_newest():
    """After a long pause of the consumer, waiting frames are counted as stale and the newest one,
    marked with the jump among them, is handed over.
    """
    telemetry = Telemetry()
    source = ScriptedSource([make_frame(i, jumped=i == 1) for i in range(6)])
    with read_ahead(source, telemetry, policy="drop_oldest", staleness_seconds=0.02) as reader:
        wait_until(source.closed.is_set)
        time.sleep(0.05)
        left = [f.info for f in reader.frames(idle_seconds=0.5) if f is not None]
    assert [(i.index, i.discontinuity) for i in left] == [(5, True)]
    assert telemetry.counts()[Count.DROPPED_STALE] == 5


@pytest.mark.parametrize(("is_live", "lost"), [(True, 8), (False, 0)])
def test_auto_drops_live_frames_and_waits_for_files(is_live, lost):
    """``auto`` drops the oldest frames of a live stream that is too fast, and none of a file."""
    telemetry = Telemetry()
    source = ScriptedSource([make_frame(i) for i in range(10)], is_live=is_live)
    with read_ahead(source, telemetry, queue_frames=2) as reader:
        if is_live:
            wait_until(source.closed.is_set)
        handed = [f for f in reader.frames(idle_seconds=0.5) if f is not None]
    assert len(handed) == 10 - lost
    assert telemetry.counts()[Count.DROPPED_QUEUE] == lost


@pytest.mark.parametrize("queue_frames", [1, 100])
def test_reading_ahead_is_bounded(queue_frames):
    """A reader that waits holds one frame and has one in hand, however long source and queue; each
    that is taken makes room for one.
    """
    telemetry = Telemetry()
    source = ScriptedSource(make_frame(i) for i in range(10**9))
    with read_ahead(source, telemetry, policy="wait", queue_frames=queue_frames) as reader:
        for num_decoded in (2, 3, 4):
            wait_until(lambda wanted=num_decoded: telemetry.counts()[Count.DECODED] == wanted)
            time.sleep(0.05)
            assert telemetry.counts()[Count.DECODED] == num_decoded
            next(reader.frames(idle_seconds=1.0))


@pytest.mark.parametrize("every", [1, 3])
def test_a_frame_is_free_before_the_next_is_decoded(every):
    """Neither a frame that was passed over nor one that was taken is held while the source works on
    the next one.
    """
    kept = []

    def script():
        before = None
        for index in range(9):
            if before is not None:
                end = time.monotonic() + 5.0  # the other thread may be on its way to let go
                while before() is not None and time.monotonic() < end:
                    time.sleep(0.001)
                kept.append(before() is not None)
            samples = np.zeros((16, 16, 3), np.uint8)
            before = weakref.ref(samples)
            frame = replace(make_frame(index), planes=Planes((samples,), full_range=True))
            del samples
            yield frame
            del frame

    sampler = SamplerSettings(mode="every", every=every)
    with read_ahead(ScriptedSource(script()), Telemetry(), sampler=sampler) as reader:
        for frame in reader.frames(idle_seconds=1.0):
            del frame
    assert kept == [False] * 8


def test_an_error_comes_after_the_frames_before_it():
    """All frames that were decoded before the fault are handed over, then the fault is raised."""
    telemetry = Telemetry()
    fault = SourceUnavailable("gone")
    source = ScriptedSource([make_frame(0), make_frame(1), fault])
    got = []
    with (
        read_ahead(source, telemetry) as reader,
        pytest.raises(SourceUnavailable, match="gone"),
    ):
        got.extend(reader.frames(idle_seconds=0.5))
    assert [f.info.index for f in got if f is not None] == [0, 1]
    check_law(telemetry.counts(), 2)
    assert source.closed.is_set()


def test_what_fails_to_open_is_raised_by_the_loop():
    """The opener's own error reaches the consumer; the stream's facts stay unknown."""

    def fail():
        raise SourceUnavailable("no such host")

    with (
        read_ahead(fail, Telemetry()) as reader,
        pytest.raises(SourceUnavailable, match="no such host"),
    ):
        list(reader.frames(idle_seconds=0.5))
    assert reader.info is None


def test_opening_has_a_deadline(monkeypatch, short_exit):
    """An opener that ignores its deadline is given up, with a hint; what it opens is closed."""
    monkeypatch.setattr(reader_module, "_OPEN_GRACE_SECONDS", 0.05)
    gate, source = threading.Event(), ScriptedSource([make_frame(0)])

    def open_slowly():
        gate.wait(60)
        return source

    begin = time.monotonic()
    with (
        read_ahead(open_slowly, Telemetry(), open_timeout_seconds=0.1) as reader,
        pytest.raises(SourceUnavailable, match=r"within 0\.1 s.*source\.open_timeout_seconds"),
    ):
        list(reader.frames(idle_seconds=0.02))
    assert time.monotonic() - begin < 10.0
    assert reader.has_left_thread
    gate.set()
    wait_until(lambda: not readers())
    assert source.closed.is_set()
    assert not reader.has_left_thread


def test_silence_is_told():
    """While a source waits for data, the loop gets None about every ``idle_seconds``, and once
    more behind the last frame.
    """
    gate = threading.Event()
    source = ScriptedSource([make_frame(0), gate, make_frame(1)])
    got = []
    with read_ahead(source, Telemetry()) as reader:
        for frame in reader.frames(idle_seconds=0.02):
            got.append(frame)
            if got.count(None) >= 3:
                gate.set()
    assert got[0] is not None
    assert got[0].info.index == 0
    assert got[-2] is not None
    assert got[-2].info.index == 1


def test_leaving_does_not_wait_for_a_blocked_read(short_exit):
    """With the source stuck in a read of a minute, the block ends at once, says that a thread is
    left, and the thread ends, without its frame being counted, once the read returns.
    """
    gate, telemetry = threading.Event(), Telemetry()
    source = ScriptedSource([make_frame(0), gate, make_frame(1)])
    begin = time.monotonic()
    with read_ahead(source, telemetry) as reader:
        next(reader.frames(idle_seconds=1.0))
    assert time.monotonic() - begin < 10.0
    assert reader.has_left_thread
    gate.set()
    wait_until(lambda: not readers())
    check_law(telemetry.counts(), 1)


def test_leaving_frees_a_reader_that_waits_for_room():
    """A reader held up by a full queue ends at once when the block is left."""
    telemetry = Telemetry()
    source = ScriptedSource(make_frame(i) for i in range(10**9))
    with (
        contextlib.suppress(KeyError),
        read_ahead(source, telemetry, policy="wait", queue_frames=1) as reader,
    ):
        next(reader.frames(idle_seconds=1.0))
        raise KeyError
    assert not readers()
    assert not reader.has_left_thread
    check_law(telemetry.counts(), 1)


def test_damage_is_counted():
    """Corrupt frames are counted once each, and decode errors even after the last frame."""
    telemetry = Telemetry()
    script = [make_frame(i, corrupt=i in (1, 2)) for i in range(4)]
    with read_ahead(ScriptedSource(script, errors_at_end=3), telemetry) as reader:
        list(reader.frames(idle_seconds=0.5))
    assert telemetry.counts()[Count.CORRUPT] == 2
    assert telemetry.counts()[Count.DECODE_ERRORS] == 3


def test_leaving_closes_the_source_first():
    """A source that waits until it is closed is closed while it waits: no thread is left."""
    source = ScriptedSource([make_frame(0), UNTIL_CLOSED, make_frame(1)])
    with read_ahead(source, Telemetry()) as reader:
        next(reader.frames(idle_seconds=1.0))
    assert not reader.has_left_thread
    assert not readers()


class SlowSampler:
    """Wants every frame, once a gate is open."""

    def __init__(self):
        self.gate = threading.Event()

    def wants(self, info):
        """Wait for the gate."""
        return self.gate.wait(60)


def test_a_frame_that_is_late_for_the_end_is_counted(short_exit):
    """A frame that the left thread brings after the block has ended counts as dropped."""
    sampler, telemetry = SlowSampler(), Telemetry()
    with read_ahead(ScriptedSource([make_frame(0)]), telemetry, sampler=sampler):
        wait_until(lambda: telemetry.counts()[Count.DECODED] == 1)
    sampler.gate.set()
    wait_until(lambda: not readers())
    check_law(telemetry.counts(), 0)


def test_a_source_that_fails_to_close_is_told(monkeypatch):
    """What closing raises in the reader is raised by the loop; it never hangs it."""

    def fail(self):
        raise RuntimeError("cannot close")

    monkeypatch.setattr(ScriptedSource, "close", fail)
    reader = read_ahead(ScriptedSource([make_frame(0)]), Telemetry())
    reader._thread.start()
    frames = reader.frames(idle_seconds=0.5)
    assert next(frames) is not None
    with pytest.raises(RuntimeError, match="cannot close"):
        list(frames)
