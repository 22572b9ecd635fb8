"""``dgiqa-quant report``: MACs, layers, latency, memory, agreement, and the pages of them."""

from __future__ import annotations

import json
import math
import sys

import numpy as np
import pytest

torch = pytest.importorskip("torch")
onnx = pytest.importorskip("onnx")
pytest.importorskip("matplotlib")

from onnx import helper, numpy_helper  # noqa: E402
from small_models import (  # noqa: E402
    MACS,
    NUM_PARAMETERS,
    calibration_batches,
    small_graph,
    write_packs,
    write_small,
)

from dgiqa_stream.errors import ConfigError, ModelError  # noqa: E402
from dgiqa_stream.manifest import load_model, shipped_models  # noqa: E402
from dgiqa_stream.scorer import load_scorer  # noqa: E402
from quant.cli import main  # noqa: E402
from quant.proof import latency  # noqa: E402
from quant.proof.commands.rated import ladder_figures, mos_figures  # noqa: E402
from quant.proof.figures import read_graph  # noqa: E402
from quant.proof.files import write_whole  # noqa: E402
from quant.proof.latency import LatencySettings, measure_latency  # noqa: E402
from quant.proof.layers import (  # noqa: E402
    float_convs,
    integer_convs,
    layer_noise,
    named_float_nodes,
)
from quant.proof.macs import layer_macs, num_weights, total_macs  # noqa: E402
from quant.proof.memory import peak_memory  # noqa: E402
from quant.proof.report_page import draw_front, front  # noqa: E402
from quant.ptq import Int8StaticConfig, quantize_onnx  # noqa: E402

LEFT = "conv_4"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A float model, its INT8 model, and an INT8 model with one convolution left in float."""
    folder = tmp_path_factory.mktemp("files")
    graph, batches = small_graph(), calibration_batches()
    mixed = Int8StaticConfig(float_nodes=(LEFT,))
    return (
        write_small(graph, folder / "f.onnx"),
        write_small(quantize_onnx(graph, Int8StaticConfig(), batches), folder / "q.onnx", "int8"),
        write_small(
            quantize_onnx(graph, mixed, batches),
            folder / "m.onnx",
            "int8",
            settings={"quantize": {"float_nodes": [LEFT]}},
        ),
    )


def one_node(kind: str, shapes: list[tuple], target: list, **attributes):
    """A graph of one node with inputs of these shapes; all but the first are constants."""
    inputs = [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, shapes[0])]
    stored = [
        numpy_helper.from_array(np.zeros(shape, np.float32), f"w{i}")
        for i, shape in enumerate(shapes[1:])
    ]
    names = ["x", *(t.name for t in stored)]
    output = helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, target)
    node = helper.make_node(kind, names, ["y"], name="one", **attributes)
    inner = helper.make_graph([node], "one", inputs, [output], stored)
    return helper.make_model(inner, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("dilation", [1, 3])
@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("side", [1, 3])
def test_macs_of_convolutions_are_the_closed_form(stride, dilation, groups, side):
    """Output height x width x channels x (input channels / groups) x kernel area, whatever the
    stride, dilation, padding, groups and bias.
    """
    height, width, channels, filters, pad = 17, 23, 6, 12, 2
    graph = one_node(
        "Conv",
        [("n", channels, height, width), (filters, channels // groups, side, side), (filters,)],
        ["n", filters, "h", "w"],
        strides=[stride, stride],
        dilations=[dilation, dilation],
        group=groups,
        pads=[pad] * 4,
    )
    out = [(n + 2 * pad - dilation * (side - 1) - 1) // stride + 1 for n in (height, width)]
    assert total_macs(graph) == math.prod(out) * filters * (channels // groups) * side**2
    assert num_weights(graph) == filters * (channels // groups) * side**2 + filters


@pytest.mark.parametrize(
    ("kind", "shapes", "target", "attributes", "macs"),
    [
        ("Gemm", [("n", 5), (7, 5), (7,)], ["n", 7], {"transB": 1}, 5 * 7),
        ("Gemm", [("n", 5), (5, 7), (7,)], ["n", 7], {}, 5 * 7),
        ("Gemm", [(5, 3), (5, 7), (7,)], [3, 7], {"transA": 1}, 3 * 5 * 7),
        ("MatMul", [("n", 4, 9, 5), (5, 7)], ["n", 4, 9, 7], {}, 4 * 9 * 5 * 7),
        (
            "ConvTranspose",
            [("n", 4, 6, 6), (4, 3, 2, 2)],
            ["n", 3, 12, 12],
            {"strides": [2, 2]},
            6 * 6 * 4 * 3 * 4,
        ),
    ],
)
def test_macs_of_products_are_the_closed_form(kind, shapes, target, attributes, macs):
    """A product of (M, K) and (K, N) takes M K N; a transposed convolution a filter an input."""
    (layer,) = layer_macs(one_node(kind, shapes, target, **attributes))
    assert (layer.kind, layer.macs) == (kind, macs)


def test_int8_has_the_macs_and_layers_of_its_float_graph(files):
    """Q/DQ nodes add no MACs, and the small network has those counted by hand."""
    for path in files:
        assert total_macs(onnx.load(path)) == MACS
    assert num_weights(onnx.load(files[0])) == NUM_PARAMETERS


def test_what_cannot_be_counted_is_refused():
    """An Einsum, and a convolution of unknown size, are told rather than counted as nothing."""
    einsum = one_node("Einsum", [("n", 5), (5, 7)], ["n", 7], equation="ij,jk->ik")
    with pytest.raises(ModelError, match="Einsum"):
        total_macs(einsum)
    free = one_node("Conv", [("n", 3, "h", "w"), (4, 3, 1, 1)], ["n", 4, "h", "w"])
    with pytest.raises(ModelError, match="unknown"):
        total_macs(free)


def test_the_shipped_int8_model_has_no_float_convolution_but_the_named():
    """In ONNX Runtime's optimised graph of the shipped INT8 model every convolution is a
    QLinearConv, but for those that its manifest names as left in float.
    """
    shipped = load_model(shipped_models()["student"])
    graph = onnx.load(shipped.path)
    num_convs = sum(node.op_type == "Conv" for node in graph.graph.node)
    named = named_float_nodes(shipped.manifest.history)
    assert shipped.manifest.precision == "int8"
    assert set(float_convs(graph)) == named
    assert len(integer_convs(graph)) == num_convs - len(named) > 0


def test_a_convolution_left_in_float_is_named(files):
    """The optimised mixed graph has exactly the convolution in float that its manifest names."""
    assert float_convs(onnx.load(files[2])) == [LEFT]
    assert named_float_nodes(load_model(files[2]).manifest.history) == {LEFT}
    assert len(float_convs(onnx.load(files[0]))) == 6
    assert float_convs(onnx.load(files[1])) == []


def scaled(graph, name: str, factor: float):
    """The graph with one constant multiplied."""
    other = onnx.ModelProto()
    other.CopyFrom(graph)
    stored = next(t for t in other.graph.initializer if t.name == name)
    stored.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(stored) * factor, name))
    return other


def test_sqnr_is_signal_over_difference():
    """Weights and biases 10 % too large give 20 dB at that layer, and layers before it none."""
    graph = small_graph()
    other = scaled(scaled(graph, "stem.weight", np.float32(1.1)), "stem.bias", np.float32(1.1))
    found = {n.tensor: n.sqnr_db for n in layer_noise(graph, other, calibration_batches(2))}
    assert found["whole.a"] == pytest.approx(20, abs=0.01)
    assert {"whole.c", "fragments.e", "h", "logit"} <= set(found)
    same = layer_noise(graph, graph, calibration_batches(2))
    assert {n.sqnr_db for n in same} == {200.0}


def test_int8_layers_have_sqnr_and_a_float_layer_has_more(files):
    """Every layer of the INT8 graph is measured after its rounding: about 6 dB a bit less what
    small ranges lose, so 20 to 60 dB at the stem; the stem in float is above that.
    """
    graphs = [onnx.load(path) for path in files]
    batches = calibration_batches(4)
    of_int8, of_mixed = (
        {n.node: n.sqnr_db for n in layer_noise(graphs[0], g, batches)} for g in graphs[1:]
    )
    assert len(of_int8) == 6 + 2 + 2
    assert 20 < of_int8[LEFT] < 60
    assert of_mixed[LEFT] >= of_int8[LEFT]


class FakeBackend:
    """An engine that takes a fixed time by a clock of its own."""

    def __init__(self, clock: list[float], seconds: float) -> None:
        self.clock, self.seconds, self.calls = clock, seconds, 0

    def infer(self, _batch):
        """Pass the time."""
        self.calls += 1
        self.clock[0] += self.seconds

    def close(self):
        """Nothing to close."""


def test_latency_is_interleaved_and_relative(files, monkeypatch):
    """A model of a third of the reference's time is 3 times faster, however the machine slows:
    the models run in turn, so both meet the slow rounds.
    """
    clock, opened = [0.0], []

    def open_fake(model, *, device, num_threads):
        speed = 0.03 if model.manifest.precision == "fp32" else 0.01
        opened.append(FakeBackend(clock, speed / num_threads))
        return opened[-1]

    monkeypatch.setattr(latency, "open_backend", open_fake)
    monkeypatch.setattr(latency.time, "perf_counter", lambda: clock[0])
    monkeypatch.setitem(latency._round.__kwdefaults__, "clock", lambda: clock[0])
    settings = LatencySettings(num_rounds=5, num_warmups=2)
    reference, other = measure_latency([load_model(p) for p in files[:2]], settings)
    assert [(one.batch, one.threads) for one in other] == [(1, 1), (8, 1), (1, 2), (8, 2)]
    assert [one.median_ms for one in other] == pytest.approx([10, 10, 5, 5])
    assert [one.times_faster for one in reference] == [1, 1, 1, 1]
    assert [one.times_faster for one in other] == pytest.approx([3, 3, 3, 3])
    assert {backend.calls for backend in opened} == {2 * (5 + 2)}


def test_peak_memory_is_of_the_models_own_process():
    """Opening and running the shipped float model takes its file's size at least, and the figure
    does not hold what this process has taken.
    """
    held = np.ones(400 << 20, np.uint8)
    path = shipped_models()["student-fp32"]
    found = peak_memory(path)
    assert path.stat().st_size < found.model_bytes < held.nbytes
    assert found.peak_bytes < held.nbytes


def test_a_model_that_does_not_run_is_told(tmp_path):
    """The process's last line is the reason."""
    with pytest.raises(ModelError, match=r"absent\.onnx"):
        peak_memory(tmp_path / "absent.onnx")


def test_the_front_is_what_none_is_better_than():
    """Of five points the two that are quicker or better than all others remain, quickest first."""
    points = [(3.0, 0.9), (1.0, 0.5), (2.0, 0.9), (2.5, 0.7), (1.5, 0.5)]
    assert front(points) == [(1.0, 0.5), (2.0, 0.9)]


@pytest.mark.parametrize(("low", "high"), [(None, None), (0.91, 0.95), (0.8, 0.85)])
def test_any_interval_can_be_drawn(tmp_path, low, high):
    """A value without an interval, or outside of its own, is drawn all the same."""
    one = {
        "id": "m", "version": "1", "name": "m", "size_bytes": 1000, "scores": None,
        "latency": [{"batch": 1, "threads": 1, "median_ms": 2.0}],
        "mos": {"srcc": {"value": 0.9, "low": low, "high": high}},
    }  # fmt: skip
    draw_front({"artefacts": [one]}, tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes()[:4] == b"\x89PNG"


def test_a_machine_without_load_average_is_described(monkeypatch):
    """Where the system keeps no load average, as Windows, there is none."""
    monkeypatch.delattr(latency.os, "getloadavg", raising=False)
    assert latency.machine()["load_average"] is None


def test_a_model_that_hangs_is_told(monkeypatch, tmp_path):
    """A process that takes longer than its limit is an error of one line."""
    monkeypatch.setattr("quant.proof.memory._LIMIT_SECONDS", 0.01)
    with pytest.raises(ModelError, match=r"within 0\.01 s"):
        peak_memory(tmp_path / "m.onnx")


def test_agreement_with_people_is_the_paired_difference():
    """A model in the raters' order against one in the reverse: SRCC 1, difference 2, and the
    reference's own difference is 0 with p 1.
    """
    mos = np.arange(20.0)
    found = mos_figures(-mos, mos * 3, mos)
    assert found["srcc"]["value"] == pytest.approx(1)
    assert found["difference"]["value"] == pytest.approx(2)
    assert found["p_value"] < 0.01
    assert mos_figures(mos, mos, mos)["p_value"] == 1


def test_ladders_are_kept_where_a_falling_step_still_falls():
    """Of five falling steps of the reference one rises by more than half a point: 4 of 5 kept."""
    before = [("a", [50.0, 40.0, 30.0, 31.0]), ("b", [60.0, 50.0, 40.0, 30.0])]
    after = [("a", [50.0, 50.4, 30.0, 29.0]), ("b", [60.0, 50.0, 50.6, 30.0])]
    found = ladder_figures(before, after)
    assert (found["falling"]["num_true"], found["falling"]["num"]) == (5, 6)
    assert (found["kept"]["num_true"], found["kept"]["num"]) == (4, 5)
    assert ladder_figures([], []) is None


@pytest.fixture
def run(monkeypatch, capsys):
    """``run("report", ...)``: exit code, standard output, standard error."""

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["dgiqa-quant", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            main()
        said = capsys.readouterr()
        return ended.value.code, said.out, said.err

    return call


def test_a_report_says_everything_of_each_model(run, files, tmp_path):
    """JSON, page and plot are written; of each model they say parameters, MACs, bytes, latency in
    four cases, memory, layers, differences, agreement with MOS and ladders.
    """
    with load_scorer(files[0], device="cpu") as scorer:
        packs = write_packs(tmp_path / "packs", lambda p: scorer.predict([p])[0].score)
    code, out, _ = run(
        "report", files[1], files[0], files[2], "--packs", packs, "--rounds", 1, "-o",
        tmp_path / "out", "--num-layer-pictures", 1,
    )  # fmt: skip
    assert code == 0
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "report.json", "report.md", "report.png"
    ]  # fmt: skip
    found = json.loads((tmp_path / "out" / "report.json").read_text())
    assert found["reference"] == "f.onnx"
    assert found["pictures"] == {"rated": 24, "ladders": 4, "generated": 54}
    whole, int8, mixed = found["artefacts"]
    assert [a["name"] for a in found["artefacts"]] == ["f.onnx", "q.onnx", "m.onnx"]
    assert (whole["scores"], whole["sqnr"]) == (None, None)
    assert (int8["num_parameters"], int8["macs"]) == (NUM_PARAMETERS, MACS)
    assert int8["size_bytes"] == files[1].stat().st_size
    assert [(o["batch"], o["threads"]) for o in int8["latency"]] == [
        (1, 1), (8, 1), (1, 2), (8, 2)
    ]  # fmt: skip
    assert mixed["float_convs"] == [LEFT]
    assert mixed["steps"] == ["train", "int8"]
    assert len(int8["sqnr"]["layers"]) == 10
    assert 0 < int8["scores"]["mean_points"] <= int8["scores"]["p99_points"]
    # the ratings are the float model's scores with a noise of 2 points over a spread of 10 or more
    assert whole["mos"]["srcc"]["value"] > 0.85
    assert whole["mos"]["difference"]["value"] == 0
    assert int8["ladders"]["num_ladders"] == 1
    assert (tmp_path / "out" / "report.md").read_text() in out
    assert (tmp_path / "out" / "report.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (("{q}", "{m}"), 2, "FP32"),
        (("{f}", "{q}", "{q}"), 2, "given twice"),
        (("{f}", "student"), 2, "other views"),
        (("{f}", "absent.onnx"), 5, "absent.onnx"),
        (("{f}", "--packs", "empty"), 5, "no whole pack"),
        (("{f}", "--rounds", "0"), 2, "rounds"),
    ],
)
def test_bad_input_is_one_line_and_no_file(
    run, files, tmp_path, monkeypatch, arguments, code, told
):
    """A wrong set of models, packs or rounds is one line, and nothing is written."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    names = dict(zip("fqm", files, strict=True))
    words = [a.format(**names) for a in arguments]
    found, out, err = run("report", *words, "-o", tmp_path / "out")
    assert (found, out) == (code, "")
    assert told in err
    assert len(err.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_too_few_ratings_are_refused(run, files, tmp_path):
    """Packs with four rated validation pictures give no figure, and the number is told."""
    packs = write_packs(tmp_path / "packs", lambda _: 50.0, num_validation=4)
    code, _, err = run("report", files[0], "--packs", packs, "-o", tmp_path / "out")
    assert code == 5
    assert "4 rated" in err


def test_a_file_that_is_no_graph_is_told(tmp_path, files):
    """A manifest that matches a file of other bytes does not make it a model."""
    import dataclasses

    path = tmp_path / "x.onnx"
    path.write_bytes(b"\xff" * 100)
    with pytest.raises(ModelError, match="no ONNX model"):
        read_graph(dataclasses.replace(load_model(files[0]), path=path))


def test_a_result_is_whole_or_absent(tmp_path):
    """What fails or is interrupted while it is written leaves neither a result nor a part of one,
    and a former result as it was.
    """
    path = tmp_path / "r.json"

    def half(part):
        part.write_text("{")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_whole(path, half)
    assert list(tmp_path.iterdir()) == []
    write_whole(path, lambda part: part.write_text("{}"))
    with pytest.raises(KeyboardInterrupt):
        write_whole(path, half)
    assert path.read_text() == "{}"


def test_timing_needs_rounds():
    """No round, no batch or a batch of nothing is refused."""
    for wrong in ({"num_rounds": 0}, {"batches": ()}, {"batches": (0,)}):
        with pytest.raises(ConfigError, match="1 or more"):
            LatencySettings(**wrong)
