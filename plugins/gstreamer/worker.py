"""Scores pictures that a host hands over, in a thread of its own, and never holds up the host.

Knows nothing of GStreamer: a host with pictures of its own could use it as it is.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from dgiqa_stream.config import StreamConfig
from dgiqa_stream.sampler import make_sampler
from dgiqa_stream.session import Ended, Session
from dgiqa_stream.telemetry import Count, Telemetry
from dgiqa_stream.types import Frame, FrameInfo, OverloadPolicy, Planes, StreamInfo

if TYPE_CHECKING:
    from dgiqa_stream.scorer import Scorer
    from dgiqa_stream.sinks import Sink


_IDLE_SECONDS = 0.2  # between looks at what is due, while no picture comes


@dataclass(frozen=True, slots=True, eq=False)
class Picture:
    """A picture that waits for its score."""

    info: FrameInfo
    planes: Callable[[], AbstractContextManager[Planes]]
    """Opens the host's memory; the planes are used inside the block only."""


class Worker:
    """One session: pictures are offered, at most one waits, and messages go to a sink.

    For each worker that has ended: offered = skipped + dropped + scored + failed.
    """

    def __init__(
        self,
        scorer: Scorer,
        config: StreamConfig,
        *,
        stream: str,
        source: StreamInfo,
        sink: Sink,
        on_problem: Callable[[Exception], None],
    ) -> None:
        """Start the thread. ``on_problem`` is called in it with why a picture got no score."""
        self._stream, self._on_problem = stream, on_problem
        self._policy = OverloadPolicy(config.overload.policy)
        self._sampler = make_sampler(config.sampler)
        self._telemetry = Telemetry()
        self._session = Session(
            stream,
            config,
            scorer=scorer,
            sampler=self._sampler,
            telemetry=self._telemetry,
            sinks=[sink],
            supervised=lambda: None,
            run=None,
        )
        self._session.opened(f"host:{stream}", source)
        self._changed = threading.Condition()
        self._waiting: Picture | None = None
        self._ended: Ended | None = None
        self._owes_jump = False  # the picture that carried a jump was dropped
        self._thread = threading.Thread(target=self._work, name=f"scores {stream}", daemon=True)
        self._thread.start()

    @property
    def num_scored(self) -> int:
        """Pictures scored so far."""
        return self._telemetry.counts()[Count.SCORED]

    @property
    def num_dropped(self) -> int:
        """Pictures so far that were chosen to be scored and dropped for newer ones."""
        return self._telemetry.counts()[Count.DROPPED_QUEUE]

    def offer(self, picture: Picture) -> None:
        """Take a picture where the sampler wants it; one that still waits is dropped for it.

        With the policy ``wait`` the caller waits instead, at most for one inference.
        """
        self._telemetry.count(Count.DECODED)
        if picture.info.corrupt:
            self._telemetry.count(Count.CORRUPT)
        if picture.info.discontinuity:
            self._telemetry.count(Count.DISCONTINUITIES)
            self._owes_jump = True
        if not self._sampler.wants(picture.info):
            self._telemetry.count(Count.SKIPPED)
            return
        with self._changed:
            if self._policy is OverloadPolicy.WAIT:
                self._changed.wait_for(lambda: self._waiting is None)
            self._drop_waiting()
            self._waiting = self._after_jump(picture)
            self._changed.notify_all()

    def discard(self) -> None:
        """Drop the picture that waits: the host was flushed."""
        with self._changed:
            self._drop_waiting()
            self._changed.notify_all()

    def end(self, ended: Ended) -> None:
        """Send the summary and wait for the thread: for two inferences at the most.

        What waits is scored at the end of a stream, and dropped where it is interrupted.
        """
        with self._changed:
            if ended == "interrupted":
                self._drop_waiting()
            self._ended = ended
            self._changed.notify_all()
        self._thread.join()

    def _after_jump(self, picture: Picture) -> Picture:
        if not self._owes_jump:
            return picture
        self._owes_jump = False
        return replace(picture, info=replace(picture.info, discontinuity=True))

    def _drop_waiting(self) -> None:
        """Drop and count what waits; a jump passes to the next one. The lock is held."""
        if self._waiting is not None:
            self._owes_jump = self._owes_jump or self._waiting.info.discontinuity
            self._waiting = None
            self._telemetry.count(Count.DROPPED_QUEUE)

    def _work(self) -> None:
        while (picture := self._next()) is not None:
            self._score(picture)
            del picture  # the host's memory goes back before the next wait
            self._session.tick()
        self._session.finish(None, self._ended or "interrupted")

    def _next(self) -> Picture | None:
        """The picture that waits; None at the end. What is due meanwhile is done."""
        while True:
            with self._changed:
                if self._changed.wait_for(
                    lambda: self._waiting is not None or self._ended is not None, _IDLE_SECONDS
                ):
                    picture, self._waiting = self._waiting, None
                    self._changed.notify_all()
                    return picture
            self._session.tick()

    def _score(self, picture: Picture) -> None:
        self._telemetry.count(Count.HANDED)
        num_judged = self._num_judged()
        try:
            with picture.planes() as planes:
                self._publish(Frame(planes, picture.info, self._stream))
        except Exception as exc:  # noqa: BLE001 - the host goes on, whatever a picture does
            if self._num_judged() == num_judged:  # it was never opened
                self._telemetry.count(Count.FAILED)
            self._on_problem(exc)

    def _publish(self, frame: Frame) -> None:
        self._session.heard()
        self._session.frame(frame, self._session.scoring(frame))

    def _num_judged(self) -> int:
        counts = self._telemetry.counts()
        return counts[Count.SCORED] + counts[Count.FAILED]
