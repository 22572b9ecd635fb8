"""Keeps the worst frames of a session as small pictures, spread over time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dgiqa_stream.preprocess import reduced_rgb

if TYPE_CHECKING:
    from dgiqa_stream.types import FrameScore, Planes

LONGEST_PX = 320
_JPEG_QUALITY = 85


@dataclass(frozen=True, slots=True, eq=False)
class Thumbnail:
    """A frame reduced to at most 320 pixels, as JPEG."""

    frame: FrameScore
    jpeg: bytes
    width: int
    height: int


class WorstFrames:
    """The ``most`` worst frames seen, no two nearer than ``apart_seconds`` in stream time."""

    def __init__(self, most: int, *, apart_seconds: float = 1.0) -> None:
        """Keep ``most`` pictures; 0 keeps none and costs nothing."""
        self._most, self._apart = most, apart_seconds
        self._kept: list[Thumbnail] = []

    def offer(self, frame: FrameScore, planes: Planes) -> None:
        """Look at a scored frame; it is reduced and kept only if it is among the worst."""
        near = [
            t
            for t in self._kept
            if abs(t.frame.info.pts_seconds - frame.info.pts_seconds) < self._apart
        ]
        if self._most == 0 or any(t.frame.score <= frame.score for t in near):
            return
        others = [t for t in self._kept if t not in near]
        if len(others) >= self._most:
            best = max(others, key=lambda t: t.frame.score)
            if best.frame.score <= frame.score:
                return
            others.remove(best)
        self._kept = [*others, _thumbnail(frame, planes)]

    @property
    def frames(self) -> list[Thumbnail]:
        """What is kept, worst first."""
        return sorted(self._kept, key=lambda t: t.frame.score)


def _thumbnail(frame: FrameScore, planes: Planes) -> Thumbnail:
    from dgiqa_stream.opencv import cv2

    rgb = reduced_rgb(planes, longest_px=LONGEST_PX)
    ok, coded = cv2.imencode(
        ".jpg", cv2.cvtColor(rgb, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY]
    )
    if not ok:
        raise RuntimeError(f"OpenCV did not encode a JPEG of shape {rgb.shape}")
    return Thumbnail(frame, coded.tobytes(), rgb.shape[1], rgb.shape[0])
