"""Tuning for TensorRT rounds where the INT8 graph does, and brings its scores nearer to float's."""

from __future__ import annotations

import sys

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
torch = pytest.importorskip("torch")

from small_models import small_graph, write_packs, write_small  # noqa: E402
from tiny_onnx import joined  # noqa: E402

from dgiqa_stream.errors import ModelError  # noqa: E402
from dgiqa_stream.manifest import load_model  # noqa: E402
from quant.cli import main  # noqa: E402
from quant.correction import outputs_of  # noqa: E402
from quant.ptq import Int8StaticConfig, measured_spans  # noqa: E402
from quant.tensorrt.quantize import (  # noqa: E402
    _input_spans,
    quantize_for_tensorrt,
    tune_and_quantize,
)
from quant.tensorrt.rules import check_tensorrt  # noqa: E402
from quant.tensorrt.tuning import (  # noqa: E402
    RoundingModule,
    TuneConfig,
    _Steps,
    features_and_logit,
    tune_for_tensorrt,
)

PLAIN = Int8StaticConfig(correct_head=False)


@pytest.fixture(scope="module")
def spans(tiny, tiny_batches):
    """Where the scales begin: the extremes, and all that pictures can hold."""
    found = measured_spans(tiny, PLAIN, tiny_batches[:16], ["minmax"])["minmax"]
    return found | _input_spans(tiny)


def steps_of(batches, size=8):
    """The pictures in turn, so many a step."""
    return lambda step: joined([batches[(step * size + i) % len(batches)] for i in range(size)])


def test_it_rounds_where_the_int8_graph_does(tiny, tiny_batches, spans):
    """Pooled features of the rounding module are those of ONNX Runtime's INT8 graph: all but a few
    of a thousand within a hundredth of their spread, where a sum in another order rounds apart.
    """
    core = features_and_logit(tiny)
    module = RoundingModule(core, spans)
    made = quantize_for_tensorrt(tiny, PLAIN, tiny_batches[:16], measured=spans)
    name = core.graph.output[0].name
    views = joined(tiny_batches[16:])
    wanted = outputs_of(made, name, [views])
    exact = outputs_of(tiny, name, [views])
    with torch.no_grad():
        found = module(*(torch.from_numpy(views[n]) for n in module.input_names))[0].numpy()
    rounding = np.abs(wanted - exact).mean()
    assert rounding > 0
    assert np.abs(found - wanted).mean() < 0.05 * rounding


def test_gradients_of_rounding_are_the_published_ones():
    """Value and scale get the gradients of LSQ (arXiv 1902.08153, equations 3 and 5): 1 inside and
    0 beyond, and the rounding's error in steps inside, 127 with its sign beyond.
    """
    x = torch.tensor([-300.0, -0.6, 0.0, 1.4, 254.0, 300.0], requires_grad=True)
    scale = torch.tensor(2.0, requires_grad=True)
    weights = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0, 32.0])
    y = _Steps.apply(x, scale)
    assert y.tolist() == [-254.0, 0.0, 0.0, 2.0, 254.0, 254.0]
    (y * weights).sum().backward()
    assert x.grad.tolist() == [0.0, 2.0, 4.0, 8.0, 16.0, 0.0]
    errors = [-127.0, 0.3, 0.0, 0.3, 0.0, 127.0]
    assert scale.grad.item() == pytest.approx(float(torch.tensor(errors) @ weights), rel=1e-5)


def test_every_weight_and_scale_learns(tiny, tiny_batches, spans):
    """Weights, biases and free scales get gradients; the scales of pictures and the head do not."""
    fixed = list(_input_spans(tiny))
    module = RoundingModule(features_and_logit(tiny), spans, fixed=fixed)
    views = joined(tiny_batches[:4])
    module(*(torch.from_numpy(views[n]) for n in module.input_names))[1].sum().backward()
    moving = [p for p in module.parameters() if p.requires_grad]
    assert len(moving) == 4 * 2 + 6  # four convolutions, and what six of the eight read
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in moving)
    assert sum(not p.requires_grad for p in module.parameters()) == len(fixed) == 2


def test_tuning_brings_features_nearer(tiny, tiny_batches, spans):
    """With scales eight times too coarse, 60 steps halve the squared distance of pooled features
    to float on new pictures, and the graph passes the checker.
    """
    coarse = {name: (8 * low, 8 * high) for name, (low, high) in spans.items()}
    coarse |= _input_spans(tiny)
    before = quantize_for_tensorrt(tiny, PLAIN, tiny_batches[:16], measured=coarse)
    config = TuneConfig(num_steps=60, rate=3e-3, scale_rate=3e-2)
    tuned, learnt = tune_for_tensorrt(
        tiny, config, coarse, steps_of(tiny_batches[:32]), fixed=list(_input_spans(tiny))
    )
    after = quantize_for_tensorrt(tuned, PLAIN, tiny_batches[:16], measured=learnt)
    views = joined(tiny_batches[32:])
    name = features_and_logit(tiny).graph.output[0].name
    wanted = outputs_of(tiny, name, [views])
    apart = [np.square(outputs_of(g, name, [views]) - wanted).mean() for g in (before, after)]
    assert apart[1] < 0.5 * apart[0]
    assert check_tensorrt(after) == []


def test_no_steps_change_nothing_but_the_grid(tiny, tiny_batches, spans):
    """Without a step the weights are the float ones to half a step of INT8."""
    tuned, learnt = tune_for_tensorrt(tiny, TuneConfig(), spans, steps_of(tiny_batches))
    was = {t.name: onnx.numpy_helper.to_array(t) for t in tiny.graph.initializer}
    for stored in tuned.graph.initializer:
        step = np.abs(was[stored.name]).max() / 127
        apart = np.abs(onnx.numpy_helper.to_array(stored) - was[stored.name]).max()
        assert apart <= step / 2 + 1e-7
    assert all(abs(high - max(map(abs, spans[n]))) < 1e-4 * high for n, (_, high) in learnt.items())


def test_the_head_is_corrected_to_the_float_model(tiny, tiny_batches, run_graph):
    """After tuning the head is corrected to what the float model said, not the tuned one."""
    config = TuneConfig(num_steps=2, rate=0.5, scale_rate=0.0)  # far too fast: the trunk is spoilt
    made = tune_and_quantize(
        tiny,
        Int8StaticConfig(calibration="minmax"),
        config,
        tiny_batches[:16],
        steps_of(tiny_batches[:16]),
    )
    views = joined(tiny_batches[:16])
    found, wanted = (np.log(q / (1 - q)) for q in (run_graph(g, views) for g in (made, tiny)))
    assert abs((found - wanted).mean()) < 1e-3  # least squares leaves no bias


def test_a_loss_that_is_no_number_is_one_line(tiny, tiny_batches, spans):
    """Weights that are not finite end in one line that names the setting."""
    broken = onnx.ModelProto.FromString(tiny.SerializeToString())
    weight = next(t for t in broken.graph.initializer if t.name == "stem.weight")
    values = onnx.numpy_helper.to_array(weight) * np.nan
    weight.CopyFrom(onnx.numpy_helper.from_array(values.astype(np.float32), weight.name))
    with pytest.raises(ModelError, match=r"at step 0: lower tune\.rate$"):
        tune_for_tensorrt(broken, TuneConfig(num_steps=1), spans, steps_of(tiny_batches))


def test_a_tensor_without_a_span_is_refused(tiny, spans):
    """A convolution's picture needs a scale to begin with."""
    some = dict(list(spans.items())[:1])
    with pytest.raises(ValueError, match="no span of"):
        RoundingModule(features_and_logit(tiny), some)


CONFIG = """
[calibration]
num_rated = 6
num_degraded = 4
num_letterboxed = 1

[tune]
num_steps = 2
batch = 2
"""


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """``run(*words)``: ``dgiqa-quant int8`` of the small model; exit code and errors."""
    source = write_small(small_graph(), tmp_path / "small.onnx")
    packs = write_packs(tmp_path / "packs", lambda _: 0.5)
    config = tmp_path / "tune.toml"
    config.write_text(CONFIG)

    def call(*words):
        given = ["int8", source, "--config", config, "--packs", packs, *words]
        monkeypatch.setattr(sys, "argv", ["dgiqa-quant", *map(str, given)])
        with pytest.raises(SystemExit) as ended:
            main()
        return ended.value.code, capsys.readouterr().err

    return call


def test_the_command_tells_what_it_tuned(run, tmp_path):
    """``int8 --target tensorrt`` with [tune] writes a file that passes the checker and whose
    manifest has the settings.
    """
    made = tmp_path / "trt.onnx"
    code, said = run("--target", "tensorrt", "-o", made)
    assert code in (None, 0), said
    step = load_model(made).manifest.history[-1]
    assert step["target"] == "tensorrt"
    assert (step["settings"]["tune"]["num_steps"], step["settings"]["tune"]["batch"]) == (2, 2)
    assert check_tensorrt(onnx.load(made)) == []
    assert "step 0/2" in said


def test_tuning_for_a_cpu_is_refused(run, tmp_path):
    """[tune] without --target tensorrt is a wrong setting, told in one line; nothing is made."""
    code, said = run("-o", tmp_path / "cpu.onnx")
    assert code == 2
    assert "[tune], which is for --target tensorrt alone" in said
    assert not (tmp_path / "cpu.onnx").exists()
