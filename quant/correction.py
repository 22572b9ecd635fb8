"""After INT8: take out the systematic part of the quantisation error, in the float head.

Rounding shifts and shrinks each pooled feature a little, always the same way. Over calibration
pictures the float feature is regressed on the quantised one, feature by feature, and the straight
line is folded into the head's first layer; a last line does the same for the logit. This extends
the bias correction of Nagel et al. 2019 (arXiv 1906.04721, section 4.2), measured instead of
derived and applied where the graph is in float anyway.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from quant.calibration import Views

_SLOPE_RANGE = (0.5, 2.0)  # a feature that hardly varies says nothing of its slope


def correct_head_(
    quantised: onnx.ModelProto, reference: onnx.ModelProto, calibration: Sequence[Views]
) -> None:
    """Fold the regression of float features and logits on quantised ones into the head, in place.

    Both graphs end by two Gemm nodes and a Sigmoid; their head is in float.
    """
    hidden, quality = _head(quantised)
    wanted_hidden, wanted_quality = _head(reference)
    features = _outputs(quantised, hidden.input[0], calibration)  # (N, F)
    wanted = _outputs(reference, wanted_hidden.input[0], calibration)  # (N, F)
    slope, offset = _lines(features, wanted)  # (F,), (F,)
    weight = _constant(quantised, hidden.input[1])  # (64, F): Gemm with transB
    bias = _constant(quantised, hidden.input[2])
    _replace(quantised, hidden.input[2], bias + weight @ offset)
    _replace(quantised, hidden.input[1], weight * slope)
    logits = _outputs(quantised, quality.output[0], calibration)  # (N, 1)
    wanted_logits = _outputs(reference, wanted_quality.output[0], calibration)
    slope, offset = _lines(logits, wanted_logits)  # (1,), (1,)
    _replace(quantised, quality.input[1], _constant(quantised, quality.input[1]) * slope)
    _replace(quantised, quality.input[2], _constant(quantised, quality.input[2]) * slope + offset)


def _lines(
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


def _head(graph: onnx.ModelProto) -> tuple[onnx.NodeProto, onnx.NodeProto]:
    gemms = [n for n in graph.graph.node if n.op_type == "Gemm"]
    if len(gemms) != 2 or graph.graph.node[-1].op_type != "Sigmoid":
        raise ValueError(f"the graph ends by {len(gemms)} Gemm nodes; two and a Sigmoid are known")
    return gemms[0], gemms[1]


def _outputs(
    graph: onnx.ModelProto, tensor: str, calibration: Sequence[Views]
) -> NDArray[np.float64]:
    """A tensor of the graph for each calibration batch, (N, ...)."""
    import onnxruntime as ort

    probed = onnx.ModelProto()
    probed.CopyFrom(graph)
    del probed.graph.output[:]
    probed.graph.output.append(onnx.ValueInfoProto(name=tensor))
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(
        probed.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    found = [np.asarray(session.run([tensor], batch)[0]) for batch in calibration]
    return np.concatenate(found).astype(np.float64)


def _constant(graph: onnx.ModelProto, name: str) -> NDArray[np.float64]:
    stored = next(t for t in graph.graph.initializer if t.name == name)
    return numpy_helper.to_array(stored).astype(np.float64)


def _replace(graph: onnx.ModelProto, name: str, values: NDArray[np.float64]) -> None:
    stored = next(t for t in graph.graph.initializer if t.name == name)
    stored.CopyFrom(numpy_helper.from_array(values.astype(np.float32), name))
