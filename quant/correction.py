"""After INT8: take out the systematic part of the quantisation error, in the float head.

Rounding shifts and shrinks each pooled feature a little, always the same way. Over calibration
pictures the float feature is regressed on the quantised one, feature by feature, and the straight
line is folded into the head's first layer; a last line does the same for the logit. This extends
the bias correction of Nagel et al. 2019 (arXiv 1906.04721, section 4.2), measured instead of
derived and applied where the graph is in float anyway.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from quant.calibration import Views
from quant.narrow import on_grid

_SLOPE_RANGE = (0.5, 2.0)  # a feature that hardly varies says nothing of its slope


def correct_head_(
    quantised: onnx.ModelProto, reference: onnx.ModelProto, calibration: Sequence[Views]
) -> None:
    """Fold the regression of float features and logits on quantised ones into the head, in place.

    Both graphs end by two Gemm nodes and a Sigmoid; their head is in float. The first layer's
    weights are rounded so that the file can hold them as INT8 (:mod:`quant.narrow`); the logit's
    line is of the rounded ones.
    """
    hidden, quality = head_nodes(quantised)
    wanted_hidden, wanted_quality = head_nodes(reference)
    features = outputs_of(quantised, hidden.input[0], calibration)  # (N, F)
    wanted = outputs_of(reference, wanted_hidden.input[0], calibration)  # (N, F)
    slope, offset = regression_lines(features, wanted)  # (F,), (F,)
    weight = constant_of(quantised, hidden.input[1])  # (64, F): Gemm with transB
    bias = constant_of(quantised, hidden.input[2])
    replace_constant(quantised, hidden.input[2], bias + weight @ offset)
    replace_constant(quantised, hidden.input[1], on_grid(weight * slope))
    logits = outputs_of(quantised, quality.output[0], calibration)  # (N, 1)
    wanted_logits = outputs_of(reference, wanted_quality.output[0], calibration)
    slope, offset = regression_lines(logits, wanted_logits)  # (1,), (1,)
    replace_constant(quantised, quality.input[1], constant_of(quantised, quality.input[1]) * slope)
    replace_constant(
        quantised, quality.input[2], constant_of(quantised, quality.input[2]) * slope + offset
    )


def regression_lines(
    found: NDArray[np.float64], wanted: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Slope and offset of the least-squares line of each column, (F,) each."""
    mean, wanted_mean = found.mean(0), wanted.mean(0)
    centred = found - mean
    spread = (centred**2).mean(0)
    slope = np.where(
        spread > 0, (centred * (wanted - wanted_mean)).mean(0) / np.maximum(spread, 1e-12), 1.0
    )
    slope = np.clip(slope, *_SLOPE_RANGE)
    return slope, wanted_mean - slope * mean


def head_nodes(graph: onnx.ModelProto) -> tuple[onnx.NodeProto, onnx.NodeProto]:
    """The two Gemm nodes that a student's graph ends by; ``ValueError`` for another graph."""
    gemms = [n for n in graph.graph.node if n.op_type == "Gemm"]
    if len(gemms) != 2 or graph.graph.node[-1].op_type != "Sigmoid":
        raise ValueError(f"the graph ends by {len(gemms)} Gemm nodes; two and a Sigmoid are known")
    return gemms[0], gemms[1]


def parts_before(graph: onnx.ModelProto, tensor: str) -> list[onnx.NodeProto | onnx.TensorProto]:
    """The nodes and initialisers that a tensor is computed from, in the graph's order."""
    wanted, nodes = {tensor}, []
    for node in reversed(graph.graph.node):  # sorted, so makers come before readers
        if wanted.intersection(node.output):
            wanted.update(node.input)
            nodes.append(node)
    return [*reversed(nodes), *(t for t in graph.graph.initializer if t.name in wanted)]


def outputs_of(
    graph: onnx.ModelProto, tensor: str, calibration: Iterable[Views]
) -> NDArray[np.float64]:
    """A tensor of the graph for each calibration batch, (N, ...)."""
    (found,) = outputs_of_each([(graph, tensor)], calibration)
    return found


def outputs_of_each(
    tensors: Sequence[tuple[onnx.ModelProto, str]], batches: Iterable[Views]
) -> list[NDArray[np.float64]]:
    """One tensor of each graph over the same batches, which are made once, (N, ...) each."""
    sessions = [(probed_session(graph, [tensor]), tensor) for graph, tensor in tensors]
    found: list[list[NDArray[np.float32]]] = [[] for _ in sessions]
    for batch in batches:
        for (session, tensor), values in zip(sessions, found, strict=True):
            values.append(np.asarray(session.run([tensor], batch)[0]))
    return [np.concatenate(values).astype(np.float64) for values in found]


def probed_session(graph: onnx.ModelProto, tensors: Sequence[str], *, log_severity: int = 3) -> Any:
    """A session of ONNX Runtime whose outputs are tensors of the graph."""
    import onnxruntime as ort

    probed = onnx.ModelProto()
    probed.CopyFrom(graph)
    del probed.graph.output[:]
    probed.graph.output.extend(onnx.ValueInfoProto(name=t) for t in dict.fromkeys(tensors))
    options = ort.SessionOptions()
    options.log_severity_level = log_severity
    return ort.InferenceSession(
        probed.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def constant_of(graph: onnx.ModelProto, name: str) -> NDArray[np.float64]:
    """An initialiser's values."""
    stored = next(t for t in graph.graph.initializer if t.name == name)
    return numpy_helper.to_array(stored).astype(np.float64)


def replace_constant(graph: onnx.ModelProto, name: str, values: NDArray[np.float64]) -> None:
    """Give an initialiser other values, as float32."""
    stored = next(t for t in graph.graph.initializer if t.name == name)
    stored.CopyFrom(numpy_helper.from_array(values.astype(np.float32), name))
