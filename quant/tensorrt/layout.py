"""What TensorRT needs of any graph, whatever its precision, done without moving a number."""

from __future__ import annotations

import onnx
from onnx import NodeProto, TensorProto, helper

from quant.tensorrt.graph_view import CONVOLUTIONS, GraphView, attribute


def lay_out_(model: onnx.ModelProto) -> onnx.ModelProto:
    """Make a graph one that TensorRT's parser takes, in place; its numbers stay what they were.

    Bytes become floats before anything else touches them (TensorRT has uint8 at the edge of a
    network alone), every convolution says its ``kernel_shape`` (the dynamo exporter may leave it
    out, and with dequantised weights the parser cannot look it up), and operator sets that no node
    uses are no longer declared.
    """
    _cast_first_(model)
    _write_kernel_shapes_(model)
    used = {node.domain or "" for node in model.graph.node}
    kept = [o for o in model.opset_import if (o.domain or "") in used]
    del model.opset_import[:]
    model.opset_import.extend(helper.make_opsetid(o.domain, o.version) for o in kept)
    return model


def _cast_first_(model: onnx.ModelProto) -> None:
    """Transpose(uint8) then Cast becomes Cast then Transpose, where the bytes come from outside."""
    for value in model.graph.input:
        if value.type.tensor_type.elem_type != TensorProto.UINT8:
            continue
        view = GraphView(model)
        transposes = [n for n in view.readers(value.name) if n.op_type == "Transpose"]
        readers = view.readers(transposes[0].output[0]) if len(transposes) == 1 else []
        if len(readers) == 1 and readers[0].op_type == "Cast":
            _swap_(view, transposes[0], readers[0])


def _swap_(view: GraphView, transpose: NodeProto, cast: NodeProto) -> None:
    source, between, target = transpose.input[0], transpose.output[0], cast.output[0]
    graph = view.model.graph
    known = [v for v in graph.value_info if v.name != between]  # its type is another one now
    copies = [onnx.ValueInfoProto.FromString(v.SerializeToString()) for v in known]
    del graph.value_info[:]
    graph.value_info.extend(copies)
    cast.input[0], cast.output[0] = source, between
    transpose.input[0], transpose.output[0] = between, target
    places = [next(i for i, n in enumerate(view.nodes) if n is x) for x in (transpose, cast)]
    nodes = list(view.nodes)
    nodes[places[0]], nodes[places[1]] = cast, transpose
    in_order = [NodeProto.FromString(n.SerializeToString()) for n in nodes]
    del graph.node[:]
    graph.node.extend(in_order)


def _write_kernel_shapes_(model: onnx.ModelProto) -> None:
    view = GraphView(model)
    for node in view.of_kind(*CONVOLUTIONS):
        shape = view.weight_shape(node)
        if shape is not None and attribute(node, "kernel_shape") is None:
            node.attribute.append(helper.make_attribute("kernel_shape", list(shape[2:])))
