"""Scoring inputs one after the other: rows, progress, errors and the exit code.

The seam for commands with a scorer of their own: ``dgiqa-stream score`` opens a model here, another
program may open whatever is a :class:`~dgiqa_stream.scorer.Scorer`.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from dgiqa_stream.cli import _shared as shared
from dgiqa_stream.cli._interrupts import INTERRUPTED, Interrupts
from dgiqa_stream.cli._progress import Progress, shown_progress
from dgiqa_stream.cli._resume import Journal, RowsOut, refuse_unresumable
from dgiqa_stream.cli._seconds import P1203Input, WebVtt
from dgiqa_stream.cli._settings import Given, Wording, settle
from dgiqa_stream.errors import ConfigError, SinkError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import TextIO

    from dgiqa_stream.cli._jobs import Score
    from dgiqa_stream.cli._rows import InputResult, Out, RowWriter
    from dgiqa_stream.cli._thresholds import Threshold
    from dgiqa_stream.config import StreamConfig
    from dgiqa_stream.scorer import Scorer


class Format(StrEnum):
    """How scores are written."""

    CSV = "csv"
    NDJSON = "ndjson"
    JSON = "json"
    POOLED = "pooled"
    """CSV with one row per input: what its frames pool to."""
    WEBVTT = "webvtt"
    """Captions with the score of each second, of one video."""
    P1203 = "p1203"
    """``O22`` of ITU-T P.1203: a MOS per second, of one video."""


@dataclass(frozen=True, slots=True)
class ScoreRequest:
    """What a run was asked for."""

    paths: Sequence[str]
    """Videos, pictures, folders, patterns, ``@`` lists, URLs, or ``-``."""
    given: Given
    """Settings by key, each with the option that set it; errors name the option."""
    base: StreamConfig | None = None
    """The settings that these go over; the defaults unless given."""
    has_file: bool = False
    """Whether the base comes from a file, so that errors may name keys."""
    format: Format = Format.CSV
    output: str = "-"
    fail_under: Sequence[Threshold] = ()
    """What each input's pooled values must reach."""
    junit: str | None = None
    """The JUnit XML to write too."""
    jobs: int = 1
    """How many inputs are scored at once; 0 for as many as there are cores."""
    resume: bool = False
    """Go on with the output of an earlier run, and keep what it takes to go on with this one."""
    quiet: bool = False


@dataclass(frozen=True, slots=True)
class OpenedScorer:
    """What scores, closed at the end, and what a document tells of it."""

    scorer: Scorer
    settings: Mapping[str, Any]
    """Whatever changes a score, under the document's ``settings``."""
    reading: Callable[[str], AbstractContextManager[None]] = field(
        default=lambda path: contextlib.nullcontext()
    )
    """Entered with each input's path while it is scored."""


def score_inputs(request: ScoreRequest, open_scorer: Callable[[StreamConfig], OpenedScorer]) -> int:
    """Score everything and return the exit code; see :mod:`dgiqa_stream.cli`.

    ``open_scorer`` is called once the request is known to make sense, and before the output is
    touched: what it raises leaves the file as it was. From then on Ctrl-C and SIGTERM end the
    scoring after the current frame, and what there is is written.

    Raises :class:`ConfigError` where settings or paths cannot be meant and
    :class:`SinkError` where the output cannot be written; an input that fails has its row and its
    line, and the others go on.
    """
    from dgiqa_stream.config import StreamConfig
    from dgiqa_stream.inputs import expand, lists_among, refuse_empty
    from dgiqa_stream.sources import check_options

    base = request.base or StreamConfig()
    settings, wording = settle(base, request.given, has_file=request.has_file)
    with wording.errors():
        for path in (*request.paths, request.output):
            refuse_empty(path)
        inputs = expand(list(request.paths))
        for path in inputs:
            check_options(path, settings.source.options)
        if request.resume:
            refuse_unresumable(request.output, request.format.value, inputs)
        if request.format in (Format.WEBVTT, Format.P1203) and len(inputs) != 1:
            raise ConfigError(
                f"--format {request.format.value} is of one video, and these are {len(inputs)}: "
                "name one, or choose another format"
            )
        _check_outputs(request, [*inputs, *lists_among(request.paths)])
        opened = open_scorer(settings)
        with opened.scorer, Interrupts() as interrupts:
            return _Run(request, inputs, settings, wording, opened, interrupts).score_all()


def _check_outputs(request: ScoreRequest, inputs: list[str]) -> None:
    """Refuse files that would be written over an input or each other, or cannot be written."""
    from dgiqa_stream.cli._junit import refuse_unwritable
    from dgiqa_stream.inputs import refuse_empty, refuse_overwriting, refuse_same_file

    refuse_overwriting(request.output, inputs)
    if request.junit is not None:
        refuse_empty(request.junit)
        refuse_overwriting(request.junit, inputs)
        refuse_same_file({"--output": request.output, "--junit": request.junit})
        refuse_unwritable(request.junit)


def told(settings: StreamConfig) -> dict[str, Any]:
    """The settings that change the score of a model of ours, without secrets."""
    import msgspec

    from dgiqa_stream.redaction import redact_options

    tables = {
        name: msgspec.to_builtins(getattr(settings, name))
        for name in ("source", "sampler", "picture", "model", "pooling")
    }
    tables["source"]["options"] = redact_options(settings.source.options)
    return tables


@dataclass(slots=True)
class _Run:
    """One run over all inputs, and what came of it so far."""

    request: ScoreRequest
    inputs: list[str]
    settings: StreamConfig
    wording: Wording
    opened: OpenedScorer
    interrupts: Interrupts
    codes: set[int] = field(default_factory=set)
    results: list[InputResult] = field(default_factory=list)

    def score_all(self) -> int:
        """Write every row; the exit code."""
        begin = time.monotonic()
        quiet = self.request.quiet
        with (
            self._journal() as journal,
            _opened(self.request.output) as file,
            shown_progress(quiet=quiet) as progress,
        ):
            out = RowsOut(file) if journal else file
            writer = self._writer(out)
            try:
                self._score_inputs(writer, out, progress, journal)
            except KeyboardInterrupt:
                shared.complain("interrupted: what was scored so far is written")
                self.codes.add(INTERRUPTED)
            writer.finish(self.results, interrupted=INTERRUPTED in self.codes)
        self.codes |= _verdict(self.results, self.request.fail_under, quiet)
        if self.request.junit is not None:
            self._write_junit(self.request.junit, time.monotonic() - begin)
        return shared.first_code(self.codes)

    @contextlib.contextmanager
    def _journal(self) -> Iterator[Journal | None]:
        """The journal to resume, or None."""
        if not self.request.resume:
            yield None
            return
        from dgiqa_stream.versions import package_version

        made = {
            "version": package_version(),
            "model": self.opened.scorer.manifest.sha256,
            "settings": dict(self.opened.settings),
            "format": self.request.format.value,
            "columns": "stills" if self._stills_only() else "video",
        }
        journal = Journal.open(self.request.output, made)
        with contextlib.closing(journal):
            yield journal
        if journal.num_kept and not self.request.quiet:
            kept, of = journal.num_kept, shared.counted(len(self.inputs), "input")
            shared.say(f"resumed: of {of}, {kept} had been scored before")

    def _score_inputs(
        self, writer: RowWriter, out: Out, progress: Progress, journal: Journal | None
    ) -> None:
        from dgiqa_stream.cli._jobs import Stop, for_several, num_jobs_of, score_in_order
        from dgiqa_stream.cli._one_input import InputScoring

        stop = Stop(self.interrupts.check)
        num_jobs = num_jobs_of(self.request.jobs)
        settings = for_several(self.settings, min(num_jobs, len(self.inputs)))
        score: Score = InputScoring(settings, self.wording, self.opened, progress, stop.check)
        if journal is not None:
            score = journal.scoring(score)
        if isinstance(out, RowsOut):
            out.taken()  # the header, which is of no input
        scored = score_in_order(self.inputs, score, writer, num_jobs=num_jobs, stop=stop)
        with contextlib.closing(scored):
            for result in scored:
                self.results.append(result)
                self._tell(result, writer)
                if journal is not None and isinstance(out, RowsOut):
                    out.write(result.kept_rows or "")
                    journal.take(result, out.taken())

    def _write_junit(self, path: str, seconds: float) -> None:
        from dgiqa_stream.cli._junit import write_junit
        from dgiqa_stream.versions import package_version

        model = self.opened.scorer.manifest
        properties = {
            "dgiqa-stream": package_version(),
            "model": f"{model.id} {model.version} {model.precision}",
            "model.sha256": model.sha256,
        }
        write_junit(
            path,
            self.results,
            self.request.fail_under,
            properties=properties,
            seconds=seconds,
        )

    def _writer(self, out: Out) -> RowWriter:
        from dgiqa_stream.cli import _rows as rows

        if self.request.format is Format.JSON:
            model = self.opened.scorer.manifest
            return rows.JsonDocument(out, model=model, settings=dict(self.opened.settings))
        if self.request.format is Format.WEBVTT:
            return WebVtt(out, start_seconds=self.settings.source.start_seconds or 0.0)
        if self.request.format is Format.P1203:
            return P1203Input(out)
        if self.request.format is Format.POOLED:
            return rows.PooledRows(out, self.settings.pooling)
        kind = rows.CsvRows if self.request.format is Format.CSV else rows.NdjsonRows
        return kind(out, stills_only=self._stills_only())

    def _stills_only(self) -> bool:
        from dgiqa_stream.inputs import is_folder, is_still_path

        return all(is_still_path(path) or is_folder(path) for path in self.inputs)

    def _tell(self, result: InputResult, writer: RowWriter) -> None:
        """Tell an input's error, and give it a row if it has none."""
        if result.error is None or result.is_interrupted:
            return
        named = result.path in result.error
        shared.complain(result.error if named else f"{result.path}: {result.error}")
        if result.is_refused:
            self.codes.add(shared.USAGE)
        if not result.num_frames:
            writer.failed(result.path, result.error)


@contextlib.contextmanager
def _opened(output: str) -> Iterator[TextIO]:
    """The file to write, emptied now, or standard output."""
    from dgiqa_stream.cli._rows import open_output

    out = open_output(output)
    try:
        yield out
        out.flush()
    except BrokenPipeError:
        raise
    except OSError as exc:
        where = "standard output" if output == "-" else output
        raise SinkError(
            f"cannot write {where}: {exc.strerror}; make room or choose another -o"
        ) from exc
    finally:
        if out is not sys.stdout:
            with contextlib.suppress(OSError):  # told above
                out.close()


def _verdict(results: list[InputResult], thresholds: Sequence[Threshold], quiet: bool) -> set[int]:
    """The exit codes that apply, and the summary lines."""
    codes: set[int] = set()
    for result in results:
        mean = result.mean
        if mean is not None and not quiet:
            frames = shared.counted(result.num_frames, "frame")
            frames += f", {result.num_corrupt} corrupt" if result.num_corrupt else ""
            frames += result.out_of_domain_text()
            shared.say(f"{result.path}: {mean:.1f}{result.beside_the_mean()}  ({frames})")
        shortfalls = [t.shortfall(result.pooled) for t in thresholds if result.num_frames]
        for shortfall in filter(None, shortfalls):
            shared.say(f"{result.path}: {shortfall}")
            codes.add(shared.BELOW)
    if not any(r.num_frames for r in results):
        codes.add(shared.NOTHING)
    elif any(r.error for r in results):
        codes.add(shared.PARTIAL)
    return codes
