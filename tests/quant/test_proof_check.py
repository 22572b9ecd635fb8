"""``dgiqa-quant check``: two artefacts, the same pictures, and an exit code."""

from __future__ import annotations

import json
import sys

import cv2
import numpy as np
import pytest

torch = pytest.importorskip("torch")
onnx = pytest.importorskip("onnx")

from onnx import numpy_helper  # noqa: E402
from small_models import (  # noqa: E402
    SPECS,
    calibration_batches,
    rgb_of,
    small_graph,
    write_packs,
    write_small,
)

from dgiqa_stream.errors import ConfigError, ModelError  # noqa: E402
from dgiqa_stream.manifest import load_model  # noqa: E402
from dgiqa_stream.scorer import load_scorer  # noqa: E402
from quant.cli import main  # noqa: E402
from quant.proof.agreement import Tolerance, agreement  # noqa: E402
from quant.proof.artefacts import TorchSettings, open_artefact, score_all  # noqa: E402
from quant.proof.pictures import generated_pictures  # noqa: E402
from quant.ptq import Int8StaticConfig, quantize_onnx  # noqa: E402


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A small float model and its INT8 model."""
    folder = tmp_path_factory.mktemp("pair")
    graph = small_graph()
    int8 = quantize_onnx(graph, Int8StaticConfig(), calibration_batches())
    return write_small(graph, folder / "f.onnx"), write_small(int8, folder / "q.onnx", "int8")


@pytest.fixture
def run(monkeypatch, capsys):
    """``run("check", ...)``: exit code, standard output, standard error."""

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["dgiqa-quant", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            main()
        said = capsys.readouterr()
        return ended.value.code, said.out, said.err

    return call


def shifted(logits: float):
    """The small graph with its last bias moved."""
    graph = small_graph()
    bias = next(t for t in graph.graph.initializer if t.name == "quality.bias")
    bias.CopyFrom(numpy_helper.from_array(np.full(1, logits, np.float32), "quality.bias"))
    return graph


def test_a_model_agrees_with_itself(run, pair):
    """The differences are 0, the ranks equal, the exit code 0."""
    code, out, _ = run("check", pair[0], pair[0], "--json", "--max-max", 0, "--min-srcc", 1)
    found = json.loads(out)
    assert code == 0
    assert found["within"]
    assert found["agreement"]["max_points"] == 0
    assert found["agreement"]["srcc"] == pytest.approx(1)


def test_what_is_printed_is_what_the_scorer_says(run, pair):
    """The mean, 99th percentile and maximum are those of the runtime's own scores."""
    pictures = [planes for _, planes in generated_pictures()]
    scores = []
    for path in pair:
        with load_scorer(path, device="cpu") as scorer:
            scores.append(np.array([p.score for p in scorer.predict(pictures)]))
    apart = np.abs(scores[1] - scores[0])
    _, out, _ = run("check", *pair, "--json")
    found = json.loads(out)["agreement"]
    wanted = [apart.mean(), np.percentile(apart, 99), apart.max()]
    assert [found[k] for k in ("mean_points", "p99_points", "max_points")] == pytest.approx(wanted)
    assert found["num_pictures"] == len(pictures)


def test_over_the_tolerance_is_exit_code_1(run, pair, tmp_path):
    """A head moved by half a logit is out of the default bounds: code 1, and the reason is told."""
    other = write_small(shifted(0.5), tmp_path / "other.onnx")
    code, out, err = run("check", pair[0], other)
    assert (code, err) == (1, "")
    assert "over the tolerance: mean |delta|" in out
    wide = ("--max-mean", 100, "--max-p99", 100)
    assert run("check", pair[0], other, *wide)[0] == 0
    assert run("check", pair[0], other, *wide, "--max-max", 1)[0] == 1


def test_broken_ranks_are_exit_code_1(run, pair, tmp_path):
    """Another network's order is told by --min-srcc, whatever the differences may be."""
    other = write_small(small_graph(seed=3), tmp_path / "other.onnx")
    code, out, _ = run(
        "check", pair[0], other, "--max-mean", 100, "--max-p99", 100, "--min-srcc", 0.99
    )
    assert code == 1
    assert "SRCC" in out.splitlines()[-1]


def test_real_pictures_are_compared_too(run, pair, tmp_path):
    """A folder's pictures and the validation half of packs join, or take the place of, the
    generated ones.
    """
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(3):
        cv2.imwrite(str(folder / f"{i}.png"), rgb_of(i))
    packs = write_packs(tmp_path / "packs", lambda _: 50.0)
    code, out, _ = run(
        "check", *pair, "--pictures", folder, "--packs", packs, "--num-pictures", 8, "--json",
        "--no-generated", "--max-mean", 100, "--max-p99", 100,
    )  # fmt: skip
    assert code == 0
    assert json.loads(out)["pictures"] == {"pictures": 3, "rated": 4, "ladders": 4}


def test_a_checkpoint_agrees_with_its_export(trained_student, graph, specs, tmp_path):
    """Torch and ONNX Runtime give one score within 0.01 of a point: float32 reordering."""
    pytest.importorskip("onnxscript")
    path = tmp_path / "best.pt"
    torch.save(trained_student.state_dict(), path)
    exported = write_small(graph, tmp_path / "student.onnx")
    opened = [
        open_artefact(str(path), TorchSettings(views=specs)),
        open_artefact(str(exported)),
    ]
    names, (a, b) = score_all(opened, list(generated_pictures(1))[-6:])
    assert agreement(a, b, names).max_points < 0.01


def test_a_program_agrees_with_the_graph_it_was_made_of(pair, tmp_path):
    """A .pt2 and its ONNX file give one score within 0.01 of a point: float32 reordering."""
    from quant.export_program import export_program, write_program

    model = load_model(pair[0])
    program = export_program(onnx.load(model.path), SPECS)
    write_program(program, tmp_path / "f.pt2", model.manifest, made_by="test")
    opened = [open_artefact(str(path)) for path in (tmp_path / "f.pt2", pair[0])]
    names, (a, b) = score_all(opened, list(generated_pictures(1))[-6:])
    assert opened[0].kind == "torch program fp32"
    assert agreement(a, b, names).max_points < 0.01


def test_generated_pictures_are_the_same_each_time():
    """One seed gives the same names and bytes; black, noise and letterboxes are among them."""
    first, second = (list(generated_pictures(2)) for _ in range(2))
    assert [name for name, _ in first] == [name for name, _ in second]
    for (_, a), (_, b) in zip(first, second, strict=True):
        np.testing.assert_array_equal(a.samples[0], b.samples[0])
    found = {name: planes.samples[0] for name, planes in first}
    assert found["generated/black"].max() == 0
    assert found["generated/noise"].std() == pytest.approx(255 / 12**0.5, rel=0.02)
    assert found["generated/0/letterbox"][:40].max() == 0
    assert found["generated/0/letterbox"][100:200].std() > 5


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (("absent.onnx", "{f}"), 5, "absent.onnx"),
        (("model.h5", "{f}"), 2, "no artefact"),
        (("weights.pt", "{f}"), 2, "--recipe"),
        (("m.engine", "{f}"), 5, "TensorRT"),
        (("stray.onnx", "{f}"), 5, "sha256"),
        (("{f}", "{f}", "--no-generated"), 2, "nothing to compare on"),
        (("{f}", "{f}", "--pictures", "empty"), 5, "no picture"),
        (("{f}", "{f}", "--packs", "empty"), 5, "no whole pack"),
        (("{f}", "{f}", "--max-mean", "nan"), 2, "max-mean"),
        (("{f}", "{f}", "--max-p99", "-1"), 2, "max-p99"),
        (("{f}", "{f}", "--max-mad", "1"), 2, "max-mad"),
    ],
)
def test_bad_input_is_one_line(run, pair, tmp_path, monkeypatch, arguments, code, told):
    """A wrong file, set or bound is told in one line that names it, with its exit code."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    for name in ("weights.pt", "m.engine"):
        (tmp_path / name).write_bytes(b"not a model")
    stray = write_small(small_graph(), tmp_path / "stray.onnx")
    stray.write_bytes(pair[1].read_bytes())  # another file under its manifest
    found, out, err = run("check", *(a.format(f=pair[0]) for a in arguments))
    assert (found, out) == (code, "")
    assert told in err
    assert len(err.strip().splitlines()) == 1


def test_a_picture_that_cannot_be_read_is_named(run, pair, tmp_path):
    """A folder with a broken picture is refused by that picture's name."""
    (tmp_path / "broken.png").write_bytes(b"no picture")
    code, _, err = run("check", *pair, "--pictures", tmp_path)
    assert code == 5
    assert "broken.png" in err


def test_a_tolerance_is_inclusive():
    """What lies on a bound is within it, what lies beyond is not."""
    a, b = np.array([10.0, 20.0, 30.0]), np.array([11.0, 21.0, 31.0])
    found = agreement(a, b, ["x", "y", "z"])
    assert (found.mean_points, found.max_points, found.bias_points) == (1, 1, 1)
    assert Tolerance(max_mean=1.0, max_p99=1.0, min_srcc=1.0).exceeded(found) == []
    assert len(Tolerance(max_mean=0.99, max_p99=0.99).exceeded(found)) == 2


def test_equal_scores_have_no_rank():
    """A model that gives all pictures one score keeps no --min-srcc."""
    found = agreement(np.array([1.0, 1.0]), np.array([1.0, 2.0]), ["x", "y"])
    assert found.srcc is None
    assert Tolerance(None, None, min_srcc=0.0).exceeded(found) != []


def test_agreement_needs_two_pictures_of_both():
    """One picture, or scores of several lengths, are refused."""
    with pytest.raises(ValueError, match="2 or more"):
        agreement(np.ones(1), np.ones(1), ["x"])
    with pytest.raises(ValueError, match="2 or more"):
        agreement(np.ones(2), np.ones(3), ["x", "y"])


def test_scores_that_are_none_are_refused(pair):
    """A model that gives NaN, or too few scores, is named."""
    import dataclasses

    good = open_artefact(str(pair[0]))
    for wrong in (np.array([np.nan]), np.zeros(2)):
        bad = dataclasses.replace(good, predict=lambda _, wrong=wrong: wrong)
        with pytest.raises(ModelError, match=r"f\.onnx"):
            score_all([good, bad], list(generated_pictures(0))[:1])


def test_a_bound_must_be_a_number():
    """A bound of NaN, which nothing exceeds, is refused."""
    with pytest.raises(ConfigError, match="max-p99"):
        Tolerance(max_p99=float("nan"))
