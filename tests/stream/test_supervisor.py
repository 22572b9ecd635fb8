"""supervisor: a live source that goes away is opened again, told and timed as promised."""

from __future__ import annotations

import contextlib
import itertools
import socket
import threading
import time

import media_servers as servers
import msgspec
import pytest

from dgiqa_stream.config import ReconnectSettings, SourceSettings, StreamConfig
from dgiqa_stream.errors import SourceUnavailable
from dgiqa_stream.pipeline import Monitor
from dgiqa_stream.sinks.memory import MemorySink
from dgiqa_stream.sources import open_source
from dgiqa_stream.supervisor import ReconnectingSource
from dgiqa_stream.telemetry import Count

PATIENCE_SECONDS = 60.0
QUICK = ReconnectSettings(enabled=True, first_wait_seconds=0.05, longest_wait_seconds=0.4)
LIVE = SourceSettings(realtime=True)


def pattern(seconds, **settings):
    """A live source that ends after a while: 25 frames a second, faster than its clock."""
    url = f"pattern:clean?size=64x48&seconds={seconds}"
    return open_source(url, msgspec.structs.replace(LIVE, **settings), stream="s")


@contextlib.contextmanager
def watching(url, scorer, **source):
    """A monitor in a thread, and what its sink has been given; stopped at the end."""
    patient = {"open_timeout_seconds": 5.0, "read_timeout_seconds": 2.0, **source}
    config = StreamConfig(source=SourceSettings(**patient), reconnect=QUICK)
    sink = MemorySink()
    monitor = Monitor(url, stream="cam", config=config, scorer=scorer, sinks=[sink])
    results = []
    thread = threading.Thread(target=lambda: results.append(monitor.run()))
    thread.start()
    try:
        yield monitor, sink, results
    finally:
        monitor.stop()
        thread.join()


def wait_for(is_so, what):
    """Until it is so, patiently."""
    end = time.monotonic() + PATIENCE_SECONDS
    while not is_so():
        assert time.monotonic() < end, what
        time.sleep(0.02)


def messages(sink, kind):
    """Those of one kind, in order."""
    return [m for m in list(sink.messages) if m.kind == kind]


def states(sink):
    """Of the stream, each once in a row."""
    return [state for state, _ in itertools.groupby(m.state for m in messages(sink, "status"))]


@pytest.fixture
def clip(tmp_path, missing_server):
    """Ten seconds to serve."""
    servers.require_ffmpeg(missing_server)
    path = tmp_path / "clip.mp4"
    coding = ("-c:v", "libx264", "-preset", "ultrafast", "-g", "25", "-pix_fmt", "yuv420p")
    noise = "testsrc2=size=160x96:rate=25:duration=10"
    servers.ffmpeg("-f", "lavfi", "-i", noise, *coding, path)
    return path


def check_the_break(monitor, sink, results):
    """Told with its reason, continuous in time, flagged on the first frame after it, counted."""
    told = states(sink)
    assert told[:2] == ["connecting", "running"]
    away = told.index("reconnecting")
    assert told[away + 1] == "running"
    reasons = [m.error for m in messages(sink, "status") if m.state == "reconnecting"]
    assert all(error is not None and error.code == "source_unavailable" for error in reasons)
    frames = messages(sink, "frame")
    stamps = [m.frame.pts_seconds for m in frames]
    assert all(b > a for a, b in itertools.pairwise(stamps))
    assert sum(m.frame.discontinuity for m in frames) >= 1
    assert results[0].error is None
    assert results[0].counts[Count.RECONNECTS] >= 1


@pytest.mark.servers
def test_a_server_that_is_killed_and_started_again(clip, missing_server, tmp_path, fake_scorer):
    """RTSP: the status says reconnecting while the server is gone, then the stream goes on."""
    servers.require_rtsp_server(missing_server)
    with contextlib.ExitStack() as stack:
        with servers.rtsp_server(clip, tmp_path / "first") as port:
            watched = watching(f"rtsp://127.0.0.1:{port}/open", fake_scorer)
            monitor, sink, results = stack.enter_context(watched)
            wait_for(lambda: len(messages(sink, "frame")) > 3, "no frame came")
        wait_for(lambda: "reconnecting" in states(sink), "nothing was told")
        seen = len(messages(sink, "frame"))
        stack.enter_context(servers.rtsp_server(clip, tmp_path / "second", port=port))
        wait_for(lambda: len(messages(sink, "frame")) > seen + 3, "it did not come back")
        wait_for(lambda: states(sink)[-1] == "running", "it was not told")
        monitor.stop()
        wait_for(lambda: results, "it did not end")
        check_the_break(monitor, sink, results)


@pytest.mark.servers
def test_a_sender_that_falls_silent_and_speaks_again(clip, tmp_path, free_port, fake_scorer):
    """UDP: silence beyond the read timeout is a fault; the next sender is received."""
    url = f"udp://127.0.0.1:{free_port(socket.SOCK_DGRAM)}"
    target = f"{url}?pkt_size=1316"
    with contextlib.ExitStack() as stack:
        with servers.sending(clip, target, "mpegts", tmp_path / "first"):
            monitor, sink, results = stack.enter_context(
                watching(url, fake_scorer, open_timeout_seconds=30.0)
            )
            wait_for(lambda: len(messages(sink, "frame")) > 3, "no frame came")
        wait_for(lambda: "reconnecting" in states(sink), "nothing was told")
        seen = len(messages(sink, "frame"))
        stack.enter_context(servers.sending(clip, target, "mpegts", tmp_path / "second"))
        wait_for(lambda: len(messages(sink, "frame")) > seen + 3, "it did not come back")
        wait_for(lambda: states(sink)[-1] == "running", "it was not told")
        monitor.stop()
        wait_for(lambda: results, "it did not end")
        check_the_break(monitor, sink, results)


def test_the_break_in_time_and_number():
    """Frames of three connections are numbered on; each break takes one frame's duration."""
    source = ReconnectingSource(pattern(0.2), lambda left: pattern(0.2), QUICK, stream="s")
    frames = list(itertools.islice(source.frames(), 15))
    source.close()
    assert [f.info.index for f in frames] == list(range(15))
    stamps = [f.info.pts_seconds for f in frames]
    assert stamps == pytest.approx([stamps[0] + n / 25 for n in range(15)])
    assert [f.info.index for f in frames if f.info.discontinuity] == [5, 10]
    assert source.num_reconnects == 2
    assert source.fault is None


def test_waits_double_up_to_the_longest(refused):
    """Waits are drawn from half to all of 0.05, 0.1, 0.2, 0.4, 0.4… seconds."""
    drawn = []

    def jitter(low, high):
        drawn.append((low, high))
        if len(drawn) == 6:
            source.close()
        return 0.0

    def reopen(left):
        return open_source(f"tcp://127.0.0.1:{refused}", SourceSettings(), stream="s")

    source = ReconnectingSource(pattern(0.1), reopen, QUICK, stream="s", jitter=jitter)
    list(source.frames())
    expected = [(0.025, 0.05), (0.05, 0.1), (0.1, 0.2), (0.2, 0.4), (0.2, 0.4), (0.2, 0.4)]
    assert list(drawn) == [pytest.approx(pair) for pair in expected]
    assert isinstance(source.fault, SourceUnavailable)
    assert "refused" in str(source.fault)


def test_closing_ends_the_wait():
    """While it waits a minute for the next attempt, close() from another thread ends it."""
    slow = ReconnectSettings(enabled=True, first_wait_seconds=120.0, longest_wait_seconds=120.0)
    source = ReconnectingSource(pattern(0.1), lambda left: pattern(0.1), slow, stream="s")
    closer = threading.Timer(0.5, source.close)
    closer.start()
    begin = time.monotonic()
    list(source.frames())
    closer.join()
    assert time.monotonic() - begin < 30.0


def test_a_reached_duration_is_no_break():
    """Once the wanted time has been given, nothing is opened again; after a break, what is left is
    asked for.
    """
    asked = []

    def reopen(left):
        asked.append(left)
        return pattern(0.2, duration_seconds=left)

    source = ReconnectingSource(pattern(0.2), reopen, QUICK, stream="s", duration_seconds=0.48)
    assert len(list(source.frames())) == 12
    assert asked == [pytest.approx(0.28), pytest.approx(0.08)]


@pytest.mark.parametrize("is_wanted", [False, True])
def test_only_what_is_asked_for_and_lasts_is_opened_again(media, fake_scorer, is_wanted):
    """Without the setting nothing is; with it, a file played as live still ends."""
    reconnect = ReconnectSettings(enabled=is_wanted)
    config = StreamConfig(source=LIVE, reconnect=reconnect)
    result = Monitor(str(media["plain"]), config=config, scorer=fake_scorer).run()
    assert (result.reason, result.error) == ("end_of_stream", None)
    assert result.counts[Count.RECONNECTS] == 0
