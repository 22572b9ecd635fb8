"""Running a command line to its exit code: whatever goes wrong is one line on standard error."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import typer

from dgiqa_stream.cli._interrupts import INTERRUPTED
from dgiqa_stream.cli._shared import BROKEN, OK, USAGE, complain
from dgiqa_stream.errors import DgiqaError
from dgiqa_stream.urls import redact_text

Verdict = tuple[int, str]
"""An exit code, and what to say."""

EXTRAS_WITH: Mapping[str, Sequence[str]] = MappingProxyType(
    {
        "matplotlib": ("report",),
        "nvidia_ml_py": ("gpu",),
        "onnx": ("train", "quant", "gpu"),
        "onnxscript": ("quant",),
        "openpyxl": ("shards",),
        "piq": ("shards",),
        "prometheus_client": ("prometheus",),
        "safetensors": ("quant", "teacher"),
        "scipy": ("train", "shards"),
        "ssimulacra2": ("shards",),
        "tensorrt": ("tensorrt", "gpu-tensorrt"),
        "timm": ("teacher",),
        "torch": ("train", "quant", "teacher", "shards", "gpu"),
        "torch_tensorrt": ("tensorrt", "gpu-tensorrt"),
        "torchvision": ("teacher",),
        "transformers": ("teacher",),
    }
)
"""The extras that bring a package, as pyproject.toml has them; a test keeps the two equal."""
_OURS = frozenset({"dgiqa_stream", "distill", "quant", "plugins"})


class _Interrupted(Exception):
    """Ctrl-C, which typer makes an exit code of without a word."""


def run(
    app: typer.Typer,
    *,
    program: str,
    prefix: str,
    judge: Callable[[Exception], Verdict | None],
    interrupted: str = "interrupted",
    extra: str = "",
) -> int:
    """Run the command that ``sys.argv`` asks for; returns the exit code.

    ``prefix`` begins the variables of options. ``judge`` says what an exception means; one that it
    gives None for is a fault of the program and is raised on. A wrong word is 2, Ctrl-C 130. A
    package that is not installed is 5 and the command that installs it: ``extra`` where that has
    it, else the first extra that does.
    """
    try:
        code: object = _command(app).main(auto_envvar_prefix=prefix, standalone_mode=False)
    except (_Interrupted, KeyboardInterrupt, typer.Abort):
        complain(interrupted)
        return INTERRUPTED
    except SystemExit:  # what typer makes of a broken pipe; `| head` is no failure
        return OK
    except Exception as exc:  # `judge` knows which ones are for people
        verdict = _wrong_word(exc, app, program) or judge(exc) or _missing_package(exc, extra)
        if verdict is None:
            raise
        if verdict[1]:
            complain(verdict[1])
        return verdict[0]
    return code if isinstance(code, int) else OK


def _wrong_word(exc: Any, app: typer.Typer, program: str) -> Verdict | None:
    """What typer's parser raised, as one line; it is told by its shape.

    typer keeps its classes to itself: of errors of usage it exports only some.
    """
    if not (hasattr(exc, "format_message") and hasattr(exc, "ctx")):
        return None
    if len(sys.argv) < 2:
        typer.echo(str(exc), err=True)  # no command at all: the help
        return USAGE, ""
    asked = exc.ctx.command_path if exc.ctx else _asked(app, program)
    told = redact_text(exc.format_message()).rstrip(".")
    return USAGE, f"{told}{_variable_of(exc)}; see `{asked} --help`"


def _variable_of(exc: Any) -> str:
    """The variable that gave a refused value; typer names those with a name of their own."""
    option, context = getattr(exc, "param", None), exc.ctx
    if option is None or context is None or context.auto_envvar_prefix is None:
        return ""
    is_set = _is_from_environment(context, option)
    return f" (from {_variable_set(context, option)})" if is_set else ""


def _is_from_environment(context: Any, option: Any) -> bool:
    source = context.get_parameter_source(option.name)
    return getattr(source, "name", "") == "ENVIRONMENT"


def _variable_set(context: Any, option: Any) -> str:
    """The variable that gives an option's value: one that it names itself comes first."""
    own = [option.envvar] if isinstance(option.envvar, str) else list(option.envvar or ())
    names = [*own, f"{context.auto_envvar_prefix}_{option.name}".upper()]
    return next((name for name in names if os.environ.get(name)), names[-1])


def _with_variable(text: str, context: Any) -> str:
    """An error that begins with an option, with the variable in its place that gave the value."""
    for option in context.command.params:
        said = next((o for o in option.opts if text.startswith(f"{o} ")), None)
        if said is None or not _is_from_environment(context, option):
            continue
        return _variable_set(context, option) + text.removeprefix(said)
    return text


def _missing_package(exc: Exception, extra: str) -> Verdict | None:
    """How to install what an import did not find; None for modules of our own."""
    name = (exc.name or "").partition(".")[0] if isinstance(exc, ModuleNotFoundError) else ""
    if not name or name in _OURS:
        return None
    extras = EXTRAS_WITH.get(name, ())
    wanted = extra if extra in extras else next(iter(extras), "")
    install = f"'dgiqa-stream[{wanted}]'" if wanted else name
    return BROKEN, f"this needs {name}, which is not installed: pip install {install}"


def _command(app: typer.Typer) -> Any:
    """The application as one command that lets a Ctrl-C out."""
    command: Any = typer.main.get_command(app)
    invoke = command.invoke

    def invoke_until_interrupted(context: Any) -> object:
        try:
            return invoke(context)
        except KeyboardInterrupt as exc:
            raise _Interrupted from exc

    command.invoke = invoke_until_interrupted
    for subcommand in getattr(command, "commands", {"": command}).values():
        _name_variables(subcommand)
    return command


def _name_variables(command: Any) -> None:
    """Have its errors name the variable, where that and no option gave the value."""
    invoke = command.invoke

    def invoke_and_name(context: Any) -> object:
        try:
            return invoke(context)
        except DgiqaError as exc:
            said = _with_variable(str(exc), context)
            if said == str(exc):
                raise
            raise type(exc)(said) from exc

    command.invoke = invoke_and_name


def _asked(app: typer.Typer, program: str) -> str:
    """The program and its command, where the parser does not say in which one it stopped."""
    group: Any = typer.main.get_command(app)
    command = sys.argv[1] if sys.argv[1] in getattr(group, "commands", ()) else ""
    return f"{program} {command}".rstrip()
