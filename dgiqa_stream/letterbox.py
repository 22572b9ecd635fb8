"""Finds black bars: the part of the picture that is worth scoring."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any

import numpy as np

from dgiqa_stream.types import Crop, Planes

if TYPE_CHECKING:
    from numpy.typing import NDArray

_BLACK = 16 + 8  # limited-range 8-bit luma up to which a sample is black
_BLACK_FULL = 9
_MAX_BRIGHT = 0.01  # share of a line that may be brighter and the line still be black
_SAMPLES_PER_LINE = 128  # a line is judged by this many of its samples
_FEW_LINES = 8  # one in so many of those looked at, at first
_MAX_CUT = 0.3  # of a side
_MIN_CUT = 0.02
_MIN_CUT_PX = 4
_MEMORY_SECONDS = 10.0
_MAX_STEP_SECONDS = 1.0

Rectangle = tuple[int, int, int, int]  # top, left, bottom, right; upright pixels


class LetterboxDetector:
    """Black bars at the four sides, steady over time.

    The picture is the union of what was seen in the last ten seconds of stream time, so it grows
    at once and shrinks slowly. Wholly dark frames change nothing, and their time does not count.
    """

    def __init__(self) -> None:
        self._size: tuple[int, int] | None = None
        self._reset()

    def _reset(self) -> None:
        self._seen: deque[tuple[int, Rectangle]] = deque()  # (second, union of what it showed)
        self._clock_seconds = 0.0  # stream time without dark frames
        self._last_seconds: float | None = None
        self._crop: Crop | None = None

    def update(self, planes: Planes, pts_seconds: float) -> Crop | None:
        """The picture without its bars, in upright pixels; None where there are none to cut.

        Reads at most the outer 30 % of each side, about 128 samples of a line.
        """
        height, width = _upright_size(planes)
        if self._size != (height, width):
            self._reset()
            self._size = height, width
        found = _picture(planes)
        if found is None:
            self._last_seconds = None
            return self._crop
        if self._last_seconds is not None:
            step = max(0.0, pts_seconds - self._last_seconds)
            self._clock_seconds += min(step, _MAX_STEP_SECONDS)
        self._last_seconds = pts_seconds
        self._remember(found)
        self._crop = _crop_of(_union([r for _, r in self._seen]), height, width)
        return self._crop

    def _remember(self, found: Rectangle) -> None:
        second = int(self._clock_seconds)
        if self._seen and self._seen[-1][0] == second:
            found = _union([found, self._seen.pop()[1]])
        self._seen.append((second, found))
        while self._seen[0][0] < self._clock_seconds - _MEMORY_SECONDS:
            self._seen.popleft()


def _picture(planes: Planes) -> Rectangle | None:
    """Where the frame is not black, upright; None for a wholly dark one."""
    image = planes.samples[0]
    full = planes.full_range or planes.is_rgb
    black = (_BLACK_FULL if full else _BLACK) << (planes.bit_depth - 8)
    height, width = planes.size
    down, across = -(-height // _SAMPLES_PER_LINE), -(-width // _SAMPLES_PER_LINE)
    if _is_dark(image[::down, ::across], black):
        return None
    rows, columns = int(height * _MAX_CUT), int(width * _MAX_CUT)
    top = _num_black(image[:rows, ::across], black)
    bottom = _num_black(image[height - rows :, ::across][::-1], black)
    inside = image[top : height - bottom : down].swapaxes(0, 1)
    left = _num_black(inside[:columns], black)
    right = _num_black(inside[width - columns :][::-1], black)
    return _upright((top, left, height - bottom, width - right), planes)


def _is_dark(coarse: NDArray[Any], black: int) -> bool:
    """Whether hardly a sample is bright, by as few lines as show that it is not so."""
    allowed = _MAX_BRIGHT * coarse.shape[0] * coarse.shape[1]
    if np.count_nonzero(_is_bright(coarse[::_FEW_LINES], black)) > allowed:
        return False  # nearly every picture
    return bool(np.count_nonzero(_is_bright(coarse, black)) <= allowed)


def _num_black(lines: NDArray[Any], black: int) -> int:
    """How many lines, counted from the first, are black."""
    if not lines.size:
        return 0
    allowed = _MAX_BRIGHT * lines.shape[1]
    if np.count_nonzero(_is_bright(lines[:1], black)) > allowed:
        return 0  # no bar: most pictures end here
    bright = np.count_nonzero(_is_bright(lines, black), axis=1) > allowed
    return int(np.argmax(bright)) if bright.any() else len(bright)


def _is_bright(samples: NDArray[Any], black: int) -> NDArray[np.bool_]:
    """Which samples are not black: by luma, or by any of R, G and B."""
    bright: NDArray[np.bool_] = samples > black
    return np.asarray(bright.any(axis=2)) if samples.ndim == 3 else bright


def _upright(stored: Rectangle, planes: Planes) -> Rectangle:
    """From stored samples to the picture as shown; the inverse of ``preprocess.stored_region``."""
    top, left, bottom, right = stored
    height, width = planes.size
    if planes.rotation == 90:
        return left, height - bottom, right, height - top
    if planes.rotation == 180:
        return height - bottom, width - right, height - top, width - left
    if planes.rotation == 270:
        return width - right, top, width - left, bottom
    return stored


def _upright_size(planes: Planes) -> tuple[int, int]:
    height, width = planes.size
    return (width, height) if planes.rotation in (90, 270) else (height, width)


def _union(rectangles: list[Rectangle]) -> Rectangle:
    tops, lefts, bottoms, rights = zip(*rectangles, strict=True)
    return min(tops), min(lefts), max(bottoms), max(rights)


def _crop_of(picture: Rectangle, height: int, width: int) -> Crop | None:
    """The crop to a rectangle, where a bar is wide enough to matter."""
    top, left, bottom, right = picture
    top, below = _worth_cutting(top, height), _worth_cutting(height - bottom, height)
    left, beside = _worth_cutting(left, width), _worth_cutting(width - right, width)
    if not (top or left or below or beside):
        return None
    return Crop(left, top, width - left - beside, height - top - below)


def _worth_cutting(bar: int, side: int) -> int:
    return bar if bar >= max(_MIN_CUT_PX, _MIN_CUT * side) else 0
