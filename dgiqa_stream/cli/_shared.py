"""Options and habits that the commands share."""

from __future__ import annotations

import contextlib
import copy
import logging
import os
import re
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from dgiqa_stream.cli._interrupts import INTERRUPTED
from dgiqa_stream.errors import ConfigError, DgiqaError, ModelError, SinkError
from dgiqa_stream.urls import redact

_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
OK, BELOW, USAGE, NOTHING, PARTIAL, BROKEN = 0, 1, 2, 3, 4, 5


class LogLevel(StrEnum):
    """How much is logged to standard error."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


_MODEL = typer.Option(
    "--model", "-m", envvar="DGIQA_MODEL", help="Shipped name or path of a .onnx."
)
_BACKEND = typer.Option(
    envvar="DGIQA_BACKEND",
    help="onnxruntime; on a GPU also torch, torch-tensorrt or onnxruntime-tensorrt.",
)
_DEVICE = typer.Option(
    envvar="DGIQA_DEVICE",
    help="auto, cpu, cuda or cuda:N; of the torch backends also several: cuda:N,cuda:M.",
)
_STRICT = typer.Option(
    "--strict",
    envvar="DGIQA_STRICT",
    help="Refuse to run on the CPU what --device auto or --hardware was to run on a GPU.",
)
_THREADS = typer.Option(
    envvar="DGIQA_THREADS", min=1, max=256, help="CPU threads of one inference."
)


def _else(option: Any, default: str) -> Any:
    """An option that is None where it was not given, and how the help tells what it is then."""
    given = copy.copy(option)
    given.show_default = default
    return given


# Given ones are None where they were not given, because a configuration file may say it then.
Model = Annotated[str, _MODEL]
GivenModel = Annotated[str | None, _else(_MODEL, "student")]
Backend = Annotated[str, _BACKEND]
GivenBackend = Annotated[str | None, _else(_BACKEND, "onnxruntime")]
Device = Annotated[str, _DEVICE]
GivenDevice = Annotated[str | None, _else(_DEVICE, "auto")]
Strict = Annotated[bool, _STRICT]
GivenStrict = Annotated[bool | None, _STRICT]
Threads = Annotated[int, _THREADS]
GivenThreads = Annotated[int | None, _else(_THREADS, "1")]
Hardware = Annotated[
    str | None,
    typer.Option(
        envvar="DGIQA_HARDWARE", metavar="cuda[:N]|qsv|amf", help="Decode there, where it can."
    ),
]
OnDeviceLoss = Annotated[
    str | None,
    typer.Option(
        envvar="DGIQA_ON_DEVICE_LOSS",
        metavar="fallback|end",
        help="Where the GPU is lost: score on by the CPU, or end.",
    ),
]
GpuProfile = Annotated[
    str | None,
    typer.Option(
        envvar="DGIQA_GPU_PROFILE",
        metavar="latency|low-clock",
        help="low-clock: larger batches that wait longer, for a GPU with little power.",
    ),
]
MaxGpuMb = Annotated[
    int | None,
    typer.Option(
        "--max-gpu-mb",
        envvar="DGIQA_MAX_GPU_MB",
        help="Memory of each GPU that torch may take, in MB; 0: all.",
    ),
]
Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", envvar="DGIQA_QUIET", help="No progress, no summary.")
]
Level = Annotated[
    LogLevel, typer.Option("--log-level", envvar="DGIQA_LOG_LEVEL", case_sensitive=False)
]
CropOption = Annotated[
    tuple[int, int, int, int] | None,
    typer.Option(
        "--crop",
        metavar="LEFT TOP WIDTH HEIGHT",
        help="Score this rectangle only: four numbers of pixels, as in --crop 0 0 640 360.",
    ),
]
StreamOptions = Annotated[
    list[str] | None,
    typer.Option("--stream-option", metavar="KEY=VALUE", help="FFmpeg option; may be repeated."),
]
Deinterlace = Annotated[
    str | None,
    typer.Option(
        metavar="none|bob", help="bob: two progressive pictures of each interlaced frame."
    ),
]
OpenTimeout = Annotated[float | None, typer.Option(help="Seconds to open; 10.")]
ReadTimeout = Annotated[float | None, typer.Option(help="Seconds of silence; 10.")]


def set_up_logging(level: LogLevel) -> None:
    """Log to standard error at a level; the root logger is ours only on the command line."""
    logging.basicConfig(
        level=level.value.upper(), format="%(levelname)s %(message)s", stream=sys.stderr
    )


def say(text: str) -> None:
    """A line for people, whatever control characters the name of a file brings along."""
    sys.stderr.write(_CONTROL.sub("?", text) + "\n")
    sys.stderr.flush()


def counted(number: int, noun: str) -> str:
    """``1 frame``, ``2 frames``."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def complain(error: BaseException | str) -> None:
    """One line naming what is wrong, without secrets."""
    say(f"error: {' '.join(str(error).split())}")


def exit_code_of(error: DgiqaError) -> int:
    """Configuration 2; model, backend, output and port 5; a source that cannot be read 3."""
    if isinstance(error, ConfigError):
        return USAGE
    return BROKEN if isinstance(error, ModelError | SinkError) else NOTHING


def first_code(codes: set[int]) -> int:
    """The one exit code where several apply: 130 before 2, 5, 3, 4, 1."""
    order = (INTERRUPTED, USAGE, BROKEN, NOTHING, PARTIAL, BELOW)
    return next((code for code in order if code in codes), OK)


def leave(code: int) -> NoReturn:
    """End the process now, whatever a blocked read of some thread is waiting for."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of our output went away, as `| head` does
        pass
    except OSError as exc:
        if code != BROKEN:  # else it has been told
            complain(f"cannot write standard output: {exc.strerror}")
        code = first_code({code, BROKEN})
    with contextlib.suppress(OSError):
        sys.stderr.flush()
    os._exit(code)


def path_with_a_name(text: str) -> Path:
    """A path; raises :class:`ConfigError` for an empty one, which Python takes for ``.``."""
    from dgiqa_stream.inputs import refuse_empty

    refuse_empty(text)
    return Path(text)


def pairs_of(options: list[str] | None) -> dict[str, str]:
    """``KEY=VALUE`` words to a mapping."""
    found = {}
    for option in options or ():
        key, equals, value = option.partition("=")
        if not equals or not key:
            raise ConfigError(f"--stream-option {redact(option)!r} is not KEY=VALUE")
        found[key] = value
    return found


def check_number(option: str, value: float | None, *, least: float, most: float) -> None:
    """Raise :class:`ConfigError` for what is out of range; typer itself lets NaN through."""
    if value is not None and not least <= value <= most:
        raise ConfigError(f"{option} {value:g} is not within {least:g}..{most:g}")
