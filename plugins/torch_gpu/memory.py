"""How much memory scoring takes, measured, and the batches that a budget leaves room for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dgiqa_stream.errors import ModelError
from dgiqa_stream.preprocess import ViewSpec
from plugins.torch_gpu.planes import TorchPlanes
from plugins.torch_gpu.views import cut_views

_SIZE_PX = (1080, 1920)  # larger pictures reach the limit sooner, and then batches are halved
_FEW = 4  # frames that are measured beside one
MEGABYTE = 10**6


def limit_memory(device: torch.device, num_bytes: int) -> None:
    """Have torch allocate no more than that on a CUDA device; what FFmpeg and the driver take
    comes on top.
    """
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, num_bytes / total), device)


def peak_bytes(device: torch.device, call: Callable[[], object]) -> int:
    """How much more memory a call takes, at most, than there was in use before.

    On CUDA it is what torch's allocator says; elsewhere, the tensors that operations give.
    """
    if device.type != "cuda":
        with _Tensors() as tensors:
            call()
        return tensors.peak_bytes
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def batch_within(
    num_bytes: int,
    network: Callable[[Mapping[str, Tensor]], object],
    views: Sequence[ViewSpec],
    device: torch.device,
    *,
    weight_bytes: int,
    most: int,
    name: str,
) -> int:
    """The largest batch of 1080p frames, up to ``most``, that a budget holds beside the weights.

    Measured: cutting and scoring one frame and a few. Raises :class:`ModelError` where one frame is
    too much.
    """
    with torch.inference_mode():
        one, few = (_measured(network, views, device, n) for n in (1, _FEW))
    frame_bytes = max(1, (few - one) // (_FEW - 1))
    fixed_bytes = weight_bytes + max(0, one - frame_bytes)
    batch = min(most, (num_bytes - fixed_bytes) // frame_bytes)
    if batch < 1:
        needed = -(-(fixed_bytes + frame_bytes) // MEGABYTE)
        raise ModelError(
            f"--max-gpu-mb {num_bytes // MEGABYTE} does not hold {name} with one frame at a time, "
            f"which takes {needed} MB: give that or more, or a smaller model"
        )
    return batch


def _measured(
    network: Callable[[Mapping[str, Tensor]], object],
    views: Sequence[ViewSpec],
    device: torch.device,
    num_frames: int,
) -> int:
    """What cutting and scoring take: both, because what a captured graph has stays its own, and
    cutting twice, because the next batch is cut while one is scored.
    """
    height, width = _SIZE_PX
    planes = (
        torch.zeros((height, width), dtype=torch.uint8, device=device),
        torch.zeros((height // 2, width // 2, 2), dtype=torch.uint8, device=device),
    )
    plane_bytes = sum(plane.nbytes for plane in planes)
    found: dict[str, Tensor] = {}

    def cut() -> None:
        found.update(cut_views([TorchPlanes(planes)] * num_frames, views))

    cut()  # what is made once, such as places of samples, is not counted
    cutting = peak_bytes(device, cut)
    network(found)
    scoring = peak_bytes(device, lambda: network(found))
    return 2 * (num_frames * plane_bytes + cutting) + scoring


class _Tensors(TorchDispatchMode):
    """Adds up the memory of the tensors that operations give, while they live."""

    def __init__(self) -> None:
        super().__init__()
        self.peak_bytes = 0
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        """Run the operation and note what it gave."""
        given = {t.untyped_storage()._cdata for t in tree_leaves(args) if isinstance(t, Tensor)}
        result = func(*args, **(kwargs or {}))
        self._live = {k: v for k, v in self._live.items() if not v[0].expired()}
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in given:  # a view, or its own argument
                    self._live[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.peak_bytes = max(self.peak_bytes, sum(size for _, size in self._live.values()))
        return result
