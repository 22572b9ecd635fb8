"""Counts and latencies of one stream's pipeline: stages write, others read ``snapshot()``.

For each stream, once its reader has ended::

    decoded = skipped + dropped_queue + dropped_stale + handed
    handed  = scored + failed
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType

_SLOT_SECONDS = 0.5
_NUM_SLOTS = 10  # rates are over the last 5 s
_FLOOR_SECONDS = 1e-6
_BINS_PER_OCTAVE = 8  # a quantile is within 4.5 % of the true latency: 2 ** (1 / 16)
_NUM_BINS = 28 * _BINS_PER_OCTAVE  # 1 us to 268 s


class Count(StrEnum):
    """What is counted."""

    DECODED = "decoded"
    """Frames that left the decoder."""
    SKIPPED = "skipped"
    """Frames the sampler did not want."""
    DROPPED_QUEUE = "dropped_queue"
    """Frames dropped because scoring was slower than the stream."""
    DROPPED_STALE = "dropped_stale"
    """Frames that had waited too long to be worth scoring."""
    HANDED = "handed"
    """Frames handed to preprocess."""
    SCORED = "scored"
    FAILED = "failed"
    """Frames handed on that got no score."""
    CORRUPT = "corrupt"
    """Decoded frames with concealed damage; among ``decoded``."""
    DECODE_ERRORS = "decode_errors"
    """Packets the decoder refused."""
    DISCONTINUITIES = "discontinuities"
    """Jumps of the stream's clock."""
    RECONNECTS = "reconnects"
    """Times the source was opened again after it had been lost."""
    SINK_ERRORS = "sink_errors"
    """Messages a sink refused."""
    DEVICE_LOSSES = "device_losses"
    """Times the device that scores was lost, and another went on."""

    def __repr__(self) -> str:
        """As text: counts are printed."""
        return repr(self.value)


class Stage(StrEnum):
    """Whose latency is measured."""

    DECODE = "decode"
    PREPROCESS = "preprocess"
    INFER = "infer"
    POOL = "pool"
    PUBLISH = "publish"
    END_TO_END = "end_to_end"
    """From the moment a frame left the decoder until its score was handed to every sink."""


@dataclass(frozen=True, slots=True)
class StageLatency:
    """How long one stage took, over all its calls."""

    num_calls: int
    sum_seconds: float
    max_seconds: float
    p50_seconds: float | None
    """Median of all calls, within 4.5 %; None before the first call."""
    p95_seconds: float | None
    p99_seconds: float | None

    @property
    def mean_seconds(self) -> float | None:
        """Mean of all calls; None before the first."""
        return self.sum_seconds / self.num_calls if self.num_calls else None


@dataclass(frozen=True, slots=True)
class DeviceStatus:
    """A device that scores, for all streams; None is what it, or its driver, does not tell."""

    device: str
    """Such as ``cuda:0``."""
    name: str | None = None
    load: float | None = None
    """Share of the last moments, 0 to 1, in which it computed."""
    decoder_load: float | None = None
    """The same of its video decoder."""
    used_bytes: int | None = None
    """Of its memory, by all programs."""
    total_bytes: int | None = None
    temperature_celsius: float | None = None
    power_watts: float | None = None
    max_batch: int | None = None
    """Frames scored at once, at most, now."""
    mean_batch: float | None = None
    num_shrunk: int | None = None
    """How often memory ran out and the largest batch was halved."""
    num_retried: int | None = None
    """Batches that ran again after a fault of the device."""


@dataclass(frozen=True, slots=True)
class TelemetrySnapshot:
    """All counts and latencies at one moment."""

    counts: Mapping[Count, int]
    """Every :class:`Count`, 0 where nothing was counted."""
    stages: Mapping[Stage, StageLatency]
    """Every :class:`Stage`."""
    fps_in: float
    """Frames decoded per second of wall clock, over the last five seconds."""
    fps_scored: float
    uptime_seconds: float

    @property
    def dropped(self) -> int:
        """Frames dropped unscored, for whatever reason."""
        return self.counts[Count.DROPPED_QUEUE] + self.counts[Count.DROPPED_STALE]


class Telemetry:
    """Thread-safe counters, latencies and rates; a call costs a few microseconds.

    ``clock`` gives seconds that never go back.
    """

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        """Everything starts at zero, and the uptime now."""
        self._clock = clock
        self._lock = threading.Lock()
        self._begin_seconds = clock()
        self._counts = dict.fromkeys(Count, 0)
        self._stages = {stage: _Latency() for stage in Stage}
        self._rates = {kind: _Rate(self._begin_seconds) for kind in (Count.DECODED, Count.SCORED)}

    def count(self, what: Count, number: int = 1) -> None:
        """Add ``number`` to a count."""
        rate = self._rates.get(what)
        now = self._clock() if rate is not None else 0.0
        with self._lock:
            self._counts[what] += number
            if rate is not None:
                rate.add(now, number)

    def observe(self, stage: Stage, seconds: float) -> None:
        """Record the latency of one call of a stage, in seconds, 0 or more."""
        with self._lock:
            self._stages[stage].add(seconds)

    @contextmanager
    def timed(self, stage: Stage) -> Iterator[None]:
        """Record how long the block took, whether or not it raised."""
        begin = self._clock()
        try:
            yield
        finally:
            self.observe(stage, self._clock() - begin)

    def counts(self) -> Mapping[Count, int]:
        """The counts alone, which cost far less than a snapshot."""
        with self._lock:
            return MappingProxyType(dict(self._counts))

    def snapshot(self) -> TelemetrySnapshot:
        """All numbers, taken at one moment; costs some 100 us."""
        now = self._clock()
        with self._lock:
            return TelemetrySnapshot(
                counts=MappingProxyType(dict(self._counts)),
                stages=MappingProxyType({s: v.snapshot() for s, v in self._stages.items()}),
                fps_in=self._rates[Count.DECODED].per_second(now),
                fps_scored=self._rates[Count.SCORED].per_second(now),
                uptime_seconds=now - self._begin_seconds,
            )


class _Latency:
    """Sum, maximum and a histogram with logarithmic bins."""

    __slots__ = ("_bins", "_count", "_max", "_sum")

    def __init__(self) -> None:
        self._count, self._sum, self._max = 0, 0.0, 0.0
        self._bins = [0] * _NUM_BINS

    def add(self, seconds: float) -> None:
        seconds = max(seconds, 0.0)
        self._count += 1
        self._sum += seconds
        self._max = max(self._max, seconds)
        octaves = math.log2(max(seconds, _FLOOR_SECONDS) / _FLOOR_SECONDS)
        self._bins[min(int(octaves * _BINS_PER_OCTAVE), _NUM_BINS - 1)] += 1

    def snapshot(self) -> StageLatency:
        return StageLatency(
            self._count, self._sum, self._max, *map(self._quantile, (0.50, 0.95, 0.99))
        )

    def _quantile(self, share: float) -> float | None:
        wanted = share * self._count
        seen = 0
        for number, count in enumerate(self._bins):
            seen += count
            if count and seen >= wanted:
                middle: float = _FLOOR_SECONDS * 2.0 ** ((number + 0.5) / _BINS_PER_OCTAVE)
                return min(middle, self._max)
        return None


class _Rate:
    """Events per second over the last few seconds, in slots that are used again."""

    __slots__ = ("_begin", "_numbers", "_slots")

    def __init__(self, begin_seconds: float) -> None:
        self._begin = begin_seconds
        self._slots = [-1] * _NUM_SLOTS  # which slot of time each place holds
        self._numbers = [0] * _NUM_SLOTS

    def add(self, now: float, number: int) -> None:
        slot = int((now - self._begin) / _SLOT_SECONDS)
        place = slot % _NUM_SLOTS
        if self._slots[place] != slot:
            self._slots[place], self._numbers[place] = slot, 0
        self._numbers[place] += number

    def per_second(self, now: float) -> float:
        elapsed = now - self._begin
        newest = int(elapsed / _SLOT_SECONDS)
        oldest = max(0, newest - _NUM_SLOTS + 1)
        events = sum(
            number
            for slot, number in zip(self._slots, self._numbers, strict=True)
            if oldest <= slot <= newest
        )
        span = elapsed - oldest * _SLOT_SECONDS
        # Right after the start, one frame must not look like thousands per second.
        return events / max(span, _SLOT_SECONDS)
