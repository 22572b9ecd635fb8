"""A backend on a device, and the one that goes on where that device is lost."""

from __future__ import annotations

import dataclasses
import logging
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from dgiqa_stream.errors import DeviceLost, ModelError
from dgiqa_stream.preprocess import make_batch

if TYPE_CHECKING:
    from dgiqa_stream.backends import Backend, BackendStatus, Outputs
    from dgiqa_stream.preprocess import ViewSpec
    from dgiqa_stream.telemetry import DeviceStatus
    from dgiqa_stream.types import Crop, FrameBatch, Planes

_logger = logging.getLogger("dgiqa_stream.backends")


class FallbackBackend:
    """Scores by one backend until its device is lost, then by another: no stream hears of it.

    The second one is opened when it is needed. Batches that waited on the device are scored by it,
    as far as their pictures can still be read; the others raise
    :class:`~dgiqa_stream.errors.FrameLost`.
    """

    def __init__(self, first: Backend, open_second: Callable[[], Backend]) -> None:
        """Take an opened backend, and how to open the one that is to follow it."""
        self._backend, self._open_second = first, open_second
        self._requested = first.status.requested
        self._reason = ""
        self._lock = threading.Lock()
        self._is_closed = False

    @property
    def status(self) -> BackendStatus:
        """What is really running; where a device was lost, with the reason."""
        with self._lock:
            status, reason = self._backend.status, self._reason
        if not reason:
            return status
        return dataclasses.replace(status, requested=self._requested, reason=reason)

    def cut(
        self, pictures: Sequence[Planes], views: Sequence[ViewSpec], *, crop: Crop | None
    ) -> FrameBatch:
        """See :class:`~dgiqa_stream.backends.CuttingBackend`; by the runtime where neither cuts."""
        backend = self._backend
        cut = getattr(backend, "cut", None) or make_batch
        try:
            batch: FrameBatch = cut(pictures, views, crop=crop)
        except DeviceLost as exc:
            self._replace(backend, exc)
            batch = make_batch(pictures, views, crop=crop)
        return batch

    def infer(self, batch: FrameBatch) -> Outputs:
        """See :class:`~dgiqa_stream.backends.Backend`."""
        with self._lock:
            backend, is_first = self._backend, not self._reason
        if is_first:
            return self._or_by_second(backend, lambda: backend.infer(batch), batch)
        return _inferred(backend, batch)

    @property
    def frames_in_flight(self) -> int:
        """See :class:`~dgiqa_stream.backends.StartingBackend`; of the backend in use."""
        number: int = getattr(self._backend, "frames_in_flight", 1)
        return number

    def start(self, batch: FrameBatch, on_done: Callable[[], None]) -> Callable[[], Outputs]:
        """See :class:`~dgiqa_stream.backends.StartingBackend`.

        The second backend scores what the first has lost once that is asked for, in its turn.
        """
        backend = self._backend
        start = getattr(backend, "start", None)
        if start is not None:
            try:
                answer: Callable[[], Outputs] = start(batch, on_done)
            except ModelError:  # lost or closed, which asking again finds, too
                pass
            else:
                return lambda: self._or_by_second(backend, answer, batch)
        on_done()
        return lambda: self.infer(batch)

    def _or_by_second(
        self, first: Backend, answer: Callable[[], Outputs], batch: FrameBatch
    ) -> Outputs:
        """What the first backend answers, or the second where the first is lost."""
        try:
            return answer()
        except DeviceLost as exc:
            second = self._replace(first, exc)
        except ModelError:  # of a backend that another thread has found lost, and closed
            if self._backend is first:
                raise
            second = self._backend
        return _inferred(second, batch)

    def devices(self) -> Sequence[DeviceStatus]:
        """See :class:`~dgiqa_stream.backends.TellingBackend`."""
        devices = getattr(self._backend, "devices", None)
        found: Sequence[DeviceStatus] = devices() if devices else ()
        return found

    def close(self) -> None:
        """Release whichever backend is in use; calling twice is fine."""
        with self._lock:
            self._is_closed = True
            self._backend.close()

    def _replace(self, lost: Backend, exc: DeviceLost) -> Backend:
        """The backend that follows; threads that come later find it in use."""
        with self._lock:
            if self._backend is not lost:
                return self._backend
            if self._reason or self._is_closed:  # there is no third one
                raise exc
            second = self._open_second()
            self._backend, self._reason = second, str(exc)
            _logger.warning("%s; scoring goes on by %s", exc, second.status.active)
        lost.close()
        return second


def _inferred(second: Backend, batch: FrameBatch) -> Outputs:
    """By the second backend, of pictures that can still be read."""
    _ = batch.views  # read here: a picture that is gone is FrameLost, not a failed inference
    return second.infer(batch)
