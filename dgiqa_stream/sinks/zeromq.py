"""Publishes messages over ZeroMQ: XPUB, so that a late subscriber learns what it has missed.

A new subscription gets the last ``meta``, ``status`` and windows again, newest window first. They
reach every subscriber of the topic; a repetition is known by its ``seq``.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket as unix
import stat
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from dgiqa_stream.config import PublishSettings
from dgiqa_stream.curve import ClientGate, ServerKeys, load_server_keys, secure_server
from dgiqa_stream.endpoint import Endpoint, parse_endpoint
from dgiqa_stream.errors import ConfigError, SinkError
from dgiqa_stream.wire import Message, MetaMessage, Slot, encode, slot_of, topic_of

if TYPE_CHECKING:
    import zmq

_LINGER_MS = 100
_FINAL_LINGER_MS = 1000  # the summary is worth waiting for
_HEARTBEAT_MS = 2000
_HEARTBEAT_TIMEOUT_MS = 6000
_MAX_SUBSCRIPTION_BYTES = 4096
_MAX_SUBSCRIPTIONS = 1000  # read at once, so that a flood of them cannot hold up publishing
_REPEATED = ("meta", "status", "window")
_IN_USE = "stop the program that uses it, or choose another publish.endpoint"
_ADVICE = {
    errno.EADDRINUSE: f"{_IN_USE} (tcp://127.0.0.1:* takes a free port)",
    errno.EACCES: "choose a port above 1023 or a folder that you may write to",
    errno.ENOENT: "make the folder of the socket first",
}


class ZeromqSink:
    """Binds (or connects) when made and publishes ``[topic][payload]``. Thread-safe.

    ``send`` and ``tick`` never block: for a subscriber that has ``high_water_mark`` messages
    waiting, new ones are dropped, which it sees in ``seq``.
    """

    def __init__(self, settings: PublishSettings) -> None:
        """Raises :class:`ConfigError` for an endpoint that cannot or must not be used.

        Raises :class:`SinkError` where it is in use or not permitted.
        """
        import zmq

        self._settings = settings
        self._place, keys = check_publishing(settings)
        self._lock = threading.Lock()
        self._kept: dict[Slot, _Kept] = {}
        self._linger_ms = _LINGER_MS
        self._context = zmq.Context()
        self._gate = ClientGate(self._context, keys.clients) if keys else None
        self._socket = _make_socket(self._context, settings)
        self._closed = False
        self._ipc_inode = 0
        try:
            if keys:
                secure_server(self._socket, keys)
            _open(self._socket, self._place)
            self._ipc_inode = _inode(self._place) if self._place.binds else 0
        except BaseException:
            self.close()
            raise
        self._endpoint = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)

    @property
    def endpoint(self) -> str:
        """The address in use; for a port ``*``, with the port that was free."""
        return self._endpoint

    @property
    def num_refused(self) -> int:
        """How many connections CURVE has refused."""
        return self._gate.num_refused if self._gate else 0

    def send(self, message: Message) -> None:
        """Publish; thumbnails are for recordings and left out. Raises SinkError once closed."""
        if message.kind == "thumbnail":
            return
        kept = _Kept(message, self._settings)
        with self._lock:
            if self._closed:
                raise SinkError(f"the publisher at {self._endpoint} is closed: make a new sink")
            self._serve()
            self._keep(kept)
            self._put(kept)
            if message.kind == "final":
                self._linger_ms = _FINAL_LINGER_MS

    def tick(self) -> None:
        """Admit clients and answer new subscriptions; a client waits for the next call."""
        with self._lock:
            if not self._closed:
                self._serve()

    def close(self) -> None:
        """Send what is waiting, for 0.1 s, or 1 s where a summary was sent; twice is fine."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            if self._gate:
                self._gate.close()
            self._socket.close(linger=self._linger_ms)
            self._context.term()
            if self._ipc_inode and _inode(self._place) == self._ipc_inode:
                Path(self._place.ipc_path).unlink()  # ZeroMQ leaves it

    def _serve(self) -> None:
        if self._gate:
            self._gate.answer()
        prefixes = tuple(set(self._new_subscriptions()))
        if not prefixes:
            return
        for kept in sorted(self._kept.values()):
            if kept.topic.startswith(prefixes):
                self._put(kept)

    def _new_subscriptions(self) -> Iterator[bytes]:
        import zmq

        for _ in range(_MAX_SUBSCRIPTIONS):
            try:
                parts = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            if len(parts) == 1 and parts[0][:1] == b"\x01":
                yield parts[0][1:]

    def _keep(self, kept: _Kept) -> None:
        message = kept.message
        if message.kind not in _REPEATED:
            return
        if isinstance(message, MetaMessage):  # windows of the session before are no news
            self._kept = {
                slot: k
                for slot, k in self._kept.items()
                if k.message.stream != message.stream or k.message.session == message.session
            }
        self._kept[slot_of(message)] = kept

    def _put(self, kept: _Kept) -> None:
        import zmq

        try:
            self._socket.send_multipart(kept.parts, zmq.NOBLOCK)
        except zmq.Again:  # nobody there can take it
            return
        except zmq.ZMQError as exc:
            raise SinkError(f"cannot publish at {self._endpoint}: {exc}; start again") from exc


class _Kept:
    """A message ready to be sent, and its place among those sent again."""

    __slots__ = ("message", "parts", "topic")

    def __init__(self, message: Message, settings: PublishSettings) -> None:
        self.message = message
        self.topic = topic_of(message)
        payload = encode(message, settings.encoding)
        is_single = settings.framing == "single"
        self.parts = [self.topic + b" " + payload] if is_single else [self.topic, payload]

    def __lt__(self, other: _Kept) -> bool:
        """First what explains the rest; windows newest first, so that no gap is seen."""
        return self._order < other._order

    @property
    def _order(self) -> tuple[int, int]:
        return _REPEATED.index(self.message.kind), -self.message.seq


def check_publishing(settings: PublishSettings) -> tuple[Endpoint, ServerKeys | None]:
    """Where to publish, and with which keys, without opening anything.

    Raises :class:`ConfigError` for an endpoint or keys that cannot or must not be used.
    """
    endpoint = parse_endpoint(settings.endpoint, role="pub")
    if not (endpoint.is_local or settings.curve_dir or settings.insecure):
        raise ConfigError(
            f"publish.endpoint {settings.endpoint} can be reached from other machines: set "
            "publish.curve_dir to encrypt it, or publish.insecure = true to allow it as it is"
        )
    return endpoint, load_server_keys(Path(settings.curve_dir)) if settings.curve_dir else None


def _make_socket(
    context: zmq.Context[zmq.Socket[bytes]], settings: PublishSettings
) -> zmq.Socket[bytes]:
    import zmq

    socket = context.socket(zmq.XPUB)
    socket.setsockopt(zmq.XPUB_VERBOSE, 1)
    socket.setsockopt(zmq.SNDHWM, settings.high_water_mark)
    socket.setsockopt(zmq.LINGER, _LINGER_MS)
    socket.setsockopt(zmq.HEARTBEAT_IVL, _HEARTBEAT_MS)
    socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, _HEARTBEAT_TIMEOUT_MS)
    socket.setsockopt(zmq.MAXMSGSIZE, _MAX_SUBSCRIPTION_BYTES)
    return socket


def _open(socket: zmq.Socket[bytes], place: Endpoint) -> None:
    import zmq

    socket.setsockopt(zmq.IPV6, int(place.is_ipv6))
    try:
        if not place.binds:
            socket.connect(place.address)
        elif place.ipc_path:
            _bind_ipc(socket, place)
        else:
            socket.bind(place.address)
    except zmq.ZMQError as exc:
        number = exc.errno or 0
        reason = zmq.strerror(number)
        if number in _ADVICE:
            raise SinkError(
                f"cannot publish at {place.address}: {reason}; {_ADVICE[number]}"
            ) from exc
        raise ConfigError(
            f"publish.endpoint {place.address} is no address of this machine: {reason}; "
            "use tcp://127.0.0.1:5556 or ipc:///PATH"
        ) from exc


def _bind_ipc(socket: zmq.Socket[bytes], place: Endpoint) -> None:
    """Bind so that only this user can connect; ZeroMQ itself would replace whatever is there."""
    import zmq

    if place.ipc_path != "*":
        _refuse_to_replace(place)
    before = os.umask(0o077)  # the socket is private from its first moment
    try:
        socket.bind(place.address)
    finally:
        os.umask(before)
    path = socket.getsockopt_string(zmq.LAST_ENDPOINT).removeprefix("ipc://")
    Path(path).chmod(0o600)


def _inode(place: Endpoint) -> int:
    try:
        return Path(place.ipc_path).stat().st_ino if place.ipc_path else 0
    except OSError:  # removed, or a path of ZeroMQ's own, which it removes
        return 0


def _refuse_to_replace(place: Endpoint) -> None:
    try:
        mode = Path(place.ipc_path).stat().st_mode
    except OSError:  # nothing there, or nothing that can be reached: binding says it
        return
    if not stat.S_ISSOCK(mode):
        raise ConfigError(f"publish.endpoint {place.address} is a file: choose another path")
    with contextlib.closing(unix.socket(unix.AF_UNIX)) as probe:
        try:
            probe.connect(place.ipc_path)
        except OSError:  # left by a publisher that was killed
            return
    raise SinkError(f"cannot publish at {place.address}: it is in use; {_IN_USE}")
