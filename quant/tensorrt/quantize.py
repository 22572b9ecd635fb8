"""TensorRT's flavour of INT8: symmetric int8 activations, nothing rounded that a kernel can fuse.

ONNX Runtime's quantiser does the work, told to round what convolutions read and nothing else. The
operand that skips a block is what its first convolution reads, so that it is rounded too, and the
addition joins the block's last convolution, as TensorRT fuses it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import NodeProto
from onnxruntime.quantization import (
    CalibrationDataReader,
    CalibrationMethod,
    QuantFormat,
    QuantType,
    quantize_static,
)
from onnxruntime.quantization.shape_inference import quant_pre_process

from dgiqa_stream.errors import ModelError
from quant.calibration import Views
from quant.calibration_methods import Spans
from quant.extra_outputs import correct_heads_
from quant.ptq import (
    Int8StaticConfig,
    choose_calibration,
    measured_spans,
    normalised_inputs,
)
from quant.qat import Ranges, symmetric_scale
from quant.rounded_tensors import trained_spans
from quant.tensorrt.graph_view import DEQUANTIZE, GraphView
from quant.tensorrt.layout import lay_out_
from quant.tensorrt.rules import check_tensorrt
from quant.tensorrt.tuning import TuneConfig, tune_for_tensorrt


def quantize_for_tensorrt(
    graph: onnx.ModelProto,
    config: Int8StaticConfig,
    calibration: Sequence[Views],
    *,
    ranges: Ranges | None = None,
    measured: Spans | None = None,
    reference: onnx.ModelProto | None = None,
) -> onnx.ModelProto:
    """The graph with Q/DQ for TensorRT, calibrated on batches of views (uint8, one picture each).

    Of ``config``, ``operators``, ``reduce_range``, ``even_channels`` and ``stem_columns`` are the
    CPU's affair and not read here.
    ``ranges`` are those a model was trained to round to, made symmetric; ``measured`` are spans
    that were found before, ``reference`` the float graph whose scores the head is corrected to,
    where it is another one. The result passes :func:`~quant.tensorrt.rules.check_tensorrt`; raises
    :class:`ModelError` naming the node where a graph cannot be made so, and ``ValueError`` for an
    empty calibration set.
    """
    if not calibration:
        raise ValueError("calibration needs pictures: the set is empty")
    if config.calibration == "best":
        chosen, _ = choose_for_tensorrt(graph, config, calibration, ranges=ranges)
        return quantize_for_tensorrt(graph, chosen, calibration, ranges=ranges)
    if measured is None and config.calibration != "minmax":
        method = config.calibration
        measured = measured_spans(graph, config, calibration, [method])[method]
    trained = trained_spans(graph, ranges) if ranges is not None else {}
    spans = (measured or {}) | trained | _input_spans(graph)
    ready = onnx.ModelProto()
    ready.CopyFrom(graph)
    lay_out_(ready)
    pictures = calibration if measured is None else calibration[:1]
    quantised = _quantised(ready, config.float_nodes, pictures, spans)
    own_weights_(lay_out_(quantised))
    _refuse_unless_sound(quantised, config.float_nodes)
    if config.correct_head:
        correct_heads_(quantised, reference or graph, calibration)
    return quantised


def tune_and_quantize(
    graph: onnx.ModelProto,
    config: Int8StaticConfig,
    tune: TuneConfig,
    calibration: Sequence[Views],
    batches: Callable[[int], Views],
    *,
    ranges: Ranges | None = None,
    tell: Callable[[str], None] = lambda _: None,
) -> onnx.ModelProto:
    """As :func:`quantize_for_tensorrt`, after the weights have learnt the coarser steps.

    ``batches`` gives the training pictures of a step, ``tell`` hears how far it is. Trained
    ranges, where there are any, or the settings' calibration are where each tensor's scale begins.
    """
    if config.calibration == "best":
        config, _ = choose_for_tensorrt(graph, config, calibration, ranges=ranges)
    method = config.calibration
    assert method != "best"  # it was chosen above
    measured = measured_spans(graph, config, calibration, [method])[method]
    pictures = _input_spans(graph)
    trained = trained_spans(graph, ranges) if ranges is not None else {}
    tuned, spans = tune_for_tensorrt(
        graph,
        tune,
        measured | trained | pictures,
        batches,
        fixed=list(pictures),
        float_nodes=config.float_nodes,
        tell=tell,
    )
    return quantize_for_tensorrt(tuned, config, calibration, measured=spans, reference=graph)


def choose_for_tensorrt(
    graph: onnx.ModelProto,
    config: Int8StaticConfig,
    calibration: Sequence[Views],
    *,
    ranges: Ranges | None = None,
) -> tuple[Int8StaticConfig, dict[str, float]]:
    """The settings with the method of least score error, and each method's error.

    As :func:`~quant.ptq.choose_calibration`, for this target: the mean |delta score| in points of
    0..100 on the calibration pictures. Settings that name a method stay as they are.
    """
    return choose_calibration(graph, config, calibration, ranges=ranges, make=quantize_for_tensorrt)


def _input_spans(graph: onnx.ModelProto) -> Spans:
    """What normalised pictures can hold: 0 to 255 in 8-bit steps."""
    return {
        name: (-mean / std, (255 - mean) / std)
        for name, (mean, std) in normalised_inputs(graph).items()
    }


class _Reader(CalibrationDataReader):  # type: ignore[misc]
    def __init__(self, batches: Sequence[Views]) -> None:
        self._batches: Iterator[Views] = iter(batches)

    def get_next(self) -> Views | None:
        return next(self._batches, None)


def _quantised(
    graph: onnx.ModelProto, float_nodes: Sequence[str], calibration: Sequence[Views], spans: Spans
) -> onnx.ModelProto:
    with tempfile.TemporaryDirectory() as folder:
        source, ready, target = (Path(folder) / n for n in ("f.onnx", "p.onnx", "q.onnx"))
        onnx.save(graph, source)
        quant_pre_process(str(source), str(ready), skip_symbolic_shape=True)
        quantize_static(
            str(ready),
            str(target),
            _Reader(calibration),
            quant_format=QuantFormat.QDQ,
            activation_type=QuantType.QInt8,
            weight_type=QuantType.QInt8,
            per_channel=True,
            op_types_to_quantize=["Conv"],
            nodes_to_exclude=list(float_nodes),
            calibrate_method=CalibrationMethod.MinMax,
            extra_options={
                "ActivationSymmetric": True,
                "OpTypesToExcludeOutputQuantization": ["Conv"],
                "QuantizeBias": False,
                "TensorQuantOverrides": {
                    name: [_symmetric(low, high)] for name, (low, high) in spans.items()
                },
                "WeightSymmetric": True,
            },
        )
        return onnx.load(target)


def _symmetric(low: float, high: float) -> dict[str, Any]:
    """One scale for -127 to 127 that reaches both ends."""
    return {
        "quant_type": QuantType.QInt8,
        "scale": np.array(symmetric_scale(low, high), np.float32),
        "zero_point": np.array(0, np.int8),
    }


def own_weights_(model: onnx.ModelProto) -> None:
    """Give each reader of stored int8 weights its own DequantizeLinear, in place.

    Views that share a trunk share its weights. The bytes stay stored once; the pattern TensorRT
    folds into a convolution is a DequantizeLinear that nothing else reads.
    """
    view = GraphView(model)
    nodes: list[NodeProto] = []
    for node in view.nodes:
        if node.op_type != DEQUANTIZE or not view.is_constant(node.input[0]):
            nodes.append(node)
            continue
        for number, reader in enumerate(view.readers(node.output[0])):
            own = NodeProto.FromString(node.SerializeToString())
            if number:
                own.name, own.output[0] = f"{node.name}_{number}", f"{node.output[0]}_{number}"
                place = list(reader.input).index(node.output[0])
                reader.input[place] = own.output[0]
            nodes.append(own)
    copies = [NodeProto.FromString(n.SerializeToString()) for n in nodes]
    del model.graph.node[:]
    model.graph.node.extend(copies)


def _refuse_unless_sound(graph: onnx.ModelProto, float_nodes: Sequence[str]) -> None:
    """Raise for the first rule broken, and say how many there are."""
    onnx.checker.check_model(graph)
    found = check_tensorrt(graph, float_nodes=float_nodes)
    if found:
        more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        raise ModelError(
            f"{found[0]}{more}: TensorRT would not take or not fuse this graph; "
            "name a convolution that must stay in float in float_nodes"
        )
