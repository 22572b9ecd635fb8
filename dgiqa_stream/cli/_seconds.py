"""One video's score second by second: captions for players, and input of ITU-T P.1203's part 3."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from dgiqa_stream.cli._rows import InputResult, Out
    from dgiqa_stream.types import FrameScore

_DIGITS = 4
_ROUNDING_SECONDS = 1e-6
"""A time stamp this close below a second belongs to it."""


class _Seconds:
    """Means of the frames that begin in each second, counted from the first frame."""

    def __init__(self) -> None:
        """No frame yet."""
        self._sums: dict[int, tuple[float, int]] = defaultdict(lambda: (0.0, 0))
        self._first: float | None = None
        self.end = 0.0
        """When the last frame is over, in seconds from the first."""

    def add(self, score: FrameScore) -> None:
        """Take one frame."""
        info = score.info
        self._first = info.pts_seconds if self._first is None else self._first
        begin = info.pts_seconds - self._first
        total, number = self._sums[int(begin + _ROUNDING_SECONDS)]
        self._sums[int(begin + _ROUNDING_SECONDS)] = total + score.score, number + 1
        self.end = max(self.end, begin + info.duration_seconds)

    def means(self) -> Mapping[int, float]:
        """Second, from 0, to its mean score; one without a frame is not there."""
        return {second: total / number for second, (total, number) in sorted(self._sums.items())}


class WebVtt:
    """Captions, W3C WebVTT: a cue per second with its mean score.

    The first scored frame is ``start_seconds`` into the video, as its player counts.
    """

    def __init__(self, out: Out, *, start_seconds: float = 0.0) -> None:
        """Nothing is written before :meth:`finish`."""
        self._out, self._seconds, self._start = out, _Seconds(), start_seconds

    def frame(self, path: str, score: FrameScore) -> None:
        """Keep one frame."""
        self._seconds.add(score)

    def failed(self, path: str, error: str) -> None:
        """Without a frame there is no cue."""

    def finish(self, results: list[InputResult], *, interrupted: bool) -> None:
        """Write the file."""
        self._out.write("WEBVTT\n")
        for second, mean in self._seconds.means().items():
            end = max(second + 0.001, min(second + 1.0, self._seconds.end))
            if self._seconds.end <= second:  # the stream does not say how long its frames are
                end = second + 1.0
            times = f"{_clock(self._start + second)} --> {_clock(self._start + end)}"
            self._out.write(f"\n{second + 1}\n{times}\n{mean:.0f}\n")
        self._out.flush()


class P1203Input:
    """``O22``, a MOS per second, in the shape that ITU-T P.1203.3 programs read."""

    def __init__(self, out: Out) -> None:
        """Nothing is written before :meth:`finish`."""
        self._out, self._seconds = out, _Seconds()

    def frame(self, path: str, score: FrameScore) -> None:
        """Keep one frame."""
        self._seconds.add(score)

    def failed(self, path: str, error: str) -> None:
        """Without a frame there is no value."""

    def finish(self, results: list[InputResult], *, interrupted: bool) -> None:
        """Write the document; a second without a frame has the value of the one before."""
        means = self._seconds.means()
        num_seconds = max(
            [*(second + 1 for second in means), math.floor(self._seconds.end)], default=0
        )
        values: list[float] = []
        for second in range(num_seconds):
            mean = means.get(second)
            values.append(values[-1] if mean is None else round(mos_of(mean), _DIGITS))
        json.dump({"O21": [], "O22": values, "I23": {"stalling": []}}, self._out, indent=1)
        self._out.write("\n")
        self._out.flush()


def mos_of(score: float) -> float:
    """A score, 0..100, on the scale of opinions from 1 (bad) to 5 (excellent): ``1 + score/25``."""
    return 1.0 + score / 25.0


def _clock(seconds: float) -> str:
    """``HH:MM:SS.mmm``."""
    whole = round(seconds * 1000)
    minutes, milliseconds = divmod(whole, 60_000)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:02d}:{minutes:02d}:{milliseconds / 1000:06.3f}"
