"""The one place that repairs time: missing stamps, duplicates, jumps, wrap, non-zero start."""

from __future__ import annotations

import math

MPEG_WRAP_SECONDS = 2**33 / 90_000
"""After 26.5 hours the 33-bit clock of MPEG-TS starts again (ISO/IEC 13818-1, 2.4.3.7)."""

_MAX_AHEAD_SECONDS = 10.0
_MAX_BACK_SECONDS = 0.25  # reordered B-frames and duplicates; further back is a jump
_NUDGE_SECONDS = 0.001
_MAX_NUDGES = 8  # a clock that stands still for longer is taken as no clock
_MAX_REORDERED_FRAMES = 16  # of H.264 and HEVC; a larger step back is a jump, not disorder
_DEFAULT_FRAME_SECONDS = 1 / 25
_FURTHEST_SECONDS = 1e12  # a stamp beyond is damage: a frame's length would be lost in rounding
_LONGEST_FRAME_SECONDS = 86_400.0  # a longer one is a broken header


class Timeline:
    """Turns a stream's own stamps into times that are finite and always increase.

    ``frame_seconds`` is the nominal distance of two frames, for what stamps do not say;
    ``wrap_seconds`` the period after which the stream's clock starts again, where it does.
    """

    def __init__(
        self, *, frame_seconds: float | None = None, wrap_seconds: float | None = None
    ) -> None:
        usable = frame_seconds is not None and 0 < frame_seconds <= _LONGEST_FRAME_SECONDS
        self._frame_seconds = frame_seconds if usable and frame_seconds else _DEFAULT_FRAME_SECONDS
        self._wrap_seconds = wrap_seconds
        self._max_ahead_seconds = max(_MAX_AHEAD_SECONDS, 2 * self._frame_seconds)
        self._has_pts = self._has_stamp = False
        self._goes_by_dts = False
        self._pts = _Order(_MAX_REORDERED_FRAMES * self._frame_seconds)
        self._dts = _Order(_MAX_REORDERED_FRAMES * self._frame_seconds)
        self._num_nudges = 0
        self._clock = 0.0  # the newest stamp, unwrapped
        self._offset = 0.0  # from the stream's clock to ours
        self._last: float | None = None  # the newest time given out

    def place(
        self, pts_seconds: float | None, *, dts_seconds: float | None = None
    ) -> tuple[float, bool]:
        """The time of the next frame, and whether the stream's clock jumped before it.

        ``dts_seconds`` is used as long as the stream has shown no presentation stamp, and where
        those are more often out of order (AVI stores none, and what is made up can be wrong).
        """
        was_by_dts, has_begun = self._goes_by_dts, self._last is not None
        stamp = self._choose(pts_seconds, dts_seconds)
        is_first_stamp = not self._has_stamp
        self._has_stamp = self._has_stamp or stamp is not None
        if has_begun and stamp is not None and self._goes_by_dts != was_by_dts:
            return self._jump(stamp), False
        if self._last is None:
            self._clock = stamp or 0.0
            return self._give(self._clock), False
        if stamp is None:
            return self._step(), False
        stamp = self._unwrap(stamp)
        ahead = stamp - self._clock
        if not -_MAX_BACK_SECONDS <= ahead <= self._max_ahead_seconds:
            return self._jump(stamp), not is_first_stamp  # before, our clock had to be made up
        self._clock = max(stamp, self._clock)
        if stamp + self._offset > self._last:
            self._num_nudges = 0
            return self._give(stamp + self._offset), False
        self._num_nudges += 1
        if self._num_nudges > _MAX_NUDGES:
            return self._jump(stamp), False
        return self._give(self._last + min(_NUDGE_SECONDS, self._frame_seconds / 10)), False

    def _choose(self, pts: float | None, dts: float | None) -> float | None:
        """The stamp to go by; as FFmpeg's program does it for what it calls the best effort."""
        self._has_pts = self._has_pts or pts is not None
        pts, dts = _usable(pts), _usable(dts)
        self._pts.add(pts)
        self._dts.add(dts)
        if not self._has_pts:
            return dts
        if dts is not None and pts is not None:
            self._goes_by_dts = self._pts.num_back > self._dts.num_back
        return dts if self._goes_by_dts else pts

    def _unwrap(self, stamp: float) -> float:
        """The stamp plus as many periods of the clock as bring it closest to the last one."""
        if self._wrap_seconds is None:
            return stamp
        return stamp + self._wrap_seconds * round((self._clock - stamp) / self._wrap_seconds)

    def _step(self) -> float:
        """One nominal frame after the last."""
        assert self._last is not None
        self._clock += self._frame_seconds
        return self._give(self._last + self._frame_seconds)

    def _jump(self, stamp: float) -> float:
        """One nominal frame after the last; the stream's clock counts from its new value."""
        assert self._last is not None
        self._clock = stamp
        placed = self._give(self._last + self._frame_seconds)
        self._offset = placed - stamp
        return placed

    def _give(self, seconds: float) -> float:
        if self._last is not None:  # a huge stamp can swallow a small step
            seconds = max(seconds, math.nextafter(self._last, math.inf))
        self._last = seconds
        return seconds


class _Order:
    """How often stamps of one kind stood still, or stepped back by at most ``reach_seconds``."""

    def __init__(self, reach_seconds: float) -> None:
        self.num_back = 0
        self._reach_seconds = reach_seconds
        self._last: float | None = None

    def add(self, stamp: float | None) -> None:
        """Look at the next one."""
        if stamp is None:
            return
        if self._last is not None and 0 <= self._last - stamp <= self._reach_seconds:
            self.num_back += 1
        self._last = stamp


def _usable(stamp: float | None) -> float | None:
    return stamp if stamp is not None and abs(stamp) <= _FURTHEST_SECONDS else None  # nor is NaN
