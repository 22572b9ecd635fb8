"""Weights of a float head, kept as INT8 in the file."""

from __future__ import annotations

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")

from hypothesis import given  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from onnx import helper, numpy_helper  # noqa: E402

from quant.correction import constant_of, outputs_of  # noqa: E402
from quant.narrow import narrow_, on_grid, widen_  # noqa: E402


def dense(weight):
    """A graph of one dense layer and a Relu: features (N, C) to (N, R)."""
    stored = [
        numpy_helper.from_array(weight.astype(np.float32), "w"),
        numpy_helper.from_array(np.ones(len(weight), np.float32), "b"),
    ]
    nodes = [
        helper.make_node("Gemm", ["x", "w", "b"], ["h"], transB=1),
        helper.make_node("Relu", ["h"], ["y"]),
    ]
    x = helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["batch", weight.shape[1]])
    y = helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["batch", len(weight)])
    inner = helper.make_graph(nodes, "dense", [x], [y], stored)
    return helper.make_model(inner, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


@given(seed=st.integers(0, 2**32 - 1), exponent=st.integers(-30, 30))
def test_a_weight_moves_by_a_share_of_its_columns_largest(seed, exponent):
    """However uneven the features are: a step is at most 2/127 of the power of two below a
    column's largest weight (a 32,768th of it beyond, which the step's spare bits cost), and a
    weight that is rounded twice moves by a step at most. What lies on the grid stays, as float32
    as well.
    """
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal((5, 240)) * 2.0**exponent * 2.0 ** rng.uniform(-8, 8, (1, 240))
    weight[2] = 0
    weight[:, 3] = 0
    snapped = on_grid(weight)
    largest = np.abs(weight).max(0)
    assert (np.abs(snapped - weight) <= 2 / 127 * (1 + 2**-15) * largest).all()
    assert np.array_equal(snapped.astype(np.float32), snapped)
    assert np.array_equal(on_grid(snapped), snapped)


def test_the_file_shrinks_and_nothing_else_changes():
    """Narrowed, a layer takes less than a third of the bytes and gives the same bits; widened, its
    graph is what it was.
    """
    rng = np.random.default_rng(1)
    graph = dense(on_grid(rng.standard_normal((48, 200)) * 2.0 ** rng.uniform(-8, 8, 200)))
    before, features = graph.SerializeToString(), {"x": rng.random((7, 200), np.float32)}
    wanted = outputs_of(graph, "y", [features])
    narrow_(graph)
    onnx.checker.check_model(graph, full_check=True)
    assert len(graph.SerializeToString()) < len(before) / 3
    assert np.array_equal(outputs_of(graph, "y", [features]), wanted)
    widen_(graph)
    assert [n.op_type for n in graph.graph.node] == ["Gemm", "Relu"]
    assert np.array_equal(constant_of(graph, "w"), constant_of(onnx.load_from_string(before), "w"))
    assert len(graph.graph.initializer) == 2


@pytest.mark.parametrize("shape", [(48, 200), (2, 3)])
def test_other_weights_stay_as_they_are(shape):
    """A layer whose weights lie on no grid is not touched, nor is one of a few weights, which keep
    their floats.
    """
    weight = np.random.default_rng(2).standard_normal(shape)
    graph = dense(weight if weight.size > 1024 else on_grid(weight))
    assert np.array_equal(constant_of(graph, "w"), weight.astype(np.float32))
    before = graph.SerializeToString()
    narrow_(graph)
    assert graph.SerializeToString() == before
