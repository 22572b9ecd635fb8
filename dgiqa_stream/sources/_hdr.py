"""What a decoded frame tells of its light: the transfer function, the peak and the primaries."""

from __future__ import annotations

import functools
import struct
from typing import TYPE_CHECKING, Any, Literal

from dgiqa_stream.types import HdrTags

if TYPE_CHECKING:
    import av

_UNTAGGED = (0, 2)  # reserved and unspecified, in every table of ITU-T H.273
_TRANSFERS: dict[int, Literal["pq", "hlg"]] = {16: "pq", 18: "hlg"}  # AVColorTransferCharacteristic
_PRIMARIES: dict[int, Literal["bt709", "p3"]] = {1: "bt709", 12: "p3"}  # AVColorPrimaries
_DEFAULT_PEAK_CD_M2 = 1000.0
_LOWEST_PEAK_CD_M2 = 1.0  # a lower one is a field left empty or in another unit
_HIGHEST_PEAK_CD_M2 = 10_000.0


def hdr_tags_of(frame: av.VideoFrame, codec_context: Any) -> HdrTags | None:
    """How an HDR frame stands for light; None for SDR.

    ``codec_context`` has tags that frames may lack. Where primaries are not told they are those of
    BT.2020, and where no peak is told, it is 1,000 cd/m².
    """
    transfer = _TRANSFERS.get(int(_tagged(frame, codec_context, "color_trc")))
    if transfer is None:
        return None
    primaries = int(_tagged(frame, codec_context, "color_primaries"))
    return HdrTags(transfer, peak_of(frame), _PRIMARIES.get(primaries, "bt2020"))


def peak_of(frame: av.VideoFrame) -> float:
    """The brightest light in cd/m²: the lower of the mastering display's peak and MaxCLL.

    Both are static metadata (SMPTE ST 2086, CTA-861.3) and either may be missing, 0 or absurd.
    """
    told = [
        peak
        for peak in (_mastering_peak(frame), _max_content_light_level(frame))
        if peak is not None and _LOWEST_PEAK_CD_M2 <= peak <= _HIGHEST_PEAK_CD_M2
    ]
    return min(told, default=_DEFAULT_PEAK_CD_M2)


def _mastering_peak(frame: av.VideoFrame) -> float | None:
    data = side_data_of(frame, "MASTERING_DISPLAY_METADATA")  # AVMasteringDisplayMetadata
    if data is None:
        return None
    numerator, denominator, _, has_luminance = struct.unpack_from("=4i", data, 72)
    return numerator / denominator if has_luminance and denominator else None


def _max_content_light_level(frame: av.VideoFrame) -> float | None:
    data = side_data_of(frame, "CONTENT_LIGHT_LEVEL")  # AVContentLightMetadata
    return None if data is None else float(struct.unpack_from("=I", data)[0])


def side_data_of(frame: av.VideoFrame, kind: str) -> bytes | None:
    """A frame's side data by PyAV's name of its kind, where it has it."""
    from av.sidedata.sidedata import SideDataContainer

    _let_unknown_kinds_pass()
    # Not frame.side_data: the frame would hold what holds the frame, until the collector comes.
    container: Any = SideDataContainer
    found = container(frame).get(kind)
    return None if found is None else bytes(found)


@functools.cache
def _let_unknown_kinds_pass() -> None:
    """Have PyAV read a frame's side data though one kind of it is none that it has a name for.

    PyAV 18.1 refuses all of it then, as for a photo with EXIF, and its display matrix is lost.
    """
    from av.sidedata.sidedata import Type

    def unnamed(kinds: Any, value: object) -> Any:
        kind = object.__new__(kinds)
        kind._name_, kind._value_ = f"UNKNOWN_{value}", value
        return kind

    kinds: Any = Type
    kinds._missing_ = classmethod(unnamed)


def _tagged(frame: av.VideoFrame, codec_context: Any, name: str) -> Any:
    """The frame's tag, or the decoder's where it has none."""
    tag = getattr(frame, name)
    return getattr(codec_context, name) if int(tag) in _UNTAGGED else tag
