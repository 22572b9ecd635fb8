"""One run of one source as its subscribers see it: state, messages, pooling and the summary."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from dgiqa_stream.config import StreamConfig
from dgiqa_stream.errors import DgiqaError, FrameLost, SinkError, SourceError
from dgiqa_stream.frame_scoring import FrameScoring
from dgiqa_stream.gallery import Thumbnail, WorstFrames
from dgiqa_stream.pooling import TemporalPooling
from dgiqa_stream.sampler import Sampler
from dgiqa_stream.scorer import Scorer
from dgiqa_stream.supervisor import ReconnectingSource
from dgiqa_stream.telemetry import Count, Stage, Telemetry
from dgiqa_stream.types import Frame, FrameScore, StreamInfo, WindowScore
from dgiqa_stream.urls import redact
from dgiqa_stream.wire import Message, MessageFactory

if TYPE_CHECKING:
    from dgiqa_stream.messages import State
    from dgiqa_stream.sinks import Sink

log = logging.getLogger(__name__)

_SHORTEST_STALL_SECONDS = 2.0

Ended = Literal["end_of_stream", "interrupted", "duration_reached"]


@dataclass(frozen=True, slots=True)
class SessionResult:
    """What one session came to; look at ``error`` before ``session``."""

    stream: str
    session: WindowScore | None
    """The whole session pooled; None where nothing was scored: ``error`` says why, if it failed."""
    counts: Mapping[Count, int]
    """How many frames were decoded, scored, dropped..; ``counts["scored"]``, say."""
    duration_seconds: float
    """Wall clock."""
    reason: str
    """``end_of_stream``, ``interrupted``, ``duration_reached`` or ``failed``."""
    error: DgiqaError | None
    """Why it failed; messages carry the same."""
    sink_errors: Sequence[SinkError]
    """Sinks that gave up; the others went on."""
    worst: Sequence[Thumbnail]
    """The worst frames as small pictures, worst first."""


class Session:
    """The state of one run: what was sent, pooled and kept so far."""

    def __init__(
        self,
        stream: str,
        config: StreamConfig,
        *,
        scorer: Scorer,
        sampler: Sampler,
        telemetry: Telemetry,
        sinks: Sequence[Sink],
        supervised: Callable[[], ReconnectingSource | None],
        run: str | None,
    ) -> None:
        """Nothing is sent yet. ``supervised`` gives the source that opens itself again, if one."""
        self._stream, self._config, self._supervised = stream, config, supervised
        self._telemetry, self._scorer, self._sampler = telemetry, scorer, sampler
        self._sinks = list(sinks)
        self._sink_errors: list[SinkError] = []
        self._factory = MessageFactory(
            stream, model=scorer.manifest, sampler=config.sampler, run=run
        )
        self.scoring = FrameScoring(scorer, config.picture, telemetry)
        self._worst = WorstFrames(config.output.thumbnails)
        self._pooling: TemporalPooling | None = None
        self._state: State = "connecting"
        self._began = self._told = self._heard = time.monotonic()
        self._num_heard = self._num_reconnects = 0
        self._lag_seconds = 0.0
        self._is_live = False
        self._backend = scorer.status
        self._decoder: str | None = None

    def opened(self, url: str, info: StreamInfo) -> None:
        """Tell of the source, once, and of what decodes it whenever that is another."""
        if self._pooling is not None:
            self._tell_of_another_decoder(info.decoder)
            return
        self._decoder = info.decoder
        self._is_live = info.is_live
        self._heard = time.monotonic()
        self._pooling = TemporalPooling(
            self._config.pooling, stream=self._stream, period_seconds=self._period(info)
        )
        log.info("%s: %s %dx%d %s", self._stream, redact(url), info.width, info.height, info.codec)
        self._send(self._factory.meta(url, info, backend=self._scorer.status, config=self._config))
        self.status("running")

    def heard(self) -> None:
        """A frame has come, which is to be scored."""
        self._heard = time.monotonic()
        if self._state in ("stalled", "reconnecting") and self._fault is None:
            self.status("running")

    def frame(self, frame: Frame, score: FrameScore) -> None:
        """Publish and pool one frame that was scored."""
        self._lag_seconds = max(0.0, score.scored_at_seconds - score.info.received_at_seconds)
        with self._telemetry.timed(Stage.PUBLISH):
            self._send(self._factory.frame(score, counts=self._telemetry.counts()))
        if score.info.received_at_seconds:  # else nobody noted when it came
            age = time.time() - score.info.received_at_seconds
            self._telemetry.observe(Stage.END_TO_END, age)
        with contextlib.suppress(FrameLost):  # its device is gone, and with it the picture
            self._worst.offer(score, frame.planes)
        if self._pooling is not None:
            with self._telemetry.timed(Stage.POOL):
                windows = self._pooling.add(score)
            for window in windows:
                self._send(self._factory.window(window))

    def tick(self) -> None:
        """What is due: heartbeat, stall, sinks' own work."""
        now, fault = time.monotonic(), self._fault
        num_decoded = self._telemetry.counts()[Count.DECODED]
        if num_decoded != self._num_heard:  # frames that the sampler passes over are heard, too
            self._num_heard, self._heard = num_decoded, now
            if self._state == "stalled":
                self.status("running")
        silent = now - self._heard
        period = self._sampler.period_seconds or 0.0
        if fault is not None and self._state != "reconnecting":
            self.status("reconnecting", fault)
        elif (
            self._state == "running"
            and self._is_live
            and silent > max(2 * period, _SHORTEST_STALL_SECONDS)
        ):
            self.status("stalled")
        elif now - self._told >= self._config.publish.status_seconds:
            self.status(self._state, fault if self._state == "reconnecting" else None)
        self._count_reconnects()
        self._tell_of_another_backend()
        self._tell(lambda sink: sink.tick())

    def _tell_of_another_backend(self) -> None:
        """Count that a device was lost, and say so at once."""
        status = self._scorer.status
        if status != self._backend:
            self._backend = status
            self._telemetry.count(Count.DEVICE_LOSSES)
            self.status(self._state)

    def _tell_of_another_decoder(self, decoder: str) -> None:
        if decoder != self._decoder:
            self._decoder = decoder
            self.status(self._state)

    def _count_reconnects(self) -> None:
        supervised = self._supervised()
        if supervised is None:
            return
        new = supervised.num_reconnects - self._num_reconnects
        self._telemetry.count(Count.RECONNECTS, new)
        self._num_reconnects += new

    def status(self, state: State, error: BaseException | None = None) -> None:
        """Send a status message now."""
        if state != self._state:
            log.info("%s: %s", self._stream, state)
        self._state, self._told = state, time.monotonic()
        self._send(
            self._factory.status(
                state,
                telemetry=self._telemetry.snapshot(),
                error=error,
                lag_seconds=self._lag_seconds,
                rss_bytes=resident_bytes(),
                backend=self._scorer.status,
                devices=self._scorer.devices(),
                decoder=self._decoder,
            )
        )

    def finish(self, error: BaseException | None, ended: Ended) -> SessionResult:
        """Close the windows, send the summary and the last status."""
        self._count_reconnects()
        windows = self._pooling.finish() if self._pooling is not None else []
        for window in windows:
            if window.kind == "sliding":
                self._send(self._factory.window(window))
        session = next((w for w in windows if w.kind == "session" and w.num_frames), None)
        reason = "failed" if error else ended
        worst = self._worst.frames
        for thumbnail in worst:
            self._send(
                self._factory.thumbnail(
                    thumbnail.frame, thumbnail.jpeg, width=thumbnail.width, height=thumbnail.height
                )
            )
        counts = dict(self._telemetry.counts())
        duration = time.monotonic() - self._began
        self._send(
            self._factory.final(
                session,
                counts=counts,
                duration_seconds=duration,
                reason=reason,
                error=error,
                worst=[t.frame for t in worst],
            )
        )
        self.status("failed" if error else "ended", error)
        told = error if isinstance(error, DgiqaError) else None
        return SessionResult(
            self._stream, session, counts, duration, reason, told, self._sink_errors, worst
        )

    @property
    def _fault(self) -> SourceError | None:
        """Why the source is away and being opened again; None while it plays."""
        supervised = self._supervised()
        return None if supervised is None else supervised.fault

    def _period(self, info: StreamInfo) -> float | None:
        if self._sampler.period_seconds is not None:
            return self._sampler.period_seconds
        if info.average_fps and self._config.sampler.mode == "every":
            return self._config.sampler.every / float(info.average_fps)
        return None

    def _send(self, message: Message) -> None:
        self._tell(lambda sink: sink.send(message))

    def _tell(self, what: Callable[[Sink], None]) -> None:
        for sink in list(self._sinks):
            try:
                what(sink)
            except SinkError as exc:  # one full disk must not end the watching
                log.error("%s: %s", self._stream, exc)
                self._telemetry.count(Count.SINK_ERRORS)
                self._sink_errors.append(exc)
                self._sinks.remove(sink)


def resident_bytes() -> int | None:
    """Resident memory of this process, where the kernel tells."""
    try:
        pages = int(Path("/proc/self/statm").read_bytes().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return None
