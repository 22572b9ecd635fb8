"""The server of ``/metrics`` and the threads that listen to publishers."""

from __future__ import annotations

import errno
import logging
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from prometheus_client import CollectorRegistry, PlatformCollector, ProcessCollector
from prometheus_client import start_http_server as serve

from dgiqa_stream.endpoint import parse_endpoint
from dgiqa_stream.errors import ConfigError, DgiqaError, SinkError
from dgiqa_stream.subscriber import Subscriber
from plugins.prometheus.board import Board
from plugins.prometheus.collector import BoardCollector

_POLL_SECONDS = 0.3  # how soon a thread notices that it should end
_AGAIN_SECONDS = 10.0  # before a publisher that refused is tried again

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Address:
    """Where metrics are served."""

    host: str
    port: int
    """0 takes a free one."""

    def __str__(self) -> str:
        """As in a URL."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def parse_address(text: str) -> Address:
    """``HOST:PORT``, with brackets around an IPv6 host; raises :class:`ConfigError`."""
    host, colon, port = text.rpartition(":")
    is_port = port.isascii() and port.isdigit() and int(port) <= 65535
    bare = host.removeprefix("[").removesuffix("]")
    is_host = bool(bare) and (":" not in bare or host == f"[{bare}]")
    if not (colon and is_port and is_host):
        raise ConfigError(
            f"--listen {text!r} is not HOST:PORT: write 127.0.0.1:9556, or [::1]:9556"
        )
    return Address(bare, int(port))


class Exporter:
    """Listens to publishers and serves what they say; a context manager whose exit ends all of it.

    Has a registry of its own, so nothing else in the process is touched.
    """

    def __init__(
        self, board: Board, publishers: Sequence[str], address: Address, *, curve_dir: str = ""
    ) -> None:
        """Bind and subscribe.

        Raises :class:`ConfigError` for an address or keys that cannot be, and :class:`SinkError`
        where the port is taken.
        """
        self._board, self._curve_dir = board, curve_dir
        for publisher in publishers:
            parse_endpoint(publisher, role="sub")
            board.add_publisher(publisher)
        self._stopping = threading.Event()
        subscribers = {publisher: self._subscribe(publisher) for publisher in publishers}
        try:
            self._server, self._serving = serve(
                address.port, address.host, registry=registry_of(board)
            )
        except OSError as exc:
            for subscriber in subscribers.values():
                subscriber.close()
            raise _refusal(address, exc) from exc
        self.address = Address(address.host, self._server.server_port)
        self._threads = [
            threading.Thread(target=self._follow, args=one, name=f"hears {one[0]}", daemon=True)
            for one in subscribers.items()
        ]

    def __enter__(self) -> Self:
        """Begin to listen."""
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the port and every socket, and join every thread."""
        self._stopping.set()
        self._server.shutdown()
        self._server.server_close()
        self._serving.join()
        for thread in self._threads:
            thread.join()

    def _subscribe(self, publisher: str) -> Subscriber:
        return Subscriber(
            publisher,
            latest=True,
            curve_dir=self._curve_dir,
            on_gap=lambda topic, number: self._board.missed(publisher, number),
        )

    def _follow(self, publisher: str, subscriber: Subscriber | None) -> None:
        """Take messages until the end; a publisher that refuses is asked again later."""
        while not self._stopping.is_set():
            try:
                with subscriber or self._subscribe(publisher) as messages:
                    self._take(publisher, messages)
            except DgiqaError as exc:
                _log.error("%s; trying again in %g s", exc, _AGAIN_SECONDS)
                self._stopping.wait(_AGAIN_SECONDS)
            subscriber = None

    def _take(self, publisher: str, messages: Subscriber) -> None:
        while not self._stopping.is_set():
            message = messages.receive(_POLL_SECONDS)
            if message is not None:
                self._board.take(message, publisher)


def registry_of(board: Board) -> CollectorRegistry:
    """The board's metrics, and those of this process."""
    registry = CollectorRegistry()
    registry.register(BoardCollector(board))
    ProcessCollector(registry=registry)
    PlatformCollector(registry=registry)
    return registry


def _refusal(address: Address, exc: OSError) -> DgiqaError:
    if exc.errno == errno.EADDRINUSE:
        return SinkError(f"{address} is in use: choose another with --listen HOST:PORT")
    is_system = exc.errno is not None and exc.errno > 0  # a name that is not found has another kind
    reason = os.strerror(exc.errno) if is_system and exc.errno else exc.strerror or str(exc)
    return ConfigError(f"cannot listen on {address}: {reason}; choose another with --listen")
