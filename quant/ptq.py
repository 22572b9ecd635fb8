"""Post-training INT8: ONNX Runtime's static Q/DQ for CPUs with 8-bit dot products.

uint8 activations per tensor, int8 weights per channel (signed activations run an order of magnitude
slower on x86 in ONNX Runtime). The picture's own bytes are the first quantised tensor: input
normalisation is one scale and one zero point, so quantising it loses nothing and the nodes that
would make floats of the picture are removed.
"""

from __future__ import annotations

import tempfile
import tomllib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import numpy as np
import onnx
from onnx import numpy_helper
from onnxruntime.quantization import (
    CalibrationDataReader,
    CalibrationMethod,
    QuantFormat,
    QuantType,
    quantize_static,
)
from onnxruntime.quantization.shape_inference import quant_pre_process

from dgiqa_stream.errors import ConfigError
from quant.calibration import CalibrationConfig, Views
from quant.calibration_methods import METHODS, Method, Spans, activation_spans
from quant.correction import outputs_of
from quant.even_channels import with_even_channels
from quant.extra_outputs import correct_heads_
from quant.fragments import FragmentsConfig
from quant.head import HeadConfig
from quant.qat import QatConfig, Ranges
from quant.rounded_tensors import trained_spans
from quant.sure import SureConfig
from quant.tensorrt.tuning import TuneConfig
from quant.wide_stem import widen_stem_

_NOT_BYTES = "the graph must begin by Cast, Sub, Div of uint8 pictures"


class Int8StaticConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How a float graph becomes INT8. Saved in the artefact's manifest."""

    calibration: Literal["minmax", "percentile", "entropy", "mse", "best"] = "minmax"
    """How ranges are measured; ``best`` tries the four and takes the one whose scores are nearest
    to the float model's on the calibration pictures."""
    percentile: Annotated[float, msgspec.Meta(gt=50, le=100)] = 99.999
    """Of ``percentile``: the share of values, in per cent, that lies inside."""
    operators: tuple[str, ...] = ("Conv", "Relu", "Add")
    """Kinds of node whose inputs and outputs are quantised; pooling and head stay in float."""
    float_nodes: tuple[str, ...] = ()
    """Names of nodes left in float."""
    reduce_range: bool = False
    """7-bit weights: only for x86 without VNNI, where 16-bit sums could saturate."""
    correct_head: bool = True
    """Regress float features on quantised ones and fold the lines into the float head."""
    even_channels: Annotated[float, msgspec.Meta(ge=0)] = 0.0
    """How far above its highest value in calibration, as a factor, each channel that a depthwise
    convolution reads may reach: each has the steps of its tensor to itself. 0 leaves them."""
    stem_columns: Annotated[int, msgspec.Meta(ge=1, le=16)] = 1
    """Columns that a view's first convolution computes at once: the same bits, sooner."""
    version: int = 4


class Int8Recipe(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One INT8 artefact: what it is calibrated on and how it is quantised."""

    calibration: CalibrationConfig = CalibrationConfig()
    qat: QatConfig = QatConfig()
    quantize: Int8StaticConfig = Int8StaticConfig()
    fragments: FragmentsConfig = FragmentsConfig()
    """Of ``fragments`` alone."""
    head: HeadConfig = HeadConfig()
    sure: SureConfig = SureConfig()
    tune: TuneConfig = TuneConfig()
    """Of ``--target tensorrt`` alone."""


def load_int8_config(path: Path) -> Int8Recipe:
    """Read a recipe; every key must be known."""
    try:
        return msgspec.convert(tomllib.loads(path.read_text(encoding="utf-8")), Int8Recipe)
    except FileNotFoundError as exc:
        raise ConfigError(f"no recipe at {path}: give a file of configs/quant/") from exc
    except (msgspec.ValidationError, tomllib.TOMLDecodeError, UnicodeDecodeError) as exc:
        raise ConfigError(f"{path}: {exc}") from exc


class _Reader(CalibrationDataReader):  # type: ignore[misc]
    def __init__(self, batches: Sequence[Views]) -> None:
        self._batches: Iterator[Views] = iter(batches)

    def get_next(self) -> Views | None:
        return next(self._batches, None)


def quantize_onnx(
    graph: onnx.ModelProto,
    config: Int8StaticConfig,
    calibration: Sequence[Views],
    *,
    ranges: Ranges | None = None,
    measured: Spans | None = None,
) -> onnx.ModelProto:
    """The INT8 graph of a float one, calibrated on batches of views (uint8, one picture each).

    ``ranges`` are those the model was trained to round to; other tensors are measured.
    ``measured`` are spans that :func:`~quant.calibration_methods.activation_spans` found before:
    they save measuring them again.
    """
    if not calibration:
        raise ValueError("calibration needs pictures: the set is empty")
    if config.calibration == "best":
        chosen, _ = choose_calibration(graph, config, calibration, ranges=ranges)
        return quantize_onnx(graph, chosen, calibration, ranges=ranges)
    exact = _exact_inputs(graph)
    normalised = list(exact)
    if measured is None and config.calibration != "minmax":
        measured = measured_spans(graph, config, calibration, [config.calibration])[
            config.calibration
        ]
    known = dict(measured or {}) | (trained_spans(graph, ranges) if ranges is not None else {})
    reference = graph
    if config.even_channels:
        graph, known = with_even_channels(graph, known, calibration, margin=config.even_channels)
    overrides = {name: [_exact_range(*span)] for name, span in known.items()} | exact
    with tempfile.TemporaryDirectory() as folder:
        source, ready, target = (Path(folder) / n for n in ("f.onnx", "p.onnx", "q.onnx"))
        onnx.save(graph, source)
        quant_pre_process(str(source), str(ready), skip_symbolic_shape=True)
        quantize_static(
            str(ready),
            str(target),
            _Reader(calibration if measured is None else calibration[:1]),
            quant_format=QuantFormat.QDQ,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            per_channel=True,
            reduce_range=config.reduce_range,
            op_types_to_quantize=list(config.operators),
            nodes_to_exclude=list(config.float_nodes),
            calibrate_method=CalibrationMethod.MinMax,
            extra_options={"TensorQuantOverrides": overrides},
        )
        quantised = onnx.load(target)
    result = _take_bytes(quantised, normalised)
    if config.stem_columns > 1:
        widen_stem_(result, config.stem_columns)
    if config.correct_head:
        correct_heads_(result, reference, calibration)
    return result


def measured_spans(
    graph: onnx.ModelProto,
    config: Int8StaticConfig,
    calibration: Sequence[Views],
    methods: Sequence[Method],
) -> dict[Method, Spans]:
    """Spans by each method of every tensor that the settings quantise."""
    return activation_spans(
        graph,
        calibration,
        methods,
        operators=config.operators,
        percentile=config.percentile,
    )


def choose_calibration(
    graph: onnx.ModelProto,
    config: Int8StaticConfig,
    calibration: Sequence[Views],
    *,
    ranges: Ranges | None = None,
    make: Callable[..., onnx.ModelProto] | None = None,
) -> tuple[Int8StaticConfig, dict[str, float]]:
    """The settings with the method of least score error, and each method's error.

    The error is the mean |delta score|, in points of 0..100, on the calibration pictures: those
    hold black, noise and letterboxed ones. Settings that name a method stay as they are.
    ``make`` quantises, as :func:`quantize_onnx` does unless another is given.
    """
    if config.calibration != "best":
        return config, {}
    spans = measured_spans(graph, config, calibration, METHODS)
    quality = graph.graph.output[0].name
    wanted = outputs_of(graph, quality, calibration)
    tried: dict[Method, Int8StaticConfig] = {}
    errors: dict[str, float] = {}
    for method in METHODS:
        tried[method] = msgspec.structs.replace(config, calibration=method)
        made = (make or quantize_onnx)(
            graph, tried[method], calibration, ranges=ranges, measured=spans[method]
        )
        found = outputs_of(made, quality, calibration)
        errors[method] = float(100 * np.abs(found - wanted).mean())
    return tried[min(METHODS, key=lambda method: errors[method])], errors


def _exact_range(low: float, high: float) -> dict[str, Any]:
    """Scale and zero point as quantisation-aware training had them."""
    low, high = min(low, 0.0), max(high, 0.0)
    scale = max((high - low) / 255, 1e-8)
    return {
        "quant_type": QuantType.QUInt8,
        "scale": np.array(scale, np.float32),
        "zero_point": np.array(min(max(round(-low / scale), 0), 255), np.uint8),
    }


def _exact_inputs(graph: onnx.ModelProto) -> dict[str, list[dict[str, Any]]]:
    """The normalised pictures' tensors, with the scale and zero point that lose nothing of them."""
    return {
        name: [
            {
                "quant_type": QuantType.QUInt8,
                "scale": np.array(1.0 / std, np.float32),
                "zero_point": np.array(mean, np.uint8),
            }
        ]
        for name, (mean, std) in normalised_inputs(graph).items()
    }


def normalised_inputs(graph: onnx.ModelProto) -> dict[str, tuple[int, float]]:
    """The tensors that hold normalised pictures, with the mean and deviation in 8-bit steps."""
    constants = {t.name: numpy_helper.to_array(t) for t in graph.graph.initializer}
    by_input = {node.input[0]: node for node in graph.graph.node if node.input}
    found = {}
    for cast in (n for n in graph.graph.node if n.op_type == "Cast"):
        sub = by_input.get(cast.output[0])
        div = by_input.get(sub.output[0]) if sub else None
        if sub is None or div is None or (sub.op_type, div.op_type) != ("Sub", "Div"):
            raise ValueError(_NOT_BYTES)
        mean, std = (float(constants[node.input[1]]) for node in (sub, div))
        if not mean.is_integer() or not 0 <= mean <= 255:
            raise ValueError(f"the input mean {mean} must be a whole number of 8-bit steps")
        found[div.output[0]] = (int(mean), std)
    if not found:
        raise ValueError(_NOT_BYTES)
    return found


def _take_bytes(graph: onnx.ModelProto, normalised: Sequence[str]) -> onnx.ModelProto:
    """Feed the pictures' bytes to the first DequantizeLinear; drop Cast, Sub, Div, Quantize.

    Where a view's first convolution is left in float, they stay.
    """
    makers = {out: node for node in graph.graph.node for out in node.output}
    dropped: set[int] = set()
    for name in normalised:
        of_name = (n for n in graph.graph.node if n.op_type == "QuantizeLinear")
        quantize = next((n for n in of_name if n.input[0] == name), None)
        if quantize is None:
            continue  # the convolution that reads it is left in float
        div = makers[name]
        sub = makers[div.input[0]]
        cast = makers[sub.input[0]]
        for node in graph.graph.node:
            for i, read in enumerate(node.input):
                if read == quantize.output[0]:
                    node.input[i] = cast.input[0]
        dropped |= {id(n) for n in (cast, sub, div, quantize)}
    kept = [n for n in graph.graph.node if id(n) not in dropped]
    del graph.graph.node[:]
    graph.graph.node.extend(kept)
    used = {name for node in kept for name in node.input}
    constants = [t for t in graph.graph.initializer if t.name in used]
    del graph.graph.initializer[:]
    graph.graph.initializer.extend(constants)
    onnx.checker.check_model(graph)
    return graph
