"""Cameras through OpenCV: ``camera:0``, or ``camera:PATH`` for a device or anything it opens."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterator
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from dgiqa_stream.errors import SourceUnavailable
from dgiqa_stream.sources._timeline import Timeline
from dgiqa_stream.types import Frame, FrameInfo, Planes, StreamInfo

if TYPE_CHECKING:
    from dgiqa_stream.config import SourceSettings


def open_url(url: str, settings: SourceSettings, *, stream: str) -> CameraSource:
    """See :func:`dgiqa_stream.sources.open_source`."""
    return CameraSource(url.partition(":")[2], settings, stream=stream)


class CameraSource:
    """A device by number, or a path. Frames carry the time since opening, on a steady clock."""

    num_corrupt = 0  # OpenCV does not tell
    num_decode_errors = 0

    def __init__(self, device: str, settings: SourceSettings, *, stream: str) -> None:
        from dgiqa_stream.opencv import cv2

        self._cv2, self._device, self._settings, self._stream = cv2, device, settings, stream
        self._lock = threading.Lock()  # held while OpenCV works on the device
        self._stop = threading.Event()
        self._is_device = device.isdigit() or device.startswith("/dev/")
        self._capture = _open(cv2, device, settings.open_timeout_seconds)
        self._first = self._read()
        if self._first is None:
            self._capture.release()
            raise SourceUnavailable(
                f"camera:{device}: cannot be opened, or gives no picture; check that it exists, "
                "that this user may read it and that no other program uses it"
            )
        self.info = self._describe(self._first)
        self._frames: Iterator[Frame] = self._all()

    def frames(self) -> Iterator[Frame]:
        """See :class:`dgiqa_stream.sources.Source`."""
        while True:
            try:
                with self._lock:
                    frame = None if self._stop.is_set() else next(self._frames, None)
            finally:
                if self._stop.is_set():
                    self._release()
            if frame is None:
                return
            yield frame

    def close(self) -> None:
        """See :class:`dgiqa_stream.sources.Source`."""
        self._stop.set()
        self._release()

    def _release(self) -> None:
        if self._lock.acquire(blocking=False):
            try:
                self._frames = iter(())  # the generator holds us
                self._capture.release()
            finally:
                self._lock.release()

    def _describe(self, bgr: Any) -> StreamInfo:
        fps = self._capture.get(self._cv2.CAP_PROP_FPS)
        height, width = bgr.shape[:2]
        return StreamInfo(
            width=width,
            height=height,
            codec=_fourcc(self._capture.get(self._cv2.CAP_PROP_FOURCC)),
            pix_fmt="bgr24",
            average_fps=Fraction(fps).limit_denominator(1001) if 0 < fps < math.inf else None,
            duration_seconds=None,
            num_frames_from_header=None,
            is_live=self._is_device or self._settings.realtime,
            container=self._capture.getBackendName().lower(),
        )

    def _all(self) -> Iterator[Frame]:
        fps = self.info.average_fps
        frame_seconds = float(1 / fps) if fps else None
        timeline = Timeline(frame_seconds=frame_seconds)
        opened, limit, index = time.monotonic(), self._settings.duration_seconds, 0
        bgr = self._first
        self._first = None
        while bgr is not None:
            clock = time.monotonic() - opened
            if not self._is_device:  # a file has its own clock
                clock = self._capture.get(self._cv2.CAP_PROP_POS_MSEC) / 1000
            pts_seconds, jumped = timeline.place(clock)
            if limit is not None and pts_seconds >= limit:
                return
            yield self._frame(bgr, index, pts_seconds, frame_seconds or 0.0, jumped)
            index += 1
            bgr = self._read()

    def _read(self) -> Any:
        """The next picture, uint8 (H, W, 3), BGR; None at the end."""
        is_there, bgr = self._capture.read()
        return bgr if is_there and bgr is not None and bgr.size else None

    def _frame(
        self, bgr: Any, index: int, pts_seconds: float, shown_seconds: float, jumped: bool
    ) -> Frame:
        rgb = self._cv2.cvtColor(
            bgr, self._cv2.COLOR_GRAY2RGB if bgr.ndim == 2 else self._cv2.COLOR_BGR2RGB
        )
        height, width = rgb.shape[:2]
        info = FrameInfo(
            index=index,
            pts_seconds=pts_seconds,
            duration_seconds=shown_seconds,
            pts=None,
            time_base=None,
            width=width,
            height=height,
            pix_fmt="bgr24",
            discontinuity=jumped,
            received_at_seconds=time.time(),
        )
        return Frame(Planes((rgb,), full_range=True), info, self._stream)


def _open(cv2: Any, device: str, open_timeout_seconds: float) -> Any:
    """An OpenCV capture, opened or not, without OpenCV's own words on standard error."""
    level = cv2.utils.logging.getLogLevel()
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    try:
        if device.isdigit():
            return cv2.VideoCapture(int(device))
        patience = [cv2.CAP_PROP_OPEN_TIMEOUT_MSEC, int(open_timeout_seconds * 1000)]
        capture = cv2.VideoCapture(device, cv2.CAP_FFMPEG, patience)
        return capture if capture.isOpened() else cv2.VideoCapture(device)
    finally:
        cv2.utils.logging.setLogLevel(level)


def _fourcc(code: float) -> str:
    """Four letters from OpenCV's number, such as ``mjpg``."""
    number = int(code) & 0xFFFFFFFF
    letters = bytes(number >> shift & 0xFF for shift in (0, 8, 16, 24))
    return "".join(chr(c) for c in letters if 33 <= c < 127).lower() or "unknown"
