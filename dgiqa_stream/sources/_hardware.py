"""Decoding on a device: what a plugin brings for it, and when software decodes all the same."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Protocol

from dgiqa_stream.errors import SourceUnsupported

if TYPE_CHECKING:
    import av
    from av.codec.hwaccel import HWAccel
    from av.video.codeccontext import VideoCodecContext

    from dgiqa_stream.config import SourceSettings
    from dgiqa_stream.types import ColorMatrix, Planes

_logger = logging.getLogger("dgiqa_stream.sources")

DECODERS: Mapping[str, tuple[str, str]] = MappingProxyType(
    {  # kind of device: (module with open_decoder(), extra that installs it)
        "cuda": ("plugins.torch_gpu.decoding", "gpu"),
        "qsv": ("dgiqa_stream.sources._media_engines", ""),
        "amf": ("dgiqa_stream.sources._media_engines", ""),
    }
)


class HardwareDecoder(Protocol):
    """Decoding on one device, for any number of sources."""

    @property
    def name(self) -> str:
        """The device, such as ``cuda:0``."""

    def why_not(self) -> str:
        """Empty where the device can be used; else why it cannot."""

    def why_lost(self) -> str:
        """Empty until the device is lost while running; then why. Asked for each packet."""

    def hwaccel(self) -> HWAccel | None:
        """For one container; frames it cannot decode come from software."""

    def named(self, codec: str) -> VideoCodecContext | None:
        """A decoder that has to be asked for by name, for the one that FFmpeg chose; not yet open.

        Raises what PyAV raises where the device cannot be used.
        """

    def has(self, frame: av.VideoFrame) -> bool:
        """Whether a decoded frame lies on the device."""

    def planes_of(
        self,
        frame: av.VideoFrame,
        *,
        rotation: int,
        is_mirrored: bool,
        matrix: ColorMatrix,
        full_range: bool,
    ) -> Planes:
        """The samples of a frame that lies on the device, where they are.

        Raises :class:`~dgiqa_stream.errors.DeviceLost` where the device is.
        """


def hardware_of(settings: SourceSettings) -> tuple[HardwareDecoder | None, str]:
    """The device that is to decode, and why it is none where one was asked for."""
    if settings.hardware == "none":
        return None, ""
    if settings.deinterlace == "bob":
        return None, "deinterlacing needs frames in memory"
    module, extra = DECODERS[settings.hardware.partition(":")[0]]
    try:
        found = importlib.import_module(module)
    except ImportError as exc:
        needed = f"it needs {exc.name!r}" if exc.name else f"it cannot be loaded ({exc})"
        return None, f"{needed}: pip install 'dgiqa-stream[{extra}]'"
    decoder: HardwareDecoder = found.open_decoder(settings.hardware)
    reason = decoder.why_not()
    return (None, reason) if reason else (decoder, "")


def refuse_on_device(frame: av.VideoFrame) -> None:
    """Raise :class:`~dgiqa_stream.errors.SourceUnsupported` for what lies where none can read it.

    A device may decode into layouts that PyAV does not hand over, such as 4:4:4.
    """
    if frame.sw_format is not None:
        raise SourceUnsupported(
            f"frames of layout {frame.sw_format.name} on a device cannot be read there: leave "
            "--hardware out to decode in software"
        )


def decoder_of(
    settings: SourceSettings,
    hardware: HardwareDecoder | None,
    first: av.VideoFrame,
    *,
    why: str,
    shown: str,
    named: str = "",
) -> str:
    """What really decoded the first frame: ``StreamInfo.decoder``.

    ``named`` is the device's decoder that was asked for by name, where it gave the frame. Where
    software did and a device was asked for, tells ``why``; where the settings are strict, raises
    :class:`~dgiqa_stream.errors.SourceUnsupported`.
    """
    if settings.hardware == "none":
        return "software"
    if hardware is not None and (named or hardware.has(first)):
        return f"{hardware.name} ({named})" if named else hardware.name
    refuse_on_device(first)
    told = f"{shown}: is not decoded on {settings.hardware}: {why}"
    if settings.strict:
        raise SourceUnsupported(f"{told}; leave --strict out to decode in software")
    _logger.warning("%s; software decodes it", told)
    return f"software ({why})"
