"""The time of pictures whose stream is flushed, sought in and started again."""

from __future__ import annotations

_FURTHEST_SECONDS = 10.0  # ahead of the last picture; more is a jump, as for other sources
_DEFAULT_FRAME_SECONDS = 1 / 25


class StreamClock:
    """Stream time made continuous: it always rises, and a jump goes on one frame after the last."""

    def __init__(self) -> None:
        self._offset = 0.0  # from stream time to ours
        self._last: float | None = None
        self._was_interrupted = False

    def interrupt(self) -> None:
        """The stream was flushed: whatever time comes next, it does not follow the last one."""
        self._was_interrupted = self._last is not None

    def place(
        self, stream_seconds: float | None, frame_seconds: float | None
    ) -> tuple[float, bool]:
        """The time of the next picture, in seconds, and whether there was a jump before it.

        ``stream_seconds`` is None where the picture has no stamp, and ``frame_seconds``, how long
        one is shown, where that is not known.
        """
        step = frame_seconds or _DEFAULT_FRAME_SECONDS
        if self._last is None:
            self._last = stream_seconds or 0.0
            return self._last, False
        after = self._last + step
        placed = after if stream_seconds is None else stream_seconds + self._offset
        jumped = self._was_interrupted or not self._last < placed <= self._last + _FURTHEST_SECONDS
        if jumped:
            placed = after
            self._offset = after - (stream_seconds or 0.0)
        self._last, self._was_interrupted = placed, False
        return placed, jumped
