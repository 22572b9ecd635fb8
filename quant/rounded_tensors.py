"""Where an INT8 graph rounds, by the modules that a student names: :class:`quant.qat.Ranges`."""

from __future__ import annotations

from pathlib import Path

import onnx
from onnx import numpy_helper

from dgiqa_stream.errors import ModelError
from dgiqa_stream.manifest import load_model
from quant.qat import Ranges, load_ranges

_LEVELS = 255
_MAY_BE_YOUNGER = "fragment_trunk."
_CUT_OFF = "trunk.last"
"""The layer that a slim student lacks whose trunk was trained as a whole one."""


def open_ranges(path: Path) -> Ranges:
    """Those of a ``ranges.json`` of ``qat``, or those that an INT8 ``.onnx`` rounds to.

    Raises :class:`ConfigError` where a JSON holds none, :class:`ModelError` for a model without.
    """
    if path.suffix != ".onnx":
        return load_ranges(path)
    return ranges_of(onnx.load(load_model(path).path))


def trained_spans(graph: onnx.ModelProto, ranges: Ranges) -> dict[str, tuple[float, float]]:
    """Lowest and highest value in training of each tensor that has trained ranges.

    A convolution is known by its weight, an addition by its last operand's convolution: the
    projection that ends its block. A fragment trunk, which may be younger than the ranges, is
    measured where they have nothing of it.
    """
    makers = {name: node for node in graph.graph.node for name in node.output}
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    spans: dict[str, tuple[float, float]] = {}
    used: set[str] = set()
    for node in graph.graph.node:
        if node.op_type == "Conv":
            module, known = node.input[1].removesuffix(".weight"), ranges.conv
        elif node.op_type == "Add" and makers[node.input[1]].op_type == "Conv":
            weight = makers[node.input[1]].input[1]
            module, known = weight.removesuffix(".weight").rpartition(".")[0], ranges.add
        else:
            continue
        if module not in known and module.startswith(_MAY_BE_YOUNGER):
            continue
        if module not in known:
            raise ValueError(f"ranges hold none of {module!r}: they come from another model")
        used.add(module)
        spans[node.output[0]] = known[module]
        for reader in readers.get(node.output[0], []):
            if reader.op_type == "Relu":
                spans[reader.output[0]] = known[module]
    unused = {*ranges.conv, *ranges.add} - used - {_CUT_OFF}
    if unused:
        raise ValueError(f"the graph lacks {sorted(unused)[0]!r} of the ranges: another model's")
    return spans


def ranges_of(graph: onnx.ModelProto) -> Ranges:
    """The ranges that an INT8 graph rounds to: what :func:`trained_spans` reads, back again.

    For a student whose trunk is that of a quantised one, whose ranges were trained. Raises
    :class:`ModelError` where no convolution of the graph is quantised.
    """
    makers = {name: node for node in graph.graph.node for name in node.output}
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    stored = {t.name: t for t in graph.graph.initializer}
    conv: dict[str, tuple[float, float]] = {}
    add: dict[str, tuple[float, float]] = {}
    for node in graph.graph.node:
        if node.op_type not in ("Conv", "Add"):
            continue
        quantise = _quantise_after(node.output[0], readers)
        if quantise is None:
            continue
        scale, zero = (numpy_helper.to_array(stored[name]) for name in quantise.input[1:3])
        low, high = (float(scale) * (level - int(zero)) for level in (0, _LEVELS))
        if node.op_type == "Conv":
            conv[_module_of(node, makers)] = low, high
        elif (last := _conv_before(node.input[1], makers)) is not None:
            add[_module_of(last, makers).rpartition(".")[0]] = low, high
    if not conv:
        raise ModelError("the graph has no quantised convolution: give an INT8 file")
    return Ranges(conv=conv, add=add)


def _quantise_after(name: str, readers: dict[str, list[onnx.NodeProto]]) -> onnx.NodeProto | None:
    """What rounds a tensor, or what its ReLU gives."""
    for reader in readers.get(name, []):
        if reader.op_type == "QuantizeLinear":
            return reader
        if reader.op_type == "Relu":
            return _quantise_after(reader.output[0], readers)
    return None


def _conv_before(name: str, makers: dict[str, onnx.NodeProto]) -> onnx.NodeProto | None:
    """The convolution whose rounded output a tensor is; None where it is another's."""
    node = makers.get(name)
    while node is not None and node.op_type in ("DequantizeLinear", "QuantizeLinear"):
        node = makers.get(node.input[0])
    return node if node is not None and node.op_type == "Conv" else None


def _module_of(conv: onnx.NodeProto, makers: dict[str, onnx.NodeProto]) -> str:
    """``trunk.stem`` of a convolution whose weight was ``trunk.stem.weight`` before."""
    return makers[conv.input[1]].input[0].partition(".weight")[0]
