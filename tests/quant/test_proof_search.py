"""``dgiqa-quant search``: sensitivity, the grid, budgets, and going on after an interrupt."""

from __future__ import annotations

import json
import sys

import msgspec
import numpy as np
import pytest

torch = pytest.importorskip("torch")
onnx = pytest.importorskip("onnx")

from onnx import numpy_helper  # noqa: E402
from small_models import calibration_batches, small_graph, write_packs, write_small  # noqa: E402

from dgiqa_stream.errors import ConfigError  # noqa: E402
from dgiqa_stream.manifest import load_model  # noqa: E402
from dgiqa_stream.scorer import load_scorer  # noqa: E402
from quant.cli import main  # noqa: E402
from quant.correction import outputs_of  # noqa: E402
from quant.proof.layers import float_convs  # noqa: E402
from quant.proof.search import Budget, Measured, SearchSpace, best, grid, unmet  # noqa: E402
from quant.proof.search_walk import SearchWalk  # noqa: E402
from quant.proof.sensitivity import only_rounding, sensitivities  # noqa: E402
from quant.ptq import Int8StaticConfig, quantize_onnx  # noqa: E402

PLAIN = Int8StaticConfig(correct_head=False)
CONFIG = """
[calibration]
num_rated = 8
num_degraded = 6
num_letterboxed = 2
"""
EXPAND = ("conv_6", "conv_18")
SPARED = ("conv_6", "conv_8", "conv_18", "conv_20")
"""The layer and the one that reads it, in both views."""


@pytest.fixture(scope="module")
def batches():
    """Textures, clean and damaged, black, white and noise."""
    return calibration_batches(10)


def with_outlier():
    """The small graph with a channel of 50 that its next layer ignores: it coarsens its layer."""
    graph = small_graph()
    by_name = {t.name: t for t in graph.graph.initializer}
    for name, place, value in (("expand.bias", 0, 50.0), ("project.weight", np.s_[:, 0], 0.0)):
        values = numpy_helper.to_array(by_name[name]).copy()
        values[place] = value
        by_name[name].CopyFrom(numpy_helper.from_array(values, name))
    return graph


def test_without_rounding_the_graph_is_the_float_one(batches):
    """With no layer named, not a bit of the output changes."""
    graph = small_graph()
    one = only_rounding(graph, quantize_onnx(graph, PLAIN, batches), ())
    np.testing.assert_array_equal(
        outputs_of(one, "quality", batches), outputs_of(graph, "quality", batches)
    )


def test_with_every_layer_rounded_it_is_the_int8_graph(batches):
    """All layers named come nearer to the INT8 graph's own scores than a third of what rounding
    changes: what is left is the rounding of biases, and sums that integers put on another step.
    """
    graph = small_graph()
    quantised = quantize_onnx(graph, PLAIN, batches)
    nodes = [node for layer in sensitivities(graph, quantised, batches[:1]) for node in layer.nodes]
    found, exact, wanted = (
        outputs_of(one, "quality", batches)
        for one in (only_rounding(graph, quantised, nodes), graph, quantised)
    )
    assert len(nodes) == 6 + 2
    assert np.abs(found - wanted).mean() < np.abs(exact - wanted).mean() / 3


def test_the_layer_with_an_outlier_is_the_most_sensitive(batches):
    """It is told by its weight and both views' nodes; with those that read it left in float, too,
    the error falls.
    """
    graph = with_outlier()
    found = sensitivities(graph, quantize_onnx(graph, PLAIN, batches), batches)
    assert (found[0].layer, found[0].nodes) == ("expand.weight", EXPAND)
    assert found[0].float_nodes == SPARED
    assert found[0].mean_points > 2 * found[1].mean_points
    wanted = outputs_of(graph, "quality", batches)
    errors = []
    for nodes in ((), SPARED):
        config = msgspec.structs.replace(PLAIN, float_nodes=nodes)
        made = quantize_onnx(graph, config, batches)
        errors.append(np.abs(outputs_of(made, "quality", batches) - wanted).mean())
        assert set(float_convs(made)) == set(nodes)
    assert errors[1] < 0.7 * errors[0]


def measured(key: str, ms: float, mb: float, drop: float) -> Measured:
    """A made-up candidate."""
    return Measured(key, "int8", "minmax", [], ms, mb, drop, 1.0, "0" * 64)


SOME = [measured("a", 9, 12, 0.0), measured("b", 3, 4, 0.004), measured("c", 4, 5, 0.002)]


@pytest.mark.parametrize(
    ("budget", "prefer", "key"),
    [
        (Budget(), "ms", "b"),
        (Budget(), "drop", "a"),
        (Budget(max_drop=0.003), "ms", "c"),
        (Budget(max_drop=0.002), "mb", "c"),
        (Budget(max_ms=9, max_drop=0), "ms", "a"),
        (Budget(max_ms=3.5), "drop", "b"),
        (Budget(max_ms=2), "ms", None),
    ],
)
def test_the_best_is_within_the_budget(budget, prefer, key):
    """Bounds hold with their ends; of what keeps them, the preferred figure decides."""
    found = best(SOME, budget, prefer=prefer)
    assert (found.key if found else None) == key


@pytest.mark.parametrize(
    ("budget", "told"),
    [
        (Budget(max_ms=2), "--max-ms 2: the quickest, b, takes 3 ms"),
        (Budget(max_mb=3.5), "--max-mb 3.5: the smallest, b, has 4 MB"),
        (Budget(max_ms=1, max_mb=1), "--max-ms 1: .*; nor --max-mb 1"),
        (Budget(max_ms=4, max_drop=0.001), "--max-ms 4 hold, --max-drop 0.001 does not: .*, c,"),
        (
            Budget(max_ms=3.5, max_drop=0.003),
            "--max-drop 0.003 hold, --max-ms 3.5 does not: .*, c, takes 4 ms",
        ),
    ],
)
def test_the_bound_that_cannot_be_met_is_named(budget, told):
    """One sentence names the bound, and the candidate that comes nearest to it."""
    import re

    found = unmet(SOME, budget)
    assert best(SOME, budget) is None
    assert re.search(told, found)
    assert "\n" not in found


def test_the_grid_is_every_combination():
    """Two variants, two methods and three numbers of layers make 2 float and 12 INT8 candidates."""
    space = SearchSpace(methods=("minmax", "mse"), num_float_layers=(2, 0, 1))
    found = grid(["x", "y"], space)
    assert len({c.key for c in found}) == len(found) == 2 + 12
    assert [c.num_float_layers for c in found[2:]] == [0] * 4 + [1] * 4 + [2] * 4


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A float model, packs rated by it, and settings."""
    folder = tmp_path_factory.mktemp("project")
    model = write_small(with_outlier(), folder / "f.onnx")
    with load_scorer(model, device="cpu") as scorer:
        write_packs(folder / "packs", lambda p: scorer.predict([p])[0].score)
    (folder / "int8.toml").write_text(CONFIG)
    return folder


@pytest.fixture
def run(project, monkeypatch, capsys):
    """``run(...)`` of ``search f.onnx`` with small settings: exit code, output, errors."""

    def call(*words, model="f.onnx", config="int8.toml", packs="packs"):
        given = ["search", project / model, "--packs", project / packs, "--config"]
        given += [project / config, "--rounds", 1, "--methods", "minmax,mse"]
        given += ["--float-layers", "0,1", *words]
        monkeypatch.setattr(sys, "argv", ["dgiqa-quant", *map(str, given)])
        with pytest.raises(SystemExit) as ended:
            main()
        said = capsys.readouterr()
        return ended.value.code, said.out, said.err

    return call


def test_an_interrupted_search_goes_on(run, project, tmp_path, monkeypatch):
    """Stopped at the fourth of five candidates it leaves no half file and no result; the same
    command measures the last two alone and keeps the first three as they were.
    """
    asked, measure = [], SearchWalk._measure

    def stop_at_the_fourth(self, candidate):
        asked.append(candidate.key)
        if len(asked) == 4:
            raise KeyboardInterrupt
        return measure(self, candidate)

    monkeypatch.setattr(SearchWalk, "_measure", stop_at_the_fourth)
    out = tmp_path / "out"
    assert run("-o", out, "--max-drop", 1)[0] == 130
    kept = json.loads((out / "search.json").read_text())["measured"]
    assert list(kept) == asked[:3]
    assert not list(out.rglob("*.part"))
    assert not (out / "best.onnx").exists()
    (out / "candidates" / "left.onnx.part").write_bytes(b"half")  # of a kill

    code, said, _ = run("-o", out, "--max-drop", 1)
    assert code == 0
    assert len(asked) == 4 + 2
    assert asked[4] == asked[3]
    found = json.loads((out / "search.json").read_text())
    assert {key: found["measured"][key] for key in kept} == kept
    assert not list(out.rglob("*.part"))
    _judge_result(out, found, said)

    # another budget is answered from what is measured; figures of before are not taken again
    assert run("-o", out, "--max-drop", 1, "--prefer", "mb")[0] == 0
    code, said, err = run("-o", out, "--max-ms", 1e-5)
    assert (code, len(asked)) == (1, 6)
    assert said.startswith("no candidate of 5 keeps --max-ms 1e-05: the quickest, f-")

    # a folder of another search is not mixed with
    code, _, err = run("-o", out, "--num-rated", 10)
    assert code == 2
    assert "search of other" in err


def _judge_result(out, found, said):
    """best.onnx is the quickest, says so, and its manifest tells of the search."""
    quickest = min(found["measured"].values(), key=lambda m: m["ms"])
    assert quickest["key"] in said
    manifest = load_model(out / "best.onnx").manifest
    step = manifest.history[-1]
    assert (step["step"], step["chosen"]["key"]) == ("search", quickest["key"])
    assert manifest.precision == quickest["precision"]
    left = found["measured"]["f-int8-minmax-float1"]["float_nodes"]
    assert left == list(SPARED)
    page = (out / "search.md").read_text()
    assert ", ".join(SPARED) in page
    assert f"**{quickest['key']}**" in page
    assert found["measured"]["f-fp32"]["drop"] == 0
    sizes = {key: m["mb"] for key, m in found["measured"].items()}
    assert sizes["f-int8-minmax-float0"] * 1e6 == pytest.approx(
        (out / "candidates" / "f-int8-minmax-float0.onnx").stat().st_size
    )


@pytest.mark.parametrize(
    ("words", "options", "code", "told"),
    [
        (("--max-ms", "0"), {}, 2, "max-ms"),
        (("--max-drop", "-0.1"), {}, 2, "--max-drop -0.1 is no budget: give 0 or more"),
        (("--max-mb", "0.0001"), {}, 2, "cannot be met"),
        (("--max-mb", "nan"), {}, 2, "max-mb"),
        (("--methods", "minmax,guess"), {}, 2, "guess"),
        (("--methods", "trained"), {}, 2, "--ranges"),
        (("--float-layers", "few"), {}, 2, "few"),
        (("--prefer", "luck"), {}, 2, "luck"),
        ((), {"config": "unknown.toml"}, 2, "per_cent"),
        ((), {"packs": "none"}, 5, "no whole pack"),
        ((), {"packs": "black"}, 5, "of one colour"),
        ((), {"config": "few.toml"}, 5, "fewest"),
        ((), {"model": "stray.onnx"}, 5, "sha256"),
    ],
)
def test_bad_input_is_one_line_and_no_folder(run, project, tmp_path, words, options, code, told):
    """An impossible budget, an unknown key or method, a set that is missing, black or too small,
    and a model that does not match its manifest are one line each, before any work.
    """
    (project / "unknown.toml").write_text("[quantize]\nper_cent = 99\n")
    (project / "few.toml").write_text(
        "[calibration]\nnum_rated = 1\nnum_degraded = 1\nnum_letterboxed = 1\n"
    )
    if options.get("packs") == "black":
        write_black_packs(project / "black")
    stray = write_small(small_graph(), project / "stray.onnx")
    stray.write_bytes(stray.read_bytes() + b"\0")
    found, out, err = run(*words, "-o", tmp_path / "out", **options)
    assert (found, out) == (code, "")
    assert told in err
    assert len(err.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def write_black_packs(folder):
    """Packs whose every picture is black."""
    from distill.data.packed import Record, as_planes_420, write_pack

    black = as_planes_420(np.zeros((64, 64, 3), np.uint8))
    about = {"made_by": "test", "settings": {}}
    splits = ["train"] * 8 + ["validation"] * 6
    rated = [(Record(f"{i}", f"{i}", s, mos=0.1), black) for i, s in enumerate(splits)]
    ladder = [
        (Record(f"a/{i}", "a", "train", degradation="x" if i else "clean", level=i), black)
        for i in range(6)
    ]
    write_pack(folder / "rated", rated, **about)
    write_pack(folder / "ladders", ladder, **about)


def test_a_budget_is_of_numbers():
    """Zero milliseconds, and a drop below zero, are refused when the budget is made."""
    for wrong in ({"max_ms": 0.0}, {"max_mb": -1.0}, {"max_drop": -0.1}, {"max_ms": float("inf")}):
        with pytest.raises(ConfigError, match="no budget"):
            Budget(**wrong)
