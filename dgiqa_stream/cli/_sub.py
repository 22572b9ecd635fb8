"""``dgiqa-stream sub``: from ZeroMQ to people."""

from __future__ import annotations

import contextlib
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
        received = _show(_messages(subscriber, interrupts, timeout), shown, count)
        for topic, missing in subscriber.gaps.items():
            shared.say(f"{topic}: {missing} messages missed (a slow subscriber, or the network)")
        if subscriber.num_undecodable:
            shared.say(f"{subscriber.num_undecodable} messages could not be read")
    if interrupts:  # how most sessions end: nothing to complain of
        shared.leave(INTERRUPTED)
    if not received:
        hint = wording(subscriber.problem or "is a publisher running there?")
        shared.complain(f"no message from {endpoint}: {hint}")
    shared.leave(shared.OK if received else shared.NOTHING)


def _messages(
    subscriber: Subscriber, interrupts: Interrupts, timeout_seconds: float | None
) -> Iterator[Message]:
    """Messages until there was none for so long, or a signal."""
    heard = time.monotonic()
    while not interrupts:
        silent = time.monotonic() - heard
        left = _POLL_SECONDS if timeout_seconds is None else timeout_seconds - silent
        message = subscriber.receive(min(max(left, 0.0), _POLL_SECONDS))
        if message is not None:
            yield message
            heard = time.monotonic()
        elif left <= 0:
            return


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
