"""Reads recordings back: the NDJSON of ``dgiqa-stream watch`` and of ``dgiqa-stream score``.

``watch`` writes the published messages, one per line; ``score`` writes one flat object per scored
frame, ``{"path", "index", "pts_seconds", "score", ..}``, or per still, ``{"path", "score"}``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import msgspec

from dgiqa_stream import wire
from dgiqa_stream.errors import SourceError
from dgiqa_stream.types import WindowScore

_MAX_LINE_BYTES = 16 << 20  # a thumbnail is some 30 kB
_TRUNCATED = "Input data was truncated"  # what msgspec says of the beginning of an object
_LATER_KIND = re.compile(rf"dgiqa\.[a-z]+/{wire.MAJOR}")


@dataclass(frozen=True, slots=True)
class FrameRow:
    """One scored frame of a recording."""

    score: float
    """0..100."""
    index: int | None = None
    pts_seconds: float | None = None
    """None for a still."""
    interval: tuple[float, float] | None = None
    """Low and high, 0..100."""
    interval_coverage: float | None = None
    out_of_domain: tuple[str, ...] = ()
    """Why to read the score with care."""
    corrupt: bool = False
    discontinuity: bool = False
    num_dropped: int = 0
    """Frames of the stream dropped unscored until then, for being late."""

    @property
    def in_domain(self) -> bool:
        """Whether nothing is known against the score."""
        return not self.out_of_domain


@dataclass(frozen=True, slots=True)
class Track:
    """What a recording holds of one session of a stream, or of one file that was scored."""

    name: str
    """The stream's id, or the path as it was given."""
    session: str = ""
    """Empty where the file does not tell sessions apart."""
    path: Path | None = None
    """The file the scores are of; None for streams."""
    frames: tuple[FrameRow, ...] = ()
    """In the order they were scored."""
    windows: tuple[WindowScore, ...] = ()
    statuses: tuple[wire.StatusMessage, ...] = ()
    """Those that changed the state or told of an error, and the last."""
    meta: wire.MetaMessage | None = None
    final: wire.FinalMessage | None = None
    """None where the sender was cut off."""
    thumbnails: tuple[wire.ThumbnailMessage, ...] = ()
    period_seconds: float | None = None
    """Of the sampling; None where it is not even or not known."""
    error: str | None = None
    """Why a file has no scores, or not all."""

    @property
    def is_still(self) -> bool:
        """Whether it is a picture: one score of a file."""
        return self.path is not None and len(self.frames) == 1


@dataclass(frozen=True, slots=True)
class Recording:
    """All tracks of a recording, in the order they first appear."""

    path: Path
    tracks: tuple[Track, ...]
    num_lines: int
    num_cut_short: int = 0
    """Lines that end in the middle, as after a power failure; they were left out."""
    num_unknown: int = 0
    """Messages of kinds this version does not know; they were left out."""


class _Line(msgspec.Struct):
    """What either kind of line may hold, as far as it matters here."""

    schema: str | None = None
    path: str | None = None
    score: float | None = None
    index: int | None = None
    pts_seconds: float | None = None
    in_domain: bool = True
    interval_low: float | None = None
    interval_high: float | None = None
    out_of_domain: tuple[str, ...] = ()
    corrupt: bool = False
    discontinuity: bool = False
    error: object = None


@dataclass(slots=True)
class _Draft:
    """A track that is still being read."""

    name: str
    session: str = ""
    path: Path | None = None
    frames: list[FrameRow] = field(default_factory=list)
    windows: list[WindowScore] = field(default_factory=list)
    statuses: list[wire.StatusMessage] = field(default_factory=list)
    last_status: wire.StatusMessage | None = None
    meta: wire.MetaMessage | None = None
    final: wire.FinalMessage | None = None
    thumbnails: list[wire.ThumbnailMessage] = field(default_factory=list)
    period_seconds: float | None = None
    error: str | None = None

    def take(self, message: wire.Message) -> None:
        """Put a message where it belongs."""
        if isinstance(message, wire.FrameMessage):
            self.frames.append(_frame_row(message))
            self.period_seconds = message.sampling.period_s
        elif isinstance(message, wire.WindowMessage):
            self.windows.append(as_window_score(message))
        elif isinstance(message, wire.StatusMessage):
            if message.error or not self.statuses or self.statuses[-1].state != message.state:
                self.statuses.append(message)
            self.last_status = message
        elif isinstance(message, wire.MetaMessage):
            self.meta = message
        elif isinstance(message, wire.FinalMessage):
            self.final = message
        else:
            self.thumbnails.append(message)

    def finished(self) -> Track:
        """The track, with nothing more to come."""
        statuses = list(self.statuses)
        if self.last_status is not None and statuses[-1] is not self.last_status:
            statuses.append(self.last_status)
        return Track(
            name=self.name,
            session=self.session,
            path=self.path,
            frames=tuple(self.frames),
            windows=tuple(self.windows),
            statuses=tuple(statuses),
            meta=self.meta,
            final=self.final,
            thumbnails=tuple(sorted(self.thumbnails, key=lambda t: t.score)),
            period_seconds=self.period_seconds,
            error=self.error,
        )


def read_recording(path: Path, *, begin_byte: int = 0) -> Recording:
    """Read a recording; streams, their sessions and paths are told apart.

    ``begin_byte`` is where to begin, at the end of some line; lines are numbered from there. Lines
    cut short, as by a kill, are left out and counted. Raises
    :class:`~dgiqa_stream.errors.SourceError` naming the line where the file is something else.
    """
    try:
        with path.open("rb") as file:
            if begin_byte:
                file.seek(begin_byte)
            return _Reader(path).read(file)
    except OSError as exc:
        raise SourceError(f"cannot read the recording {path}: {exc.strerror or exc}") from exc


def as_window_score(message: wire.WindowMessage | wire.FinalMessage) -> WindowScore:
    """The pooled values of a message."""
    window = message.window
    return WindowScore(
        stream=message.stream,
        kind=window.kind,
        length_seconds=window.len_s,
        hop_seconds=window.hop_s,
        begin_seconds=window.t0,
        end_seconds=window.t1,
        num_frames=message.n,
        expected_frames=message.expected,
        coverage=message.coverage,
        valid=message.valid,
        pool=message.pool,
        headline=message.headline,
        params={name: value for name, value in message.params.items() if value is not None},
        in_domain_share=message.in_domain_share,
    )


class _Reader:
    def __init__(self, path: Path) -> None:
        self._path = path
        self._drafts: dict[tuple[str, str], _Draft] = {}
        self._num_cut_short, self._num_unknown = 0, 0

    def read(self, file: BinaryIO) -> Recording:
        number = 0
        for number, line in enumerate(_lines(file), start=1):
            if not line.strip():
                continue
            try:
                self._take(line.rstrip())
            except (ValueError, msgspec.DecodeError) as exc:
                if _is_cut_short(line.rstrip(), exc):
                    self._num_cut_short += 1
                    continue
                raise SourceError(
                    f"{self._path} line {number} is neither a message nor a score row: {exc}; give "
                    "NDJSON written by `dgiqa-stream watch` or `dgiqa-stream score`"
                ) from exc
        if not self._drafts:
            raise SourceError(
                f"{self._path} holds no scores; give NDJSON written by `dgiqa-stream watch` or "
                "`dgiqa-stream score`"
            )
        tracks = tuple(draft.finished() for draft in self._drafts.values())
        return Recording(self._path, tracks, number, self._num_cut_short, self._num_unknown)

    def _take(self, line: bytes) -> None:
        """Take one line; raises ``ValueError`` where it is nothing that is known."""
        peeked = msgspec.json.decode(line, type=_Line)
        if peeked.schema is not None:
            self._take_message(line, peeked.schema)
        elif peeked.path is not None and (peeked.score is not None or peeked.error is not None):
            self._take_row(peeked)
        else:
            raise ValueError("it has neither `schema` nor `path` with `score`")

    def _take_message(self, line: bytes, schema: str) -> None:
        if schema.split("/")[0] not in {f"dgiqa.{kind}" for kind in wire.KINDS} and (
            _LATER_KIND.fullmatch(schema)
        ):
            self._num_unknown += 1
            return
        message = wire.decode(line)
        key = message.stream, message.session
        draft = self._drafts.setdefault(key, _Draft(message.stream, session=message.session))
        draft.take(message)

    def _take_row(self, row: _Line) -> None:
        name = row.path or ""
        draft = self._drafts.setdefault((name, ""), _Draft(name, path=Path(name)))
        if row.score is None:
            draft.error = str(row.error)
            return
        if not 0.0 <= row.score <= 100.0:
            raise ValueError(f"score {row.score} is outside 0..100")
        draft.frames.append(
            FrameRow(
                score=row.score,
                index=row.index,
                pts_seconds=row.pts_seconds,
                interval=_interval(row),
                out_of_domain=_reasons(row.out_of_domain, in_domain=row.in_domain),
                corrupt=row.corrupt,
                discontinuity=row.discontinuity,
            )
        )


def _lines(file: BinaryIO) -> Iterator[bytes]:
    """Lines, none longer than what a file of another kind may hold without a newline."""
    while line := file.readline(_MAX_LINE_BYTES):
        yield line


def _is_cut_short(line: bytes, exc: Exception) -> bool:
    """Whether a line is the beginning of a JSON object, of which nothing is wrong but its end."""
    is_at_the_end = str(exc) == _TRUNCATED or str(exc).endswith(f"(byte {len(line)})")
    return line.startswith(b"{") and len(line) < _MAX_LINE_BYTES - 1 and is_at_the_end


def _interval(row: _Line) -> tuple[float, float] | None:
    low, high = row.interval_low, row.interval_high
    if low is None or high is None:
        return None
    if not 0.0 <= low <= high <= 100.0:
        raise ValueError(f"interval {low} to {high} does not lie within 0..100")
    return low, high


def _reasons(named: Iterable[str], *, in_domain: bool) -> tuple[str, ...]:
    """Those that are named; a sender that does not name any yet knows of HDR alone."""
    return tuple(named) or (() if in_domain else ("hdr",))


def _frame_row(message: wire.FrameMessage) -> FrameRow:
    quality = message.quality
    return FrameRow(
        score=quality.score,
        index=message.frame.index,
        pts_seconds=message.frame.pts_seconds,
        interval=quality.interval,
        interval_coverage=quality.interval_coverage,
        out_of_domain=_reasons(quality.out_of_domain, in_domain=quality.in_domain),
        corrupt=message.frame.corrupt,
        discontinuity=message.frame.discontinuity,
        num_dropped=message.drops.queue + message.drops.stale,
    )
