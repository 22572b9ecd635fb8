"""Weights of a head that computes in float, kept in the file as INT8: a quarter of the bytes.

The weights lie on a grid, one step for each unit, so nothing is lost: the file holds the integers
and the steps, and every engine multiplies them back to the same floats when it loads the file.
"""

from __future__ import annotations

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from quant.qat import WEIGHT_LEVELS

_SPARE_BITS = np.int32(0xFF)  # of a float32: with 16 bits left a step times 127 is exact
_FEWEST_WEIGHTS = 1024  # below it two more nodes cost more than the bytes they save
_INTEGERS, _STEPS, _WIDE = ".integers", ".steps", ".wide"


def on_row_grid(weight: NDArray[np.float64]) -> NDArray[np.float64]:
    """Weights (R, C) at the nearest of 255 steps, one size of step for each row."""
    limit = np.abs(weight).max(1, keepdims=True).astype(np.float32) / np.float32(WEIGHT_LEVELS)
    bits = (limit.view(np.int32) + _SPARE_BITS) & ~_SPARE_BITS  # rounded up: nothing is cut off
    steps = bits.view(np.float32).astype(np.float64)
    return np.rint(weight / np.where(steps > 0, steps, 1.0)) * steps


def narrow_(graph: onnx.ModelProto) -> None:
    """Keep each dense layer's weights that lie on :func:`on_row_grid` as INT8, in place."""
    stored = {t.name: t for t in graph.graph.initializer}
    nodes: list[onnx.NodeProto] = []
    for node in graph.graph.node:
        if node.op_type == "Gemm" and (weight := stored.get(node.input[1])) is not None:
            nodes += _narrowed(graph, weight)
        nodes.append(node)
    del graph.graph.node[:]
    graph.graph.node.extend(nodes)


def _narrowed(graph: onnx.ModelProto, stored: onnx.TensorProto) -> list[onnx.NodeProto]:
    """The nodes that make a weight of integers and steps; none where it stays as it is."""
    weight, name = numpy_helper.to_array(stored), stored.name
    if weight.dtype != np.float32 or weight.size < _FEWEST_WEIGHTS:
        return []
    steps = np.abs(weight).max(1, keepdims=True) / np.float32(WEIGHT_LEVELS)
    integers = np.rint(weight / np.where(steps > 0, steps, np.float32(1)))
    if not np.array_equal(integers * steps, weight):
        return []
    graph.graph.initializer.remove(stored)
    parts = {_INTEGERS: integers.astype(np.int8), _STEPS: steps}
    graph.graph.initializer.extend(
        numpy_helper.from_array(values, name + end) for end, values in parts.items()
    )
    return [
        helper.make_node(
            "Cast", [name + _INTEGERS], [name + _WIDE], name + _WIDE, to=onnx.TensorProto.FLOAT
        ),
        helper.make_node("Mul", [name + _WIDE, name + _STEPS], [name], name),
    ]


def widen_(graph: onnx.ModelProto) -> None:
    """Undo :func:`narrow_`, in place: the same floats as constants."""
    stored = {t.name: t for t in graph.graph.initializer}
    for node in list(graph.graph.node):
        name = node.output[0]
        if node.op_type != "Mul" or list(node.input) != [name + _WIDE, name + _STEPS]:
            continue
        parts = [stored[name + _INTEGERS], stored[name + _STEPS]]
        integers, steps = (numpy_helper.to_array(part) for part in parts)
        (cast,) = [n for n in graph.graph.node if node.input[0] in n.output]
        for part in parts:
            graph.graph.initializer.remove(part)
        for made in (cast, node):
            graph.graph.node.remove(made)
        weight = numpy_helper.from_array(integers.astype(np.float32) * steps, name)
        graph.graph.initializer.append(weight)
