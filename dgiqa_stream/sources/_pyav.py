"""Files, pictures, standard input and network streams, decoded by FFmpeg through PyAV."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack
from fractions import Fraction
from operator import itemgetter
from typing import TYPE_CHECKING, Any

from dgiqa_stream.errors import DeviceLost, SourceError, SourceUnavailable, SourceUnsupported
from dgiqa_stream.heap import give_back
from dgiqa_stream.sources import is_still
from dgiqa_stream.sources._bob import bobbed, bobbed_info
from dgiqa_stream.sources._container import (
    choose_track,
    has_side_data,
    is_ipt,
    open_container,
)
from dgiqa_stream.sources._describe import describe, may_be_picture_sequence, num_threads_for
from dgiqa_stream.sources._faults import ErrorFlood, source_error
from dgiqa_stream.sources._frames import (
    clock_seconds_of,
    dts_seconds_of,
    pts_seconds_of,
    to_frame,
    upright_size,
)
from dgiqa_stream.sources._hardware import decoder_of, hardware_of
from dgiqa_stream.sources._jpeg import is_cut_short
from dgiqa_stream.sources._pacing import Pacer, Patience
from dgiqa_stream.sources._timeline import MPEG_WRAP_SECONDS, Timeline
from dgiqa_stream.sources._track_decoder import NeedsReopening, TrackDecoder
from dgiqa_stream.types import Frame, StreamInfo
from dgiqa_stream.urls import redact, scheme_of

if TYPE_CHECKING:
    import av
    from av.video.stream import VideoStream

    from dgiqa_stream.config import SourceSettings

_MAX_ERRORS_IN_A_ROW = 250
_MPEG_CLOCK = Fraction(1, 90_000)
_logger = logging.getLogger("dgiqa_stream.sources")


def open_url(url: str, settings: SourceSettings, *, stream: str) -> PyavSource:
    """See :func:`dgiqa_stream.sources.open_source`."""
    return PyavSource(url, settings, stream=stream)


class PyavSource:
    """A container opened by FFmpeg; the first frame is decoded while opening.

    ``pipe`` is read in place of the URL, by a source that brings the bytes itself.
    """

    def __init__(
        self,
        url: str,
        settings: SourceSettings,
        *,
        stream: str,
        pipe: Any = None,
        patience: Patience | None = None,
    ) -> None:
        self.num_corrupt = 0
        self._num_errors = 0
        self._url, self._settings, self._stream, self._pipe = url, settings, stream, pipe
        self._shown = redact(url)
        self._patience = patience or Patience(
            settings.open_timeout_seconds, settings.read_timeout_seconds
        )
        self._flood = ErrorFlood(_logger, f"decode {self._shown}")
        self._lock = threading.Lock()  # held while FFmpeg works on the container
        self._stop = threading.Event()
        self._errors_in_a_row = 0
        self._last_pts: int | None = None
        self._has_begun = False
        self._frames: Iterator[Frame] = iter(())
        self._hardware, self._why_software = hardware_of(settings)
        self._open()
        with ExitStack() as on_error:
            on_error.callback(self.close)
            try:
                self._prime()
            except NeedsReopening as exc:
                self._open_without_device(exc)
                self._prime()
            self._info = self._describe(self._pending[0])
            self._begin_seconds = clock_seconds_of(self._pending[0]) or 0.0
            on_error.pop_all()
        self._patience.opened()
        self._has_begun = True
        self._frames = self._chosen()

    def frames(self) -> Iterator[Frame]:
        """See :class:`dgiqa_stream.sources.Source`."""
        pacer = Pacer(self._stop) if self._settings.realtime else None
        while True:
            try:
                with self._lock:
                    frame = None if self._stop.is_set() else next(self._frames, None)
            finally:
                if self._stop.is_set():
                    self._release()
            if frame is None:
                self._flood.flush()
                return
            yield pacer.wait_for(frame) if pacer else frame
            del frame  # its memory is free while the next one is decoded

    def close(self) -> None:
        """See :class:`dgiqa_stream.sources.Source`."""
        self._stop.set()
        if hasattr(self._pipe, "stop"):
            self._pipe.stop()
        self._release()

    @property
    def num_decode_errors(self) -> int:
        """See :class:`dgiqa_stream.sources.Source`; with frames lost on the way to software."""
        return self._num_errors + self._decoder.num_lost

    @property
    def info(self) -> StreamInfo:
        """See :class:`~dgiqa_stream.sources.Source`; the decoder is the one that is at work now."""
        why = self._decoder.why_left
        return dataclasses.replace(self._info, decoder=f"software ({why})") if why else self._info

    def _release(self) -> None:
        """Close the container, unless another thread works on it: that thread then does."""
        if self._lock.acquire(blocking=False):
            try:
                self._frames = iter(())  # the generator holds us, and we the decoder's memory
                self._pending.clear()
                self._close_container()
                if self._pipe is not None:
                    self._pipe.close()
            finally:
                self._lock.release()

    def _open(self) -> None:
        import av

        try:
            self._container = open_container(
                self._url,
                self._settings,
                self._patience,
                pipe=self._pipe,
                hwaccel=self._hardware.hwaccel() if self._hardware else None,
            )
        except (av.error.FFmpegError, OSError, ValueError, RuntimeError) as exc:
            raise self._explain(exc) from exc
        give_back()
        if self._pipe is None and self._container.file is not None:
            self._pipe = self._container.file.file  # PyAV wraps what it was given
        try:
            self._track = choose_track(self._container, self._settings, shown=self._shown)
        except SourceError:
            self._container.close()
            raise
        hardware, settings = self._hardware, self._settings
        self._decoder = TrackDecoder(
            self._track,
            hardware,
            has_side_data=hardware is not None and has_side_data(self._container, self._track),
            threads=settings.decoder_threads
            or num_threads_for(
                self._container, self._track, url=self._url, realtime=settings.realtime
            ),
            is_strict=settings.strict,
            shown=self._shown,
        )
        self._pending: deque[av.VideoFrame] = deque()
        self._is_drained = False
        self._damaged = False

    def _close_container(self) -> None:
        self._decoder.close()
        self._container.close()

    def _open_without_device(self, reason: NeedsReopening) -> None:
        """Open the source again, for software; raises what is given where its bytes come once."""
        if self._pipe is not None:
            raise reason.otherwise
        self._num_errors += self._decoder.num_lost
        self._close_container()
        self._hardware, self._why_software = None, reason.why
        self._open()

    def _decoded_anew(self, reason: NeedsReopening) -> Iterator[av.VideoFrame]:
        """What follows the last frame, of the file opened again for software.

        Raises what ``reason`` says where it cannot be read again from there.
        """
        last = self._last_pts
        if last is None or scheme_of(self._url) != "file":
            raise reason.otherwise
        self._open_without_device(reason)
        self._decoder.why_left = reason.why
        self._container.seek(last, stream=self._track)
        for frame in self._decoded():
            if frame.pts is not None and frame.pts > last:
                yield frame

    def _prime(self) -> None:
        """Decode up to the first frame, which tells size, format and rotation.

        Up to the second where that tells a picture from a sequence of them.
        """
        may_be_sequence = may_be_picture_sequence(self._container, self._url)
        first = list(itertools.islice(self._decoded(), 2 if may_be_sequence else 1))
        self._pending.extendleft(reversed(first))
        self._is_sequence = len(first) == 2 and upright_size(first[0]) == upright_size(first[1])
        if not first:
            raise SourceUnsupported(
                f"{self._shown}: no frame could be decoded of its {self._codec} video; check it "
                "with `ffprobe`"
            )

    def _describe(self, first: av.VideoFrame) -> StreamInfo:
        """The stream as it is given out; notes its own frame rate and what is done with it."""
        info = describe(
            self._container,
            self._track,
            first=first,
            url=self._url,
            realtime=self._settings.realtime,
            is_sequence=self._is_sequence,
        )
        self._average_fps = info.average_fps
        self._is_ipt = is_ipt(self._container, self._track, shown=self._shown)
        reason = self._why_software or self._decoder.reason
        why = reason or f"it cannot decode {info.codec} of {info.pix_fmt}"
        decoder = decoder_of(
            self._settings,
            self._hardware,
            first,
            why=why,
            shown=self._shown,
            named=self._decoder.name,
        )
        info = dataclasses.replace(info, decoder=decoder)
        self._bobs = self._settings.deinterlace == "bob" and not is_still(info)
        return bobbed_info(info) if self._bobs and first.interlaced_frame else info

    @property
    def _codec(self) -> str:
        return self._track.codec_context.name

    # From packets to frames -----------------------------------------------------------------

    def _packets(self) -> Iterator[av.Packet[VideoStream] | None]:
        """Packets of the track and, at the end, None (or PyAV's empty packet) to drain."""
        import av

        while not self._stop.is_set():
            try:
                for packet in self._container.demux(self._track):
                    yield packet
                    if self._stop.is_set():
                        return
                return
            except av.error.InvalidDataError as exc:  # damage: what follows may be readable
                self._count_error(exc)
                if self._errors_in_a_row >= _MAX_ERRORS_IN_A_ROW:
                    yield None
                    return
            except IndexError:  # PyAV 18.1, at the end, where a track has appeared on the way
                yield None
                return
            except (av.error.FFmpegError, OSError) as exc:
                fault = self._explain(exc)
                yield None  # what the decoder still holds comes before the fault
                raise fault from exc

    def _decoded(self) -> Iterator[av.VideoFrame]:
        """Pending frames, then those decoded from here on."""
        import av

        yield from self._waiting()
        if self._is_drained:
            return
        for packet in self._packets():
            self._inspect(packet)
            try:
                frames = self._decoder.decode(packet)
            except NeedsReopening as exc:
                if not self._has_begun:
                    raise
                yield from self._decoded_anew(exc)
                return
            except av.error.EOFError:
                frames = []
            except av.error.FFmpegError as exc:
                frames = []
                self._count_error(exc)
                self._stop_where_hopeless(exc)
            self._is_drained = packet is None or packet.size == 0
            if frames:
                self._errors_in_a_row = 0
                self._pending.extend(frames)
            del frames
            yield from self._waiting()
            if self._patience.is_over:
                raise SourceUnavailable(
                    f"{self._shown}: no picture could be decoded within "
                    f"{self._patience.open_seconds:g} s; check the sender, or raise "
                    "source.open_timeout_seconds"
                )

    def _waiting(self) -> Iterator[av.VideoFrame]:
        """Frames that are decoded, none of them kept here."""
        while self._pending:
            pts = self._pending[0].pts
            self._last_pts = self._last_pts if pts is None else pts
            yield self._pending.popleft()

    def _inspect(self, packet: av.Packet[VideoStream] | None) -> None:
        """Note damage on the way here; refuse what is encrypted."""
        if packet is None:
            return
        self._damaged = self._damaged or packet.is_corrupt or self._is_cut_picture(packet)
        if packet.has_sidedata("encryption_info"):
            raise SourceUnsupported(
                f"{self._shown}: is encrypted; give its key by --stream-option decryption_key=HEX"
            )

    def _is_cut_picture(self, packet: av.Packet[VideoStream]) -> bool:
        """A JPEG alone; what cameras send in containers may lack the end marker and be whole."""
        kind = self._container.format.name
        is_jpeg = self._codec == "mjpeg" and (kind == "image2" or kind.endswith("_pipe"))
        return is_jpeg and packet.size > 0 and is_cut_short(bytes(packet))

    def _count_error(self, exc: BaseException) -> None:
        self._num_errors += 1
        self._errors_in_a_row += 1
        self._flood.add(getattr(exc, "strerror", None) or exc)

    def _stop_where_hopeless(self, exc: BaseException) -> None:
        if self._errors_in_a_row >= _MAX_ERRORS_IN_A_ROW:
            raise SourceUnsupported(
                f"{self._shown}: {self._errors_in_a_row} decode errors in a row without a frame "
                f"of its {self._codec} video; check the sender"
            ) from exc

    def _explain(self, exc: BaseException) -> SourceError:
        if self._patience.is_over:  # some demuxers report an interrupted read as bad data
            exc = TimeoutError()
        return source_error(exc, self._url, waited_seconds=self._patience.limit_seconds)

    # From FFmpeg's frames to ours -----------------------------------------------------------

    def _chosen(self) -> Iterator[Frame]:
        """Frames within the time that the settings ask for."""
        settings = self._settings
        if is_still(self.info):
            picture = self._frame(self._pending.popleft(), 0, 0.0, False)
            self.num_corrupt += picture.info.corrupt
            yield dataclasses.replace(
                picture, info=dataclasses.replace(picture.info, duration_seconds=0.0)
            )
            return
        begin = self._begin_seconds + settings.start_seconds
        if settings.start_seconds:
            self._seek(begin)
        tolerance = min(0.001, float(self._track.time_base or 0) / 2)
        placed = self._placed(begin - tolerance)
        end: float | None = None
        for frame in bobbed(placed) if self._bobs else map(itemgetter(1), placed):
            if settings.duration_seconds and end is None:
                end = frame.info.pts_seconds + settings.duration_seconds - tolerance
            if end is not None and frame.info.pts_seconds >= end:
                return
            self.num_corrupt += frame.info.corrupt
            yield frame
            del frame

    def _placed(self, begin_seconds: float) -> Iterator[tuple[av.VideoFrame, Frame]]:
        """Decoded frames from a time on, each with ours."""
        fps = self._average_fps
        timeline = Timeline(
            frame_seconds=float(1 / fps) if fps else None,
            wrap_seconds=MPEG_WRAP_SECONDS if self._track.time_base == _MPEG_CLOCK else None,
        )
        has_made_up_pts = self.info.container == "avi"  # which stores none
        index = 0
        for raw in self._decoded():
            pts_seconds, jumped = timeline.place(
                None if has_made_up_pts else pts_seconds_of(raw), dts_seconds=dts_seconds_of(raw)
            )
            if pts_seconds < begin_seconds:
                continue
            try:
                frame = self._frame(raw, index, pts_seconds, jumped)
            except DeviceLost as exc:  # its frames cannot be read: packets go on in software
                self._count_error(exc)
                self._decoder.leave(str(exc))
                continue
            yield raw, frame
            del raw, frame
            index += 1

    def _seek(self, target_seconds: float) -> None:
        """Move to the last key frame before the target, where the source can; else stay."""
        import av

        base = self._track.time_base
        if self._pipe is not None or scheme_of(self._url) != "file" or not base:
            return
        try:
            self._container.seek(int(target_seconds / base), stream=self._track)
            self._decoder.flush()
            self._pending.clear()
            self._is_drained = False
            first = next(self._decoded(), None)
        except av.error.FFmpegError:
            first = None
        arrived = None if first is None else clock_seconds_of(first)
        if first is not None and arrived is not None and arrived <= target_seconds:
            self._pending.appendleft(first)
        else:  # some formats land too late: read from the start instead
            self._close_container()
            self._open()

    def _frame(self, raw: av.VideoFrame, index: int, pts_seconds: float, jumped: bool) -> Frame:
        corrupt = raw.is_corrupt or self._damaged
        self._damaged = False
        return to_frame(
            raw,
            stream=self._stream,
            index=index,
            pts_seconds=pts_seconds,
            average_fps=self._average_fps,
            jumped=jumped,
            corrupt=corrupt,
            codec_context=self._track.codec_context,
            is_ipt=self._is_ipt,
            hardware=self._hardware,
        )
