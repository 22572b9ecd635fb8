"""INT8: every convolution in integers, fed by the picture's own bytes, near the float model."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

torch = pytest.importorskip("torch")
onnx = pytest.importorskip("onnx")

from onnx import numpy_helper  # noqa: E402

from dgiqa_stream.correlation import srcc  # noqa: E402
from dgiqa_stream.errors import ConfigError  # noqa: E402
from quant.ptq import Int8StaticConfig, load_int8_config, quantize_onnx  # noqa: E402

NUM_CALIBRATION = 24


@pytest.fixture(scope="module")
def quantised(graph, batches):
    """The INT8 graph, calibrated on half of the pictures."""
    return quantize_onnx(graph, Int8StaticConfig(), batches[:NUM_CALIBRATION])


@pytest.fixture(scope="module")
def optimised(quantised, tmp_path_factory):
    """What ONNX Runtime makes of it on a CPU."""
    import onnxruntime as ort

    path = tmp_path_factory.mktemp("optimised") / "o.onnx"
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(path)
    options.log_severity_level = 3
    content = quantised.SerializeToString()
    ort.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    return onnx.load(path)


def constants(graph):
    """Name to array of a graph's constants."""
    return {t.name: numpy_helper.to_array(t) for t in graph.graph.initializer}


def test_no_convolution_stays_in_float(graph, optimised):
    """Each of the float graph's convolutions is a QLinearConv, and no float one is left: 53 for the
    whole view and the 40 that the fragments pass too.
    """
    num_convs = sum(n.op_type == "Conv" for n in graph.graph.node)
    kinds = [n.op_type for n in optimised.graph.node]
    assert num_convs == 53 + 40
    assert kinds.count("QLinearConv") == num_convs
    assert not [k for k in kinds if k in ("Conv", "FusedConv", "ConvInteger", "NhwcFusedConv")]


def test_no_addition_stays_in_float(graph, optimised):
    """Each shortcut's addition runs on integers too."""
    num_adds = sum(n.op_type == "Add" for n in graph.graph.node)
    kinds = [n.op_type for n in optimised.graph.node]
    assert num_adds == 10 + 8
    assert (kinds.count("QLinearAdd"), kinds.count("Add")) == (num_adds, 0)


def test_the_pictures_bytes_reach_the_first_convolution(optimised):
    """Between each uint8 view and its first QLinearConv bytes are moved, never converted."""
    readers = {name: node for node in optimised.graph.node for name in node.input}
    for view in optimised.graph.input:
        seen, node = [], readers[view.name]
        while node.op_type != "QLinearConv":
            seen.append(node.op_type)
            node = readers[node.output[0]]
        assert not {*seen} - {"Transpose", "Reshape", "Pad"}


def test_the_first_scale_is_the_normalisation(quantised):
    """The bytes' zero point is the input mean and their scale one over its deviation."""
    by_name = constants(quantised)
    first = next(
        n
        for n in quantised.graph.node
        if n.op_type == "DequantizeLinear" and n.input[0] not in by_name
    )
    scale, zero_point = (by_name[first.input[i]] for i in (1, 2))
    assert (int(zero_point), zero_point.dtype) == (116, np.uint8)
    assert float(scale) == pytest.approx(1 / 57.63, rel=1e-6)


def test_weights_are_signed_per_channel_and_activations_unsigned(quantised):
    """A convolution's weights are int8 with a scale for each channel; all activations are uint8."""
    by_name = constants(quantised)
    makers = {out: node for node in quantised.graph.node for out in node.output}
    for conv in (n for n in quantised.graph.node if n.op_type == "Conv"):
        activation, weight = (makers[conv.input[i]] for i in (0, 1))
        assert {activation.op_type, weight.op_type} == {"DequantizeLinear"}
        values, scales, zeros = (by_name[name] for name in weight.input)
        assert values.dtype == np.int8
        assert scales.shape == (len(values),)
        assert not zeros.any()
    for node in quantised.graph.node:
        if node.op_type == "QuantizeLinear":
            assert by_name[node.input[2]].dtype == np.uint8
            assert by_name[node.input[1]].ndim == 0


def test_int8_keeps_the_ranking(quantised, run_graph, batches, all_views, quality):
    """On pictures it was not calibrated on, INT8 orders nearly as float does, although drawn
    weights amplify rounding far more than trained ones: SRCC 0.8 or more, and a mean difference
    below 6 points of 100.
    """
    views = {name: v[NUM_CALIBRATION:] for name, v in all_views.items()}
    found, wanted = run_graph(quantised, views), quality[NUM_CALIBRATION:]
    assert srcc(found, wanted) >= 0.8
    assert np.abs(found - wanted).mean() < 0.06


@pytest.mark.parametrize("num_pictures", [1, 3])
def test_a_score_does_not_depend_on_the_batch(quantised, run_graph, all_views, num_pictures):
    """The INT8 graph keeps its dynamic batch, and integers keep each picture's quality."""
    part = {name: v[:num_pictures] for name, v in all_views.items()}
    found = run_graph(quantised, part)
    np.testing.assert_allclose(found, run_graph(quantised, all_views)[:num_pictures], atol=1e-6)


def test_the_correction_takes_out_the_systematic_error(graph, quantised, batches, run_graph):
    """Over the calibration pictures the corrected head's logits are off by 0 in the mean; the plain
    head's are not.
    """
    plain = msgspec.structs.replace(Int8StaticConfig(), correct_head=False)
    uncorrected = quantize_onnx(graph, plain, batches[:NUM_CALIBRATION])
    views = {n: np.concatenate([b[n] for b in batches[:NUM_CALIBRATION]]) for n in batches[0]}
    wanted, corrected, before = (
        np.log(quality / (1 - quality))
        for quality in (run_graph(g, views).astype(float) for g in (graph, quantised, uncorrected))
    )
    assert abs((corrected - wanted).mean()) < 1e-3
    assert abs((before - wanted).mean()) > 1e-2


def test_the_float_graph_stays_as_it_was(graph, batches):
    """Quantising works on a copy."""
    before = graph.SerializeToString()
    quantize_onnx(graph, Int8StaticConfig(), batches[:2])
    assert graph.SerializeToString() == before


def test_nothing_to_calibrate_on_is_refused(graph):
    """An empty calibration set is an error, not a model with invented ranges."""
    with pytest.raises(ValueError, match="calibration needs pictures"):
        quantize_onnx(graph, Int8StaticConfig(), [])


def test_a_graph_without_the_byte_input_is_refused(graph, batches):
    """A graph that does not begin by Cast, Sub, Div is refused with the reason."""
    other = onnx.ModelProto()
    other.CopyFrom(graph)
    next(n for n in other.graph.node if n.op_type == "Sub").op_type = "Add"
    with pytest.raises(ValueError, match="Cast, Sub, Div"):
        quantize_onnx(other, Int8StaticConfig(), batches[:2])


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("[quantize]\nper_cent = 99.0\n", "per_cent"),
        ("[quantize]\ncalibration = 'max'\n", "max"),
        ("[calibration]\nnum_rated = 'many'\n", "num_rated"),
        ("[quantise]\n", "quantise"),
        ("[quantize\n", "line 1"),
    ],
)
def test_wrong_settings_are_named(tmp_path, text, named):
    """An unknown key, an impossible value or no TOML at all is one line with the file's name."""
    (tmp_path / "int8.toml").write_text(text)
    with pytest.raises(ConfigError, match=named) as caught:
        load_int8_config(tmp_path / "int8.toml")
    assert "int8.toml" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_absent_settings_say_where_settings_are(tmp_path):
    """A path without a file is answered with the folder of the published settings."""
    with pytest.raises(ConfigError, match="configs/quant"):
        load_int8_config(tmp_path / "absent.toml")


def test_a_model_with_intervals_becomes_int8():
    """A float model that says spread and unfamiliar beside quality, as shipped ones do, is
    quantised like one that does not: the same quality, and both within 0.05 of float's.
    """
    from small_models import calibration_batches, small_graph

    from quant.correction import constant_of, outputs_of
    from quant.extra_outputs import Reader, add_outputs_

    plain, batches = small_graph(), calibration_batches(12)
    width = constant_of(plain, "hidden.weight").shape[1]
    whole, rng = small_graph(), np.random.default_rng(2)
    readers = [
        Reader(rng.normal(0, 0.3, (4, width)), rng.normal(size=4), rng.normal(size=(1, 4)),
               rng.normal(size=1))
        for _ in range(2)
    ]  # fmt: skip
    add_outputs_(whole, spread=readers[0], unfamiliar=readers[1])
    config = Int8StaticConfig()
    made = quantize_onnx(whole, config, batches)
    without = quantize_onnx(plain, config, batches)
    assert [o.name for o in made.graph.output] == ["quality", "spread", "unfamiliar"]
    same = [outputs_of(g, "quality", batches) for g in (made, without)]
    np.testing.assert_allclose(*same, atol=1e-6)
    for name in ("spread", "unfamiliar"):
        apart = np.abs(outputs_of(made, name, batches) - outputs_of(whole, name, batches))
        assert apart.max() < 0.05
