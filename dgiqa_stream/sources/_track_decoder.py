"""The decoder of one track: the container's, one that has to be asked for by name, or a spare."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

from dgiqa_stream.errors import SourceError, SourceUnavailable, SourceUnsupported

if TYPE_CHECKING:
    import av
    from av.video.codeccontext import VideoCodecContext
    from av.video.stream import VideoStream

    from dgiqa_stream.sources._hardware import HardwareDecoder

_MOST_KEPT = 250  # packets without a frame, after which a decoder is given up
_MOST_ERRORS = 16  # in a row, on a device, before software decodes
_MOST_SKIPPED = 250  # packets that wait for a keyframe; some streams never send one
_logger = logging.getLogger("dgiqa_stream.sources")


class NeedsReopening(Exception):
    """Software can go on where the source is opened again without a device."""

    def __init__(self, why: str, otherwise: SourceError) -> None:
        super().__init__(why)
        self.why = why
        """The device does not do it."""
        self.otherwise = otherwise
        """What to raise where the source cannot be opened again."""


class TrackDecoder:
    """Packets of a track to frames, on a device where that can be.

    Some devices are reached by decoders with names of their own, which FFmpeg does not choose
    (``av1`` rather than ``libdav1d``). A device is tried until it gives a frame; where it fails, or
    its frames cannot be read there, its packets go to software. A device that is lost while it
    decodes is followed by software, from the next keyframe on.
    """

    def __init__(
        self,
        track: VideoStream,
        hardware: HardwareDecoder | None,
        *,
        has_side_data: bool,
        threads: int,
        is_strict: bool,
        shown: str,
    ) -> None:
        """``has_side_data``: the container tells of pictures what a decoder of ours is not told."""
        self._track, self._hardware, self._threads = track, hardware, threads
        self._has_side_data, self._is_strict, self._shown = has_side_data, is_strict, shown
        self._context: VideoCodecContext = track.codec_context
        self._kept: list[av.Packet[VideoStream] | None] | None = None
        self._num_errors = self._num_to_skip = 0
        self.reason = ""
        """Why a device that was tried is not in use."""
        self.why_left = ""
        """Why the device no longer decodes, once it did and software has taken over."""
        self.name = ""
        """Of the decoder that was asked for by name and is in use."""
        self._left_for = ""
        self.num_lost = 0
        """Frames that were passed over until software had a keyframe to begin with."""
        self.is_on_device = hardware is not None and self._context.is_hwaccel
        self._context.thread_type = "AUTO"
        self._context.thread_count = threads
        if self.is_on_device:
            self._kept = []
        self._try_by_name()

    def decode(self, packet: av.Packet[VideoStream] | None) -> list[av.VideoFrame]:
        """Frames that are ready; an empty packet or None drains. Raises what PyAV raises."""
        import av

        if self._kept is not None:
            return self._tried(packet)
        if self.is_on_device and (why := self._why_leave()):
            self.to_software(why)
        if self._num_to_skip and packet is not None and packet.size:
            if not packet.is_keyframe:
                self._num_to_skip -= 1
                self.num_lost += 1
                return []
            self._num_to_skip = 0
        try:
            frames = self._context.decode(packet)
        except av.error.EOFError:
            raise
        except av.error.FFmpegError as exc:
            self._num_errors += 1
            if self.is_on_device and self._num_errors >= _MOST_ERRORS:
                self.to_software(f"{self._num_errors} errors in a row: {exc.strerror}")
            raise
        self._num_errors = 0 if frames else self._num_errors
        if why := self._why_unread(frames):
            self.to_software(why)
            if packet is not None and packet.is_keyframe:  # software begins with it
                return self.decode(packet)
            self.num_lost += len(frames)
            return []
        return frames

    def leave(self, why: str) -> None:
        """Decode the next packet without the device."""
        self._left_for = why

    def _why_leave(self) -> str:
        """Why the device is not to decode any more; empty where it may."""
        return self._left_for or (self._hardware.why_lost() if self._hardware else "")

    def _why_unread(self, frames: Sequence[av.VideoFrame]) -> str:
        """Why frames cannot be read where they lie; empty where they can."""
        for frame in frames:
            layout, hardware = frame.sw_format, self._hardware
            if layout is not None and hardware is not None and not hardware.has(frame):
                return f"frames of layout {layout.name} cannot be read there"
        return ""

    def flush(self) -> None:
        """Forget what was decoded so far: the container was moved."""
        if self._context is not self._track.codec_context and self._context.is_open:
            self._context.flush_buffers()

    def close(self) -> None:
        """Wait until FFmpeg's threads rest.

        One that has something to log waits for Python's lock, and who frees a decoder holds that
        while it waits for the threads: PyAV would stand still for ever.
        """
        for context in (self._context, self._track.codec_context):
            if context.is_open:
                context.flush_buffers()

    def to_software(self, why: str) -> None:
        """Decode without the device from the next keyframe on.

        Raises :class:`SourceUnsupported` where that is not wanted, and :class:`NeedsReopening`
        where the source has to be opened again for it.
        """
        told = f"{self._shown}: is no longer decoded on {self._device_name}: {why}"
        if self._is_strict:
            raise SourceUnsupported(f"{told}; leave --strict out to decode in software")
        if self._has_side_data and not self.name:
            otherwise = SourceUnavailable(f"{told}; open it again to decode in software")
            raise NeedsReopening(why, otherwise)
        _logger.warning("%s; software decodes it from the next keyframe on", told)
        self.reason = self.why_left = why
        self._context = self._track.codec_context if self.name else self._spare()
        self.name, self.is_on_device = "", False
        self._num_errors, self._num_to_skip = 0, _MOST_SKIPPED

    @property
    def _device_name(self) -> str:
        return self._hardware.name if self._hardware else "a device"

    def _spare(self) -> VideoCodecContext:
        """A decoder of the same codec that knows no device."""
        import av

        own = self._track.codec_context
        context: VideoCodecContext = av.CodecContext.create(own.codec, "r")  # type: ignore[assignment]
        context.extradata = own.extradata
        context.thread_type, context.thread_count = "AUTO", self._threads
        return context

    # A decoder by name ---------------------------------------------------------------------------

    def _try_by_name(self) -> None:
        import av

        try:
            context = self._hardware.named(self._context.name) if self._hardware else None
        except (av.error.FFmpegError, ValueError, RuntimeError) as exc:
            self.reason = f"its decoder there cannot be opened ({_words(exc)})"
            return
        if context is not None and self._has_side_data:
            self.reason = f"{context.name} is not told what the container says of its pictures"
        elif context is not None:
            context.extradata = self._context.extradata
            self._context, self.name, self._kept = context, context.name, []
            self.is_on_device = True

    def _tried(self, packet: av.Packet[VideoStream] | None) -> list[av.VideoFrame]:
        """What the decoder that is tried gives; where it is given up, what the container's does."""
        import av

        assert self._kept is not None
        self._kept.append(packet)
        is_last = packet is None or not packet.size
        try:
            frames = self._context.decode(packet)
        except av.error.FFmpegError as exc:
            self._num_errors += 1
            if not self.name and self._num_errors < _MOST_ERRORS:
                raise
            return self._given_up(_words(exc))
        if why := self._why_unread(frames):
            return self._given_up(why)
        if frames:
            self._kept, self._num_errors = None, 0
        elif is_last or len(self._kept) >= _MOST_KEPT:
            if self.name:
                return self._given_up("it gives no frame")
            self._kept = None
        return frames

    def _given_up(self, why: str) -> list[av.VideoFrame]:
        """What software makes of the packets so far, and of those to come."""
        import av

        assert self._kept is not None
        if self._has_side_data and not self.name:
            otherwise = SourceUnsupported(
                f"{self._shown}: {why}, and software would not be told what the container says of "
                "its pictures: leave --hardware out"
            )
            raise NeedsReopening(why, otherwise)
        self.reason = f"{self.name} does not decode it ({why})" if self.name else why
        kept, self._kept = self._kept, None
        self._context = self._track.codec_context if self.name else self._spare()
        self.name, self.is_on_device = "", False
        frames: list[av.VideoFrame] = []
        for one in kept:
            try:
                frames += self._context.decode(one)
            except av.error.EOFError:
                break
            except av.error.FFmpegError:  # damage at the start, which the next packet may mend
                continue
        return frames


def _words(exc: BaseException) -> str:
    return str(getattr(exc, "strerror", None) or exc)
