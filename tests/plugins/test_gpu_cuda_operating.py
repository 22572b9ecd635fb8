"""plugins.torch_gpu at work on a CUDA device: budgets, a device that is really lost, AV1, NVML.

``FAIL_WITHOUT_GPU=1`` turns the skips into failures.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys

import numpy as np
import pytest

torch = pytest.importorskip("torch")
av = pytest.importorskip("av")
pytest.importorskip("onnx")

# ruff: noqa: E402 - what follows needs torch
from gpu_faults import noise

from dgiqa_stream.config import parse_config
from dgiqa_stream.sources import open_source
from dgiqa_stream.types import Planes
from distill.process import ordinary_scheduling
from plugins.torch_gpu import backend as torch_backend
from plugins.torch_gpu.decoding import CudaDecoder

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("cuda")]


def test_a_budget_is_kept(cuda, model):
    """With 400 MB, torch holds no more after batches of 1080p pictures, and scores are the same."""
    rng = np.random.default_rng(0)
    shapes = ((1080, 1920), (540, 960), (540, 960))
    picture = Planes(tuple(rng.integers(16, 235, s, np.uint8) for s in shapes))
    views, found = model.manifest.preprocess.views, {}
    for megabytes in (0, 400):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(cuda)
        backend = torch_backend.open_model(
            model, device="cuda:0", num_threads=1, max_gpu_mb=megabytes
        )
        try:
            pictures = [picture] * 32
            found[megabytes] = backend.infer(backend.cut(pictures, views, crop=None)).quality
            held = torch.cuda.max_memory_reserved(cuda)
        finally:
            backend.close()
            torch.cuda.set_per_process_memory_fraction(1.0, cuda)
    assert held <= 400e6
    assert found[400] == pytest.approx(found[0], abs=2e-3)


_LOSING = """
import json, logging, sys
import numpy as np, torch
from dgiqa_stream.config import ModelSettings
from dgiqa_stream.scorer import scorer_of
from plugins.torch_gpu.decoding import CudaDecoder

picture = np.random.default_rng(0).integers(0, 256, (270, 480, 3), np.uint8)
scorer = scorer_of(ModelSettings(name="student-fp32", backend="torch", device="cuda:0"))
before, first = scorer.score(picture), scorer.status.active
try:  # an index out of bounds ends the context, as a fault of the device does
    torch.zeros(4, device="cuda")[torch.tensor([2**30], device="cuda")].cpu()
except RuntimeError:
    pass
after, status = scorer.score(picture), scorer.status
print(json.dumps([before, after, first, status.active, status.reason, CudaDecoder(0).why_not()]))
scorer.close()
sys.stdout.flush()
"""


def test_a_context_that_is_lost_is_followed_by_the_cpu(cuda):
    """A device-side assertion, which no program can mend: the next frame is scored by the CPU, with
    the same score; the reason is told, and decoding there is known to be out of the question.
    """
    done = subprocess.run(
        [sys.executable, "-c", _LOSING], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.stdout, done.stderr[-2000:]
    before, after, first, active, reason, why_not = json.loads(done.stdout.splitlines()[-1])
    assert first.startswith("torch:cuda:0")
    assert active == "onnxruntime:cpu"
    assert after == pytest.approx(before, abs=0.3)
    assert "CUDA error" in reason
    assert "was lost while running" in why_not
    assert done.stderr.count("scoring goes on by onnxruntime:cpu") == 1


def test_the_driver_tells_of_the_device(cuda, model):
    """Name, load, memory and temperature are in the backend's status, in shares and bytes."""
    if importlib.util.find_spec("pynvml") is None:
        pytest.skip("nvidia-ml-py is not installed")
    backend = torch_backend.open_model(model, device="cuda:0", num_threads=1)
    try:
        backend.infer(noise(model, 4))
        (told,) = backend.devices()
    finally:
        backend.close()
    assert told.name == torch.cuda.get_device_name(cuda)
    assert told.total_bytes == pytest.approx(
        torch.cuda.get_device_properties(cuda).total_memory, rel=0.1
    )
    assert 0 < told.used_bytes <= told.total_bytes
    assert told.load is None or 0 <= told.load <= 1


def test_av1_is_decoded_on_the_device(tmp_path):
    """Where NVDEC knows AV1, its frames are those of libdav1d, at the same times; where it does
    not, the stream says so and plays in software.
    """
    if reason := CudaDecoder(0).why_not():
        pytest.skip(reason)
    path = str(tmp_path / "a.mkv")
    blots = np.random.default_rng(0).integers(20, 235, (40, 32, 3))
    with av.open(path, "w") as container:
        stream = container.add_stream("libsvtav1", rate=25, options={"preset": "12"})
        stream.width, stream.height, stream.pix_fmt = 512, 288, "yuv420p"
        with ordinary_scheduling():
            container.start_encoding()
        for n in range(20):
            rgb = np.kron(blots[n : n + 18], np.ones((16, 16, 1))).astype(np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(rgb, format="rgb24")))
        container.mux(stream.encode())
    sources = [
        open_source(path, parse_config({"source": {"hardware": h}}).source, stream="s")
        for h in ("cuda", "none")
    ]
    decoders = [source.info.decoder for source in sources]
    found, wanted = (list(source.frames()) for source in sources)
    assert len(found) == len(wanted) == 20
    for one, other in zip(found, wanted, strict=True):
        assert one.info.pts_seconds == other.info.pts_seconds
        a, b = (np.asarray(f.planes.samples[0]).astype(int) for f in (one, other))
        assert np.abs(a - b[: a.shape[0], : a.shape[1]]).max() <= 1
    for source in sources:
        source.close()
    assert decoders[1] == "software"
    if decoders[0] != "cuda:0 (av1)":
        pytest.skip(f"this NVDEC has no AV1: {decoders[0]}")


def test_all_devices_score(cuda, model):
    """``cuda`` is every device, and each gives the score of the first."""
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one CUDA device")
    backend = torch_backend.open_model(model, device="cuda", num_threads=1)
    try:
        batch = noise(model, 2)
        scores = [one.infer(batch).quality for one in backend._backends]
        names = [status.device for status in backend.devices()]
    finally:
        backend.close()
    assert names == [f"cuda:{n}" for n in range(torch.cuda.device_count())]
    for quality in scores:
        assert quality == pytest.approx(scores[0], abs=2e-3)
