"""What is known of each stream now, from its messages; knows neither sockets nor Prometheus."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from dgiqa_stream.config import POOLER_NAMES
from dgiqa_stream.messages import DevicePart, ModelPart, StagePart
from dgiqa_stream.telemetry import Stage
from dgiqa_stream.wire import (
    FinalMessage,
    FrameMessage,
    Message,
    MetaMessage,
    StatusMessage,
    WindowMessage,
)

MAX_STREAMS = 1000
"""So that a publisher that makes up names cannot fill the memory of Prometheus."""
_MAX_WINDOWS = 8  # of one stream; as many as a publisher can be configured to have
_MAX_DEVICES = 16  # of one publisher

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class WindowView:
    """The newest window of one length."""

    pool: Mapping[str, float]
    """Pooled values, 0 to 100, by the pooler's name; empty where the window is not valid."""
    coverage: float
    """Share of the window that scored frames account for."""
    heard_at: float


@dataclass(frozen=True, slots=True)
class StreamView:
    """A stream as its messages show it; times of hearing are on the board's own clock."""

    stream: str
    publisher: str
    run: str
    heard_at: float
    state: str = "connecting"
    counts: Mapping[str, int] = field(default_factory=dict)
    stages: Mapping[str, StagePart] = field(default_factory=dict)
    """How long each stage of the pipeline took."""
    devices: Sequence[DevicePart] = ()
    """What scores it, and what else the publisher watches."""
    lag_seconds: float | None = None
    last_frame_at_seconds: float | None = None
    """Unix time at which the newest scored frame left the decoder."""
    model: ModelPart | None = None
    windows: Mapping[str, WindowView] = field(default_factory=dict)
    """By length, such as ``10s``."""
    is_up: bool = False
    """It is running, and was heard of lately."""


class Board:
    """The streams of all publishers. Thread-safe.

    A stream is up while it says that it is running and is heard of; what it said of its quality is
    forgotten as soon as it is not. After ``forget_after_seconds`` of silence it is forgotten whole.
    """

    def __init__(
        self,
        *,
        stale_after_seconds: float,
        forget_after_seconds: float,
        max_streams: int = MAX_STREAMS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stale_after, self._forget_after = stale_after_seconds, forget_after_seconds
        self._max_streams, self._clock = max_streams, clock
        self._lock = threading.Lock()
        self._streams: dict[str, StreamView] = {}
        self._publishers: dict[str, float] = {}
        self._missed: Counter[str] = Counter()
        self._num_ignored = 0

    def add_publisher(self, publisher: str) -> None:
        """One that is listened to, though it may not have said anything yet."""
        with self._lock:
            self._publishers.setdefault(publisher, float("-inf"))

    def take(self, message: Message, publisher: str) -> None:
        """What a publisher says."""
        now = self._clock()
        with self._lock:
            self._publishers[publisher] = now
            view = self._view_for(message, publisher, now)
            if view is None:
                self._num_ignored += 1
                return
            self._streams[message.stream] = _after(replace(view, heard_at=now), message, now)

    def missed(self, publisher: str, number: int) -> None:
        """Messages of a publisher that did not arrive."""
        with self._lock:
            self._missed[publisher] += number

    @property
    def num_ignored(self) -> int:
        """Messages of streams beyond the limit, or that two publishers have."""
        return self._num_ignored

    def streams(self) -> list[StreamView]:
        """All streams that are not forgotten, by name; only what is up has windows."""
        now = self._clock()
        with self._lock:
            for name in [s for s, v in self._streams.items() if self._is_gone(v, now)]:
                del self._streams[name]
            return [self._shown(self._streams[name], now) for name in sorted(self._streams)]

    def publishers(self) -> dict[str, tuple[bool, int]]:
        """Whether each was heard of lately, and how many of its messages were missed."""
        now = self._clock()
        with self._lock:
            return {
                name: (now - heard <= self._stale_after, self._missed[name])
                for name, heard in self._publishers.items()
            }

    def _view_for(self, message: Message, publisher: str, now: float) -> StreamView | None:
        """What is known of its stream; None where the message is to be ignored."""
        known = self._streams.get(message.stream)
        if known is not None and known.publisher != publisher and self._is_up(known, now):
            if not self._num_ignored:
                _log.warning(
                    "stream %s comes from %s and from %s, which is ignored: give one of them "
                    "another id",
                    *(message.stream, known.publisher, publisher),
                )
            return None
        if known is not None and known.run == message.run:
            return known
        if known is None and not self._has_room(message.stream, now):
            return None
        return StreamView(message.stream, publisher, message.run, now)

    def _has_room(self, stream: str, now: float) -> bool:
        """Whether another stream can be taken; the one that is down longest makes room."""
        if len(self._streams) < self._max_streams:
            return True
        down = [view for view in self._streams.values() if not self._is_up(view, now)]
        if down:
            del self._streams[min(down, key=lambda view: view.heard_at).stream]
        elif not self._num_ignored:
            _log.warning("more than %d streams: %s is ignored", self._max_streams, stream)
        return bool(down)

    def _is_up(self, view: StreamView, now: float) -> bool:
        return view.state == "running" and now - view.heard_at <= self._stale_after

    def _is_gone(self, view: StreamView, now: float) -> bool:
        return now - view.heard_at > self._forget_after

    def _shown(self, view: StreamView, now: float) -> StreamView:
        if not self._is_up(view, now):
            return replace(view, windows={}, lag_seconds=None, devices=())
        fresh = {
            label: window
            for label, window in view.windows.items()
            if now - window.heard_at <= self._stale_after
        }
        return replace(view, windows=fresh, is_up=True)


def _after(view: StreamView, message: Message, now: float) -> StreamView:
    """The view with what a message adds."""
    if isinstance(message, StatusMessage):
        known = {str(stage): message.stages.get(stage) for stage in Stage}
        return replace(
            view,
            state=message.state,
            counts=message.counts,
            lag_seconds=message.lag_s,
            stages={name: part for name, part in known.items() if part is not None},
            devices=tuple(message.devices[:_MAX_DEVICES]),
        )
    if isinstance(message, FrameMessage):
        wall_ns = message.time.wall_ns
        return replace(
            view,
            model=message.model,
            last_frame_at_seconds=None if wall_ns is None else wall_ns / 1e9,
        )
    if isinstance(message, WindowMessage):
        return _after_window(view, message, now)
    if isinstance(message, FinalMessage):
        state = "failed" if message.reason == "failed" else "ended"
        return replace(view, state=state, counts=message.counts)
    if isinstance(message, MetaMessage):
        return replace(view, model=message.model)
    return view


def _after_window(view: StreamView, message: WindowMessage, now: float) -> StreamView:
    label = f"{message.window.len_s:g}s"
    if label not in view.windows and len(view.windows) >= _MAX_WINDOWS:
        return view
    known = ((name, message.pool.get(name)) for name in POOLER_NAMES)
    pool = {name: value for name, value in known if value is not None} if message.valid else {}
    window = WindowView(pool, message.coverage, now)
    return replace(view, model=message.model, windows={**view.windows, label: window})
