"""``dgiqa-stream sub``: from ZeroMQ to people."""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from collections.abc import Iterator
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dgiqa_stream.cli import _shared as shared
from dgiqa_stream.cli._interrupts import INTERRUPTED, Interrupts
from dgiqa_stream.cli._settings import Wording
from dgiqa_stream.cli._table import LiveTable

if TYPE_CHECKING:
    from dgiqa_stream.subscriber import Subscriber
    from dgiqa_stream.wire import Message

_POLL_SECONDS = 0.1
_PROBLEM_SECONDS = 3.0  # tries are a second apart


class Shown(StrEnum):
    """What ``sub`` prints."""

    TABLE = "table"
    NDJSON = "ndjson"


def sub(
    endpoint: Annotated[str, typer.Argument(metavar="ENDPOINT", help="tcp://HOST:PORT or ipc://")],
    *,
    format: Annotated[
        Shown | None, typer.Option("--format", "-f", help="table on a terminal, else ndjson.")
    ] = None,
    latest: Annotated[
        bool, typer.Option("--latest", help="Skip to the newest message when behind.")
    ] = False,
    stream: Annotated[list[str] | None, typer.Option(help="Only this stream.")] = None,
    kind: Annotated[
        list[str] | None, typer.Option(help="Only frame, window, status, meta or final.")
    ] = None,
    timeout: Annotated[
        float | None, typer.Option(help="Stop after so many seconds without a message.")
    ] = None,
    count: Annotated[int | None, typer.Option(min=1, help="Stop after so many messages.")] = None,
    curve_dir: Annotated[str, typer.Option(help="Folder of CURVE keys.")] = "",
    log_level: shared.Level = shared.LogLevel.WARNING,
) -> None:
    """Subscribe to a publisher: a live table, or one message per line."""
    shared.set_up_logging(log_level)
    from dgiqa_stream.subscriber import Subscriber

    # Its problems are told here, once, and in the words of the options.
    logging.getLogger("dgiqa_stream.subscriber").setLevel(logging.ERROR)
    shared.check_number("--timeout", timeout, least=0, most=1e9)
    shown = format or (Shown.TABLE if sys.stdout.isatty() else Shown.NDJSON)
    wording = Wording({"curve_dir": "--curve-dir"})
    with (
        Interrupts() as interrupts,
        wording.errors(),
        Subscriber(
            endpoint,
            streams=tuple(stream or ()),
            kinds=tuple(kind or ()),
            latest=latest,
            curve_dir=curve_dir,
        ) as subscriber,
    ):
        listener = _Listener(subscriber, interrupts, wording, timeout_seconds=timeout)
        received = _show(listener.messages(), shown, count)
        for topic, missing in subscriber.gaps.items():
            shared.say(f"{topic}: {missing} messages missed (a slow subscriber, or the network)")
        if subscriber.num_undecodable:
            shared.say(f"{subscriber.num_undecodable} messages could not be read")
    if interrupts:  # how most sessions end: nothing to complain of
        shared.leave(INTERRUPTED)
    if not received:
        hint = f": {wording(subscriber.problem or 'is a publisher running there?')}"
        is_told = listener.told and listener.told == subscriber.problem
        shared.complain(f"no message from {endpoint}{'' if is_told else hint}")
    shared.leave(shared.OK if received else shared.NOTHING)


class _Listener:
    """A subscriber's messages, until there was none for so long, or a signal."""

    def __init__(
        self,
        subscriber: Subscriber,
        interrupts: Interrupts,
        wording: Wording,
        *,
        timeout_seconds: float | None,
    ) -> None:
        self._subscriber, self._interrupts, self._wording = subscriber, interrupts, wording
        self._timeout_seconds = timeout_seconds
        self._problem = ""
        self._problem_at = 0.0
        self.told = ""
        """The problem that was told last."""

    def messages(self) -> Iterator[Message]:
        """Yield them as they come."""
        heard = time.monotonic()
        while not self._interrupts:
            left = _POLL_SECONDS
            if self._timeout_seconds is not None:
                left = self._timeout_seconds - (time.monotonic() - heard)
            message = self._subscriber.receive(min(max(left, 0.0), _POLL_SECONDS))
            if message is not None:
                yield message
                heard = time.monotonic()
            elif left <= 0:
                return
            else:
                self._tell_problem()

    def _tell_problem(self) -> None:
        """Say why nothing comes, once that has lasted: the next try may succeed, or be final."""
        problem, now = self._subscriber.problem, time.monotonic()
        if problem != self._problem:
            self._problem, self._problem_at = problem, now
        if problem and problem != self.told and now - self._problem_at > _PROBLEM_SECONDS:
            self.told = problem
            shared.say(f"warning: {self._subscriber.endpoint}: {self._wording(problem)}")


def _show(messages: Iterator[Message], shown: Shown, count: int | None) -> int:
    """Print messages as they come; returns their number."""
    from dgiqa_stream.wire import encode

    received = 0
    with LiveTable(sys.stdout) if shown is Shown.TABLE else contextlib.nullcontext() as table:
        for message in _counted(messages, count):
            received += 1
            if table is None:
                sys.stdout.write(encode(message).decode() + "\n")
                sys.stdout.flush()
            else:
                table.send(message)
                table.refresh()
    return received


def _counted(messages: Any, count: int | None) -> Iterator[Any]:
    for number, message in enumerate(messages, 1):
        yield message
        if number == count:
            return
