"""Whether TensorRT would take a graph, and fuse its Q/DQ: every broken rule by the node's name.

What TensorRT 10 and 11 share: types are those of the graph, INT8 is said by QuantizeLinear and
DequantizeLinear, both symmetric. Their developer guide ("Q/DQ layer-placement recommendations")
says where these are fused: inputs of convolutions are quantised and outputs are not, so that a
kernel takes its activation, and the addition that ends a block, into itself; the other operand of
that addition is quantised.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import onnx
from onnx import NodeProto, TensorProto

from quant.tensorrt.graph_view import (
    CONVOLUTIONS,
    DEQUANTIZE,
    QUANTIZE,
    GraphView,
    attribute,
    label,
)
from quant.tensorrt.operators import IMPORTED

_ACTIVATIONS = ("Relu", "Clip", "LeakyRelu", "Sigmoid", "HardSwish", "HardSigmoid", "Tanh")
_SMALLEST_OPSET = 13  # the first whose Q/DQ has an axis
_FUSED = "only an addition whose other operand alone is rounded joins its convolution"


@dataclass(frozen=True, slots=True)
class Violation:
    """One rule that one node breaks."""

    node: str
    rule: str
    reason: str

    def __str__(self) -> str:
        """One line."""
        return f"{self.node}: {self.reason} [{self.rule}]"


Found = Iterator[tuple[str, str]]
"""Who breaks a rule and how."""


def check_tensorrt(
    model: onnx.ModelProto, *, float_nodes: Sequence[str] = (), int8: bool = True
) -> list[Violation]:
    """Every rule that a graph breaks, in the order of :data:`RULES`; empty is fine.

    Convolutions named in ``float_nodes`` may be in float. Without ``int8``, only what holds for
    every precision is asked: that the parser takes the graph.
    """
    view = GraphView(model)
    found = [
        Violation(who, rule, how)
        for rule, (for_int8, check) in RULES.items()
        if int8 or not for_int8
        for who, how in check(view)
    ]
    return [v for v in found if not (v.rule == "float convolution" and v.node in float_nodes)]


def _operators(view: GraphView) -> Found:
    """Every node is of a kind that TensorRT's ONNX parser imports."""
    for node in view.nodes:
        kind = f"{node.domain}.{node.op_type}" if node.domain else node.op_type
        if node.domain or node.op_type not in IMPORTED:
            yield label(node), f"TensorRT imports no {kind}"


def _opset(view: GraphView) -> Found:
    """The operator set has quantisation along an axis."""
    version = next((o.version for o in view.model.opset_import if not o.domain), 0)
    if version < _SMALLEST_OPSET:
        yield "the graph", f"opset {version} knows no scales per channel: {_SMALLEST_OPSET} does"


def _bytes(view: GraphView) -> Found:
    """uint8 from outside is cast before anything else happens to it."""
    for name, value in view.inputs.items():
        if value.type.tensor_type.elem_type != TensorProto.UINT8:
            continue
        for node in view.readers(name):
            if node.op_type != "Cast":
                yield label(node), f"reads the uint8 input {name!r}, which only a Cast may"


def _batch(view: GraphView) -> Found:
    """Only the batch is dynamic, so that one optimisation profile bounds every shape."""
    for name, value in view.inputs.items():
        dims = value.type.tensor_type.shape.dim[1:]
        if any(d.WhichOneof("value") != "dim_value" for d in dims):
            yield name, "has a dynamic size beside the batch"


def _kernel_shape(view: GraphView) -> Found:
    """A convolution says its kernel's shape: of dequantised weights the parser cannot tell."""
    for node in view.of_kind(*CONVOLUTIONS):
        shape, weight = attribute(node, "kernel_shape"), view.weight_shape(node)
        if shape is None:
            yield label(node), "has no kernel_shape"
        elif weight is not None and tuple(shape) != weight[2:]:
            yield label(node), f"has kernel_shape {list(shape)} and weights {list(weight)}"


def _int8(view: GraphView) -> Found:
    """Quantised tensors are signed 8-bit."""
    for node in view.of_kind(QUANTIZE, DEQUANTIZE):
        zero = view.constant(node.input[2]) if len(node.input) > 2 else None
        kind = str(zero.dtype) if zero is not None else _kind_without_zero_point(view, node)
        if kind != "int8":
            yield label(node), f"quantises to {kind}, not to int8"


def _kind_without_zero_point(view: GraphView, node: NodeProto) -> str:
    """What the standard says of a node without zero point: its output_dtype, its input, uint8."""
    if node.op_type == QUANTIZE:
        kind = attribute(node, "output_dtype", 0)
        return TensorProto.DataType.Name(kind).lower() if kind else "uint8"
    stored = view.constant(node.input[0])
    if stored is not None:
        return str(stored.dtype)
    quantize = view.made_by(node.input[0], QUANTIZE)
    return "uint8" if quantize is None else _kind_without_zero_point(view, quantize)


def _zero_points(view: GraphView) -> Found:
    """Zero points are 0: TensorRT's quantisation is symmetric."""
    for node in view.of_kind(QUANTIZE, DEQUANTIZE):
        if len(node.input) < 3:
            continue
        zero = view.constant(node.input[2])
        if zero is None:
            yield label(node), "has a zero point that is computed"
        elif zero.any():
            yield label(node), f"has the zero point {zero.ravel()[np.flatnonzero(zero)[0]]}"


def _scales(view: GraphView) -> Found:
    """Scales are stored, positive and finite; one for an activation."""
    for node in view.of_kind(QUANTIZE, DEQUANTIZE):
        scale = view.constant(node.input[1])
        if scale is None:
            yield label(node), "has a scale that is computed"
        elif not (np.isfinite(scale.astype(np.float64)).all() and (scale > 0).all()):
            yield label(node), "has a scale that is not a positive number"
        elif scale.size > 1 and not view.is_constant(node.input[0]):
            yield label(node), f"has {scale.size} scales for an activation"


def _weights(view: GraphView) -> Found:
    """A quantised convolution's weights are stored as int8, a scale for each output channel."""
    for node in view.of_kind(*CONVOLUTIONS):
        dequantize = view.made_by(node.input[1], DEQUANTIZE)
        if dequantize is None:
            continue
        values, scale = view.constant(dequantize.input[0]), view.constant(dequantize.input[1])
        if values is None or scale is None:
            yield label(node), "has weights that are computed"
            continue
        axis = 0 if node.op_type == "Conv" else 1
        if scale.shape != (values.shape[axis],) or attribute(dequantize, "axis", 1) != axis:
            yield label(node), f"has weights without a scale per channel of axis {axis}"
        if values.dtype == np.int8 and (values == -128).any():
            yield label(node), "has weights of -128: symmetric ones end at -127"
        if len(view.readers(dequantize.output[0])) > 1:
            yield label(node), "shares its weights' DequantizeLinear with another node"


def _biases(view: GraphView) -> Found:
    """Biases are in float: TensorRT dequantises no int32."""
    for node in view.of_kind(*CONVOLUTIONS):
        if len(node.input) > 2 and node.input[2] and view.maker(node.input[2]) is not None:
            yield label(node), "has a bias that is quantised or computed"


def _both_operands(view: GraphView) -> Found:
    """Pictures and weights of a convolution are both quantised, or neither is."""
    for node in view.of_kind(*CONVOLUTIONS):
        pictures, weights = (view.made_by(node.input[i], DEQUANTIZE) for i in (0, 1))
        if (pictures is None) != (weights is None):
            yield label(node), f"has only its {'weights' if pictures is None else 'input'} in INT8"


def _float_convolutions(view: GraphView) -> Found:
    """No convolution is in float but the named ones."""
    for node in view.of_kind(*CONVOLUTIONS):
        if not any(view.made_by(node.input[i], DEQUANTIZE) for i in (0, 1)):
            yield label(node), "is in float"


def _pairs(view: GraphView) -> Found:
    """Every quantised activation goes from one QuantizeLinear to DequantizeLinear, once."""
    for node in view.of_kind(QUANTIZE):
        readers = view.readers(node.output[0])
        if not readers or any(r.op_type != DEQUANTIZE for r in readers):
            yield label(node), "is not followed by DequantizeLinear alone"
        if view.made_by(node.input[0], DEQUANTIZE):
            yield label(node), "quantises what was dequantised just before: one rounding too many"
    for node in view.of_kind(DEQUANTIZE):
        quantize = view.made_by(node.input[0], QUANTIZE)
        if quantize is None and not view.is_constant(node.input[0]):
            yield label(node), "dequantises what no QuantizeLinear made"
        elif quantize is not None and not _same_scale(view, node, quantize):
            yield label(node), f"has another scale than {label(quantize)}"


def _same_scale(view: GraphView, node: NodeProto, other: NodeProto) -> bool:
    a, b = (view.constant(n.input[1]) for n in (node, other))
    return a is None or b is None or np.array_equal(a, b)


def _activations(view: GraphView) -> Found:
    """Nothing is rounded between a convolution and its activation."""
    for node in view.of_kind(*_ACTIVATIONS):
        dequantize = view.made_by(node.input[0], DEQUANTIZE)
        source = _before_rounding(view, dequantize)
        if source is not None and source.op_type in CONVOLUTIONS:
            yield label(node), f"is parted from {label(source)} by Q/DQ, so they cannot be fused"


def _additions(view: GraphView) -> Found:
    """Of an addition after a convolution only the other operand is quantised."""
    for node in view.of_kind("Add"):
        dequantized = [view.made_by(name, DEQUANTIZE) for name in node.input]
        direct = [name for name in node.input if view.made_by(name, *CONVOLUTIONS)]
        for source in (_before_rounding(view, d) for d in dequantized):
            if source is not None and source.op_type in CONVOLUTIONS and not direct:
                yield label(node), f"is parted from {label(source)} by Q/DQ: {_FUSED}"
        if direct and not any(dequantized) and not any(map(view.is_constant, node.input)):
            yield label(node), f"has a float operand beside its convolution: {_FUSED}"


def _before_rounding(view: GraphView, dequantize: NodeProto | None) -> NodeProto | None:
    """What made the tensor that a Q/DQ pair rounds."""
    quantize = view.made_by(dequantize.input[0], QUANTIZE) if dequantize is not None else None
    return view.maker(quantize.input[0]) if quantize is not None else None


def _one_reader(view: GraphView) -> Found:
    """What is quantised is not read in float too: its kernel would write it twice."""
    for node in view.of_kind(QUANTIZE):
        others = [r for r in view.readers(node.input[0]) if r.op_type != QUANTIZE]
        if others or node.input[0] in view.outputs:
            who = label(others[0]) if others else "the graph's output"
            yield label(node), f"quantises a tensor that {who} reads in float"


RULES: Mapping[str, tuple[bool, Callable[[GraphView], Found]]] = MappingProxyType(
    {  # rule: (whether it is about INT8, check)
        "operators": (False, _operators),
        "opset": (False, _opset),
        "uint8 input": (False, _bytes),
        "dynamic batch": (False, _batch),
        "kernel_shape": (False, _kernel_shape),
        "int8": (True, _int8),
        "zero points": (True, _zero_points),
        "scales": (True, _scales),
        "weights per channel": (True, _weights),
        "float biases": (True, _biases),
        "both operands": (True, _both_operands),
        "float convolution": (True, _float_convolutions),
        "pairs": (True, _pairs),
        "activations": (True, _activations),
        "additions": (True, _additions),
        "one precision": (True, _one_reader),
    }
)
"""What is asked of a graph, by the names that violations carry."""
