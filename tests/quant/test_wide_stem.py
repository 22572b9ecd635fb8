"""The first convolution of a view, several columns at a time."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

onnx = pytest.importorskip("onnx")

from quant.correction import outputs_of  # noqa: E402
from quant.proof.layers import float_convs  # noqa: E402
from quant.ptq import Int8StaticConfig, quantize_onnx  # noqa: E402
from quant.wide_stem import widen_stem_  # noqa: E402


@pytest.fixture(scope="module")
def quantised(tiny, tiny_batches):
    """The INT8 graph of the small model as it is without."""
    return quantize_onnx(tiny, Int8StaticConfig(), tiny_batches[:16])


@pytest.mark.parametrize("columns", [2, 4, 8])
def test_every_bit_stays(quantised, tiny_batches, columns):
    """However many columns are made at once, each picture's quality is the same float; the picture
    has an edge on either side, where padding counts.
    """
    wide = onnx.ModelProto.FromString(quantised.SerializeToString())
    widen_stem_(wide, columns)
    found, wanted = (outputs_of(g, "quality", tiny_batches) for g in (wide, quantised))
    assert np.array_equal(found, wanted)
    assert not float_convs(wide)


def test_a_batch_stays_a_batch(quantised, tiny_batches):
    """Of three pictures at once each has the quality that it has alone."""
    wide = onnx.ModelProto.FromString(quantised.SerializeToString())
    widen_stem_(wide, 4)
    three = {name: np.concatenate([b[name] for b in tiny_batches[:3]]) for name in tiny_batches[0]}
    alone = outputs_of(wide, "quality", tiny_batches[:3])
    np.testing.assert_allclose(outputs_of(wide, "quality", [three]), alone, atol=1e-6)


def test_the_setting_asks_for_it(tiny, tiny_batches, quantised):
    """``stem_columns`` gives the graph that makes four columns at once: one of 32 channels, its
    weight shared by the views; what the narrow one read is gone.
    """
    settings = msgspec.structs.replace(Int8StaticConfig(), stem_columns=4)
    made = quantize_onnx(tiny, settings, tiny_batches[:16])
    weights = [tuple(t.dims) for t in made.graph.initializer if len(t.dims) == 4]
    assert weights.count((32, 24, 3, 2)) == 1
    assert not [shape for shape in weights if shape == (8, 3, 3, 3)]
    found, wanted = (outputs_of(g, "quality", tiny_batches) for g in (made, quantised))
    assert np.array_equal(found, wanted)


def test_a_first_convolution_in_float_stays(tiny, tiny_batches):
    """Where the first convolutions are left in float there is nothing to widen."""
    settings = msgspec.structs.replace(Int8StaticConfig(), float_nodes=("stem", "stem_1"))
    plain = quantize_onnx(tiny, settings, tiny_batches[:16])
    settings = msgspec.structs.replace(settings, stem_columns=4)
    made = quantize_onnx(tiny, settings, tiny_batches[:16])
    found, wanted = (outputs_of(g, "quality", tiny_batches) for g in (made, plain))
    assert np.array_equal(found, wanted)


def test_what_does_not_fit_is_told(quantised):
    """A width that the columns do not divide is named, with the multiple that it should be; so is a
    first convolution of another stride.
    """
    with pytest.raises(ValueError, match=r"stem_columns = 3 .* multiples of 6.*'whole' has 32"):
        widen_stem_(onnx.ModelProto.FromString(quantised.SerializeToString()), 3)
    other = with_stride_one(quantised, "stem", "stem_1")
    with pytest.raises(ValueError, match="stem of 'whole' is another: leave stem_columns at 1"):
        widen_stem_(other, 4)


def test_a_view_that_begins_otherwise_stays(quantised, tiny_batches):
    """The other view is widened all the same, and every bit stays."""
    wanted = with_stride_one(quantised, "stem_1")
    wide = onnx.ModelProto.FromString(wanted.SerializeToString())
    widen_stem_(wide, 4)
    kernels = sorted(tuple(t.dims) for t in wide.graph.initializer if len(t.dims) == 4)
    assert {(8, 3, 3, 3), (32, 24, 3, 2)} <= set(kernels)
    found, plain = (outputs_of(g, "quality", tiny_batches) for g in (wide, wanted))
    assert np.array_equal(found, plain)


def with_stride_one(quantised, *names):
    """A copy of which some convolutions make as many columns as they read."""
    other = onnx.ModelProto.FromString(quantised.SerializeToString())
    for conv in (n for n in other.graph.node if n.name in names):
        next(a for a in conv.attribute if a.name == "strides").ints[:] = [1, 1]
    del other.graph.value_info[:]
    return other
