"""Decodes ahead of scoring in a thread of its own, and counts every frame that goes missing.

Part of the pipeline: the only place, with :mod:`dgiqa_stream.pipeline`, that starts a thread.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING

from dgiqa_stream.config import OverloadSettings
from dgiqa_stream.errors import SourceUnavailable
from dgiqa_stream.telemetry import Count, Stage, Telemetry
from dgiqa_stream.types import OverloadPolicy

if TYPE_CHECKING:
    from dgiqa_stream.sampler import Sampler
    from dgiqa_stream.sources import Source
    from dgiqa_stream.types import Frame, StreamInfo

_JOIN_SECONDS = 0.3
_OPEN_GRACE_SECONDS = 2.0


class ReadAhead:
    """A source read by a thread; a context manager whose exit stops the thread.

    What the thread raises, :meth:`frames` raises. After the exit::

        decoded = skipped + dropped_queue + dropped_stale + handed
    """

    def __init__(
        self,
        open_source: Callable[[], Source],
        *,
        sampler: Sampler,
        overload: OverloadSettings,
        telemetry: Telemetry,
        open_timeout_seconds: float,
        name: str,
    ) -> None:
        """Nothing is opened before the block is entered."""
        self._open_source, self._sampler = open_source, sampler
        self._overload, self._telemetry = overload, telemetry
        self._open_timeout_seconds = open_timeout_seconds
        self._changed = threading.Condition()
        self._waiting: deque[tuple[float, Frame]] = deque()
        self._source: Source | None = None
        self._error: BaseException | None = None
        self._ended = self._stopped = self._is_woken = self._is_done = False
        self._owes_jump = False  # the frame that carried a jump was dropped with none behind it
        self._num_counted_errors = 0
        self._first_seconds: float | None = None  # of the decoded frames
        self._end_seconds = 0.0
        self._policy = OverloadPolicy.WAIT
        self._thread = threading.Thread(target=self._read, name=f"reader {name}", daemon=True)

    @property
    def info(self) -> StreamInfo | None:
        """What is known of the stream; None until it is open."""
        source = self._source
        return source.info if source else None

    @property
    def is_done(self) -> bool:
        """Whether :meth:`frames` has given the last frame: it ends, or raises, when asked again."""
        return self._is_done

    @property
    def read_seconds(self) -> float:
        """Presentation time of the decoded frames, each for as long as it is shown."""
        return 0.0 if self._first_seconds is None else self._end_seconds - self._first_seconds

    @property
    def has_left_thread(self) -> bool:
        """Whether a read that would not end kept the thread alive past the exit."""
        return self._stopped and self._thread.is_alive()

    def frames(self, *, idle_seconds: float) -> Iterator[Frame | None]:
        """Sampled frames in order; None whenever nothing came for ``idle_seconds``.

        None also follows :meth:`wake` and, once :attr:`is_done`, the last frame. Raises what the
        source raised, after the frames that came before it, and :class:`SourceUnavailable` when
        opening outlasts its deadline.
        """
        deadline = time.monotonic() + self._open_timeout_seconds + _OPEN_GRACE_SECONDS
        while True:
            with self._changed:
                self._changed.wait_for(self._has_news, idle_seconds)
                self._is_woken = False
                frame = self._take()
                if self._is_done:
                    if self._error is not None:
                        raise self._error
                    return
                self._is_done = frame is None and self._ended
            is_away = self._source is None and not self._is_done
            if frame is None and is_away and time.monotonic() > deadline:
                raise SourceUnavailable(
                    f"the source did not open within {self._open_timeout_seconds:g} s: check the "
                    "address, or raise source.open_timeout_seconds"
                )
            yield frame
            del frame  # its memory is free while the next one is waited for

    def wake(self) -> None:
        """Have :meth:`frames` give None, if it has no frame, to whom it lets wait."""
        with self._changed:
            self._is_woken = True
            self._changed.notify_all()

    def stop(self) -> None:
        """Ask the thread to end; frames still waiting are dropped and counted."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        source = self._source
        if source is not None:
            source.close()

    def __enter__(self) -> ReadAhead:
        """Start reading."""
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop, and wait a moment for the thread; a read that ignores its deadline is left."""
        self.stop()
        self._thread.join(_JOIN_SECONDS)
        with self._changed:
            self._telemetry.count(Count.DROPPED_QUEUE, len(self._waiting))
            self._waiting.clear()

    def _has_news(self) -> bool:
        return bool(self._waiting) or self._ended or self._is_woken

    def _take(self) -> Frame | None:
        """The next frame that is not stale; the lock is held."""
        while self._waiting:
            came_at, frame = self._waiting[0]
            is_stale = (
                self._policy is OverloadPolicy.DROP_OLDEST
                and time.monotonic() - came_at > self._overload.staleness_seconds
                and len(self._waiting) > 1
            )
            if is_stale:
                self._drop(Count.DROPPED_STALE)
                continue
            self._waiting.popleft()
            if not self._waiting:
                self._changed.notify_all()
            self._telemetry.count(Count.HANDED)
            return frame
        return None

    def _drop(self, cause: Count) -> None:
        """Drop the oldest waiting frame and count it; a jump of the clock passes to the next."""
        _, dropped = self._waiting.popleft()
        self._telemetry.count(cause)
        if dropped.info.discontinuity and self._waiting:
            came_at, frame = self._waiting[0]
            self._waiting[0] = (came_at, after_jump(frame))
        elif dropped.info.discontinuity:
            self._owes_jump = True

    def _read(self) -> None:
        source: Source | None = None
        try:
            source = self._open_source()
            self._policy = self._policy_for(source)
            with self._changed:
                self._source = source
                self._changed.notify_all()
            if not self._stopped:
                self._read_frames(source)
        except BaseException as exc:  # noqa: BLE001 - the consumer raises it
            self._error = exc
        finally:
            try:
                if source is not None:
                    self._count_errors(source)  # those after the last frame, too
                    source.close()
            except Exception as exc:  # noqa: BLE001 - as above; the consumer must not wait for ever
                self._error = self._error or exc
            with self._changed:
                self._ended = True
                self._changed.notify_all()

    def _read_frames(self, source: Source) -> None:
        jumped = False
        begin = time.monotonic()
        for frame in source.frames():
            if self._stopped:
                return
            self._telemetry.observe(Stage.DECODE, time.monotonic() - begin)
            self._telemetry.count(Count.DECODED)
            self._note_time(frame)
            if frame.info.corrupt:
                self._telemetry.count(Count.CORRUPT)
            if frame.info.discontinuity:
                self._telemetry.count(Count.DISCONTINUITIES)
            self._count_errors(source)
            jumped = jumped or frame.info.discontinuity
            if self._sampler.wants(frame.info):
                self._offer(after_jump(frame) if jumped else frame)
                jumped = False
            else:
                self._telemetry.count(Count.SKIPPED)
            del frame  # its memory is free while the next one is decoded
            begin = time.monotonic()

    def _note_time(self, frame: Frame) -> None:
        begin = frame.info.pts_seconds
        if self._first_seconds is None:
            self._first_seconds = begin
        self._end_seconds = begin + frame.info.duration_seconds

    def _count_errors(self, source: Source) -> None:
        """Count what the decoder refused since the last look."""
        found = source.num_decode_errors
        self._telemetry.count(Count.DECODE_ERRORS, found - self._num_counted_errors)
        self._num_counted_errors = found

    def _policy_for(self, source: Source) -> OverloadPolicy:
        if self._overload.policy != "auto":
            return OverloadPolicy(self._overload.policy)
        return OverloadPolicy.DROP_OLDEST if source.info.is_live else OverloadPolicy.WAIT

    def _offer(self, frame: Frame) -> None:
        with self._changed:
            if self._policy is OverloadPolicy.WAIT:
                # One that waits and one in hand: more overlap decoding and scoring hardly better,
                # and hold 3 MB each at 1080p.
                self._changed.wait_for(lambda: not self._waiting or self._stopped)
            elif len(self._waiting) >= self._overload.queue_frames:
                self._drop(Count.DROPPED_QUEUE)
            if self._stopped:  # nobody takes it any more
                self._telemetry.count(Count.DROPPED_QUEUE)
                return
            frame, self._owes_jump = after_jump(frame) if self._owes_jump else frame, False
            self._waiting.append((time.monotonic(), frame))
            self._changed.notify_all()


def after_jump(frame: Frame) -> Frame:
    """The frame, marked as the first one handed on after the stream's clock jumped."""
    return replace(frame, info=replace(frame.info, discontinuity=True))
