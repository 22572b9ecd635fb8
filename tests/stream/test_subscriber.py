from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import msgspec
import pytest
import zmq

from dgiqa_stream.config import PublishSettings
from dgiqa_stream.errors import ConfigError, SinkError
from dgiqa_stream.sinks.zeromq import ZeromqSink
from dgiqa_stream.subscriber import Subscriber
from dgiqa_stream.wire import Message, encode, slot_of, topic_of

PATIENCE_SECONDS = 20.0


class Wire:
    """A bare PUB socket, to send what a publisher never would."""

    def __init__(self, socket: zmq.Socket[bytes]) -> None:
        self.socket = socket
        self.endpoint = socket.getsockopt_string(zmq.LAST_ENDPOINT)

    def send(self, *messages: Message) -> None:
        """Send as multipart JSON."""
        for message in messages:
            self.socket.send_multipart([topic_of(message), encode(message)])

    def meet(self, sub: Subscriber, hello: Message) -> None:
        """Send a message of its own run until the subscriber has it, then let repeats pass."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while sub.receive(0.01) is None:
            assert time.monotonic() < deadline, "no connection"
            self.send(hello)


@pytest.fixture
def wire() -> Iterator[Wire]:
    """A bare publisher on a free port."""
    with zmq.Context() as context, context.socket(zmq.PUB) as socket:
        socket.linger = 0
        socket.bind("tcp://127.0.0.1:*")
        yield Wire(socket)


def numbered(message: Message, *numbers: int) -> list[Message]:
    """The message with other sequence numbers."""
    return [msgspec.structs.replace(message, seq=seq) for seq in numbers]


def test_gaps_are_told_by_topic(peers: ModuleType, wire: Wire) -> None:
    """Each loss is told once, with its topic and size; what comes before the first is no loss."""
    one, two = (peers.make_factory(s).frame(peers.make_score()) for s in ("cam1", "cam2"))
    told: list[tuple[str, int]] = []
    with Subscriber(wire.endpoint, on_gap=lambda *gap: told.append(gap)) as sub:
        wire.meet(sub, peers.make_factory("hello").status("running"))
        wire.send(*numbered(one, 7, 8, 11, 12, 20), *numbered(two, 100, 101))
        seen = [sub.receive(PATIENCE_SECONDS) for _ in range(7)]
        assert [m.seq for m in seen if m] == [7, 8, 11, 12, 20, 100, 101]
        assert told == [("dgiqa/1/frame/cam1/", 2), ("dgiqa/1/frame/cam1/", 7)]
        assert sub.gaps == {"dgiqa/1/frame/cam1/": 9}


def test_a_repetition_is_given_once(peers: ModuleType, wire: Wire) -> None:
    """What was sent again for another subscriber is neither given twice nor counted as a gap."""
    factory = peers.make_factory()
    short, long = (factory.window(peers.make_window(length=n)) for n in (1.0, 10.0))
    with Subscriber(wire.endpoint) as sub:
        wire.meet(sub, peers.make_factory("hello").status("running"))
        wire.send(*numbered(short, 9), *numbered(long, 3), *numbered(short, 9, 10, 10))
        wire.send(*numbered(long, 3, 11), *numbered(short, 10))
        seen = [sub.receive(PATIENCE_SECONDS) for _ in range(4)]
        assert [(m.seq, m.window.len_s) for m in seen if m] == [
            (9, 1.0),
            (3, 10.0),
            (10, 1.0),
            (11, 10.0),
        ]
        assert sub.receive(0.05) is None
        assert sub.gaps == {}


def test_a_new_run_is_no_gap(peers: ModuleType, wire: Wire) -> None:
    """A restarted publisher counts anew, and its first numbers are taken, not dropped."""
    before, after = (peers.make_factory().frame(peers.make_score()) for _ in range(2))
    with Subscriber(wire.endpoint) as sub:
        wire.meet(sub, peers.make_factory("hello").status("running"))
        wire.send(*numbered(before, 500, 501), *numbered(after, 0, 1))
        seen = [sub.receive(PATIENCE_SECONDS) for _ in range(4)]
        assert [m.seq for m in seen if m] == [500, 501, 0, 1]
        assert sub.gaps == {}


def test_what_cannot_be_decoded_is_skipped_and_counted(peers: ModuleType, wire: Wire) -> None:
    """Garbage, another major, a wrong topic and odd framings never raise."""
    frame = peers.make_factory().frame(peers.make_score())
    topic, payload = topic_of(frame), encode(frame)
    wrong: list[list[bytes]] = [
        [topic, b"garbage"],
        [topic, b""],
        [topic],
        [topic, payload, b"more"],
        [topic, payload.replace(b"dgiqa.frame/1", b"dgiqa.frame/2")],
        [topic.replace(b"cam1", b"cam2"), payload],
        [topic + b" " + payload[:-1]],
        [topic, b"[" * 100_000],
    ]
    with Subscriber(wire.endpoint) as sub:
        wire.meet(sub, peers.make_factory("hello").status("running"))
        for parts in wrong:
            wire.socket.send_multipart(parts)
        wire.send(frame)
        assert sub.receive(PATIENCE_SECONDS) == frame
        assert sub.num_undecodable == len(wrong)


def test_every_framing_and_encoding_is_understood(peers: ModuleType, wire: Wire) -> None:
    """A subscriber needs no setting for how the publisher frames and encodes."""
    frames = numbered(peers.make_factory().frame(peers.make_score()), *range(4))
    with Subscriber(wire.endpoint) as sub:
        wire.meet(sub, peers.make_factory("hello").status("running"))
        for number, frame in enumerate(frames):
            parts = [topic_of(frame), encode(frame, "msgpack" if number % 2 else "json")]
            wire.socket.send_multipart(parts if number < 2 else [b" ".join(parts)])
        assert [sub.receive(PATIENCE_SECONDS) for _ in frames] == frames


def test_latest_gives_the_newest_of_each(peers: ModuleType, wire: Wire) -> None:
    """A late reader skips to the newest of each kind, stream and window length; that is no gap."""
    factory, other = peers.make_factory("cam1"), peers.make_factory("cam2")
    with Subscriber(wire.endpoint, latest=True) as sub:
        wire.meet(sub, peers.make_factory("hello").status("running"))
        for index in range(200):
            wire.send(*(f.frame(peers.make_score(index)) for f in (factory, other)))
        wire.send(*(factory.window(peers.make_window(length=n)) for n in (1.0, 10.0, 1.0, 10.0)))
        last = factory.final(None, counts={}, duration_seconds=1.0, reason="end_of_stream")
        wire.send(last)
        time.sleep(0.3)  # be late
        seen: list[Message] = []
        while last not in seen:
            message = sub.receive(PATIENCE_SECONDS)
            assert message is not None
            seen.append(message)
        assert sub.gaps == {}
    newest = {slot_of(message): message.seq for message in seen}
    assert sorted((*slot[:2], seq) for slot, seq in newest.items()) == [
        ("final", "cam1", 0),
        ("frame", "cam1", 199),
        ("frame", "cam2", 199),
        ("window", "cam1", 2),
        ("window", "cam1", 3),
    ]
    assert len(seen) < 200


@pytest.mark.parametrize(
    ("choice", "wanted"),
    [
        ({"streams": ("cam1",)}, {("frame", "cam1"), ("status", "cam1")}),
        ({"kinds": ("status",)}, {("status", "cam1"), ("status", "cam10")}),
        ({"streams": ("cam10",), "kinds": ("frame",)}, {("frame", "cam10")}),
        ({}, {(k, s) for k in ("frame", "status") for s in ("cam1", "cam10")}),
    ],
)
def test_only_what_was_chosen_arrives(
    peers: ModuleType, wire: Wire, choice: dict[str, Any], wanted: set[tuple[str, str]]
) -> None:
    """Streams and kinds are filtered exactly: cam1 is not cam10."""
    one, ten = peers.make_factory("cam1"), peers.make_factory("cam10")
    hello_stream = choice.get("streams", ("hello",))[0]
    hello = peers.make_factory(hello_stream)
    last = peers.make_factory(hello_stream)
    is_frame = "frame" in choice.get("kinds", ("frame",))

    def note(factory: Any) -> Message:
        return factory.frame(peers.make_score()) if is_frame else factory.status("running")

    with Subscriber(wire.endpoint, **choice) as sub:
        wire.meet(sub, note(hello))
        for factory in (one, ten):
            wire.send(factory.frame(peers.make_score()), factory.status("running"))
        wire.send(note(last))
        seen = set()
        while (message := sub.receive(PATIENCE_SECONDS)) is not None and message.run != last.run:
            if message.run in (one.run, ten.run):
                seen.add((message.kind, message.stream))
    assert seen == wanted


def test_iteration_ends_after_silence(peers: ModuleType, wire: Wire) -> None:
    """With a timeout the loop ends by itself, not much earlier and not much later."""
    with Subscriber(wire.endpoint, timeout_seconds=1.5) as sub:
        wire.meet(sub, peers.make_factory("hello").status("running"))
        wire.send(peers.make_factory().status("running"))
        begin = time.monotonic()
        assert [m.stream for m in sub if m.stream == "cam1"] == ["cam1"]
        assert 1.5 <= time.monotonic() - begin < 10


def test_receive_gives_up_in_time() -> None:
    """Nobody publishing is None after the timeout, even a timeout of zero."""
    with Subscriber("tcp://127.0.0.1:1") as sub:
        begin = time.monotonic()
        assert sub.receive(0.0) is None
        assert sub.receive(0.2) is None
        assert 0.2 <= time.monotonic() - begin < 10


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"endpoint": "tcp://127.0.0.1:*"}, "port"),
        ({"endpoint": "tcp://*:5556"}, "host"),
        ({"endpoint": "pub+bind:tcp://127.0.0.1:5556"}, "sub\\+connect"),
        ({"endpoint": "http://127.0.0.1:5556"}, "tcp://HOST:PORT"),
        ({"kinds": ("frames",)}, "frame, window, status, meta, final"),
        ({"kinds": ("thumbnail",)}, "unknown kind"),
        ({"streams": ("a/b",)}, "stream 'a/b'"),
        ({"streams": "cam1"}, "write \\('cam1',\\)"),
        ({"curve_dir": "/nonexistent"}, "client.key_secret"),
    ],
)
def test_a_wrong_argument_is_told(arguments: dict[str, Any], said: str) -> None:
    """What can never receive anything is refused at once, naming what is allowed."""
    with pytest.raises(ConfigError, match=said):
        Subscriber(**{"endpoint": "tcp://127.0.0.1:5556", **arguments})


def test_a_subscriber_can_bind(peers: ModuleType) -> None:
    """Where publishers connect to one collector, none of their streams is missed."""
    with Subscriber("sub+bind:tcp://127.0.0.1:*") as sub, contextlib.ExitStack() as stack:
        settings = PublishSettings(endpoint=f"pub+connect:{sub.endpoint}")
        sinks = {name: ZeromqSink(settings) for name in ("cam1", "cam2")}
        for name, sink in sinks.items():
            stack.callback(sink.close)
            sink.send(peers.make_factory(name).status("running"))
        seen, deadline = set(), time.monotonic() + PATIENCE_SECONDS
        while seen != {"cam1", "cam2"} and time.monotonic() < deadline:
            for sink in sinks.values():
                sink.tick()
            if message := sub.receive(0.02):
                seen.add(message.stream)
        assert seen == {"cam1", "cam2"}
        with pytest.raises(SinkError, match="in use"):
            Subscriber(f"sub+bind:{sub.endpoint}")


def test_a_port_that_speaks_otherwise_is_told(caplog: pytest.LogCaptureFixture) -> None:
    """A subscriber on a port of an encrypted service names curve_dir: as an error, or, where the
    service hung up before it had said what it speaks (a busy machine), as a warning.
    """
    with zmq.Context() as context, context.socket(zmq.XPUB) as server:
        server.linger = 0
        public, secret = zmq.curve_keypair()
        server.curve_server, server.curve_publickey, server.curve_secretkey = True, public, secret
        server.bind("tcp://127.0.0.1:*")
        endpoint = server.getsockopt_string(zmq.LAST_ENDPOINT)
        told, deadline = "", time.monotonic() + PATIENCE_SECONDS
        with Subscriber(endpoint) as sub:
            while not told and "curve_dir" not in caplog.text and time.monotonic() < deadline:
                try:
                    assert sub.receive(0.1) is None
                except ConfigError as exc:
                    told = str(exc)
        assert "curve_dir" in told + caplog.text


def test_closing_twice_is_fine() -> None:
    """Closing again does nothing."""
    with Subscriber("tcp://127.0.0.1:1") as sub:
        sub.close()
