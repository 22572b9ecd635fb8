"""Where messages go: the :class:`Sink` protocol. One file per kind beside this one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from dgiqa_stream.wire import Message


class Sink(Protocol):
    """Takes messages; never blocks the caller for long, never raises out of ``send`` for a slow
    or absent receiver. Safe to call from several threads.
    """

    def send(self, message: Message) -> None:
        """Take one message. Raises SinkError where nothing can be written any more."""

    def tick(self) -> None:
        """Do what is due; called a few times a second."""

    def close(self) -> None:
        """Flush and release; calling twice is fine."""
