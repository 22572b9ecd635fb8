"""``dgiqa-stream compare``: the same content before and after a change."""

from __future__ import annotations

import contextlib
import json
import sys
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dgiqa_stream.cli import _shared as shared
from dgiqa_stream.cli._interrupts import INTERRUPTED, Interrupts
from dgiqa_stream.cli._settings import Wording, settle
from dgiqa_stream.errors import ConfigError, SourceError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from dgiqa_stream.comparison import Comparison, ScoreCurve
    from dgiqa_stream.config import StreamConfig
    from dgiqa_stream.recording import Track
    from dgiqa_stream.scorer import Scorer

_MODEL_FACTS = ("id", "version", "precision", "calibration", "sha256")
_SCHEMA = "dgiqa.comparison/1"


class CompareFormat(StrEnum):
    """How the comparison is written."""

    TABLE = "table"
    JSON = "json"


@dataclass(frozen=True, slots=True)
class _Side:
    """A or B, read or scored."""

    curve: ScoreCurve
    model: Mapping[str, str] | None
    """None where the recording does not tell."""
    settings: Mapping[str, Any]
    """By table, as far as known."""
    num_frames: int


def compare(
    a: Annotated[str, typer.Argument(metavar="A", help="Before: a recording or a video.")],
    b: Annotated[str, typer.Argument(metavar="B", help="After: a recording or a video.")],
    *,
    offset: Annotated[
        float | None,
        typer.Option(help="Seconds that B's clock is ahead of A's for the same picture; found."),
    ] = None,
    stream: Annotated[
        str | None, typer.Option(help="The stream or path, where a recording holds several.")
    ] = None,
    format: Annotated[CompareFormat, typer.Option("--format", "-f")] = CompareFormat.TABLE,
    report: Annotated[Path | None, typer.Option(help="An HTML page of it, too.")] = None,
    fail_under_difference: Annotated[
        float | None,
        typer.Option(
            metavar="POINTS", help="Exit with 1 where B's headline less A's is lower, as -1."
        ),
    ] = None,
    resamples: Annotated[int, typer.Option(min=200, max=100_000)] = 2000,
    seed: Annotated[int, typer.Option(min=0, help="Of the resampling.")] = 0,
    fps: Annotated[
        float | None, typer.Option(help="Of a video, score this many frames a second, not all.")
    ] = None,
    start: Annotated[float | None, typer.Option(help="Of a video, skip so many seconds.")] = None,
    duration: Annotated[
        float | None, typer.Option(help="Of a video, stop after so many seconds.")
    ] = None,
    model: shared.Model = "student",
    backend: shared.Backend = "onnxruntime",
    device: shared.Device = "auto",
    strict: shared.Strict = False,
    threads: shared.Threads = 1,
    hardware: shared.Hardware = None,
    quiet: shared.Quiet = False,
    log_level: shared.Level = shared.LogLevel.WARNING,
) -> None:
    """Compare the same content before and after a change: how much better, and how sure.

    A and B are recordings (NDJSON of ``watch`` or ``score``), or videos, which are scored first.
    """
    shared.set_up_logging(log_level)
    shared.check_number("--fail-under-difference", fail_under_difference, least=-100, most=100)
    shared.check_number("--offset", offset, least=-1e9, most=1e9)
    settings, wording = settle(
        _defaults(),
        {
            "sampler.mode": ("", "time" if fps is not None else "every"),
            "sampler.frames_per_second": ("--fps", fps),
            "source.start_seconds": ("--start", start),
            "source.duration_seconds": ("--duration", duration),
            "overload.policy": ("", "wait"),
            "model.name": ("--model", model),
            "source.hardware": ("--hardware", hardware),
            "source.strict": ("--strict", strict),
            "model.backend": ("--backend", backend),
            "model.device": ("--device", device),
            "model.strict": ("--strict", strict),
            "model.threads": ("--threads", threads),
        },
    )
    _check_paths(a, b, report)
    try:
        sides = _Sides(settings, wording, stream, quiet=quiet)
        before, after = sides.both(a, b)
    except KeyboardInterrupt:
        shared.complain("interrupted: nothing is compared")
        shared.leave(INTERRUPTED)
    notes = _notes(before, after)
    from dgiqa_stream.comparison import compare_curves

    found = compare_curves(
        before.curve, after.curve, offset_seconds=offset, num_resamples=resamples, seed=seed
    )
    if report is not None:
        from dgiqa_stream.report import write_comparison

        write_comparison(found, report, notes=notes, details=_details(before, after))
    if format is CompareFormat.JSON:
        json.dump(_document(found, before, after, notes), sys.stdout, indent=1, allow_nan=False)
        sys.stdout.write("\n")
    else:
        from dgiqa_stream.cli._compare_table import table_of

        sys.stdout.write(table_of(found, notes))
    if report is not None:
        shared.say(f"report: {report}")
    shared.leave(_verdict(found, fail_under_difference))


def _defaults() -> StreamConfig:
    from dgiqa_stream.config import StreamConfig

    return StreamConfig()


def _check_paths(a: str, b: str, report: Path | None) -> None:
    from dgiqa_stream.inputs import refuse_empty, refuse_overwriting

    for path in (a, b):
        refuse_empty(path)
        if path == "-":
            raise ConfigError("- cannot be compared: write the recording to a file first")
    if report is not None:
        from dgiqa_stream.report import require_matplotlib

        refuse_overwriting(str(report), [a, b])
        require_matplotlib()  # before minutes of scoring


def _verdict(found: Comparison, fail_under: float | None) -> int:
    difference = found.headline.difference
    if fail_under is None or difference >= fail_under:
        return shared.OK
    shared.say(f"difference {difference:+.2f} is below --fail-under-difference {fail_under:g}")
    return shared.BELOW


# Reading and scoring --------------------------------------------------------------------------


class _Sides:
    """Reads recordings and scores videos, with one model for both."""

    def __init__(
        self, settings: StreamConfig, wording: Wording, stream: str | None, *, quiet: bool
    ) -> None:
        self._settings, self._wording = settings, wording
        self._stream, self._quiet = stream, quiet
        self._scorer: Scorer | None = None

    def both(self, a: str, b: str) -> tuple[_Side, _Side]:
        """A and B, recordings first, so that what is wrong with one is told before the scoring."""
        with contextlib.ExitStack() as stack, self._wording.errors():
            read = {path: self._read(path) for path in (a, b) if _is_recording(path)}
            if len(read) < len({a, b}):
                from dgiqa_stream.scorer import scorer_of

                self._scorer = stack.enter_context(scorer_of(self._settings.model))
            for path in (a, b):
                if path not in read:
                    read[path] = self._score(path)
            return read[a], read[b]

    def _read(self, path: str) -> _Side:
        import msgspec

        from dgiqa_stream.recording import read_recording

        track = _track_of(path, read_recording(Path(path)).tracks, self._stream)
        told = track.meta or track.final
        model = None if told is None else msgspec.to_builtins(told.model)
        return _Side(
            curve=self._curve(
                f"{path} ({track.name})",
                [(f.pts_seconds, f.score) for f in track.frames if f.pts_seconds is not None],
            ),
            model=None if model is None else {name: str(model[name]) for name in _MODEL_FACTS},
            settings={} if track.meta is None else track.meta.settings,
            num_frames=len(track.frames),
        )

    def _score(self, path: str) -> _Side:
        from dgiqa_stream.cli.scoring import told
        from dgiqa_stream.inputs import refuse_folder
        from dgiqa_stream.pipeline import score_frames
        from dgiqa_stream.urls import redact, scheme_of

        assert self._scorer is not None  # opened, since there is a video
        refuse_folder(path)
        name = path if scheme_of(path) == "file" else redact(path)
        if not self._quiet:
            shared.say(f"scoring {name}")
        with Interrupts() as interrupts:
            frames = score_frames(
                path, self._scorer, config=self._settings, on_tick=interrupts.check
            )
            with contextlib.closing(frames):
                scored = [(f.info.pts_seconds, f.score) for f in frames]
        manifest = self._scorer.manifest
        return _Side(
            curve=self._curve(name, scored),
            model={fact: str(getattr(manifest, fact)) for fact in _MODEL_FACTS},
            settings=told(self._settings),
            num_frames=len(scored),
        )

    def _curve(self, name: str, timed: list[tuple[float, float]]) -> ScoreCurve:
        from dgiqa_stream.comparison import curve_of

        return curve_of(
            name,
            [pts for pts, _ in timed],
            [score for _, score in timed],
            max_hold_seconds=self._settings.pooling.max_hold_seconds,
        )


def _is_recording(path: str) -> bool:
    """Whether it is a file that begins as a line of NDJSON does; no video does."""
    try:
        with Path(path).open("rb") as file:
            return file.read(64).lstrip()[:1] == b"{"
    except (OSError, ValueError):  # a URL, or what opening it as a video will tell of
        return path.endswith((".ndjson", ".jsonl"))


def _track_of(path: str, tracks: tuple[Track, ...], stream: str | None) -> Track:
    """The one track with scores over time; of several sessions of a stream, the longest."""
    timed = [t for t in tracks if any(f.pts_seconds is not None for f in t.frames)]
    names = list(dict.fromkeys(t.name for t in timed))
    if not names:
        raise SourceError(f"{path} has no scores over time: a comparison needs those of a video")
    if stream is None and len(names) > 1:
        raise ConfigError(f"{path} holds {', '.join(names)}: choose one with --stream")
    if stream is not None and len(names) > 1 and stream not in names:
        raise ConfigError(f"--stream {stream!r} is not in {path}, which holds {', '.join(names)}")
    wanted = names[0] if len(names) == 1 else stream
    return max((t for t in timed if t.name == wanted), key=lambda t: len(t.frames))


# Whether they may be compared, and what is told ------------------------------------------------


def _notes(a: _Side, b: _Side) -> list[str]:
    """What a reader must know; raises :class:`ConfigError` where nothing can be compared."""
    notes = []
    if a.model is None or b.model is None:
        which = " and ".join(s.curve.name for s in (a, b) if s.model is None)
        notes.append(f"{which} does not tell its model: it is taken to be the other's.")
    elif differing := [name for name in _MODEL_FACTS if a.model[name] != b.model[name]]:
        said = "; ".join(
            f"{name} {a.model[name][:16]} and {b.model[name][:16]}" for name in differing
        )
        raise ConfigError(
            f"{a.curve.name} and {b.curve.name} come of different models ({said}): scores of two "
            "models cannot be compared; score both with one"
        )
    modes = [s.settings.get("sampler", {}).get("mode") for s in (a, b)]
    if "keyframes" in modes and None not in modes and modes[0] != modes[1]:
        raise ConfigError(
            f"{a.curve.name} was sampled by {modes[0]} and {b.curve.name} by {modes[1]}: keyframes "
            "look better than the frames between them; sample both alike"
        )
    pictures = [s.settings.get("picture") for s in (a, b)]
    if None not in pictures and pictures[0] != pictures[1]:
        notes.append("A and B were cropped differently (picture): that is in the difference, too.")
    return notes


def _details(a: _Side, b: _Side) -> dict[str, dict[str, Any]]:
    from dgiqa_stream.versions import package_version

    groups: dict[str, dict[str, Any]] = {"Model": dict(a.model or b.model or {})}
    for name, side in (("A", a), ("B", b)):
        facts = {"name": side.curve.name, "num_frames": side.num_frames}
        groups[name] = {**facts, "period_seconds": round(side.curve.period_seconds, 6)}
        groups[f"Settings of {name}"] = dict(side.settings)
    return {**groups, "Versions": {"dgiqa-stream": package_version()}}


def _document(found: Comparison, a: _Side, b: _Side, notes: list[str]) -> dict[str, Any]:
    from dgiqa_stream.comparison import document_of
    from dgiqa_stream.versions import package_version

    sides = {
        name: {"name": s.curve.name, "num_frames": s.num_frames, "settings": dict(s.settings)}
        for name, s in (("a", a), ("b", b))
    }
    return {
        "schema": _SCHEMA,
        "version": package_version(),
        "model": a.model or b.model,
        **sides,
        **document_of(found),
        "notes": notes,
    }
