"""The application: its commands, and errors as one line and an exit code."""

from __future__ import annotations

import os
import sys
from io import TextIOWrapper
from typing import Annotated

import typer

from dgiqa_stream.cli import _compare, _inspect, _score, _sub, _watch
from dgiqa_stream.cli._environment import PREFIX, warn_of_unknown_variables
from dgiqa_stream.cli._shared import BROKEN, exit_code_of, leave
from dgiqa_stream.cli.running import Verdict, run
from dgiqa_stream.errors import DgiqaError

app = typer.Typer(
    name="dgiqa-stream",
    help="No-reference quality of video, 0 (bad) to 100 (excellent): files and live streams.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command("score")(_score.score)
app.command("watch")(_watch.watch)
app.command("sub")(_sub.sub)
app.command("report")(_inspect.report)
app.command("compare")(_compare.compare)
app.command("models")(_inspect.models)
app.command("config")(_inspect.config)
app.command("doctor")(_inspect.doctor)
app.command("keys")(_inspect.keys)


def _show_version(wanted: bool) -> None:
    if wanted:
        from dgiqa_stream.versions import package_version

        typer.echo(f"dgiqa-stream {package_version()}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        # Not from the environment: images often hold a DGIQA_VERSION of their own.
        typer.Option("--version", callback=_show_version, is_eager=True, allow_from_autoenv=False),
    ] = False,
) -> None:
    """No-reference quality of video, 0 (bad) to 100 (excellent): files and live streams."""


def main() -> None:
    """Run the command line."""
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8", errors="backslashreplace")  # any name of a file
    warn_of_unknown_variables(app, os.environ, command="".join(sys.argv[1:2]))
    leave(run(app, program="dgiqa-stream", prefix=PREFIX, judge=_judge))


def _judge(exc: Exception) -> Verdict | None:
    if isinstance(exc, DgiqaError):
        return exit_code_of(exc), str(exc)
    if isinstance(exc, OSError):
        return BROKEN, f"{exc.filename or 'standard output'}: {exc.strerror or exc}"
    return None
