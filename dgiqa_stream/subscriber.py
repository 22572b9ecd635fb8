"""Receives published messages as typed values and tells what is missing.

with Subscriber("tcp://127.0.0.1:5556", kinds=("window",)) as messages:
    for message in messages:
        ...
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import TYPE_CHECKING, Self

import msgspec

from dgiqa_stream.config import StreamId
from dgiqa_stream.curve import load_client_keys, secure_client
from dgiqa_stream.endpoint import parse_endpoint
from dgiqa_stream.errors import ConfigError, SinkError
from dgiqa_stream.wire import (
    PUBLISHED_KINDS,
    Message,
    Slot,
    decode,
    slot_of,
    topic_of,
    topic_prefix,
)

if TYPE_CHECKING:
    import zmq

_POLL_MS = 500  # an interrupt is noticed at least this often, on every system
_HEARTBEAT_MS = 2000
_HEARTBEAT_TIMEOUT_MS = 6000
_MAX_RECONNECT_MS = 1000
_MAX_DRAINED = 10_000  # at once, so that a flood cannot hold up the caller

_log = logging.getLogger(__name__)


class Subscriber:
    """A context manager and iterator of messages. For one thread at a time.

    It may be made before the publisher runs, and outlives its restarts. A message sent again for a
    newcomer is not given twice.
    """

    def __init__(
        self,
        endpoint: str,
        *,
        streams: Sequence[str] = (),
        kinds: Sequence[str] = (),
        latest: bool = False,
        curve_dir: str = "",
        timeout_seconds: float | None = None,
        on_gap: Callable[[str, int], None] | None = None,
    ) -> None:
        """Subscribe to some streams and kinds; to all where none is named.

        With ``latest``, only the newest message of each kind, stream and window length is given,
        for whoever is slower than the publisher. Iteration ends after ``timeout_seconds`` without
        a message; None waits for ever. ``on_gap`` is called with a topic and the number of its
        messages that were lost.

        Raises :class:`ConfigError` for what cannot be, :class:`SinkError` where ``sub+bind:``
        finds its address in use.
        """
        import zmq

        prefixes = _prefixes(streams, kinds)
        place = parse_endpoint(endpoint, role="sub")
        keys = load_client_keys(Path(curve_dir)) if curve_dir else None
        self._address, self._binds = place.address, place.binds
        self._latest, self._timeout_seconds, self._on_gap = latest, timeout_seconds, on_gap
        self._newest: dict[Slot, Message] = {}
        self._last: dict[str, tuple[str, int]] = {}  # by topic: run and highest seq
        self._given: dict[Slot, tuple[str, int]] = {}
        self._gaps: Counter[str] = Counter()
        self._num_undecodable = 0
        self._problem = ""
        self._hang_up = "the publisher hung up before it was ready; it is ending, or " + (
            "server.key in curve_dir is not its key"
            if keys
            else "it wants keys: give curve_dir where it has one"
        )
        self._context = zmq.Context()
        self._socket = _make_socket(self._context, ipv6=place.is_ipv6)
        self._monitor: zmq.Socket[bytes] = self._socket.get_monitor_socket()
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)
        self._poller.register(self._monitor, zmq.POLLIN)
        try:
            if keys:
                secure_client(self._socket, keys)
            for prefix in prefixes:
                self._socket.subscribe(prefix)
            self._open()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        """The subscriber."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close."""
        self.close()

    def __iter__(self) -> Iterator[Message]:
        """Messages until ``timeout_seconds`` pass without one."""
        while (message := self.receive(self._timeout_seconds)) is not None:
            yield message

    @property
    def endpoint(self) -> str:
        """The address in use."""
        return self._address

    @property
    def gaps(self) -> Mapping[str, int]:
        """How many messages each topic has lost since it was first heard; a restart loses none."""
        return MappingProxyType(self._gaps)

    @property
    def num_undecodable(self) -> int:
        """How many messages were skipped because they are damaged or of another version."""
        return self._num_undecodable

    @property
    def problem(self) -> str:
        """Why there is no connection, where that is known; empty otherwise."""
        return self._problem

    def receive(self, timeout_seconds: float | None = None) -> Message | None:
        """The next message; None after ``timeout_seconds`` without one. None waits for ever.

        Raises :class:`ConfigError` where the publisher refuses this client for good.
        """
        deadline = None if timeout_seconds is None else time.monotonic() + timeout_seconds
        while True:
            message = self._take()
            if message is not None:
                return message
            left = _POLL_MS / 1e3 if deadline is None else deadline - time.monotonic()
            if left <= 0:
                return None
            self._wait(min(_POLL_MS, round(left * 1e3) + 1))

    def close(self) -> None:
        """Release the sockets; twice is fine."""
        if not self._context.closed:
            self._socket.disable_monitor()
            self._monitor.close(linger=0)
            self._socket.close(linger=0)
            self._context.term()

    def _open(self) -> None:
        import zmq

        try:
            if not self._binds:
                self._socket.connect(self._address)
                return
            self._socket.bind(self._address)
            self._address = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)
        except zmq.ZMQError as exc:
            kind = SinkError if exc.errno == zmq.EADDRINUSE else ConfigError
            reason = zmq.strerror(exc.errno or 0)
            raise kind(
                f"cannot subscribe at {self._address}: {reason}; choose another endpoint"
            ) from exc

    def _wait(self, timeout_ms: int) -> None:
        ready = dict(self._poller.poll(timeout_ms))
        if self._monitor in ready:
            self._read_monitor()

    def _take(self) -> Message | None:
        if not self._latest:
            return next(self._arrived(), None)
        for _, message in zip(range(_MAX_DRAINED), self._arrived(), strict=False):
            self._newest[slot_of(message)] = message
        oldest = next(iter(self._newest), None)
        return None if oldest is None else self._newest.pop(oldest)

    def _arrived(self) -> Iterator[Message]:
        """What has arrived and is new, without waiting."""
        import zmq

        while True:
            try:
                parts = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            message = _decoded(parts)
            if message is None:
                self._num_undecodable += 1
            elif self._is_new(message):
                yield message

    def _is_new(self, message: Message) -> bool:
        """Count what is missing before a message, and tell whether it was given before."""
        topic, slot = topic_of(message).decode("ascii"), slot_of(message)
        run, seq = self._last.get(topic, ("", -1))
        if run != message.run:
            self._last[topic] = message.run, message.seq
        elif message.seq > seq:
            self._last[topic] = run, message.seq
            if missing := message.seq - seq - 1:
                self._gaps[topic] += missing
                if self._on_gap:
                    self._on_gap(topic, missing)
        given_run, given_seq = self._given.get(slot, ("", -1))
        is_new = given_run != message.run or message.seq > given_seq
        if is_new:
            self._given[slot] = message.run, message.seq
        return is_new

    def _read_monitor(self) -> None:
        import zmq
        from zmq.utils.monitor import parse_monitor_message

        while self._monitor.poll(0):
            event = parse_monitor_message(self._monitor.recv_multipart())["event"]
            if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                self._problem = ""
            elif event == zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL:
                self._report(self._hang_up)
            elif event == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
                self._give_up("refused this client: copy client.key to its curve_dir")
            elif event == zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL:
                self._give_up(
                    "does not speak as this subscriber does: give curve_dir where the publisher "
                    "has one and only there, and see that the port is a publisher's"
                )

    def _give_up(self, what: str) -> None:
        """Raise, because ZeroMQ itself does not try again; a binding side waits for others."""
        problem = f"{self._address} {what}"
        if not self._binds:
            self._problem = problem
            raise ConfigError(problem)
        self._report(problem)

    def _report(self, problem: str) -> None:
        if problem != self._problem:
            self._problem = problem
            _log.warning("%s: %s", self._address, problem)


def _prefixes(streams: Sequence[str], kinds: Sequence[str]) -> list[bytes]:
    if isinstance(streams, str) or isinstance(kinds, str):
        raise ConfigError("streams and kinds are sequences: write ('cam1',), not 'cam1'")
    for kind in kinds:
        if kind not in PUBLISHED_KINDS:
            raise ConfigError(f"unknown kind {kind!r}; known here: {', '.join(PUBLISHED_KINDS)}")
    for stream in streams:
        try:
            msgspec.convert(stream, StreamId)
        except msgspec.ValidationError as exc:
            raise ConfigError(f"stream {stream!r} is not 1 to 64 of A-Z a-z 0-9 . _ -") from exc
    wanted = kinds or PUBLISHED_KINDS
    return [topic_prefix(kind, stream) for kind in wanted for stream in streams or (None,)]


def _decoded(parts: list[bytes]) -> Message | None:
    """A message framed as ``[topic][payload]`` or as ``topic SP payload``."""
    if len(parts) == 1:
        parts = parts[0].split(b" ", 1)
    if len(parts) != 2:
        return None
    topic, payload = parts
    try:
        message = decode(payload)
    except ValueError:
        return None
    return message if topic_of(message) == topic else None


def _make_socket(context: zmq.Context[zmq.Socket[bytes]], *, ipv6: bool) -> zmq.Socket[bytes]:
    import zmq

    socket = context.socket(zmq.SUB)
    socket.setsockopt(zmq.IPV6, int(ipv6))
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.HEARTBEAT_IVL, _HEARTBEAT_MS)
    socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, _HEARTBEAT_TIMEOUT_MS)
    socket.setsockopt(zmq.RECONNECT_IVL_MAX, _MAX_RECONNECT_MS)
    return socket
