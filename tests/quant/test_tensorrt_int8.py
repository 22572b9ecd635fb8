"""INT8 for TensorRT: symmetric, placed where it is fused, near the float model's scores."""

from __future__ import annotations

import cv2
import msgspec
import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
pytest.importorskip("torch")

from onnx import numpy_helper  # noqa: E402
from tiny_onnx import MEAN, STD, joined, tiny_graph  # noqa: E402

from dgiqa_stream.correlation import srcc  # noqa: E402
from dgiqa_stream.errors import ModelError  # noqa: E402
from dgiqa_stream.manifest import load_model  # noqa: E402
from dgiqa_stream.preprocess import make_batch  # noqa: E402
from dgiqa_stream.types import Planes  # noqa: E402
from quant.ptq import Int8StaticConfig  # noqa: E402
from quant.qat import Ranges  # noqa: E402
from quant.tensorrt.graph_view import GraphView, attribute  # noqa: E402
from quant.tensorrt.layout import lay_out_  # noqa: E402
from quant.tensorrt.quantize import choose_for_tensorrt, quantize_for_tensorrt  # noqa: E402
from quant.tensorrt.rules import check_tensorrt  # noqa: E402

NUM_CALIBRATION = 16
PLAIN = Int8StaticConfig(correct_head=False)


@pytest.fixture(scope="module")
def quantised(tiny, tiny_batches):
    """The tiny model's INT8, calibrated on the first pictures."""
    return quantize_for_tensorrt(tiny, Int8StaticConfig(), tiny_batches[:NUM_CALIBRATION])


def input_scale(model, conv: str) -> float:
    """The scale of a convolution's pictures."""
    view = GraphView(model)
    node = next(n for n in view.nodes if n.name == conv)
    return float(view.constant(view.maker(node.input[0]).input[1]))


def test_every_convolution_is_int8(quantised, tiny):
    """All eight convolutions read int8 pictures and weights, and say their kernel's shape."""
    view = GraphView(quantised)
    convolutions = list(view.of_kind("Conv"))
    assert len(convolutions) == sum(n.op_type == "Conv" for n in tiny.graph.node) == 8
    for node in convolutions:
        assert view.made_by(node.input[0], "DequantizeLinear")
        assert view.constant(view.maker(node.input[1]).input[0]).dtype == np.int8
        assert tuple(attribute(node, "kernel_shape")) == view.weight_shape(node)[2:]


def test_only_what_convolutions_read_is_rounded(quantised):
    """Four roundings a view: neither the block's last output nor the pooled features are among
    them, and no float is made of bytes but by a Cast.
    """
    view = GraphView(quantised)
    rounded = [view.maker(n.input[0]).name for n in view.of_kind("QuantizeLinear")]
    once = ["div", "stem_relu", "expand_relu", "depthwise_relu"]
    assert sorted(rounded) == sorted([*once, *(f"{n}_1" for n in once)])
    for name in view.inputs:
        assert [n.op_type for n in view.readers(name)] == ["Cast"]


def test_no_byte_is_clipped(quantised):
    """Normalised pictures have the scale that just reaches the farther of 0 and 255."""
    assert input_scale(quantised, "stem") == pytest.approx((255 - MEAN) / STD / 127, rel=1e-6)


def test_scales_are_the_largest_value_over_127(tiny, tiny_batches):
    """Measured by min-max, a tensor's scale is its largest magnitude on the calibration pictures
    over 127: ONNX Runtime's own run of the float graph says so.
    """
    from quant.correction import outputs_of

    made = quantize_for_tensorrt(tiny, PLAIN, tiny_batches[:NUM_CALIBRATION])
    largest = np.abs(outputs_of(tiny, "er", tiny_batches[:NUM_CALIBRATION])).max()
    assert input_scale(made, "depthwise") == pytest.approx(largest / 127, rel=1e-5)


def test_trained_ranges_are_made_symmetric(tiny, tiny_batches):
    """A range that training rounded to gives the scale of its farther end, on every tensor."""
    conv = dict.fromkeys(["stem", "expand", "depthwise", "project"], (-1.0, 5.08))
    ranges = Ranges(conv=conv, add={"": (-1.0, 2.0)})
    found = quantize_for_tensorrt(tiny, PLAIN, tiny_batches[:2], ranges=ranges)
    assert input_scale(found, "project") == pytest.approx(5.08 / 127, rel=1e-6)


def test_views_share_bytes_and_not_their_dequantisation(quantised):
    """Weights are stored once for both views; each convolution dequantises them for itself."""
    view = GraphView(quantised)
    makers = [view.maker(n.input[1]) for n in view.of_kind("Conv")]
    assert len({m.output[0] for m in makers}) == 8
    assert len({m.input[0] for m in makers}) == 4


def test_scores_stay_near_float(tiny, quantised, tiny_batches, run_graph):
    """On other pictures than the calibration's, quality is off by 1 point of 100 in the mean, by 4
    at most, and ranks as float does (SRCC 0.99): 7 bits after a Relu, in a net of four layers.
    """
    views = joined(tiny_batches[NUM_CALIBRATION:])
    wanted, found = run_graph(tiny, views), run_graph(quantised, views)
    assert wanted.std() > 0.03  # the pictures differ, so that agreement says something
    assert np.abs(found - wanted).mean() < 0.01
    assert np.abs(found - wanted).max() < 0.04
    assert srcc(found, wanted) > 0.99


def test_laying_out_moves_no_number(tiny, tiny_batches, run_graph):
    """Cast before Transpose and written kernel shapes give the very same quality."""
    made = onnx.ModelProto()
    made.CopyFrom(tiny)
    views = joined(tiny_batches)
    np.testing.assert_array_equal(run_graph(lay_out_(made), views), run_graph(tiny, views))
    assert check_tensorrt(made, int8=False) == []


def test_a_named_convolution_stays_in_float(tiny, tiny_batches):
    """A convolution of ``float_nodes`` keeps its float weights, and the graph still passes."""
    config = msgspec.structs.replace(PLAIN, float_nodes=("stem", "stem_1"))
    made = quantize_for_tensorrt(tiny, config, tiny_batches[:4])
    view = GraphView(made)
    in_float = [n.name for n in view.of_kind("Conv") if view.is_constant(n.input[1])]
    assert sorted(in_float) == ["stem", "stem_1"]


def test_the_best_calibration_is_that_of_least_error(tiny, tiny_batches):
    """Of all methods that is taken whose scores are nearest to float's for this target."""
    best = msgspec.structs.replace(Int8StaticConfig(), calibration="best")
    chosen, errors = choose_for_tensorrt(tiny, best, tiny_batches[:8])
    assert len(errors) == 4
    assert errors[chosen.calibration] == min(errors.values()) < 1.0


def test_an_unsupported_operator_is_one_line(tiny_batches):
    """A kind of node that TensorRT imports not is an error that names the node and the kind."""
    graph = tiny_graph()
    next(n for n in graph.graph.node if n.name == "hidden_relu").op_type = "Hardmax"
    with pytest.raises(ModelError, match=r"^hidden_relu: TensorRT imports no Hardmax") as caught:
        quantize_for_tensorrt(graph, PLAIN, tiny_batches[:2])
    assert "\n" not in str(caught.value)


def test_an_empty_calibration_set_is_refused(tiny):
    """Without pictures there are no ranges."""
    with pytest.raises(ValueError, match="set is empty"):
        quantize_for_tensorrt(tiny, PLAIN, [])


def textured(seed: int):
    """A picture of the shipped student's views: structure at every scale, sharp or soft."""
    rng = np.random.default_rng(seed)
    total = np.zeros((256, 256, 3), np.float32)
    for cells in (3, 6, 12, 24, 48, 96):
        grid = rng.standard_normal((cells, cells, 3)).astype(np.float32)
        total += cv2.resize(grid, (256, 256), interpolation=cv2.INTER_CUBIC) / cells**0.3
    total = cv2.GaussianBlur(total, (0, 0), 0.3 + 3 * rng.uniform())
    made = rng.uniform(70, 180) + rng.uniform(20, 70) * total
    return np.clip(made, 0, 255).astype(np.uint8)


def test_the_shipped_student_is_int8_for_tensorrt(run_graph):
    """Every convolution of the shipped student is INT8 without a broken rule, its file shrinks to
    less than 0.6, and scores of new pictures are off by less than 6 points in the mean:
    symmetric steps are twice as coarse after each Relu as those it was trained to round to.
    """
    source = load_model("student-fp32")
    graph = onnx.load(source.path)
    views = source.manifest.preprocess.views
    made = [
        dict(make_batch([Planes((textured(i),), full_range=True)], views).views) for i in range(12)
    ]
    quantised = quantize_for_tensorrt(graph, Int8StaticConfig(), made[:6])
    view = GraphView(quantised)
    num_convolutions = sum(n.op_type == "Conv" for n in graph.graph.node)
    assert check_tensorrt(quantised) == []
    assert sum(1 for _ in view.of_kind("Conv")) == num_convolutions > 40
    assert len(quantised.SerializeToString()) < 0.6 * len(graph.SerializeToString())
    together = joined(made[6:])
    difference = 100 * np.abs(run_graph(quantised, together) - run_graph(graph, together))
    assert difference.mean() < 6


@pytest.mark.parametrize("name", ["student", "student-xs"])
def test_the_shipped_flavour_breaks_no_rule(name):
    """The package's own INT8 for TensorRT is of the float model that ships beside it, every
    convolution of it INT8; the report beside it is of this very file, and no rule is broken.
    """
    source, of_float = load_model(f"{name}-tensorrt"), load_model(f"{name}-fp32")
    beside = source.path.with_name(f"{name}-tensorrt.check.json")
    report = msgspec.json.decode(beside.read_bytes())
    assert source.manifest.target == "tensorrt"
    assert source.manifest.history[-1]["from_sha256"] == of_float.manifest.sha256
    assert report["sha256"] == source.manifest.sha256
    assert report["num_int8_convolutions"] == report["num_convolutions"] > 0
    assert report["violations"] == []
    assert check_tensorrt(onnx.load(source.path)) == []


def test_shared_weights_are_stored_as_trained(tiny, quantised):
    """int8 weights times their scales are the float weights to half a step."""
    view = GraphView(quantised)
    float_weights = {t.name: numpy_helper.to_array(t) for t in tiny.graph.initializer}
    for conv in ("stem", "expand", "depthwise", "project"):
        dequantize = view.maker(next(n for n in view.nodes if n.name == conv).input[1])
        values, scale = (view.constant(dequantize.input[i]) for i in (0, 1))
        wanted = float_weights[f"{conv}.weight"]
        steps = scale.reshape(-1, 1, 1, 1)
        assert (np.abs(values * steps - wanted) <= steps / 2 + 1e-7).all()
