"""``dgiqa-distill score``: a teacher's scores, written as ``dgiqa-stream score`` writes them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from dgiqa_stream.cli.scoring import Format, OpenedScorer, ScoreRequest, score_inputs
from dgiqa_stream.config import StreamConfig
from dgiqa_stream.errors import ConfigError
from dgiqa_stream.urls import redact, scheme_of
from distill.data.depth import ClassicalDepth, open_depth
from distill.models.official import open_teacher
from distill.say import say
from distill.teacher_score import (
    TeacherPrediction,
    make_protocol,
    teacher_scorer,
    tell_other_depth,
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
            say(f"{path}: crops differ by {mean:.2f} points (standard deviation)")
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
    format: Format = Format.CSV,
    output: str = "-",
    quiet: bool = False,
) -> int:
    """Score everything and return the exit code, as of ``dgiqa-stream score``.

    What cannot be at all is raised before the output is touched: :class:`ConfigError`,
    :class:`ModelError`.
    """
    asked = ScoreRequest(paths, _given(request), format=format, output=output, quiet=quiet)
    return score_inputs(asked, lambda settings: _open(request, settings, quiet=quiet))


def _given(request: AuditRequest) -> dict[str, tuple[str, Any]]:
    """The runtime's settings: the whole picture, every frame or as sampled."""
    if request.fps is not None and request.every is not None:
        raise ConfigError("--fps and --every cannot both choose the frames: give one of them")
    return {
        "sampler.mode": ("", "time" if request.fps is not None else "every"),
        "sampler.frames_per_second": ("--fps", request.fps),
        "sampler.every": ("--every", request.every),
        "overload.policy": ("", "wait"),
        "picture.letterbox": ("", False),  # the published protocol scores what is there
    }


def _open(request: AuditRequest, settings: StreamConfig, *, quiet: bool) -> OpenedScorer:
    """The teacher with its depth, telling after each input how far its crops disagreed."""
    protocol = make_protocol(request.protocol, num_crops=request.num_crops, seed=request.seed)
    device = str(torch_device(request.device))
    depth = open_depth(request.depth, device=device, cache=request.depth_cache)
    if isinstance(depth, ClassicalDepth) and not quiet:
        say("depth from classical cues, a stand-in: scores are not the published method's")
    teacher = open_teacher(request.teacher, backbone=request.backbone)
    if not quiet:
        tell_other_depth(teacher, depth)
    spreads = Spreads()
    scorer = teacher_scorer(
        teacher,
        depth,
        path=request.teacher,
        protocol=protocol,
        device=device,
        on_prediction=spreads,
    )

    @contextlib.contextmanager
    def reading(path: str) -> Iterator[None]:
        with scorer.reading(path):
            yield
        if not quiet:
            spreads.tell(path if scheme_of(path) == "file" else redact(path))

    told = {
        "sampler": msgspec.to_builtins(settings.sampler),
        "protocol": protocol.identity,
        "depth": depth.identity,
    }
    return OpenedScorer(scorer, told, reading)
