"""Quantisation-aware training rounds where, and as, the INT8 graph does."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

torch = pytest.importorskip("torch")
onnx = pytest.importorskip("onnx")

from dgiqa_stream.errors import ModelError  # noqa: E402
from distill.models.student import quantised_points  # noqa: E402
from quant.ptq import Int8StaticConfig, quantize_onnx  # noqa: E402
from quant.qat import (  # noqa: E402
    FakeQuantConv2d,
    QatConfig,
    find_ranges,
    load_ranges,
    prepare_qat_,
    rounded,
    save_ranges,
)
from quant.rounded_tensors import ranges_of, trained_spans  # noqa: E402

NUM_CALIBRATION = 24


@pytest.fixture(scope="module")
def ranges(trained_student, tensors):
    """Ranges over half of the pictures."""
    points = quantised_points(trained_student)
    return find_ranges(trained_student, points, tensors[:NUM_CALIBRATION], QatConfig())


@pytest.fixture
def rounding(student, ranges):
    """A student that rounds."""
    prepare_qat_(quantised_points(student), ranges)
    return student


@pytest.mark.parametrize(("low", "high"), [(-1.0, 3.0), (0.0, 7.3), (0.5, 2.0), (-4.0, -1.0)])
def test_rounding_errs_by_half_a_step_at_most(low, high):
    """Within a range the error is half a step, beyond it values stay at its ends, zero is exact."""
    low, high = min(low, 0.0), max(high, 0.0)
    step = (high - low) / 255
    x = torch.linspace(low - 2, high + 2, 2001)
    y = rounded(x, low, high)
    inside = (x >= low) & (x <= high)
    assert (y - x)[inside].abs().max() <= step * 1.01  # half a step, and half of the zero point's
    assert y.min() >= low - step
    assert y.max() <= high + step
    assert rounded(torch.zeros(1), low, high).item() == 0
    assert len(torch.unique(y)) <= 256


def test_rounding_lets_gradients_through():
    """The gradient of the rounded value is that of the value, straight through."""
    x = torch.tensor([-0.3, 0.2, 5.0], requires_grad=True)
    (rounded(x, -1.0, 1.0) * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
    assert x.grad.tolist() == [1.0, 2.0, 3.0]


def test_every_convolution_and_addition_has_a_range(ranges):
    """53 convolutions and 10 additions are measured; after a ReLU nothing is below zero."""
    assert (len(ranges.conv), len(ranges.add)) == (53, 10)
    assert all(low <= 0 < high for low, high in ranges.conv.values())
    assert sum(low < 0 for low, _ in ranges.conv.values()) == 17  # the projections have no ReLU


def test_ranges_leave_out_the_outliers(trained_student, tensors):
    """A lower quantile never widens a range and narrows most."""
    points = quantised_points(trained_student)
    wide, narrow = (
        find_ranges(trained_student, points, tensors[:2], QatConfig(quantile=q))
        for q in (1.0, 0.99)
    )
    pairs = list(zip(narrow.conv.values(), wide.conv.values(), strict=True))
    assert all(n[0] >= w[0] and n[1] <= w[1] for n, w in pairs)
    assert sum(n[1] < 0.9 * w[1] for n, w in pairs) > len(pairs) / 2


def test_ranges_survive_their_file(ranges, tmp_path):
    """What is saved is loaded, to the last bit."""
    save_ranges(ranges, tmp_path / "ranges.json")
    assert load_ranges(tmp_path / "ranges.json") == ranges


def test_ranges_need_pictures(trained_student):
    """An empty set is an error, not a model that rounds everything to zero."""
    points = quantised_points(trained_student)
    with pytest.raises(ValueError, match="calibration set is empty"):
        find_ranges(trained_student, points, [], QatConfig())


def test_preparing_keeps_the_parameters(student, ranges, trained_student):
    """The state of a rounding student is that of the float one, name by name and bit by bit."""
    prepare_qat_(quantised_points(student), ranges)
    mine, theirs = student.state_dict(), trained_student.state_dict()
    assert list(mine) == list(theirs)
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    convs = [m for m in student.trunk.modules() if isinstance(m, torch.nn.Conv2d)]
    assert all(type(m) is FakeQuantConv2d for m in convs)


def test_preparing_twice_is_refused(rounding, ranges):
    """A model that rounds already cannot be made to round again."""
    with pytest.raises(TypeError, match="FakeQuantConv2d"):
        prepare_qat_(quantised_points(rounding), ranges)


def test_a_rounding_student_trains(rounding, tensors):
    """Every parameter of a rounding student gets a gradient that is finite and not all zero."""
    rounding.logits(*tensors[0]).sum().backward()
    for name, parameter in rounding.named_parameters():
        assert torch.isfinite(parameter.grad).all(), name
    without = [n for n, p in rounding.trunk.named_parameters() if not p.grad.any()]
    assert without == []


def outputs_of(graph, names, views):
    """Tensors of an ONNX graph, not optimised."""
    import onnxruntime as ort

    probed = onnx.ModelProto()
    probed.CopyFrom(graph)
    del probed.graph.output[:]
    probed.graph.output.extend([onnx.ValueInfoProto(name=name) for name in names])
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    content = probed.SerializeToString()
    return ort.InferenceSession(content, options, providers=["CPUExecutionProvider"]).run(
        names, views
    )


def first_rounded(graph, view, count):
    """The outputs of a view's first convolutions after their Quantize and Dequantize."""
    readers = {n.input[0]: n for n in graph.graph.node}
    node, names, past_convolution = readers[view], [], False
    while len(names) < count:
        node = readers[node.output[0]]
        past_convolution |= node.op_type == "Conv"
        if past_convolution and node.op_type == "DequantizeLinear":
            names.append(node.output[0])
            past_convolution = False
    return names


def test_the_int8_graph_rounds_as_it_was_trained_to(rounding, graph, ranges, batches):
    """Told the trained ranges, the first six convolutions of the INT8 graph give the rounding
    student's values: but for ties of rounding, 0.5 % of their spread. (Deeper, an untrained
    network amplifies the ties.)
    """
    plain = msgspec.structs.replace(Int8StaticConfig(), correct_head=False)
    quantised = quantize_onnx(graph, plain, batches[:2], ranges=ranges)
    names = first_rounded(quantised, "whole", 6)
    seen = {}

    def keep_first(module, _, output):  # the whole view passes first
        seen.setdefault(module, output.detach().numpy())

    for _, module, _ in quantised_points(rounding)[:6]:
        module.register_forward_hook(keep_first)
    with torch.no_grad():
        rounding.logits(*(torch.from_numpy(batches[0][n]) for n in ("whole", "fragments")))
    for mine, theirs in zip(outputs_of(quantised, names, batches[0]), seen.values(), strict=True):
        assert np.abs(mine - theirs).mean() < 0.005 * theirs.std()


def test_a_trunk_without_its_last_convolution_takes_the_whole_ones_ranges(graph, ranges):
    """Every tensor that is left gets the span that it has in the whole graph."""
    whole = trained_spans(graph, ranges)
    cut = onnx.ModelProto()
    cut.CopyFrom(graph)
    last = next(n for n in cut.graph.node if "trunk.last.weight" in n.input)
    gone = {last.output[0], *(n.output[0] for n in cut.graph.node if last.output[0] in n.input)}
    cut.graph.node.remove(last)
    assert trained_spans(cut, ranges) == {k: v for k, v in whole.items() if k not in gone}
    assert len(gone) == 2  # the convolution and its ReLU


@pytest.mark.parametrize("columns", [1, 4])
def test_an_int8_file_tells_the_ranges_that_it_rounds_to(graph, ranges, batches, columns):
    """Those that it was made with, to a step's rounding, also where its first layers are widened; a
    graph made with them is the same; a float graph tells none.
    """
    settings = Int8StaticConfig(correct_head=False, stem_columns=columns)
    made = quantize_onnx(graph, settings, batches[:4], ranges=ranges)
    found = ranges_of(made)
    for mine, theirs in ((found.conv, ranges.conv), (found.add, ranges.add)):
        assert mine.keys() == theirs.keys()
        for name, (low, high) in theirs.items():
            step = (max(high, 0.0) - min(low, 0.0)) / 255
            assert mine[name] == pytest.approx((min(low, 0.0), max(high, 0.0)), abs=step)
    again = quantize_onnx(graph, settings, batches[:4], ranges=found)
    scales = [
        {t.name: onnx.numpy_helper.to_array(t) for t in g.graph.initializer} for g in (made, again)
    ]
    assert scales[0].keys() == scales[1].keys()
    for name, value in scales[0].items():
        np.testing.assert_allclose(scales[1][name], value, rtol=1e-6)
    with pytest.raises(ModelError, match="no quantised convolution"):
        ranges_of(graph)


def test_ranges_of_another_model_are_refused(graph, ranges, batches):
    """A convolution without a range, and a range without a convolution, are errors that name it."""
    first, *others = ranges.conv.items()
    fewer = msgspec.structs.replace(ranges, conv=dict(others))
    with pytest.raises(ValueError, match=r"none of 'trunk\.stem'"):
        quantize_onnx(graph, Int8StaticConfig(), batches[:2], ranges=fewer)
    more = msgspec.structs.replace(ranges, conv={**ranges.conv, "trunk.more": first[1]})
    with pytest.raises(ValueError, match=r"lacks 'trunk\.more'"):
        quantize_onnx(graph, Int8StaticConfig(), batches[:2], ranges=more)
