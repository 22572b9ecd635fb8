"""Multiply-accumulate operations of an ONNX graph, counted from shapes alone.

What counts is what is counted in papers: convolutions and matrix products, a bias or an activation
not. Q/DQ nodes and integer kinds do not change the number: an INT8 graph has the MACs of its float
graph.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import onnx
from onnx import shape_inference

from dgiqa_stream.errors import ModelError

Shape = tuple[int, ...]
_UNCOUNTED = frozenset({"Attention", "DeformConv", "Einsum", "GRU", "LSTM", "RNN"})


@dataclass(frozen=True, slots=True)
class LayerMacs:
    """One node's share."""

    node: str
    kind: str
    macs: int


def layer_macs(graph: onnx.ModelProto) -> list[LayerMacs]:
    """Each node that multiplies, for a batch of one, in the graph's order.

    Raises :class:`ModelError` where a shape stays unknown or a node's kind is not known.
    """
    nodes = graph.graph.node
    unknown = sorted({n.op_type for n in nodes} & _UNCOUNTED)
    if unknown:
        raise ModelError(f"MACs of {', '.join(unknown)} are not known: {', '.join(COUNTED)} are")
    shapes = shapes_for_one(graph)
    return [
        LayerMacs(node.name or node.output[0], node.op_type, _macs_of(node, shapes))
        for node in nodes
        if node.op_type in COUNTED
    ]


def total_macs(graph: onnx.ModelProto) -> int:
    """All of them, for a batch of one; raises as :func:`layer_macs`."""
    return sum(layer.macs for layer in layer_macs(graph))


def shapes_for_one(graph: onnx.ModelProto) -> dict[str, Shape]:
    """Shape of every tensor that inference knows, for a batch of one.

    Raises :class:`ModelError` for a graph whose shapes contradict each other.
    """
    one = onnx.ModelProto()
    one.CopyFrom(graph)
    del one.graph.value_info[:]  # they may name other batches
    for value in (*one.graph.input, *one.graph.output):
        dims = value.type.tensor_type.shape.dim
        if dims and not dims[0].HasField("dim_value"):
            dims[0].dim_value = 1
    try:
        inferred = shape_inference.infer_shapes(one, strict_mode=True, data_prop=True).graph
    except (shape_inference.InferenceError, ValueError) as exc:
        raise ModelError(f"the graph's shapes cannot be inferred: {_first_line(exc)}") from exc
    found = {t.name: tuple(t.dims) for t in inferred.initializer}
    for value in (*inferred.input, *inferred.output, *inferred.value_info):
        dims = value.type.tensor_type.shape.dim
        if all(d.HasField("dim_value") for d in dims):
            found[value.name] = tuple(d.dim_value for d in dims)
    return found


def _first_line(exc: Exception) -> str:
    return next(iter(str(exc).splitlines()), type(exc).__name__)


def _macs_of(node: onnx.NodeProto, shapes: Mapping[str, Shape]) -> int:
    count, weight = COUNTED[node.op_type]
    wanted = [node.input[0], node.input[weight], node.output[0]]
    lacking = [name for name in wanted if name not in shapes]
    if lacking:
        raise ModelError(
            f"the shape of {lacking[0]!r} at {node.op_type} {node.name!r} stays unknown: export "
            "with fixed sizes of all but the batch"
        )
    source, kernel, target = (shapes[name] for name in wanted)
    transposed = any(a.name == "transA" and a.i for a in node.attribute)
    return count(_swapped(source) if transposed else source, kernel, target)


def _swapped(shape: Shape) -> Shape:
    return (*shape[:-2], shape[-1], shape[-2])


def _of_conv(_source: Shape, kernel: Shape, target: Shape) -> int:
    """Kernel (O, I / groups, ...): every output element sums over one filter."""
    return math.prod(target) * math.prod(kernel[1:])


def _of_conv_transpose(source: Shape, kernel: Shape, _target: Shape) -> int:
    """Kernel (I, O / groups, ...): every input element is spread by one filter."""
    return math.prod(source) * math.prod(kernel[1:])


def _of_product(source: Shape, _kernel: Shape, target: Shape) -> int:
    """Every output element sums over the last axis of the first operand."""
    return math.prod(target) * source[-1]


COUNTED: Mapping[str, tuple[Callable[[Shape, Shape, Shape], int], int]] = MappingProxyType(
    {  # kind: (formula, index of the weight among its inputs)
        "Conv": (_of_conv, 1),
        "ConvInteger": (_of_conv, 1),
        "ConvTranspose": (_of_conv_transpose, 1),
        "Gemm": (_of_product, 1),
        "MatMul": (_of_product, 1),
        "MatMulInteger": (_of_product, 1),
        "QLinearConv": (_of_conv, 3),
        "QLinearMatMul": (_of_product, 3),
    }
)


def num_weights(graph: onnx.ModelProto) -> int:
    """Numbers stored for the nodes that multiply: weights and biases, shared ones once.

    A Q/DQ graph stores a bias anew for each scale it is read with, so there this is a little more
    than the model's parameters.
    """
    sizes = {t.name: math.prod(t.dims) for t in graph.graph.initializer}
    makers = {out: node for node in graph.graph.node for out in node.output}
    found: set[str] = set()
    for node in graph.graph.node:
        if node.op_type in COUNTED:
            found |= {_stored(name, makers) for name in _weights_of(node)}
    return sum(sizes.get(name, 0) for name in found)


def _weights_of(node: onnx.NodeProto) -> Sequence[str]:
    if node.op_type.startswith("QLinear"):
        return [node.input[3], *node.input[8:9]]
    return list(node.input[1:3])


def _stored(name: str, makers: Mapping[str, onnx.NodeProto]) -> str:
    """The constant behind a DequantizeLinear."""
    maker = makers.get(name)
    return maker.input[0] if maker is not None and maker.op_type == "DequantizeLinear" else name
