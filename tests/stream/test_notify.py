"""What ``watch`` tells a service manager, heard on real datagram sockets."""

from __future__ import annotations

import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from dgiqa_stream.backends.fake import FakeBackend
from dgiqa_stream.config import PublishSettings, SourceSettings, StreamConfig
from dgiqa_stream.manifest import load_model
from dgiqa_stream.pipeline import Monitor
from dgiqa_stream.scorer import Scorer
from dgiqa_stream.sinks.systemd import ServiceSink, service_of

CLIP = "pattern:clean?size=64x48&fps=25&seconds=600"
LATE_SECONDS = 30.0
"""How long a busy machine may take; a message that never comes is the failure."""


class Manager:
    """The other end: a bound datagram socket, as systemd has one."""

    def __init__(self, address):
        self.address = address
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind("\0" + address[1:] if address.startswith("@") else address)

    def next(self, seconds=LATE_SECONDS):
        """The lines of the next datagram; none where none comes."""
        self.socket.settimeout(seconds)
        try:
            return self.socket.recv(1 << 16).decode().split("\n")
        except TimeoutError:
            return []

    def until(self, wanted, seconds=LATE_SECONDS):
        """The lines heard up to one that begins as wanted, and that one last."""
        end, heard = time.monotonic() + seconds, []
        while time.monotonic() < end:
            for line in self.next(0.5):
                heard.append(line)
                if line.startswith(wanted):
                    return heard
        raise AssertionError(f"no {wanted!r} in {heard}")

    def waiting(self):
        """The lines of all that has come."""
        heard = []
        while lines := self.next(0.001):
            heard += lines
        return heard


@pytest.fixture(params=["path", "abstract"])
def manager(request, tmp_path):
    """A manager at a path, and one at a name of Linux's abstract namespace."""
    name = f"@dgiqa-{secrets.token_hex(8)}"
    made = Manager(name if request.param == "abstract" else str(tmp_path / "notify"))
    yield made
    made.socket.close()


def test_only_a_manager_that_asks_is_told(manager):
    """Without ``NOTIFY_SOCKET`` nobody is told; a watchdog for another process is not ours; and the
    variables are taken away, so that helper programs cannot speak for us.
    """
    assert service_of({}) is None
    assert service_of({"NOTIFY_SOCKET": "vsock:2:1234"}) is None
    for process, is_ours in ((str(os.getpid()), True), ("1", False)):
        environment = {
            "NOTIFY_SOCKET": manager.address,
            "WATCHDOG_USEC": "40000",
            "WATCHDOG_PID": process,
            "HOME": "/",
        }
        service = service_of(environment)
        assert environment == {"HOME": "/"}
        stream = service.of_stream("cam1")
        service.ready()
        stream.tick()
        assert manager.next() == ["READY=1", "STATUS=cam1 connecting"]
        assert (manager.waiting() == ["WATCHDOG=1"]) is is_ours
        service.stopping()
        assert manager.next() == ["STOPPING=1"]
        service.close()
        service.close()


@pytest.mark.parametrize("micros", ["", "0", "-5", "soon"])
def test_a_watchdog_that_is_none_is_not_fed(manager, micros):
    """An empty, zero or broken ``WATCHDOG_USEC`` means that no watchdog runs."""
    service = service_of({"NOTIFY_SOCKET": manager.address, "WATCHDOG_USEC": micros})
    stream = service.of_stream("cam1")
    for _ in range(5):
        stream.tick()
    assert manager.waiting() == []
    service.close()


def test_one_silent_loop_starves_the_watchdog(manager):
    """Two loops go round: a ping a quarter of the timeout at most. One falls silent: after half the
    timeout there is none, however often the other goes round. The silent one ends: pings again.
    """
    service = ServiceSink(manager.address, watchdog_seconds=0.4)
    one, two = service.of_stream("one"), service.of_stream("two")

    def go_round(seconds, *streams):
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            for stream in streams:
                stream.tick()
            time.sleep(0.005)
        return manager.waiting()

    begin = time.monotonic()
    heard = go_round(0.6, one, two)
    assert set(heard) == {"WATCHDOG=1"}
    assert 2 <= len(heard) <= 1 + (time.monotonic() - begin) / 0.1
    go_round(0.3, one)
    assert go_round(0.3, one) == []
    two.send(status("two", "ended"))
    assert "WATCHDOG=1" in go_round(0.3, one)
    service.close()


def status(stream, state):
    """A status message as a session makes it."""
    from dgiqa_stream.config import SamplerSettings
    from dgiqa_stream.telemetry import Telemetry
    from dgiqa_stream.wire import MessageFactory

    factory = MessageFactory(stream, model=load_model().manifest, sampler=SamplerSettings())
    return factory.status(state, telemetry=Telemetry().snapshot())


def test_a_manager_that_does_not_listen_holds_nothing_up(tmp_path):
    """Thousands of messages to a manager that never reads, and to one that is gone, are dropped
    without an error or a wait.
    """
    manager = Manager(str(tmp_path / "notify"))
    service = ServiceSink(manager.address, watchdog_seconds=1e-6)
    stream = service.of_stream("cam1")
    finished = threading.Event()

    def tell():
        for _ in range(3000):
            service.ready()
            stream.tick()
        finished.set()

    threading.Thread(target=tell, daemon=True).start()
    assert finished.wait(LATE_SECONDS)
    manager.socket.close()
    service.ready()
    service.close()
    stream.tick()


class HangingBackend(FakeBackend):
    """Scores until it is told to hang, as a driver might."""

    def __init__(self):
        super().__init__()
        self.hang, self.go_on = threading.Event(), threading.Event()

    def infer(self, batch):
        """Wait where it is to hang."""
        if self.hang.is_set():
            self.go_on.wait(60)
        return super().infer(batch)


def test_a_hung_scoring_loop_is_not_heard(peers, tmp_path):
    """A real session feeds the watchdog while it scores; when inference hangs, the process and all
    its other threads live on, and the watchdog hears nothing more.
    """
    from dgiqa_stream.manifest import LoadedModel

    manager = Manager(str(tmp_path / "notify"))
    service = ServiceSink(manager.address, watchdog_seconds=2.0)
    backend = HangingBackend()
    monitor = Monitor(
        CLIP,
        stream="cam1",
        config=StreamConfig(
            source=SourceSettings(realtime=True), publish=PublishSettings(endpoint="")
        ),
        scorer=Scorer(LoadedModel(tmp_path / "fake.onnx", peers.MANIFEST), backend),
        sinks=[service.of_stream("cam1")],
    )
    thread = threading.Thread(target=monitor.run)
    thread.start()
    try:
        manager.until("WATCHDOG=1")
        manager.until("WATCHDOG=1")
        backend.hang.set()
        time.sleep(1.5)  # the frame under way, and a ping that is due after it
        manager.waiting()
        assert manager.next(2.5) == []
        assert thread.is_alive()
    finally:
        backend.go_on.set()
        monitor.stop()
        thread.join(LATE_SECONDS)
    assert manager.until("STATUS=cam1 ended")
    service.close()
    manager.socket.close()


def test_watch_tells_its_manager(manager, plain_environment, tmp_path):
    """A process under a manager: ready first, then its state with a score, pings of the watchdog,
    and after SIGTERM that it stops, before it ends with the summary in the recording and 0.
    """
    record = tmp_path / "r.ndjson"
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "dgiqa_stream", "watch", CLIP, "--id", "cam1", "--realtime"),
            *("--publish=", "--ndjson", str(record), "--quiet"),
        ],
        env=plain_environment | {"NOTIFY_SOCKET": manager.address, "WATCHDOG_USEC": "2000000"},
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert manager.next() == ["READY=1", "STATUS=cam1 connecting"]
        heard = manager.until("STATUS=cam1 running ")  # with a score, so of the second status
        assert "STATUS=cam1 running" in heard
        assert heard.count("WATCHDOG=1") >= 3
        process.send_signal(signal.SIGTERM)
        heard = manager.until("STATUS=cam1 ended")
        assert "STOPPING=1" in [*heard, *manager.waiting()]
        _, err = process.communicate(timeout=LATE_SECONDS)
        assert (process.returncode, err) == (0, "")
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()
    assert '"schema":"dgiqa.final/1"' in record.read_text(encoding="utf-8").replace(" ", "")
