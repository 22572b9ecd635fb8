"""Equal constants of Q/DQ nodes, kept once."""

from __future__ import annotations

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")

from onnx import helper, numpy_helper  # noqa: E402

from quant.correction import outputs_of  # noqa: E402
from quant.shared_constants import share_constants_  # noqa: E402

ZEROS = np.zeros(256, np.int32)


def dequantised():
    """Two integer vectors, each with zero points of its own, added to a picture; and a third one
    that an addition reads as it is.
    """
    values = np.arange(256, dtype=np.int32)
    scale = np.full(256, 0.5, np.float32)
    constants = {"a": values, "b": values[::-1].copy(), "plain": scale}
    constants |= {f"{n}_scale": scale for n in "ab"} | {f"{n}_zero": ZEROS for n in "ab"}
    nodes = [
        helper.make_node("DequantizeLinear", [n, f"{n}_scale", f"{n}_zero"], [f"{n}_f"], axis=0)
        for n in "ab"
    ]
    nodes += [
        helper.make_node("Add", ["x", "a_f"], ["s"]),
        helper.make_node("Mul", ["s", "b_f"], ["t"]),
        helper.make_node("Add", ["t", "plain"], ["y"]),
    ]
    x, y = (helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, ["batch", 256]) for n in "xy")
    stored = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    inner = helper.make_graph(nodes, "g", [x], [y], stored)
    return helper.make_model(inner, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


def test_equal_constants_are_kept_once_and_no_bit_changes():
    """Zero points and scales of both vectors become one each; what an addition reads stays its own,
    though its bytes are the scales'; the outputs are the same bits.
    """
    graph = dequantised()
    x = {"x": np.random.default_rng(1).random((3, 256), np.float32)}
    wanted, before = outputs_of(graph, "y", [x]), len(graph.SerializeToString())
    share_constants_(graph)
    onnx.checker.check_model(graph, full_check=True)
    names = {t.name for t in graph.graph.initializer}
    assert names == {"a", "b", "plain", "a_scale", "a_zero"}
    assert len(graph.SerializeToString()) < before - 2 * ZEROS.nbytes
    assert np.array_equal(outputs_of(graph, "y", [x]), wanted)


def test_sharing_twice_changes_nothing():
    """A file that was written once stays byte for byte what it is."""
    graph = dequantised()
    share_constants_(graph)
    once = graph.SerializeToString()
    share_constants_(graph)
    assert graph.SerializeToString() == once
