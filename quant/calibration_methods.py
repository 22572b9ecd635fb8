"""Ranges of activations from histograms: percentile, entropy, MSE; and the best of all by score.

ONNX Runtime's own calibrators keep every activation of every picture in memory, tens of gigabytes
for a few hundred pictures. Here each picture's are put into ONNX Runtime's histograms and dropped;
percentile and entropy are then its own rules. MSE it does not have: the clipping that minimises the
squared error of 256 even steps over the histogram (Sung et al. 2015, arXiv 1511.06488, section 3).
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import onnx
from numpy.typing import NDArray
from onnxruntime.quantization.calibrate import HistogramCollector

from dgiqa_stream.scorer import is_flat
from quant.calibration import Views
from quant.correction import probed_session

Method = Literal["minmax", "percentile", "entropy", "mse"]
METHODS: tuple[Method, ...] = ("minmax", "percentile", "entropy", "mse")
Spans = dict[str, tuple[float, float]]
"""Lowest and highest value of each tensor."""
FEWEST_PICTURES = 8
_LEVELS = 256
_NUM_BINS = 2048
_ENTROPY_BINS, _ENTROPY_STEPS = 512, 128
_CLIPS = tuple(np.geomspace(0.05, 1.0, 60))
"""Shares of either end that the MSE rule tries, largest last."""
_NUM_TURNS = 2


def refuse_useless(calibration: Sequence[Views]) -> None:
    """Raise ``ValueError`` for a set that is empty, too small or mostly of one colour.

    Ranges measured on it would clip what real pictures bring.
    """
    if len(calibration) < FEWEST_PICTURES:
        raise ValueError(
            f"calibration has {len(calibration)} pictures and {FEWEST_PICTURES} are the fewest: "
            "give packs with more"
        )
    flat = sum(is_flat(view[0] for view in batch.values()) for batch in calibration)
    if 2 * flat > len(calibration):
        raise ValueError(
            f"{flat} of {len(calibration)} calibration pictures are of one colour, black perhaps: "
            "give packs of real pictures"
        )


def activation_spans(
    graph: onnx.ModelProto,
    calibration: Sequence[Views],
    methods: Sequence[Method],
    *,
    operators: Sequence[str],
    percentile: float,
) -> dict[Method, Spans]:
    """Spans by each method of what nodes of some kinds read and give.

    The pictures are passed once for the extremes and, but for ``minmax``, once for histograms
    between them. What feeds a ReLU alone gets the ReLU's span: both are one node in integers.
    """
    tensors = _activations(graph, operators)
    session = probed_session(graph, tensors, log_severity=4)

    def runs() -> Iterator[dict[str, Any]]:
        for batch in calibration:
            yield dict(zip(tensors, session.run(tensors, batch), strict=True))

    extremes = _extremes(runs())
    named = {str("percentile" if m == "mse" else m) for m in methods if m != "minmax"}
    collectors = {name: _collector(name, extremes, percentile) for name in named}
    with contextlib.redirect_stdout(io.StringIO()):  # the collectors tell of each picture
        for values in runs() if collectors else ():
            for collector in collectors.values():
                collector.collect(values)
        found = {method: _spans(method, extremes, collectors) for method in methods}
    return {method: _through_relus(graph, spans) for method, spans in found.items()}


def _extremes(runs: Iterable[dict[str, Any]]) -> Spans:
    found: Spans = {}
    for values in runs:
        for name, value in values.items():
            low, high = float(value.min()), float(value.max())
            before = found.get(name, (low, high))
            found[name] = min(before[0], low), max(before[1], high)
    return found


def _collector(method: str, extremes: Spans, percentile: float) -> HistogramCollector:
    """ONNX Runtime's, its bins between the extremes.

    By itself it takes the first picture's and adds bins of that width: millions where the first is
    nearly black.
    """
    num_bins, num_steps = {
        "percentile": (_NUM_BINS, _LEVELS),
        "entropy": (_ENTROPY_BINS, _ENTROPY_STEPS),
    }[method]
    made = HistogramCollector(method, False, num_bins, num_steps, percentile, "")
    for name, span in extremes.items():
        low, high = (np.float32(end) for end in span)
        reach = np.float32(max(abs(low), abs(high)))
        counts, edges = np.histogram([], num_bins, range=(-float(reach), float(reach)))
        made.histogram_dict[name] = (counts, edges, low, high, reach)
    return made


def _spans(method: Method, extremes: Spans, collectors: Mapping[str, Any]) -> Spans:
    if method == "minmax":
        return extremes
    if method == "mse":
        histograms = collectors["percentile"].histogram_dict
        return {
            name: mse_span(h[0], h[1], float(h[2]), float(h[3])) for name, h in histograms.items()
        }
    found = collectors[method].compute_collection_result()
    return {name: (float(span[0]), float(span[1])) for name, span in found.items()}


def mse_span(
    counts: NDArray[np.int64], edges: NDArray[np.float64], lowest: float, highest: float
) -> tuple[float, float]:
    """The span whose 256 even steps, 0 among them, lose least of a histogram's values.

    ``counts`` (B,) lie between ``edges`` (B + 1,). Each end of the range of values is clipped in
    turn, as an outlier on one side says nothing of the other.
    """
    centres = (edges[:-1] + edges[1:]) / 2
    kept = counts > 0
    values, weights = centres[kept], counts[kept].astype(np.float64)
    low, high = min(lowest, 0.0), max(highest, 0.0)

    def error(span: tuple[float, float]) -> float:
        return _rounding_error(values, weights, *span)

    for _ in range(_NUM_TURNS):
        high = min(
            ((low, highest * share) for share in _CLIPS if highest > 0),
            key=error,
            default=(low, high),
        )[1]
        low = min(
            ((lowest * share, high) for share in _CLIPS if lowest < 0),
            key=error,
            default=(low, high),
        )[0]
    return float(low), float(high)


def _rounding_error(
    values: NDArray[np.float64], weights: NDArray[np.float64], low: float, high: float
) -> float:
    step = (high - low) / (_LEVELS - 1)
    if step == 0:
        return float((weights * np.square(values)).sum())
    zero = np.round(-low / step)
    steps = np.clip(np.round(values / step) + zero, 0, _LEVELS - 1)
    return float((weights * np.square((steps - zero) * step - values)).sum())


def _activations(graph: onnx.ModelProto, operators: Sequence[str]) -> list[str]:
    constants = {t.name for t in graph.graph.initializer}
    found: dict[str, None] = {}
    for node in graph.graph.node:
        if node.op_type in operators:
            read = [n for n in node.input if n and n not in constants]
            found |= dict.fromkeys([*read, *node.output])
    return list(found)


def _through_relus(graph: onnx.ModelProto, spans: Spans) -> Spans:
    num_readers: dict[str, int] = {}
    for node in graph.graph.node:
        for name in node.input:
            num_readers[name] = num_readers.get(name, 0) + 1
    found = dict(spans)
    for node in graph.graph.node:
        source = node.input[0] if node.input else ""
        if node.op_type == "Relu" and num_readers[source] == 1 and node.output[0] in spans:
            found[source] = spans[node.output[0]]
    return found
