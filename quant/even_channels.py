"""Before INT8: every channel of an expanded tensor reaches as far as the tensor's range.

A tensor has one scale, and a channel that reaches a tenth of the range is rounded ten times as
coarsely as it need be. Between a convolution with its ReLU and the depthwise one that reads it, a
channel may be scaled and scaled back at no cost: ReLU keeps factors, and both weights have a scale
of their own for that very channel, so not one of their integers changes (the equalisation of Nagel
et al. 2019, arXiv 1906.04721, section 4.1, where it is exact).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from numpy.typing import NDArray

from quant.calibration import Views
from quant.correction import constant_of, probed_session, replace_constant

_MARK = ".even"
"""Ends the names of scaled tensors: they are not the float graph's any more."""
_SMALLEST_SHARE = 1 / 64
"""Of the range: a channel that hardly speaks is not trusted to stay so."""

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class _Pair:
    """A convolution, named by its weight, that a depthwise one reads; each view may pass both."""

    weight: str
    bias: str
    depthwise_weight: str


def with_even_channels(
    graph: onnx.ModelProto,
    spans: Mapping[str, tuple[float, float]],
    calibration: Sequence[Views],
    *,
    margin: float,
) -> tuple[onnx.ModelProto, dict[str, tuple[float, float]]]:
    """A graph of the same outputs with even channels, and the spans of its tensors.

    A channel's highest value over the calibration pictures, times ``margin``, comes to the upper
    end of its tensor's span; where ``spans`` has none, to that of the widest channel. One that goes
    beyond the end stays as it is, clipped as training clipped it: with coarser steps instead, the
    loudest channels would lose what the others gain.
    """
    pairs = _pairs(graph)
    made = onnx.ModelProto()
    made.CopyFrom(graph)
    highest = _highest(graph, list(pairs), calibration) if pairs else {}
    of_pair: dict[_Pair, Floats] = {}
    for tensor, pair in pairs.items():
        of_pair[pair] = np.maximum(of_pair.get(pair, np.zeros(1)), highest[tensor])
    for pair, reach in of_pair.items():
        tensors = [tensor for tensor, of in pairs.items() if of == pair]
        ends = [spans[tensor][1] for tensor in tensors if tensor in spans]
        end = max(ends, default=margin * float(reach.max()))
        _scale_(made, pair, np.clip(margin * reach / max(end, 1e-12), _SMALLEST_SHARE, 1.0))
    return made, _renamed_(made, set(pairs), spans)


def _pairs(graph: onnx.ModelProto) -> dict[str, _Pair]:
    """The pair around each tensor that nothing but a depthwise convolution reads after its ReLU."""
    makers = {name: node for node in graph.graph.node for name in node.output}
    groups = {t.name: tuple(t.dims) for t in graph.graph.initializer}
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    found = {}
    for relu in (n for n in graph.graph.node if n.op_type == "Relu"):
        conv, after = makers.get(relu.input[0]), readers.get(relu.output[0], [])
        if conv is None or conv.op_type != "Conv" or len(conv.input) != 3 or len(after) != 1:
            continue
        if len(readers[conv.output[0]]) == 1 and _is_depthwise(after[0], groups):
            found[relu.output[0]] = _Pair(conv.input[1], conv.input[2], after[0].input[1])
    return {t: pair for t, pair in found.items() if _is_only_theirs(pair, found, readers)}


def _is_depthwise(node: onnx.NodeProto, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """One filter for each channel."""
    if node.op_type != "Conv":
        return False
    group = next((a.i for a in node.attribute if a.name == "group"), 1)
    shape = shapes.get(node.input[1], ())
    return len(shape) == 4 and shape[1] == 1 and shape[0] == group


def _is_only_theirs(
    pair: _Pair, found: Mapping[str, _Pair], readers: Mapping[str, list[onnx.NodeProto]]
) -> bool:
    """Whether no other node reads the pair's weights: all that do are scaled together."""
    number = sum(of == pair for of in found.values())
    return all(
        len(readers[name]) == number for name in (pair.weight, pair.bias, pair.depthwise_weight)
    )


def _highest(
    graph: onnx.ModelProto, tensors: Sequence[str], calibration: Sequence[Views]
) -> dict[str, Floats]:
    """Each channel's highest value, (C,) for each tensor."""
    session = probed_session(graph, tensors, log_severity=4)
    found = {tensor: np.zeros(1) for tensor in tensors}
    for batch in calibration:
        for tensor, values in zip(tensors, session.run(list(tensors), batch), strict=True):
            found[tensor] = np.maximum(found[tensor], values.max(axis=(0, 2, 3)))
    return found


def _scale_(graph: onnx.ModelProto, pair: _Pair, share: Floats) -> None:
    """Divide what the first convolution gives by ``share`` (C,); multiply where it is read."""
    columns = share[:, None, None, None]
    replace_constant(graph, pair.weight, constant_of(graph, pair.weight) / columns)
    replace_constant(graph, pair.bias, constant_of(graph, pair.bias) / share)
    depthwise = constant_of(graph, pair.depthwise_weight) * columns
    replace_constant(graph, pair.depthwise_weight, depthwise)


def _renamed_(
    graph: onnx.ModelProto, tensors: set[str], spans: Mapping[str, tuple[float, float]]
) -> dict[str, tuple[float, float]]:
    """Mark the scaled tensors and those before their ReLU, in the graph and in its spans."""
    relus = [n for n in graph.graph.node if n.output and n.output[0] in tensors]
    marked = {n: n + _MARK for relu in relus for n in (relu.input[0], relu.output[0])}
    for node in graph.graph.node:
        for names in (node.input, node.output):
            for i, name in enumerate(names):
                names[i] = marked.get(name, name)
    kept = [v for v in graph.graph.value_info if v.name not in marked]
    copies = [onnx.ValueInfoProto.FromString(v.SerializeToString()) for v in kept]
    del graph.graph.value_info[:]
    graph.graph.value_info.extend(copies)
    return {marked.get(name, name): span for name, span in spans.items()}
