"""Which scores are pooled together: sliding windows and the session."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

from dgiqa_stream.pooling._holds import INSTANT_SECONDS
from dgiqa_stream.pooling._recent import Hold, Recent, Stretch
from dgiqa_stream.pooling.poolers import PoolerSet
from dgiqa_stream.types import FrameScore, WindowScore

if TYPE_CHECKING:
    from dgiqa_stream.config import PoolingSettings

_MAX_WAITING = 256  # holds gathered before the session's poolers take them at once
_MIN_COVERAGE = 0.5
WINDOW_HEADLINE = "ewma"
SESSION_HEADLINE = "hysteresis"


class TemporalPooling:
    """Pools the frame scores of one stream; called from one thread at a time.

    A scored frame stands for the time until the next scored frame, at most
    ``settings.max_hold_seconds``; that is its weight in every pooled value. The last frame of all
    stands for ``period_seconds`` (else its own duration, else ``max_hold_seconds``). A frame that
    is not later than the one before is left out.

    Sliding windows [t0, t1) end every ``settings.hop_seconds``, counted from the first frame.
    Holds are cut at t0 and t1, and nothing outside counts, not even for ``ewma`` and
    ``hysteresis``. ``num_frames`` counts the frames shown first within [t0, t1). The first windows
    begin with the session and are shorter than they are called; ``coverage`` and
    ``expected_frames`` are of the nominal length all the same, so that such a window is valid from
    half its length on. The same holds for windows that ``finish`` cuts short.

    Frames out of domain are pooled like all others; ``in_domain_share`` is what the others hold.

    A jump of the stream's clock clears the memory of ``ewma`` and ``hysteresis``.

    Memory is bounded by the frames of the longest window; the session keeps sums, and what needs
    the distribution of its scores is exact for 8192 frames, then within 100/4096. A frame is pooled
    once for each window that it is in, so its cost grows with a window's length over the hop, and
    not with the session's.
    """

    def __init__(
        self, settings: PoolingSettings, *, stream: str, period_seconds: float | None
    ) -> None:
        self._settings = settings
        self._stream = stream
        self._period_seconds = period_seconds
        self._begin_seconds = 0.0
        self._open: FrameScore | None = None
        """The last frame: how long it stands is not known yet."""
        self._recent = Recent()
        self._next_end = 1
        """Which hop's end comes next, counted from 1."""
        self._was_empty = dict.fromkeys(settings.windows_seconds, False)
        self._session = _Session(settings)
        self._params = {
            "max_hold_seconds": settings.max_hold_seconds,
            **self._session.poolers.parameters(),
        }

    def add(self, score: FrameScore) -> list[WindowScore]:
        """Take the next frame; returns the windows it closes, in time order, short ones first.

        Of windows without any score, as in a long gap, only the first of each length is returned.
        """
        pts = score.info.pts_seconds
        if self._open is None:
            self._begin_seconds = pts
        elif pts <= self._open.info.pts_seconds:
            return []
        else:
            self._hold(self._open, until=pts)
        self._open = score
        return self._close_windows(pts)

    def finish(self) -> list[WindowScore]:
        """The windows cut short by the end, then the session; call once, after the last frame."""
        if self._open is None:
            return [self.session()]
        end = self._open.info.pts_seconds + self._last_hold_seconds(self._open)
        self._hold(self._open, until=end)
        self._open = None
        windows = self._close_windows(end)
        if end - self._end_of(self._next_end - 1) > INSTANT_SECONDS:
            stretch = self._recent.stretch()
            for length in self._settings.windows_seconds:
                window = self._window(stretch, length, self._end_of(self._next_end), until=end)
                windows += [window] if window.coverage else []
        return [*windows, self._session_score(self._session, end)]

    def session(self) -> WindowScore:
        """All frames so far, pooled; the last as if no other came."""
        if self._open is None:
            end = self._session.end_seconds
            return self._session_score(self._session, self._begin_seconds if end is None else end)
        end = self._open.info.pts_seconds + self._last_hold_seconds(self._open)
        session = copy.deepcopy(self._session)
        session.add(self._as_hold(self._open, until=end))
        return self._session_score(session, end)

    def _last_hold_seconds(self, score: FrameScore) -> float:
        longest = self._settings.max_hold_seconds
        return min(self._period_seconds or score.info.duration_seconds or longest, longest)

    def _as_hold(self, score: FrameScore, *, until: float) -> Hold:
        begin = score.info.pts_seconds
        end = min(until, begin + self._settings.max_hold_seconds)
        return Hold(begin, end, score.score, score.info.discontinuity, score.in_domain)

    def _hold(self, score: FrameScore, *, until: float) -> None:
        hold = self._as_hold(score, until=until)
        self._recent.append(hold)
        self._session.add(hold)

    def _end_of(self, hop: int) -> float:
        return self._begin_seconds + hop * self._settings.hop_seconds

    def _close_windows(self, now: float) -> list[WindowScore]:
        elapsed = now - self._begin_seconds + INSTANT_SECONDS
        last = int(elapsed / self._settings.hop_seconds)
        if self._next_end > last:
            return []
        stretch = self._recent.stretch()
        windows = []
        while self._next_end <= last:
            end = self._end_of(self._next_end)
            for length in self._settings.windows_seconds:
                window = self._window(stretch, length, end, until=end)
                is_empty = not window.coverage
                if not (is_empty and self._was_empty[length]):
                    windows.append(window)
                self._was_empty[length] = is_empty
            self._next_end += 1
            if all(self._was_empty.values()):
                self._next_end = last + 1  # the rest of the gap is as empty
        self._drop_what_no_window_needs()
        return windows

    def _drop_what_no_window_needs(self) -> None:
        longest = max(self._settings.windows_seconds, default=0.0)
        self._recent.drop_until(self._end_of(self._next_end) - longest)

    def _window(self, stretch: Stretch, length: float, end: float, *, until: float) -> WindowScore:
        begin = max(end - length, self._begin_seconds)
        part = stretch.between(begin, until)
        poolers = PoolerSet(self._settings)
        part.feed(poolers)
        covered_seconds = float(part.holds.weights.sum())
        coverage = min(1.0, covered_seconds / length)
        starts = stretch.holds.begin_seconds
        shown = starts.searchsorted([begin - INSTANT_SECONDS, until - INSTANT_SECONDS])
        return WindowScore(
            stream=self._stream,
            kind="sliding",
            length_seconds=length,
            hop_seconds=self._settings.hop_seconds,
            begin_seconds=begin,
            end_seconds=until,
            num_frames=int(shown[1] - shown[0]),
            expected_frames=length / self._period_seconds if self._period_seconds else None,
            coverage=coverage,
            valid=coverage >= _MIN_COVERAGE,
            pool=poolers.values(),
            headline=WINDOW_HEADLINE,
            params=self._params,
            in_domain_share=_share(part.in_domain_seconds, covered_seconds),
        )

    def _session_score(self, session: _Session, end: float) -> WindowScore:
        session.flush()
        length = end - self._begin_seconds
        coverage = min(1.0, session.covered_seconds / length) if length else 0.0
        return WindowScore(
            stream=self._stream,
            kind="session",
            length_seconds=length,
            hop_seconds=0.0,
            begin_seconds=self._begin_seconds,
            end_seconds=end,
            num_frames=session.num_frames,
            expected_frames=length / self._period_seconds if self._period_seconds else None,
            coverage=coverage,
            valid=coverage >= _MIN_COVERAGE,
            pool=session.poolers.values(),
            headline=SESSION_HEADLINE,
            params=self._params,
            in_domain_share=_share(session.in_domain_seconds, session.covered_seconds),
        )


def _share(in_domain_seconds: float, covered_seconds: float) -> float | None:
    return min(1.0, in_domain_seconds / covered_seconds) if covered_seconds else None


class _Session:
    """The poolers of the whole session and what has not reached them yet."""

    def __init__(self, settings: PoolingSettings) -> None:
        self.poolers = PoolerSet(settings)
        self.num_frames = 0
        self.covered_seconds = self.in_domain_seconds = 0.0
        self.end_seconds: float | None = None
        self._waiting = Recent()

    def add(self, hold: Hold) -> None:
        self.num_frames += 1
        self.covered_seconds += hold.end - hold.begin
        self.in_domain_seconds += (hold.end - hold.begin) * hold.in_domain
        self.end_seconds = hold.end
        self._waiting.append(hold)
        if len(self._waiting) >= _MAX_WAITING:
            self.flush()

    def flush(self) -> None:
        self._waiting.stretch().feed(self.poolers)
        self._waiting.clear()
