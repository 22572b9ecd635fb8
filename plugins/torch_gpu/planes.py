"""Decoded planes as torch tensors, on whatever device they lie."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dgiqa_stream.types import ROTATIONS, ColorMatrix, HdrTags, Planes
from plugins.torch_gpu.devices import on_cpu

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class TorchPlanes:
    """What :class:`~dgiqa_stream.types.Planes` is, with tensors for arrays.

    ``tensors`` are those of ``Planes.samples``, or ``(luma, chroma)`` with chroma (h, w, 2), as
    NV12 and P010 come from a decoder. P010 has its ten bits at the top of each word, which is a
    ``bit_depth`` of 16.
    """

    tensors: tuple[Tensor, ...]
    matrix: ColorMatrix = ColorMatrix.BT709
    full_range: bool = False
    bit_depth: int = 8
    rotation: int = 0
    hdr: HdrTags | None = None

    def __post_init__(self) -> None:
        """Refuse tensors that do not form a picture."""
        shapes = [tuple(t.shape) for t in self.tensors]
        first, others = shapes[0], shapes[1:]
        is_rgb = not others and len(first) == 3 and first[2] == 3
        is_planar = len(others) in (0, 2) and all(len(s) == 2 for s in shapes)
        is_semi_planar = len(others) == 1 and len(first) == 2 and others[0][2:] == (2,)
        if not (is_rgb or is_planar or is_semi_planar) or 0 in first or len(set(others)) > 1:
            raise ValueError(f"tensors of shapes {shapes} are neither RGB, grey nor Y'CbCr")
        wanted = torch.uint8 if self.bit_depth == 8 else torch.uint16
        if any(t.dtype != wanted for t in self.tensors):
            kinds = [str(t.dtype) for t in self.tensors]
            raise ValueError(f"{self.bit_depth}-bit samples must be {wanted}, not {kinds}")
        if self.rotation not in ROTATIONS:
            raise ValueError(f"rotation {self.rotation} is not one of {ROTATIONS} degrees")

    @property
    def is_rgb(self) -> bool:
        """Whether the samples are packed RGB."""
        return self.tensors[0].ndim == 3

    @property
    def size(self) -> tuple[int, int]:
        """Height and width as stored, before rotation."""
        height, width = self.tensors[0].shape[:2]
        return height, width

    @property
    def device(self) -> torch.device:
        """Where the samples lie."""
        return self.tensors[0].device

    @property
    def layout(self) -> Hashable:
        """What pictures must share to be cut together."""
        shapes = tuple(tuple(t.shape) for t in self.tensors)
        return shapes, self.bit_depth, self.rotation, self.hdr, self.device

    def with_tensors(self, change: Callable[[Tensor], Tensor]) -> TorchPlanes:
        """The same picture of changed tensors."""
        return dataclasses.replace(self, tensors=tuple(change(t) for t in self.tensors))

    def to(self, device: torch.device) -> TorchPlanes:
        """On a device; the copy is not waited for where the samples are page-locked."""
        if device == self.device:
            return self
        return self.with_tensors(lambda t: t.to(device, non_blocking=True))

    @property
    def samples(self) -> Sequence[NDArray[np.uint8] | NDArray[np.uint16]]:
        """Those of :class:`~dgiqa_stream.types.Planes`; each is copied when it is asked for."""
        return _Samples(self.tensors)

    def on_cpu(self) -> Planes:
        """The same picture for what cannot read tensors."""
        return Planes(
            tuple(self.samples),
            matrix=self.matrix,
            full_range=self.full_range,
            bit_depth=self.bit_depth,
            rotation=self.rotation,
            hdr=self.hdr,
        )


class _Samples(Sequence[Any]):
    """Planes as arrays, one by one: who wants luma alone does not wait for chroma."""

    def __init__(self, tensors: tuple[Tensor, ...]) -> None:
        self._tensors = tensors
        if len(tensors) == 2:
            self._tensors = (tensors[0], tensors[1][..., 0], tensors[1][..., 1])

    def __len__(self) -> int:
        return len(self._tensors)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return tuple(on_cpu(t).numpy() for t in self._tensors[index])
        return on_cpu(self._tensors[index]).numpy()


def tensors_of(planes: Planes) -> TorchPlanes:
    """The same samples as tensors on the CPU, without a copy where torch can read them in place."""
    return TorchPlanes(
        tuple(torch.from_numpy(_readable(plane)) for plane in planes.samples),
        matrix=planes.matrix,
        full_range=planes.full_range,
        bit_depth=planes.bit_depth,
        rotation=planes.rotation,
        hdr=planes.hdr,
    )


def _readable(plane: NDArray[Any]) -> NDArray[Any]:
    """As it is, or a copy: torch knows no negative strides and warns of memory it may not write."""
    return plane if plane.flags.writeable and min(plane.strides) > 0 else plane.copy()
