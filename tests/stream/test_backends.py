"""backends: engines found by name, a model checked against its manifest, numbers per frame."""

from __future__ import annotations

import dataclasses
import hashlib
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import msgspec
import numpy as np
import onnxruntime
import pytest

from dgiqa_stream.backends import BACKENDS, BackendStatus, open_backend
from dgiqa_stream.backends._fallback import FallbackBackend
from dgiqa_stream.backends._onnxruntime import OnnxRuntimeBackend
from dgiqa_stream.backends.fake import FakeBackend
from dgiqa_stream.errors import BackendUnavailable, ConfigError, DeviceLost, ModelError
from dgiqa_stream.manifest import load_model, manifest_path
from dgiqa_stream.types import FrameBatch

HAS_CUDA = "CUDAExecutionProvider" in onnxruntime.get_available_providers()


@pytest.fixture(scope="module")
def model():
    """The shipped model in single precision."""
    return load_model("student-fp32")


def noise(model, num_frames, seed=0):
    """A batch of noise of the model's views."""
    rng = np.random.default_rng(seed)
    return FrameBatch(
        {
            view.name: rng.integers(0, 256, (num_frames, *view.shape), dtype=np.uint8)
            for view in model.manifest.preprocess.views
        }
    )


def with_manifest(model, **fields):
    """The same file under another manifest."""
    return dataclasses.replace(model, manifest=msgspec.structs.replace(model.manifest, **fields))


def test_an_unknown_backend_is_named_with_those_that_exist(model):
    """The message lists every backend of the table."""
    with pytest.raises(ConfigError, match=f"'tpu'.*{', '.join(sorted(BACKENDS))}"):
        open_backend(model, backend="tpu")


@pytest.mark.skipif(HAS_CUDA, reason="this ONNX Runtime has CUDA")
def test_int8_for_tensorrt_on_a_cpu_is_told_once(model, caplog):
    """What comes to the CPU by itself is told of, with the model to take; who asks for the CPU
    knows, and other models are not spoken of.
    """
    for_tensorrt = load_model("student-tensorrt")
    for opened in ((for_tensorrt, "cpu"), (model, "auto")):
        open_backend(opened[0], device=opened[1]).close()
    assert caplog.text == ""
    open_backend(for_tensorrt).close()
    [told] = caplog.records
    assert "student-tensorrt.onnx is INT8 for TensorRT" in told.message
    assert "--model student " in told.message


@pytest.mark.parametrize("device", ["tpu", "CPU", "cuda:", "cuda:x", "cpu:0", ""])
def test_an_unknown_device_is_refused(model, device):
    """What is neither auto, cpu, cuda nor cuda:N is a ConfigError that says so."""
    with pytest.raises(ConfigError, match="known here: auto, cpu, cuda"):
        open_backend(model, device=device)


@pytest.mark.parametrize("backend", sorted(BACKENDS))
def test_an_unknown_device_is_refused_before_anything_is_loaded(model, monkeypatch, backend):
    """Whatever the backend, it is a usage error at once: no package is imported for it, and none
    that is missing is named in its place.
    """
    monkeypatch.setattr("importlib.import_module", lambda name: pytest.fail(f"{name} was loaded"))
    with pytest.raises(ConfigError, match="unknown device 'nonsense'; known here: auto, cpu, cuda"):
        open_backend(model, backend=backend, device="nonsense")


@pytest.mark.skipif(HAS_CUDA, reason="this ONNX Runtime has CUDA")
@pytest.mark.parametrize("device", ["cuda", "cuda:3"])
def test_a_device_that_is_absent_is_told_not_replaced(model, device):
    """Asked for CUDA without it, the backend refuses and says what to do: it never falls back."""
    with pytest.raises(BackendUnavailable, match=rf"'{device}'.*--device cpu"):
        open_backend(model, device=device)


def test_the_status_tells_what_runs(model):
    """``cpu`` is granted as asked; ``auto`` says why it is the CPU where it is."""
    assert open_backend(model, device="cpu").status == BackendStatus(
        "onnxruntime:cpu", "onnxruntime:cpu"
    )
    auto = open_backend(model).status
    assert auto.requested == "onnxruntime:auto"
    assert (auto.active == "onnxruntime:cuda") == (auto.reason == "")


def test_a_missing_engine_says_what_to_install(model, monkeypatch):
    """Without the engine's package, BackendUnavailable names it and the line to install it."""
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(BackendUnavailable, match="'onnxruntime': pip install 'dgiqa-stream'"):
        open_backend(model)


def test_views_that_are_not_the_graphs_are_refused(model):
    """A manifest with other views, by name, size or number, does not open the file."""
    preprocess = model.manifest.preprocess
    first, *others = preprocess.views
    for views in (
        [msgspec.structs.replace(first, name="other"), *others],
        [msgspec.structs.replace(first, height=2 * first.height), *others],
        [first, *others, msgspec.structs.replace(first, name="more")],
        others,
    ):
        changed = msgspec.structs.replace(preprocess, views=views)
        with pytest.raises(ModelError, match="its manifest says"):
            open_backend(with_manifest(model, preprocess=changed))


def test_an_output_that_the_graph_lacks_is_refused(model):
    """A wrong output name is found on opening, not at the first frame."""
    output = msgspec.structs.replace(model.manifest.output, name="mos")
    with pytest.raises(ModelError, match="'mos'"):
        open_backend(with_manifest(model, output=output))


def test_a_damaged_graph_under_a_matching_manifest_is_refused(model, tmp_path):
    """Bytes that are no ONNX graph, though their digest is right, are a ModelError of one line."""
    path = tmp_path / "bad.onnx"
    path.write_bytes(model.path.read_bytes()[:5000])
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    manifest = msgspec.structs.replace(model.manifest, sha256=digest)
    manifest_path(path).write_bytes(msgspec.json.encode(manifest))
    with pytest.raises(ModelError, match=r"bad\.onnx cannot be opened") as caught:
        open_backend(load_model(path))
    assert "\n" not in str(caught.value)


def test_a_batch_is_its_frames(model):
    """Five frames at once give the five single outputs, in order: only float32 sums are regrouped,
    which moves an output of 0..1 by far less than 1e-4.
    """
    backend = open_backend(model, device="cpu")
    batch = noise(model, 5)
    together = backend.infer(batch).quality
    alone = [
        backend.infer(
            FrameBatch({name: view[i : i + 1] for name, view in batch.views.items()})
        ).quality
        for i in range(5)
    ]
    assert together.shape == (5,)
    assert together.dtype == np.float32
    assert len(set(together.tolist())) == 5
    assert together == pytest.approx(np.concatenate(alone), abs=1e-4)


def test_threads_do_not_disturb_each_other(model):
    """Four threads on one backend get exactly what one thread gets."""
    backend = open_backend(model, device="cpu")
    batches = [noise(model, 1, seed) for seed in range(8)]
    alone = [backend.infer(batch).quality.tolist() for batch in batches]
    with ThreadPoolExecutor(4) as pool:
        assert [f.quality.tolist() for f in pool.map(backend.infer, batches)] == alone


def test_a_closed_backend_says_so(model):
    """After closing, twice for good measure, inference is a ModelError."""
    backend = open_backend(model, device="cpu")
    backend.close()
    backend.close()
    with pytest.raises(ModelError, match="closed"):
        backend.infer(noise(model, 1))


def stub(model, run):
    """A backend whose session is a function."""
    session = SimpleNamespace(run=run)
    return OnnxRuntimeBackend(session, model, BackendStatus("stub", "stub"))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_an_output_that_is_no_number_is_an_error(model, value):
    """A frame without a finite output ends in ModelError rather than in a made-up score."""
    backend = stub(model, lambda names, inputs: [np.array([[0.5], [value]], np.float32)])
    with pytest.raises(ModelError, match="not a number"):
        backend.infer(noise(model, 2))


def test_a_failing_engine_is_a_model_error(model):
    """What the engine raises at inference becomes one line of ours."""

    def fail(names, inputs):
        raise RuntimeError("out of memory\nat node 7")

    with pytest.raises(ModelError, match="inference failed: out of memory at node 7"):
        stub(model, fail).infer(noise(model, 1))


@pytest.mark.parametrize("number", [700, 719])
def test_a_device_that_fails_twice_is_lost(model, number):
    """What CUDA fails at once is tried again; twice is DeviceLost, and being full is neither."""
    told, num_calls = [f"CUDA failure {number}: unspecified ; GPU=0", ""], []

    def run(names, inputs):
        num_calls.append(1)
        if reason := told.pop(0):
            raise RuntimeError(f"[ONNXRuntimeError] : 1 : FAIL : {reason}")
        return [np.array([[0.5]], np.float32)] * len(names)

    backend = stub(model, run)
    assert backend.infer(noise(model, 1)).quality.item() == 0.5
    told += [f"CUDNN failure {number}: CUDNN_STATUS_EXECUTION_FAILED ; GPU=0"] * 2
    with pytest.raises(DeviceLost, match=r"lost while running: .*CUDNN failure"):
        backend.infer(noise(model, 1))
    told += ["CUDA failure 2: out of memory ; GPU=0"]
    with pytest.raises(ModelError, match=r"inference failed: .*out of memory") as caught:
        backend.infer(noise(model, 1))
    assert not isinstance(caught.value, DeviceLost)
    assert len(num_calls) == 5


def test_no_thread_ends_because_another_found_the_loss_first(model):
    """A thread whose engine was closed under it, because another thread found its device lost, is
    answered by the engine that follows; a ModelError of that one is its own.
    """
    closed, entered, answers = threading.Event(), threading.Event(), []

    class First:
        status = BackendStatus("x:cuda", "x:cuda")

        def infer(self, batch):
            if len(batch) == 2:  # the slow thread's
                entered.set()
                closed.wait(30)
                raise ModelError("the model is closed: open it again")
            raise DeviceLost("gone")

        def close(self):
            closed.set()

    backend = FallbackBackend(First(), FakeBackend)
    slow = threading.Thread(target=lambda: answers.append(backend.infer(noise(model, 2)).quality))
    slow.start()
    assert entered.wait(30)
    assert backend.infer(noise(model, 1)).quality.shape == (1,)
    slow.join(30)
    assert [a.shape for a in answers] == [(2,)]
    assert (backend.status.requested, backend.status.active) == ("x:cuda", "fake:cpu")


def test_the_fake_is_brightness(model):
    """The fake backend needs no engine and gives the mean of the first view, 0 to 1."""
    views = model.manifest.preprocess.views
    levels = [0, 51, 255]
    batch = FrameBatch(
        {v.name: np.stack([np.full(v.shape, n, np.uint8) for n in levels]) for v in views}
    )
    backend = open_backend(model, backend="fake")
    assert backend.infer(batch).quality == pytest.approx([0.0, 0.2, 1.0])
    assert backend.status.active == "fake:cpu"
