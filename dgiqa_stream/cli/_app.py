"""The application: its commands, and errors as one line and an exit code."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from dgiqa_stream.cli import _inspect, _score, _watch
from dgiqa_stream.cli._shared import INTERRUPTED, complain, exit_code_of, leave
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
app.command("sub")(_watch.sub)
app.command("report")(_inspect.report)
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
        bool, typer.Option("--version", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    """No-reference quality of video, 0 (bad) to 100 (excellent): files and live streams."""


def main() -> None:
    """Run the command line."""
    try:
        app(auto_envvar_prefix="DGIQA")
    except DgiqaError as exc:
        complain(exc)
        leave(exit_code_of(exc))
    except KeyboardInterrupt:
        complain("interrupted")
        leave(INTERRUPTED)
    except BrokenPipeError:  # the reader of our output went away, as `| head` does
        sys.stderr.close()
        leave(0)
