"""Publishers and subscribers in processes of their own, as they run in the field."""

from __future__ import annotations

import contextlib
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import zmq
from zmq.auth import load_certificate

from dgiqa_stream.config import PublishSettings
from dgiqa_stream.curve import make_keys
from dgiqa_stream.errors import ConfigError
from dgiqa_stream.sinks.zeromq import ZeromqSink
from dgiqa_stream.subscriber import Subscriber
from dgiqa_stream.wire import Message, decode

ANY_PORT = "tcp://127.0.0.1:*"
PATIENCE_SECONDS = 60.0


class Peer:
    """A child process that answers line by line."""

    def __init__(self, script: str, *arguments: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, script, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
        )

    def ask(self, line: str) -> float:
        """Have one thing done; the seconds it took."""
        self.tell(line)
        word, seconds = self.hear().split()
        assert word == "done"
        return float(seconds)

    def tell(self, line: str) -> None:
        """Have one thing done without waiting for it."""
        assert self.process.stdin is not None
        self.process.stdin.write(line.encode() + b"\n")

    def hear(self) -> str:
        """The next line it says."""
        assert self.process.stdout is not None
        ready = select.select([self.process.stdout], [], [], PATIENCE_SECONDS)[0]
        assert ready, "the other process is silent"
        return self.process.stdout.readline().decode().rstrip("\n")

    @property
    def endpoint(self) -> str:
        """Where it publishes, said first."""
        word, endpoint = self.hear().split(" ", 1)
        assert word == "ready", endpoint
        return endpoint

    def stop(self) -> None:
        """Kill it and release its pipes."""
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def start(peers: ModuleType) -> Iterator[Callable[..., Peer]]:
    """Starts ``wire_peers.py``; what it started ends with the test."""
    with contextlib.ExitStack() as stack:

        def started(*arguments: str) -> Peer:
            peer = Peer(str(peers.__file__), *arguments)
            stack.callback(peer.stop)
            return peer

        yield started


def collect(sub: Subscriber, number: int) -> list[Message]:
    """That many messages."""
    seen: list[Message] = []
    while len(seen) < number:
        message = sub.receive(PATIENCE_SECONDS)
        assert message is not None, f"only {len(seen)} of {number} messages came"
        seen.append(message)
    return seen


@pytest.mark.parametrize("transport", ["tcp", "ipc"])
def test_a_late_joiner_learns_what_it_missed(
    start: Callable[..., Peer], tmp_path: Path, transport: str
) -> None:
    """Whoever comes late gets meta, status and windows once, then live messages without a gap."""
    publisher = start("publish", ANY_PORT if transport == "tcp" else f"ipc://{tmp_path}/s")
    endpoint = publisher.endpoint
    for line in ("status cam1 connecting", "meta cam1", "status cam1 running", "frames cam1 50"):
        publisher.ask(line)
    for length in ("60", "1", "10", "1"):
        publisher.ask(f"window cam1 sliding {length}")
    with Subscriber(endpoint) as early:
        first = collect(early, 5)
        with Subscriber(endpoint) as late:
            second = collect(late, 5)
            publisher.ask("window cam1 sliding 60")
            publisher.ask("frames cam1 2")
            live = [collect(sub, 3) for sub in (early, late)]
    for seen in (first, second):
        assert sorted((m.kind, m.seq) for m in seen) == [
            ("meta", 0),
            ("status", 1),
            ("window", 0),
            ("window", 2),
            ("window", 3),
        ]
    for seen in live:
        assert [(m.kind, m.seq) for m in seen] == [("window", 4), ("frame", 50), ("frame", 51)]
    assert early.gaps == late.gaps == {}


def test_a_slow_subscriber_loses_messages_and_is_told(start: Callable[..., Peer]) -> None:
    """Received and missing add up to sent; the publisher is no slower for it, a reader loses none.

    The number is well beyond what both high-water marks and loopback's buffers hold.
    """
    number = 30_000
    publisher = start("publish", ANY_PORT, "high_water_mark=10")
    endpoint = publisher.endpoint
    alone = publisher.ask(f"frames cam0 {number}")
    with Subscriber(endpoint, kinds=("frame",)) as slow:
        publisher.ask("frames hello 1")
        while slow.receive(0.05) is None:
            publisher.ask("frames hello 1")
        with_slow = publisher.ask(f"frames cam1 {number}")
        received, sent = [m.seq for m in drained(slow) if m.stream == "cam1"], number
        while received[-1] < number:  # shows what was lost at the end
            publisher.ask("frames cam1 1")
            sent += 1
            received += [m.seq for m in drained(slow)]
            assert sent < number + 100
        missing = slow.gaps["dgiqa/1/frame/cam1/"]
    assert received[0] == 0
    assert missing > 0
    assert len(received) + missing == received[-1] + 1
    assert with_slow < 5 * alone + 30  # waiting for the reader would take for ever


def drained(sub: Subscriber) -> Iterator[Message]:
    """Everything that is on its way."""
    while (message := sub.receive(0.5)) is not None:
        yield message


def test_a_restarted_publisher_is_found_again(
    start: Callable[..., Peer], free_port: Callable[..., int]
) -> None:
    """A subscriber made first gets all messages of a late publisher and of the one after it."""
    endpoint = f"tcp://127.0.0.1:{free_port()}"
    runs = []
    with Subscriber(endpoint) as sub:
        for _ in range(2):
            publisher = start("publish", endpoint)
            assert publisher.endpoint == endpoint
            publisher.ask("meta cam1")
            publisher.ask("status cam1 running")
            meta, status = collect(sub, 2)
            assert (meta.kind, status.kind) == ("meta", "status")
            publisher.ask("frames cam1 20")
            assert [m.seq for m in collect(sub, 20)] == list(range(20))
            runs.append(meta.run)
            publisher.stop()  # as kill -9 does
        assert len(set(runs)) == 2
        assert sub.gaps == {}


def test_cam1_is_not_cam10(start: Callable[..., Peer]) -> None:
    """A subscriber of cam1 gets nothing of cam10."""
    publisher = start("publish", ANY_PORT)
    endpoint = publisher.endpoint
    publisher.ask("status cam10 running")
    publisher.ask("status cam1 running")
    with Subscriber(endpoint, streams=("cam1",)) as sub:
        collect(sub, 1)
        publisher.ask("frames cam10 50")
        publisher.ask("frames cam1 50")
        publisher.ask("frames cam10 50")
        publisher.ask("final cam1")
        assert {m.stream for m in collect(sub, 51)} == {"cam1"}


def test_a_second_publisher_on_a_port_says_so(start: Callable[..., Peer]) -> None:
    """The second program on one port ends with one clear line and leaves the first alone."""
    first = start("publish", ANY_PORT)
    endpoint = first.endpoint
    second = start("publish", endpoint)
    assert second.hear().startswith(f"SinkError cannot publish at {endpoint}: Address already in")
    assert second.process.wait(PATIENCE_SECONDS) == 1
    first.ask("status cam1 running")
    with Subscriber(endpoint) as sub:
        collect(sub, 1)


def test_a_killed_publisher_does_not_block_its_ipc_path(
    start: Callable[..., Peer], tmp_path: Path
) -> None:
    """After kill -9 the next publisher takes the path, and while one lives a second is refused."""
    place = f"ipc://{tmp_path}/s"
    start("publish", place).hear()
    assert start("publish", place).hear().startswith("SinkError")
    killed = start("publish", f"{place}2")
    killed.hear()
    killed.stop()
    assert (tmp_path / "s2").exists()
    assert start("publish", f"{place}2").endpoint == f"{place}2"


def test_conflate_works_with_single_framing(start: Callable[..., Peer]) -> None:
    """A CONFLATE socket, which breaks multipart, holds the newest message whole."""
    publisher = start("publish", ANY_PORT, "framing=single", "high_water_mark=100000")
    endpoint = publisher.endpoint
    with zmq.Context() as context, context.socket(zmq.SUB) as sub:
        sub.setsockopt(zmq.CONFLATE, 1)
        sub.subscribe(b"dgiqa/1/frame/cam1/")
        sub.connect(endpoint)
        newest, deadline = -1, time.monotonic() + PATIENCE_SECONDS
        sent = seen = 0
        while newest < 0 or newest < sent - 1:
            assert time.monotonic() < deadline, f"newest was {newest} of {sent}"
            if newest < 0:  # not connected yet, or the last is still under way
                publisher.ask("frames cam1 100")
                sent += 100
            if sub.poll(100):
                topic, payload = sub.recv().split(b" ", 1)
                assert topic == b"dgiqa/1/frame/cam1/"
                newest, seen = decode(payload).seq, seen + 1
        assert seen < sent


def test_the_summary_leaves_before_the_publisher_ends(start: Callable[..., Peer]) -> None:
    """A summary sent just before closing reaches a subscriber with much still on its way."""
    publisher = start("publish", ANY_PORT, "high_water_mark=100000")
    endpoint = publisher.endpoint
    publisher.ask("status cam1 running")
    with zmq.Context() as context, context.socket(zmq.SUB) as sub:
        sub.linger, sub.rcvhwm, sub.rcvbuf = 0, 10, 65536
        sub.subscribe(b"")
        sub.connect(endpoint)
        assert sub.poll(PATIENCE_SECONDS * 1e3)
        publisher.tell("end cam1 15000")
        assert publisher.hear() == "closing"
        topics = [sub.recv_multipart()[0].decode()]
        while "final" not in topics[-1] and sub.poll(5000):
            topics.append(sub.recv_multipart()[0].decode())
    kinds = [topic.split("/")[2] for topic in topics]
    assert kinds == ["status"] + ["frame"] * 15000 + ["final"]


def test_ctrl_c_ends_a_waiting_subscriber(
    start: Callable[..., Peer], free_port: Callable[..., int]
) -> None:
    """An interrupt ends a subscriber that waits for nobody, and lets it clean up."""
    waiting = start("subscribe", f"tcp://127.0.0.1:{free_port()}")
    assert waiting.hear() == "ready"
    waiting.process.send_signal(signal.SIGINT)
    assert waiting.hear() == "interrupted"
    assert waiting.process.wait(PATIENCE_SECONDS) == 0


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    """Folders of a server that knows one client, of that client, and of a stranger."""
    for name in ("client", "stranger"):
        make_keys(tmp_path / name, "client")
    make_keys(tmp_path / "server", "server")
    for name in ("client", "stranger"):
        copy(tmp_path / "server" / "server.key", tmp_path / name / "server.key")
    copy(tmp_path / "client" / "client.key", tmp_path / "server" / "alice.key")
    return tmp_path


def copy(source: Path, target: Path) -> None:
    """Copy a small file."""
    target.write_bytes(source.read_bytes())


def refusal(sub: Subscriber) -> str:
    """What a subscriber says of a publisher that does not speak as it does.

    An error, or a problem where the publisher hung up before ZeroMQ had read what it speaks: 13 of
    500 connections on a busy machine.
    """
    deadline = time.monotonic() + PATIENCE_SECONDS
    try:
        while not sub.problem:
            assert sub.receive(0.05) is None
            assert time.monotonic() < deadline
    except ConfigError as exc:
        return str(exc)
    return sub.problem


def test_curve_admits_a_known_client(start: Callable[..., Peer], keys: Path) -> None:
    """The right keys get messages; a stranger and a client without keys are told at once."""
    publisher = start("publish", "tcp://0.0.0.0:*", f"curve_dir={keys}/server")
    endpoint = publisher.endpoint.replace("0.0.0.0", "127.0.0.1")
    publisher.ask("status cam1 running")
    with (
        Subscriber(endpoint, curve_dir=str(keys / "stranger")) as stranger,
        pytest.raises(ConfigError, match=r"refused this client: copy client\.key"),
    ):
        stranger.receive(PATIENCE_SECONDS)
    with Subscriber(endpoint) as plain:
        assert "give curve_dir" in refusal(plain)
    with Subscriber(endpoint, curve_dir=str(keys / "client")) as sub:
        assert [m.kind for m in collect(sub, 1)] == ["status"]
        assert sub.problem == ""


def test_curve_refuses_a_false_publisher(start: Callable[..., Peer], keys: Path) -> None:
    """A client gets nothing from a publisher with another key, and can say why."""
    make_keys(keys / "false", "server")
    copy(keys / "client" / "client.key", keys / "false" / "client.key")
    publisher = start("publish", ANY_PORT, f"curve_dir={keys}/false")
    endpoint = publisher.endpoint
    publisher.ask("status cam1 running")
    with Subscriber(endpoint, curve_dir=str(keys / "client")) as sub:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not sub.problem:
            assert sub.receive(0.05) is None
            assert time.monotonic() < deadline
        assert "server.key" in sub.problem


def test_a_stranger_never_subscribes(keys: Path, peers: ModuleType) -> None:
    """The publisher itself counts who was refused and hears no subscription of theirs."""
    settings = PublishSettings(endpoint=ANY_PORT, curve_dir=str(keys / "server"))
    sink = ZeromqSink(settings)
    sink.send(peers.make_factory().status("running"))
    with contextlib.closing(sink), zmq.Context() as context, context.socket(zmq.SUB) as sub:
        sub.linger = 0
        sub.subscribe(b"")
        sub.curve_publickey, sub.curve_secretkey = zmq.curve_keypair()
        sub.curve_serverkey = load_certificate(keys / "server" / "server.key")[0]
        sub.connect(sink.endpoint)
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not sink.num_refused:
            sink.tick()
            assert time.monotonic() < deadline
            assert not sub.poll(10)
        sink.tick()
        assert not sub.poll(200)


def test_keys_are_kept(tmp_path: Path) -> None:
    """A secret key is its owner's alone, and making it again does not overwrite it."""
    secret = make_keys(tmp_path / "new", "server")
    assert secret.stat().st_mode & 0o777 == 0o600
    before = secret.read_bytes()
    with pytest.raises(ConfigError, match="exists: remove it first"):
        make_keys(tmp_path / "new", "server")
    assert secret.read_bytes() == before


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda folder: (folder / "server.key_secret").unlink(), "server.key_secret"),
        (lambda folder: (folder / "alice.key").unlink(), "no client's"),
        (lambda folder: (folder / "alice.key").write_text("nothing"), "alice.key"),
        (lambda folder: (folder / "alice.key").write_text('public-key = "short"'), "damaged"),
        (lambda folder: copy(folder / "server.key", folder / "server.key_secret"), "no secret"),
    ],
)
def test_a_key_that_is_missing_or_wrong_is_named(
    keys: Path, spoil: Callable[[Path], None], said: str
) -> None:
    """Publishing with an incomplete folder of keys is refused, naming the file, never in plain."""
    spoil(keys / "server")
    with pytest.raises(ConfigError, match=said):
        ZeromqSink(PublishSettings(endpoint=ANY_PORT, curve_dir=str(keys / "server")))
