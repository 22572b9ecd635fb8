"""What a report tells of one track, as numbers: holds, gaps, drops and pooled columns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import numpy as np

from dgiqa_stream.config import PoolingSettings
from dgiqa_stream.pooling import TemporalPooling
from dgiqa_stream.recording import FrameRow, Track, as_window_score
from dgiqa_stream.types import FrameInfo, FrameScore, OutOfDomain, WindowScore

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[np.float64]

_TREND_SECONDS = 5.0  # the smoothed line is of the shortest window at least this long
_MIN_COVERAGE = 0.5


@dataclass(frozen=True, slots=True, eq=False)
class Story:
    """A track with what a reader wants to see of it."""

    track: Track
    begin_seconds: Array
    """When each timed frame is shown first, (N,), rising."""
    end_seconds: Array
    """Until when its score stands, (N,)."""
    score: Array
    """0..100, (N,)."""
    interval: Array
    """Low and high of each, (2, N); NaN where the model did not say."""
    interval_coverage: float | None
    """Share of pictures whose mean opinion lies in such an interval, where the recording says."""
    out_of_domain: Mapping[str, float]
    """Share of the scored time, 0..1, by reason; only those that occurred. They may overlap."""
    out_of_domain_share: float
    """Share of the scored time with any reason."""
    corrupt_seconds: Array
    """When damaged frames are shown."""
    gaps: tuple[tuple[float, float], ...]
    """Stretches of time without a score."""
    drops: tuple[tuple[float, float], ...]
    """Stretches between two scores in which frames were dropped unscored."""
    session: WindowScore
    windows: tuple[WindowScore, ...]
    was_pooled_here: bool
    """The recording held no summary, so its frames were pooled again."""

    @property
    def trend(self) -> tuple[WindowScore, ...]:
        """Valid windows of one length, for a line smoother than the frames."""
        lengths = sorted({w.length_seconds for w in self.windows})
        length = next((n for n in lengths if n >= _TREND_SECONDS), None)
        return tuple(w for w in self.windows if w.length_seconds == length and w.valid)

    @property
    def lowest_windows(self) -> tuple[WindowScore, ...]:
        """For each length, the valid window with the lowest headline; short ones first."""
        lowest: dict[float, WindowScore] = {}
        for window in self.windows:
            best = lowest.get(window.length_seconds)
            if window.score is None or not window.valid:
                continue
            if best is None or best.score is None or window.score < best.score:
                lowest[window.length_seconds] = window
        return tuple(lowest[length] for length in sorted(lowest))


def tell(track: Track) -> Story:
    """The story of a track; frames are pooled again where the recording has no summary."""
    frames = _in_time(track.frames)
    begin = np.array([f.pts_seconds for f in frames], np.float64)
    period = track.period_seconds or (float(np.median(np.diff(begin))) if len(begin) > 1 else None)
    session, windows, was_pooled_here = _pooled(track, frames, period)
    hold = session.params.get("max_hold_seconds", PoolingSettings().max_hold_seconds)
    last = min(hold, period or hold)
    until = np.append(begin[1:], begin[-1:] + last)
    end = np.minimum(until, begin + hold)
    odd = dict.fromkeys(reason for frame in frames for reason in frame.out_of_domain)
    held = end - begin
    dropped = np.diff([f.num_dropped for f in frames]) > 0 if frames else np.empty(0, bool)
    return Story(
        track=track,
        begin_seconds=begin,
        end_seconds=end,
        score=np.array([f.score for f in frames], np.float64),
        interval=np.array([f.interval or (np.nan, np.nan) for f in frames]).reshape(-1, 2).T,
        interval_coverage=next((f.interval_coverage for f in frames if f.interval_coverage), None),
        out_of_domain={r: _share(held, [r in f.out_of_domain for f in frames]) for r in odd},
        out_of_domain_share=_share(held, [not f.in_domain for f in frames]),
        corrupt_seconds=begin[np.array([f.corrupt for f in frames], bool)],
        gaps=_spans(end[:-1], begin[1:], end[:-1] < begin[1:] - 1e-6),
        drops=_spans(begin[:-1], begin[1:], dropped),
        session=session,
        windows=windows,
        was_pooled_here=was_pooled_here,
    )


def _in_time(rows: tuple[FrameRow, ...]) -> list[FrameRow]:
    """Rows that have a time, in its order, each time once."""
    timed = {row.pts_seconds: row for row in rows if row.pts_seconds is not None}
    return [timed[pts] for pts in sorted(timed)]


def _share(weights: Array, chosen: list[bool]) -> float:
    """Of the weights; 0 where there are none."""
    return float(weights[np.array(chosen, bool)].sum() / weights.sum()) if len(weights) else 0.0


def _spans(begin: Array, end: Array, chosen: NDArray[np.bool_]) -> tuple[tuple[float, float], ...]:
    """The chosen stretches; neighbours that touch become one."""
    spans: list[tuple[float, float]] = []
    for first, last in zip(begin[chosen].tolist(), end[chosen].tolist(), strict=True):
        if spans and first - spans[-1][1] < 1e-6:
            spans[-1] = spans[-1][0], last
        else:
            spans.append((first, last))
    return tuple(spans)


def _pooled(
    track: Track, frames: list[FrameRow], period_seconds: float | None
) -> tuple[WindowScore, tuple[WindowScore, ...], bool]:
    if track.final is not None and track.final.n:
        return as_window_score(track.final), track.windows, False
    pooling = TemporalPooling(PoolingSettings(), stream="recording", period_seconds=period_seconds)
    windows = [w for row in frames for w in pooling.add(_frame_score(row))]
    *partial, session = pooling.finish()
    return session, track.windows or (*windows, *partial), True


def _frame_score(row: FrameRow) -> FrameScore:
    info = FrameInfo(
        index=row.index or 0,
        pts_seconds=row.pts_seconds or 0.0,
        duration_seconds=0.0,
        pts=None,
        time_base=None,
        width=1,
        height=1,
        pix_fmt="",
        discontinuity=row.discontinuity,
    )
    reasons = cast("tuple[OutOfDomain, ...]", row.out_of_domain)  # a later sender may have others
    return FrameScore(info, "recording", row.score, row.score / 100.0, out_of_domain=reasons)
