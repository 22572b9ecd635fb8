"""Decoding by Intel's Quick Sync Video (``qsv``) and AMD's Advanced Media Framework (``amf``).

Their decoders have names of their own, and their frames are brought to memory: the rest is as for
software.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import av
    from av.codec.hwaccel import HWAccel
    from av.video.codeccontext import VideoCodecContext

    from dgiqa_stream.types import Planes

_PROBED_CODEC = "h264"  # which every one of them decodes
_CODECS = {"libdav1d": "av1", "mpeg2video": "mpeg2", "libvpx-vp9": "vp9"}  # where names differ


def open_decoder(device: str) -> MediaEngine:
    """The decoder of ``qsv`` or ``amf``."""
    return MediaEngine(device)


@dataclass(frozen=True, slots=True)
class MediaEngine:
    """See :class:`dgiqa_stream.sources._hardware.HardwareDecoder`."""

    name: str

    def why_not(self) -> str:
        """Empty where FFmpeg can use it; asked once per process."""
        return _why_not(self.name)

    def why_lost(self) -> str:
        """Always empty: it is known by the errors of the decoder."""
        return ""

    def hwaccel(self) -> HWAccel | None:
        """None: the decoders that FFmpeg chooses know nothing of it."""
        return None

    def named(self, codec: str) -> VideoCodecContext | None:
        """``h264_qsv`` for ``h264`` and the like, where this FFmpeg has it."""
        import av
        from av.codec.hwaccel import HWAccel

        name = f"{_CODECS.get(codec, codec)}_{self.name}"
        if name not in av.codecs_available:
            return None
        found: Any = av.CodecContext.create(
            av.Codec(name, "r"), hwaccel=HWAccel(self.name, allow_software_fallback=False)
        )
        context: VideoCodecContext = found
        return context

    def has(self, frame: av.VideoFrame) -> bool:
        """Never: frames are in memory once they are decoded."""
        return False

    def planes_of(self, frame: av.VideoFrame, **tags: Any) -> Planes:
        """Nothing that :meth:`has` denies is asked for."""
        raise ValueError(f"a frame of layout {frame.format.name} lies in memory")


@lru_cache(maxsize=2)
def _why_not(kind: str) -> str:
    import av
    from av.codec.hwaccel import HWAccel, hwdevices_available

    decoder = f"{_PROBED_CODEC}_{kind}"
    if kind not in hwdevices_available() or decoder not in av.codecs_available:
        return f"this FFmpeg is built without {kind}"
    try:
        HWAccel(kind).create(av.Codec(decoder, "r"))
    except (av.error.FFmpegError, NotImplementedError, RuntimeError) as exc:
        told = getattr(exc, "strerror", None) or exc
        return f"FFmpeg cannot use {kind} ({told}): is its driver there?"
    return ""
