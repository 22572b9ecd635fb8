"""Several inputs at once, told in their order."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dgiqa_stream.cli._rows import InputResult, RowWriter
    from dgiqa_stream.config import StreamConfig
    from dgiqa_stream.types import FrameScore

Score = Callable[[str, "RowWriter"], "InputResult"]
"""Scores an input into a writer; one that raises ends the run."""

_AHEAD = 2
"""Inputs begun, for each job, before the first of them is done: what bounds the memory."""
_LOOK_SECONDS = 0.1


def num_jobs_of(asked: int) -> int:
    """``--jobs``: 0 stands for all cores that the process may use."""
    if asked:
        return asked
    if hasattr(os, "sched_getaffinity"):  # not everywhere
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class KeptRows:
    """What an input has to say, until its turn comes."""

    def __init__(self) -> None:
        """Nothing is kept yet."""
        self._frames: list[tuple[str, FrameScore]] = []

    def frame(self, path: str, score: FrameScore) -> None:
        """Keep one frame."""
        self._frames.append((path, score))

    def failed(self, path: str, error: str) -> None:
        """Whoever tells of the result writes that row."""

    def finish(self, results: list[InputResult], *, interrupted: bool) -> None:
        """The run's own writer does it."""

    def write_to(self, writer: RowWriter) -> None:
        """Say it all."""
        for path, score in self._frames:
            writer.frame(path, score)


class Stop:
    """Ends all jobs: on a signal, or because the run ends for another reason."""

    def __init__(self, check: Callable[[], None]) -> None:
        """``check`` raises ``KeyboardInterrupt`` where there was a signal."""
        self._check, self._event = check, threading.Event()

    def set(self) -> None:
        """From here on every :meth:`check` raises."""
        self._event.set()

    def check(self) -> None:
        """Raise ``KeyboardInterrupt`` where it is time to end."""
        self._check()
        if self._event.is_set():
            raise KeyboardInterrupt


def for_several(settings: StreamConfig, num_at_once: int) -> StreamConfig:
    """The settings of each of so many streams or files that are decoded at once.

    Where they are as many as the cores, one thread decodes each, unless the settings say how many:
    a second finds no idle core, takes a tenth more CPU, and holds two or three frames more.
    """
    import msgspec

    if settings.source.decoder_threads or num_at_once < num_jobs_of(0):
        return settings
    source = msgspec.structs.replace(settings.source, decoder_threads=1)
    return msgspec.structs.replace(settings, source=source)


def score_in_order(
    paths: Sequence[str], score: Score, writer: RowWriter, *, num_jobs: int, stop: Stop
) -> Generator[InputResult, None, None]:
    """Results in the order of the inputs, the rows of each written before it is yielded.

    One job scores in this thread, and rows are written as they come. Raises ``KeyboardInterrupt``
    after the results of all inputs that had been begun.
    """
    if num_jobs > 1 and len(paths) > 1:
        yield from _with_threads(paths, score, writer, num_jobs, stop)
        return
    for path in paths:
        stop.check()
        result = score(path, writer)
        yield result
        if result.is_interrupted:
            raise KeyboardInterrupt


def _with_threads(
    paths: Sequence[str], score: Score, writer: RowWriter, num_jobs: int, stop: Stop
) -> Generator[InputResult, None, None]:
    begun: deque[Future[tuple[InputResult, KeptRows]]] = deque()
    to_come = iter(paths)

    def job(path: str) -> tuple[InputResult, KeptRows]:
        kept = KeptRows()
        return score(path, kept), kept

    pool = ThreadPoolExecutor(num_jobs, "score")
    try:
        while True:
            while len(begun) < _AHEAD * num_jobs and (path := next(to_come, None)) is not None:
                begun.append(pool.submit(job, path))
            if not begun:
                return
            _wait(begun[0], stop)
            result = _written(begun.popleft(), writer)
            yield result
            if result.is_interrupted:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        _end(pool, stop)
        for future in begun:
            if not future.cancelled():
                yield _written(future, writer)
        raise
    finally:  # before anybody closes the model that they use
        _end(pool, stop)


def _wait(future: Future[tuple[InputResult, KeptRows]], stop: Stop) -> None:
    """Until it is done, looking for signals, which only the main thread receives."""
    while not future.done():
        stop.check()
        try:
            future.exception(timeout=_LOOK_SECONDS)
        except TimeoutError:
            continue


def _written(future: Future[tuple[InputResult, KeptRows]], writer: RowWriter) -> InputResult:
    result, kept = future.result()
    kept.write_to(writer)
    return result


def _end(pool: ThreadPoolExecutor, stop: Stop) -> None:
    stop.set()
    pool.shutdown(wait=True, cancel_futures=True)
