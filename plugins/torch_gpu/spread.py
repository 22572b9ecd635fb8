"""One model on several devices: streams are spread over them by the frames that they give."""

from __future__ import annotations

import dataclasses
import logging
import math
import threading
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from dgiqa_stream.backends import BackendStatus, Outputs
from dgiqa_stream.errors import DeviceLost

if TYPE_CHECKING:
    from dgiqa_stream.preprocess import ViewSpec
    from dgiqa_stream.telemetry import DeviceStatus
    from dgiqa_stream.types import Crop, FrameBatch, Planes
    from plugins.torch_gpu.backend import TorchBackend
    from plugins.torch_gpu.planes import TorchPlanes

_logger = logging.getLogger("dgiqa_stream.backends")

_MEMORY_SECONDS = 2.0  # of rates
_AWAY_SECONDS = 10.0
_FEWEST_FPS = 1.0  # what a stream is taken to give before it is known
_MOVE_EVERY_SECONDS = 1.0
_WORTH_A_MOVE = 0.9  # of the fuller device's load: the emptier one's after the move must be less


@dataclass(slots=True)
class _Stream:
    place: int
    seen_at: float
    fps: float = 0.0


class Loads:
    """Which device each stream goes to. Thread-safe; times are given to it, in seconds.

    A stream that is new goes where the fewest frames a second are scored; a load is the sum of its
    streams' rates, each at least 1. One stream a second moves, at most, where that evens them out.
    """

    def __init__(self, num_devices: int) -> None:
        """No stream is known."""
        self._usable = list(range(num_devices))
        self._streams: dict[Hashable, _Stream] = {}
        self._moved_at = float("-inf")
        self._lock = threading.Lock()

    def place_of(self, stream: Hashable, now: float) -> int:
        """The number of a stream's device. Raises ``LookupError`` where none is left."""
        with self._lock:
            known = self._streams.get(stream)
            if known is None or known.place not in self._usable:
                self._forget(now)
                known = self._streams[stream] = _Stream(self._emptiest(), now)
            self._even_out(known, now)
            return known.place

    def add(self, stream: Hashable, place: int, num_frames: int, now: float) -> None:
        """A stream gave frames, on a device."""
        with self._lock:
            known = self._streams.setdefault(stream, _Stream(place, now))
            faded = math.exp(-(now - known.seen_at) / _MEMORY_SECONDS)
            known.fps = known.fps * faded + num_frames / _MEMORY_SECONDS
            known.place, known.seen_at = place, now

    def drop(self, *places: int) -> bool:
        """Devices are gone: their streams go elsewhere. Whether another one is left."""
        with self._lock:
            self._usable = [n for n in self._usable if n not in places]
            return bool(self._usable)

    def loads(self) -> dict[int, float]:
        """Frames a second on each device that is left."""
        with self._lock:
            return {place: self._load(place) for place in self._usable}

    def _load(self, place: int) -> float:
        return sum(max(s.fps, _FEWEST_FPS) for s in self._streams.values() if s.place == place)

    def _emptiest(self) -> int:
        if not self._usable:
            raise LookupError("no device is left")
        return min(self._usable, key=lambda place: (self._load(place), place))

    def _even_out(self, stream: _Stream, now: float) -> None:
        if now - self._moved_at < _MOVE_EVERY_SECONDS:
            return
        self._forget(now)
        there = self._emptiest()
        after = self._load(there) + max(stream.fps, _FEWEST_FPS)
        if there != stream.place and after < _WORTH_A_MOVE * self._load(stream.place):
            stream.place, self._moved_at = there, now

    def _forget(self, now: float) -> None:
        """Streams that have gone away."""
        known = self._streams.items()
        self._streams = {k: s for k, s in known if now - s.seen_at <= _AWAY_SECONDS}


class SpreadBackend:
    """Several :class:`TorchBackend` of one model, one for each device.

    Frames of one thread are taken for one stream. Frames that lie on a device are scored there. A
    device that is lost is left out; :class:`DeviceLost` is raised once none is left. Where it is
    strict, nothing is left once one is lost: fewer devices are not what was asked for.
    """

    def __init__(
        self,
        backends: Sequence[TorchBackend],
        *,
        is_strict: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Take opened backends; they are closed with this one."""
        self._backends, self._is_strict, self._clock = tuple(backends), is_strict, clock
        self._loads = Loads(len(backends))
        self._lost: dict[int, str] = {}
        self._lock = threading.Lock()

    @property
    def status(self) -> BackendStatus:
        """What is really running, on which devices; which ones were lost."""
        first = self._backends[0].status
        with self._lock:
            lost = dict(self._lost)
        left = [b for n, b in enumerate(self._backends) if n not in lost] or self._backends
        names = ",".join(str(backend.device) for backend in left)
        active = first.active.replace(str(self._backends[0].device), names)
        reasons = [f"{self._backends[n].device}: {why}" for n, why in lost.items()]
        return dataclasses.replace(first, active=active, reason="; ".join(reasons) or first.reason)

    def devices(self) -> Sequence[DeviceStatus]:
        """Each device that is left."""
        with self._lock:
            left = [b for n, b in enumerate(self._backends) if n not in self._lost]
        return [status for backend in left for status in backend.devices()]

    def loads(self) -> dict[str, float]:
        """Frames a second on each device that is left."""
        return {str(self._backends[n].device): fps for n, fps in self._loads.loads().items()}

    def cut(
        self, pictures: Sequence[Planes], views: Sequence[ViewSpec], *, crop: Crop | None
    ) -> FrameBatch:
        """See :class:`~dgiqa_stream.backends.CuttingBackend`; on another device where one is lost.

        Raises :class:`FrameLost` for pictures that only a lost device has.
        """
        while True:
            place, found = self._place_of(pictures), self._off_lost(pictures)
            try:
                return self._backends[place].cut(found, views, crop=crop)
            except DeviceLost as exc:
                if not self._leave_out(place, exc):
                    raise

    def infer(self, batch: FrameBatch) -> Outputs:
        """See :class:`~dgiqa_stream.backends.Backend`; on another device where one is lost.

        Raises :class:`FrameLost` for pictures that only a lost device has.
        """
        return self.start(batch, lambda: None)()

    @property
    def frames_in_flight(self) -> int:
        """See :class:`~dgiqa_stream.backends.StartingBackend`."""
        return self._backends[0].frames_in_flight

    def start(self, batch: FrameBatch, on_done: Callable[[], None]) -> Callable[[], Outputs]:
        """See :class:`~dgiqa_stream.backends.StartingBackend`.

        Another device scores what one has lost once that is asked for, in its turn.
        """
        while True:
            pictures = getattr(batch, "planes", ())
            place = self._place_of(pictures)
            self._loads.add(threading.get_ident(), place, len(batch), self._clock())
            if any(map(self._is_on_lost, pictures)):
                batch = batch.moved(self._off_lost(pictures))  # type: ignore[attr-defined]
            try:
                answer = self._backends[place].start(batch, on_done)
            except DeviceLost as exc:
                if not self._leave_out(place, exc):
                    raise
            else:
                return lambda: self._answered(place, answer, batch)

    def _answered(self, place: int, answer: Callable[[], Outputs], batch: FrameBatch) -> Outputs:
        try:
            return answer()
        except DeviceLost as exc:
            if not self._leave_out(place, exc):
                raise
        return self.infer(batch)

    def close(self) -> None:
        """Close all; calling twice is fine."""
        for backend in self._backends:
            backend.close()

    def _place_of(self, pictures: Sequence[object]) -> int:
        """Where the pictures lie, or else where this thread's are to go."""
        if pictures and not (self._is_strict and self._lost):
            lies_on = getattr(pictures[0], "device", None)
            for n, backend in enumerate(self._backends):
                if backend.device == lies_on and lies_on.type != "cpu" and n not in self._lost:
                    return n
        try:
            return self._loads.place_of(threading.get_ident(), self._clock())
        except LookupError:
            raise DeviceLost(self._told()) from None

    def _is_on_lost(self, picture: object) -> bool:
        """Whether a picture lies on a device that was lost."""
        lies_on = getattr(picture, "device", None)
        lost = [self._backends[n].device for n in tuple(self._lost)]
        return lies_on is not None and lies_on.type != "cpu" and lies_on in lost

    def _off_lost(self, pictures: Sequence[Planes]) -> Sequence[Planes]:
        """Those that lie on a lost device in memory: another one must not fail by them."""
        return [
            cast("TorchPlanes", picture).on_cpu() if self._is_on_lost(picture) else picture
            for picture in pictures
        ]

    def _told(self) -> str:
        """Which devices were lost, and why."""
        with self._lock:
            told = "; ".join(f"{self._backends[n].device}: {why}" for n, why in self._lost.items())
        return f"{told}; --strict ends with the first" if self._is_strict else told

    def _leave_out(self, place: int, exc: DeviceLost) -> bool:
        """Whether another device is left."""
        with self._lock:
            is_news = place not in self._lost
            self._lost.setdefault(place, str(exc))
        gone = range(len(self._backends)) if self._is_strict else (place,)
        is_left = self._loads.drop(*gone)
        if is_news and is_left:
            _logger.warning(
                "%s: %s; the other devices go on with its streams",
                *(self._backends[place].device, exc),
            )
        return is_left
