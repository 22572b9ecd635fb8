"""What each layer's rounding does to the score: one layer rounds at a time, all others are exact.

The float graph gets one layer's INT8 weights and the Q/DQ pair after it, with the INT8 graph's own
scales. Layers that share weights, as the two views' do, count as one. Biases, 32-bit integers in
INT8, stay exact.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import helper, numpy_helper

from quant.calibration import Views
from quant.correction import outputs_of

_KINDS = ("Conv", "Add")
_PREFIX = "rounded."


@dataclass(frozen=True, slots=True)
class LayerSensitivity:
    """One layer and what its rounding alone costs."""

    layer: str
    """Its weight's name; of a sum its node's."""
    nodes: tuple[str, ...]
    """The nodes that compute it."""
    float_nodes: tuple[str, ...]
    """What ``float_nodes`` must name to spare it: its nodes and those that read it, as a node in
    integers rounds what it reads."""
    mean_points: float
    """Mean |delta score| over the pictures, of 0..100."""


def sensitivities(
    reference: onnx.ModelProto, quantised: onnx.ModelProto, batches: Sequence[Views]
) -> list[LayerSensitivity]:
    """Every layer that the INT8 graph rounds, the most sensitive first.

    ``quantised`` is made of ``reference`` without a corrected head: node names are shared.
    """
    quality = reference.graph.output[0].name
    wanted = outputs_of(reference, quality, batches)
    found = []
    for layer, nodes in _layers(reference, quantised).items():
        one = only_rounding(reference, quantised, nodes)
        apart = np.abs(outputs_of(one, quality, batches) - wanted)
        spared = _with_readers(reference, quantised, nodes)
        found.append(LayerSensitivity(layer, nodes, spared, float(100 * apart.mean())))
    return sorted(found, key=lambda one: (-one.mean_points, one.layer))


def _layers(reference: onnx.ModelProto, quantised: onnx.ModelProto) -> dict[str, tuple[str, ...]]:
    """Layer to its nodes, of what has a Q/DQ pair after it."""
    pairs = _pairs(quantised)
    rounded = {n.name for n in quantised.graph.node if n.op_type in _KINDS and n.output[0] in pairs}
    constants = {t.name for t in reference.graph.initializer}
    found: dict[str, tuple[str, ...]] = {}
    for node in reference.graph.node:
        if node.name in rounded:
            layer = node.input[1] if node.input[1] in constants else node.name
            found[layer] = (*found.get(layer, ()), node.name)
    return found


def _with_readers(
    reference: onnx.ModelProto, quantised: onnx.ModelProto, nodes: Iterable[str]
) -> tuple[str, ...]:
    """The nodes and the ones that read their outputs, in the graph's order."""
    named = set(nodes)
    outputs = {o for n in quantised.graph.node if n.name in named for o in n.output}
    return tuple(
        n.name
        for n in reference.graph.node
        if n.op_type in _KINDS and (n.name in named or outputs & set(n.input))
    )


def _pairs(quantised: onnx.ModelProto) -> dict[str, onnx.NodeProto]:
    """Tensor to the QuantizeLinear that reads it."""
    return {n.input[0]: n for n in quantised.graph.node if n.op_type == "QuantizeLinear"}


def only_rounding(
    reference: onnx.ModelProto, quantised: onnx.ModelProto, nodes: Iterable[str]
) -> onnx.ModelProto:
    """The float graph where the named nodes' weights and outputs are rounded as in the INT8 one."""
    one = onnx.ModelProto()
    one.CopyFrom(reference)
    constants = {t.name: t for t in quantised.graph.initializer}
    by_name = {n.name: n for n in quantised.graph.node}
    pairs, restored = _pairs(quantised), _restored_by(quantised)
    own = {n.name: n for n in one.graph.node}
    for name in nodes:
        node = by_name[name]
        weight = restored.get(node.input[1]) if node.op_type == "Conv" else None
        if weight is not None:
            own[name].input[1] = _rounded_weight(one, weight, constants, f"{_PREFIX}{name}.weight")
        _round_(one, node.output[0], pairs[node.output[0]], constants)
    return one


def _restored_by(quantised: onnx.ModelProto) -> dict[str, onnx.NodeProto]:
    """Tensor to the DequantizeLinear that makes it."""
    return {n.output[0]: n for n in quantised.graph.node if n.op_type == "DequantizeLinear"}


def _rounded_weight(
    graph: onnx.ModelProto,
    restore: onnx.NodeProto,
    constants: dict[str, onnx.TensorProto],
    name: str,
) -> str:
    """Add a weight as it is after rounding; returns its name."""
    values, scale, zero = (numpy_helper.to_array(constants[n]) for n in restore.input[:3])
    shape = [-1] + [1] * (values.ndim - 1) if scale.ndim else []
    exact = (values.astype(np.float32) - zero.reshape(shape)) * scale.reshape(shape)
    graph.graph.initializer.append(numpy_helper.from_array(exact.astype(np.float32), name))
    return name


def _round_(
    graph: onnx.ModelProto,
    tensor: str,
    quantise: onnx.NodeProto,
    constants: dict[str, onnx.TensorProto],
) -> None:
    """Put a Q/DQ pair between a tensor and its readers, with another graph's scale; in place."""
    scale, zero = (_PREFIX + name for name in quantise.input[1:3])
    for name, stored in zip((scale, zero), quantise.input[1:3], strict=True):
        graph.graph.initializer.append(
            numpy_helper.from_array(numpy_helper.to_array(constants[stored]), name)
        )
    whole, back = f"{_PREFIX}{tensor}.q", f"{_PREFIX}{tensor}.dq"
    for node in graph.graph.node:
        for i, name in enumerate(node.input):
            if name == tensor:
                node.input[i] = back
    place = 1 + next(i for i, n in enumerate(graph.graph.node) if tensor in n.output)
    graph.graph.node.insert(
        place, helper.make_node("DequantizeLinear", [whole, scale, zero], [back], name=back)
    )
    graph.graph.node.insert(
        place, helper.make_node("QuantizeLinear", [tensor, scale, zero], [whole], name=whole)
    )
