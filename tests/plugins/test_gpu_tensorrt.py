"""plugins.torch_gpu.tensorrt: engines that are kept, rebuilt once, run, or told to be impossible.

There is no GPU here. A stand-in takes TensorRT's place: it knows no name that the real bindings
lack, reads and writes the addresses it is given, and computes what the engine's network would.
"""

from __future__ import annotations

import ctypes
import dataclasses
import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import msgspec
import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("onnx")

# ruff: noqa: E402 - what follows needs torch
from dgiqa_stream.backends import open_backend
from dgiqa_stream.errors import BackendUnavailable, ModelError
from dgiqa_stream.types import FrameBatch
from plugins.torch_gpu.network import OnnxNetwork, noise_views
from plugins.torch_gpu.tensorrt import backend as module
from plugins.torch_gpu.tensorrt.engine_cache import EngineCache, EngineKey
from plugins.torch_gpu.tensorrt.network import TensorRtNetwork, program_of
from quant.tensorrt import engine as building

CPU = torch.device("cpu")
HAS_CUDA = torch.cuda.is_available()
GOLDEN = Path(__file__).parents[1] / "golden" / "tensorrt_signatures.json"
BINDINGS = [e for e in json.loads(GOLDEN.read_text(encoding="utf-8")) if "names" in e]
BATCHES = (1, 2, 4)


@pytest.fixture(scope="module")
def network(model):
    """What an engine would be built of."""
    return OnnxNetwork(model.path, dtype=torch.float16)


@pytest.fixture(scope="module")
def program(model, network):
    """What TensorRT is given."""
    return program_of(network, model.manifest.preprocess.views, CPU, max_batch=4)


class Known:
    """Raises for every attribute that TensorRT 10's or 11's bindings lack."""

    def __getattribute__(self, name):
        if not name.startswith("_") or name == "__version__":
            for entry in BINDINGS:
                assert name in entry["names"], f"{entry['package']} has no {name}"
        return object.__getattribute__(self, name)


class Context(Known):
    """Runs the network on what lies at the addresses that it is given."""

    def __init__(self, engine):
        self._engine, self._shapes, self._addresses = engine, {}, {}

    def set_device_memory(self, address, size):
        """As TensorRT's; the block must be aligned and as large as was asked for."""
        assert address % 64 == 0  # of torch on a CPU; 512 on a GPU
        assert size >= 4096
        self._memory = address

    def set_input_shape(self, name, shape):
        """As TensorRT's: false beyond the largest batch of the profile."""
        assert not self._addresses, "a shape is set before the first run"
        self._shapes[name] = shape
        return shape[0] <= BATCHES[-1]

    def set_tensor_address(self, name, address):
        """As TensorRT's."""
        self._addresses[name] = address

    def execute_async_v3(self, stream):
        """As TensorRT's, at once: reads and writes at the addresses."""
        assert self._memory
        assert set(self._addresses) == set(self._engine._names)
        views = {
            name: torch.from_numpy(self._array(name, ctypes.c_uint8, shape))
            for name, shape in self._shapes.items()
        }
        with torch.inference_mode():
            found = self._engine._network(views)
        for name, tensor in found.items():
            self._array(name, ctypes.c_float, tuple(tensor.shape))[:] = tensor.numpy()
        return stream == 0

    def _array(self, name, kind, shape):
        length = int(np.prod(shape))
        pointer = ctypes.cast(self._addresses[name], ctypes.POINTER(kind * length))
        return np.ctypeslib.as_array(pointer.contents).reshape(shape)


class PlanEngine(Known):
    """An engine with the tensors of a network."""

    device_memory_size_v2 = 4096

    def __init__(self, network):
        self._network, self._num_contexts = network, 0
        self._names = [*network.input_shapes, *network.output_names]
        self.num_io_tensors = len(self._names)

    def get_tensor_name(self, n):
        """As TensorRT's."""
        return self._names[n]

    def create_execution_context(self, strategy):
        """As TensorRT's; counted."""
        assert strategy == "user managed"
        object.__setattr__(self, "_num_contexts", self._num_contexts + 1)
        return Context(self)


@pytest.fixture
def tensorrt(monkeypatch, network):
    """A TensorRT that takes the plans of ``readable`` back as engines of ``network``."""

    class Runtime(Known):
        def __init__(self, logger):
            assert logger == "logger at error"

        def deserialize_cuda_engine(self, plan):
            stand_in._opened.append(plan)
            if plan not in stand_in._readable:
                return None
            object.__setattr__(stand_in, "_engine", PlanEngine(network))
            return stand_in._engine

    class StandIn(Known):
        __version__ = "11.4.0"

        def __init__(self):
            self._readable, self._opened, self._engine = [b"plan"], [], None
            self.Runtime = Runtime
            self.Logger = type(
                "Logger", (), {"ERROR": "error", "__new__": lambda _, at: f"logger at {at}"}
            )
            self.ExecutionContextAllocationStrategy = SimpleNamespace(USER_MANAGED="user managed")

    stand_in = StandIn()
    monkeypatch.setattr(building, "import_tensorrt", lambda: stand_in)
    return stand_in


@pytest.fixture
def key(model):
    """Of the model on some GPU."""
    return EngineKey(model.manifest.sha256, "fp16", BATCHES, "NVIDIA L4", "8.9", "11.4.0", "2.14.0")


@pytest.fixture
def builds(monkeypatch):
    """Plans that the next builds give, in turn; which precisions were built is remembered."""
    plans, made = [], []

    def build(_of, _views, _device, *, max_batch):
        made.append(max_batch)
        return plans.pop(0)

    monkeypatch.setattr(module, "build_from_network", build)
    monkeypatch.setattr(module, "build_from_file", build)
    return SimpleNamespace(plans=plans, made=made)


def test_the_program_is_the_network(model, network, program):
    """What TensorRT is given has a batch of any size up to the largest, and gives the network's own
    outputs, bit for bit.
    """
    views = model.manifest.preprocess.views
    called = program.module()
    for num_frames in (1, 3):
        noise = noise_views(network.input_shapes, num_frames)
        with torch.inference_mode():
            wanted = network(noise)
            found = called(*(noise[view.name] for view in views))
        for name, tensor in zip(network.output_names, found, strict=True):
            assert tensor.shape == (num_frames, 1)
            assert tensor.dtype == torch.float32
            assert torch.equal(tensor, wanted[name])


def test_bytes_are_numbers_before_anything_else(program):
    """TensorRT has uint8 at a network's edge alone: each view's first and only use is a cast."""
    inputs = [n for n in program.graph.nodes if n.name in program.graph_signature.user_inputs]
    assert len(inputs) == 2
    for node in inputs:
        uses = [u for u in node.users if "_assert_tensor_metadata" not in str(u.target)]
        assert [str(u.target) for u in uses] == ["aten.to.dtype"]
        assert uses[0].args[1] == torch.float32


def test_means_are_of_float32_by_a_cast(program):
    """torch-tensorrt's converter drops a mean's ``dtype``, so none has one, and each is of a tensor
    that is float32 already.
    """
    means = [n for n in program.graph.nodes if str(n.target) == "aten.mean.dim"]
    assert len(means) == 10
    for node in means:
        assert "dtype" not in node.kwargs
        assert node.args[0].meta["val"].dtype == torch.float32


def test_an_engine_runs_as_its_network(model, network, tensorrt):
    """Through addresses alone, batches of three sizes give the network's outputs; each size has one
    context, made once.
    """
    opened = TensorRtNetwork(b"plan", model.manifest.preprocess.views, CPU)
    assert set(opened.output_names) == set(network.output_names)
    for num_frames in (2, 1, 4, 2, 1):
        noise = noise_views(network.input_shapes, num_frames, seed=num_frames)
        with torch.inference_mode():
            wanted = network(noise)
        found = opened(noise)
        for name in network.output_names:
            assert torch.equal(found[name], wanted[name])
    assert tensorrt._engine._num_contexts == 3


def test_a_batch_that_the_engine_lacks_is_an_error(model, network, tensorrt):
    """Beyond the largest batch of its profile the engine says so, and gives no numbers."""
    opened = TensorRtNetwork(b"plan", model.manifest.preprocess.views, CPU)
    with pytest.raises(ModelError, match="takes no 5 views"):
        opened(noise_views(network.input_shapes, 5))


def test_an_engine_of_another_model_is_refused(model, tensorrt):
    """An engine without a view of the model's is named as such, not run."""
    views = [
        msgspec.structs.replace(v, name=f"other_{v.name}") for v in model.manifest.preprocess.views
    ]
    with pytest.raises(ModelError, match="and lacks other_"):
        TensorRtNetwork(b"plan", views, CPU)


def test_an_engine_is_built_once(model, key, tensorrt, builds, tmp_path, caplog):
    """The first start builds, with the largest batch, and says so; the second reads."""
    builds.plans.append(b"plan")
    with caplog.at_level(logging.WARNING):
        module.open_network(model, key, CPU, EngineCache(tmp_path))
        module.open_network(model, key, CPU, EngineCache(tmp_path))
    assert builds.made == [BATCHES[-1]]
    assert tensorrt._opened == [b"plan", b"plan"]
    (line,) = caplog.messages
    assert "building a TensorRT engine of student-fp32.onnx for NVIDIA L4" in line


@pytest.mark.parametrize("was", ["another version", "another driver", "damaged"])
def test_an_engine_that_does_not_fit_is_rebuilt_once(
    model, key, tensorrt, builds, tmp_path, caplog, was
):
    """One build, told with its reason, for an engine of another version, one that TensorRT does not
    take back, and a damaged one; the start after that builds nothing.
    """
    cache = EngineCache(tmp_path)
    old = dataclasses.replace(key, tensorrt="10.9.0") if was == "another version" else key
    cache.write(old, b"an older plan")
    if was == "damaged":
        (tmp_path / key.file_name).write_bytes(b"dust")
    builds.plans.append(b"plan")
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            module.open_network(model, key, CPU, cache)
    assert len(builds.made) == 1
    reasons = {
        "another version": "was built by tensorrt 10.9.0",
        "another driver": "TensorRT 11.4.0 cannot read the engine back",
        "damaged": "is damaged",
    }
    (line,) = caplog.messages
    assert f"anew, because {key.file_name}" in line
    assert reasons[was] in line
    assert cache.find(key).plan == b"plan"


def test_an_engine_that_never_fits_is_not_kept(model, key, tensorrt, builds, tmp_path):
    """A fresh engine that cannot be read back is an error, after one build, and is not kept."""
    builds.plans.append(b"dust")
    with pytest.raises(ModelError, match="cannot read the engine back"):
        module.open_network(model, key, CPU, EngineCache(tmp_path))
    assert len(builds.made) == 1
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_told(model, key, tensorrt, builds, tmp_path, caplog):
    """The engine is used all the same; that the next start builds again is said."""
    builds.plans.append(b"plan")
    (tmp_path / "file").touch()
    with caplog.at_level(logging.WARNING):
        module.open_network(model, key, CPU, EngineCache(tmp_path / "file" / "engines"))
    assert "is not kept" in caplog.messages[-1]


def test_scores_are_those_of_torch(model, key, tensorrt, builds, tmp_path, monkeypatch):
    """The whole backend on an engine scores as the torch backend in FP16, and its name tells
    precision and TensorRT's version.
    """
    builds.plans.append(b"plan")
    monkeypatch.setattr(module, "key_of", lambda *_: key)
    backend = module._with_engines(model, "cuda", [CPU], BATCHES[-1], 0.0, EngineCache(tmp_path))
    try:
        status = backend.status
        assert status.requested == "torch-tensorrt:cuda"
        assert status.active == "torch-tensorrt:cpu fp16 (TensorRT 11.4.0)"
        assert status.reason == ""
        noise = {
            n: v.numpy()
            for n, v in noise_views(
                {v.name: v.shape for v in model.manifest.preprocess.views}, 3
            ).items()
        }
        found = backend.infer(FrameBatch(noise))
    finally:
        backend.close()
    wanted = open_backend(model, device="cpu").infer(FrameBatch(noise))
    assert found.quality == pytest.approx(wanted.quality, abs=2e-3)
    assert found.spread == pytest.approx(wanted.spread, abs=2e-3)


@pytest.mark.parametrize(
    ("change", "engine"),
    [
        ({}, "fp16"),
        ({"precision": "int8", "target": "tensorrt"}, "int8"),
    ],
)
def test_the_key_is_of_what_is_there(model, monkeypatch, change, engine):
    """File, precision, batches, GPU and both versions; INT8 needs no torch-tensorrt."""
    versions = {"tensorrt": "11.4.0", "torch-tensorrt": "2.14.0"}
    monkeypatch.setattr(module, "_version", versions.__getitem__)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA L4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 9))
    changed = dataclasses.replace(model, manifest=msgspec.structs.replace(model.manifest, **change))
    found = module.key_of(changed, CPU, 6)
    assert found == EngineKey(
        model.manifest.sha256,
        engine,
        (1, 2, 4, 6),
        "NVIDIA L4",
        "8.9",
        "11.4.0",
        "" if engine == "int8" else "2.14.0",
    )


@pytest.mark.parametrize(
    "change", [{"precision": "int8"}, {"precision": "fp16"}, {"precision": "bf16"}]
)
def test_files_for_others_make_no_engine(model, change):
    """INT8 for CPUs and halved files are refused with what to give instead."""
    changed = dataclasses.replace(model, manifest=msgspec.structs.replace(model.manifest, **change))
    with pytest.raises(ModelError, match="--model student-fp32, or of `dgiqa-quant int8"):
        module.key_of(changed, CPU, 4)


def test_a_missing_package_is_named_with_its_extra(monkeypatch):
    """Neither package is installed here: the extra that brings both is told."""
    monkeypatch.setattr(sys, "path", [])
    for package in ("tensorrt", "torch-tensorrt"):
        with pytest.raises(BackendUnavailable, match=rf"{package} is not .*gpu-tensorrt"):
            module._version(package)


@pytest.mark.skipif(HAS_CUDA, reason="this machine has a CUDA device")
@pytest.mark.parametrize("device", ["auto", "cpu"])
def test_without_a_gpu_torch_runs_and_the_reason_is_told_once(model, device, caplog):
    """The status tells what was asked for, what runs and why; one warning says the same."""
    with caplog.at_level(logging.WARNING):
        backend = open_backend(model, backend="torch-tensorrt", device=device)
    try:
        assert backend.status.requested == f"torch-tensorrt:{device}"
        assert backend.status.active == "torch:cpu fp32"
        assert backend.status.reason
        assert caplog.messages == [
            f"torch-tensorrt runs as torch:cpu fp32: {backend.status.reason}"
        ]
    finally:
        backend.close()


def test_a_build_that_fails_falls_back(model, monkeypatch, caplog):
    """Whatever the builder raises, the model is scored by torch, with the builder's own words."""
    monkeypatch.setattr(module, "devices_of", lambda _: ((torch.device("cuda", 0),), ""))
    monkeypatch.setattr(module, "key_of", _fails)
    backend = open_backend(model, backend="torch-tensorrt", device="cpu")
    try:
        assert backend.status.active == "torch:cpu fp32"
        assert backend.status.reason == "no kernel for node Conv_3"
        batch = FrameBatch(
            {v.name: np.zeros((1, *v.shape), np.uint8) for v in model.manifest.preprocess.views}
        )
        assert np.isfinite(backend.infer(batch).quality).all()
    finally:
        backend.close()
    assert len(caplog.messages) == 1


def test_a_memory_budget_is_torchs_alone(model, monkeypatch):
    """With ``max_gpu_mb`` no engine is tried, because TensorRT would not keep to it."""
    monkeypatch.setattr(module, "devices_of", lambda _: ((torch.device("cuda", 0),), ""))
    monkeypatch.setattr(module, "key_of", lambda *_: pytest.fail("an engine was tried"))
    options = {"max_gpu_mb": 1000, "gpu_profile": "low-clock"}
    backend = open_backend(model, backend="torch-tensorrt", device="cpu", options=options)
    backend.close()
    assert backend.status.reason.startswith("max_gpu_mb binds torch's memory alone")


def _fails(*_):
    raise RuntimeError("no kernel\n for node Conv_3")


@pytest.mark.skipif(HAS_CUDA, reason="this machine has a CUDA device")
def test_strict_refuses_with_5(tmp_path):
    """``--strict`` ends with one line and exit code 5 rather than to run by torch alone."""
    (tmp_path / "a.png").write_bytes(b"")
    words = ["score", "a.png", "--backend", "torch-tensorrt", "--strict", "--model", "student-fp32"]
    done = subprocess.run(
        [sys.executable, "-m", "dgiqa_stream", *words],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 5
    told = [t for t in done.stderr.splitlines() if t.startswith("error:")]
    assert len(told) == 1
    assert "torch-tensorrt:auto would run as torch:cpu fp32" in told[0]
