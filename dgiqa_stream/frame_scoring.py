"""Decoded frames to their scores, one by one or a few of a stream at once."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import TracebackType

from dgiqa_stream.config import PictureSettings
from dgiqa_stream.errors import ConfigError, FrameLost
from dgiqa_stream.letterbox import LetterboxDetector
from dgiqa_stream.scorer import Prediction, Scorer
from dgiqa_stream.telemetry import Count, Stage, Telemetry
from dgiqa_stream.types import Frame, FrameBatch, FrameInfo, FrameScore, OutOfDomain

log = logging.getLogger(__name__)


class FrameScoring:
    """A decoded frame to its score: crop, letterbox, views, inference. Use one per stream."""

    def __init__(self, scorer: Scorer, picture: PictureSettings, telemetry: Telemetry) -> None:
        """Nothing is opened; the scorer may be shared by several streams."""
        self._scorer, self._telemetry = scorer, telemetry
        self._crop = picture.rectangle
        self._letterbox = LetterboxDetector() if picture.letterbox and not self._crop else None
        self._told_of_crop = False

    def __call__(self, frame: Frame) -> FrameScore:
        """Score one frame; counts it as scored or failed, and raises what went wrong."""
        return self._counted(lambda: self._score(frame))

    @property
    def frames_in_flight(self) -> int:
        """How many frames are worth starting before the first one's score is there."""
        return self._scorer.frames_in_flight

    def start(self, frame: Frame, on_done: Callable[[], None]) -> Callable[[], FrameScore]:
        """Begin to score one frame; what comes back waits, counts and raises as a call does.

        ``on_done`` is called, from any thread, once that would not wait.
        """
        ended: list[float] = []

        def done() -> None:
            ended.append(time.monotonic())
            on_done()

        try:
            batch = self._cut(frame)
            begin = time.monotonic()
            answer = self._scorer.start(batch, done)
        except Exception as exc:  # noqa: BLE001 - raised in this frame's turn
            on_done()
            return partial(self._counted, partial(_raise, exc))
        waited = partial(self._waited, frame.info, frame.stream, answer, begin, ended)
        return partial(self._counted, waited)

    def abandon(self, num_frames: int) -> None:
        """Count frames that were started and whose scores nobody waits for."""
        self._telemetry.count(Count.FAILED, num_frames)

    def _counted(self, score_one: Callable[[], FrameScore]) -> FrameScore:
        try:
            score = score_one()
        except BaseException:
            self._telemetry.count(Count.FAILED)
            raise
        self._telemetry.count(Count.SCORED)
        return score

    def _score(self, frame: Frame) -> FrameScore:
        batch = self._cut(frame)
        with self._telemetry.timed(Stage.INFER):
            (found,) = self._scorer.infer(batch)
        return _score_of(frame.info, frame.stream, found)

    def _waited(
        self,
        info: FrameInfo,
        stream: str,
        answer: Callable[[], list[Prediction]],
        begin_seconds: float,
        ended_seconds: Sequence[float],
    ) -> FrameScore:
        """``ended_seconds`` has, at its head, when the score was there: its turn may come later."""
        (found,) = answer()
        end_seconds = ended_seconds[0] if ended_seconds else time.monotonic()
        self._telemetry.observe(Stage.INFER, end_seconds - begin_seconds)
        return _score_of(info, stream, found)

    def _cut(self, frame: Frame) -> FrameBatch:
        with self._telemetry.timed(Stage.PREPROCESS):
            crop = self._crop
            if self._letterbox is not None:
                crop = self._letterbox.update(frame.planes, frame.info.pts_seconds)
            try:
                batch = self._scorer.cut([frame.planes], crop=crop)
            except ValueError as exc:  # the picture became smaller than the crop
                raise ConfigError(str(exc)) from exc
            self._warn_of_crop(frame)
        return batch

    def _warn_of_crop(self, frame: Frame) -> None:
        """Say once that the crop is not wholly inside; a stream may change its size on the way."""
        crop, info = self._crop, frame.info
        if crop is None or self._told_of_crop:
            return
        if crop.left + crop.width > info.width or crop.top + crop.height > info.height:
            self._told_of_crop = True
            log.warning(
                "%s: the crop %d,%d,%d,%d reaches beyond the %dx%d picture; what is inside is "
                "scored",
                *(frame.stream, crop.left, crop.top, crop.width, crop.height),
                *(info.width, info.height),
            )


def _score_of(info: FrameInfo, stream: str, found: Prediction) -> FrameScore:
    hdr: tuple[OutOfDomain, ...] = () if info.dynamic_range == "sdr" else ("hdr",)
    return FrameScore(
        info=info,
        stream=stream,
        score=found.score,
        raw=found.raw,
        interval=found.interval,
        out_of_domain=(*hdr, *found.out_of_domain),
        scored_at_seconds=time.time(),
    )


def _raise(exc: Exception) -> FrameScore:
    raise exc


@dataclass(slots=True, eq=False)
class _Started:
    """A frame whose turn to be published comes when those before it have been."""

    frame: Frame
    answer: Callable[[], FrameScore] | None = None
    done: threading.Event = field(default_factory=threading.Event)
    """By itself: who is told of the end must not keep the frame."""


class InFlight:
    """Frames of one stream that are being scored, first in, first out; a context manager.

    There are never more than the scorer's ``frames_in_flight``: with one, a frame is scored by the
    caller's thread when its turn comes. Frames whose scores were not taken when the block is left
    count as failed.
    """

    def __init__(self, scoring: FrameScoring, *, on_done: Callable[[], None]) -> None:
        """Nothing is started. ``on_done`` is called, from any thread, when a score has come."""
        self._scoring, self._on_done = scoring, on_done
        self._started: deque[_Started] = deque()

    def __len__(self) -> int:
        """How many frames were taken whose scores were not given yet."""
        return len(self._started)

    def scored(
        self, frame: Frame | None, *, is_last: bool = False
    ) -> Iterator[tuple[Frame, FrameScore]]:
        """Take a frame, if there is one, and give those whose scores are there, in order.

        Waits for the oldest one where no more may be in flight, and for all where it ``is_last``.
        Frames that are lost with their device are passed over; anything else that goes wrong with
        a frame is raised in its turn.
        """
        if frame is not None:
            self._start(frame)
        del frame  # held below, until it is given
        while self._started and (is_last or self._is_first_due):
            yield from self._first()

    @property
    def _is_first_due(self) -> bool:
        is_full = len(self._started) >= self._scoring.frames_in_flight
        return is_full or self._started[0].done.is_set()

    def _start(self, frame: Frame) -> None:
        started = _Started(frame)
        self._started.append(started)
        if self._scoring.frames_in_flight > 1:
            started.answer = self._scoring.start(frame, partial(self._done, started.done))

    def _done(self, done: threading.Event) -> None:
        done.set()
        self._on_done()

    def _first(self) -> Sequence[tuple[Frame, FrameScore]]:
        """The oldest frame with its score; nothing where it is lost, which was counted."""
        started = self._started.popleft()
        try:
            score = started.answer() if started.answer else self._scoring(started.frame)
        except FrameLost as exc:  # those that follow lie elsewhere
            log.debug("%s: %s", started.frame.stream, exc)
            return ()
        return ((started.frame, score),)

    def __enter__(self) -> InFlight:
        """Itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Let go of the frames that are left."""
        self._scoring.abandon(len(self._started))
        self._started.clear()
