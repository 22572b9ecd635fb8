"""``dgiqa-stream-prometheus``: publishers' messages as metrics for Prometheus.

Exit codes: 0 ended by Ctrl-C or SIGTERM, 2 a wrong option, 5 the port is taken or a package is not
installed.
"""

from __future__ import annotations

import logging
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from importlib import resources
from typing import Annotated

import typer

from dgiqa_stream.cli.running import Verdict, run
from dgiqa_stream.errors import ConfigError, DgiqaError

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_DEFAULT_PUBLISHER = "tcp://127.0.0.1:5556"  # where `dgiqa-stream watch` publishes
_USAGE, _BROKEN = 2, 5

app = typer.Typer(
    name="dgiqa-stream-prometheus", add_completion=False, pretty_exceptions_enable=False,
    rich_markup_mode=None,
)  # fmt: skip


class Shown(StrEnum):
    """Files that come with the exporter."""

    RULES = "rules"
    DASHBOARD = "dashboard"


_FILES = {Shown.RULES: "rules.yml", Shown.DASHBOARD: "dashboard.json"}


def _print_file(wanted: Shown | None) -> None:
    if wanted is not None:
        typer.echo(shipped(wanted), nl=False)
        raise typer.Exit


def shipped(wanted: Shown) -> str:
    """Alert rules for Prometheus, or a dashboard for Grafana."""
    return (resources.files("plugins.prometheus") / _FILES[wanted]).read_text(encoding="utf-8")


@app.command()
def export(
    *,
    connect: Annotated[
        list[str] | None,
        typer.Option(metavar="ENDPOINT", help=f"A publisher; repeatable; {_DEFAULT_PUBLISHER}."),
    ] = None,
    listen: Annotated[
        str, typer.Option(metavar="HOST:PORT", help="Where metrics are served; port 0: a free one.")
    ] = "127.0.0.1:9556",
    stale_after: Annotated[
        float, typer.Option(help="Seconds of silence after which a stream is down.")
    ] = 15.0,
    forget_after: Annotated[
        float, typer.Option(help="Seconds of silence after which it is forgotten.")
    ] = 3600.0,
    curve_dir: Annotated[str, typer.Option(help="Folder of CURVE keys.")] = "",
    show: Annotated[
        Shown | None,
        typer.Option(callback=_print_file, is_eager=True, help="Print this file and leave."),
    ] = None,
) -> None:
    """Serve the scores of publishers as metrics for Prometheus, until Ctrl-C."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    _check_seconds("--stale-after", stale_after, least=1.0)
    _check_seconds("--forget-after", forget_after, least=stale_after)
    from plugins.prometheus.board import Board
    from plugins.prometheus.exporter import Exporter, parse_address

    board = Board(stale_after_seconds=stale_after, forget_after_seconds=forget_after)
    publishers = list(dict.fromkeys(connect or [_DEFAULT_PUBLISHER]))
    address = parse_address(listen)
    with (
        _told_of_signals() as told,
        Exporter(board, publishers, address, curve_dir=curve_dir) as exporter,
    ):
        typer.echo(
            f"http://{exporter.address}/metrics serves what {', '.join(publishers)} publishes",
            err=True,
        )
        told.recv(1)


@contextmanager
def _told_of_signals() -> Iterator[socket.socket]:
    """A socket that can be read from once there was a signal, whichever thread the kernel chose.

    ``sigwait`` is no way: between two waits a signal goes to one of the threads that numpy started
    while it was imported, and there its default ends the process.
    """
    told, telling = socket.socketpair()
    telling.setblocking(False)
    with told, telling:
        wakeup = signal.set_wakeup_fd(telling.fileno(), warn_on_full_buffer=False)
        before = [signal.signal(number, lambda *_: None) for number in _SIGNALS]
        try:
            yield told
        finally:
            for number, handler in zip(_SIGNALS, before, strict=True):
                signal.signal(number, handler)
            signal.set_wakeup_fd(wakeup)


def main() -> None:
    """Run the command line."""
    sys.exit(run(app, program="dgiqa-stream-prometheus", prefix="DGIQA_PROMETHEUS", judge=_judge))


def _judge(exc: Exception) -> Verdict | None:
    if isinstance(exc, DgiqaError):
        return (_USAGE if isinstance(exc, ConfigError) else _BROKEN), str(exc)
    return None


def _check_seconds(option: str, value: float, *, least: float) -> None:
    if not least <= value <= 1e9:  # NaN is not, either
        raise ConfigError(f"{option} {value:g} is not within {least:g}..1e9 seconds")


if __name__ == "__main__":
    main()
