"""``dgiqa-stream score``: files, pictures, folders and standard input."""

from __future__ import annotations

import contextlib
import sys
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dgiqa_stream.cli import _shared as shared
from dgiqa_stream.cli._settings import Wording, settle
from dgiqa_stream.errors import ConfigError, SinkError, SourceError, SourceUnsupported

if TYPE_CHECKING:
    from collections.abc import Iterator

    from dgiqa_stream.cli._rows import InputResult, RowWriter
    from dgiqa_stream.config import StreamConfig
    from dgiqa_stream.scorer import Scorer


class Format(StrEnum):
    """How scores are written."""

    CSV = "csv"
    NDJSON = "ndjson"
    JSON = "json"


def score(
    paths: Annotated[
        list[str], typer.Argument(metavar="PATH...", help="Videos, pictures, folders, or -.")
    ],
    *,
    format: Annotated[Format, typer.Option("--format", "-f")] = Format.CSV,
    output: Annotated[str, typer.Option("--output", "-o", metavar="FILE")] = "-",
    fps: Annotated[
        float | None, typer.Option(help="Score this many frames a second instead of all.")
    ] = None,
    every: Annotated[int | None, typer.Option(help="Score each Nth frame.")] = None,
    start: Annotated[
        float | None, typer.Option(help="Skip so many seconds; index counts from there.")
    ] = None,
    duration: Annotated[float | None, typer.Option(help="Stop after so many seconds.")] = None,
    fail_under: Annotated[
        float | None, typer.Option(help="Exit with 1 where an input's mean is lower.")
    ] = None,
    model: shared.Model = "student",
    device: shared.Device = "auto",
    threads: shared.Threads = 1,
    crop: shared.CropOption = None,
    letterbox: Annotated[bool, typer.Option(help="Leave detected black bars out.")] = True,
    stream_option: shared.StreamOptions = None,
    open_timeout: shared.OpenTimeout = None,
    read_timeout: shared.ReadTimeout = None,
    quiet: shared.Quiet = False,
    log_level: shared.Level = shared.LogLevel.WARNING,
) -> None:
    """Score files: every frame unless --fps or --every says otherwise; data to standard output."""
    shared.set_up_logging(log_level)
    shared.check_number("--fail-under", fail_under, least=0, most=100)
    if fps is not None and every is not None:
        raise ConfigError("--fps and --every cannot both choose the frames: give one of them")
    from dgiqa_stream.config import StreamConfig

    settings, wording = settle(
        StreamConfig(),
        {
            "sampler.mode": ("", "time" if fps is not None else "every"),
            "sampler.frames_per_second": ("--fps", fps),
            "sampler.every": ("--every", every),
            "source.start_seconds": ("--start", start),
            "source.duration_seconds": ("--duration", duration),
            "source.options": ("--stream-option", shared.pairs_of(stream_option)),
            "source.open_timeout_seconds": ("--open-timeout", open_timeout),
            "source.read_timeout_seconds": ("--read-timeout", read_timeout),
            "overload.policy": ("", "wait"),
            "picture.crop": ("--crop", crop),
            "picture.letterbox": ("--letterbox", letterbox),
            "model.name": ("--model", model),
            "model.device": ("--device", device),
            "model.threads": ("--threads", threads),
        },
    )
    with wording.errors():
        shared.leave(_run(paths, settings, format, output, fail_under, quiet, wording))


def _run(
    paths: list[str],
    settings: StreamConfig,
    format: Format,
    output: str,
    fail_under: float | None,
    quiet: bool,
    wording: Wording,
) -> int:
    """Score everything and return the exit code."""
    from dgiqa_stream.cli._rows import InputResult, open_output
    from dgiqa_stream.inputs import expand, refuse_overwriting
    from dgiqa_stream.scorer import scorer_of
    from dgiqa_stream.sources import check_options
    from dgiqa_stream.urls import redact, scheme_of

    inputs = expand(paths)
    for path in inputs:
        check_options(path, settings.source.options)
    refuse_overwriting(output, inputs)
    results: list[InputResult] = []
    codes: set[int] = set()
    with scorer_of(settings.model) as scorer, _progress(quiet) as progress:
        out = open_output(output)  # not before the model is known to work: it empties the file
        try:
            writer = _writer(format, out, inputs, scorer, settings)
            try:
                for path in inputs:
                    results.append(InputResult(path if scheme_of(path) == "file" else redact(path)))
                    _score_input(
                        path, results[-1], scorer, settings, writer, progress, codes, wording
                    )
            except KeyboardInterrupt:
                shared.complain("interrupted: what was scored so far is written")
                codes.add(shared.INTERRUPTED)
            writer.finish(results, interrupted=shared.INTERRUPTED in codes)
            if out is not sys.stdout:
                out.close()
        except BrokenPipeError:
            raise
        except OSError as exc:
            raise SinkError(
                f"cannot write {'standard output' if output == '-' else output}: {exc.strerror}; "
                "make room or choose another -o"
            ) from exc
    return shared.first_code(codes | _verdict(results, fail_under, quiet))


def _writer(
    format: Format, out: Any, inputs: list[str], scorer: Scorer, settings: StreamConfig
) -> RowWriter:
    from dgiqa_stream.cli import _rows as rows
    from dgiqa_stream.inputs import is_folder, is_still_path

    if format is Format.JSON:
        return rows.JsonDocument(out, model=scorer.manifest, settings=_told(settings))
    stills_only = all(is_still_path(path) or is_folder(path) for path in inputs)
    kind = rows.CsvRows if format is Format.CSV else rows.NdjsonRows
    return kind(out, stills_only=stills_only)


def _told(settings: StreamConfig) -> dict[str, Any]:
    """The settings that change a score."""
    import msgspec

    from dgiqa_stream.redaction import redact_options

    tables = {
        name: msgspec.to_builtins(getattr(settings, name))
        for name in ("source", "sampler", "picture", "model", "pooling")
    }
    tables["source"]["options"] = redact_options(settings.source.options)
    return tables


def _score_input(
    path: str,
    result: InputResult,
    scorer: Scorer,
    settings: StreamConfig,
    writer: RowWriter,
    progress: _Progress,
    codes: set[int],
    wording: Wording,
) -> None:
    """Score one input into its result; one that fails is named, and the others go on."""
    from dgiqa_stream.inputs import refuse_folder
    from dgiqa_stream.pipeline import score_frames
    from dgiqa_stream.pooling import TemporalPooling
    from dgiqa_stream.urls import stream_id_of

    pooling = TemporalPooling(settings.pooling, stream=stream_id_of(path), period_seconds=None)
    progress.begin(result.path)
    frames = score_frames(path, scorer, config=settings, on_open=progress.opened)
    try:
        refuse_folder(path)
        with contextlib.closing(frames):
            for scored in frames:
                writer.frame(result.path, scored)
                pooling.add(scored)
                result.num_frames += 1
                progress.scored(scored.info.pts_seconds)
        if not result.num_frames:
            raise SourceUnsupported(f"{result.path}: no frame to score in the chosen range")
    except (SourceError, ConfigError) as exc:  # the latter: a crop outside of this picture
        result.error = wording(str(exc))
        named = result.path in result.error
        shared.complain(result.error if named else f"{result.path}: {result.error}")
        if isinstance(exc, ConfigError):
            codes.add(shared.USAGE)
        if not result.num_frames:
            writer.failed(result.path, result.error)
    except KeyboardInterrupt:
        result.error = "interrupted"
        raise
    finally:
        if result.num_frames:
            result.pooled = pooling.session().pool
    progress.ended()


def _verdict(results: list[InputResult], fail_under: float | None, quiet: bool) -> set[int]:
    """The exit codes that apply, and the summary lines."""
    codes: set[int] = set()
    for result in results:
        mean = result.mean
        if mean is not None and not quiet:
            low = result.pooled.get("low5")
            worst = "" if result.num_frames == 1 or low is None else f"  worst 5 % {low:.1f}"
            shared.say(f"{result.path}: {mean:.1f}{worst}  ({result.num_frames} frames)")
        if mean is not None and fail_under is not None and mean < fail_under:
            shared.say(f"{result.path}: mean {mean:.2f} is below --fail-under {fail_under:g}")
            codes.add(shared.BELOW)
    if not any(r.num_frames for r in results):
        codes.add(shared.NOTHING)
    elif any(r.error for r in results):
        codes.add(shared.PARTIAL)
    return codes


class _Progress:
    """A bar with an estimate on a terminal; nothing elsewhere."""

    def __init__(self, bar: Any) -> None:
        self._bar, self._task = bar, None
        self._first: float | None = None

    def begin(self, path: str) -> None:
        if self._bar is not None:
            self._first = None
            self._task = self._bar.add_task(path, total=None)

    def opened(self, info: Any) -> None:
        if self._bar is not None and info.duration_seconds:
            self._bar.update(self._task, total=info.duration_seconds)

    def scored(self, pts_seconds: float) -> None:
        if self._bar is not None:
            self._first = pts_seconds if self._first is None else self._first
            self._bar.update(self._task, completed=pts_seconds - self._first)

    def ended(self) -> None:
        if self._bar is not None:
            self._bar.remove_task(self._task)


@contextlib.contextmanager
def _progress(quiet: bool) -> Iterator[_Progress]:
    if quiet or not sys.stderr.isatty():
        yield _Progress(None)
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.completed:.1f} s"),
        TimeRemainingColumn(),
    )
    with Progress(
        *columns,
        console=Console(stderr=True),
        transient=True,
        redirect_stdout=False,  # the data go there, not above the bar
    ) as bar:
        yield _Progress(bar)
