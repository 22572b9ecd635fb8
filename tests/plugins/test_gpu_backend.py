"""plugins.torch_gpu: the torch backend against ONNX Runtime, and as the runtime uses it."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import subprocess
import sys
import threading
from pathlib import Path

import msgspec
import numpy as np
import pytest

torch = pytest.importorskip("torch")
onnx = pytest.importorskip("onnx")

# ruff: noqa: E402 - what follows needs torch
from onnx.reference import ReferenceEvaluator

from dgiqa_stream.backends import BackendStatus, open_backend
from dgiqa_stream.config import ModelSettings
from dgiqa_stream.errors import BackendUnavailable, ConfigError, ModelError
from dgiqa_stream.manifest import LoadedModel
from dgiqa_stream.preprocess import make_batch
from dgiqa_stream.scorer import load_scorer, scorer_of
from dgiqa_stream.types import Crop, FrameBatch, Planes
from plugins.torch_gpu import backend as torch_backend
from plugins.torch_gpu.engine import buckets_up_to
from plugins.torch_gpu.network import OnnxNetwork

HAS_CUDA = torch.cuda.is_available()
SURE = Path(__file__).parents[1] / "stream" / "conftest.py"


def pictures(num, *, size=(270, 480), seed=0):
    """4:2:0 pictures, smooth with some noise: blurred blots of colour."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(num):
        planes = []
        for down in (1, 2, 2):
            blots = rng.uniform(30, 220, (size[0] // 30, size[1] // 30))
            plane = np.kron(blots, np.ones((30 // down, 30 // down)))
            planes.append((plane + rng.normal(0, 6, plane.shape)).clip(0, 255).astype(np.uint8))
        found.append(Planes(tuple(planes)))
    return found


def noise(model, num_frames, seed=0):
    """A batch of noise of the model's views."""
    rng = np.random.default_rng(seed)
    shapes = {v.name: v.shape for v in model.manifest.preprocess.views}
    return FrameBatch(
        {n: rng.integers(0, 256, (num_frames, *s), dtype=np.uint8) for n, s in shapes.items()}
    )


def test_single_precision_scores_are_those_of_onnx_runtime(model, opened):
    """The same float32 graph: outputs differ by rounding alone, below 1e-5 of 0..1."""
    batch = noise(model, 5)
    wanted = open_backend(model, device="cpu").infer(batch).quality
    found = opened().infer(batch).quality
    assert found.dtype == np.float32
    assert np.abs(found - wanted).max() < 1e-5


@pytest.mark.parametrize(("precision", "points"), [("fp16", 0.2), ("bf16", 1.0)])
def test_half_precision_moves_scores_by_little(model, opened, precision, points):
    """Convolutions in FP16 keep a score within 0.2 points, in BF16, of 8 bits, within 1 point."""
    batch = noise(model, 2)
    wanted = open_backend(model, device="cpu").infer(batch).quality
    found = opened(precision=precision).infer(batch).quality
    assert 100 * np.abs(found - wanted).max() < points
    assert (found != wanted).any()


def test_the_rounding_of_int8_is_that_of_its_graph():
    """The INT8 model agrees with ONNX Runtime, run as written, within 1 point in the mean.

    Not closer: a value that lies between two integers may fall to either, and the layers after it
    go on from there; ONNX Runtime's own optimised run differs from that one by as much.
    """
    planes = pictures(3)
    with load_scorer("student", device="cpu") as reference:
        wanted = [p.score for p in reference.predict(planes)]
    with load_scorer("student", backend="torch", device="cpu") as scorer:
        found = [p.score for p in scorer.predict(planes)]
        assert scorer.manifest.precision == "int8"
    assert np.abs(np.subtract(found, wanted)).mean() < 1.0


def test_pictures_are_scored_as_by_the_other_backend():
    """Sizes, crops and turns: views cut by torch give the scores of views cut by OpenCV."""
    planes = [*pictures(2), *pictures(1, size=(360, 240), seed=1)]
    planes += [dataclasses.replace(planes[0], rotation=90)]
    crop = Crop(20, 10, 160, 180)
    with (
        load_scorer("student-fp32", device="cpu") as reference,
        load_scorer("student-fp32", backend="torch", device="cpu") as scorer,
    ):
        for wanted, found in (
            (reference.predict(planes), scorer.predict(planes)),
            (reference.predict(planes, crop=crop), scorer.predict(planes, crop=crop)),
        ):
            for one, other in zip(wanted, found, strict=True):
                assert other.score == pytest.approx(one.score, abs=1e-3)


def test_a_crop_that_leaves_nothing_is_refused_before_it_is_scored():
    """As with the other backend, ``cut`` raises ValueError, in the caller's thread."""
    with (
        load_scorer("student-fp32", backend="torch", device="cpu") as scorer,
        pytest.raises(ValueError, match="leaves less than 8 pixels"),
    ):
        scorer.cut(pictures(1), crop=Crop(1000, 0, 50, 50))


def test_a_batch_can_be_looked_at_before_it_is_scored():
    """Whoever asks for the views of a batch gets those that the runtime cuts."""
    planes = pictures(2)
    with load_scorer("student-fp32", backend="torch", device="cpu") as scorer:
        batch = scorer.cut(planes)
        wanted = make_batch(planes, scorer.manifest.preprocess.views).views
    assert len(batch) == 2
    assert all(np.array_equal(batch.views[name], view) for name, view in wanted.items())


def test_callers_of_several_threads_share_batches(model, opened):
    """Six threads at once are answered as one by one, in fewer batches than frames."""
    backend = opened(budget_seconds=0.2)
    batches = [noise(model, 1, seed=n) for n in range(6)]
    wanted = [backend.infer(b).quality.item() for b in batches]
    before = backend.statistics().batches
    found, ready = {}, threading.Barrier(6)

    def work(n):
        ready.wait(30)
        found[n] = backend.infer(batches[n]).quality.item()

    threads = [threading.Thread(target=work, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    after = backend.statistics().batches
    assert [found[n] for n in range(6)] == pytest.approx(wanted, abs=1e-5)
    assert after.num_taken - before.num_taken == 6
    assert after.num_batches - before.num_batches < 6


def test_views_are_cut_while_another_batch_is_scored(model, opened, monkeypatch):
    """While the network runs a batch, the views of the next one are cut; the network itself is for
    one batch at a time.
    """
    backend = opened()
    running, cut_two, ends = [], threading.Event(), threading.Event()
    engine_run, cut_views, num_cut = backend._engine.run, torch_backend.cut_views, []

    def run(views):
        running.append(len(running))
        if len(running) == 1:
            assert cut_two.wait(60), "the second batch waited for the first to be cut"
            assert len(running) == 1, "two batches ran at once"
        return engine_run(views)

    def cut(*given, **more):
        num_cut.append(1)
        if len(num_cut) == 2:
            cut_two.set()
        return cut_views(*given, **more)

    monkeypatch.setattr(backend._engine, "run", run)
    monkeypatch.setattr(torch_backend, "cut_views", cut)
    views = model.manifest.preprocess.views
    found = {}

    def work(n):
        picture = Planes((np.full((64, 64, 3), 90 + n, np.uint8),))
        found[n] = backend.infer(backend.cut([picture], views, crop=None)).quality.item()

    threads = [threading.Thread(target=work, args=(n,)) for n in range(2)]
    threads[0].start()
    while not running and threads[0].is_alive():
        ends.wait(0.01)
    threads[1].start()
    for thread in threads:
        thread.join(120)
    assert len(running) == 2
    assert set(found) == {0, 1}


def test_sureness_and_strangeness_are_told(tmp_path):
    """Interval, unfamiliar and flat come to what ONNX Runtime's outputs come to."""
    spec = importlib.util.spec_from_file_location("sure_models", SURE)
    helpers = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(helpers)
    path = helpers.write_sure_model(tmp_path / "sure.onnx")
    planes = [*pictures(2, size=(60, 60)), Planes((np.full((64, 64, 3), 90, np.uint8),))]
    with (
        load_scorer(path, device="cpu") as reference,
        load_scorer(path, backend="torch", device="cpu") as scorer,
    ):
        wanted, found = reference.predict(planes), scorer.predict(planes)
    for one, other in zip(wanted, found, strict=True):
        assert other.interval == pytest.approx(one.interval, abs=1e-3)
        assert other.out_of_domain == one.out_of_domain
    assert "flat" in found[2].out_of_domain


def test_the_status_tells_device_and_precision(opened):
    """``cpu`` is granted as asked; the active one names the precision."""
    assert opened().status == BackendStatus("torch:cpu", "torch:cpu fp32")
    assert opened(precision="bf16").status.active == "torch:cpu bf16"


@pytest.mark.skipif(HAS_CUDA, reason="this machine has a CUDA device")
def test_auto_says_why_it_is_the_cpu_and_strict_refuses_that(model, caplog):
    """Without a GPU, auto runs on the CPU with a reason, in one warning; strict raises it instead.
    The CPU that is asked for, and ONNX Runtime's, are told to nobody.
    """
    for settings in ({"backend": "torch", "device": "cpu"}, {}):
        open_backend(model, **settings).close()
    assert not caplog.messages
    auto = open_backend(model, backend="torch")
    auto.close()
    assert auto.status.active == "torch:cpu fp32"
    assert "CUDA" in auto.status.reason
    assert caplog.messages == [f"torch runs as torch:cpu fp32: {auto.status.reason}"]
    assert caplog.records[0].levelname == "WARNING"
    with pytest.raises(BackendUnavailable, match=r"would run as torch:cpu fp32.*--strict refuses"):
        open_backend(model, backend="torch", strict=True)
    open_backend(model, backend="torch", device="cpu", strict=True).close()
    with pytest.raises(BackendUnavailable, match="--strict refuses"):
        scorer_of(ModelSettings(backend="torch", strict=True))


@pytest.mark.skipif(HAS_CUDA, reason="this machine has a CUDA device")
@pytest.mark.parametrize("device", ["cuda", "cuda:3"])
def test_a_gpu_that_is_absent_is_told_not_replaced(model, device):
    """Asked for CUDA without it, the backend refuses with the reason: it never falls back."""
    with pytest.raises(BackendUnavailable, match=rf"'{device}'.*CUDA.*--device cpu"):
        open_backend(model, backend="torch", device=device)


@pytest.mark.parametrize("device", ["tpu", "cuda:", "cpu:0", ""])
def test_an_unknown_device_is_refused(model, device):
    """What is neither auto, cpu, cuda nor cuda:N is a ConfigError that says so."""
    with pytest.raises(ConfigError, match="known here: auto, cpu, cuda"):
        open_backend(model, backend="torch", device=device)


@pytest.mark.parametrize("package", ["torch", "onnx"])
def test_a_missing_package_says_what_to_install(model, monkeypatch, package):
    """Without torch or onnx, BackendUnavailable names it and the extra that brings it."""
    for name in [n for n in sys.modules if n.startswith("plugins.torch_gpu.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(BackendUnavailable, match=rf"needs '{package}'.*dgiqa-stream\[gpu\]"):
        open_backend(model, backend="torch")


def test_a_closed_model_says_so(model, opened):
    """After close, which may be called twice, infer raises ModelError."""
    backend = opened()
    backend.close()
    backend.close()
    with pytest.raises(ModelError, match="closed"):
        backend.infer(noise(model, 1))


def with_graph(model, tmp_path, change):
    """The model with its graph changed, under the same manifest."""
    graph = onnx.load(str(model.path))
    change(graph.graph)
    path = tmp_path / "changed.onnx"
    path.write_bytes(graph.SerializeToString())
    return LoadedModel(path, model.manifest)


def test_an_operation_that_is_not_known_is_named(model, tmp_path):
    """A graph with another operation is a ModelError that leads to the other backend."""

    def change(graph):
        graph.node[2].op_type = "Einsum"

    with pytest.raises(ModelError, match=r"operation Einsum.*--backend onnxruntime"):
        open_backend(with_graph(model, tmp_path, change), backend="torch", device="cpu")


def graph_file(path, nodes, outputs):
    """An ONNX file of nodes that read ``x`` (N, 4) and one weight ``w`` (1, 4, 1, 1)."""
    make = onnx.helper.make_tensor_value_info
    x = make("x", onnx.TensorProto.FLOAT, ["N", 4])
    weight = onnx.numpy_helper.from_array(np.ones((1, 4, 1, 1), np.float32), "w")
    given = [make(name, onnx.TensorProto.FLOAT, None) for name in outputs]
    graph = onnx.helper.make_graph(nodes, "g", [x], given, [weight])
    path.write_bytes(onnx.helper.make_model(graph).SerializeToString())
    return path


@pytest.mark.parametrize(
    ("kind", "attributes", "told"),
    [
        ("Conv", {"auto_pad": "SAME_UPPER"}, "Conv 'n' of auto_pad SAME_UPPER"),
        ("Conv", {"kernel_shape": [3]}, "Conv 'n' over 1 sides"),
        ("Cast", {"to": onnx.TensorProto.FLOAT16}, "Cast 'n' to FLOAT16"),
    ],
)
def test_what_would_be_computed_otherwise_is_refused_by_name(tmp_path, kind, attributes, told):
    """Padding that is left to the runtime, other casts and other sides are ModelErrors."""
    inputs = ["x", "w"] if kind == "Conv" else ["x"]
    node = onnx.helper.make_node(kind, inputs, ["y"], name="n", **attributes)
    with pytest.raises(ModelError, match=rf"{told}, which the torch backend does not know"):
        OnnxNetwork(graph_file(tmp_path / "a.onnx", [node], ["y"]))


def test_a_split_without_lengths_must_be_even(tmp_path):
    """Four in two parts are two and two; in three parts, a ModelError."""
    x = torch.arange(8.0).reshape(2, 4)
    for num_parts in (2, 3):
        names = [f"y{n}" for n in range(num_parts)]
        node = onnx.helper.make_node("Split", ["x"], names, axis=1, num_outputs=num_parts)
        network = OnnxNetwork(graph_file(tmp_path / f"{num_parts}.onnx", [node], names))
        if num_parts == 2:
            assert torch.equal(network({"x": x})["y1"], x[:, 2:])
        else:
            with pytest.raises(ModelError, match="Split of 4 into 3 unequal parts"):
                network({"x": x})


@pytest.mark.parametrize(
    ("shape", "allowzero"), [([-1, 2, 2], 0), ([0, 2, 2], 0), ([0, -1], 0), ([2, 4], 1)]
)
def test_a_reshape_is_that_of_the_standard(tmp_path, shape, allowzero):
    """Lengths that are given, inferred (-1) and kept (0): as ONNX's own reference has it."""
    lengths = onnx.numpy_helper.from_array(np.array(shape))
    nodes = [
        onnx.helper.make_node("Constant", [], ["s"], value=lengths),
        onnx.helper.make_node("Reshape", ["x", "s"], ["y"], allowzero=allowzero),
    ]
    path = graph_file(tmp_path / "a.onnx", nodes, ["y"])
    x = np.arange(8, dtype=np.float32).reshape(2, 4)
    (wanted,) = ReferenceEvaluator(str(path)).run(["y"], {"x": x})
    found = OnnxNetwork(path)({"x": torch.from_numpy(x)})["y"].numpy()
    assert found.shape == wanted.shape
    assert np.array_equal(found, wanted)


def test_an_output_that_another_operation_reads_is_kept(tmp_path):
    """An output stays to the end, though the node after it is the last to read it."""
    nodes = [
        onnx.helper.make_node("Relu", ["x"], ["y"]),
        onnx.helper.make_node("Sigmoid", ["y"], ["z"]),
    ]
    network = OnnxNetwork(graph_file(tmp_path / "a.onnx", nodes, ["y", "z"]))
    assert set(network({"x": torch.zeros(1, 4)})) == {"y", "z"}


@pytest.mark.parametrize(
    ("name", "precision"), [("a.onnx", "fp16"), ("a.onnx", "bf16"), ("a.pt2", "fp32")]
)
def test_files_for_other_engines_are_refused_in_a_line(model, name, precision):
    """Half-precision ONNX and exported programs are ModelErrors that name what to give instead."""
    manifest = msgspec.structs.replace(model.manifest, precision=precision)
    with pytest.raises(ModelError, match=rf"{name} is {precision}.*--model student-fp32"):
        open_backend(LoadedModel(Path(name), manifest), backend="torch", device="cpu")


def test_too_little_memory_at_opening_leads_on(model, monkeypatch):
    """Where the device is full, the ModelError names the batch and another device."""

    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch_backend, "Engine", full)
    with pytest.raises(ModelError, match=r"up to 64 frames.*smaller max_batch.*another --device"):
        open_backend(model, backend="torch", device="cpu")


def test_a_package_that_does_not_load_says_why(model, monkeypatch):
    """An ImportError that names no package is told with its reason."""

    def broken(name):
        raise ImportError("libcudart.so.13: cannot open shared object file")

    monkeypatch.setattr("dgiqa_stream.backends.importlib.import_module", broken)
    with pytest.raises(BackendUnavailable, match=r"cannot be loaded \(libcudart.so.13: .*\): pip"):
        open_backend(model, backend="torch")


def test_a_file_that_is_no_model_is_refused(model, tmp_path):
    """Bytes of chance are a ModelError of one line."""
    path = tmp_path / "noise.onnx"
    path.write_bytes(np.random.default_rng(0).bytes(1000))
    with pytest.raises(ModelError, match=r"noise\.onnx cannot be opened") as caught:
        open_backend(LoadedModel(path, model.manifest), backend="torch", device="cpu")
    assert "\n" not in str(caught.value)


def test_graph_and_manifest_must_agree(model):
    """Another view size, or an output that is not there, is a ModelError that says so."""
    manifest = model.manifest
    views = [msgspec.structs.replace(v, height=240) for v in manifest.preprocess.views]
    preprocess = msgspec.structs.replace(manifest.preprocess, views=views)
    output = msgspec.structs.replace(manifest.output, name="beauty")
    for fields in ({"preprocess": preprocess}, {"output": output}):
        changed = LoadedModel(model.path, msgspec.structs.replace(manifest, **fields))
        with pytest.raises(ModelError, match="belong to different models"):
            open_backend(changed, backend="torch", device="cpu")


def test_a_number_that_is_none_is_an_error(model, tmp_path):
    """NaN from the network is a ModelError, never a score."""

    def change(graph):
        for tensor in graph.initializer:
            if tensor.name == "quality.bias":
                nan = np.full(tensor.dims, np.nan, np.float32)
                tensor.CopyFrom(onnx.numpy_helper.from_array(nan, tensor.name))

    with pytest.raises(ModelError, match="not a number for every frame"):
        open_backend(with_graph(model, tmp_path, change), backend="torch", device="cpu")


@pytest.mark.parametrize(
    ("largest", "buckets"), [(1, (1,)), (2, (1, 2)), (48, (1, 2, 4, 8, 16, 32, 48))]
)
def test_buckets_hold_every_batch(largest, buckets):
    """Powers of two and the largest: no batch runs in one of more than twice its size."""
    assert buckets_up_to(largest) == buckets
    for n in range(1, largest + 1):
        assert min(b for b in buckets if b >= n) < 2 * n or n == 1


@pytest.fixture
def scored(tmp_path):
    """Runs ``dgiqa-stream score`` on a picture: exit code, score and errors."""
    cv2 = pytest.importorskip("cv2")
    blots = np.random.default_rng(0).integers(0, 256, (9, 16, 3))
    cv2.imwrite(str(tmp_path / "a.png"), np.kron(blots, np.ones((30, 30, 1))).astype(np.uint8))
    environment = {k: v for k, v in os.environ.items() if not k.startswith("DGIQA_")}

    def run(*arguments):
        command = [sys.executable, "-m", "dgiqa_stream", "score", str(tmp_path / "a.png")]
        done = subprocess.run(
            [*command, "--model", "student-fp32", "-q", "-f", "ndjson", *arguments],
            capture_output=True, check=False, timeout=300, env=environment,
        )  # fmt: skip
        score = msgspec.json.decode(done.stdout)["score"] if done.stdout else None
        return done.returncode, score, done.stderr.decode()

    return run


def test_the_command_line_scores_with_torch(scored):
    """``score --backend torch`` gives the score of the other backend, to two digits."""
    code, wanted, _ = scored("--device", "cpu")
    again, found, _ = scored("--device", "cpu", "--backend", "torch", "--strict")
    assert (code, again) == (0, 0)
    assert found == pytest.approx(wanted, abs=0.02)


@pytest.mark.skipif(HAS_CUDA, reason="this machine has a CUDA device")
def test_the_command_line_refuses_a_fallback(scored):
    """``--strict`` without a GPU ends with 5 and one line, and scores nothing."""
    code, score, errors = scored("--backend", "torch", "--strict")
    assert (code, score) == (5, None)
    assert "--strict refuses" in errors
    assert "Traceback" not in errors
