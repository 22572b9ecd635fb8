"""pipeline: what a session sends, in which order, what it counts, and how it ends."""

from __future__ import annotations

import sys
import threading
import time
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dgiqa_stream import pipeline, session
from dgiqa_stream.config import StreamConfig, parse_config
from dgiqa_stream.errors import ConfigError, ModelError, SinkError, SourceError, SourceUnavailable
from dgiqa_stream.frame_scoring import FrameScoring
from dgiqa_stream.manifest import LoadedModel
from dgiqa_stream.pipeline import Monitor, score_frames
from dgiqa_stream.scorer import Scorer, load_scorer
from dgiqa_stream.sinks.memory import MemorySink
from dgiqa_stream.sources.pattern import PatternSource, PatternSpec
from dgiqa_stream.telemetry import Count, Telemetry
from dgiqa_stream.types import Frame, FrameInfo, Planes, StreamInfo
from dgiqa_stream.wire import (
    FinalMessage,
    FrameMessage,
    MetaMessage,
    StatusMessage,
    ThumbnailMessage,
    WindowMessage,
)

EVERY = {"sampler": {"mode": "every"}}
PATTERN = "pattern:clean?size=64x48&fps=25&seconds=1"


class GreySource:
    """Grey frames of given brightness, 10 to the second; it can wait and fail between them."""

    num_corrupt = 0
    num_decode_errors = 0

    def __init__(self, script, *, is_live=False, keyframes=True, size=(48, 64)):
        self.info = StreamInfo(
            size[1], size[0], "grey", "gray", Fraction(10), None, None, is_live, "grey"
        )
        self._script, self._keyframes, self._size = script, keyframes, size
        self._stop = threading.Event()

    def frames(self):
        """As the script says."""
        index = 0
        for item in self._script:
            if self._stop.is_set():
                return
            if isinstance(item, BaseException):
                raise item
            if isinstance(item, threading.Event):
                item.wait(60)
            elif isinstance(item, float):
                self._stop.wait(item)
            else:
                yield self._frame(index, item)
                index += 1

    def _frame(self, index, level):
        height, width = self._size
        info = FrameInfo(
            index=index,
            pts_seconds=index / 10,
            duration_seconds=0.1,
            pts=index,
            time_base=Fraction(1, 10),
            width=width,
            height=height,
            pix_fmt="gray",
            keyframe=self._keyframes,
            received_at_seconds=time.time(),
        )
        planes = Planes((np.full(self._size, level, np.uint8),), full_range=True)
        return Frame(planes, info, "grey")

    def close(self):
        """End the waiting, and the frames."""
        self._stop.set()


@pytest.fixture(autouse=True)
def no_thread_is_left():
    """Every test ends with the threads it began with."""
    before = set(threading.enumerate())
    yield
    end = time.monotonic() + 30
    while set(threading.enumerate()) - before:
        assert time.monotonic() < end, set(threading.enumerate()) - before
        time.sleep(0.01)


def watch(url, scorer, /, *, sinks=(), stream="s", on_score=None, **tables):
    """Run a monitor to its end; its result and the messages."""
    memory = MemorySink()
    monitor = Monitor(
        url,
        stream=stream,
        config=parse_config({**EVERY, **tables}),
        scorer=scorer,
        sinks=[memory, *sinks],
        on_score=on_score,
    )
    return monitor.run(), memory


def grey(*script, **options):
    """A function that opens a grey source."""
    return lambda: GreySource(script, **options)


def check_laws(counts):
    """Each decoded frame is accounted for, and each one handed over is scored or failed."""
    assert counts[Count.DECODED] == (
        counts[Count.SKIPPED]
        + counts[Count.DROPPED_QUEUE]
        + counts[Count.DROPPED_STALE]
        + counts[Count.HANDED]
    )
    assert counts[Count.HANDED] == counts[Count.SCORED] + counts[Count.FAILED]


def check_order(messages):
    """``connecting`` is first, ``meta`` before any score, and after ``final`` only the end."""
    kinds = [m.kind for m in messages]
    states = [m.state for m in messages if isinstance(m, StatusMessage)]
    assert states[0] == "connecting"
    assert kinds[-2:] == ["final", "status"]
    assert kinds.count("final") == 1
    assert states[-1] in ("ended", "failed")
    assert not {"ended", "failed"} & set(states[:-1])
    if "frame" in kinds:
        assert kinds.index("meta") < kinds.index("frame")
    for topic in set(kinds):
        numbers = [m.seq for m in messages if m.kind == topic]
        assert numbers == list(range(len(numbers)))


@pytest.mark.parametrize(
    ("crop", "is_beyond"), [((0, 0, 9999, 10), True), ((0, 0, 64, 48), False), ((), False)]
)
def test_a_crop_beyond_the_picture_is_warned_of_once(fake_scorer, caplog, crop, is_beyond):
    """What is cut down is told with both sizes, not for every frame; one that fits is not."""
    result, _ = watch(PATTERN, fake_scorer, picture={"crop": crop})
    assert result.counts[Count.SCORED] > 1
    told = [r.getMessage() for r in caplog.records if "crop" in r.getMessage()]
    assert len(told) == is_beyond
    assert all("0,0,9999,10 reaches beyond the 64x48 picture" in text for text in told)


def test_a_session_tells_its_story_in_order(fake_scorer):
    """Connecting, meta, running, scores and windows, thumbnails, the summary, ended; and every
    frame of the source is scored once, in order.
    """
    result, memory = watch(PATTERN, fake_scorer)
    check_order(memory.messages)
    assert [m.state for m in memory.of(StatusMessage)] == ["connecting", "running", "ended"]
    assert [m.frame.index for m in memory.of(FrameMessage)] == list(range(25))
    assert memory.of(MetaMessage)[0].source.width == 64
    (final,) = memory.of(FinalMessage)
    assert final.reason == result.reason == "end_of_stream"
    assert final.n == 25
    assert final.counts == {str(name): number for name, number in result.counts.items()}
    assert result.counts[Count.SCORED] == 25
    check_laws(result.counts)


def test_the_summary_is_the_pool_of_the_frames(fake_scorer):
    """Brightness as the score: the mean, minimum and headline of the summary are those of the
    frames that were sent.
    """
    result, memory = watch(grey(*[51, 102, 204] * 5), fake_scorer)
    scores = [m.quality.score for m in memory.of(FrameMessage)]
    assert scores == pytest.approx([20, 40, 80] * 5, abs=0.3)
    assert result.session is not None
    assert result.session.pool["mean"] == pytest.approx(np.mean(scores))
    assert result.session.pool["min"] == pytest.approx(min(scores))
    assert memory.of(FinalMessage)[0].score == pytest.approx(result.session.score)
    assert memory.of(WindowMessage)


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    num_frames=st.integers(0, 25),
    every=st.integers(1, 3),
    policy=st.sampled_from(["auto", "wait", "drop_oldest"]),
    queue_frames=st.integers(1, 4),
    live=st.booleans(),
    ending=st.sampled_from(["end", "fault", "stop", "model"]),
    at=st.integers(0, 24),
    slow=st.booleans(),
)
def test_the_counts_add_up_however_it_ends(
    fake_scorer, num_frames, every, policy, queue_frames, live, ending, at, slow
):
    """Whatever the policy, the sampler, the speed and the way it ends: decoded = skipped + dropped
    + handed, handed = scored + failed, ``final`` is last but one, and it says the same.
    """
    script = [100] * num_frames
    if ending == "fault":
        script.insert(min(at, num_frames), SourceUnavailable("gone"))
    failing = FailingScorer(fake_scorer, at if ending == "model" else None)
    monitor = Monitor(
        grey(*script, is_live=live),
        stream="s",
        config=parse_config(
            {
                "sampler": {"mode": "every", "every": every},
                "overload": {"policy": policy, "queue_frames": queue_frames},
            }
        ),
        scorer=failing,
        sinks=[memory := MemorySink()],
        on_score=lambda score: react(score),
    )

    def react(score):
        if slow:
            time.sleep(0.002)
        if ending == "stop" and score.info.index >= at:
            monitor.stop()

    result = monitor.run()
    check_laws(result.counts)
    check_order(memory.messages)
    (final,) = memory.of(FinalMessage)
    assert final.counts == {str(name): number for name, number in result.counts.items()}
    assert len(memory.of(FrameMessage)) == result.counts[Count.SCORED]
    assert (result.reason == "failed") == (result.error is not None)
    if ending == "fault":
        assert isinstance(result.error, SourceUnavailable)


class FailingScorer(Scorer):
    """A scorer whose model fails at the Nth frame."""

    def __init__(self, scorer, fails_at):
        super().__init__(LoadedModel("x", scorer.manifest), scorer._backend)
        self._left = fails_at

    def infer(self, batch):
        """Fail where it is time to."""
        if self._left is not None:
            self._left -= 1
            if self._left < 0:
                raise ModelError("the device went away")
        return super().infer(batch)


def test_a_model_that_fails_ends_the_session_with_its_words(fake_scorer):
    """A ModelError in mid-stream is the session's error, and its frame is counted as failed."""
    result, memory = watch(grey(*[9] * 9), FailingScorer(fake_scorer, 4))
    assert isinstance(result.error, ModelError)
    assert result.counts[Count.FAILED] == 1
    assert result.counts[Count.SCORED] == 4
    assert memory.of(StatusMessage)[-1].error.detail == "the device went away"
    check_laws(result.counts)


def test_the_way_from_decoded_to_published_is_timed(fake_scorer):
    """Each scored frame is one time ``end_to_end``; a sink that takes 20 ms is in it, and what the
    status says is in order: p50, p95, p99.
    """

    class SlowSink(MemorySink):
        def send(self, message):
            time.sleep(0.02 if isinstance(message, FrameMessage) else 0)

    result, memory = watch(grey(*[9] * 12), fake_scorer, sinks=[SlowSink()])
    told = memory.of(StatusMessage)[-1].stages["end_to_end"]
    assert told.n == result.counts[Count.SCORED] == 12
    assert told.sum_s >= 12 * 0.02
    assert 0.019 <= told.p50_s <= told.p95_s <= told.p99_s


def test_a_source_that_fails_keeps_what_came_before(fake_scorer):
    """Frames before the fault are scored; the summary and the last status carry the error."""
    result, memory = watch(grey(10, 20, 30, SourceUnavailable("rtsp://u:pw@h/ gone")), fake_scorer)
    check_order(memory.messages)
    assert isinstance(result.error, SourceUnavailable)
    assert result.reason == "failed"
    assert result.session is not None
    assert result.session.num_frames == 3
    (final,) = memory.of(FinalMessage)
    last = memory.of(StatusMessage)[-1]
    assert last.state == "failed"
    assert final.error == last.error
    assert last.error.code == "source_unavailable"
    assert "pw" not in last.error.detail


def test_a_source_that_never_opens_has_a_summary_without_scores(fake_scorer):
    """Opening that fails gives no meta, a final without frames, and a failed status."""
    result, memory = watch("missing.mp4", fake_scorer)
    check_order(memory.messages)
    assert isinstance(result.error, SourceError)
    assert result.session is None
    assert memory.of(MetaMessage) == []
    assert memory.of(FinalMessage)[0].n == 0
    assert memory.of(FinalMessage)[0].pool == {}


def test_an_open_source_without_a_wanted_frame_is_still_described(fake_scorer):
    """A stream without key frames, sampled by key frames, has its meta and an empty summary."""
    result, memory = watch(
        grey(*[50] * 5, keyframes=False), fake_scorer, sampler={"mode": "keyframes"}
    )
    check_order(memory.messages)
    assert len(memory.of(MetaMessage)) == 1
    assert result.session is None
    assert result.error is None
    assert result.counts[Count.SKIPPED] == 5


@pytest.mark.parametrize("error", [RuntimeError("a bug"), KeyboardInterrupt()])
def test_an_error_of_the_host_is_raised_after_the_last_word(fake_scorer, error):
    """What a callback raises leaves ``run``, and subscribers still hear the end."""
    memory = MemorySink()

    def fail(score):
        raise error

    monitor = Monitor(PATTERN, scorer=fake_scorer, sinks=[memory], on_score=fail)
    with pytest.raises(type(error)):
        monitor.run()
    check_order(memory.messages)
    interrupted = isinstance(error, KeyboardInterrupt)
    assert memory.of(FinalMessage)[0].reason == ("interrupted" if interrupted else "failed")


class FailingSink(MemorySink):
    """A sink whose disk is full after a number of messages."""

    def __init__(self, after):
        super().__init__()
        self._left = after

    def send(self, message):
        """Fail once it is full."""
        self._left -= 1
        if self._left < 0:
            raise SinkError("cannot write x: no space left")
        super().send(message)


@pytest.mark.parametrize("after", [0, 1, 5, 10**6])
def test_a_sink_that_fails_is_dropped_and_the_rest_go_on(fake_scorer, after):
    """A full disk ends one sink: it gets nothing more, the other gets everything, and the error is
    told once.
    """
    broken = FailingSink(after)
    result, memory = watch(PATTERN, fake_scorer, sinks=[broken])
    check_order(memory.messages)
    assert len(memory.of(FrameMessage)) == 25
    fails = after < 100
    assert [str(e) for e in result.sink_errors] == ["cannot write x: no space left"] * fails
    assert result.counts[Count.SINK_ERRORS] == fails
    assert result.error is None
    assert len(broken.messages) == min(after, len(memory.messages))


def stop_after(monitor, seconds):
    """Stop from another thread; the seconds that ``run`` then took to end, and its result."""
    stopped_at = []

    def stop():
        stopped_at.append(time.monotonic())
        monitor.stop()

    timer = threading.Timer(seconds, stop)
    timer.start()
    result = monitor.run()
    took = time.monotonic() - stopped_at[0]
    timer.join()
    return took, result


@pytest.mark.parametrize("where", ["opening", "reading", "pacing", "scoring"])
def test_stop_ends_it_at_once(fake_scorer, where):
    """``stop`` from another thread ends ``run``, with its summary, while the source blocks for a
    minute in opening or reading, waits for its pace, or keeps the scorer busy.
    """
    gate = threading.Event()

    def open_slowly():
        gate.wait(60)
        return GreySource([1])

    sources = {
        "opening": open_slowly,
        "reading": grey(10, 20, gate, 30),
        "pacing": "pattern:clean?size=64x48&seconds=60",
        "scoring": "pattern:clean?size=64x48&seconds=3600",
    }
    memory = MemorySink()
    monitor = Monitor(
        sources[where],
        stream="s",
        config=parse_config({**EVERY, "source": {"realtime": where == "pacing"}}),
        scorer=fake_scorer,
        sinks=[memory],
    )
    took, result = stop_after(monitor, 0.3)
    gate.set()
    assert took < 8.0  # less than a second, on an idle machine
    assert result.reason == "interrupted"
    assert result.error is None
    assert (result.session is None) == (where == "opening")
    check_order(memory.messages)
    check_laws(result.counts)


def test_stopping_before_running_ends_it_at_once(fake_scorer):
    """A monitor stopped early opens, tells its end and returns."""
    memory = MemorySink()
    monitor = Monitor("pattern:clean?seconds=3600", scorer=fake_scorer, sinks=[memory])
    monitor.stop()
    assert monitor.run().reason == "interrupted"
    check_order(memory.messages)


def test_a_monitor_may_run_again(fake_scorer):
    """A second run is a new session that counts from zero."""
    memory = MemorySink()
    monitor = Monitor(PATTERN, config=parse_config(EVERY), scorer=fake_scorer, sinks=[memory])
    first, second = monitor.run(), monitor.run()
    assert first.counts[Count.SCORED] == second.counts[Count.SCORED] == 25
    assert len({m.session for m in memory.of(FinalMessage)}) == 2
    assert first.session == second.session


def test_two_monitors_share_a_scorer(fake_scorer):
    """Run side by side on one scorer and one sink, two streams give what each gives alone."""
    urls = {name: f"pattern:{name}?size=64x48&seconds=2" for name in ("clean", "noisy")}
    alone = {name: watch(url, fake_scorer, stream=name)[0] for name, url in urls.items()}
    memory, together = MemorySink(), {}

    def run(name, url):
        monitor = Monitor(
            url, stream=name, config=parse_config(EVERY), scorer=fake_scorer, sinks=[memory]
        )
        together[name] = monitor.run()

    threads = [threading.Thread(target=run, args=item) for item in urls.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name in urls:
        assert together[name].session == alone[name].session
        check_order([m for m in memory.messages if m.stream == name])


def test_a_silent_live_stream_is_stalled_and_runs_again(fake_scorer, monkeypatch):
    """Silence longer than two periods is told as ``stalled``, the next frame as ``running``."""
    monkeypatch.setattr(session, "_SHORTEST_STALL_SECONDS", 1.5)
    monkeypatch.setattr(pipeline, "_IDLE_SECONDS", 0.02)
    stalled = threading.Event()

    class Watchful(MemorySink):
        def send(self, message):
            super().send(message)
            if isinstance(message, StatusMessage) and message.state == "stalled":
                stalled.set()

    _, memory = watch(grey(10, 20, stalled, 30, is_live=True), fake_scorer, sinks=[Watchful()])
    states = [m.state for m in memory.of(StatusMessage)]
    assert states == ["connecting", "running", "stalled", "running", "ended"]


def test_frames_that_are_passed_over_are_no_silence(fake_scorer, monkeypatch):
    """A live stream whose frames the sampler skips is running, not stalled."""
    monkeypatch.setattr(session, "_SHORTEST_STALL_SECONDS", 1.5)
    monkeypatch.setattr(pipeline, "_IDLE_SECONDS", 0.02)
    script = [item for level in range(20) for item in (level, 0.1)]
    result, memory = watch(
        grey(*script, is_live=True), fake_scorer, sampler={"mode": "every", "every": 1000}
    )
    assert result.counts[Count.SKIPPED] == 19
    assert "stalled" not in [m.state for m in memory.of(StatusMessage)]


def test_the_state_is_told_again_and_again(fake_scorer):
    """A status comes at least every ``status_seconds``, with counts that grow."""
    _, memory = watch(
        "pattern:clean?size=64x48&seconds=2",
        fake_scorer,
        source={"realtime": True},
        publish={"status_seconds": 0.1},
    )
    beats = [m.counts["scored"] for m in memory.of(StatusMessage) if m.state == "running"]
    assert len(beats) >= 4
    assert beats == sorted(beats)
    assert beats[-1] > beats[0]


def framed(rows, columns, *, bars):
    """A pattern's frames, and the same ones with black bars around them."""
    plain = list(PatternSource(PatternSpec(width=columns, height=rows, seconds=0.2)).frames())
    top, side = bars
    boxed = []
    for frame in plain:
        luma, cb, cr = frame.planes.samples
        samples = (
            np.pad(luma, ((top, top), (side, side)), constant_values=16),
            np.pad(cb, ((top // 2,) * 2, (side // 2,) * 2), constant_values=128),
            np.pad(cr, ((top // 2,) * 2, (side // 2,) * 2), constant_values=128),
        )
        boxed.append(Frame(Planes(samples), frame.info, "boxed"))
    return plain, boxed


@pytest.mark.parametrize("bars", [(40, 0), (0, 100)], ids=["letterbox", "pillarbox"])
@pytest.mark.parametrize("how", ["letterbox", "crop"])
def test_bars_do_not_change_the_score(bars, how):
    """A picture in black bars scores as it does without them, whether they are detected (to within
    a line or two at their edge) or cut by a crop; taken along, they change the score.
    """
    plain, boxed = framed(180, 320, bars=bars)
    top, side = bars

    def scores(frames, **picture):
        config = parse_config({"picture": picture})
        scoring = FrameScoring(scorer, config.picture, Telemetry())
        return np.array([scoring(frame).score for frame in frames])

    with load_scorer("student-fp32") as scorer:
        alone = scores(plain, letterbox=False)
        if how == "crop":
            cut = scores(boxed, crop=[side, top, 320, 180])
            assert cut == pytest.approx(alone, abs=1e-9)
        else:
            assert scores(boxed, letterbox=True) == pytest.approx(alone, abs=1.0)
        assert np.abs(scores(boxed, letterbox=False) - alone).max() > 1.5


def test_a_crop_outside_the_picture_ends_the_session(fake_scorer):
    """The session fails with a ConfigError that names both sizes; its one frame has failed."""
    result, memory = watch(PATTERN, fake_scorer, picture={"crop": [500, 0, 20, 20]})
    assert isinstance(result.error, ConfigError)
    assert "500,0,20,20" in str(result.error)
    assert "64x48" in str(result.error)
    assert result.counts[Count.FAILED] == result.counts[Count.HANDED] == 1
    check_order(memory.messages)
    check_laws(result.counts)


@pytest.mark.parametrize("num", [0, 1, 3])
def test_the_worst_frames_are_kept(fake_scorer, num):
    """As many thumbnails as asked for, of the darkest seconds, worst first, named in ``final``."""
    levels = [200] * 60
    levels[5], levels[25], levels[45] = 30, 10, 20
    result, memory = watch(grey(*levels), fake_scorer, output={"thumbnails": num})
    worst = [25, 45, 5][:num]
    assert [t.frame.info.index for t in result.worst] == worst
    assert [m.index for m in memory.of(ThumbnailMessage)] == worst
    assert [w.index for w in memory.of(FinalMessage)[0].worst] == worst


def test_hdr_is_marked(fake_scorer, media):
    """Scores of PQ frames say that they are outside of what the model knows; SDR ones do not."""
    config = parse_config(EVERY)
    assert not any(s.in_domain for s in score_frames(str(media["pq"]), fake_scorer, config=config))
    assert all(s.in_domain for s in score_frames(str(media["full"]), fake_scorer, config=config))


def test_score_frames_gives_every_frame_and_tells_of_the_source(fake_scorer, media):
    """Each frame comes once, in order, after ``on_open`` was called once."""
    opened = []
    found = score_frames(
        str(media["vfr"]), fake_scorer, config=parse_config(EVERY), on_open=opened.append
    )
    assert [s.info.index for s in found] == list(range(12))
    assert [info.width for info in opened] == [320]


def test_closing_the_iterator_stops_the_reader(fake_scorer):
    """After closing, no thread reads on (checked for every test here) and counts add up."""
    telemetry = Telemetry()
    frames = score_frames(
        "pattern:clean?seconds=3600",
        fake_scorer,
        config=parse_config(EVERY),
        telemetry=telemetry,
    )
    next(frames)
    frames.close()
    check_laws(telemetry.counts())
    assert telemetry.counts()[Count.SCORED] == 1


def test_what_a_device_needs_is_loaded_before_the_source(fake_scorer, media, tmp_path, monkeypatch):
    """The plugin of ``source.hardware`` is loaded by the caller's thread, so that the seconds that
    torch takes do not count as the source's time to open.
    """
    (tmp_path / "slow_decoder.py").write_text(
        "import threading\n"
        "loaded_by = threading.current_thread()\n"
        "class Absent:\n"
        "    why_not = staticmethod(lambda: 'no driver')\n"
        "open_decoder = lambda device: Absent\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(
        "dgiqa_stream.sources._hardware.DECODERS", {"cuda": ("slow_decoder", "gpu")}
    )
    config = parse_config({**EVERY, "source": {"hardware": "cuda"}})
    assert len(list(score_frames(str(media["vfr"]), fake_scorer, config=config))) > 0
    assert sys.modules.pop("slow_decoder").loaded_by is threading.current_thread()


def test_score_frames_raises_after_the_frames_before(fake_scorer, media):
    """A source that cannot be opened raises on the first step, naming the file."""
    with pytest.raises(SourceError, match=r"text\.mp4"):
        next(score_frames(str(media["text"]), fake_scorer, config=StreamConfig()))


def test_every_message_of_a_run_shares_its_id(fake_scorer):
    """``run`` given from outside is in every message, and the stream's name too."""
    memory = MemorySink()
    Monitor(PATTERN, stream="cam-1", scorer=fake_scorer, sinks=[memory], run="R" * 26).run()
    found = Counter((m.run, m.stream) for m in memory.messages)
    assert list(found) == [("R" * 26, "cam-1")]


def test_a_monitor_without_a_scorer_opens_the_configured_one():
    """The model of the configuration is used; one that cannot be opened raises before anything is
    sent.
    """
    memory = MemorySink()
    fake = parse_config({"model": {"backend": "fake"}})
    assert Monitor(PATTERN, config=fake, sinks=[memory]).run().session is not None
    assert memory.of(MetaMessage)[0].model.backend.active == "fake:cpu"
    unheard = MemorySink()
    broken = parse_config({"model": {"name": "absent"}})
    with pytest.raises(ModelError, match="absent"):
        Monitor(PATTERN, config=broken, sinks=[unheard]).run()
    assert unheard.messages == []
