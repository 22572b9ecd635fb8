"""From a source to sinks: the owner of threads, of order and of the end of a session.

One :class:`~dgiqa_stream.reader.ReadAhead` thread decodes and samples; the thread that calls
:meth:`Monitor.run` cuts views, infers, pools and hands messages to the sinks.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Generator, Iterable, Sequence
from typing import TYPE_CHECKING

import msgspec

from dgiqa_stream.config import StreamConfig
from dgiqa_stream.errors import DgiqaError
from dgiqa_stream.frame_scoring import FrameScoring, InFlight
from dgiqa_stream.reader import ReadAhead
from dgiqa_stream.sampler import Sampler, make_sampler
from dgiqa_stream.scorer import Scorer, scorer_of
from dgiqa_stream.session import Ended, Session, SessionResult
from dgiqa_stream.sources import open_source, why_no_hardware
from dgiqa_stream.supervisor import LIMIT_TOLERANCE_SECONDS, ReconnectingSource
from dgiqa_stream.telemetry import Telemetry
from dgiqa_stream.types import Frame, FrameScore, StreamInfo
from dgiqa_stream.urls import scheme_of, stream_id_of

if TYPE_CHECKING:
    from dgiqa_stream.sinks import Sink
    from dgiqa_stream.sources import Source

log = logging.getLogger(__name__)

_IDLE_SECONDS = 0.2


_ENDING_SCHEMES = ("file", "stdin", "pattern")  # played as live, yet their end is an end


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
    reader = _reader(url, name, config, telemetry)
    with reader, InFlight(scoring, on_done=reader.wake) as in_flight:
        is_open = False
        for frame in reader.frames(idle_seconds=_IDLE_SECONDS):
            on_tick()
            if not is_open and reader.info is not None:
                on_open(reader.info)
                is_open = True
            found = in_flight.scored(frame, is_last=reader.is_done)
            del frame  # its memory is free while the next one is waited for
            yield from (score for _, score in found)


def _reader(
    url: str,
    stream: str,
    config: StreamConfig,
    telemetry: Telemetry,
    sampler: Sampler | None = None,
    opener: Callable[[], Source] | None = None,
) -> ReadAhead:
    why_no_hardware(config.source)  # loads torch here, which is not the source's time to open
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
        session = Session(
            self.stream,
            self.config,
            scorer=scorer,
            sampler=sampler,
            telemetry=self.telemetry,
            sinks=self._sinks,
            supervised=lambda: self._supervised,
            run=self._run,
        )
        error: DgiqaError | None = None
        self._supervised = None
        session.status("connecting")
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
        is_reached = limit is not None and reader.read_seconds >= limit - LIMIT_TOLERANCE_SECONDS
        ended: Ended = "duration_reached" if is_reached else "end_of_stream"
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

    def _publish(self, scored: Iterable[tuple[Frame, FrameScore]], session: Session) -> None:
        for frame, score in scored:
            session.frame(frame, score)
            if self._on_score is not None:
                self._on_score(score)

    def _follow(self, reader: ReadAhead, session: Session) -> None:
        """Score what the reader hands over until it ends or :meth:`stop` is called."""
        with InFlight(session.scoring, on_done=reader.wake) as in_flight:
            for frame in reader.frames(idle_seconds=_IDLE_SECONDS):
                if reader.info is not None:
                    session.opened(self._url, reader.info)
                if frame is not None:
                    session.heard()
                self._publish(in_flight.scored(frame, is_last=reader.is_done), session)
                del frame  # its memory is free while the next one is waited for
                if self._stopping.is_set():  # what was handed over is scored
                    self._publish(in_flight.scored(None, is_last=True), session)
                    return
                session.tick()
