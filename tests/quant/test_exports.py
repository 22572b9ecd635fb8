"""FP16, BF16 and ``.pt2``: the float model's scores, its manifest, and nothing that could run."""

from __future__ import annotations

import io
import json
import pickle
import sys
import warnings
import zipfile

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
torch = pytest.importorskip("torch")

from onnx import TensorProto, helper, numpy_helper  # noqa: E402
from tiny_onnx import VIEWS, joined, pictures, tiny_graph, write_tiny  # noqa: E402

from dgiqa_stream.errors import ModelError  # noqa: E402
from dgiqa_stream.manifest import load_model, manifest_path  # noqa: E402
from quant.cli import main  # noqa: E402
from quant.export_onnx import about  # noqa: E402
from quant.export_program import (  # noqa: E402
    about_program,
    export_program,
    load_program,
    write_program,
)
from quant.half import to_half  # noqa: E402
from quant.onnx_module import OnnxModule  # noqa: E402
from quant.tensorrt.rules import check_tensorrt  # noqa: E402

LEVELS = {"fp16": 11, "bf16": 8}
"""Bits of a number's significand."""


@pytest.fixture(scope="module")
def views():
    """24 pictures in one batch."""
    return joined(pictures(24))


@pytest.fixture(scope="module")
def wanted(views, run_graph):
    """The float model's quality by ONNX Runtime, (N,)."""
    return run_graph(tiny_graph(), views)


@pytest.fixture(scope="module")
def program():
    """The tiny model as a torch.export program."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's exporter warns of torch's own deprecations
        return export_program(tiny_graph(), VIEWS)


def by_torch(module, views):
    """Quality of a module that takes the views in order, (N,)."""
    with torch.no_grad():
        (found,) = module(*(torch.from_numpy(views[v.name]) for v in VIEWS))
    return found.float().numpy().reshape(-1)


def test_the_module_is_the_graph(views, wanted):
    """Node by node in torch, the graph gives ONNX Runtime's quality to float rounding."""
    np.testing.assert_allclose(by_torch(OnnxModule(tiny_graph()), views), wanted, atol=1e-5)


@pytest.mark.parametrize("kind", ["fp16", "bf16"])
def test_half_precision_keeps_scores(kind, views, wanted):
    """Quality moves by less than 8 steps of the type at 1 (bf16: 3 points of 100), and by more
    than nothing; TensorRT's parser would take the graph.
    """
    made = to_half(tiny_graph(), kind)
    found = by_torch(OnnxModule(made), views)
    assert wanted.std() > 0.03
    assert 0 < np.abs(found - wanted).max() < 8 * 2.0 ** -LEVELS[kind]
    assert check_tensorrt(made, int8=False) == []


def test_fp16_runs_in_onnxruntime(views, wanted, run_graph):
    """ONNX Runtime takes the FP16 file: uint8 in, float32 out, within a tenth of a point."""
    made = to_half(tiny_graph(), "fp16")
    assert made.graph.output[0].type.tensor_type.elem_type == TensorProto.FLOAT
    found = run_graph(made, views)
    assert found.dtype == np.float32
    assert np.abs(found - wanted).max() < 1e-3


@pytest.mark.parametrize("kind", ["fp16", "bf16"])
def test_every_weight_has_half_the_bytes(kind):
    """No float32 weight is left, and each is the float one to half a step of the type."""
    stored = {t.name: t for t in to_half(tiny_graph(), kind).graph.initializer}
    full = {t.name: numpy_helper.to_array(t) for t in tiny_graph().graph.initializer}
    assert TensorProto.FLOAT not in {t.data_type for t in stored.values()}
    for name in ("stem.weight", "hidden.weight"):
        found = np.asarray(numpy_helper.to_array(stored[name]), np.float32)
        np.testing.assert_allclose(found, full[name], rtol=2.0 ** -LEVELS[kind], atol=1e-7)


def test_a_named_node_stays_in_float32():
    """Of a node that is named as such the weights stay float32."""
    made = to_half(tiny_graph(), "fp16", float_nodes=["last"])
    kinds = {t.name: t.data_type for t in made.graph.initializer}
    assert kinds["quality.weight"] == TensorProto.FLOAT
    assert kinds["hidden.weight"] == TensorProto.FLOAT16


def test_a_weight_beyond_fp16_is_refused():
    """A weight of 70,000 is an error that names it, for fp16; bf16 holds it."""
    graph = tiny_graph()
    weight = next(t for t in graph.graph.initializer if t.name == "hidden.bias")
    weight.CopyFrom(numpy_helper.from_array(np.full(6, 7e4, np.float32), "hidden.bias"))
    with pytest.raises(ModelError, match=r"'hidden.bias' reaches 7e\+04"):
        to_half(graph, "fp16")
    to_half(graph, "bf16")


def quantised_node(graph):
    """A graph with one QuantizeLinear more."""
    graph.graph.initializer.append(numpy_helper.from_array(np.array(0.1, np.float32), "scale"))
    graph.graph.node.append(
        helper.make_node("QuantizeLinear", ["quality", "scale"], ["q"], name="rounds")
    )
    return graph


def test_int8_is_no_source():
    """A graph with Q/DQ is refused by both, naming the node and where to start."""
    with pytest.raises(ModelError, match=r"'rounds' is a QuantizeLinear.*float model"):
        to_half(quantised_node(tiny_graph()), "fp16")
    with pytest.raises(ModelError, match=r"'rounds' is a QuantizeLinear.*float model"):
        export_program(quantised_node(tiny_graph()), VIEWS)


def test_a_graph_of_other_views_is_refused():
    """Views that the graph does not take are an error that names both."""
    with pytest.raises(ModelError, match="takes whole, fragments, its manifest says whole"):
        export_program(tiny_graph(), VIEWS[:1])


def test_a_program_gives_the_same_scores(program, views, wanted, tmp_path):
    """Written and read back, the program gives ONNX Runtime's quality to float rounding, for a
    batch of 24 and of 1.
    """
    source = write_tiny(tmp_path / "a.onnx")
    written = write_program(program, tmp_path / "a.pt2", source, made_by="a test")
    loaded, manifest = load_program(tmp_path / "a.pt2")
    assert manifest == written
    for part in (slice(None), slice(0, 1)):
        some = {name: v[part] for name, v in views.items()}
        np.testing.assert_allclose(by_torch(loaded.module(), some), wanted[part], atol=1e-5)


def test_a_program_needs_torch_alone(program, tmp_path):
    """torch's own loader reads the file, and finds what the manifest says in it."""
    source = write_tiny(tmp_path / "a.onnx")
    manifest = write_program(program, tmp_path / "a.pt2", source, made_by="a test")
    extra = {"dgiqa.json": ""}
    torch.export.load(tmp_path / "a.pt2", extra_files=extra)
    assert json.loads(extra["dgiqa.json"]) == about(manifest) == about_program(tmp_path / "a.pt2")
    assert manifest.history[-1]["from_sha256"] == source.sha256


class Loud:
    """Would print when it is unpickled."""

    def __reduce__(self):
        return print, ("code ran",)


def with_part(path, name, content):
    """Add a part to an archive, or replace it, and let the manifest agree."""
    from quant.export_onnx import write_files

    kept = io.BytesIO()
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(kept, "w") as new:
        top = old.namelist()[0].partition("/")[0]
        for part in old.namelist():
            if part != f"{top}/{name}":
                new.writestr(part, old.read(part))
        new.writestr(f"{top}/{name}", content)
    write_files(kept.getvalue(), path, load_model(path).manifest)


def pickled_sample():
    """A torch.save file that would run code."""
    stored = io.BytesIO()
    torch.save((Loud(),), stored)
    return stored.getvalue()


PICKLED_WEIGHT = {"config": {"x": {"path_name": "weight_0", "use_pickle": True}}}


@pytest.mark.parametrize(
    ("part", "content"),
    [
        ("data/sample_inputs/model.pt", pickled_sample()),
        ("data/constants/opaque_obj_0", pickle.dumps(Loud())),
        ("data/weights/model_weights_config.json", json.dumps(PICKLED_WEIGHT).encode()),
    ],
    ids=["sample inputs", "object", "weights"],
)
def test_a_pickle_inside_is_refused(program, tmp_path, capsys, part, content):
    """A program that hides a pickle is one line, before any of it runs."""
    source = write_tiny(tmp_path / "a.onnx")
    write_program(program, tmp_path / "a.pt2", source, made_by="a test")
    with_part(tmp_path / "a.pt2", part, content)
    with pytest.raises(ModelError, match="could run code") as caught:
        load_program(tmp_path / "a.pt2")
    assert "\n" not in str(caught.value)
    assert "code ran" not in capsys.readouterr().out


def with_copies(path, name, contents):
    """Replace a part of an archive by several of its name, and let the manifest agree."""
    from quant.export_onnx import write_files

    kept = io.BytesIO()
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(kept, "w") as new, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the copies
        top = old.namelist()[0].partition("/")[0]
        for part in old.namelist():
            if part != f"{top}/{name}":
                new.writestr(part, old.read(part))
        for copy, content in contents:
            new.writestr(f"{top}/{copy}", content)
    write_files(kept.getvalue(), path, load_model(path).manifest)


@pytest.mark.parametrize("evil", ["model_weights_config.json", "Model_weights_config.json"])
def test_a_part_is_there_once(program, tmp_path, evil):
    """Copies of a part that would run code, before a clean one of its name, are refused: which of
    them torch reads is not known.
    """
    write_program(program, tmp_path / "a.pt2", write_tiny(tmp_path / "a.onnx"), made_by="a test")
    clean = json.dumps({"config": {}})
    copies = [(f"data/weights/{evil}", json.dumps(PICKLED_WEIGHT))] * 2
    with_copies(
        tmp_path / "a.pt2",
        "data/weights/model_weights_config.json",
        [*copies, ("data/weights/model_weights_config.json", clean)],
    )
    with pytest.raises(ModelError, match="more than once"):
        load_program(tmp_path / "a.pt2")


def test_a_file_that_would_grow_is_refused(program, tmp_path):
    """A part of zeros, packed a thousandfold, is refused before it is read."""
    write_program(program, tmp_path / "a.pt2", write_tiny(tmp_path / "a.onnx"), made_by="a test")
    with zipfile.ZipFile(tmp_path / "b.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/extra/x", bytes(64 << 20))
    from quant.export_onnx import write_files

    manifest = load_model(tmp_path / "a.pt2").manifest
    write_files((tmp_path / "b.zip").read_bytes(), tmp_path / "a.pt2", manifest)
    with pytest.raises(ModelError, match="would grow"):
        load_program(tmp_path / "a.pt2")


@pytest.mark.parametrize("content", ["{}", "[]", '{"config": 1}', '{"config": {"x": 1}}', "{"])
def test_a_malformed_list_of_tensors_is_told(program, tmp_path, content):
    """JSON of another shape than torch writes is an error of one line."""
    write_program(program, tmp_path / "a.pt2", write_tiny(tmp_path / "a.onnx"), made_by="a test")
    with_part(tmp_path / "a.pt2", "data/weights/model_weights_config.json", content)
    with pytest.raises(ModelError, match="lists no tensors"):
        load_program(tmp_path / "a.pt2")


def test_another_file_is_no_program(tmp_path):
    """Bytes that are no archive are an error of one line."""
    write_tiny(tmp_path / "a.pt2")
    with pytest.raises(ModelError, match=r"a\.pt2 is no torch\.export file"):
        load_program(tmp_path / "a.pt2")


def test_a_file_says_what_it_is(tmp_path):
    """In the file: id, version, target, views, normalisation, score mapping, calibration set,
    licence, data, the teacher's hash and every step; in the manifest: the same.
    """
    history = [
        {"step": "train", "recipe": {"name": "r"}},
        {"step": "export", "data": ["a set"], "teacher_sha256": 64 * "a"},
    ]
    manifest = write_tiny(tmp_path / "a.onnx", history=history, licence="MIT", target="tensorrt")
    found = {p.key: p.value for p in onnx.load(tmp_path / "a.onnx").metadata_props}
    assert found == about(manifest)
    assert found["dgiqa.teacher_sha256"] == 64 * "a"
    assert json.loads(found["dgiqa.data"]) == ["a set"]
    assert json.loads(found["dgiqa.steps"]) == history == manifest.history
    assert [v["name"] for v in json.loads(found["dgiqa.views"])] == ["whole", "fragments"]
    assert json.loads(found["dgiqa.normalisation"]) == {"mean": 116.0, "std": 57.63}
    assert json.loads(found["dgiqa.score_mapping"])["score"] == [0.0, 100.0]
    told = ("id", "version", "precision", "target", "licence", "calibration")
    assert [found[f"dgiqa.{k}"] for k in told] == [getattr(manifest, k) for k in told]


@pytest.mark.parametrize(("kind", "suffix"), [("fp16", "onnx"), ("bf16", "onnx"), ("", "pt2")])
def test_the_commands_write_file_and_manifest(tmp_path, monkeypatch, kind, suffix):
    """``half`` and ``program`` write a file whose manifest says its precision and its origin."""
    source = write_tiny(tmp_path / "a.onnx")
    words = ["half", "--kind", kind] if kind else ["program"]
    made = tmp_path / f"b.{suffix}"
    monkeypatch.setattr(
        sys, "argv", ["dgiqa-quant", *words, str(tmp_path / "a.onnx"), "-o", str(made)]
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's exporter warns of torch's own deprecations
        with pytest.raises(SystemExit) as caught:
            main()
    assert not caught.value.code
    manifest = load_model(made).manifest
    assert manifest.precision == (kind or "fp32")
    assert manifest.history[-1]["from_sha256"] == source.sha256
    assert manifest_path(made).is_file()


@pytest.fixture
def run(monkeypatch, capsys):
    """``run("half", ...)``: exit code and standard error."""

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["dgiqa-quant", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            main()
        return ended.value.code, capsys.readouterr().err

    return call


@pytest.mark.parametrize(
    "words",
    [("half", "--kind", "fp16", "-o", "b.onnx"), ("program", "-o", "b.pt2"), ("check-tensorrt",)],
    ids=lambda w: w[0],
)
def test_a_file_that_is_no_graph_is_one_line(run, tmp_path, monkeypatch, words):
    """Bytes that are no ONNX, with a manifest that agrees, end each command with code 5."""
    from quant.export_onnx import write_files

    monkeypatch.chdir(tmp_path)
    write_files(b"\xff" * 100, tmp_path / "a.onnx", write_tiny(tmp_path / "a.onnx"))
    code, told = run(words[0], "a.onnx", *words[1:])
    assert (code, len(told.strip().splitlines())) == (5, 1)
    assert "a.onnx is no ONNX model" in told


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (("half.onnx", "-o", "b.onnx"), 5, "is fp16"),
        (("a.onnx", "-o", "b.onnx", "--float-node", "nosuchnode"), 2, "nosuchnode"),
        (("a.onnx", "-o", "b.txt"), 2, "must end in .onnx"),
    ],
)
def test_half_refuses_what_it_cannot_do(run, tmp_path, monkeypatch, words, code, told):
    """An FP16 source, an unknown node and another suffix are one line, and nothing is written."""
    monkeypatch.chdir(tmp_path)
    write_tiny(tmp_path / "a.onnx")
    assert not run("half", "a.onnx", "--kind", "fp16", "-o", "half.onnx")[0]
    found, said = run("half", "--kind", "fp16", *words)
    assert (found, len(said.strip().splitlines())) == (code, 1)
    assert told in said
    assert not list(tmp_path.glob("b.*"))


def test_a_report_of_rules_makes_its_folder(run, tmp_path):
    """``check-tensorrt --report`` writes into a folder that was not there, and no part stays."""
    write_tiny(tmp_path / "a.onnx")
    run("check-tensorrt", tmp_path / "a.onnx", "--report", tmp_path / "new" / "r.json")
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["r.json"]
    assert json.loads((tmp_path / "new" / "r.json").read_text())["model"] == "a.onnx"
