"""The threads that run batches: the only owner of threads in this package."""

from __future__ import annotations

import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Generic, TypeVar

from dgiqa_stream.errors import DeviceLost, ModelError
from plugins.torch_gpu.batching import (
    Batcher,
    BatchStatistics,
    Percentiles,
    Waiting,
    percentiles_of,
)

Item = TypeVar("Item")
Result = TypeVar("Result")

_Pair = Waiting[tuple[Item, Future[Result]]]

_NUM_REMEMBERED = 4096
_SHORTEST_WAIT_SECONDS = 1e-4
_CLOSED = "the model is closed: open it again"


@dataclass(frozen=True, slots=True)
class ServiceStatistics:
    """What the service has done so far."""

    batches: BatchStatistics
    answered: Percentiles
    """From a frame's arrival until its result was there."""
    num_failed: int
    """Frames whose batch raised."""
    num_shrunk: int
    """How often the largest batch was halved, because memory ran out."""
    num_retried: int
    """Batches that ran again after a fault of the device."""
    max_batch: int
    """The largest batch now."""


class BatchService(Generic[Item, Result]):
    """Runs items that many threads give it, in batches, in threads of its own.

    With two ``num_threads`` the next batch is made ready while one runs; ``run`` sees to what is
    for one thread at a time.

    ``run`` gets a batch and returns a result for each item. Where it raises what ``is_too_large``
    knows, the largest batch is halved and the same items run in two parts. What ``is_fault`` knows
    is worth one more try; a batch that fails twice in such a way is the end: ``on_lost`` is told
    why, and all that wait or come later get a :class:`DeviceLost`. Anything else that ``run``
    raises is told to each item of the batch by a :class:`ModelError`, and the next batch runs.
    """

    def __init__(
        self,
        run: Callable[[Sequence[Item]], Sequence[Result]],
        batcher: Batcher[tuple[Item, Future[Result]]],
        *,
        is_too_large: Callable[[BaseException], bool] = lambda exc: False,
        is_fault: Callable[[BaseException], bool] = lambda exc: False,
        on_lost: Callable[[str], None] = lambda reason: None,
        clock: Callable[[], float] = time.monotonic,
        num_threads: int = 1,
        name: str = "batches",
    ) -> None:
        """The threads start at once and end with :meth:`close`."""
        self._run, self._batcher, self._is_too_large = run, batcher, is_too_large
        self._is_fault, self._on_lost, self._clock = is_fault, on_lost, clock
        self._lost = ""
        self._changed = threading.Condition()
        self._is_closed = False
        self._answered: deque[float] = deque(maxlen=_NUM_REMEMBERED)
        self._num_failed = self._num_shrunk = self._num_retried = 0
        self._threads = [
            threading.Thread(target=self._work, name=f"{name} {n}", daemon=True)
            for n in range(num_threads)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, stream: Hashable, items: Sequence[Item]) -> list[Future[Result]]:
        """Give items of one stream; each future has its item's result, in whatever batch it ran."""
        pairs: list[tuple[Item, Future[Result]]] = [(item, Future()) for item in items]
        with self._changed:
            if self._lost:
                raise DeviceLost(self._lost)
            if self._is_closed:
                raise ModelError(_CLOSED)
            now = self._clock()
            for pair in pairs:
                self._batcher.add(stream, pair, now)
            self._changed.notify_all()
        return [future for _, future in pairs]

    def statistics(self) -> ServiceStatistics:
        """Counts and latencies, taken at one moment."""
        with self._changed:
            return ServiceStatistics(
                self._batcher.statistics(self._clock()),
                percentiles_of(self._answered),
                self._num_failed,
                self._num_shrunk,
                self._num_retried,
                self._batcher.max_batch,
            )

    def close(self) -> None:
        """End the threads after the batches that run; what waits is refused. Twice is fine."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        for thread in self._threads:
            if threading.current_thread() is not thread:
                thread.join()

    def _work(self) -> None:
        while self._answer_next():
            pass
        with self._changed:
            left = self._batcher.clear()
        for waiting in left:
            told = DeviceLost(self._lost) if self._lost else ModelError(_CLOSED)
            waiting.item[1].set_exception(told)

    def _answer_next(self) -> bool:
        """Wait for a batch and answer it, keeping nothing of it; False at the end."""
        batch = self._next()
        if batch:
            self._answer(batch)
        return bool(batch)

    def _next(self) -> Sequence[_Pair[Item, Result]]:
        """The batch that is due, waited for; empty at the end."""
        with self._changed:
            while not self._is_closed and not self._lost:
                now = self._clock()
                if batch := self._batcher.take(now):
                    return batch
                due = self._batcher.due_seconds(now)
                self._changed.wait(None if due is None else max(due - now, _SHORTEST_WAIT_SECONDS))
        return ()

    def _answer(self, batch: Sequence[_Pair[Item, Result]], *, is_retry: bool = False) -> None:
        """Run a batch and give each of its futures what it came to."""
        is_too_large = is_fault = False
        results: Sequence[Result] = ()
        try:
            results = self._run([waiting.item[0] for waiting in batch])
            if len(results) != len(batch):
                raise ModelError(f"the model gave {len(results)} results for {len(batch)} frames")
        except BaseException as exc:  # noqa: BLE001 - told to those who wait for it
            is_too_large = len(batch) > 1 and self._is_too_large(exc)
            is_fault = not is_too_large and self._is_fault(exc)
            if is_fault and is_retry:
                self._lose(exc)
            if not is_too_large and (is_retry or not is_fault):
                self._fail(batch, exc)
                return
        if is_too_large:  # out of the handler, whose traceback holds what the failed try allocated
            self._shrink(len(batch))
            middle = len(batch) // 2
            self._answer(batch[:middle])
            self._answer(batch[middle:])
            return
        if is_fault:
            with self._changed:
                self._num_retried += 1
            self._answer(batch, is_retry=True)
            return
        now = self._clock()
        with self._changed:  # before a stream hears of it, and gives its next frame
            self._batcher.done(batch)
            self._answered.extend(now - waiting.added_seconds for waiting in batch)
        for waiting, result in zip(batch, results, strict=True):
            waiting.item[1].set_result(result)

    def _fail(self, batch: Sequence[_Pair[Item, Result]], exc: BaseException) -> None:
        """Tell each future; frames of the traceback give up what they hold on the device."""
        traceback.clear_frames(exc.__traceback__)
        with self._changed:
            self._batcher.done(batch)
            self._num_failed += len(batch)
        line = " ".join(str(exc).split()) or type(exc).__name__
        told = line if isinstance(exc, ModelError) else f"inference failed: {line}"
        for waiting in batch:
            error = DeviceLost(self._lost) if self._lost else ModelError(told)
            error.__cause__ = exc
            waiting.item[1].set_exception(error)

    def _lose(self, exc: BaseException) -> None:
        """The device is of no use any more: nothing is taken from here on."""
        reason = " ".join(str(exc).split()) or type(exc).__name__
        with self._changed:
            self._lost = f"the device was lost while running: {reason[:200]}"
            self._changed.notify_all()
        self._on_lost(reason[:200])

    def _shrink(self, num_items: int) -> None:
        with self._changed:
            self._batcher.max_batch = min(self._batcher.max_batch, max(1, num_items // 2))
            self._num_shrunk += 1
