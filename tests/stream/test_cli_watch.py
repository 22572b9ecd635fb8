"""The command line, watch: live streams in, messages out, in processes of their own."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
import threading
import time

import av
import pytest

from dgiqa_stream.cli._outputs import ReportPlan
from dgiqa_stream.cli._watch import _summary
from dgiqa_stream.errors import SinkError
from dgiqa_stream.session import SessionResult
from dgiqa_stream.subscriber import Subscriber
from dgiqa_stream.telemetry import Count

PATTERN = "pattern:clean?size=64x48&fps=25"
ENDS_WITHIN_SECONDS = 8.0
"""The promise is one second, the rest is for a busy machine; what blocks would go on for 60."""
BLOCKS = ("--open-timeout", "60", "--read-timeout", "60")
FAKE = '[model]\nbackend = "fake"\n[publish]\nendpoint = ""\n'


@pytest.fixture
def start(plain_environment):
    """Start ``watch`` as a process; all are ended when the test is."""
    started = []

    def run(*arguments, publish="", stdin=subprocess.DEVNULL):
        given = map(str, arguments)
        process = subprocess.Popen(
            [sys.executable, "-m", "dgiqa_stream", "watch", f"--publish={publish}", *given],
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=plain_environment,
            text=True,
        )
        started.append(process)
        return process

    yield run
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()


def line_with(process, pattern, seconds=60):
    """Read standard error up to a line that matches; the match."""
    end, seen = time.monotonic() + seconds, ""
    while time.monotonic() < end:
        if select.select([process.stderr], [], [], 0.1)[0]:
            part = os.read(process.stderr.fileno(), 1 << 16).decode()
            seen += part
            if found := re.search(pattern, seen):
                return found
            if not part:
                break
    raise AssertionError(f"no {pattern!r} in {seen!r}")


def end(process, number=signal.SIGINT):
    """Send a signal; the exit code, what was said, and how long it took."""
    begin = time.monotonic()
    process.send_signal(number)
    out, err = process.communicate(timeout=50)
    assert "Traceback" not in err, err
    return process.returncode, out, err, time.monotonic() - begin


@contextlib.contextmanager
def sending_over_udp(path, port):
    """A thread that sends a file's video as MPEG-TS to a local port, at its pace, over and over."""
    stop = threading.Event()

    def send():
        url = f"udp://127.0.0.1:{port}?pkt_size=1316"
        with av.open(str(path)) as file, av.open(url, "w", format="mpegts") as out:
            stream = out.add_stream_from_template(file.streams.video[0])
            packets = [p for p in file.demux(video=0) if p.size]
            length = packets[-1].pts - packets[0].pts + 3600
            for number in itertools.count():
                for packet in packets:
                    copy = av.Packet(bytes(packet))
                    copy.time_base, copy.stream = packet.time_base, stream
                    copy.pts = packet.pts + number * length
                    copy.dts = packet.dts + number * length
                    copy.is_keyframe = packet.is_keyframe
                    out.mux(copy)
                    if stop.wait(0.04):
                        return

    thread = threading.Thread(target=send)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def test_a_live_stream_reaches_a_subscriber(start, media, free_port):
    """MPEG-TS over UDP in, ZeroMQ out: a subscriber in another process hears meta, status, frames
    and windows of the stream, about five frames per second of its time, and after SIGTERM the
    summary of all of them before the state ``ended``; the exit code is 0.
    """
    port = free_port(socket.SOCK_DGRAM)
    with sending_over_udp(media["late_start"], port):
        process = start(
            *(f"udp://127.0.0.1:{port}", "--id", "cam1", *BLOCKS),
            publish="tcp://127.0.0.1:*",
        )
        endpoint = line_with(process, r"publishing on (\S+)\n")[1]
        with Subscriber(endpoint, timeout_seconds=60) as subscriber:
            heard = []
            for message in subscriber:
                heard.append(message)
                kinds = {m.kind for m in heard}
                if {"meta", "status", "window"} <= kinds and len(heard) > 20:
                    break
            assert {"meta", "status", "frame", "window"} <= kinds
            code, _, err, took = end(process, signal.SIGTERM)
            last = list(iter(lambda: subscriber.receive(2.0), None))
            assert not subscriber.gaps
    assert code == 0
    assert took < ENDS_WITHIN_SECONDS
    assert "cam1: interrupted after" in err
    assert {m.stream for m in heard + last} == {"cam1"}
    final = next(m for m in last if m.kind == "final")
    assert final.reason == "interrupted"
    assert last[-1].kind == "status"
    assert last[-1].state == "ended"
    frames = [m for m in heard + last if m.kind == "frame"]
    assert final.n >= len(frames)
    times = [m.frame.pts_seconds for m in frames]
    assert times == sorted(times)
    assert (len(times) - 1) / (times[-1] - times[0]) == pytest.approx(5, rel=0.3)
    assert all(0 <= m.quality.score <= 100 for m in frames)
    counts = final.counts
    assert counts["handed"] == counts["scored"] == final.n


def test_two_streams_and_a_file_of_settings(run_cli, tmp_path):
    """Streams, ids, sampling and outputs of a stream.toml are obeyed; a flag wins over the file.
    The recording holds each stream's own messages under one run.
    """
    record, rows, file = tmp_path / "r.ndjson", tmp_path / "r.csv", tmp_path / "stream.toml"
    file.write_text(
        f'{FAKE}[output]\nndjson = "{record}"\ncsv = "{rows}"\n'
        "[sampler]\nframes_per_second = 10.0\n"
        f'[[stream]]\nurl = "{PATTERN}&seconds=2"\nid = "one"\n'
        f'[[stream]]\nurl = "{PATTERN}&seconds=1"\nid = "two"\n'
    )
    done = run_cli("watch", "--config", file)
    assert done.code == 0, done.err
    assert done.out == ""
    messages = [json.loads(line) for line in record.read_text().splitlines()]
    finals = {m["stream"]: m for m in messages if m["schema"] == "dgiqa.final/1"}
    assert {name: m["n"] for name, m in finals.items()} == {"one": 20, "two": 10}
    assert len({m["run"] for m in messages}) == 1
    assert len(rows.read_text().splitlines()) == 1 + 30
    assert "one: end of stream" in done.err
    assert "two: end of stream" in done.err
    record.unlink()
    flagged = run_cli("watch", f"{PATTERN}&seconds=1", "--config", file, "--fps", "5")
    assert flagged.code == 0, flagged.err
    messages = [json.loads(line) for line in record.read_text().splitlines()]
    (final,) = [m for m in messages if m["schema"] == "dgiqa.final/1"]
    assert (final["stream"], final["n"]) == ("pattern-clean", 5)


def test_messages_on_standard_output_are_alone_there(run_cli, tmp_path):
    """``--ndjson -`` writes one message per line, ``final`` last but one, and nothing else; with
    --quiet standard error is empty.
    """
    file = tmp_path / "stream.toml"
    file.write_text(FAKE)
    done = run_cli("watch", f"{PATTERN}&seconds=1", "-c", file, "--ndjson", "-", "--quiet")
    kinds = [json.loads(line)["schema"] for line in done.out.splitlines()]
    assert (done.code, done.err) == (0, "")
    assert kinds[0] == "dgiqa.status/1"
    assert kinds[-2:] == ["dgiqa.final/1", "dgiqa.status/1"]
    assert kinds.count("dgiqa.frame/1") == 5


def test_duration_ends_a_live_stream(run_cli, tmp_path):
    """--duration stops after so much of the stream's time, with 0."""
    file = tmp_path / "stream.toml"
    file.write_text(FAKE)
    arguments = ("watch", f"{PATTERN}&seconds=600", "-c", file, "--realtime", "--duration", "1")
    begin = time.monotonic()
    done = run_cli(*arguments)
    assert done.code == 0, done.err
    assert 0.9 < time.monotonic() - begin < 60
    assert "5 of 25 frames scored" in done.err
    assert "pattern-clean: duration reached after" in done.err


@pytest.fixture
def never_answering(free_port):
    """Makes URLs of sources that accept and never answer, or that never send."""
    with contextlib.ExitStack() as servers:

        def make(kind):
            if kind == "udp":
                return f"udp://127.0.0.1:{free_port(socket.SOCK_DGRAM)}"
            server = servers.enter_context(socket.create_server(("127.0.0.1", 0)))
            return f"{kind}://127.0.0.1:{server.getsockname()[1]}/live"

        yield make


@pytest.mark.parametrize(
    ("kind", "number"),
    [
        ("tcp", signal.SIGINT),
        ("udp", signal.SIGTERM),
        ("rtsp", signal.SIGTERM),
        ("http", signal.SIGINT),
    ],
)
def test_a_signal_ends_it_out_of_a_blocked_read(start, never_answering, kind, number):
    """While opening blocks on a host that is silent, a signal ends it within a second, with the
    summary for people, the ``final`` message and exit code 0.
    """
    process = start(never_answering(kind), "--id", "cam", "--ndjson", "-", *BLOCKS)
    assert "connecting" in process.stdout.readline()
    time.sleep(0.2)
    code, out, err, took = end(process, number)
    assert code == 0
    assert took < ENDS_WITHIN_SECONDS
    kinds = [json.loads(line) for line in out.splitlines()]
    assert [m["schema"] for m in kinds] == ["dgiqa.final/1", "dgiqa.status/1"]
    assert kinds[0]["reason"] == "interrupted"
    assert kinds[1]["state"] == "ended"
    assert re.search(r"^cam: interrupted after .* 0 of 0 frames scored", err, re.MULTILINE)


def test_a_signal_ends_it_out_of_a_pipe_that_fell_silent(start, media):
    """With standard input open and silent after some frames, SIGTERM still ends it in a second,
    and what was scored is summed up.
    """
    process = start("-", "--every", "1", "--ndjson", "-", *BLOCKS, stdin=subprocess.PIPE)
    process.stdin.buffer.write(media["late_start"].read_bytes())
    process.stdin.flush()
    for line in process.stdout:
        if "dgiqa.frame/1" in line:
            break
    time.sleep(0.5)
    begin = time.monotonic()
    process.send_signal(signal.SIGTERM)
    assert process.wait(50) == 0
    assert time.monotonic() - begin < ENDS_WITHIN_SECONDS
    rest = [json.loads(line) for line in process.stdout]
    final = next(m for m in rest if m["schema"] == "dgiqa.final/1")
    assert final["reason"] == "interrupted"
    assert final["n"] > 0


def test_opening_has_a_deadline(run_cli, never_answering):
    """A host that never answers is given up after --open-timeout: one line, exit code 3."""
    for kind in ("tcp", "udp"):
        url = never_answering(kind)
        done = run_cli("watch", url, "--publish=", "--open-timeout", "0.5", "-q")
        assert done.code == 3
        assert len(done.err.splitlines()) == 1
        assert "no data within 0.5 s" in done.err


def test_one_of_two_streams_that_fails_is_4(run_cli, tmp_path):
    """The other stream is watched to its end; the failed one is named in one line."""
    file = tmp_path / "stream.toml"
    file.write_text(FAKE)
    done = run_cli("watch", f"{PATTERN}&seconds=1", "missing.mp4", "-c", file, "-q")
    assert done.code == 4
    assert done.err.splitlines() == ["error: missing.mp4: does not exist; check the name"]
    told = run_cli("watch", f"{PATTERN}&seconds=1", "missing.mp4", "-c", file)
    assert [line for line in told.err.splitlines() if "missing" in line] == done.err.splitlines()
    assert "pattern-clean: end of stream" in told.err


def test_a_source_that_never_opens_is_one_line(run_cli, tmp_path):
    """Where nothing could be watched, standard error has the error and nothing else, while the
    recording, as subscribers, hears how it ended.
    """
    record = tmp_path / "r.ndjson"
    done = run_cli("watch", "missing.mp4", "--publish", "tcp://127.0.0.1:*", "--ndjson", record)
    assert done.code == 3
    assert done.err.splitlines() == ["error: missing.mp4: does not exist; check the name"]
    last = json.loads(record.read_text().splitlines()[-1])
    assert (last["schema"], last["state"]) == ("dgiqa.status/1", "failed")


def test_an_error_names_what_the_user_wrote(run_cli, never_answering, tmp_path):
    """A value of an option is told by the option's name, one of the file by its key, and where
    there is no file, a default by the option that changes it.
    """
    file = tmp_path / "stream.toml"
    open_to_all, patience = 'endpoint = "tcp://0.0.0.0:5556"', "open_timeout_seconds = 0.2"
    file.write_text(f"[publish]\n{open_to_all}\n[source]\n{patience}\n")
    of_file = run_cli("watch", PATTERN, "-c", file)
    assert (of_file.code, of_file.err.split()[1]) == (2, "publish.endpoint")
    of_option = run_cli("watch", PATTERN, "-c", file, "--publish", "tcp://0.0.0.0:5557")
    assert (of_option.code, of_option.err.split()[1]) == (2, "--publish")
    url = never_answering("tcp")
    of_file = run_cli("watch", url, "-c", file, "--publish=", "-q")
    of_option = run_cli("watch", url, "--publish=", "--open-timeout", "0.2", "-q")
    scored = run_cli("score", url, "--open-timeout", "0.2", "-q")
    assert of_file.code == of_option.code == scored.code == 3
    assert "raise source.open_timeout_seconds and source.read_timeout_seconds" in of_file.err
    for done in (of_option, scored):
        assert "raise --open-timeout and --read-timeout" in done.err


def test_a_report_is_made_at_the_end_and_touches_nothing_else(run_cli, tmp_path):
    """--report writes the page alone: a recording of its name that was there is as it was, and no
    other file is left.
    """
    pytest.importorskip("matplotlib")
    file, folder = tmp_path / "stream.toml", tmp_path / "pages"
    file.write_text(FAKE)
    folder.mkdir()
    page, kept = folder / "r.html", folder / "r.ndjson"
    kept.write_text("a recording of yesterday")
    done = run_cli("watch", f"{PATTERN}&seconds=1", "-c", file, "--report", page)
    assert done.code == 0, done.err
    assert page.read_text().startswith("<!")
    assert kept.read_text() == "a recording of yesterday"
    assert sorted(folder.iterdir()) == [page, kept]


def test_a_report_is_of_this_run_of_a_recording_that_goes_on(run_cli, tmp_path):
    """--ndjson appends to what is there, and the page of --report has only what was added."""
    pytest.importorskip("matplotlib")
    file, record, page = tmp_path / "stream.toml", tmp_path / "r.ndjson", tmp_path / "r.html"
    file.write_text(FAKE)
    for name in ("monday", "tuesday"):
        options = ("--id", name, "--ndjson", record, "--report", page)
        assert run_cli("watch", f"{PATTERN}&seconds=1", "-c", file, *options).code == 0
    streams = {json.loads(line)["stream"] for line in record.read_text().splitlines()}
    assert streams == {"monday", "tuesday"}
    assert "tuesday" in page.read_text()
    assert "monday" not in page.read_text()


def test_a_report_of_a_recording_that_is_gone_is_an_output_that_fails(tmp_path):
    """Its error is that of the page, exit code 5, and not that of an input, 3."""
    pytest.importorskip("matplotlib")
    plan = ReportPlan(tmp_path / "p.html", tmp_path / "gone.ndjson", 0, is_temporary=False)
    with pytest.raises(SinkError, match=r"cannot make the report .*p\.html: cannot read the rec"):
        plan.write()


def test_the_recording_of_a_failed_report_is_kept(run_cli, tmp_path):
    """Where the page cannot be written in the end, the error names where its recording is; where
    its folder is missing, that is told before anything is watched.
    """
    pytest.importorskip("matplotlib")
    file, page = tmp_path / "stream.toml", tmp_path / "page.html"
    file.write_text(FAKE)
    page.mkdir()
    done = run_cli("watch", f"{PATTERN}&seconds=1", "-c", file, "--report", page)
    assert done.code == 5
    (kept,) = tmp_path.glob(".page-*.ndjson")
    assert done.err.splitlines()[-1].endswith(f"the recording is kept as {kept}")
    assert "dgiqa.final/1" in kept.read_text()
    lost = run_cli("watch", PATTERN, "-c", file, "--report", tmp_path / "no" / "r.html")
    assert lost.code == 5
    assert len(lost.err.splitlines()) == 1


def test_the_summary_tells_of_decode_errors():
    """Packets that the decoder refused are in it beside the frames that came out damaged; where
    there are none, no word is lost on them.
    """
    counts = {**dict.fromkeys(Count, 0), Count.DECODED: 40, Count.CORRUPT: 3}
    result = SessionResult("cam", None, counts, 2.0, "duration_reached", None, [], [])
    shown = "cam: duration reached after 2.0 s; 0 of 40 frames scored; 0 dropped, 3 corrupt"
    assert _summary(result) == shown
    counts[Count.DECODE_ERRORS] = 217
    assert _summary(result) == f"{shown}, 217 decode errors"


def test_two_outputs_cannot_be_one_file(run_cli, tmp_path):
    """They are refused by their options, both named, before anything is written."""
    both = tmp_path / "x"
    done = run_cli("watch", PATTERN, "--publish=", "--ndjson", both, "--csv", both)
    assert done.code == 2
    assert done.err == f"error: --ndjson and --csv {both} would be the same file: name another\n"
    assert not both.exists()


def test_an_idle_machine_is_left_within_a_second(start):
    """Watching a live stream ends within a second of Ctrl-C where the machine has nothing else to
    do: the best of three tries.
    """
    took = []
    for _ in range(3):
        process = start(*(f"{PATTERN}&seconds=600", "--realtime"), publish="tcp://127.0.0.1:*")
        line_with(process, r"publishing on (\S+)\n")
        time.sleep(0.5)
        took.append(end(process)[3])
        if took[-1] < 1.0:
            break
    assert min(took) < 1.0


def test_a_full_disk_does_not_end_the_watching(run_cli, tmp_path):
    """With one output on a full disk the stream is watched to its end, the error is told, and the
    exit code is 5.
    """
    file, rows = tmp_path / "stream.toml", tmp_path / "r.csv"
    file.write_text(FAKE)
    done = run_cli(
        *("watch", f"{PATTERN}&seconds=1", "-c", file, "--ndjson", "/dev/full", "--csv", rows)
    )
    assert done.code == 5
    assert len(rows.read_text().splitlines()) == 1 + 5
    assert "error: cannot write /dev/full: No space left on device" in done.err
    assert "pattern-clean: end of stream" in done.err


def test_a_subscriber_on_the_command_line_hears_it(start, run_cli):
    """``sub`` prints messages of the kinds and streams asked for, one per line, up to --count."""
    process = start(
        *(f"{PATTERN}&seconds=600", "--id", "cam1", "--realtime"), publish="tcp://127.0.0.1:*"
    )
    endpoint = line_with(process, r"publishing on (\S+)\n")[1]
    done = run_cli("sub", endpoint, "--kind", "frame", "--stream", "cam1", "--count", "3")
    messages = [json.loads(line) for line in done.out.splitlines()]
    assert (done.code, done.err) == (0, "")
    assert [m["schema"] for m in messages] == ["dgiqa.frame/1"] * 3
    other = run_cli("sub", endpoint, "--stream", "cam2", "--timeout", "0.5")
    assert (other.code, other.out) == (3, "")
    assert f"no message from {endpoint}" in other.err
    assert end(process)[0] == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_subscriber_without_a_complaint(start, plain_environment, number):
    """``sub`` that has heard messages ends with 130 and says no word against the publisher; one
    that waits for its first message does, too.
    """
    process = start(
        *(f"{PATTERN}&seconds=600", "--id", "cam1", "--realtime"), publish="tcp://127.0.0.1:*"
    )
    endpoint = line_with(process, r"publishing on (\S+)\n")[1]
    for stream in ("cam1", "cam2"):
        subscriber = subprocess.Popen(
            [sys.executable, "-m", "dgiqa_stream", "sub", endpoint, "--stream", stream],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=plain_environment,
            text=True,
        )
        if stream == "cam1":
            for _ in range(3):
                json.loads(subscriber.stdout.readline())
        else:
            time.sleep(2.0)  # nothing tells that it waits
        code, _, err, took = end(subscriber, number)
        assert code == 130
        assert "no message" not in err
        assert took < ENDS_WITHIN_SECONDS
    assert end(process)[0] == 0


def test_a_subscriber_without_keys_is_told_once(start, run_cli, tmp_path):
    """What an encrypted publisher does to it is one error, not a warning and an error alike. Where
    the publisher hung up before ZeroMQ had read what it speaks, that is told first.
    """
    run_cli("keys", tmp_path / "server", "server")
    run_cli("keys", tmp_path / "client", "client")
    (tmp_path / "server" / "client.key").write_bytes((tmp_path / "client/client.key").read_bytes())
    process = start(
        *(f"{PATTERN}&seconds=600", "--realtime", "--curve-dir", tmp_path / "server"),
        publish="tcp://127.0.0.1:*",
    )
    endpoint = line_with(process, r"publishing on (\S+)\n")[1]
    done = run_cli("sub", endpoint, "--timeout", "8")
    assert done.code in (2, 3)
    *before, error = done.err.splitlines()
    assert error.startswith("error: ")
    assert "--curve-dir" in done.err
    assert all("hung up before it was ready" in line for line in before), done.err
    assert len(before) <= 1
    assert end(process)[0] == 0


def test_two_publishers_on_one_port(start, run_cli):
    """The second is refused with one line that names the port, and exit code 5."""
    process = start(f"{PATTERN}&seconds=600", "--realtime", publish="tcp://127.0.0.1:*")
    endpoint = line_with(process, r"publishing on (\S+)\n")[1]
    done = run_cli("watch", f"{PATTERN}&seconds=1", "--publish", endpoint)
    assert done.code == 5
    assert len(done.err.splitlines()) == 1
    assert f"cannot publish at {endpoint}: Address already in use" in done.err
    assert end(process)[0] == 0
