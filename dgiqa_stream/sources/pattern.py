"""Synthetic moving pictures with known defects, for tests, documentation and demonstrations.

``pattern:clean?size=320x180&fps=25&seconds=2`` opens one; the same settings give the same samples.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any, Literal, get_args
from urllib.parse import parse_qsl

import numpy as np

from dgiqa_stream.errors import SourceUnsupported
from dgiqa_stream.sources._pacing import Pacer
from dgiqa_stream.types import ColorMatrix, Frame, FrameInfo, Planes, StreamInfo

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from dgiqa_stream.config import SourceSettings

Defect = Literal["clean", "blurred", "noisy", "blocky"]
_MARGIN = 2  # the scene is this many times the picture's size, so that it can pan
_TIME_BASE = Fraction(1, 90_000)


@dataclass(frozen=True, slots=True)
class PatternSpec:
    """What a pattern shows, and for how long."""

    defect: Defect = "clean"
    width: int = 320
    height: int = 180
    fps: Fraction = Fraction(25)
    seconds: float = 2.0
    begin_seconds: float = 0.0
    """Presentation time of the first frame."""
    variable_rate: bool = False
    """Leave out a seeded third of the frames."""
    seed: int = 1

    def __post_init__(self) -> None:
        """Refuse what cannot be drawn."""
        if self.defect not in get_args(Defect):
            raise ValueError(f"defect {self.defect!r} is not one of {', '.join(get_args(Defect))}")
        if not (16 <= self.width <= 8192 and 16 <= self.height <= 8192):
            raise ValueError(f"size {self.width}x{self.height} is not within 16..8192 pixels")
        if not (0 < self.fps <= 1000 and 0 < self.seconds <= 86_400):
            raise ValueError(f"{self.seconds:g} s at {self.fps} frames/s cannot be")


def parse_pattern(url: str) -> PatternSpec:
    """A spec from ``pattern:DEFECT?size=WxH&fps=N&seconds=N&begin=N&vfr=1&seed=N``.

    Raises :class:`SourceUnsupported` naming the key and the rule.
    """
    name, _, query = url.partition(":")[2].partition("?")
    values: dict[str, Any] = {"defect": name or "clean"}
    known = ("size", "fps", "seconds", "begin", "vfr", "seed")
    try:
        for key, value in parse_qsl(query, keep_blank_values=True):
            if key == "size":
                values["width"], values["height"] = (int(v) for v in value.split("x"))
            elif key == "fps":
                values["fps"] = Fraction(value)
            elif key in ("seconds", "begin"):
                values["begin_seconds" if key == "begin" else key] = float(value)
            elif key == "vfr":
                values["variable_rate"] = bool(int(value))
            elif key == "seed":
                values["seed"] = int(value)
            else:
                raise ValueError(f"unknown key {key!r}; known here: {', '.join(known)}")
        return PatternSpec(**values)
    except (ValueError, ZeroDivisionError) as exc:
        raise SourceUnsupported(f"{url}: {exc}") from exc


def open_url(url: str, settings: SourceSettings, *, stream: str) -> PatternSource:
    """See :func:`dgiqa_stream.sources.open_source`."""
    return PatternSource(
        parse_pattern(url),
        stream=stream,
        realtime=settings.realtime,
        start_seconds=settings.start_seconds,
        duration_seconds=settings.duration_seconds,
    )


class PatternSource:
    """A panning scene of edges, fine texture and smooth ramps, with a bright disc that bounces.

    Frames are 8-bit 4:2:0, BT.709, limited range; odd sizes are allowed.
    """

    num_corrupt = 0
    num_decode_errors = 0

    def __init__(
        self,
        spec: PatternSpec,
        *,
        stream: str = "pattern",
        realtime: bool = False,
        start_seconds: float = 0.0,
        duration_seconds: float | None = None,
    ) -> None:
        self._spec, self._stream = spec, stream
        self._first_seconds = start_seconds
        self._limit_seconds = min(spec.seconds, start_seconds + (duration_seconds or spec.seconds))
        self._stop = threading.Event()
        self._pacer = Pacer(self._stop) if realtime else None
        self._scene = _scene(spec)
        self._frames = self._all()
        self.info = StreamInfo(
            width=spec.width,
            height=spec.height,
            codec="pattern",
            pix_fmt="yuv420p",
            average_fps=spec.fps,
            duration_seconds=spec.seconds,
            num_frames_from_header=None,
            is_live=realtime,
            container="pattern",
        )

    def frames(self) -> Iterator[Frame]:
        """See :class:`dgiqa_stream.sources.Source`."""
        return self._frames

    def close(self) -> None:
        """See :class:`dgiqa_stream.sources.Source`."""
        self._stop.set()

    def _all(self) -> Iterator[Frame]:
        for index, number in enumerate(self._numbers()):
            if self._stop.is_set():
                return
            frame = self._draw(number, index)
            yield self._pacer.wait_for(frame) if self._pacer else frame

    def _numbers(self) -> Iterator[int]:
        """Numbers of the frames that are shown; the first one always is."""
        spec, rng = self._spec, np.random.default_rng(self._spec.seed)
        number = 0
        while (shown := float(number / spec.fps)) < self._limit_seconds - 1e-9:
            left_out = spec.variable_rate and rng.random() < 1 / 3 and number > 0
            if not left_out and shown >= self._first_seconds - 1e-9:
                yield number
            number += 1

    def _draw(self, number: int, index: int) -> Frame:
        spec = self._spec
        pts = round((Fraction(spec.begin_seconds) + number / spec.fps) / _TIME_BASE)
        info = FrameInfo(
            index=index,
            pts_seconds=float(pts * _TIME_BASE),
            duration_seconds=0.0 if spec.variable_rate else float(1 / spec.fps),
            pts=pts,
            time_base=_TIME_BASE,
            width=spec.width,
            height=spec.height,
            pix_fmt="yuv420p",
            keyframe=number % 25 == 0,
            received_at_seconds=time.time(),
        )
        return Frame(self._planes(number), info, self._stream)

    def _planes(self, number: int) -> Planes:
        spec = self._spec
        seconds = float(number / spec.fps)
        top = round(_bounce(seconds * 0.11) * spec.height * (_MARGIN - 1)) & ~1
        left = round(_bounce(seconds * 0.17) * spec.width * (_MARGIN - 1)) & ~1
        luma, cb, cr = (
            plane[top // step : top // step + -(-spec.height // step)][
                :, left // step : left // step + -(-spec.width // step)
            ].copy()
            for plane, step in zip(self._scene, (1, 2, 2), strict=True)
        )
        _add_disc(luma, seconds)
        luma = _DEFECTS[spec.defect](luma, np.random.default_rng([spec.seed, number]))
        return Planes((luma, cb, cr), matrix=ColorMatrix.BT709)


def _bounce(phase: float) -> float:
    """A triangle wave within 0..1."""
    return 1.0 - abs(2.0 * (phase % 1.0) - 1.0)


def _scene(spec: PatternSpec) -> tuple[NDArray[np.uint8], NDArray[np.uint8], NDArray[np.uint8]]:
    """Luma and half-size chroma, larger than the picture."""
    height, width = (spec.height + 2) * _MARGIN, (spec.width + 2) * _MARGIN
    rng = np.random.default_rng(spec.seed)
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    luma = 60.0 + 90.0 * x / width + 30.0 * np.sin(y / 23.0)
    luma += 25.0 * np.sin((x * x + y * y) / (40.0 * spec.width))  # a zone plate: all frequencies
    for _ in range(40):  # flat boxes: edges
        row, column = int(rng.integers(height)), int(rng.integers(width))
        tall, wide = (int(n) for n in rng.integers(8, max(9, spec.height // 3), 2))
        luma[row : row + tall, column : column + wide] = rng.uniform(30, 220)
    luma += rng.normal(0.0, 4.0, luma.shape) * (x % 256 < 128)  # texture in stripes
    half_y, half_x = y[: height // 2, : width // 2], x[: height // 2, : width // 2]
    cb = 128.0 + 40.0 * np.sin(half_x / 31.0)
    cr = 128.0 + 40.0 * np.cos(half_y / 27.0)
    return _to_bytes(luma, 16, 235), _to_bytes(cb, 16, 240), _to_bytes(cr, 16, 240)


def _add_disc(luma: NDArray[np.uint8], seconds: float) -> None:
    height, width = luma.shape
    radius = height / 8
    row = radius + _bounce(seconds * 0.7) * (height - 2 * radius)
    column = radius + _bounce(seconds * 0.43) * (width - 2 * radius)
    y, x = np.ogrid[0:height, 0:width]
    luma[(y - row) ** 2 + (x - column) ** 2 <= radius**2] = 210


def _to_bytes(samples: NDArray[Any], low: int, high: int) -> NDArray[np.uint8]:
    clipped: NDArray[Any] = np.clip(np.rint(samples), low, high)
    return clipped.astype(np.uint8)


def _clean(luma: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.uint8]:
    return luma


def _blurred(luma: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.uint8]:
    from dgiqa_stream.opencv import cv2

    return np.asarray(cv2.GaussianBlur(luma, (0, 0), sigmaX=3.0), np.uint8)


def _noisy(luma: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.uint8]:
    return _to_bytes(luma + rng.normal(0.0, 20.0, luma.shape), 16, 235)


def _blocky(luma: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.uint8]:
    """Each 8x8 block takes three quarters of its way to its own mean."""
    height, width = luma.shape
    padded = np.pad(luma, ((0, -height % 8), (0, -width % 8)), mode="edge").astype(np.float32)
    blocks = padded.reshape(padded.shape[0] // 8, 8, padded.shape[1] // 8, 8)
    blocks = 0.25 * blocks + 0.75 * blocks.mean(axis=(1, 3), keepdims=True)
    return _to_bytes(blocks.reshape(padded.shape)[:height, :width], 16, 235)


_DEFECTS = {"clean": _clean, "blurred": _blurred, "noisy": _noisy, "blocky": _blocky}
