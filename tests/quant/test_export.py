"""Export: the same numbers in ONNX, in a file that tells nothing of the machine."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from pathlib import Path

import msgspec
import numpy as np
import pytest

torch = pytest.importorskip("torch")
onnx = pytest.importorskip("onnx")

from dgiqa_stream.errors import ModelError  # noqa: E402
from dgiqa_stream.manifest import (  # noqa: E402
    DomainSpec,
    HalfWidthMapping,
    IntervalSpec,
    ScoreMapping,
    load_model,
)
from dgiqa_stream.scorer import load_scorer  # noqa: E402
from dgiqa_stream.types import FrameBatch  # noqa: E402
from quant.export_onnx import with_pooling_nodes, write_model, write_successor  # noqa: E402

UINT8 = 2  # onnx.TensorProto.UINT8


@pytest.fixture
def written(graph, specs, tmp_path):
    """A written model and its manifest."""
    path = tmp_path / "models" / "tiny.onnx"
    copy = onnx.ModelProto()
    copy.CopyFrom(graph)
    manifest = write_model(
        copy,
        path,
        name="tiny",
        version="1.2.3",
        precision="fp32",
        views=specs,
        normalisation=(116.0, 57.63),
        num_parameters=17,
        made_by="dgiqa-quant export best.pt",
        history=[{"step": "train"}],
        mapping=ScoreMapping(raw=[0.0, 0.5, 1.0], score=[0.0, 60.0, 100.0]),
    )
    return path, manifest


@pytest.mark.parametrize("num_pictures", [1, 2, 5])
def test_onnx_equals_torch(graph, run_graph, all_views, quality, num_pictures):
    """Exporting moves no quality (0..1) by more than 1e-4, whatever the batch."""
    views = {name: v[:num_pictures] for name, v in all_views.items()}
    found = run_graph(graph, views)
    assert quality.std() > 0.05  # the pictures differ in quality, so that agreement says something
    np.testing.assert_allclose(found, quality[:num_pictures], atol=1e-4)


def test_the_inputs_are_the_views(graph, specs):
    """The graph takes uint8 (batch, height, width, 3) under the views' names, in their order."""
    found = [
        (
            i.name,
            i.type.tensor_type.elem_type,
            [d.dim_value for d in i.type.tensor_type.shape.dim[1:]],
            bool(i.type.tensor_type.shape.dim[0].dim_param),
        )
        for i in graph.graph.input
    ]
    assert found == [(view.name, UINT8, list(view.shape), True) for view in specs]


def test_means_are_pooling_nodes(graph):
    """All ten means are GlobalAveragePool; no ReduceMean is left, nor its axes as a constant."""
    kinds = Counter(node.op_type for node in graph.graph.node)
    assert kinds["GlobalAveragePool"] == 10
    read = {name for node in graph.graph.node for name in node.input}
    assert {t.name for t in graph.graph.initializer} <= read
    assert kinds["ReduceMean"] == 0


def test_every_node_has_a_name_of_its_own(graph):
    """Settings that name nodes are not ambiguous."""
    names = [node.name for node in graph.graph.node]
    assert len(set(names)) == len(names)
    assert all(names)


def test_other_means_are_left_alone():
    """A mean over channels is no pooling over space and stays what it is."""
    from onnx import helper, numpy_helper

    shape = [1, 4, 6, 6]
    nodes = [
        helper.make_node("ReduceMean", ["x", "channels"], ["a"], keepdims=0),
        helper.make_node("ReduceMean", ["x", "space"], ["b"], keepdims=0),
    ]
    axes = {"channels": [1], "space": [2, 3]}
    made = helper.make_graph(
        nodes,
        "means",
        [helper.make_tensor_value_info("x", 1, shape)],
        [
            helper.make_tensor_value_info("a", 1, [1, 6, 6]),
            helper.make_tensor_value_info("b", 1, [1, 4]),
        ],
        [numpy_helper.from_array(np.array(v, np.int64), k) for k, v in axes.items()],
    )
    opsets = [helper.make_opsetid("", 20)]
    changed = with_pooling_nodes(helper.make_model(made, opset_imports=opsets, ir_version=10))
    assert [n.op_type for n in changed.graph.node] == ["ReduceMean", "GlobalAveragePool", "Flatten"]


def test_the_file_tells_nothing_of_the_machine(written):
    """Neither the exporter's notes nor any folder of this machine is in the model or manifest."""
    path, _ = written
    known = [Path.home(), Path(__file__).parents[2], Path(torch.__file__).parents[1], path.parent]
    model = onnx.load(path)
    for constant in model.graph.initializer:
        constant.ClearField("raw_data")  # in megabytes of weights any three letters may occur
    for content in (model.SerializeToString(), path.with_name("tiny.onnx.json").read_bytes()):
        for word in (b"pkg.", b"site-packages", b".py", *(bytes(folder) for folder in known)):
            assert word not in content


def test_the_manifest_is_that_of_the_file(written):
    """Hash and size are the file's, and what was given is what a reader finds."""
    path, manifest = written
    content = path.read_bytes()
    assert manifest.sha256 == hashlib.sha256(content).hexdigest()
    assert manifest.size_bytes == len(content)
    stored = json.loads(path.with_name("tiny.onnx.json").read_text())
    assert (stored["id"], stored["version"], stored["num_parameters"]) == ("tiny", "1.2.3", 17)
    about = {p.key: p.value for p in onnx.load(path).metadata_props}
    assert (about["dgiqa.id"], about["dgiqa.version"]) == ("tiny", "1.2.3")
    assert sorted(p.name for p in path.parent.iterdir()) == ["tiny.onnx", "tiny.onnx.json"]


def test_the_runtime_takes_it(written, all_views, quality):
    """``load_model`` and ``load_scorer`` accept the files; raw outputs are the student's quality
    and scores follow the mapping of the manifest.
    """
    path, manifest = written
    assert load_model(path).manifest == manifest
    with load_scorer(path) as scorer:
        found = scorer.infer(FrameBatch(all_views))
    np.testing.assert_allclose([p.raw for p in found], quality, atol=1e-4)
    wanted = np.interp([p.raw for p in found], [0, 0.5, 1], [0, 60, 100])
    np.testing.assert_allclose([p.score for p in found], wanted)


def test_a_successor_says_how_sure_it_is_as_its_origin_does(written, tmp_path):
    """One more step of the work leaves ``interval`` and ``domain`` in the manifest; a model without
    them has neither key.
    """
    path, plain = written
    interval = IntervalSpec("spread", HalfWidthMapping([0.0, 1.0], [2.0, 30.0]), 0.8)
    domain = DomainSpec("unfamiliar", 0.7)
    sure = msgspec.structs.replace(plain, interval=interval, domain=domain)
    found = {}
    for name, was in (("plain", plain), ("sure", sure)):
        target = tmp_path / f"{name}.onnx"
        write_successor(onnx.load(path), target, was, step={"step": "none"}, made_by="a test")
        found[name] = json.loads(target.with_name(f"{name}.onnx.json").read_text())
        assert load_model(target).manifest.interval == was.interval
        assert load_model(target).manifest.domain == was.domain
    assert found["sure"].keys() - found["plain"].keys() == {"interval", "domain"}


def test_a_changed_file_is_refused(written):
    """One byte more than the manifest knows of is an error before any engine sees the file."""
    path, _ = written
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(ModelError, match="sha256"):
        load_scorer(path)
