"""An exported model as a torch module: the ONNX file stays the one artefact.

The operations are those that the project's exports hold, and no others: a graph with another is
refused by name. Convolutions run in the chosen precision; normalisation, pooled features and the
head stay in float32, where a score's last digits are made and nothing is saved.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
import torch.nn.functional as F
from onnx import numpy_helper
from torch import Tensor, nn

from dgiqa_stream.errors import ModelError

_INTEGERS = {"UINT8": (0, 255), "INT8": (-128, 127)}


@dataclass(frozen=True, slots=True)
class _Step:
    """One operation of the graph."""

    kind: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any]
    done_with: tuple[str, ...] = ()
    """What no later step reads."""


class OnnxNetwork(nn.Module):
    """A model's graph, executed step by step.

    ``dtype`` is that of convolutions: float32, float16 or bfloat16. Rounding to integers, in a
    model of INT8, is computed in floating point: the numbers are those of integer arithmetic.
    """

    def __init__(self, path: Path, *, dtype: torch.dtype = torch.float32) -> None:
        """Raises :class:`ModelError` where an operation is not known here."""
        super().__init__()
        graph = onnx.load(str(path)).graph
        self.dtype = dtype
        self.output_names = tuple(output.name for output in graph.output)
        self.input_shapes = {
            view.name: tuple(d.dim_value for d in view.type.tensor_type.shape.dim)[1:]
            for view in graph.input
        }
        self._constants = {
            tensor.name: torch.from_numpy(numpy_helper.to_array(tensor).copy())
            for tensor in graph.initializer
        }
        self._types = {tensor.name: tensor.data_type for tensor in graph.initializer}
        self._steps = self._planned([_step_of(node, path) for node in graph.node])

    def _planned(self, steps: list[_Step]) -> list[_Step]:
        """What depends on the input, in order; all else is computed now."""
        kept = []
        for step in steps:
            if step.kind == "Constant":
                self._constants[step.outputs[0]] = torch.from_numpy(step.attributes["value"].copy())
            elif all(name in self._constants for name in step.inputs if name):
                self._constants.update(zip(step.outputs, self._run(step, {}), strict=True))
            else:
                kept.append(step)
        self._place_constants(kept)
        last = {name: n for n, step in enumerate(kept) for name in step.inputs}
        return [
            _Step(
                step.kind, step.inputs, step.outputs, step.attributes,
                tuple(i for i in dict.fromkeys(step.inputs)
                      if last[i] == n and i not in {*self._constants, *self.output_names}),
            )
            for n, step in enumerate(kept)
        ]  # fmt: skip

    def _place_constants(self, kept: list[_Step]) -> None:
        """Those that are read, as buffers; the weights of convolutions in their precision."""
        used = Counter(name for step in kept for name in step.inputs)
        self._constants = {n: t for n, t in self._constants.items() if used[n]}
        for step in kept:
            for name in step.inputs[1:] if step.kind == "Conv" else ():
                if name in self._constants:
                    self._constants[name] = self._constants[name].to(self.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> OnnxNetwork:
        """What ``to(device)`` calls: ONNX names hold dots, which no buffer of a module may."""
        super()._apply(fn, recurse)
        self._constants = {  # axes and lengths stay where Python can read them
            name: tensor if tensor.dtype == torch.int64 else fn(tensor)
            for name, tensor in self._constants.items()
        }
        return self

    def on(self, device: torch.device) -> OnnxNetwork:
        """Itself, moved; on a GPU laid out as views are, which tensor cores read quickest."""
        moved: OnnxNetwork = self.eval().to(device)
        if device.type == "cuda":
            moved.weights_to_channels_last_()
        return moved

    def weights_to_channels_last_(self) -> None:
        """Lay out the weights of convolutions with their channels last."""
        for name, tensor in self._constants.items():
            if tensor.ndim == 4:
                self._constants[name] = tensor.contiguous(memory_format=torch.channels_last)

    @property
    def num_weights(self) -> int:
        """Of all constants that are read."""
        return sum(tensor.numel() for tensor in self._constants.values())

    def forward(self, views: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Each view uint8 (N, H, W, 3) by name; each output float32 (N, 1) by name."""
        values = dict(views)
        for step in self._steps:
            values.update(zip(step.outputs, self._run(step, values), strict=True))
            for name in step.done_with:
                values.pop(name, None)
        return {name: values[name].float() for name in self.output_names}

    def _run(self, step: _Step, values: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        inputs = [
            None if not name else self._constants[name] if name in self._constants else values[name]
            for name in step.inputs
        ]
        if step.kind == "QuantizeLinear":
            zero_point = step.inputs[2] if len(step.inputs) > 2 else ""
            kind = onnx.TensorProto.DataType.Name(self._types.get(zero_point, 2))
            return (_quantised(inputs, step.attributes, _INTEGERS[kind]),)
        if step.kind == "Conv":
            return (_conv(inputs, step.attributes, self.dtype),)
        found = _OPERATIONS[step.kind](inputs, step.attributes)
        return found if isinstance(found, tuple) else (found,)


def _step_of(node: onnx.NodeProto, path: Path) -> _Step:
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    if unknown := _unknown(node, attributes):
        raise ModelError(
            f"{path.name} has {unknown}, which the torch backend does not know: "
            "use --backend onnxruntime"
        )
    if node.op_type == "Split":
        attributes.setdefault("num_outputs", len(node.output))
    if node.op_type == "Constant":
        attributes = {"value": numpy_helper.to_array(attributes["value"])}
    return _Step(node.op_type, tuple(node.input), tuple(node.output), attributes)


def _unknown(node: onnx.NodeProto, attributes: Mapping[str, Any]) -> str:
    """What of a node is not computed here; empty where all is."""
    if node.op_type not in {*_OPERATIONS, "Conv", "QuantizeLinear", "Constant"} or node.domain:
        return f"an operation {node.op_type}"
    named = f"a {node.op_type} {node.name or node.output[0]!r}"
    if node.op_type == "Conv":
        padding = attributes.get("auto_pad", b"NOTSET").decode()
        if padding != "NOTSET":
            return f"{named} of auto_pad {padding}"
        num_sides = len(attributes.get("kernel_shape", (0, 0)))
        if num_sides != 2:
            return f"{named} over {num_sides} sides"
    if node.op_type == "Cast" and attributes["to"] != onnx.TensorProto.FLOAT:
        return f"{named} to {onnx.TensorProto.DataType.Name(attributes['to'])}"
    return ""


# Operations -------------------------------------------------------------------------------------

_Inputs = list[Any]
_Attributes = Mapping[str, Any]


def _conv(inputs: _Inputs, attributes: _Attributes, dtype: torch.dtype) -> Tensor:
    x, weight, *bias = inputs
    sides = weight.ndim - 2
    pads = list(attributes.get("pads", [0] * 2 * sides))
    if pads[:sides] != pads[sides:]:  # more at the end: torch has one number for both
        x, pads = F.pad(x, [p for n in reversed(range(sides)) for p in pads[n::sides]]), [0] * sides
    return F.conv2d(
        x.to(dtype),
        weight,
        bias[0] if bias else None,
        stride=tuple(attributes.get("strides", [1] * sides)),
        padding=tuple(pads[:sides]),
        dilation=tuple(attributes.get("dilations", [1] * sides)),
        groups=attributes.get("group", 1),
    )


def _quantised(inputs: _Inputs, attributes: _Attributes, bounds: tuple[int, int]) -> Tensor:
    """The integers as floating-point numbers: both precisions hold all of eight bits."""
    x, scale, *zero_point = inputs
    scale, zero = _along(x, scale, zero_point, attributes)
    return torch.clamp(torch.round(x.float() / scale) + zero, *bounds)


def _dequantised(inputs: _Inputs, attributes: _Attributes) -> Tensor:
    x, scale, *zero_point = inputs
    scale, zero = _along(x, scale, zero_point, attributes)
    return (x.float() - zero) * scale


def _along(
    x: Tensor, scale: Tensor, zero_point: _Inputs, attributes: _Attributes
) -> tuple[Tensor, Tensor]:
    """Scale and zero point, shaped for the axis that they belong to."""
    zero = zero_point[0].float() if zero_point else torch.zeros_like(scale)
    if scale.ndim == 0 or scale.numel() == 1:
        return scale.reshape(()), zero.reshape(())
    shape = [1] * x.ndim
    shape[attributes.get("axis", 1)] = -1
    return scale.reshape(shape), zero.reshape(shape)


def _gemm(inputs: _Inputs, attributes: _Attributes) -> Tensor:
    a, b, *c = inputs
    a = a.t() if attributes.get("transA") else a
    b = b if attributes.get("transB") else b.t()
    alpha, beta = attributes.get("alpha", 1.0), attributes.get("beta", 1.0)
    product = F.linear(a.float(), b) * alpha
    return product + c[0] * beta if c else product


def _reduce_mean(inputs: _Inputs, attributes: _Attributes) -> Tensor:
    x, *axes = inputs
    dims = axes[0].tolist() if axes else attributes.get("axes") or list(range(x.ndim))
    return _mean(x, dims, bool(attributes.get("keepdims", 1)))


def _mean(x: Tensor, dims: Any, keepdim: bool) -> Tensor:
    """In float32. An exported program casts first: torch-tensorrt does not read a mean's ``dtype``,
    and would take it in half precision.
    """
    if torch.compiler.is_compiling():
        return x.float().mean(dims, keepdim=keepdim)
    return x.mean(dims, keepdim=keepdim, dtype=torch.float32)


def _split(inputs: _Inputs, attributes: _Attributes) -> tuple[Tensor, ...]:
    x, *sizes = inputs
    axis = attributes.get("axis", 0)
    if sizes:
        return x.split(sizes[0].tolist(), axis)
    num_parts = attributes["num_outputs"]
    if x.shape[axis] % num_parts:
        raise ModelError(
            f"a Split of {x.shape[axis]} into {num_parts} unequal parts names no lengths, which "
            "the torch backend does not know: use --backend onnxruntime"
        )
    return x.split(x.shape[axis] // num_parts, axis)


def _reshape(inputs: _Inputs, attributes: _Attributes) -> Tensor:
    x, shape = inputs
    keeps_zero = bool(attributes.get("allowzero", 0))
    sizes = [x.shape[k] if n == 0 and not keeps_zero else n for k, n in enumerate(shape.tolist())]
    reshaped: Tensor = x.reshape(sizes)
    return reshaped


_OPERATIONS: Mapping[str, Callable[[_Inputs, _Attributes], Tensor | tuple[Tensor, ...]]] = {
    "Add": lambda i, a: i[0] + i[1],
    "Cast": lambda i, a: i[0].float(),  # only bytes to numbers occurs; convolutions round further
    "Clip": lambda i, a: i[0].clamp(*i[1:]),
    "Concat": lambda i, a: torch.cat(i, a["axis"]),
    "DequantizeLinear": _dequantised,
    "Div": lambda i, a: i[0] / i[1],
    "Flatten": lambda i, a: i[0].flatten(a.get("axis", 1)),
    "Gemm": _gemm,
    "GlobalAveragePool": lambda i, a: _mean(i[0], (2, 3), True),
    "Identity": lambda i, a: i[0],
    "Mul": lambda i, a: i[0] * i[1],
    "ReduceMean": _reduce_mean,
    "Relu": lambda i, a: F.relu(i[0]),
    "Reshape": _reshape,
    "Sigmoid": lambda i, a: torch.sigmoid(i[0]),
    "Split": _split,
    "Sub": lambda i, a: i[0] - i[1],
    "Transpose": lambda i, a: i[0].permute(a["perm"]),
}


def noise_views(
    shapes: Mapping[str, tuple[int, int, int]], num_frames: int, *, seed: int = 0
) -> Any:
    """Bytes of chance as views, for warming up and measuring: name to (N, height, width, 3)."""
    rng = np.random.default_rng(seed)
    return {
        name: torch.from_numpy(rng.integers(0, 256, (num_frames, *shape), dtype=np.uint8))
        for name, shape in shapes.items()
    }
