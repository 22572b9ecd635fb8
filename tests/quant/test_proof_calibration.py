"""Calibration methods: what each makes of activations, and which is chosen."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

torch = pytest.importorskip("torch")
onnx = pytest.importorskip("onnx")

from onnx import numpy_helper  # noqa: E402
from small_models import calibration_batches, small_graph  # noqa: E402

from quant.calibration_methods import (  # noqa: E402
    METHODS,
    activation_spans,
    mse_span,
    refuse_useless,
)
from quant.correction import outputs_of  # noqa: E402
from quant.ptq import Int8StaticConfig, choose_calibration, quantize_onnx  # noqa: E402

OPERATORS = ("Conv", "Relu", "Add")


@pytest.fixture(scope="module")
def batches():
    """Textures, clean and damaged, black, white and noise."""
    return calibration_batches()


@pytest.fixture(scope="module")
def spans(batches):
    """By every method."""
    return activation_spans(small_graph(), batches, METHODS, operators=OPERATORS, percentile=99.0)


def values_of(tensor: str, batches) -> np.ndarray:
    """Every value of a tensor over the pictures."""
    return outputs_of(small_graph(), tensor, batches).ravel()


def rounding_error(values: np.ndarray, span: tuple[float, float]) -> float:
    """Mean square of what 256 even steps between two values lose."""
    low, high = min(span[0], 0.0), max(span[1], 0.0)
    step = (high - low) / 255
    zero = np.round(-low / step)
    found = (np.clip(np.round(values / step) + zero, 0, 255) - zero) * step
    return float(np.square(found - values).mean())


def test_minmax_is_the_least_and_the_largest(spans, batches):
    """Of every tensor the span's ends are those of its values over all pictures."""
    for tensor in ("whole.e", "fragments.f"):
        values = values_of(tensor, batches)
        assert spans["minmax"][tensor] == pytest.approx((values.min(), values.max()), rel=1e-6)


def test_percentile_leaves_the_asked_share_outside(spans, batches):
    """99 % inside leaves half a per cent at either end, to a histogram's bin (of 2,048)."""
    low, high = spans["percentile"]["whole.e"]
    values = values_of("whole.e", batches)
    width = 2 * np.abs(values).max() / 2048
    wanted = np.percentile(values, [0.5, 99.5])
    assert [low, high] == pytest.approx(wanted.tolist(), abs=1.5 * width)


@pytest.mark.parametrize("method", METHODS)
def test_no_span_is_wider_than_the_values(spans, method):
    """Every method clips or keeps, none invents room."""
    for tensor, (low, high) in spans[method].items():
        least, largest = spans["minmax"][tensor]
        assert min(least, 0.0) - 1e-6 <= low <= high <= max(largest, 0.0) + 1e-6


def test_mse_loses_less_than_minmax_on_long_tails():
    """One outlier of 60 above two million values of -1 to 1 is worth clipping: for a range of M
    rounding loses M^2 / 780,000 and a clipped outlier M^2 / 2,000,000 at most. The span rounds
    better than the whole range, and as well as the best of other upper ends, to 5 %.
    """
    rng = np.random.default_rng(0)
    values = np.append(rng.uniform(-1, 1, 2_000_000), 60.0).astype(np.float32)
    counts, edges = np.histogram(values, 2048, (-60, 60))
    span = mse_span(counts, edges, -1.0, 60.0)
    error = rounding_error(values, span)
    tried = [rounding_error(values, (-1.0, high)) for high in (1.2, 3, 6, 10, 15, 20, 30)]
    assert span[0] == pytest.approx(-1, rel=0.05)
    assert error < 0.5 * rounding_error(values, (-1.0, 60.0))
    assert error <= 1.05 * min(tried)


def test_mse_keeps_an_even_range_whole():
    """Of values spread evenly nothing is worth clipping: the span is the range, to 5 %."""
    values = np.linspace(-1, 3, 100_001)
    counts, edges = np.histogram(values, 2048, (-3, 3))
    assert mse_span(counts, edges, -1.0, 3.0) == pytest.approx((-1, 3), rel=0.05)


def test_what_feeds_a_relu_has_its_span(spans):
    """A convolution before a ReLU gets the ReLU's span: in integers both are one node."""
    for method in METHODS:
        assert spans[method]["whole.a"] == spans[method]["whole.b"]
        assert spans[method]["whole.e"][0] < 0


@pytest.mark.parametrize("method", METHODS)
def test_the_graph_has_the_methods_scales(batches, method):
    """The scale of a quantised tensor is the method's span over 255."""
    config = Int8StaticConfig(calibration=method, percentile=99.0, correct_head=False)
    made = quantize_onnx(small_graph(), config, batches)
    found = activation_spans(small_graph(), batches, [method], operators=OPERATORS, percentile=99.0)
    low, high = found[method]["whole.e"]
    stored = {t.name: numpy_helper.to_array(t) for t in made.graph.initializer}
    pair = next(
        n for n in made.graph.node if n.op_type == "QuantizeLinear" and "whole.e" in n.input
    )
    wanted = (max(high, 0.0) - min(low, 0.0)) / 255
    assert float(stored[pair.input[1]]) == pytest.approx(wanted, rel=1e-4)


def test_best_has_the_least_score_error(batches):
    """Of the four methods the chosen one's scores, measured anew, are nearest to the float ones."""
    graph, config = small_graph(), Int8StaticConfig(calibration="best", percentile=99.0)
    chosen, errors = choose_calibration(graph, config, batches)
    wanted = outputs_of(graph, "quality", batches)
    anew = {}
    for method in METHODS:
        one = msgspec.structs.replace(config, calibration=method)
        found = outputs_of(quantize_onnx(graph, one, batches), "quality", batches)
        anew[method] = 100 * float(np.abs(found - wanted).mean())
    assert errors == pytest.approx(anew, rel=1e-3, abs=1e-3)
    assert anew[chosen.calibration] == pytest.approx(min(anew.values()), rel=1e-3, abs=1e-3)
    assert len({round(error, 6) for error in errors.values()}) > 1


def test_a_named_method_is_not_tried_against_others(batches):
    """Settings that say how to calibrate stay as they are."""
    config = Int8StaticConfig(calibration="entropy")
    assert choose_calibration(small_graph(), config, batches) == (config, {})


def test_a_useless_set_is_refused(batches):
    """No picture, seven, and eight of which most are black, are refused with the numbers."""
    refuse_useless(batches)
    black = {name: np.zeros_like(view) for name, view in batches[0].items()}
    for wrong, told in (
        ([], "0 pictures"),
        (batches[:7], "7 pictures"),
        ([*batches[6:9], *[black] * 6], "6 of 9"),
    ):
        with pytest.raises(ValueError, match=told):
            refuse_useless(wrong)
