"""``dgiqa-distill score``: a teacher's scores, written as ``dgiqa-stream score`` writes them."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import msgspec

from dgiqa_stream.cli import _rows as rows
from dgiqa_stream.cli import _score as runtime
from dgiqa_stream.cli import _shared as shared
from dgiqa_stream.cli._settings import Wording, settle
from dgiqa_stream.config import StreamConfig
from dgiqa_stream.errors import ConfigError, SinkError
from dgiqa_stream.inputs import expand, is_folder, is_still_path, refuse_overwriting
from dgiqa_stream.urls import redact, scheme_of
from distill.data.depth import ClassicalDepth, open_depth
from distill.models.official import open_teacher
from distill.say import say
from distill.teacher_score import (
    TeacherPrediction,
    TeacherScorer,
    make_protocol,
    teacher_scorer,
    torch_device,
)


@dataclass(slots=True)
class Spreads:
    """Collects how far the crops of each input disagree."""

    of_input: list[float] = field(default_factory=list)

    def __call__(self, prediction: TeacherPrediction) -> None:
        """One picture or frame more."""
        self.of_input.append(prediction.spread)

    def tell(self, path: str) -> None:
        """A line for people, and begin anew."""
        if self.of_input:
            mean = sum(self.of_input) / len(self.of_input)
            shared.say(f"{path}: crops differ by {mean:.2f} points (standard deviation)")
        self.of_input.clear()


@dataclass(frozen=True, slots=True)
class AuditRequest:
    """What a run of the command was asked for; see its options."""

    teacher: Path
    depth: str
    backbone: str | None = None
    depth_cache: Path | None = None
    protocol: str = "grid"
    num_crops: int | None = None
    seed: int = 42
    fps: float | None = None
    every: int | None = None
    device: str = "auto"


def run_audit(
    paths: list[str],
    request: AuditRequest,
    *,
    format: runtime.Format = runtime.Format.CSV,
    output: str = "-",
    quiet: bool = False,
) -> int:
    """Score everything and return the exit code, as of ``dgiqa-stream score``.

    What cannot be at all is raised before the output is touched: :class:`ConfigError`,
    :class:`ModelError`.
    """
    inputs = expand(paths)
    refuse_overwriting(output, inputs)
    settings, wording = _settings(request)
    protocol = make_protocol(request.protocol, num_crops=request.num_crops, seed=request.seed)
    device = torch_device(request.device)
    depth = open_depth(request.depth, device=str(device), cache=request.depth_cache)
    if isinstance(depth, ClassicalDepth) and not quiet:
        say("depth from classical cues, a stand-in: scores are not the published method's")
    spreads = Spreads()
    teacher = open_teacher(request.teacher, backbone=request.backbone)
    told = {
        "sampler": msgspec.to_builtins(settings.sampler),
        "protocol": protocol.identity,
        "depth": depth.identity,
    }
    scorer = teacher_scorer(
        teacher,
        depth,
        path=request.teacher,
        protocol=protocol,
        device=str(device),
        on_prediction=spreads,
    )
    with scorer, wording.errors():
        run = _Run(scorer, settings, wording, spreads, told, quiet)
        return run.score_all(inputs, format=format, output=output)


def _settings(request: AuditRequest) -> tuple[StreamConfig, Wording]:
    """The runtime's settings: the whole picture, every frame or as sampled."""
    if request.fps is not None and request.every is not None:
        raise ConfigError("--fps and --every cannot both choose the frames: give one of them")
    return settle(
        StreamConfig(),
        {
            "sampler.mode": ("", "time" if request.fps is not None else "every"),
            "sampler.frames_per_second": ("--fps", request.fps),
            "sampler.every": ("--every", request.every),
            "overload.policy": ("", "wait"),
            "picture.letterbox": ("", False),  # the published protocol scores what is there
        },
    )


@dataclass(frozen=True, slots=True)
class _Run:
    """One run over all inputs: what ``dgiqa-stream score`` does with its own scorer."""

    scorer: TeacherScorer
    settings: StreamConfig
    wording: Wording
    spreads: Spreads
    told: dict[str, Any]
    quiet: bool

    def score_all(self, inputs: list[str], *, format: runtime.Format, output: str) -> int:
        """Write every row; returns the exit code."""
        results: list[rows.InputResult] = []
        codes: set[int] = set()
        with _opened(output) as out, runtime._progress(self.quiet) as progress:
            writer = _writer(format, out, inputs, self.scorer, self.told)
            try:
                for path in inputs:
                    shown = path if scheme_of(path) == "file" else redact(path)
                    results.append(rows.InputResult(shown))
                    self._score_input(path, results[-1], writer, progress, codes)
            except KeyboardInterrupt:
                say("interrupted: what was scored so far is written")
                codes.add(shared.INTERRUPTED)
            writer.finish(results, interrupted=shared.INTERRUPTED in codes)
        return shared.first_code(codes | runtime._verdict(results, None, self.quiet))

    def _score_input(
        self,
        path: str,
        result: rows.InputResult,
        writer: rows.RowWriter,
        progress: runtime._Progress,
        codes: set[int],
    ) -> None:
        with self.scorer.reading(path):
            runtime._score_input(
                path, result, self.scorer, self.settings, writer, progress, codes, self.wording
            )
        if not self.quiet:
            self.spreads.tell(result.path)


def _writer(
    format: runtime.Format,
    out: TextIO,
    inputs: list[str],
    scorer: TeacherScorer,
    about: dict[str, Any],
) -> rows.RowWriter:
    if format is runtime.Format.JSON:
        return rows.JsonDocument(out, model=scorer.manifest, settings=about)
    stills_only = all(is_still_path(path) or is_folder(path) for path in inputs)
    kind = rows.CsvRows if format is runtime.Format.CSV else rows.NdjsonRows
    return kind(out, stills_only=stills_only)


@contextlib.contextmanager
def _opened(output: str) -> Iterator[TextIO]:
    """The file to write, or standard output."""
    out = rows.open_output(output)
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
