"""Frames that NVDEC decodes and that stay in GPU memory, as tensors without a copy.

FFmpeg decodes in the primary CUDA context, which is torch's, too: one context for all streams.
"""

from __future__ import annotations

import re
import weakref
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from dgiqa_stream.types import ColorMatrix, Planes
from plugins.torch_gpu.devices import numbers_in_use, twice, why_lost
from plugins.torch_gpu.planes import TorchPlanes

if TYPE_CHECKING:
    import av
    from av.codec.hwaccel import HWAccel
    from av.video.codeccontext import VideoCodecContext

_DEEP = ("p010le", "p016le")  # the value at the top of each word: a bit depth of 16
_LAYOUTS = ("nv12", *_DEEP)  # that PyAV hands over by DLPack; it refuses every other
NATIVE = {"libdav1d": "av1"}
"""FFmpeg's decoder by what it chooses: its own, which decodes on a device alone."""
_PROBED_CODEC = "h264"  # which every NVDEC decodes


_decoders: weakref.WeakSet[CudaDecoder] = weakref.WeakSet()  # those in use


def open_decoder(device: str) -> CudaDecoder:
    """The decoder of ``cuda:N``; of ``cuda``, that of the device that has the fewest.

    Only devices that score are asked, because frames are scored where they were decoded.
    """
    wanted = re.fullmatch(r"cuda(?::(\d+))?", device)[1]  # type: ignore[index]
    number = emptiest(numbers_in_use()) if wanted is None else int(wanted)
    decoder = CudaDecoder(number)
    _decoders.add(decoder)
    return decoder


def emptiest(numbers: Sequence[int]) -> int:
    """The device with the fewest decoders; the first of several."""
    opened = Counter(decoder.number for decoder in list(_decoders))
    return min(numbers, key=lambda number: (opened[number], numbers.index(number)))


@dataclass(frozen=True, slots=True, weakref_slot=True, eq=False)
class CudaDecoder:
    """See :class:`dgiqa_stream.sources._hardware.HardwareDecoder`."""

    number: int
    """Of the CUDA device."""

    @property
    def name(self) -> str:
        """``cuda:N``."""
        return f"cuda:{self.number}"

    def why_not(self) -> str:
        """Empty where FFmpeg and torch can both use the device; asked once per process."""
        return self.why_lost() or _why_not(self.number)

    def why_lost(self) -> str:
        """See :func:`plugins.torch_gpu.devices.why_lost`: the backend finds it out, or a frame."""
        return why_lost(self.number)

    def hwaccel(self) -> HWAccel:
        """Frames that the device cannot decode come from software, stream by stream."""
        from av.codec.hwaccel import HWAccel

        return HWAccel(
            "cuda", device=str(self.number), allow_software_fallback=True, is_hw_owned=True
        )

    def named(self, codec: str) -> VideoCodecContext | None:
        """AV1: FFmpeg chooses libdav1d, which is software; its own ``av1`` is NVDEC's."""
        import av

        if codec not in NATIVE:
            return None
        found: Any = av.CodecContext.create(av.Codec(NATIVE[codec], "r"), hwaccel=self.hwaccel())
        context: VideoCodecContext = found
        return context

    def has(self, frame: av.VideoFrame) -> bool:
        """Whether NVDEC decoded it, into a layout that can be read where it lies."""
        layout = frame.sw_format
        return frame.format.name == "cuda" and layout is not None and layout.name in _LAYOUTS

    def planes_of(
        self,
        frame: av.VideoFrame,
        *,
        rotation: int,
        is_mirrored: bool,
        matrix: ColorMatrix,
        full_range: bool,
    ) -> Planes:
        """Its samples where they are; the tensors keep the decoder's surface until they go."""
        planes = twice(
            torch.device("cuda", self.number),
            lambda: planes_of_frame(
                frame,
                rotation=rotation,
                is_mirrored=is_mirrored,
                matrix=matrix,
                full_range=full_range,
            ),
        )
        return cast(Planes, planes)


def planes_of_frame(frame: av.VideoFrame, *, is_mirrored: bool, **tags: Any) -> TorchPlanes:
    """NV12 and P010 as DLPack hands them over, on whatever device they lie.

    Of a picture with odd sides the last line or column is left out, because its chroma is.
    """
    layout = (frame.sw_format or frame.format).name
    luma, chroma = (_tensor(plane) for plane in (frame.planes[0], frame.planes[1]))
    luma = luma[: 2 * chroma.shape[0], : 2 * chroma.shape[1]]
    if is_mirrored:
        luma, chroma = (_bottom_up(plane) for plane in (luma, chroma))
    return TorchPlanes((luma, chroma), bit_depth=16 if layout in _DEEP else 8, **tags)


def _bottom_up(plane: Tensor) -> Tensor:
    """The rows turned; devices may lack that for uint16."""
    if plane.dtype != torch.uint16:
        return plane.flip(0)
    return plane.view(torch.int16).flip(0).view(torch.uint16)


def _tensor(plane: Any) -> Tensor:
    """One plane: uint8 or uint16 (H, W) or (h, w, 2)."""
    return torch.utils.dlpack.from_dlpack(plane.__dlpack__())


@lru_cache(maxsize=16)
def _why_not(number: int) -> str:
    import av
    from av.codec.hwaccel import HWAccel, hwdevices_available

    from plugins.torch_gpu.devices import why_no_cuda

    if "cuda" not in hwdevices_available():
        return "this FFmpeg is built without CUDA"
    try:
        accelerator = HWAccel("cuda", device=str(number), is_hw_owned=True)
        accelerator.create(av.Codec(_PROBED_CODEC, "r"))
    except (av.error.FFmpegError, NotImplementedError, RuntimeError) as exc:
        reason = getattr(exc, "strerror", None) or str(exc)
        return f"FFmpeg cannot use CUDA device {number} ({reason}): is there a driver?"
    return why_no_cuda()
