"""A batch that waits to be cut: planes of pictures, and the pieces that batches are made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from dgiqa_stream.preprocess import make_batch, stored_region
from plugins.torch_gpu.planes import TorchPlanes, tensors_of

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from dgiqa_stream.preprocess import ViewSpec
    from dgiqa_stream.types import Crop, FrameBatch, Planes


@dataclass(frozen=True, slots=True, eq=False)
class Piece:
    """What is scored of one frame: its views, or the planes that they are yet to be cut from."""

    views: Mapping[str, Tensor] | None = None
    planes: TorchPlanes | None = None
    crop: Crop | None = None


class Pictures:
    """A batch whose views are cut later, on the device, together with those of other callers.

    It is what :class:`~dgiqa_stream.types.FrameBatch` is; ``views`` are cut on the CPU for whoever
    asks for them.
    """

    def __init__(
        self, planes: Sequence[TorchPlanes], views: Sequence[ViewSpec], crop: Crop | None
    ) -> None:
        """Raises ``ValueError`` where the crop leaves less than 8 pixels of a side."""
        for picture in planes:
            stored_region(cast("Planes", picture), crop)
        self.planes, self.crop, self._specs = tuple(planes), crop, tuple(views)

    @cached_property
    def views(self) -> Mapping[str, NDArray[np.uint8]]:
        """Name to uint8 (N, height, width, 3)."""
        return make_batch([p.on_cpu() for p in self.planes], self._specs, crop=self.crop).views

    def moved(self, pictures: Sequence[Planes | TorchPlanes]) -> Pictures:
        """The same batch of the same pictures, of which some lie in memory now."""
        found = [p if isinstance(p, TorchPlanes) else tensors_of(p) for p in pictures]
        return Pictures(found, self._specs, self.crop)

    def __len__(self) -> int:
        """The number of frames."""
        return len(self.planes)


def pieces_of(batch: FrameBatch | Pictures) -> list[Piece]:
    """Of a batch of views, or of one that is yet to be cut."""
    if isinstance(batch, Pictures):
        return [Piece(planes=planes, crop=batch.crop) for planes in batch.planes]
    tensors = {name: torch.from_numpy(view) for name, view in batch.views.items()}
    return [Piece({k: v[n] for k, v in tensors.items()}) for n in range(len(batch))]
