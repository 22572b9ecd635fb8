"""What each layer of a graph becomes: in float or in integers, and how exact.

"Optimised" means as ONNX Runtime makes it on a CPU before it runs, without the layout changes that
depend on the machine.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from quant.calibration import Views
from quant.correction import probed_session

FLOAT_CONVS = frozenset({"Conv", "FusedConv", "NhwcFusedConv"})
INTEGER_CONVS = frozenset({"ConvInteger", "QLinearConv"})
_FATAL_ONLY = 4
_NO_NOISE_DB = 200.0
"""Shown where a layer comes out bit by bit: JSON has no infinity."""


def optimised(graph: onnx.ModelProto) -> onnx.ModelProto:
    """The graph that ONNX Runtime runs on a CPU."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = _FATAL_ONLY
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "optimised.onnx"
        options.optimized_model_filepath = str(path)
        ort.InferenceSession(graph.SerializeToString(), options, providers=["CPUExecutionProvider"])
        return onnx.load(path)


def float_convs(graph: onnx.ModelProto) -> list[str]:
    """Names of the convolutions that ONNX Runtime computes in float, in its order."""
    return [n.name for n in optimised(graph).graph.node if n.op_type in FLOAT_CONVS]


def integer_convs(graph: onnx.ModelProto) -> list[str]:
    """Names of those that it computes in integers."""
    return [n.name for n in optimised(graph).graph.node if n.op_type in INTEGER_CONVS]


def named_float_nodes(history: Sequence[dict[str, Any]]) -> set[str]:
    """The nodes that the INT8 step of a manifest's history says are left in float."""
    steps = [step for step in history if step.get("step") == "int8"]
    settings = steps[-1].get("settings", {}) if steps else {}
    return set(settings.get("quantize", {}).get("float_nodes", ()))


@dataclass(frozen=True, slots=True)
class LayerNoise:
    """How exactly a graph computes one layer of a reference graph."""

    node: str
    tensor: str
    """Its output; after its ReLU where INT8 computes both in one."""
    sqnr_db: float
    """10 log10 of signal power over the power of the difference, over all pictures."""


def layer_noise(
    reference: onnx.ModelProto, graph: onnx.ModelProto, batches: Sequence[Views]
) -> list[LayerNoise]:
    """SQNR of every layer that both graphs have, in the graph's order.

    The graphs are run side by side with all their layers as outputs. A graph whose tensors have
    other names, as after a change of its shape, has no layer in common.
    """
    pairs = _common_layers(reference, graph)
    if not pairs or not batches:
        return []
    of_reference = probed_session(
        reference, [tensor for _, tensor, _ in pairs], log_severity=_FATAL_ONLY
    )
    of_graph = probed_session(graph, [rounded for _, _, rounded in pairs], log_severity=_FATAL_ONLY)
    signal, noise = np.zeros(len(pairs)), np.zeros(len(pairs))
    for batch in batches:
        wanted = of_reference.run([tensor for _, tensor, _ in pairs], batch)
        found = of_graph.run([rounded for _, _, rounded in pairs], batch)
        for i, (x, y) in enumerate(zip(wanted, found, strict=True)):
            signal[i] += np.square(x, dtype=np.float64).sum()
            noise[i] += np.square(np.subtract(x, y, dtype=np.float64)).sum()
    return [
        LayerNoise(node, tensor, _decibels(signal[i], noise[i]))
        for i, (node, tensor, _) in enumerate(pairs)
    ]


def _decibels(signal: float, noise: float) -> float:
    if noise == 0:
        return _NO_NOISE_DB
    return float(min(_NO_NOISE_DB, 10 * np.log10(max(signal, 1e-30) / noise)))


def _common_layers(
    reference: onnx.ModelProto, graph: onnx.ModelProto
) -> list[tuple[str, str, str]]:
    """Node, its output in the reference, and what the graph computes of that, dequantised."""
    known = {out for node in reference.graph.node for out in node.output}
    nodes = {n.input[0]: n for n in graph.graph.node if n.op_type == "QuantizeLinear"}
    restored = {
        n.input[0]: n.output[0] for n in graph.graph.node if n.op_type == "DequantizeLinear"
    }
    found = []
    for node in graph.graph.node:
        if node.op_type not in ("Conv", "Gemm", "MatMul", "Add") or node.output[0] not in known:
            continue
        tensor = node.output[0]
        quantise = nodes.get(tensor)
        rounded = tensor if quantise is None else restored.get(quantise.output[0], tensor)
        found.append((node.name or tensor, tensor, rounded))
    return found
