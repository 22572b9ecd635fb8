"""Interlaced frames to progressive pictures, two of each, by libavfilter's ``bwdif``."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Iterable, Iterator
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from dgiqa_stream.errors import SourceError
from dgiqa_stream.sources._frames import is_mirrored, unmirrored
from dgiqa_stream.sources._planes import planes_of
from dgiqa_stream.types import Frame, Planes, StreamInfo

if TYPE_CHECKING:
    import av

_LEAST_WIDTH, _LEAST_HEIGHT = 3, 4  # bwdif refuses less
_GAP = 1.5  # a frame that is shown so many times longer than the last has frames missing behind it


def bobbed(frames: Iterable[tuple[av.VideoFrame, Frame]]) -> Iterator[Frame]:
    """Two pictures for every frame that is flagged as interlaced, and the others as they are.

    Each decoded frame comes with the picture that was decoded, whose stamps are changed. Indices
    count what is given out. What the source raises comes after what it gave, the last field
    included.
    """
    for index, frame in enumerate(_bobbed(frames)):
        yield dataclasses.replace(frame, info=dataclasses.replace(frame.info, index=index))


def bobbed_info(info: StreamInfo) -> StreamInfo:
    """The stream whose every frame becomes two."""
    return dataclasses.replace(
        info,
        average_fps=info.average_fps * 2 if info.average_fps else None,
        num_frames_from_header=info.num_frames_from_header and 2 * info.num_frames_from_header,
    )


def _bobbed(frames: Iterable[tuple[av.VideoFrame, Frame]]) -> Iterator[Frame]:
    bobber = Bobber()
    try:
        for raw, frame in frames:
            yield from bobber.put(raw, frame)
    except SourceError:
        yield from bobber.end()
        raise
    yield from bobber.end()


class Bobber:
    """The filter and the frames in it.

    The first field (whichever the frame says) is shown when its frame was, the second half-way to
    the next frame; where frames are missing behind, half a usual frame later. The filter looks one
    frame ahead and one back, so from the first interlaced frame on a picture comes when the frame
    after it is put in; at most three frames are kept. A picture of another size or format ends the
    filter, and the next interlaced frame begins another.
    """

    def __init__(self) -> None:
        self._graph: Any = None
        self._shape: tuple[int, int, str] | None = None
        self._number = 0  # of the newest frame in the filter
        self._inside: deque[tuple[int, av.VideoFrame, Frame]] = deque()  # not yet given, by number
        self._num_with_first = 0  # the newest frame whose first field was given
        self._step_seconds: float | None = None  # from a frame to the next, as a rule

    def put(self, raw: av.VideoFrame, frame: Frame) -> Iterator[Frame]:
        """Take the next frame; gives what is ready."""
        shape = raw.width, raw.height, raw.format.name
        if self._graph is not None and shape != self._shape:
            yield from self.end(frame)
        if self._graph is None:
            if not frame.info.interlaced or raw.width < _LEAST_WIDTH or raw.height < _LEAST_HEIGHT:
                yield frame
                return
            self._graph, self._shape = _graph_for(raw), shape
        self._number += 1
        self._inside.append((self._number, raw, frame))
        raw.pts, raw.time_base = self._number, Fraction(1, 1)  # tells the filter's pictures apart
        self._graph.vpush(raw)
        yield from self._ready(None)

    def end(self, following: Frame | None = None) -> Iterator[Frame]:
        """Give what the filter still holds; ``following`` is the frame shown after it."""
        if self._graph is None:
            return
        self._graph.vpush(None)
        yield from self._ready(following)
        self._graph = self._step_seconds = None
        self._inside.clear()

    def _ready(self, following: Frame | None) -> Iterator[Frame]:
        """What the filter gives out, whose stamps are twice a frame's number, or one more."""
        import av

        while True:
            try:
                picture = self._graph.vpull()
            except (av.error.BlockingIOError, av.error.EOFError):
                return
            number = picture.pts // 2  # of a frame alone, both fields have an even stamp
            while self._inside[0][0] < number:
                self._inside.popleft()
            _, raw, frame = self._inside[0]
            if not frame.info.interlaced:
                yield frame
                continue
            behind = self._inside[1][2] if len(self._inside) > 1 else following
            is_second, self._num_with_first = number == self._num_with_first, number
            later = self._half_seconds(frame, behind) if is_second else None
            yield _field_of(frame, _planes_like(frame.planes, picture, raw), later)

    def _half_seconds(self, frame: Frame, behind: Frame | None) -> float:
        """From the first field of a frame to the second."""
        usual = self._step_seconds or frame.info.duration_seconds
        if behind is None:
            return usual / 2
        step = behind.info.pts_seconds - frame.info.pts_seconds
        if not behind.info.discontinuity and (usual <= 0 or step <= _GAP * usual):
            self._step_seconds = usual = step
        return min(usual, step) / 2


def _field_of(frame: Frame, planes: Planes, later_seconds: float | None) -> Frame:
    """A picture made of one field: the second comes so much later than the frame, the first not."""
    info, is_second = frame.info, later_seconds is not None
    info = dataclasses.replace(
        info,
        pts_seconds=info.pts_seconds + (later_seconds or 0.0),
        duration_seconds=info.duration_seconds / 2,
        pts=None if is_second else info.pts,
        keyframe=info.keyframe and not is_second,
        interlaced=False,
        discontinuity=info.discontinuity and not is_second,
    )
    return dataclasses.replace(frame, planes=planes, info=info)


def _planes_like(planes: Planes, picture: av.VideoFrame, raw: av.VideoFrame) -> Planes:
    """The filter's picture with the tags of the frame that it was made of."""
    found = planes_of(picture, rotation=planes.rotation)
    if is_mirrored(raw):
        found = unmirrored(found)
    if found.is_rgb:
        return found
    return dataclasses.replace(
        found, matrix=planes.matrix, full_range=planes.full_range, hdr=planes.hdr
    )


def _graph_for(raw: av.VideoFrame) -> Any:
    """A filter for frames like this one; those not flagged as interlaced pass it untouched."""
    from av.filter import Graph

    graph = Graph()
    graph.threads = 1
    source = graph.add_buffer(
        width=raw.width, height=raw.height, format=raw.format, time_base=Fraction(1, 1)
    )
    bwdif = graph.add("bwdif", "mode=send_field:parity=auto:deint=interlaced")
    graph.link_nodes(source, bwdif, graph.add("buffersink"))
    graph.configure()
    return graph
