"""Where ``score`` writes: CSV and NDJSON row by row, VMAF-shaped JSON at the end."""

from __future__ import annotations

import csv
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TextIO

from dgiqa_stream.errors import SinkError
from dgiqa_stream.versions import package_version

if TYPE_CHECKING:
    from collections.abc import Mapping

    from dgiqa_stream.manifest import ModelManifest
    from dgiqa_stream.types import FrameScore

STILL_COLUMNS = ("path", "score")
VIDEO_COLUMNS = (
    "path",
    "index",
    "pts_seconds",
    "score",
    "in_domain",
    "dynamic_range",
    "key",
    "corrupt",
    "width",
    "height",
)
_DIGITS = 4


@dataclass(slots=True)
class InputResult:
    """What became of one input."""

    path: str
    num_frames: int = 0
    pooled: Mapping[str, float | None] = field(default_factory=dict)
    error: str | None = None

    @property
    def mean(self) -> float | None:
        """The mean score over presentation time."""
        return self.pooled.get("mean")


class RowWriter(Protocol):
    """Takes scored frames and failures in input order."""

    def frame(self, path: str, score: FrameScore) -> None:
        """One scored frame."""

    def failed(self, path: str, error: str) -> None:
        """An input without any score."""

    def finish(self, results: list[InputResult], *, interrupted: bool) -> None:
        """Everything is scored, or all that there will be."""


def row_of(path: str, score: FrameScore) -> dict[str, Any]:
    """A frame's row under the video header."""
    info = score.info
    return {
        "path": path,
        "index": info.index,
        "pts_seconds": round(info.pts_seconds, 6),
        "score": round(score.score, _DIGITS),
        "in_domain": score.in_domain,
        "dynamic_range": info.dynamic_range,
        "key": info.keyframe,
        "corrupt": info.corrupt,
        "width": info.width,
        "height": info.height,
    }


class CsvRows:
    """One row per scored frame, or per picture where there is no video among the inputs."""

    def __init__(self, out: TextIO, *, stills_only: bool) -> None:
        """Write the header."""
        self._out = out
        columns = STILL_COLUMNS if stills_only else VIDEO_COLUMNS
        self._writer = csv.DictWriter(
            out, columns, extrasaction="ignore", restval="", lineterminator="\n"
        )
        self._writer.writeheader()

    def frame(self, path: str, score: FrameScore) -> None:
        """One row, complete on disk when this returns."""
        row = row_of(path, score)
        flags = {key: int(value) for key, value in row.items() if isinstance(value, bool)}
        self._writer.writerow({**row, **flags})
        self._out.flush()

    def failed(self, path: str, error: str) -> None:
        """A row with an empty score."""
        self._writer.writerow({"path": path})
        self._out.flush()

    def finish(self, results: list[InputResult], *, interrupted: bool) -> None:
        """Nothing is left to write."""


class NdjsonRows:
    """One JSON object per line and scored frame; ``score`` is null where an input failed."""

    def __init__(self, out: TextIO, *, stills_only: bool) -> None:
        """Stills have no time: their lines carry path, score and what is known of the picture."""
        self._out, self._stills_only = out, stills_only

    def frame(self, path: str, score: FrameScore) -> None:
        """One line, complete on disk when this returns."""
        row = row_of(path, score)
        if self._stills_only:
            row = {k: v for k, v in row.items() if k not in ("index", "pts_seconds", "key")}
        self._write(row)

    def failed(self, path: str, error: str) -> None:
        """A line that says why."""
        self._write({"path": path, "score": None, "error": error})

    def finish(self, results: list[InputResult], *, interrupted: bool) -> None:
        """Nothing is left to write."""

    def _write(self, row: dict[str, Any]) -> None:
        self._out.write(json.dumps(row, ensure_ascii=False) + "\n")
        self._out.flush()


class JsonDocument:
    """VMAF's shape: ``frames[]`` with ``metrics``, ``pooled_metrics``; plus ``inputs[]``."""

    def __init__(self, out: TextIO, *, model: ModelManifest, settings: dict[str, Any]) -> None:
        """Nothing is written before :meth:`finish`."""
        self._out, self._model, self._settings = out, model, settings
        self._frames: list[dict[str, Any]] = []
        self._scores: list[float] = []

    def frame(self, path: str, score: FrameScore) -> None:
        """Keep one frame."""
        row = row_of(path, score)
        self._scores.append(score.score)
        metrics = {"dgiqa": row.pop("score")}
        self._frames.append({"frameNum": row.pop("index"), "metrics": metrics, **row})

    def failed(self, path: str, error: str) -> None:
        """Failures are in ``inputs``."""

    def finish(self, results: list[InputResult], *, interrupted: bool) -> None:
        """Write the document; an interrupted one says so."""
        json.dump(
            {
                "version": package_version(),
                "model": {
                    "id": self._model.id,
                    "version": self._model.version,
                    "precision": self._model.precision,
                    "sha256": self._model.sha256,
                },
                "settings": self._settings,
                "complete": not interrupted,
                "stopped_by": "interrupt" if interrupted else None,
                "frames": self._frames,
                "pooled_metrics": {"dgiqa": _rounded(pool_frames(self._scores))},
                "aggregate_metrics": {},
                "inputs": [
                    {
                        "path": r.path,
                        "num_frames": r.num_frames,
                        "pooled": _rounded(r.pooled),
                        "error": r.error,
                    }
                    for r in results
                ],
            },
            self._out,
            indent=1,
            ensure_ascii=False,
        )
        self._out.write("\n")
        self._out.flush()


def pool_frames(scores: list[float]) -> dict[str, float | None]:
    """libvmaf's poolings, every frame alike whatever its duration; None without frames."""
    names = ("min", "max", "mean", "harmonic_mean")
    if not scores:
        return dict.fromkeys(names)
    harmonic = len(scores) / sum(1.0 / (s + 1.0) for s in scores) - 1.0
    return dict(
        zip(names, (min(scores), max(scores), sum(scores) / len(scores), harmonic), strict=True)
    )


def _rounded(pool: Mapping[str, float | None]) -> dict[str, float | None]:
    return {k: None if v is None else round(v, _DIGITS) for k, v in pool.items()}


def open_output(path: str) -> TextIO:
    """The file to write, or standard output for ``-``."""
    if path == "-":
        return sys.stdout
    try:
        # A name of a file need not be UTF-8; escaped, it is still good JSON.
        return Path(path).open("w", encoding="utf-8", errors="backslashreplace", newline="")
    except OSError as exc:
        raise SinkError(f"cannot write {path}: {exc.strerror}; choose another -o") from exc
