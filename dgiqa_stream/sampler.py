"""Which decoded frames are scored: by stream time, every Nth, or key frames."""

from __future__ import annotations

import math
import random
from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    from dgiqa_stream.config import SamplerSettings
    from dgiqa_stream.types import FrameInfo

_TOLERANCE = 1e-6  # of a period: stamps are rounded to the container's time base
_SAME_FRAME = 1.25  # of a frame: so that rounded durations leave no gap for a tick to fall in


class Sampler(Protocol):
    """Chooses frames; ``wants`` is asked once for each decoded frame, in order."""

    @property
    def mode(self) -> Literal["time", "every", "keyframes"]:
        """How frames are chosen."""

    @property
    def period_seconds(self) -> float | None:
        """Nominal distance of two chosen frames; None where the stream decides."""

    @property
    def biased(self) -> bool:
        """Whether the choice follows the coding pattern: scores do not stand for other frames."""

    @property
    def jitter(self) -> bool:
        """Whether the place within a period is random."""

    def wants(self, info: FrameInfo) -> bool:
        """Whether to score this frame."""


def make_sampler(settings: SamplerSettings) -> Sampler:
    """The sampler that the settings ask for."""
    if settings.mode == "keyframes":
        return KeyframeSampler()
    if settings.mode == "every":
        return StrideSampler(settings.every)
    return TimeSampler(settings.frames_per_second, jitter=settings.jitter, seed=settings.seed)


class TimeSampler:
    """One frame per period of stream time, counted from the first frame.

    With ``jitter``, the frame on screen at a random place of each period, else the first one.
    A period in which no frame begins is made up for by the next frame, which then stands for one
    period only; so a stream with fewer frames than periods has each of them taken.
    """

    mode: Literal["time"] = "time"
    biased = False

    def __init__(self, frames_per_second: float, *, jitter: bool = True, seed: int = 1) -> None:
        self.period_seconds = 1.0 / frames_per_second
        self.jitter = jitter
        self._seed = seed
        self._begin_seconds = 0.0
        self._last_seconds: float | None = None
        self._next = 0  # the first period without its frame
        self._tick_seconds = 0.0

    def wants(self, info: FrameInfo) -> bool:
        """Whether this frame is the one of its period."""
        now, shown_seconds = info.pts_seconds, info.duration_seconds
        if self._last_seconds is None or now < self._last_seconds:  # begins, or begins again
            self._begin_seconds = now
            self._set_next(0)
            shown_seconds = shown_seconds or self.period_seconds
        else:
            shown_seconds = max(shown_seconds, now - self._last_seconds)
        self._last_seconds = now
        period = math.floor((now - self._begin_seconds) / self.period_seconds + _TOLERANCE)
        if period < self._next or now + _SAME_FRAME * shown_seconds <= self._tick_seconds:
            return False
        self._set_next(max(self._next + 1, period))
        return True

    def _set_next(self, period: int) -> None:
        self._next = period
        place = random.Random((self._seed << 40) ^ period).random() if self.jitter else 0.0
        self._tick_seconds = self._begin_seconds + (period + place) * self.period_seconds


class StrideSampler:
    """Each Nth decoded frame; an even N follows the pyramid of B-frames (Netflix/vmaf#1214)."""

    mode: Literal["every"] = "every"
    period_seconds: float | None = None
    jitter = False

    def __init__(self, every: int) -> None:
        self.biased = every > 1 and every % 2 == 0
        self._every = every

    def wants(self, info: FrameInfo) -> bool:
        """Whether the frame's number is a multiple of N."""
        return info.index % self._every == 0


class KeyframeSampler:
    """Key frames only: cheap, but they are the best coded frames of most streams."""

    mode: Literal["keyframes"] = "keyframes"
    period_seconds: float | None = None
    biased = True
    jitter = False

    def wants(self, info: FrameInfo) -> bool:
        """Whether it is a key frame."""
        return info.keyframe
