from __future__ import annotations

import contextlib
import socket
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import zmq

from dgiqa_stream.config import PublishSettings
from dgiqa_stream.endpoint import parse_endpoint
from dgiqa_stream.errors import ConfigError, SinkError
from dgiqa_stream.sinks.zeromq import ZeromqSink
from dgiqa_stream.wire import decode, encode

ANY_PORT = "tcp://127.0.0.1:*"
PATIENCE_SECONDS = 20.0


@contextlib.contextmanager
def opened(endpoint: str = ANY_PORT, **settings: object) -> Iterator[ZeromqSink]:
    """A publisher that is closed at the end."""
    with contextlib.closing(ZeromqSink(PublishSettings(endpoint=endpoint, **settings))) as sink:
        yield sink


@contextlib.contextmanager
def plain_subscriber(sink: ZeromqSink, prefix: bytes = b"") -> Iterator[zmq.Socket[bytes]]:
    """A SUB socket as any other program would make it, its subscription known to the sink."""
    with zmq.Context() as context, context.socket(zmq.SUB) as sub:
        sub.linger = 0
        sub.subscribe(prefix)
        sub.connect(sink.endpoint)
        yield sub


def receive(sub: zmq.Socket[bytes], sink: ZeromqSink) -> list[bytes]:
    """The next message, while the sink ticks."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < deadline:
        sink.tick()
        if sub.poll(10):
            return sub.recv_multipart()
    raise AssertionError("no message came")


@pytest.mark.parametrize("encoding", ["json", "msgpack"])
@pytest.mark.parametrize("framing", ["multipart", "single"])
def test_any_subscriber_can_read_it(peers: ModuleType, encoding: str, framing: str) -> None:
    """A plain SUB socket gets topic and payload in the framing and encoding that were set."""
    status = peers.make_factory().status("running")
    with opened(encoding=encoding, framing=framing) as sink, plain_subscriber(sink) as sub:
        sink.send(status)
        parts = receive(sub, sink)
        if framing == "single":
            parts = parts[0].split(b" ", 1)
        assert parts == [b"dgiqa/1/status/cam1/", encode(status, encoding)]
        assert decode(parts[1]) == status


def test_a_newcomer_gets_what_matches_its_subscription(peers: ModuleType) -> None:
    """A subscription is answered with the last meta, status and window of each length, no more."""
    factory, other = peers.make_factory("cam1"), peers.make_factory("cam2")
    with opened() as sink:
        for make in (factory, other):
            sink.send(make.status("connecting"))
            sink.send(peers.make_meta(make))
            sink.send(make.status("running"))
            for length in (1.0, 10.0, 1.0):
                sink.send(make.window(peers.make_window(length=length)))
            sink.send(make.frame(peers.make_score()))
        with plain_subscriber(sink, b"dgiqa/1/window/cam1/") as sub:
            windows = [decode(receive(sub, sink)[1]) for _ in range(2)]
        with plain_subscriber(sink, b"dgiqa/1/") as sub:
            everything = [decode(receive(sub, sink)[1]) for _ in range(8)]
            sink.tick()
            assert not sub.poll(50)
    assert [(w.stream, w.window.len_s, w.seq) for w in windows] == [
        ("cam1", 1.0, 2),
        ("cam1", 10.0, 1),
    ]
    kinds = [m.kind for m in everything]
    assert kinds == ["meta"] * 2 + ["status"] * 2 + ["window"] * 4
    assert {m.state for m in everything[2:4]} == {"running"}


def test_windows_of_a_former_session_are_forgotten(peers: ModuleType) -> None:
    """After the source was opened again, a newcomer gets no window of the session before."""
    factory = peers.make_factory()
    with opened() as sink:
        sink.send(peers.make_meta(factory))
        sink.send(factory.window(peers.make_window()))
        factory.new_session()
        sink.send(peers.make_meta(factory))
        with plain_subscriber(sink) as sub:
            assert decode(receive(sub, sink)[1]).session == factory.session
            sink.tick()
            assert not sub.poll(50)


def test_thumbnails_stay_at_home(peers: ModuleType) -> None:
    """Pictures are never published, so that watching a camera's quality does not show its view."""
    factory = peers.make_factory()
    with opened() as sink, plain_subscriber(sink) as sub:
        sink.send(factory.status("running"))
        assert decode(receive(sub, sink)[1]).kind == "status"
        sink.send(factory.thumbnail(peers.make_score(), b"\xff\xd8", width=2, height=2))
        sink.send(factory.frame(peers.make_score()))
        kind = decode(receive(sub, sink)[1]).kind
        while kind == "status":  # told again to who subscribes as it is sent
            kind = decode(receive(sub, sink)[1]).kind
        assert kind == "frame"


def test_garbage_from_subscribers_is_harmless(peers: ModuleType) -> None:
    """What a hostile client sends upstream neither raises nor stops publishing."""
    with opened() as sink, zmq.Context() as context, context.socket(zmq.XSUB) as hostile:
        hostile.linger = 0
        hostile.connect(sink.endpoint)
        for parts in (
            [b""],
            [b"\x01\xff\x00"],
            [b"\x00never"],
            [b"\x02", b"\x01"],
            [b"\x01" * 999],
        ):
            hostile.send_multipart(parts)
        hostile.send(b"\x01" + b"x" * 10_000)
        with plain_subscriber(sink) as sub:
            sink.send(peers.make_factory().status("running"))
            assert decode(receive(sub, sink)[1]).kind == "status"


@pytest.mark.parametrize(
    "endpoint",
    [
        "",
        "5556",
        "tcp://",
        "tcp://127.0.0.1",
        "tcp://127.0.0.1:99999",
        "tcp://127.0.0.1:0",
        "tcp://127.0.0.1:http",
        "tcp://:5556",
        "udp://127.0.0.1:5556",
        "inproc://scores",
        "ipc://",
        "ipc://@abstract",
        "sub+bind:tcp://127.0.0.1:5556",
        "pub+listen:tcp://127.0.0.1:5556",
        "pub+connect:tcp://127.0.0.1:*",
        "pub+connect:ipc://*",
        "ipc://" + "x" * 200,
    ],
)
def test_an_impossible_endpoint_is_refused(endpoint: str) -> None:
    """A wrong endpoint is a ConfigError that repeats it, before anything is published."""
    with pytest.raises(ConfigError) as caught:
        ZeromqSink(PublishSettings(endpoint=endpoint))
    assert endpoint in str(caught.value)


@pytest.mark.parametrize(
    "endpoint",
    [
        "tcp://*:5556",
        "tcp://0.0.0.0:5556",
        "tcp://[::]:5556",
        "tcp://192.0.2.7:5556",
        "tcp://eth0:5556",
        "pub+bind:tcp://*:*",
        "pub+connect:tcp://monitor.example:5556",
        "tcp://localhost.example:5556",
        "tcp://127.0.0.1.example:5556",
    ],
)
def test_other_machines_need_a_key_or_consent(endpoint: str) -> None:
    """An endpoint that others can reach is refused without CURVE or insecure, naming both."""
    with pytest.raises(ConfigError, match=r"publish\.curve_dir .* publish\.insecure = true"):
        ZeromqSink(PublishSettings(endpoint=endpoint))


@pytest.mark.parametrize(
    "address",
    ["tcp://127.0.0.1:1", "tcp://127.9.9.9:1", "tcp://localhost:1", "tcp://[::1]:1", "ipc:///a"],
)
def test_this_machine_is_local(address: str) -> None:
    """Loopback addresses and ipc need neither key nor consent."""
    assert parse_endpoint(address, role="pub").is_local


def test_consent_opens_every_interface() -> None:
    """With insecure, a wildcard address is bound as asked."""
    with opened("tcp://0.0.0.0:*", insecure=True) as sink:
        assert sink.endpoint.startswith("tcp://0.0.0.0:")


def test_an_address_of_another_machine_is_refused() -> None:
    """Binding to an address that this machine does not have is a ConfigError."""
    with pytest.raises(ConfigError, match="no address of this machine"):
        ZeromqSink(PublishSettings(endpoint="tcp://192.0.2.1:5556", insecure=True))


def test_a_port_in_use_is_told() -> None:
    """A second publisher on a port raises SinkError with the endpoint and the next step."""
    with opened() as first:
        with pytest.raises(SinkError, match=r"free port") as caught:
            ZeromqSink(PublishSettings(endpoint=first.endpoint))
        assert first.endpoint in str(caught.value)
    with opened(first.endpoint) as again:  # and is free once the first has closed
        assert again.endpoint == first.endpoint


def test_ipc_is_private(tmp_path: Path) -> None:
    """The socket of an ipc endpoint can be used by its owner alone, and is removed at the end."""
    path = tmp_path / "s"
    with opened(f"ipc://{path}"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert not path.exists()


def test_an_ipc_socket_in_use_is_not_stolen(tmp_path: Path) -> None:
    """A second publisher on an ipc path is refused; ZeroMQ alone would take the path over."""
    with opened(f"ipc://{tmp_path}/s") as first, pytest.raises(SinkError, match="in use"):
        ZeromqSink(PublishSettings(endpoint=first.endpoint))


def test_a_file_is_not_replaced_by_a_socket(tmp_path: Path) -> None:
    """An ipc path that is a file is refused and keeps its content; ZeroMQ would delete it."""
    path = tmp_path / "recording.ndjson"
    path.write_text("precious")
    with pytest.raises(ConfigError, match="is a file"):
        ZeromqSink(PublishSettings(endpoint=f"ipc://{path}"))
    assert path.read_text() == "precious"


def test_a_socket_left_by_a_killed_publisher_is_taken_over(tmp_path: Path) -> None:
    """A stale socket file does not keep the next publisher from starting."""
    path = tmp_path / "s"
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as stale:
        stale.bind(str(path))
    with opened(f"ipc://{path}") as sink:
        assert sink.endpoint == f"ipc://{path}"


def test_a_missing_folder_is_told(tmp_path: Path) -> None:
    """An ipc path in a folder that does not exist says to make the folder."""
    with pytest.raises(SinkError, match="make the folder"):
        ZeromqSink(PublishSettings(endpoint=f"ipc://{tmp_path}/missing/s"))


def test_closing_twice_is_fine_and_sending_after_it_is_told(peers: ModuleType) -> None:
    """After close, ticks do nothing and sending raises SinkError."""
    with opened() as sink:
        sink.close()
        sink.tick()
        with pytest.raises(SinkError, match="closed"):
            sink.send(peers.make_factory().status("running"))


def test_closing_without_subscribers_does_not_wait(
    peers: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Closing after a summary does not wait for its second when nobody listens."""
    monkeypatch.setattr("dgiqa_stream.sinks.zeromq._FINAL_LINGER_MS", 60_000)
    with opened() as sink:
        summary = peers.make_factory().final(
            None, counts={}, duration_seconds=0.0, reason="interrupted"
        )
        sink.send(summary)
        begin = time.monotonic()
        sink.close()
        assert time.monotonic() - begin < 20.0
