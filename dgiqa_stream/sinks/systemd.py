"""What ``watch`` tells the service manager: ready, how it is, that it lives, that it stops.

The protocol is that of ``sd_notify(3)``: lines of ``NAME=value`` in one datagram to the socket that
``NOTIFY_SOCKET`` names.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import MutableMapping

from dgiqa_stream.wire import FrameMessage, Message, StatusMessage

log = logging.getLogger(__name__)

_ENDED = ("ended", "failed")
_PINGS_PER_TIMEOUT = 4  # two of them may be late
_MOST_SHOWN = 8


class ServiceSink:
    """Says ``WATCHDOG=1`` from the scoring loops, while each of them goes round.

    A session calls ``send`` and ``tick`` of its sinks in the thread that scores. So each stream has
    a sink of its own, :meth:`of_stream`, and a loop that hangs is one that is not heard: no timer
    speaks for it. Messages of the state and the newest scores make ``STATUS=``.
    """

    def __init__(self, address: str, *, watchdog_seconds: float | None = None) -> None:
        """``address`` is a path, or a name after ``@`` in the abstract namespace of Linux."""
        self._address = "\0" + address[1:] if address.startswith("@") else address
        self._period_seconds = watchdog_seconds and watchdog_seconds / _PINGS_PER_TIMEOUT
        self._watchdog_seconds = watchdog_seconds
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setblocking(False)
        self._lock = threading.Lock()
        self._heard_at: dict[str, float] = {}
        self._states: dict[str, str] = {}
        self._scores: dict[str, float] = {}
        self._pinged_at = 0.0

    def of_stream(self, stream: str) -> StreamServiceSink:
        """The sink of one stream, whose loop is expected to be heard from now on."""
        with self._lock:
            self._heard_at[stream] = time.monotonic()
            self._states[stream] = "connecting"
        return StreamServiceSink(self, stream)

    def ready(self) -> None:
        """Model and outputs are open; a stream that is away does not hold up the start."""
        self._tell("READY=1", f"STATUS={self._status()}")

    def stopping(self) -> None:
        """No loop is expected to be heard any more."""
        self._tell("STOPPING=1")

    def close(self) -> None:
        """Release the socket; calling twice is fine."""
        self._socket.close()

    def take(self, message: Message) -> None:
        """What a message tells of its stream."""
        if isinstance(message, FrameMessage):
            self._scores[message.stream] = message.quality.score
        elif isinstance(message, StatusMessage):
            with self._lock:
                self._states[message.stream] = message.state
                if message.state in _ENDED:
                    self._heard_at.pop(message.stream, None)
            self._tell(f"STATUS={self._status()}")

    def beat(self, stream: str) -> None:
        """A stream's loop went round; tells the watchdog where all did lately and it is time."""
        if self._watchdog_seconds is None or self._period_seconds is None:
            return
        now = time.monotonic()
        with self._lock:
            if stream in self._heard_at:
                self._heard_at[stream] = now
            oldest = min(self._heard_at.values(), default=now)
            is_due = now - self._pinged_at >= self._period_seconds
            if not is_due or now - oldest > self._watchdog_seconds / 2:
                return
            self._pinged_at = now
        self._tell("WATCHDOG=1")

    def _status(self) -> str:
        """``cam1 running 71.2, cam2 reconnecting``."""
        with self._lock:
            states = list(self._states.items())
        shown = [self._told(stream, state) for stream, state in states[:_MOST_SHOWN]]
        more = len(states) - len(shown)
        return ", ".join([*shown, f"and {more} more"] if more else shown)

    def _told(self, stream: str, state: str) -> str:
        score = self._scores.get(stream)
        return f"{stream} {state}" if score is None else f"{stream} {state} {score:.1f}"

    def _tell(self, *lines: str) -> None:
        try:
            self._socket.sendto("\n".join(lines).encode(), self._address)
        except OSError as exc:  # a full or lost socket must not end or delay the watching
            log.debug("service manager at %s: %s", self._address, exc)


class StreamServiceSink:
    """One stream's part of a :class:`ServiceSink`."""

    def __init__(self, service: ServiceSink, stream: str) -> None:
        """Made by :meth:`ServiceSink.of_stream`."""
        self._service, self._stream = service, stream

    def send(self, message: Message) -> None:
        """Take what it tells."""
        self._service.take(message)

    def tick(self) -> None:
        """The loop of this stream went round."""
        self._service.beat(self._stream)

    def close(self) -> None:
        """The socket is the service's."""


def service_of(environment: MutableMapping[str, str]) -> ServiceSink | None:
    """The manager that started this process, if one did and wants to hear.

    Its variables are taken out of ``environment``: helper programs are not to speak for us.
    """
    address = environment.pop("NOTIFY_SOCKET", "")
    micros = environment.pop("WATCHDOG_USEC", "")
    process = environment.pop("WATCHDOG_PID", "")
    if not address.startswith(("/", "@")):
        return None
    is_for_us = micros.isdecimal() and int(micros) > 0 and process in ("", str(os.getpid()))
    return ServiceSink(address, watchdog_seconds=int(micros) / 1e6 if is_for_us else None)
