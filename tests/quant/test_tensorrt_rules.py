"""The checker of graphs for TensorRT: a good one passes, and each rule has one that breaks it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
pytest.importorskip("torch")

from onnx import helper, numpy_helper  # noqa: E402
from tiny_onnx import pictures, tiny_graph  # noqa: E402

from quant.ptq import Int8StaticConfig  # noqa: E402
from quant.tensorrt.quantize import quantize_for_tensorrt  # noqa: E402
from quant.tensorrt.rules import RULES, check_tensorrt  # noqa: E402


@pytest.fixture(scope="module")
def good():
    """The tiny model's INT8 for TensorRT; not to be changed."""
    return quantize_for_tensorrt(tiny_graph(), Int8StaticConfig(), pictures(4))


def copy_of(model):
    """A copy to break."""
    made = onnx.ModelProto()
    made.CopyFrom(model)
    return made


def node(model, name):
    """The node of that name."""
    return next(n for n in model.graph.node if n.name == name)


def maker(model, tensor):
    """The node that makes a tensor."""
    return next(n for n in model.graph.node if tensor in n.output)


def store(model, name, values):
    """Store a tensor, in place of one of that name."""
    for stored in model.graph.initializer:
        if stored.name == name:
            stored.CopyFrom(numpy_helper.from_array(values, name))
            return
    model.graph.initializer.append(numpy_helper.from_array(values, name))


def values_of(model, name):
    """A stored tensor's values."""
    return numpy_helper.to_array(next(t for t in model.graph.initializer if t.name == name))


def parts(model, conv, operand):
    """DequantizeLinear and, for pictures, QuantizeLinear before an operand of a convolution."""
    dequantize = maker(model, node(model, conv).input[operand])
    return dequantize if operand else (dequantize, maker(model, dequantize.input[0]))


def pair_after(model, source, target):
    """Put QuantizeLinear and DequantizeLinear between a node and its reader."""
    tensor = node(model, source).output[0]
    store(model, "extra.scale", np.array(0.1, np.float32))
    store(model, "extra.zero", np.array(0, np.int8))
    made = [
        helper.make_node(
            "QuantizeLinear", [tensor, "extra.scale", "extra.zero"], ["extra.q"], name="extra_q"
        ),
        helper.make_node(
            "DequantizeLinear", ["extra.q", "extra.scale", "extra.zero"], ["extra"], name="extra_dq"
        ),
    ]
    reader = node(model, target)
    reader.input[list(reader.input).index(tensor)] = "extra"
    model.graph.node.extend(made)


def unknown_kind(model):
    """A Relu of another domain's kind."""
    node(model, "hidden_relu").op_type = "BiasGelu"
    node(model, "hidden_relu").domain = "com.microsoft"
    return "hidden_relu"


def old_opset(model):
    """Operators of before quantisation along an axis."""
    model.opset_import[0].version = 11
    return "the graph"


def bytes_moved_first(model):
    """uint8 pictures transposed before they are cast."""
    cast, transpose = node(model, "cast"), node(model, "transpose")
    transpose.input[0], cast.input[0] = "whole", transpose.output[0]
    return "transpose"


def dynamic_height(model):
    """An input whose height may change."""
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_param = "height"
    return "whole"


def no_kernel_shape(model):
    """A convolution that does not say its kernel's shape."""
    conv = node(model, "project")
    kept = [a for a in conv.attribute if a.name != "kernel_shape"]
    del conv.attribute[:]
    conv.attribute.extend(kept)
    return "project"


def unsigned(model):
    """Activations quantised to uint8."""
    dequantize, quantize = parts(model, "expand", 0)
    for n in (dequantize, quantize):
        n.input[2] = "unsigned.zero"
    store(model, "unsigned.zero", np.array(0, np.uint8))
    return quantize.name


def unsaid_type(model):
    """QuantizeLinear without zero point and type: uint8 by the standard."""
    _, quantize = parts(model, "expand", 0)
    del quantize.input[2]
    return quantize.name


def shifted(model):
    """An asymmetric activation."""
    _, quantize = parts(model, "expand", 0)
    quantize.input[2] = "shifted.zero"
    store(model, "shifted.zero", np.array(3, np.int8))
    return quantize.name


def no_scale(model):
    """A scale of 0."""
    _, quantize = parts(model, "project", 0)
    store(model, quantize.input[1], np.array(0.0, np.float32))
    return quantize.name


def scales_of_activation(model):
    """An activation with a scale for each channel."""
    _, quantize = parts(model, "project", 0)
    store(model, quantize.input[1], np.full(16, 0.1, np.float32))
    return quantize.name


def one_scale_for_weights(model):
    """Weights with one scale for all channels."""
    dequantize = parts(model, "project", 1)
    store(model, dequantize.input[1], np.array(0.1, np.float32))
    return "project"


def lowest_weight(model):
    """A weight of -128."""
    dequantize = parts(model, "project", 1)
    weights = values_of(model, dequantize.input[0]).copy()
    weights.flat[0] = -128
    store(model, dequantize.input[0], weights)
    return "project"


def shared_weights(model):
    """Two convolutions that read one DequantizeLinear."""
    node(model, "project_1").input[1] = node(model, "project").input[1]
    return "project"


def int32_bias(model):
    """A bias that is dequantised."""
    conv = node(model, "stem")
    store(model, "b.q", np.zeros(8, np.int32))
    store(model, "b.s", np.array(0.1, np.float32))
    model.graph.node.append(helper.make_node("DequantizeLinear", ["b.q", "b.s"], ["b"], name="b"))
    conv.input[2] = "b"
    return "stem"


def float_weights(model):
    """A convolution of int8 pictures and float weights."""
    store(model, "float.weight", np.ones((8, 16, 1, 1), np.float32))
    node(model, "project").input[1] = "float.weight"
    return "project"


def float_convolution(model):
    """A convolution left in float without being named."""
    float_weights(model)
    _, quantize = parts(model, "project", 0)
    node(model, "project").input[0] = quantize.input[0]
    return "project"


def unpaired(model):
    """What was quantised is read as it is."""
    _, quantize = parts(model, "project", 0)
    model.graph.node.append(
        helper.make_node("Identity", [quantize.output[0]], ["int8 of project"], name="reads_int8")
    )
    return quantize.name


def twice(model):
    """A pair of Q/DQ after another."""
    dequantize, _ = parts(model, "project", 0)
    pair_after(model, dequantize.name, "project")
    return "extra_q"


def rounded_before_relu(model):
    """Q/DQ between a convolution and its Relu."""
    pair_after(model, "depthwise", "depthwise_relu")
    return "depthwise_relu"


def rounded_before_add(model):
    """Q/DQ between a block's last convolution and its addition."""
    pair_after(model, "project", "add")
    return "add"


def float_shortcut(model):
    """A shortcut that is not rounded."""
    _, quantize = parts(model, "expand", 0)
    node(model, "add").input[0] = quantize.input[0]
    return "add"


def two_precisions(model):
    """A tensor that is read rounded and unrounded."""
    float_shortcut(model)
    return parts(model, "expand", 0)[1].name


BROKEN: list[tuple[str, Callable]] = [
    ("operators", unknown_kind),
    ("opset", old_opset),
    ("uint8 input", bytes_moved_first),
    ("dynamic batch", dynamic_height),
    ("kernel_shape", no_kernel_shape),
    ("int8", unsigned),
    ("int8", unsaid_type),
    ("zero points", shifted),
    ("scales", no_scale),
    ("scales", scales_of_activation),
    ("weights per channel", one_scale_for_weights),
    ("weights per channel", lowest_weight),
    ("weights per channel", shared_weights),
    ("float biases", int32_bias),
    ("both operands", float_weights),
    ("float convolution", float_convolution),
    ("pairs", unpaired),
    ("pairs", twice),
    ("activations", rounded_before_relu),
    ("additions", rounded_before_add),
    ("additions", float_shortcut),
    ("one precision", two_precisions),
]


def test_a_good_graph_breaks_no_rule(good):
    """What the quantiser writes for TensorRT passes."""
    assert check_tensorrt(good) == []


def test_every_rule_has_a_graph_that_breaks_it():
    """No rule is without a broken graph below."""
    assert {rule for rule, _ in BROKEN} == set(RULES)


@pytest.mark.parametrize(("rule", "break_it"), BROKEN, ids=lambda x: getattr(x, "__name__", x))
def test_a_broken_rule_is_named_with_its_node(good, rule, break_it):
    """The rule, and the node that breaks it, are among what is found, in one line."""
    broken = copy_of(good)
    culprit = break_it(broken)
    found = check_tensorrt(broken)
    assert (culprit, rule) in {(v.node, v.rule) for v in found}
    assert all(str(v).startswith(v.node) and "\n" not in str(v) for v in found)


def test_a_named_convolution_may_be_in_float(good):
    """The convolution that is named as left in float is no violation; another one is."""
    broken = copy_of(good)
    name = float_convolution(broken)
    rules = [v.rule for v in check_tensorrt(broken, float_nodes=[name])]
    assert "float convolution" not in rules
    assert "float convolution" in [v.rule for v in check_tensorrt(broken, float_nodes=["stem"])]


def test_a_float_graph_is_asked_for_what_holds_for_all():
    """Of a graph without INT8 the parser's rules are asked alone: the exporter's breaks two."""
    found = check_tensorrt(tiny_graph(), int8=False)
    assert {v.rule for v in found} == {"uint8 input", "kernel_shape"}
    assert len(check_tensorrt(tiny_graph())) > len(found)


def test_int8_for_cpus_is_not_for_tensorrt():
    """ONNX Runtime's flavour breaks the rules of signedness, zero points and biases."""
    from quant.ptq import quantize_onnx

    cpu = quantize_onnx(tiny_graph(), Int8StaticConfig(), pictures(4))
    assert {"int8", "zero points", "float biases"} <= {v.rule for v in check_tensorrt(cpu)}
