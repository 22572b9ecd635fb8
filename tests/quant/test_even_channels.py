"""Channels scaled to their tensor's range before INT8."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

onnx = pytest.importorskip("onnx")

from onnx import helper  # noqa: E402

from quant.correction import constant_of, outputs_of, replace_constant  # noqa: E402
from quant.even_channels import with_even_channels  # noqa: E402
from quant.ptq import Int8StaticConfig, quantize_onnx  # noqa: E402

MARGIN = 1.2


@pytest.fixture(scope="module")
def uneven(tiny):
    """The small model with channels of very different reach between its 1x1 and its depthwise."""
    made = onnx.ModelProto.FromString(tiny.SerializeToString())
    factors = np.geomspace(1, 1 / 16, 16)
    for name in ("expand.weight", "expand.bias"):
        value = constant_of(made, name)
        replace_constant(made, name, value * factors.reshape(-1, *[1] * (value.ndim - 1)))
    wide = constant_of(made, "depthwise.weight") / factors[:, None, None, None]
    replace_constant(made, "depthwise.weight", wide)
    return made


def test_the_float_outputs_stay(uneven, tiny_batches):
    """Scaled and scaled back, the qualities are those of the graph before, but for float32."""
    made, _ = with_even_channels(uneven, {}, tiny_batches[:16], margin=MARGIN)
    found, wanted = (outputs_of(g, "quality", tiny_batches) for g in (made, uneven))
    np.testing.assert_allclose(found, wanted, atol=2e-6)


def reach(graph, names, batches):
    """Each channel's highest value, over views and pictures."""
    return np.max([outputs_of(graph, name, batches).max((0, 2, 3)) for name in names], 0)


def test_every_channel_reaches_as_far_as_the_widest(uneven, tiny_batches):
    """Over both views and all calibration pictures, channels that differed tenfold and more
    have one highest value; the marked tensors keep their spans.
    """
    part = tiny_batches[:16]
    before = reach(uneven, ("er", "er_1"), part)
    assert before[before > 0].min() < before.max() / 10
    made, _ = with_even_channels(uneven, {}, part, margin=MARGIN)
    highest = reach(made, ("er.even", "er_1.even"), part)
    assert highest[before > 0] == pytest.approx(before.max(), rel=1e-5)


def test_a_channel_beyond_the_range_stays(uneven, tiny_batches):
    """Of a span that ends at half of the widest channel's reach, channels that reach further are as
    they were; the others come to its end, less the margin.
    """
    part = tiny_batches[:16]
    before = reach(uneven, ("er", "er_1"), part)
    end = float(before.max() / 2)
    spans = {"er": (0.0, end), "er_1": (0.0, end), "dr": (0.0, 5.0)}
    made, found = with_even_channels(uneven, spans, part, margin=MARGIN)
    assert found == {"er.even": (0.0, end), "er_1.even": (0.0, end), "dr": (0.0, 5.0)}
    wanted = np.maximum(before, end / MARGIN)
    at = before > end / 60
    assert reach(made, ("er.even", "er_1.even"), part)[at] == pytest.approx(wanted[at], rel=1e-5)


def test_no_integer_of_a_weight_changes(uneven, tiny_batches):
    """Both weights come to the same int8 values as without: only scales differ."""
    plain, even = (
        quantize_onnx(
            uneven,
            msgspec.structs.replace(Int8StaticConfig(), even_channels=margin, correct_head=False),
            tiny_batches[:16],
        )
        for margin in (0.0, MARGIN)
    )
    for name in ("expand.weight_quantized", "depthwise.weight_quantized"):
        assert np.array_equal(constant_of(plain, name), constant_of(even, name))


def test_int8_comes_nearer_to_float(uneven, tiny_batches):
    """Where channels differ in reach, the error of INT8 on pictures that were not calibrated on is
    at most two thirds of what it is without.
    """
    wanted, errors = outputs_of(uneven, "quality", tiny_batches[16:]), []
    for margin in (0.0, MARGIN):
        settings = msgspec.structs.replace(Int8StaticConfig(), even_channels=margin)
        made = quantize_onnx(uneven, settings, tiny_batches[:16])
        errors.append(np.abs(outputs_of(made, "quality", tiny_batches[16:]) - wanted).mean())
    assert errors[1] <= errors[0] * 2 / 3


def test_a_tensor_that_others_read_stays(uneven, tiny_batches):
    """A layer whose output is pooled too, in one view, is not scaled in the other one either: they
    share their weights.
    """
    shared = onnx.ModelProto.FromString(uneven.SerializeToString())
    shared.graph.node.append(helper.make_node("GlobalAveragePool", ["er_1"], ["also"], "also"))
    shared.graph.output.append(onnx.ValueInfoProto(name="also"))
    made, spans = with_even_channels(shared, {"er": (0, 1)}, tiny_batches[:4], margin=MARGIN)
    assert made.SerializeToString() == shared.SerializeToString()
    assert spans == {"er": (0, 1)}
