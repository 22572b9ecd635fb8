"""A TensorRT engine as a network: built of one, and called as one.

All calls into TensorRT that serve are here; those that build are :mod:`quant.tensorrt.engine`'s.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dgiqa_stream.errors import ModelError
from plugins.torch_gpu.engine import Network

if TYPE_CHECKING:
    from pathlib import Path

    from torch.export import ExportedProgram

    from dgiqa_stream.preprocess import ViewSpec
    from plugins.torch_gpu.network import OnnxNetwork

_BEST_BATCH = 16  # whose kernels TensorRT times


class _Positional(nn.Module):
    """A network as ``torch.export`` and TensorRT want one: tensors in, a tuple of tensors out."""

    def __init__(self, network: OnnxNetwork, names: Sequence[str]) -> None:
        super().__init__()
        self.network, self.names = network, tuple(names)

    def forward(self, *views: Tensor) -> tuple[Tensor, ...]:
        # TensorRT has bytes at the edge of a network alone: they are numbers before all else.
        named = {name: view.float() for name, view in zip(self.names, views, strict=True)}
        found = self.network(named)
        return tuple(found[name] for name in self.network.output_names)


def program_of(
    network: OnnxNetwork, views: Sequence[ViewSpec], device: torch.device, *, max_batch: int
) -> ExportedProgram:
    """A network as a ``torch.export`` program on a device, its batch 1 to ``max_batch``.

    Takes the views in their order, uint8 (N, H, W, 3), and gives a tuple of all outputs, float32
    (N, 1), in the order of ``network.output_names``.
    """
    # weights in their first layout: builders read them in the order of memory
    module = _Positional(network, [view.name for view in views]).eval().to(device)
    # not 1 where more is allowed: a batch of one would be taken for a constant
    size = min(2, max_batch)
    example = tuple(torch.zeros((size, *v.shape), dtype=torch.uint8, device=device) for v in views)
    batch = torch.export.Dim("batch", min=1, max=max_batch) if max_batch > 1 else None
    with torch.no_grad():
        return torch.export.export(
            module, example, dynamic_shapes=(tuple({0: batch} for _ in views),)
        )


def build_from_network(
    network: OnnxNetwork, views: Sequence[ViewSpec], device: torch.device, *, max_batch: int
) -> bytes:
    """An engine of a network, by torch-tensorrt's dynamo path; in the network's own precision."""
    from quant.tensorrt.engine import build_from_program

    with on_device(device):
        return build_from_program(
            program_of(network, views, device, max_batch=max_batch),
            views,
            _settings(max_batch),
            output_names=network.output_names,
        ).plan


def build_from_file(
    path: Path, views: Sequence[ViewSpec], device: torch.device, *, max_batch: int
) -> bytes:
    """An engine of an ONNX file of explicit Q/DQ, by TensorRT's own parser."""
    import onnx

    from quant.tensorrt.engine import build_from_onnx
    from quant.tensorrt.layout import lay_out_

    graph = lay_out_(onnx.load(str(path)))
    with on_device(device):
        return build_from_onnx(graph.SerializeToString(), views, _settings(max_batch)).plan


def _settings(max_batch: int) -> Any:
    from quant.tensorrt.engine import EngineConfig

    return EngineConfig(best_batch=min(_BEST_BATCH, max_batch), max_batch=max_batch)


class TensorRtNetwork(Network):
    """An engine that is called like the network it was built of, in torch's current stream.

    There is one execution context for each batch size, because a captured graph holds on to its
    context; all share one piece of memory, because one stream runs them one after the other.
    """

    def __init__(
        self,
        plan: bytes,
        views: Sequence[ViewSpec],
        device: torch.device,
    ) -> None:
        """Raises :class:`ModelError` where TensorRT does not take the engine back."""
        from quant.tensorrt.engine import import_tensorrt

        trt = import_tensorrt()
        self._shapes, self._device = {view.name: view.shape for view in views}, device
        self._logger = trt.Logger(trt.Logger.ERROR)  # which lives as long as what it is given to
        self._runtime = runtime = trt.Runtime(self._logger)
        engine = runtime.deserialize_cuda_engine(plan)
        if engine is None:
            raise ModelError(f"TensorRT {trt.__version__} cannot read the engine back")
        names = [engine.get_tensor_name(n) for n in range(engine.num_io_tensors)]
        self.output_names = tuple(name for name in names if name not in self._shapes)
        if missing := set(self._shapes) - set(names):
            raise ModelError(
                f"the engine has {', '.join(names)} and lacks {', '.join(sorted(missing))}"
            )
        self._engine, self._contexts = engine, dict[int, Any]()
        self._strategy = trt.ExecutionContextAllocationStrategy.USER_MANAGED
        num_bytes = max(1, engine.device_memory_size_v2)
        self._memory = torch.empty(num_bytes, dtype=torch.uint8, device=device)

    def on(self, device: torch.device) -> TensorRtNetwork:
        """Itself: an engine stays on the device that it was opened on."""
        if device != self._device:
            raise ModelError(f"an engine of {self._device} cannot run on {device}")
        return self

    def __call__(self, views: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See :class:`~plugins.torch_gpu.engine.Network`; views lie on the engine's device."""
        num_frames = len(next(iter(views.values())))
        context = self._context_of(num_frames)
        inputs = {name: view.contiguous() for name, view in views.items()}
        outputs = {
            name: torch.empty((num_frames, 1), dtype=torch.float32, device=self._device)
            for name in self.output_names
        }
        for name, tensor in (inputs | outputs).items():
            context.set_tensor_address(name, tensor.data_ptr())
        if not context.execute_async_v3(_current_stream(self._device)):
            raise ModelError(f"TensorRT could not run a batch of {num_frames}")
        return outputs

    def _context_of(self, num_frames: int) -> Any:
        """That of a batch size; its shapes are set once, before any capture."""
        if num_frames not in self._contexts:
            engine = self._engine
            context = engine.create_execution_context(self._strategy)
            if context is None:
                raise ModelError("TensorRT has no memory for another batch size")
            context.set_device_memory(self._memory.data_ptr(), self._memory.numel())
            for name, shape in self._shapes.items():
                if not context.set_input_shape(name, (num_frames, *shape)):
                    raise ModelError(f"the engine takes no {num_frames} views {name!r} of {shape}")
            self._contexts[num_frames] = context
        return self._contexts[num_frames]


def _current_stream(device: torch.device) -> int:
    """The CUDA stream that torch would use now; 0 where the device has none."""
    if device.type != "cuda":
        return 0
    handle: int = torch.cuda.current_stream(device).cuda_stream
    return handle


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Within it TensorRT, which knows of a current device alone, uses this one."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
