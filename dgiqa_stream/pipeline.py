"""From a source to sinks: the owner of threads, of order and of the end of a session.

One :class:`~dgiqa_stream.reader.ReadAhead` thread decodes and samples; the thread that calls
:meth:`Monitor.run` cuts views, infers, pools and hands messages to the sinks.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import msgspec

from dgiqa_stream.config import PictureSettings, StreamConfig
from dgiqa_stream.errors import ConfigError, DgiqaError, SinkError, SourceError
from dgiqa_stream.gallery import Thumbnail, WorstFrames
from dgiqa_stream.letterbox import LetterboxDetector
from dgiqa_stream.pooling import TemporalPooling
from dgiqa_stream.reader import ReadAhead
from dgiqa_stream.sampler import Sampler, make_sampler
from dgiqa_stream.scorer import Scorer, scorer_of
from dgiqa_stream.sources import open_source
from dgiqa_stream.supervisor import ReconnectingSource
from dgiqa_stream.telemetry import Count, Stage, Telemetry
from dgiqa_stream.types import Frame, FrameScore, StreamInfo, WindowScore
from dgiqa_stream.urls import redact, scheme_of, stream_id_of
from dgiqa_stream.wire import Message, MessageFactory

if TYPE_CHECKING:
    from dgiqa_stream.messages import State
    from dgiqa_stream.sinks import Sink
    from dgiqa_stream.sources import Source

log = logging.getLogger(__name__)

_IDLE_SECONDS = 0.2
_SHORTEST_STALL_SECONDS = 2.0
_LIMIT_TOLERANCE_SECONDS = 0.01  # stamps are rounded, to 1 ms in Matroska


_ENDING_SCHEMES = ("file", "stdin", "pattern")  # played as live, yet their end is an end
_Ended = Literal["end_of_stream", "interrupted", "duration_reached"]


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
        try:
            score = self._score(frame)
        except BaseException:
            self._telemetry.count(Count.FAILED)
            raise
        self._telemetry.count(Count.SCORED)
        return score

    def _score(self, frame: Frame) -> FrameScore:
        with self._telemetry.timed(Stage.PREPROCESS):
            crop = self._crop
            self._warn_of_crop(frame)
            if self._letterbox is not None:
                crop = self._letterbox.update(frame.planes, frame.info.pts_seconds)
            try:
                batch = self._scorer.cut([frame.planes], crop=crop)
            except ValueError as exc:  # the picture became smaller than the crop
                raise ConfigError(str(exc)) from exc
        with self._telemetry.timed(Stage.INFER):
            (found,) = self._scorer.infer(batch)
        return FrameScore(
            info=frame.info,
            stream=frame.stream,
            score=found.score,
            raw=found.raw,
            in_domain=frame.info.dynamic_range == "sdr",
            scored_at_seconds=time.time(),
        )

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


def score_frames(
    url: str,
    scorer: Scorer,
    *,
    config: StreamConfig,
    stream: str | None = None,
    telemetry: Telemetry | None = None,
    on_open: Callable[[StreamInfo], None] = lambda info: None,
    on_tick: Callable[[], None] = lambda: None,
) -> Generator[FrameScore, None, None]:
    """Score the sampled frames of a file or stream, in order; closing the iterator stops it.

    ``on_tick`` is called before each frame and several times a second without one; what it raises
    ends the scoring. Raises :class:`SourceError` after the frames that came before the fault.
    """
    telemetry = telemetry or Telemetry()
    scoring = FrameScoring(scorer, config.picture, telemetry)
    name = stream or stream_id_of(url)
    with _reader(url, name, config, telemetry) as reader:
        is_open = False
        for frame in reader.frames(idle_seconds=_IDLE_SECONDS):
            on_tick()
            if not is_open and reader.info is not None:
                on_open(reader.info)
                is_open = True
            if frame is not None:
                yield scoring(frame)


def _reader(
    url: str,
    stream: str,
    config: StreamConfig,
    telemetry: Telemetry,
    sampler: Sampler | None = None,
    opener: Callable[[], Source] | None = None,
) -> ReadAhead:
    return ReadAhead(
        opener or (lambda: open_source(url, config.source, stream=stream)),
        sampler=sampler or make_sampler(config.sampler),
        overload=config.overload,
        telemetry=telemetry,
        open_timeout_seconds=config.source.open_timeout_seconds,
        name=stream,
    )


class Monitor:
    """Watches one source and tells its sinks: per frame, per window, how it is, how it ended.

    ``source`` is a URL, a path or a function that opens a :class:`Source`. A ``scorer`` given here
    is shared and left open; else one is opened from ``config.model`` for each run. Sinks are the
    caller's: they are not closed here.
    """

    def __init__(
        self,
        source: str | Callable[[], Source],
        *,
        stream: str | None = None,
        config: StreamConfig | None = None,
        scorer: Scorer | None = None,
        sinks: Sequence[Sink] = (),
        run: str | None = None,
        on_score: Callable[[FrameScore], None] | None = None,
    ) -> None:
        """Nothing is opened before :meth:`run`. ``run`` is an id that several monitors share."""
        self._url = source if isinstance(source, str) else "source:custom"
        self._opener = None if isinstance(source, str) else source
        self.stream = stream or stream_id_of(self._url)
        self.config = config or StreamConfig()
        self.telemetry = Telemetry()
        self._scorer, self._sinks, self._run = scorer, list(sinks), run
        self._on_score = on_score
        self._stopping = threading.Event()
        self._supervised: ReconnectingSource | None = None

    def stop(self) -> None:
        """End :meth:`run` within a fraction of a second; from any thread or a signal handler."""
        self._stopping.set()

    def run(self) -> SessionResult:
        """Watch until the source ends, fails or :meth:`stop` is called; sends ``final`` last.

        A source that cannot be opened or fails is in ``error`` of the result, not raised, because
        what was scored before is in it, too; ``session`` is None where nothing was. Raises
        :class:`ModelError` where the model cannot be opened, before anything is sent.
        """
        scorer = self._scorer or scorer_of(self.config.model)
        self.telemetry = Telemetry()
        try:
            return self._watch(scorer)
        finally:
            if self._scorer is None:
                scorer.close()

    def _watch(self, scorer: Scorer) -> SessionResult:
        sampler = make_sampler(self.config.sampler)
        session = _Session(self, scorer, sampler, self._sinks, self._run)
        session.status("connecting")
        error: DgiqaError | None = None
        self._supervised = None
        reader = _reader(self._url, self.stream, self.config, self.telemetry, sampler, self._open)
        try:
            with reader:
                self._follow(reader, session)
        except DgiqaError as exc:
            error = exc
        except BaseException as exc:  # of a callback or a foreign source: subscribers hear of it
            session.finish(None if isinstance(exc, KeyboardInterrupt) else exc, "interrupted")
            raise
        if reader.info is not None:  # open, yet no frame was wanted
            session.opened(self._url, reader.info)
        if reader.has_left_thread:
            log.info("%s: a read still waits for data; its thread is left behind", self.stream)
        limit = self.config.source.duration_seconds
        is_reached = limit is not None and reader.read_seconds >= limit - _LIMIT_TOLERANCE_SECONDS
        ended: _Ended = "duration_reached" if is_reached else "end_of_stream"
        return session.finish(error, "interrupted" if self._stopping.is_set() else ended)

    def _open(self) -> Source:
        """The source, which opens itself again where that is wanted and can be."""
        wanted = self.config.source

        def open_for(duration_seconds: float | None) -> Source:
            if self._opener is not None:
                return self._opener()
            settings = msgspec.structs.replace(wanted, duration_seconds=duration_seconds)
            return open_source(self._url, settings, stream=self.stream)

        source = open_for(wanted.duration_seconds)
        is_lasting = source.info.is_live and scheme_of(self._url) not in _ENDING_SCHEMES
        if not self.config.reconnect.enabled or not is_lasting:
            return source
        self._supervised = ReconnectingSource(
            source,
            open_for,
            self.config.reconnect,
            stream=self.stream,
            duration_seconds=wanted.duration_seconds,
        )
        return self._supervised

    @property
    def fault(self) -> SourceError | None:
        """Why the source is away and being opened again; None while it plays."""
        return self._supervised.fault if self._supervised is not None else None

    @property
    def num_reconnects(self) -> int:
        """How often the source came back in this run."""
        return self._supervised.num_reconnects if self._supervised is not None else 0

    def _follow(self, reader: ReadAhead, session: _Session) -> None:
        """Score what the reader hands over until it ends or :meth:`stop` is called."""
        for frame in reader.frames(idle_seconds=_IDLE_SECONDS):
            if reader.info is not None:
                session.opened(self._url, reader.info)
            if frame is not None:  # also when stopping: what was handed over is scored
                score = session.frame(frame)
                if self._on_score is not None:
                    self._on_score(score)
            if self._stopping.is_set():
                return
            session.tick()


class _Session:
    """The state of one run: what was sent, pooled and kept so far."""

    def __init__(
        self,
        monitor: Monitor,
        scorer: Scorer,
        sampler: Sampler,
        sinks: list[Sink],
        run: str | None,
    ) -> None:
        self._monitor, self._config, self._stream = monitor, monitor.config, monitor.stream
        self._telemetry, self._scorer, self._sampler = monitor.telemetry, scorer, sampler
        self._sinks = list(sinks)
        self._sink_errors: list[SinkError] = []
        self._factory = MessageFactory(
            monitor.stream, model=scorer.manifest, sampler=monitor.config.sampler, run=run
        )
        self._scoring = FrameScoring(scorer, monitor.config.picture, monitor.telemetry)
        self._worst = WorstFrames(monitor.config.output.thumbnails)
        self._pooling: TemporalPooling | None = None
        self._state: State = "connecting"
        self._began = self._told = self._heard = time.monotonic()
        self._num_heard = self._num_reconnects = 0
        self._lag_seconds = 0.0
        self._is_live = False

    def opened(self, url: str, info: StreamInfo) -> None:
        """Tell of the source, once."""
        if self._pooling is not None:
            return
        self._is_live = info.is_live
        self._heard = time.monotonic()
        self._pooling = TemporalPooling(
            self._config.pooling, stream=self._stream, period_seconds=self._period(info)
        )
        log.info("%s: %s %dx%d %s", self._stream, redact(url), info.width, info.height, info.codec)
        self._send(self._factory.meta(url, info, backend=self._scorer.status, config=self._config))
        self.status("running")

    def frame(self, frame: Frame) -> FrameScore:
        """Score, publish and pool one frame."""
        self._heard = time.monotonic()
        if self._state in ("stalled", "reconnecting") and self._monitor.fault is None:
            self.status("running")
        score = self._scoring(frame)
        self._lag_seconds = max(0.0, score.scored_at_seconds - score.info.received_at_seconds)
        with self._telemetry.timed(Stage.PUBLISH):
            self._send(self._factory.frame(score, counts=self._telemetry.counts()))
        self._worst.offer(score, frame.planes)
        if self._pooling is not None:
            with self._telemetry.timed(Stage.POOL):
                windows = self._pooling.add(score)
            for window in windows:
                self._send(self._factory.window(window))
        return score

    def tick(self) -> None:
        """What is due: heartbeat, stall, sinks' own work."""
        now, fault = time.monotonic(), self._monitor.fault
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
        self._tell(lambda sink: sink.tick())

    def _count_reconnects(self) -> None:
        new = self._monitor.num_reconnects - self._num_reconnects
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
            )
        )

    def finish(self, error: BaseException | None, ended: _Ended) -> SessionResult:
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
