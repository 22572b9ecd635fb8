"""The Prometheus exporter: what it says of streams, its command line, and a real Prometheus."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import prometheus_runs as runs
import pytest

pytest.importorskip("prometheus_client")

from dgiqa_stream.config import PublishSettings
from dgiqa_stream.curve import make_keys
from dgiqa_stream.errors import ConfigError, SinkError, SourceUnavailable
from dgiqa_stream.manifest import DEFAULT_MODEL, load_model
from dgiqa_stream.sinks.zeromq import ZeromqSink
from dgiqa_stream.telemetry import Count, DeviceStatus, Stage, Telemetry
from dgiqa_stream.types import WindowScore
from dgiqa_stream.wire import MessageFactory
from plugins.prometheus.board import Board
from plugins.prometheus.cli import Shown, shipped
from plugins.prometheus.exporter import Address, Exporter, parse_address, registry_of

HERE = Path(__file__).parent
A, B = "tcp://127.0.0.1:1", "tcp://127.0.0.1:2"
LIVE = "pattern:noisy?size=96x64&fps=25&seconds=3600"
WATCH = '[model]\nbackend = "fake"\n[publish]\nstatus_seconds = 1\n'


# What is known of streams -------------------------------------------------------------------


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    """See :class:`Clock`."""
    return Clock()


@pytest.fixture
def board(clock):
    """Streams are stale after 15 s and forgotten after 100 s; there is room for three."""
    return Board(stale_after_seconds=15, forget_after_seconds=100, max_streams=3, clock=clock)


@pytest.fixture(scope="module")
def factory_of():
    """Makes the messages of a stream."""
    manifest = load_model(DEFAULT_MODEL).manifest
    return lambda stream: MessageFactory(stream, model=manifest)


def window(factory, mean, *, length=10.0, valid=True):
    """A window message in which little is pooled."""
    score = WindowScore(
        "s", "sliding", length, 1.0, 0.0, length, 5, 5.0, 0.9, valid,
        {"mean": mean, "low5": None, "invented": 1.0}, "mean",
    )  # fmt: skip
    return factory.window(score)


def running(factory, **counts):
    """A status message with counts by name."""
    telemetry = Telemetry()
    for name, number in counts.items():
        telemetry.count(Count(name), number)
    return factory.status("running", telemetry=telemetry.snapshot(), lag_seconds=0.25)


def metric(board, name, **labels):
    """What Prometheus would read; None where there is no such series."""
    return registry_of(board).get_sample_value(name, labels)


def num_series(board, stream):
    """Of one stream."""
    return sum(
        sample.labels.get("stream") == stream
        for family in registry_of(board).collect()
        for sample in family.samples
    )


def test_what_a_stream_says_is_served(board, factory_of):
    """Scores by window, counts by result, state, lag and model come from the messages."""
    factory = factory_of("cam1")
    counts = {"scored": 7, "skipped": 20, "dropped_queue": 2, "dropped_stale": 1, "reconnects": 4}
    board.take(running(factory, **counts), A)
    board.take(window(factory, 61.5), A)
    assert metric(board, "dgiqa_stream_up", stream="cam1") == 1
    score = {"stream": "cam1", "pool": "mean", "window": "10s"}
    assert metric(board, "dgiqa_quality_score", **score) == 61.5
    assert metric(board, "dgiqa_window_coverage", stream="cam1", window="10s") == 0.9
    assert metric(board, "dgiqa_frames_total", stream="cam1", result="scored") == 7
    assert metric(board, "dgiqa_frames_total", stream="cam1", result="dropped") == 3
    assert metric(board, "dgiqa_reconnects_total", stream="cam1") == 4
    assert metric(board, "dgiqa_lag_seconds", stream="cam1") == 0.25
    assert metric(board, "dgiqa_stream_state", stream="cam1", state="running") == 1
    assert metric(board, "dgiqa_stream_state", stream="cam1", state="stalled") == 0
    model = load_model(DEFAULT_MODEL).manifest
    told = {"model": model.id, "version": model.version, "precision": model.precision}
    rest = {"calibration": model.calibration, "sha256": model.sha256}
    assert metric(board, "dgiqa_model_info", stream="cam1", **told, **rest) == 1


def test_events_and_stages_are_served(board, factory_of):
    """Jumps, refused packets and refused messages are counted by kind, and each stage of which
    there were calls has their number, their time and their 95th percentile.
    """
    telemetry = Telemetry()
    for what, number in ((Count.DISCONTINUITIES, 2), (Count.DECODE_ERRORS, 5)):
        telemetry.count(what, number)
    for _ in range(20):
        telemetry.observe(Stage.INFER, 0.004)
    board.take(factory_of("cam1").status("running", telemetry=telemetry.snapshot()), A)
    for event, number in (("discontinuities", 2), ("decode_errors", 5), ("sink_errors", 0)):
        assert metric(board, "dgiqa_events_total", stream="cam1", event=event) == number
    infer = {"stream": "cam1", "stage": "infer"}
    assert metric(board, "dgiqa_stage_seconds_count", **infer) == 20
    assert metric(board, "dgiqa_stage_seconds_sum", **infer) == pytest.approx(0.08)
    assert metric(board, "dgiqa_stage_p95_seconds", **infer) == pytest.approx(0.004, rel=0.045)
    assert metric(board, "dgiqa_stage_p99_seconds", **infer) == pytest.approx(0.004, rel=0.045)
    assert metric(board, "dgiqa_stage_p95_seconds", stream="cam1", stage="decode") is None


def test_devices_are_served_once_for_a_publisher(board, clock, factory_of):
    """Two streams of one sender tell of one GPU: one series of each number, the newest, in base
    units; what the driver does not tell has none, and a sender that is silent has none at all.
    """
    for name, load in (("cam1", 0.25), ("cam2", 0.5)):
        device = DeviceStatus(
            "cuda:0", load=load, used_bytes=3_000_000, max_batch=64, mean_batch=8.5, num_shrunk=2
        )
        board.take(factory_of(name).status("running", devices=[device]), A)
        clock.now += 1
    where = {"publisher": A, "device": "cuda:0"}
    assert metric(board, "dgiqa_device_load", **where) == 0.5
    assert metric(board, "dgiqa_device_memory_used_bytes", **where) == pytest.approx(3e6)
    assert metric(board, "dgiqa_device_batch_frames", **where) == 8.5
    assert metric(board, "dgiqa_device_batch_frames_limit", **where) == 64
    assert metric(board, "dgiqa_device_batches_shrunk_total", **where) == 2
    assert metric(board, "dgiqa_device_power_watts", **where) is None
    clock.now += 100
    assert metric(board, "dgiqa_device_load", **where) is None


@pytest.mark.parametrize("end", ["silence", "stalled", "reconnecting", "ended", "failed", "final"])
def test_a_lost_stream_has_no_score(board, clock, factory_of, end):
    """However a stream is lost, its scores and lag go, it is down, and its counts stay."""
    factory = factory_of("cam1")
    board.take(running(factory, scored=7), A)
    board.take(window(factory, 61.5), A)
    if end == "silence":
        clock.now += 15.1
    elif end == "final":
        gone = {"counts": {Count.SCORED: 8}, "duration_seconds": 1.0, "reason": "failed"}
        board.take(factory.final(None, **gone, error=SourceUnavailable("gone")), A)
    else:
        board.take(factory.status(end, telemetry=running(factory) and None), A)
    score = {"stream": "cam1", "pool": "mean", "window": "10s"}
    assert metric(board, "dgiqa_quality_score", **score) is None
    assert metric(board, "dgiqa_lag_seconds", stream="cam1") is None
    assert metric(board, "dgiqa_stream_up", stream="cam1") == 0


def test_a_score_does_not_outlive_its_windows(board, clock, factory_of):
    """A stream that is running but closes no window has no score, yet is up."""
    factory = factory_of("cam1")
    board.take(window(factory, 61.5), A)
    for _ in range(4):
        board.take(running(factory, scored=7), A)
        clock.now += 5
    score = {"stream": "cam1", "pool": "mean", "window": "10s"}
    assert metric(board, "dgiqa_quality_score", **score) is None
    assert metric(board, "dgiqa_stream_up", stream="cam1") == 1


def test_what_means_nothing_is_no_score(board, factory_of):
    """Windows that are not valid, nulls and poolers that nobody knows make no series."""
    factory = factory_of("cam1")
    board.take(running(factory), A)
    board.take(window(factory, 61.5, length=60.0, valid=False), A)
    board.take(window(factory, 50.0, length=1.0), A)
    scores = [
        sample.labels
        for family in registry_of(board).collect() if family.name == "dgiqa_quality_score"
        for sample in family.samples
    ]  # fmt: skip
    assert scores == [{"stream": "cam1", "pool": "mean", "window": "1s"}]


def test_a_restart_begins_anew(board, clock, factory_of):
    """A new run of the sender has the counts of the new run, and is up again."""
    first, second = factory_of("cam1"), factory_of("cam1")
    board.take(running(first, scored=900), A)
    board.take(first.status("ended"), A)
    board.take(running(second, scored=3), A)
    assert metric(board, "dgiqa_frames_total", stream="cam1", result="scored") == 3
    assert metric(board, "dgiqa_stream_up", stream="cam1") == 1


def test_a_silent_stream_is_down_and_then_forgotten(board, clock, factory_of):
    """An alert has time to be raised; later nothing of the stream is left."""
    board.take(running(factory_of("cam1")), A)
    clock.now += 99
    assert metric(board, "dgiqa_stream_up", stream="cam1") == 0
    clock.now += 2
    assert num_series(board, "cam1") == 0


def test_the_number_of_series_is_bounded(board, clock, factory_of):
    """Streams beyond the limit are ignored and counted until one that is down makes room."""
    for number in range(5):
        board.take(running(factory_of(f"cam{number}")), A)
    assert [view.stream for view in board.streams()] == ["cam0", "cam1", "cam2"]
    assert metric(board, "dgiqa_messages_ignored_total") == 2
    clock.now += 20
    board.take(running(factory_of("cam5")), A)
    assert [view.stream for view in board.streams()] == ["cam1", "cam2", "cam5"]
    factory = factory_of("cam5")
    for length in range(1, 30):
        board.take(window(factory, 50.0, length=float(length)), A)
    board.take(running(factory), A)
    assert num_series(board, "cam5") < 50


def test_two_publishers_do_not_share_a_stream(board, clock, factory_of, caplog):
    """The first to have a stream keeps it while it is up; the other is named in one warning."""
    here, there = factory_of("cam1"), factory_of("cam1")
    board.take(running(here, scored=5), A)
    for _ in range(3):
        board.take(running(there, scored=99), B)
    assert metric(board, "dgiqa_frames_total", stream="cam1", result="scored") == 5
    assert len(caplog.messages) == 1
    assert B in caplog.text
    clock.now += 20
    board.take(running(there, scored=99), B)
    assert metric(board, "dgiqa_frames_total", stream="cam1", result="scored") == 99


# Sockets ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "address"),
    [("127.0.0.1:9556", Address("127.0.0.1", 9556)), ("[::1]:0", Address("::1", 0))],
)
def test_addresses(text, address):
    """Addresses are HOST:PORT as in URLs, and are written as they were read."""
    assert parse_address(text) == address
    assert str(address) == text


@pytest.mark.parametrize("text", ["9556", ":9556", "localhost:", "::1:9556", "h:99999", "h:x", ""])
def test_no_addresses(text):
    """What is no HOST:PORT is refused by name."""
    with pytest.raises(ConfigError, match=re.escape(repr(text))):
        parse_address(text)


def published_to(exporter_board, factory, settings):
    """Publish a running stream until the board knows it."""
    sink = ZeromqSink(settings)
    try:

        def is_known():
            sink.send(running(factory))
            sink.tick()
            return exporter_board.streams()

        return runs.eventually(is_known, "the stream is known")
    finally:
        sink.close()


def keys_for(folder):
    """Folders of keys for a publisher and for the exporter, who know one another."""
    make_keys(folder / "publisher", "server")
    make_keys(folder / "exporter", "client")
    shutil.copy(folder / "exporter" / "client.key", folder / "publisher" / "exporter.key")
    shutil.copy(folder / "publisher" / "server.key", folder / "exporter" / "server.key")
    return folder / "publisher", folder / "exporter"


def test_an_encrypted_publisher_is_heard(tmp_path, board, factory_of):
    """With keys, messages come through CURVE; leaving the block ends every thread."""
    ours, theirs = keys_for(tmp_path)
    endpoint = f"ipc://{tmp_path}/pub"
    settings = PublishSettings(endpoint=endpoint, curve_dir=str(ours))
    before = threading.active_count()
    place = Address("127.0.0.1", 0)
    with Exporter(board, [endpoint], place, curve_dir=str(theirs)) as exporter:
        assert [view.stream for view in published_to(board, factory_of("cam1"), settings)]
        served = runs.value(str(exporter.address), "dgiqa_publisher_up", publisher=endpoint)
        assert served == 1
        assert runs.value(str(exporter.address), "process_cpu_seconds_total") > 0
    assert threading.active_count() == before


def test_a_publisher_that_refuses_is_told_of_and_ends_nothing(tmp_path, board, caplog, factory_of):
    """Keys that the publisher does not know: an error in the log, the publisher down, no hang."""
    ours, theirs = keys_for(tmp_path)
    (ours / "exporter.key").unlink()
    make_keys(tmp_path / "other", "client")
    shutil.copy(tmp_path / "other" / "client.key", ours / "other.key")
    endpoint = f"ipc://{tmp_path}/pub"
    sink = ZeromqSink(PublishSettings(endpoint=endpoint, curve_dir=str(ours)))
    place = Address("127.0.0.1", 0)
    with Exporter(board, [endpoint], place, curve_dir=str(theirs)) as exporter:

        def is_refused():
            sink.tick()
            return "refused this client" in caplog.text

        runs.eventually(is_refused, "a refusal")
        up = runs.value(str(exporter.address), "dgiqa_publisher_up", publisher=endpoint)
        assert up == 0
    sink.close()
    assert "trying again" in caplog.text


def test_a_taken_port_is_one_error(board):
    """Who cannot serve says which address is in use, and leaves no socket behind."""
    with (
        Exporter(board, [A], Address("127.0.0.1", 0)) as first,
        pytest.raises(SinkError, match=rf"^{first.address} is in use: choose another"),
    ):
        Exporter(board, [A], first.address)


# The command --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def environment():
    """That of the tests, without settings of this package."""
    kept = {key: text for key, text in os.environ.items() if not key.startswith("DGIQA_")}
    return {**kept, "PYTHONUTF8": "1"}


def command(environment, *arguments, code=None):
    """Run the exporter's command to its end."""
    begin = ["-m", "plugins.prometheus.cli"] if code is None else ["-c", code]
    return subprocess.run(
        [sys.executable, *begin, *arguments],
        capture_output=True, text=True, env=environment, timeout=120, check=False,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--listen", "9556"], "--listen '9556' is not HOST:PORT"),
        (["--stale-after", "nan"], "--stale-after nan is not within 1..1e9 seconds"),
        (["--forget-after", "5"], "--forget-after 5 is not within 15..1e9 seconds"),
        (["--connect", "cam1"], "endpoint 'cam1' is not tcp://HOST:PORT"),
        (["--curve-dir", "nowhere"], "nowhere"),
        (["--colour"], "No such option: --colour"),
    ],
)
def test_a_wrong_option_is_one_line(environment, arguments, said):
    """Exit code 2, and one line that names the value."""
    done = command(environment, *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert said in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_taken_port_is_exit_code_5(environment, tmp_path):
    """A second exporter on the same port says so in one line."""
    with runs.exporter([], tmp_path, environment) as (_, place):
        done = command(environment, "--listen", place)
    assert done.returncode == 5
    assert done.stderr == f"error: {place} is in use: choose another with --listen HOST:PORT\n"


def test_without_the_extra_it_says_what_to_install(environment):
    """Where prometheus-client is absent: exit code 5 and the command that installs it."""
    code = "import sys; sys.modules['prometheus_client'] = None\n"
    code += "from plugins.prometheus.cli import main; main()"
    done = command(environment, code=code)
    assert done.returncode == 5
    assert "pip install 'dgiqa-stream[prometheus]'" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_well(environment, tmp_path, number):
    """Ctrl-C and SIGTERM: exit code 0 within seconds, and nothing but its one line was said."""
    with runs.exporter([], tmp_path, environment) as (process, place):
        process.send_signal(number)
        assert process.wait(timeout=20) == 0
    said = (tmp_path / "said").read_text()
    assert said == f"http://{place}/metrics serves what tcp://127.0.0.1:5556 publishes\n"


# With a real publisher ----------------------------------------------------------------------


@pytest.fixture
def watch(environment, tmp_path):
    """Start ``dgiqa-stream watch`` as a process with a publisher; killed after the test."""
    started = []

    def run(port, *arguments, config=WATCH):
        folder = tmp_path / f"watch{len(started)}"
        folder.mkdir()
        (folder / "watch.toml").write_text(config)
        process = subprocess.Popen(
            [sys.executable, "-m", "dgiqa_stream", "watch", LIVE, "--id", "cam1", "--realtime",
             "-q", "-c", str(folder / "watch.toml"), "--publish", f"tcp://127.0.0.1:{port}",
             *arguments],
            env=environment,
        )  # fmt: skip
        started.append(process)
        return process

    yield run
    for process in started:
        if process.poll() is None:
            process.send_signal(signal.SIGCONT)
            process.kill()
        process.wait()


@pytest.fixture
def port():
    """A free one; the publisher takes it a moment later."""
    import socket

    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return held.getsockname()[1]


def test_a_publisher_that_hangs_is_silent(environment, tmp_path, watch, port):
    """A stopped process is down after the time of staleness, without scores; it can come back."""
    arguments = ["--connect", f"tcp://127.0.0.1:{port}", "--stale-after", "5"]
    with runs.exporter(arguments, tmp_path / "exporter", environment) as (_, place):
        process = watch(port)
        score = {"stream": "cam1", "pool": "mean", "window": "1s"}
        runs.eventually(lambda: runs.value(place, "dgiqa_quality_score", **score), "a score")
        process.send_signal(signal.SIGSTOP)
        runs.eventually(lambda: runs.value(place, "dgiqa_stream_up", stream="cam1") == 0, "down")
        assert runs.value(place, "dgiqa_quality_score", **score) is None
        runs.eventually(lambda: "} 0.0" in publisher_up(place), "the publisher is silent")
        process.send_signal(signal.SIGCONT)
        runs.eventually(lambda: runs.value(place, "dgiqa_quality_score", **score), "back")
        assert runs.value(place, "dgiqa_stream_up", stream="cam1") == 1


def publisher_up(place):
    """The line of the only publisher."""
    text = runs.read(f"http://{place}/metrics").decode()
    return re.search(r"^dgiqa_publisher_up\{.*$", text, re.MULTILINE)[0]


@pytest.mark.servers
@pytest.mark.slow
def test_prometheus_reads_what_watch_published(environment, tmp_path, watch, port, missing_server):
    """A real Prometheus holds the very numbers that were recorded; they go when the stream ends."""
    runs.require_prometheus(missing_server)
    recording = tmp_path / "recording.ndjson"
    arguments = ["--connect", f"tcp://127.0.0.1:{port}"]
    with (
        runs.exporter(arguments, tmp_path / "exporter", environment) as (_, place),
        runs.prometheus(free_port(), place, shipped(Shown.RULES), tmp_path / "tsdb") as api,
    ):
        process = watch(port, "--ndjson", str(recording), config="")  # the default model
        mean = 'dgiqa_quality_score{stream="cam1",pool="mean",window="10s"}'
        (series,) = runs.eventually(lambda: runs.query(api, mean), "a score in Prometheus")
        runs.eventually(
            lambda: runs.query(api, 'rate(dgiqa_frames_total{result="scored"}[15s]) > 0'),
            "frames are counted",
        )
        (up,) = runs.query(api, "dgiqa_stream_up")
        assert up["value"][1] == "1"
        (info,) = runs.query(api, "dgiqa_model_info")
        assert info["metric"]["sha256"] == load_model(DEFAULT_MODEL).manifest.sha256
        (last,) = runs.query(api, "time() - dgiqa_last_frame_timestamp_seconds")
        assert -1 < float(last["value"][1]) < runs.PATIENCE_SECONDS
        check_dashboard(api)
        process.send_signal(signal.SIGINT)
        process.wait(timeout=60)
        runs.eventually(lambda: runs.query(api, "dgiqa_stream_up == 0"), "down")
        runs.eventually(lambda: not runs.query(api, mean), "the score is gone")
        runs.eventually(
            lambda: runs.query(api, 'ALERTS{alertname="DgiqaStreamDown"}'), "an alert waits"
        )
    lines = map(json.loads, recording.read_text().splitlines())
    means = [
        line["pool"]["mean"]
        for line in lines
        if line["schema"] == "dgiqa.window/1" and line["window"]["len_s"] == 10.0
    ]
    assert float(series["value"][1]) in means


def free_port():
    """For Prometheus, which is not asked to find one itself."""
    import socket

    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        port: int = held.getsockname()[1]
    return port


def check_dashboard(api):
    """Every expression of the shipped dashboard is accepted and finds the running stream."""
    dashboard = json.loads(shipped(Shown.DASHBOARD))
    expressions = [t["expr"] for panel in dashboard["panels"] for t in panel["targets"]]
    assert len(expressions) >= 7
    for expression in expressions:
        asked = expression.replace("$stream", ".*").replace("$__rate_interval", "15s")
        runs.eventually(lambda asked=asked: runs.query(api, asked), asked)


@pytest.mark.servers
def test_alerts_are_raised_and_cleared(tmp_path, missing_server):
    """promtool's own unit tests of the shipped rules pass, and its linter finds nothing."""
    runs.require_prometheus(missing_server)
    (tmp_path / "rules.yml").write_text(shipped(Shown.RULES))
    shutil.copy(HERE / "alerts_test.yml", tmp_path)
    for asked in (["check", "rules", "rules.yml"], ["test", "rules", "alerts_test.yml"]):
        done = subprocess.run(
            ["promtool", *asked], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr


def test_alerts_ask_for_metrics_that_exist(board, factory_of):
    """Each metric that rules and dashboard name is one that the exporter serves."""
    factory = factory_of("cam1")
    board.add_publisher(A)
    board.take(running(factory, scored=1), A)
    served = {
        name
        for family in registry_of(board).collect()
        for name in (family.name, f"{family.name}_total")
    }
    named = set(re.findall(r"\bdgiqa_\w+", shipped(Shown.RULES) + shipped(Shown.DASHBOARD)))
    assert len(named) >= 5
    assert named <= served
