"""plugins.torch_gpu on a CUDA device: what no CPU can stand in for.

``FAIL_WITHOUT_GPU=1`` turns the skips into failures.
"""

from __future__ import annotations

import os
import threading

import numpy as np
import pytest

torch = pytest.importorskip("torch")
av = pytest.importorskip("av")
onnx = pytest.importorskip("onnx")

# ruff: noqa: E402 - what follows needs torch
from dgiqa_stream.config import parse_config
from dgiqa_stream.manifest import load_model
from dgiqa_stream.pipeline import score_frames
from dgiqa_stream.preprocess import ViewSpec, cut_view
from dgiqa_stream.scorer import load_scorer
from dgiqa_stream.sources import open_source
from dgiqa_stream.types import ColorMatrix, FrameBatch, Planes
from plugins.torch_gpu import backend as torch_backend
from plugins.torch_gpu.decoding import CudaDecoder
from plugins.torch_gpu.planes import TorchPlanes, tensors_of
from plugins.torch_gpu.views import cut_views

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("cuda")]

VIEWS = [
    ViewSpec("whole", "whole", 224, 224, reduction="halved-smoothed"),
    ViewSpec("fragments", "fragments", 160, 160, rows=4, columns=4),
]


@pytest.fixture
def nvdec():
    """Decoding on the device; skips, or fails, where FFmpeg cannot."""
    if reason := CudaDecoder(0).why_not():
        if os.environ.get("FAIL_WITHOUT_GPU") == "1":
            pytest.fail(f"FAIL_WITHOUT_GPU=1: {reason}")
        pytest.skip(reason)


def picture(size=(270, 480), *, bits=8, seed=0, **tags):
    """4:2:0 noise around blots of colour."""
    rng = np.random.default_rng(seed)
    planes = []
    for down in (1, 2, 2):
        shape = -(-size[0] // down), -(-size[1] // down)
        blots = np.kron(rng.uniform(0.1, 0.9, (9, 16)), np.ones((shape[0] // 9 + 1,) * 2))
        noise = rng.normal(0, 0.05, shape)
        samples = (blots[: shape[0], : shape[1]] + noise).clip(0, 1) * (2**bits - 1)
        planes.append(samples.astype(np.uint8 if bits == 8 else np.uint16))
    return Planes(tuple(planes), bit_depth=bits, **tags)


def clip(path, *, codec="libx264", layout="yuv420p", num_frames=30, size=(288, 512)):
    """A short clip that moves."""
    rng = np.random.default_rng(0)
    blots = rng.integers(20, 235, (size[0] // 16 + num_frames, size[1] // 16, 3))
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25, options={"preset": "ultrafast"})
        stream.height, stream.width = size
        stream.pix_fmt = layout
        for n in range(num_frames):
            rgb = np.kron(blots[n : n + size[0] // 16], np.ones((16, 16, 1))).astype(np.uint8)
            frame = av.VideoFrame.from_ndarray(rgb, format="rgb24").reformat(format=layout)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def settings(**source):
    """Every frame of a source, letterbox off."""
    return parse_config(
        {"source": source, "sampler": {"mode": "every"}, "picture": {"letterbox": False}}
    )


def frames_of(path, **source):
    """What is known of a clip, and its frames one by one."""
    found = open_source(str(path), settings(**source).source, stream="s")
    try:
        yield found.info
        yield from found.frames()
    finally:
        found.close()


@pytest.mark.parametrize("bits", [8, 10])
@pytest.mark.parametrize("matrix", ColorMatrix)
def test_views_on_the_device_are_those_of_the_cpu(cuda, bits, matrix):
    """Views cut on the GPU are the runtime's, at most one step apart, in a mixed batch, too."""
    pictures = [
        picture(bits=bits, matrix=matrix),
        picture((721, 1281), bits=bits, seed=1, full_range=True),
        picture(bits=bits, seed=2, rotation=90),
        picture((1080, 1920), bits=bits, seed=3, matrix=matrix),
    ]
    found = cut_views([tensors_of(p).to(cuda) for p in pictures], VIEWS)
    for view in VIEWS:
        assert found[view.name].device == cuda
        for n, one in enumerate(pictures):
            difference = found[view.name][n].cpu().numpy().astype(int) - cut_view(one, view)
            assert np.abs(difference).max() <= 1


@pytest.mark.parametrize(("precision", "points"), [("fp32", 0.05), ("fp16", 0.3), ("bf16", 1.5)])
def test_graphs_of_every_size_give_the_scores_of_the_cpu(precision, points):
    """Each batch of 1 to 9 frames, padded to its graph, scores as ONNX Runtime does on the CPU."""
    model = load_model("student-fp32")
    rng = np.random.default_rng(0)
    views = {
        v.name: rng.integers(0, 256, (9, *v.shape), dtype=np.uint8)
        for v in model.manifest.preprocess.views
    }
    with load_scorer("student-fp32", device="cpu") as reference:
        wanted = np.array([p.score for p in reference.infer(FrameBatch(views))])
    backend = torch_backend.open_model(
        model, device="cuda", num_threads=1, precision=precision, max_batch=8
    )
    try:
        assert backend.status.active == f"torch:cuda:0 {precision}"
        for n in range(1, 10):  # nine run as eight and one
            found = backend.infer(FrameBatch({k: v[:n] for k, v in views.items()})).quality
            assert np.abs(100 * found - wanted[:n]).max() < points
    finally:
        backend.close()


@pytest.mark.parametrize(
    ("codec", "layout", "kept"),
    [
        ("libx264", "yuv420p", "nv12"),
        ("libx265", "yuv420p", "nv12"),
        ("libx265", "yuv420p10le", "p010le"),
    ],
)
def test_frames_of_nvdec_are_those_of_software(nvdec, tmp_path, codec, layout, kept):
    """Samples that NVDEC leaves in GPU memory equal FFmpeg's, which the standards prescribe."""
    path = clip(tmp_path / "a.mp4", codec=codec, layout=layout)
    on_device, in_memory = frames_of(path, hardware="cuda", strict=True), frames_of(path)
    assert (next(on_device).decoder, next(in_memory).decoder) == ("cuda:0", "software")
    num_frames = 0
    for one, other in zip(on_device, in_memory, strict=True):
        assert isinstance(one.planes, TorchPlanes)
        assert one.planes.device.type == "cuda"
        assert one.info.pix_fmt == kept
        shift = 6 if kept == "p010le" else 0
        for mine, theirs in zip(one.planes.samples, other.planes.samples, strict=True):
            assert np.array_equal(mine >> shift, theirs)
        num_frames += 1
    assert num_frames == 30


def test_what_nvdec_lacks_software_decodes(nvdec, tmp_path):
    """H.264 of 4:4:4 plays in software, and says why."""
    info = next(frames_of(clip(tmp_path / "a.mp4", layout="yuv444p"), hardware="cuda"))
    assert info.decoder.startswith("software (it cannot decode h264")


def test_a_stream_is_scored_without_leaving_the_device(nvdec, tmp_path):
    """NVDEC, views and FP16 scores on the GPU: within 0.3 points of decoding and scoring on CPU."""
    path = str(clip(tmp_path / "a.mp4"))
    with load_scorer("student-fp32", device="cpu") as scorer:
        wanted = [s.score for s in score_frames(path, scorer, config=settings())]
    with load_scorer("student-fp32", backend="torch", device="cuda", strict=True) as scorer:
        config = settings(hardware="cuda", strict=True)
        found = [s.score for s in score_frames(path, scorer, config=config)]
        uploaded = [s.score for s in score_frames(path, scorer, config=settings())]
    assert len(found) == 30
    assert found == pytest.approx(wanted, abs=0.3)
    assert uploaded == pytest.approx(found, abs=0.05)


def test_many_streams_at_once_are_scored_as_one_by_one(nvdec, tmp_path):
    """Sixteen threads, one scorer: each stream gets its scores, and batches are shared."""
    path = str(clip(tmp_path / "a.mp4"))
    config = settings(hardware="cuda", strict=True)
    model = load_model("student-fp32")
    backend = torch_backend.open_model(model, device="cuda", num_threads=1)
    with torch_scorer(model, backend) as scorer:
        wanted = [s.score for s in score_frames(path, scorer, config=config)]
        before = backend.statistics().batches
        found = {}

        def work(n):
            found[n] = [s.score for s in score_frames(path, scorer, config=config)]

        threads = [threading.Thread(target=work, args=(n,)) for n in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        after = backend.statistics().batches
    assert sorted(found) == list(range(16))
    assert all(scores == pytest.approx(wanted, abs=0.05) for scores in found.values())
    assert after.num_taken - before.num_taken == 16 * 30
    assert after.num_batches - before.num_batches < 16 * 30 / 2


def torch_scorer(model, backend):
    """A scorer of an opened backend."""
    from dgiqa_stream.scorer import Scorer

    return Scorer(model, backend)


def test_memory_of_the_device_does_not_grow(cuda):
    """Two hundred frames after the first ten leave no more allocated than before."""
    planes = [picture((1080, 1920), seed=n) for n in range(2)]
    with load_scorer("student-fp32", backend="torch", device="cuda") as scorer:
        for _ in range(5):
            scorer.predict(planes)
        before = torch.cuda.memory_allocated(cuda)
        for _ in range(100):
            scorer.predict(planes)
        assert torch.cuda.memory_allocated(cuda) <= before + (1 << 20)
