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

    from dgiqa_stream.config import PoolingSettings
    from dgiqa_stream.manifest import ModelManifest
    from dgiqa_stream.types import FrameScore, WindowScore

_SURENESS = ("interval_low", "interval_high", "out_of_domain")
STILL_COLUMNS = ("path", "score", *_SURENESS)
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
    *_SURENESS,
)
_DIGITS = 4


@dataclass(slots=True)
class InputResult:
    """What became of one input."""

    path: str
    num_frames: int = 0
    num_corrupt: int = 0
    """Among them, those whose damage the decoder concealed."""
    pooled: Mapping[str, float | None] = field(default_factory=dict)
    headline: str = ""
    """Name of the pooled value to look at first; empty where nothing was pooled."""
    coverage: float = 0.0
    """Share of the input's time, 0..1, that scored frames account for."""
    in_domain_share: float | None = None
    """Share of the scored time, 0..1, whose frames are in domain."""
    seconds: float = 0.0
    """How long scoring it took, on the wall clock."""
    last: FrameScore | None = None
    """The last frame's; of a picture, the only one."""
    error: str | None = None
    is_refused: bool = False
    """The error is one of the settings, which do not go with this input."""
    is_interrupted: bool = False
    kept_rows: str | None = None
    """Its rows, where an earlier run scored it; see ``--resume``."""

    def take(self, session: WindowScore) -> None:
        """Keep what all frames pool to."""
        self.pooled, self.headline = session.pool, session.headline
        self.coverage, self.in_domain_share = session.coverage, session.in_domain_share

    def beside_the_mean(self) -> str:
        """For people: the headline and the worst 5 %, or how sure the score of a picture is."""
        shown = ((self.headline, self.headline), ("worst 5 %", "low5"))
        values = [(label, self.pooled.get(name)) for label, name in shown]
        told = "".join(f"  {label} {value:.1f}" for label, value in values if value is not None)
        alone = self.last.interval if self.last and self.num_frames == 1 else None
        return told if self.num_frames > 1 else interval_text(alone)

    def out_of_domain_text(self) -> str:
        """For people: how much is out of domain, and a picture's reasons; empty for nothing."""
        share = 1.0 if self.in_domain_share is None else self.in_domain_share
        if self.last is not None and self.num_frames == 1 and not self.last.in_domain:
            return f", out of domain: {' '.join(self.last.out_of_domain)}"
        return f", {100 * (1 - share):.3g} % out of domain" if share < 1 else ""

    @property
    def mean(self) -> float | None:
        """The mean score over presentation time."""
        return self.pooled.get("mean")


class Out(Protocol):
    """Where text goes: a file, or what stands before it."""

    def write(self, text: str, /) -> int:
        """Write; returns the number of characters."""

    def flush(self) -> None:
        """Hand what is written to the system."""


class RowWriter(Protocol):
    """Takes scored frames and failures in input order."""

    def frame(self, path: str, score: FrameScore) -> None:
        """One scored frame."""

    def failed(self, path: str, error: str) -> None:
        """An input without any score."""

    def finish(self, results: list[InputResult], *, interrupted: bool) -> None:
        """Everything is scored, or all that there will be."""


def interval_text(interval: tuple[float, float] | None) -> str:
    """Such as `` [64-78]``; empty where there is none."""
    return "" if interval is None else " [{:.0f}-{:.0f}]".format(*interval)


def row_of(path: str, score: FrameScore) -> dict[str, Any]:
    """A frame's row under the video header."""
    info = score.info
    low, high = score.interval or (None, None)
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
        "interval_low": None if low is None else round(low, _DIGITS),
        "interval_high": None if high is None else round(high, _DIGITS),
        "out_of_domain": list(score.out_of_domain),
    }


class CsvRows:
    """One row per scored frame, or per picture where there is no video among the inputs."""

    def __init__(self, out: Out, *, stills_only: bool) -> None:
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
        reasons = {"out_of_domain": " ".join(row["out_of_domain"])}
        self._writer.writerow({**row, **flags, **reasons})
        self._out.flush()

    def failed(self, path: str, error: str) -> None:
        """A row with an empty score."""
        self._writer.writerow({"path": path})
        self._out.flush()

    def finish(self, results: list[InputResult], *, interrupted: bool) -> None:
        """Nothing is left to write."""


class NdjsonRows:
    """One JSON object per line and scored frame; ``score`` is null where an input failed."""

    def __init__(self, out: Out, *, stills_only: bool) -> None:
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


class PooledRows:
    """One row per input: what its frames pool to, weighted by time; empty where it failed."""

    def __init__(self, out: Out, settings: PoolingSettings) -> None:
        """Write the header."""
        from dgiqa_stream.pooling import pooler_names

        self._out, self._names = out, pooler_names(settings)
        self._writer = csv.writer(out, lineterminator="\n")
        self._writer.writerow(
            ["path", "num_frames", "coverage", "headline", *self._names, "in_domain_share"]
        )
        self._out.flush()

    def frame(self, path: str, score: FrameScore) -> None:
        """Frames are pooled elsewhere."""

    def failed(self, path: str, error: str) -> None:
        """Failures have their row at the end, as all inputs have."""

    def finish(self, results: list[InputResult], *, interrupted: bool) -> None:
        """Write the rows."""
        for result in results:
            pooled = _rounded(result.pooled)
            values = [pooled.get(name) for name in self._names]
            coverage, share = round(result.coverage, _DIGITS), _rounded_share(result)
            self._writer.writerow(
                [result.path, result.num_frames, coverage, result.headline, *values, share]
            )
        self._out.flush()


class JsonDocument:
    """VMAF's shape: ``frames[]`` with ``metrics``, ``pooled_metrics``; plus ``inputs[]``."""

    def __init__(self, out: Out, *, model: ModelManifest, settings: dict[str, Any]) -> None:
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
        interval = self._model.interval
        json.dump(
            {
                "version": package_version(),
                "model": {
                    "id": self._model.id,
                    "version": self._model.version,
                    "precision": self._model.precision,
                    "sha256": self._model.sha256,
                    "interval_coverage": interval.coverage if interval else None,
                },
                "settings": self._settings,
                "complete": not interrupted,
                "stopped_by": "interrupt" if interrupted else None,
                "frames": self._frames,
                "pooled_metrics": {"dgiqa": self._pooled(results)},
                "aggregate_metrics": {},
                "inputs": [
                    {
                        "path": r.path,
                        "num_frames": r.num_frames,
                        "pooled": _rounded(r.pooled),
                        "headline": r.headline,
                        "coverage": round(r.coverage, _DIGITS),
                        "in_domain_share": _rounded_share(r),
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

    def _pooled(self, results: list[InputResult]) -> dict[str, float | None]:
        """VMAF's four, of the frames; of a single input also what else it pools to, by time.

        Several inputs have no common time: each has its own under ``inputs``.
        """
        other = results[0].pooled if len(results) == 1 else {}
        return _rounded({**other, **pool_frames(self._scores)})


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


def _rounded_share(result: InputResult) -> float | None:
    share = result.in_domain_share
    return None if share is None else round(share, _DIGITS)


def open_output(path: str) -> TextIO:
    """The file to write, or standard output for ``-``."""
    if path == "-":
        return sys.stdout
    try:
        # A name of a file need not be UTF-8; escaped, it is still good JSON.
        return Path(path).open("w", encoding="utf-8", errors="backslashreplace", newline="")
    except OSError as exc:
        raise SinkError(f"cannot write {path}: {exc.strerror}; choose another -o") from exc
