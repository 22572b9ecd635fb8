"""A network on its device: plain calls on a CPU, captured CUDA graphs on a GPU."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from dgiqa_stream.errors import ModelError

if TYPE_CHECKING:
    from numpy.typing import NDArray

_WARM_UP_CALLS = 3  # before a capture: cuDNN chooses, lazy things are made


def buckets_up_to(max_batch: int) -> tuple[int, ...]:
    """Batch sizes that are captured: powers of two, and the largest; a batch runs in the next."""
    sizes = [1]
    while sizes[-1] * 2 < max_batch:
        sizes.append(sizes[-1] * 2)
    return tuple(sizes) if max_batch == 1 else (*sizes, max_batch)


class Network(Protocol):
    """What an :class:`Engine` runs."""

    output_names: tuple[str, ...]

    def on(self, device: torch.device) -> Network:
        """Itself, moved to a device and ready to be called there."""

    def __call__(self, views: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Each view uint8 (N, H, W, 3) by name; each output float32 (N, 1) by name."""


class Engine:
    """Runs batches of views. For one thread at a time.

    On CUDA there is one graph for each bucket of :func:`buckets_up_to`, captured when opened, in
    memory that they share; all of it happens in :attr:`stream`.
    """

    def __init__(
        self,
        network: Network,
        shapes: Mapping[str, tuple[int, int, int]],
        device: torch.device,
        *,
        max_batch: int,
    ) -> None:
        """Move the network; on CUDA capture it."""
        self.device, self._shapes, self._names = device, dict(shapes), network.output_names
        self._network: Network | None = network.on(device)
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self._inputs: dict[str, Tensor] = {}
        self.stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self.stream = torch.cuda.Stream(device)
            self._capture(max_batch)

    def _capture(self, max_batch: int) -> None:
        """The largest first, so that the others fit into its memory."""
        self._inputs = {
            name: torch.zeros((max_batch, *shape), dtype=torch.uint8, device=self.device)
            for name, shape in self._shapes.items()
        }
        pool = torch.cuda.graph_pool_handle()
        precise = torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=False)
        with torch.cuda.device(self.device), torch.inference_mode(), precise:
            for size in reversed(buckets_up_to(max_batch)):
                self._capture_one(size, pool)

    def _capture_one(self, size: int, pool: Any) -> None:
        inputs = {name: view[:size] for name, view in self._inputs.items()}
        with torch.cuda.stream(self.stream):
            for _ in range(_WARM_UP_CALLS):
                self._called(inputs)
        torch.cuda.synchronize(self.device)
        graph = torch.cuda.CUDAGraph()
        # Other threads may use the device meanwhile: only this one's calls are part of the graph.
        with torch.cuda.graph(
            graph, pool=pool, stream=self.stream, capture_error_mode="thread_local"
        ):
            outputs = self._called(inputs)
        self._graphs[size] = graph, outputs

    def _called(self, views: Mapping[str, Tensor]) -> Tensor:
        """All outputs (num_outputs, N), float32, so that one copy brings them to the CPU."""
        if self._network is None:
            raise ModelError("the model is closed: open it again")
        found = self._network(views)
        return torch.stack([found[name].reshape(-1) for name in self._names])

    def run(self, views: Mapping[str, Tensor]) -> dict[str, NDArray[np.float32]]:
        """Views uint8 (N, height, width, 3) on the device; outputs (N,) by name, when done."""
        num_frames = len(next(iter(views.values())))
        bucket = min((n for n in self._graphs if n >= num_frames), default=0)
        with torch.inference_mode():
            if bucket:
                for name, view in views.items():
                    self._inputs[name][:num_frames].copy_(view, non_blocking=True)
                graph, outputs = self._graphs[bucket]
                graph.replay()
            else:
                outputs = self._called(views)
            found = outputs[:, :num_frames].cpu().numpy()
        return dict(zip(self._names, np.array(found, np.float32), strict=True))

    def close(self) -> None:
        """Drop graphs, their inputs and the weights."""
        self._graphs.clear()
        self._inputs.clear()
        self._network = None
