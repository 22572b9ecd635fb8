"""The worst frames as small pictures: from the recording, or read again from the file."""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dgiqa_stream.config import SourceSettings
from dgiqa_stream.errors import SourceError
from dgiqa_stream.preprocess import reduced_rgb

if TYPE_CHECKING:
    from pathlib import Path

    from dgiqa_stream.recording import FrameRow, Track
    from dgiqa_stream.types import Planes

MOST_PICTURES = 6
_APART_SECONDS = 1.0
_LONGEST_PX = 480
_JPEG_QUALITY = 85
_SAME_FRAME_SECONDS = 2e-3
_LEAD_SECONDS = 0.5


@dataclass(frozen=True, slots=True, eq=False)
class Picture:
    """A frame as JPEG, and what is said below it."""

    jpeg: bytes
    score: float
    pts_seconds: float | None
    index: int | None
    width: int
    height: int


def worst_pictures(track: Track) -> tuple[list[Picture], str]:
    """At most six of the worst frames, lowest scores first, and why there are none."""
    if track.thumbnails:
        return [
            Picture(t.jpeg, t.score, t.pts_seconds, t.index, t.width, t.height)
            for t in track.thumbnails[:MOST_PICTURES]
        ], ""
    if track.path is None:
        return [], "The recording holds no pictures."
    if not track.path.is_file():
        return [], "The file that was scored is no longer where it was."
    try:
        pictures = _read_again(track)
    except (SourceError, OSError) as exc:
        return [], f"The file that was scored cannot be read again: {exc}"
    return pictures, "" if pictures else "The frames that were scored are no longer in the file."


def worst_rows(rows: tuple[FrameRow, ...]) -> list[FrameRow]:
    """At most six of the lowest scores, no two of them within one second."""
    chosen: list[FrameRow] = []
    for row in sorted(rows, key=lambda r: r.score):
        if len(chosen) < MOST_PICTURES and all(_is_apart(row, other) for other in chosen):
            chosen.append(row)
    return chosen


def _is_apart(row: FrameRow, other: FrameRow) -> bool:
    if row.pts_seconds is None or other.pts_seconds is None:
        return False
    return abs(row.pts_seconds - other.pts_seconds) >= _APART_SECONDS


def _read_again(track: Track) -> list[Picture]:
    first = min((f.pts_seconds for f in track.frames if f.pts_seconds is not None), default=0.0)
    found = [_read_frame(track.path, row, first) for row in worst_rows(track.frames)]
    return [picture for picture in found if picture is not None]


def _read_frame(path: Path | None, row: FrameRow, first_seconds: float) -> Picture | None:
    """The frame of a row; read from shortly before it, since a file may be hours long."""
    from dgiqa_stream.sources import open_source

    after = max(0.0, (row.pts_seconds or 0.0) - first_seconds - _LEAD_SECONDS)
    with closing(
        open_source(str(path), SourceSettings(start_seconds=after), stream="report")
    ) as source:
        for frame in source.frames():
            late = 0.0 if row.pts_seconds is None else frame.info.pts_seconds - row.pts_seconds
            if late > _SAME_FRAME_SECONDS:
                return None
            if late > -_SAME_FRAME_SECONDS:
                return _picture(row, frame.planes)
    return None


def _picture(row: FrameRow, planes: Planes) -> Picture:
    from dgiqa_stream.opencv import cv2

    rgb = reduced_rgb(planes, longest_px=_LONGEST_PX)
    ok, coded = cv2.imencode(
        ".jpg", cv2.cvtColor(rgb, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY]
    )
    if not ok:
        raise RuntimeError(f"OpenCV did not encode a JPEG of shape {rgb.shape}")
    height, width = rgb.shape[:2]
    return Picture(coded.tobytes(), row.score, row.pts_seconds, row.index, width, height)
