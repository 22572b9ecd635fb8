"""FP16 and BF16 for GPUs: types said in the graph, as strongly typed engines read them.

ONNX Runtime's converter (``onnxruntime.transformers.float16``; onnxconverter-common has an older
copy, and ModelOpt's AutoCast pins versions of onnx and onnxruntime that are behind) decides where
FP16 is. It has no BF16; that takes the same places, with weights rounded from float32 once.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Literal

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper, version_converter

from dgiqa_stream.errors import ConfigError, ModelError
from quant.tensorrt.graph_view import DEQUANTIZE, QUANTIZE, attribute
from quant.tensorrt.layout import lay_out_

Half = Literal["fp16", "bf16"]
_LARGEST = {"fp16": 65504.0, "bf16": 3.3895e38}
_BF16_OPSET = 22  # the first whose convolution may be in bfloat16


def to_half(
    graph: onnx.ModelProto, kind: Half, *, float_nodes: Sequence[str] = ()
) -> onnx.ModelProto:
    """The graph in half precision; inputs stay uint8 and outputs float32.

    Nodes named in ``float_nodes`` stay in float32. Raises :class:`ModelError` for a graph with Q/DQ
    and for one whose weights are beyond the type's range, :class:`ConfigError` for an unknown name.
    """
    quantised = next((n for n in graph.graph.node if n.op_type in (QUANTIZE, DEQUANTIZE)), None)
    if quantised is not None:
        raise ModelError(
            f"node {quantised.name!r} is a {quantised.op_type}: "
            f"{kind} is made from the float model, not from INT8"
        )
    _refuse_overflow(graph, kind)
    ready = onnx.ModelProto()
    ready.CopyFrom(graph)
    lay_out_(ready)
    unknown = sorted(set(float_nodes) - {node.name for node in ready.graph.node})
    if unknown:
        raise ConfigError(f"the graph has no node {unknown[0]!r} to leave in float32")
    made = _converted(ready, list(float_nodes))
    if kind == "bf16":
        made = _as_bf16(made, graph)
    onnx.checker.check_model(made, full_check=True)
    return made


def _refuse_overflow(graph: onnx.ModelProto, kind: Half) -> None:
    for stored in graph.graph.initializer:
        if stored.data_type != TensorProto.FLOAT:
            continue
        largest = float(np.abs(numpy_helper.to_array(stored)).max(initial=0.0))
        if largest > _LARGEST[kind]:
            raise ModelError(
                f"weight {stored.name!r} reaches {largest:.3g}, beyond the {_LARGEST[kind]:g} of "
                f"{kind}: use bf16 or fp32"
            )


def _converted(graph: onnx.ModelProto, float_nodes: list[str]) -> onnx.ModelProto:
    """FP16 by ONNX Runtime's converter."""
    from onnxruntime.transformers.float16 import convert_float_to_float16

    with warnings.catch_warnings():
        # it warns of each weight below 6e-8, which is rounded to the smallest number: no harm
        warnings.simplefilter("ignore")
        made: onnx.ModelProto = convert_float_to_float16(
            graph, keep_io_types=True, node_block_list=float_nodes
        )
    _sort_(made)
    return made


def _sort_(model: onnx.ModelProto) -> None:
    """Put every node after what it reads: the converter adds its casts at the end."""
    ready = {i.name for i in model.graph.input} | {t.name for t in model.graph.initializer} | {""}
    waiting = [onnx.NodeProto.FromString(n.SerializeToString()) for n in model.graph.node]
    in_order: list[onnx.NodeProto] = []
    while waiting:
        node = next(n for n in waiting if ready.issuperset(n.input))
        waiting.remove(node)
        in_order.append(node)
        ready |= set(node.output)
    del model.graph.node[:]
    model.graph.node.extend(in_order)


def _as_bf16(made: onnx.ModelProto, original: onnx.ModelProto) -> onnx.ModelProto:
    """FP16's places as BF16; weights are rounded from the original's float32."""
    full = {t.name: t for t in original.graph.initializer}
    for stored in made.graph.initializer:
        if stored.data_type == TensorProto.FLOAT16:
            values = numpy_helper.to_array(full.get(stored.name, stored)).astype(np.float32)
            stored.CopyFrom(_bf16_tensor(stored.name, values))
    for node in made.graph.node:
        if node.op_type == "Cast" and attribute(node, "to") == TensorProto.FLOAT16:
            del node.attribute[:]
            node.attribute.append(helper.make_attribute("to", TensorProto.BFLOAT16))
    del made.graph.value_info[:]  # types of before; the checker finds the new ones
    return version_converter.convert_version(made, _BF16_OPSET)


def _bf16_tensor(name: str, values: np.ndarray) -> TensorProto:
    """float32 rounded to the nearest bfloat16, ties to even."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return helper.make_tensor(name, TensorProto.BFLOAT16, values.shape, rounded.tobytes(), raw=True)
