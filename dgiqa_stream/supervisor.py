"""Opens a live source again after it has gone away: the only owner of retry."""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from dgiqa_stream.errors import SourceError, SourceUnavailable

if TYPE_CHECKING:
    from dgiqa_stream.config import ReconnectSettings
    from dgiqa_stream.sources import Source
    from dgiqa_stream.types import Frame, StreamInfo

log = logging.getLogger(__name__)

_FRAME_SECONDS = 0.04  # where the stream does not say how long a frame is shown
LIMIT_TOLERANCE_SECONDS = 0.01  # stamps are rounded, to 1 ms in Matroska


class ReconnectingSource:
    """A live source and all that follow it: frames go on, numbered and timed without a break.

    The first frame after each time away carries ``discontinuity`` and comes one frame's duration
    after the last one before. ``reopen`` is given how many seconds are still wanted, None for no
    limit. Once it has played, every fault is retried: a server that restarts can look hopeless.
    """

    def __init__(
        self,
        source: Source,
        reopen: Callable[[float | None], Source],
        settings: ReconnectSettings,
        *,
        stream: str,
        duration_seconds: float | None = None,
        jitter: Callable[[float, float], float] = random.uniform,
    ) -> None:
        self._info = source.info
        self.fault: SourceError | None = None
        """Why it is away; None while it plays. Written by the thread that reads."""
        self.num_reconnects = 0
        self._source, self._reopen, self._settings = source, reopen, settings
        self._stream, self._duration_seconds, self._jitter = stream, duration_seconds, jitter
        self._stop = threading.Event()
        self._corrupt_before = self._errors_before = 0
        self._num_attempts = 0
        self._first_seconds: float | None = None
        self._end_seconds = 0.0

    @property
    def info(self) -> StreamInfo:
        """See :class:`dgiqa_stream.sources.Source`; of the first connection, but for the decoder,
        which may be another one since.
        """
        decoder = self._source.info.decoder
        return self._info if decoder == self._info.decoder else replace(self._info, decoder=decoder)

    @property
    def num_corrupt(self) -> int:
        """See :class:`dgiqa_stream.sources.Source`; of all connections."""
        return self._corrupt_before + self._source.num_corrupt

    @property
    def num_decode_errors(self) -> int:
        """See :class:`dgiqa_stream.sources.Source`; of all connections."""
        return self._errors_before + self._source.num_decode_errors

    def frames(self) -> Iterator[Frame]:
        """Frames until :meth:`close`, the wanted duration, or a source that is no longer live."""
        index = 0
        while True:
            opened_at = time.monotonic()
            try:
                for frame in self._placed(index):
                    index += 1
                    yield frame
                    del frame  # its memory is free while the next one is decoded
                fault: SourceError = SourceUnavailable(f"{self._stream}: the stream ended")
            except SourceError as exc:
                fault = exc
            if self._stop.is_set() or self._is_over:
                return
            if time.monotonic() - opened_at > self._settings.healthy_seconds:
                self._num_attempts = 0
            if not self._come_back(fault):
                return

    def close(self) -> None:
        """See :class:`dgiqa_stream.sources.Source`."""
        self._stop.set()
        self._source.close()

    @property
    def _seconds_given(self) -> float:
        return 0.0 if self._first_seconds is None else self._end_seconds - self._first_seconds

    @property
    def _remaining_seconds(self) -> float | None:
        limit = self._duration_seconds
        return None if limit is None else limit - self._seconds_given

    @property
    def _is_over(self) -> bool:
        remaining = self._remaining_seconds
        return remaining is not None and remaining <= LIMIT_TOLERANCE_SECONDS

    def _placed(self, index: int) -> Iterator[Frame]:
        """Frames of this connection, numbered from ``index`` and put behind the last one's end."""
        offset: float | None = 0.0 if self._first_seconds is None else None
        for frame in self._source.frames():
            info = frame.info
            if self._first_seconds is None:
                self._first_seconds = info.pts_seconds
            is_first = offset is None
            if offset is None:
                offset = self._end_seconds - info.pts_seconds
            self.fault = None
            placed = replace(
                info,
                index=index,
                pts_seconds=info.pts_seconds + offset,
                discontinuity=info.discontinuity or is_first,
            )
            self._end_seconds = placed.pts_seconds + (info.duration_seconds or _FRAME_SECONDS)
            yield replace(frame, info=placed)
            del frame
            index += 1

    def _come_back(self, fault: SourceError) -> bool:
        """Wait and open until it plays again; whether it does."""
        self._source.close()
        while not self._stop.is_set():
            self.fault = fault
            delay = self._delay_seconds()
            log.warning("%s: %s; trying again in %.1f s", self._stream, fault, delay)
            if self._stop.wait(delay):
                return False
            self._num_attempts += 1
            try:
                source = self._reopen(self._remaining_seconds)
            except SourceError as exc:
                fault = exc
                continue
            return self._take(source)
        return False

    def _take(self, source: Source) -> bool:
        """Go on with this one, unless it is no longer wanted or live."""
        self._corrupt_before += self._source.num_corrupt
        self._errors_before += self._source.num_decode_errors
        self._source = source
        if self._stop.is_set() or not source.info.is_live:
            source.close()
            return False
        self.num_reconnects += 1
        return True

    def _delay_seconds(self) -> float:
        """Doubling from the first wait to the longest; a random half of it, so that many streams
        of one server do not come back at once.
        """
        doubled = self._settings.first_wait_seconds * 2.0 ** min(self._num_attempts, 60)
        longest = min(doubled, self._settings.longest_wait_seconds)
        return self._jitter(longest / 2, longest)
