"""Frames of many streams that share a batch: who waits, how long, and who goes first.

Passive: it starts no thread and reads no clock; times are given to it, in seconds that never go
back. :mod:`plugins.torch_gpu.service` owns the thread. For each batcher, at any moment::

    added = taken + waiting
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np

Item = TypeVar("Item")

_NUM_REMEMBERED = 4096  # latencies; percentiles are over the newest


@dataclass(frozen=True, slots=True, eq=False)
class Waiting(Generic[Item]):
    """One frame that waits for its batch."""

    stream: Hashable
    item: Item
    added_seconds: float
    turn: int
    """In which round it is its stream's to go: streams that wait share each round."""
    order: int
    """From 0, over all streams."""


@dataclass(frozen=True, slots=True)
class Percentiles:
    """Of the newest 4,096 durations, in seconds; None before the first."""

    p50_seconds: float | None
    p99_seconds: float | None
    max_seconds: float | None


@dataclass(frozen=True, slots=True)
class BatchStatistics:
    """What a batcher has done so far."""

    num_added: int
    num_taken: int
    num_batches: int
    mean_batch: float
    """Frames in a batch; 0 before the first."""
    num_streams: int
    """That have given a frame lately."""
    waited: Percentiles
    """From a frame's arrival until its batch left."""

    @property
    def num_waiting(self) -> int:
        """Frames in no batch yet."""
        return self.num_added - self.num_taken


class Batcher(Generic[Item]):
    """Collects frames until a batch is due.

    A batch is due when it is full, when its oldest frame has waited ``budget_seconds``, or when
    every stream that has given a frame within ``active_seconds`` waits, or has one in a batch that
    is not :meth:`done`: then hardly anyone else will come. So streams that wait for their results
    fall into groups, one of which is made ready while another is scored.

    Turns are those of start-time fair queueing (Goyal, Vin and Cheng, SIGCOMM 1996, section 2) with
    frames of equal length: a stream that gives more frames than others waits for itself alone, and
    one that was away gains nothing by it.
    """

    def __init__(
        self, *, max_batch: int, budget_seconds: float, active_seconds: float = 1.0
    ) -> None:
        """Nothing waits."""
        if max_batch < 1 or not budget_seconds >= 0:
            raise ValueError(
                f"max_batch {max_batch} must be 1 or more, budget_seconds {budget_seconds} 0 or "
                "more"
            )
        self.max_batch, self._budget, self._active = max_batch, budget_seconds, active_seconds
        self._waiting: list[Waiting[Item]] = []
        self._seen: dict[Hashable, float] = {}
        self._turn_of: dict[Hashable, int] = {}
        self._under_way: Counter[Hashable] = Counter()  # frames in batches that are not done
        self._turn = 0
        self._num_added = self._num_taken = self._num_batches = 0
        self._waited: deque[float] = deque(maxlen=_NUM_REMEMBERED)

    def add(self, stream: Hashable, item: Item, now: float) -> None:
        """A frame of a stream has come; frames of one stream stay in order."""
        turn = max(self._turn, self._turn_of.get(stream, -1) + 1)
        self._seen[stream], self._turn_of[stream] = now, turn
        self._waiting.append(Waiting(stream, item, now, turn, self._num_added))
        self._num_added += 1

    def due_seconds(self, now: float) -> float | None:
        """When the next batch is to leave, ``now`` or later; None where nothing waits."""
        if not self._waiting:
            return None
        if len(self._waiting) >= self.max_batch or self._all_wait(now):
            return now
        return max(now, min(w.added_seconds for w in self._waiting) + self._budget)

    def take(self, now: float) -> Sequence[Waiting[Item]]:
        """The batch that is due, at most ``max_batch`` frames; empty where none is."""
        due = self.due_seconds(now)
        if due is None or due > now:
            return ()
        self._waiting.sort(key=lambda w: (w.turn, w.order))
        batch, self._waiting = self._waiting[: self.max_batch], self._waiting[self.max_batch :]
        self._turn = max(self._turn, max(w.turn for w in batch))
        self._num_taken += len(batch)
        self._num_batches += 1
        self._waited.extend(now - w.added_seconds for w in batch)
        self._under_way.update(w.stream for w in batch)
        return batch

    def done(self, batch: Sequence[Waiting[Item]]) -> None:
        """Frames of a batch that was taken have their results: their streams may give more."""
        self._under_way -= Counter(w.stream for w in batch)

    def clear(self) -> Sequence[Waiting[Item]]:
        """All that waits, taken out of turn: the end."""
        left, self._waiting = self._waiting, []
        self._num_taken += len(left)
        return left

    def statistics(self, now: float) -> BatchStatistics:
        """Counts and waiting times so far."""
        self._forget(now)
        mean = self._num_taken / self._num_batches if self._num_batches else 0.0
        return BatchStatistics(
            self._num_added,
            self._num_taken,
            self._num_batches,
            mean,
            len(self._seen),
            percentiles_of(self._waited),
        )

    def _all_wait(self, now: float) -> bool:
        self._forget(now)
        return self._seen.keys() <= {w.stream for w in self._waiting} | self._under_way.keys()

    def _forget(self, now: float) -> None:
        """Streams that have gone away, unless a frame of theirs still waits."""
        waiting = {w.stream for w in self._waiting}
        for stream, seen in list(self._seen.items()):
            if now - seen > self._active and stream not in waiting:
                del self._seen[stream], self._turn_of[stream]


def percentiles_of(seconds: Sequence[float]) -> Percentiles:
    """Median, 99th percentile and maximum."""
    if not seconds:
        return Percentiles(None, None, None)
    p50, p99, top = (float(v) for v in np.percentile(np.asarray(seconds), (50, 99, 100)))
    return Percentiles(p50, p99, top)
