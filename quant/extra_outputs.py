"""Two more outputs beside a graph's quality, read from the same pooled features.

``spread`` and ``unfamiliar`` come from one Gemm, a Relu, and a Gemm and a Sigmoid each: kinds of
node that every engine of the quality head has. What leads to ``quality`` is not touched.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from quant.calibration import Views
from quant.correction import (
    constant_of,
    correct_head_,
    head_nodes,
    outputs_of,
    regression_lines,
    replace_constant,
)
from quant.narrow import on_grid

QUALITY, SPREAD, UNFAMILIAR = "quality", "spread", "unfamiliar"
_PREFIX = "sure"

Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class Reader:
    """One number of a feature vector: sigmoid(v · relu(W x + b) + c)."""

    hidden_weight: Array
    """W, (H, F)."""
    hidden_bias: Array
    """b, (H,)."""
    weight: Array
    """v, (1, H)."""
    bias: Array
    """c, (1,)."""

    def __call__(self, features: NDArray[np.float32]) -> Array:
        """Features (N, F) to 0..1, (N,)."""
        hidden = np.maximum(features @ self.hidden_weight.T + self.hidden_bias, 0)
        return np.asarray(1 / (1 + np.exp(-(hidden @ self.weight.T + self.bias)[:, 0])))

    def after_lines(self, slope: Array, offset: Array) -> Reader:
        """The same number of features that ``slope * x + offset``, (F,) each, first corrects."""
        bias = self.hidden_bias + self.hidden_weight @ offset
        return Reader(self.hidden_weight * slope, bias, self.weight, self.bias)

    def on_grid(self) -> Reader:
        """Nearly the same number, of weights that a file can hold as INT8; see `quant.narrow`."""
        return Reader(on_grid(self.hidden_weight), self.hidden_bias, self.weight, self.bias)


def features_name(graph: onnx.ModelProto) -> str:
    """The tensor that the quality head reads; ``ValueError`` for a graph without that head."""
    return str(head_nodes(graph)[0].input[0])


def add_outputs_(graph: onnx.ModelProto, *, spread: Reader, unfamiliar: Reader) -> int:
    """Give a graph the two outputs, in place; returns how many parameters they take.

    Raises ``ValueError`` for a graph without the quality head, or with the outputs already.
    """
    features = features_name(graph)
    readers = {SPREAD: spread, UNFAMILIAR: unfamiliar}
    width = len(spread.hidden_bias)
    constants = {
        "hidden.weight": np.concatenate([r.hidden_weight for r in readers.values()]),
        "hidden.bias": np.concatenate([r.hidden_bias for r in readers.values()]),
    }
    hidden, shown = f"{_PREFIX}.hidden", f"{_PREFIX}.shown"
    inputs = [features, f"{hidden}.weight", f"{hidden}.bias"]
    nodes = [
        helper.make_node("Gemm", inputs, [hidden], name=f"{_PREFIX}_gemm", transB=1),
        helper.make_node("Relu", [hidden], [shown], name=f"{_PREFIX}_relu"),
    ]
    for name, reader in readers.items():
        # all hidden units in, those of the other output at weight 0
        weight = np.zeros((1, len(constants["hidden.bias"])))
        first = 0 if name == SPREAD else width
        weight[:, first : first + len(reader.hidden_bias)] = reader.weight
        constants |= {f"{name}.weight": weight, f"{name}.bias": reader.bias}
        logit = f"{_PREFIX}.{name}"
        inputs = [shown, f"{logit}.weight", f"{logit}.bias"]
        nodes += [
            helper.make_node("Gemm", inputs, [logit], name=f"{_PREFIX}_gemm_{name}", transB=1),
            helper.make_node("Sigmoid", [logit], [name], name=f"{_PREFIX}_sigmoid_{name}"),
        ]
    graph.graph.node.extend(nodes)
    graph.graph.initializer.extend(
        numpy_helper.from_array(value.astype(np.float32), f"{_PREFIX}.{name}")
        for name, value in constants.items()
    )
    for name in readers:
        output = graph.graph.output.add()
        output.CopyFrom(graph.graph.output[0])
        output.name = name
    onnx.checker.check_model(graph, full_check=True)
    return sum(value.size for value in constants.values())


def remove_outputs_(graph: onnx.ModelProto) -> int:
    """Leave ``quality`` alone, and what leads there, in place; returns the parameters removed.

    A graph with no other output is left as it is.
    """
    inner = graph.graph
    kept_outputs = [o for o in inner.output if o.name not in (SPREAD, UNFAMILIAR)]
    if len(kept_outputs) == len(inner.output):
        return 0
    kept = _leading_to({o.name for o in kept_outputs}, inner.node)
    read = {name for node in kept for name in node.input}
    dropped_nodes = [n for n in inner.node if not any(n is k for k in kept)]
    stale = {name for node in dropped_nodes for name in (*node.input, *node.output)} - read
    num_parameters = sum(int(np.prod(t.dims)) for t in inner.initializer if t.name in stale)
    remaining = {
        "node": kept,
        "output": kept_outputs,
        "initializer": [t for t in inner.initializer if t.name not in stale],
        "value_info": [v for v in inner.value_info if v.name not in stale],
    }
    for field, values in remaining.items():
        copies = [type(v).FromString(v.SerializeToString()) for v in values]
        del getattr(inner, field)[:]
        getattr(inner, field).extend(copies)
    return num_parameters


def _leading_to(names: set[str], nodes: list[onnx.NodeProto]) -> list[onnx.NodeProto]:
    """The nodes that some tensors need, in their order."""
    needed, kept = set(names), []
    for node in reversed(list(nodes)):
        if needed & set(node.output):
            kept.append(node)
            needed |= set(node.input)
    return kept[::-1]


def correct_heads_(
    quantised: onnx.ModelProto, reference: onnx.ModelProto, calibration: Sequence[Views]
) -> None:
    """Correct the quality head, and what else reads the features by their same lines, in place."""
    cores = [onnx.ModelProto.FromString(g.SerializeToString()) for g in (quantised, reference)]
    for core in cores:
        remove_outputs_(core)
    hidden = [head_nodes(core)[0] for core in cores]
    features = [node.input[0] for node in hidden]
    readers = [n for n in quantised.graph.node if n.op_type == "Gemm" and n.input[0] == features[0]]
    beside = [n for n in readers if n.input[1] != hidden[0].input[1]]
    if beside:
        found, wanted = map(outputs_of, cores, features, (calibration, calibration))
        slope, offset = regression_lines(found, wanted)  # (F,), (F,)
        for node in beside:
            weight, bias = (constant_of(quantised, name) for name in node.input[1:])
            replace_constant(quantised, node.input[2], bias + weight @ offset)
            replace_constant(quantised, node.input[1], weight * slope)
    correct_head_(cores[0], cores[1], calibration)
    for name in (name for node in head_nodes(cores[0]) for name in node.input[1:]):
        replace_constant(quantised, name, constant_of(cores[0], name))
