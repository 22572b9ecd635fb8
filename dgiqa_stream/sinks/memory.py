"""Keeps messages in memory; for tests and for hosts that look at them in the same process."""

from __future__ import annotations

import threading
from collections import deque
from typing import TypeVar

from dgiqa_stream.errors import SinkError
from dgiqa_stream.wire import Message

AnyMessage = TypeVar("AnyMessage", bound=Message)


class MemorySink:
    """The messages sent so far, oldest first, at most the last ``max_messages``. Thread-safe."""

    def __init__(self, *, max_messages: int | None = None) -> None:
        """None keeps all of them."""
        self._lock = threading.Lock()
        self._messages: deque[Message] = deque(maxlen=max_messages)
        self._num_ticks = 0
        self._closed = False

    @property
    def messages(self) -> list[Message]:
        """A copy."""
        with self._lock:
            return list(self._messages)

    @property
    def num_ticks(self) -> int:
        """How often :meth:`tick` was called."""
        return self._num_ticks

    @property
    def closed(self) -> bool:
        """Whether it was closed; messages stay."""
        return self._closed

    def of(self, kind: type[AnyMessage]) -> list[AnyMessage]:
        """The messages of one type, oldest first."""
        return [message for message in self.messages if isinstance(message, kind)]

    def send(self, message: Message) -> None:
        """Keep a message. Raises SinkError once closed."""
        with self._lock:
            if self._closed:
                raise SinkError("the memory sink is closed: make a new one")
            self._messages.append(message)

    def tick(self) -> None:
        """Only counted."""
        with self._lock:
            self._num_ticks += 1

    def close(self) -> None:
        """Take no more; twice is fine."""
        self._closed = True
