"""Weights of a head that computes in float, kept in the file as INT8: a quarter of the bytes.

The weights lie on a grid, one step for each unit times a power of two for each feature, as features
differ in size. So nothing is lost: the file holds the integers, the steps and the powers, and every
engine multiplies them back to the same floats when it loads the file.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from quant.qat import WEIGHT_LEVELS

_SPARE_BITS = np.int32(0xFF)  # of a float32: with 16 bits left a step times 127 is exact
_FEWEST_WEIGHTS = 1024  # below it two more nodes cost more than the bytes they save
_MOST_ROUNDS = 20
_INTEGERS, _STEPS, _POWERS = ".integers", ".steps", ".powers"
_WIDE, _STEPPED = ".wide", ".stepped"


def on_grid(weight: NDArray[np.float64]) -> NDArray[np.float64]:
    """Weights (R, C) at the nearest of 255 steps, whose size is a row's times a column's.

    A column's is the power of two below its largest weight. Weights on the grid stay as they are,
    and so do the weights of a layer too small for :func:`narrow_`.
    """
    if weight.size < _FEWEST_WEIGHTS:
        return weight
    for _ in range(_MOST_ROUNDS):
        powers = _powers(weight)
        weight = _on_row_grid(weight / powers) * powers
        if np.array_equal(_powers(weight), powers):
            return weight
    return _on_row_grid(weight)


def _on_row_grid(weight: NDArray[np.float64]) -> NDArray[np.float64]:
    limit = np.abs(weight).max(1, keepdims=True).astype(np.float32) / np.float32(WEIGHT_LEVELS)
    bits = (limit.view(np.int32) + _SPARE_BITS) & ~_SPARE_BITS  # rounded up: nothing is cut off
    steps = bits.view(np.float32).astype(np.float64)
    return np.rint(weight / np.where(steps > 0, steps, 1.0)) * steps


def _powers(weight: NDArray[Any]) -> NDArray[Any]:
    """The power of two of each column's largest weight, (1, C), as wide; 1 for one of zeros."""
    largest = np.abs(weight).max(0, keepdims=True)
    _, exponents = np.frexp(np.where(largest > 0, largest, 1))  # largest in [2**(e-1), 2**e)
    return np.ldexp(np.ones(1, weight.dtype), exponents - 1)


def narrow_(graph: onnx.ModelProto) -> None:
    """Keep each dense layer's weights that lie on :func:`on_grid` as INT8, in place."""
    stored = {t.name: t for t in graph.graph.initializer}
    nodes: list[onnx.NodeProto] = []
    for node in graph.graph.node:
        if node.op_type == "Gemm" and (weight := stored.get(node.input[1])) is not None:
            nodes += _narrowed(graph, weight)
        nodes.append(node)
    del graph.graph.node[:]
    graph.graph.node.extend(nodes)


def _narrowed(graph: onnx.ModelProto, stored: onnx.TensorProto) -> list[onnx.NodeProto]:
    """The nodes that make a weight of integers, steps and powers; none where it stays as it is."""
    weight, name = numpy_helper.to_array(stored), stored.name
    if weight.dtype != np.float32 or weight.size < _FEWEST_WEIGHTS:
        return []
    ones = np.ones((1, weight.shape[1]), np.float32)
    for powers in (ones, _powers(weight)):
        even = weight / powers
        steps = np.abs(even).max(1, keepdims=True) / np.float32(WEIGHT_LEVELS)
        integers = np.rint(even / np.where(steps > 0, steps, np.float32(1)))
        if np.array_equal(integers * steps, even):
            break
    else:
        return []
    graph.graph.initializer.remove(stored)
    parts = {_INTEGERS: integers.astype(np.int8), _STEPS: steps}
    factors, made = [_STEPS], [name]
    if powers is not ones:
        parts[_POWERS] = powers
        factors, made = [_STEPS, _POWERS], [name + _STEPPED, name]
    graph.graph.initializer.extend(
        numpy_helper.from_array(values, name + end) for end, values in parts.items()
    )
    wide = name + _WIDE
    nodes = [helper.make_node("Cast", [name + _INTEGERS], [wide], wide, to=onnx.TensorProto.FLOAT)]
    for factor, product in zip(factors, made, strict=True):
        read = nodes[-1].output[0]
        nodes.append(helper.make_node("Mul", [read, name + factor], [product], product))
    return nodes


def widen_(graph: onnx.ModelProto) -> None:
    """Undo :func:`narrow_`, in place: the same floats as constants."""
    stored = {t.name: t for t in graph.graph.initializer}
    made_by = {node.output[0]: node for node in graph.graph.node}
    names = [name.removesuffix(_INTEGERS) for name in stored if name.endswith(_INTEGERS)]
    for name in (name for name in names if name + _WIDE in made_by):
        parts = [part for end in (_INTEGERS, _STEPS, _POWERS) if (part := stored.get(name + end))]
        integers, *factors = (numpy_helper.to_array(part) for part in parts)
        weight = integers.astype(np.float32)
        for factor in factors:
            weight = weight * factor
        for part in parts:
            graph.graph.initializer.remove(part)
        for product in (name + _WIDE, name + _STEPPED, name):
            if product in made_by:
                graph.graph.node.remove(made_by[product])
        graph.graph.initializer.append(numpy_helper.from_array(weight, name))
