"""backends: ONNX Runtime's TensorRT provider, what it is given, and what runs without it."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest

from dgiqa_stream.backends import _onnxruntime_tensorrt as module
from dgiqa_stream.backends import engine_folder, open_backend
from dgiqa_stream.errors import BackendUnavailable
from dgiqa_stream.manifest import load_model
from dgiqa_stream.types import FrameBatch

TENSORRT, CUDA, CPU = (f"{n}ExecutionProvider" for n in ("Tensorrt", "CUDA", "CPU"))
HAS_CUDA = CUDA in onnxruntime.get_available_providers()


@pytest.fixture(scope="module")
def model():
    """The shipped model in single precision."""
    return load_model("student-fp32")


@pytest.fixture
def built_with(monkeypatch, tmp_path):
    """``built_with(providers, starting)``: an ONNX Runtime that says it has ``providers``, of which
    only ``starting`` start; sessions are real ones on the CPU. Gives the lists asked for.
    """
    monkeypatch.setenv("DGIQA_ENGINE_CACHE", str(tmp_path / "engines"))
    real = onnxruntime.InferenceSession

    def install(providers, starting):
        asked = []

        class Session:
            def __init__(self, path, options, *, providers):
                asked.append(providers)
                names = [p if isinstance(p, str) else p[0] for p in providers]
                self._started = [n for n in names if n in starting or n == CPU]
                self._session = real(path, options, providers=[CPU])

            def __getattr__(self, name):
                return getattr(self._session, name)

            def get_providers(self):
                return self._started

        monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [*providers, CPU])
        monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
        return asked

    return install


@pytest.mark.skipif(HAS_CUDA, reason="this ONNX Runtime has CUDA")
def test_without_the_provider_the_cpu_runs_and_the_reason_is_told(model, caplog):
    """``auto`` falls to the CPU and names what is missing, in one warning, too; ``strict`` refuses
    by its error alone.
    """
    backend = open_backend(model, backend="onnxruntime-tensorrt")
    assert backend.status.requested == "onnxruntime-tensorrt:auto"
    assert backend.status.active == "onnxruntime:cpu"
    assert backend.status.reason == f"no {TENSORRT} in this ONNX Runtime"
    with pytest.raises(BackendUnavailable, match=f"{TENSORRT}.*--strict refuses"):
        open_backend(model, backend="onnxruntime-tensorrt", strict=True)
    with pytest.raises(BackendUnavailable, match="needs ONNX Runtime with CUDA"):
        open_backend(model, backend="onnxruntime-tensorrt", device="cuda")
    (told,) = caplog.messages
    assert told == f"onnxruntime-tensorrt runs as onnxruntime:cpu: {backend.status.reason}"


@pytest.mark.parametrize(
    ("starting", "active", "reason"),
    [
        ([TENSORRT, CUDA], "onnxruntime-tensorrt:cuda", ""),
        ([CUDA], "onnxruntime:cuda", f"ONNX Runtime could not start {TENSORRT}"),
    ],
)
def test_the_provider_that_runs_is_named(model, built_with, starting, active, reason):
    """TensorRT's provider comes first and CUDA's second; the status names the one that started."""
    asked = built_with([TENSORRT, CUDA], starting)
    status = open_backend(model, backend="onnxruntime-tensorrt", device="cuda:2").status
    assert (status.active, status.reason) == (active, reason)
    (providers,) = asked
    assert [p if isinstance(p, str) else p[0] for p in providers] == [TENSORRT, CUDA, CPU]
    assert [p[1]["device_id"] for p in providers[:2]] == [2, 2]


def test_cuda_that_does_not_start_is_refused_by_name(model, built_with):
    """A device asked for by name is never replaced by the CPU; ``auto`` says why it is."""
    built_with([TENSORRT, CUDA], [])
    with pytest.raises(BackendUnavailable, match="could not start CUDA"):
        open_backend(model, backend="onnxruntime-tensorrt", device="cuda")
    for name in ("onnxruntime", "onnxruntime-tensorrt"):
        status = open_backend(model, backend=name, device="auto").status
        assert status.active == "onnxruntime:cpu"
        assert status.reason.startswith("ONNX Runtime could not start")


def test_auto_takes_the_gpu_that_there_is(model, built_with):
    """``auto`` runs on CUDA where ONNX Runtime starts it, with nothing to explain."""
    asked = built_with([CUDA], [CUDA])
    status = open_backend(model, device="auto").status
    assert (status.active, status.reason) == ("onnxruntime:cuda", "")
    assert asked == [[(CUDA, {"device_id": 0}), CPU]]
    assert open_backend(model, device="cpu").status.active == "onnxruntime:cpu"
    assert asked[1] == [CPU]


def test_there_is_one_profile_for_all_batches_and_a_cache(model, built_with):
    """Each view has a smallest and a largest batch, and engines lie where the variable says."""
    asked = built_with([TENSORRT, CUDA], [TENSORRT, CUDA])
    open_backend(model, backend="onnxruntime-tensorrt", device="cuda")
    options = asked[0][0][1]
    for kind, size in (("min", 1), ("max", module.MAX_BATCH)):
        wanted = [
            f"{v.name}:{size}x{v.height}x{v.width}x3" for v in model.manifest.preprocess.views
        ]
        assert options[f"trt_profile_{kind}_shapes"].split(",") == wanted
    folder = engine_folder() / "onnxruntime"
    assert folder.is_dir()
    assert options["trt_engine_cache_path"] == str(folder)
    assert options["trt_int8_enable"] == "False"


def test_no_folder_means_no_cache(model, built_with, monkeypatch, tmp_path):
    """Where the folder cannot be made, the model opens, without options of caches."""
    (tmp_path / "file").touch()
    asked = built_with([TENSORRT, CUDA], [TENSORRT, CUDA])
    monkeypatch.setenv("DGIQA_ENGINE_CACHE", str(tmp_path / "file" / "engines"))
    open_backend(model, backend="onnxruntime-tensorrt", device="cuda")
    assert not [name for name in asked[0][0][1] if "cache" in name]


def test_a_batch_beyond_the_profile_runs_in_parts(model, built_with, monkeypatch):
    """Seven frames by three at once are the seven scores of one batch, in order."""
    built_with([TENSORRT, CUDA], [TENSORRT, CUDA])
    monkeypatch.setattr(module, "MAX_BATCH", 3)
    rng = np.random.default_rng(0)
    views = {
        v.name: rng.integers(0, 256, (7, *v.shape), dtype=np.uint8)
        for v in model.manifest.preprocess.views
    }
    found = open_backend(model, backend="onnxruntime-tensorrt", device="cuda")
    wanted = open_backend(model, device="cpu")
    assert found.infer(FrameBatch(views)).quality == pytest.approx(
        wanted.infer(FrameBatch(views)).quality, abs=1e-5
    )


def test_int8_for_cpus_runs_without_tensorrt(built_with, caplog):
    """INT8 that TensorRT does not take is run by CUDA's provider, as torch runs it for the other
    TensorRT backend: TensorRT is not asked, one warning says what takes it, ``strict`` refuses.
    """
    asked = built_with([TENSORRT, CUDA], [TENSORRT, CUDA])
    student = load_model("student")
    backend = open_backend(student, backend="onnxruntime-tensorrt", device="cuda")
    assert backend.status.requested == "onnxruntime-tensorrt:cuda"
    assert backend.status.active == "onnxruntime:cuda"
    assert "takes --model student-fp32 or student-tensorrt" in backend.status.reason
    assert [p if isinstance(p, str) else p[0] for p in asked[0]] == [CUDA, CPU]
    (told,) = caplog.messages
    assert told == f"onnxruntime-tensorrt runs as onnxruntime:cuda: {backend.status.reason}"
    with pytest.raises(BackendUnavailable, match=r"student\.onnx is INT8 for.*--strict refuses"):
        open_backend(student, backend="onnxruntime-tensorrt", device="cuda", strict=True)


@pytest.mark.skipif(HAS_CUDA, reason="this ONNX Runtime has CUDA")
def test_int8_for_cpus_runs_where_there_is_no_gpu(caplog):
    """Without a GPU the same model runs on the CPU, with the same reason: none is refused for the
    model it was given.
    """
    backend = open_backend(load_model("student"), backend="onnxruntime-tensorrt")
    assert backend.status.active == "onnxruntime:cpu"
    assert "student.onnx is INT8 for" in backend.status.reason
    assert len(caplog.messages) == 1
