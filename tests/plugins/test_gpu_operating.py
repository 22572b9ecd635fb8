"""plugins.torch_gpu at work: devices that fail, are full, are several, and are watched.

There is no GPU here. Two torch services on the CPU stand for two devices, and what a device would
raise is raised, as the very exception that torch raises, by a network at a chosen call.
"""

from __future__ import annotations

import logging
import threading
from types import SimpleNamespace

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("onnx")

# ruff: noqa: E402 - what follows needs torch
from gpu_faults import FAULTS, Failing, FaultOfTorch, noise

from dgiqa_stream.backends import BackendStatus, lasting, open_backend
from dgiqa_stream.backends._fallback import FallbackBackend
from dgiqa_stream.config import ModelSettings, parse_config
from dgiqa_stream.errors import DeviceLost, FrameLost, ModelError
from dgiqa_stream.messages import StatusMessage
from dgiqa_stream.pipeline import Monitor, score_frames
from dgiqa_stream.scorer import Scorer, load_scorer, scorer_of
from dgiqa_stream.sinks.memory import MemorySink
from dgiqa_stream.telemetry import Count
from dgiqa_stream.types import Planes
from plugins.torch_gpu import backend as torch_backend
from plugins.torch_gpu import devices
from plugins.torch_gpu.batching import Batcher
from plugins.torch_gpu.planes import TorchPlanes
from plugins.torch_gpu.service import BatchService

pytestmark = pytest.mark.usefixtures("nothing_is_lost_for_good")
CPU = torch.device("cpu")
HAS_CUDA = torch.cuda.is_available()
EVERY = {"sampler": {"mode": "every"}, "overload": {"policy": "wait"}}
NV12 = ((120, 160), (60, 80, 2))


def as_if_on_a_gpu(backend):
    """The backend with the status of one on a GPU, by which the runtime knows what can be lost."""
    status = BackendStatus("torch:cuda", "torch:cuda:0 fp16")
    backend._status = status
    return backend


# A device that fails ---------------------------------------------------------------------------


@pytest.mark.parametrize("exc", FAULTS)
def test_a_fault_is_tried_again_once(model, opened, exc):
    """A batch that fails once in the device runs again: its score is right, and it is counted."""
    backend, batch = opened(), noise(model, 2)
    wanted = backend.infer(batch).quality
    Failing(backend, exc, {0})
    assert np.array_equal(backend.infer(batch).quality, wanted)
    (told,) = backend.devices()
    assert (told.num_retried, told.num_shrunk) == (1, 0)


@pytest.mark.parametrize("exc", FAULTS)
def test_a_device_that_fails_twice_is_lost(model, opened, exc):
    """A batch that fails twice in the device is DeviceLost, and so is whatever comes after it."""
    backend = opened()
    network = Failing(backend, exc, range(10**9))
    for _ in range(2):
        with pytest.raises(DeviceLost, match=r"lost while running.*(CUDA|CUDNN)"):
            backend.infer(noise(model, 1))
    assert network.num_calls == 2


@pytest.mark.parametrize("exc", [ValueError("no"), RuntimeError("shape mismatch"), KeyError("x")])
def test_another_error_loses_nothing(model, opened, exc):
    """An error of the program ends its batch alone: it is not tried again; the next one runs."""
    backend = opened()
    network = Failing(backend, exc, {0})
    with pytest.raises(ModelError, match="inference failed") as caught:
        backend.infer(noise(model, 1))
    assert not isinstance(caught.value, DeviceLost)
    assert network.num_calls == 1
    assert backend.infer(noise(model, 1)).quality.shape == (1,)


@pytest.mark.parametrize(
    "exc",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 MiB"),
        FaultOfTorch("CUDA error: out of memory"),
    ],
)
def test_too_little_memory_is_smaller_batches_and_counted(model, opened, exc):
    """Out of memory at 4 frames: they are scored in two parts, and telemetry counts it."""
    backend, batch = opened(max_batch=4, budget_seconds=0.2), noise(model, 4)
    wanted = backend.infer(batch).quality
    Failing(backend, exc, {0})
    assert backend.infer(batch).quality == pytest.approx(wanted, abs=1e-5)
    (told,) = backend.devices()
    assert (told.max_batch, told.num_shrunk, told.num_retried) == (2, 1, 0)


def test_what_waits_when_the_device_is_lost_is_told():
    """Items that wait for their turn get DeviceLost too, and closing ends the thread."""
    began, go_on = threading.Event(), threading.Event()

    def run(items):
        began.set()
        go_on.wait(30)
        raise FAULTS[0]

    reasons = []
    service = BatchService(
        run,
        Batcher(max_batch=1, budget_seconds=0.0),
        is_fault=devices.is_fault,
        on_lost=reasons.append,
    )
    futures = service.submit("a", [1, 2, 3])
    began.wait(30)
    go_on.set()
    assert [type(f.exception(timeout=30)) for f in futures] == [DeviceLost] * 3
    with pytest.raises(DeviceLost):
        service.submit("b", [4])
    service.close()
    assert reasons == ["CUDA error: unspecified launch failure"]


def test_scoring_goes_on_by_the_cpu(model, opened, caplog):
    """Six streams at once, and a device that is lost at the third batch: each has its score, one
    warning is logged, and the status names what was asked for, what runs and why.
    """
    batches = [noise(model, 1, seed=n) for n in range(6)]
    reference = open_backend(model, device="cpu")
    wanted = [reference.infer(b).quality.item() for b in batches]
    first = as_if_on_a_gpu(opened(max_batch=2))
    Failing(first, FAULTS[0], range(2, 10**9))
    backend, found, ready = lasting(first, model), {}, threading.Barrier(6)
    assert isinstance(backend, FallbackBackend)

    def work(n):
        ready.wait(30)
        found[n] = [backend.infer(batches[n]).quality.item() for _ in range(3)]

    threads = [threading.Thread(target=work, args=(n,)) for n in range(6)]
    with caplog.at_level(logging.WARNING, "dgiqa_stream.backends"):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
    for n in range(6):
        assert found[n] == pytest.approx([wanted[n]] * 3, abs=1e-5)
    assert len(caplog.messages) == 1
    assert "scoring goes on by onnxruntime:cpu" in caplog.text
    assert (backend.status.requested, backend.status.active) == ("torch:cuda", "onnxruntime:cpu")
    assert "unspecified launch failure" in backend.status.reason
    assert backend.devices() == ()
    backend.close()
    backend.close()


def test_pictures_that_a_device_keeps_are_frames_lost(model, opened):
    """A batch that can no longer be read is FrameLost, at the loss and after it; frames that still
    come as tensors are scored as the CPU scores them.
    """

    class GoneBatch:
        @property
        def views(self):
            raise FrameLost("gone")

        def __len__(self):
            return 1

    class LostBackend:
        status = BackendStatus("torch:cuda", "torch:cuda:0 fp16")

        def infer(self, batch):
            raise DeviceLost("the device was lost")

        def close(self):
            pass

    backend = lasting(LostBackend(), model)
    for _ in range(2):
        with pytest.raises(FrameLost):
            backend.infer(GoneBatch())
    rng = np.random.default_rng(0)
    luma, chroma = (torch.from_numpy(rng.integers(16, 235, s, np.uint8)) for s in NV12)
    views, planes = model.manifest.preprocess.views, TorchPlanes((luma, chroma))
    found = backend.infer(backend.cut([planes], views, crop=None)).quality
    one = opened()
    wanted = one.infer(one.cut([planes], views, crop=None)).quality
    assert found == pytest.approx(wanted, abs=1e-4)


def test_a_backend_on_the_cpu_needs_no_other(model, opened):
    """Nothing follows a CPU: its backend is taken as it is."""
    backend = opened()
    assert lasting(backend, model) is backend


def watch(scorer, url="pattern:noisy?size=320x240&fps=25&seconds=1", **settings):
    """What a session of a pattern came to, and its messages."""
    memory = MemorySink()
    config = parse_config({**EVERY, **settings})
    result = Monitor(url, stream="s", config=config, scorer=scorer, sinks=[memory]).run()
    return result, memory


def test_no_stream_ends_with_its_device(model, opened):
    """A stream whose device is lost in the middle scores every frame; the status that follows
    counts one loss and tells of the backend that goes on.
    """
    first = as_if_on_a_gpu(opened())
    Failing(first, FAULTS[0], range(10, 10**9))
    with Scorer(model, lasting(first, model)) as scorer:
        result, memory = watch(scorer)
    assert result.error is None
    assert result.counts[Count.SCORED] == 25
    assert result.counts[Count.DEVICE_LOSSES] == 1
    told = memory.of(StatusMessage)
    assert told[0].backend.active == "torch:cuda:0 fp16"
    assert told[-1].backend.active == "onnxruntime:cpu"
    assert told[-1].counts["device_losses"] == 1
    assert [part.device for part in told[0].devices] == ["cpu"]
    assert told[-1].devices == []


def test_without_a_fallback_the_stream_ends(model, opened):
    """Where none follows, the stream's error is DeviceLost, and what was scored before is kept."""
    first = opened()
    Failing(first, FAULTS[0], range(10, 10**9))
    with Scorer(model, first) as scorer:
        result, memory = watch(scorer)
    assert isinstance(result.error, DeviceLost)
    assert (result.counts[Count.SCORED], result.counts[Count.FAILED]) == (10, 1)
    assert memory.of(StatusMessage)[-1].error.code == "device_lost"


def test_the_setting_chooses(monkeypatch):
    """``fallback`` wraps a backend on a GPU; ``end`` and ``strict`` leave it alone."""
    gpu = SimpleNamespace(status=BackendStatus("x:cuda", "x:cuda:0"), close=lambda: None)
    monkeypatch.setattr("dgiqa_stream.scorer.open_backend", lambda *_, **__: gpu)
    kinds = {}
    for name, settings in (
        ("fallback", ModelSettings()),
        ("end", ModelSettings(on_device_loss="end")),
        ("strict", ModelSettings(strict=True)),
    ):
        kinds[name] = type(scorer_of(settings)._backend)
    assert kinds == {"fallback": FallbackBackend, "end": SimpleNamespace, "strict": SimpleNamespace}


class GoneTensor:
    """Stands for a tensor of a CUDA device that is gone: all that is asked of it raises."""

    device = torch.device("cuda", 1)

    def cpu(self):
        """What torch raises."""
        raise FAULTS[0]


def test_a_picture_on_a_device_that_is_gone_is_one_frame_less():
    """Reading it back is FrameLost, after a second try; the device is then known to be lost."""
    with pytest.raises(FrameLost, match=r"cannot be read any more: cuda:1 was lost.*CUDA error"):
        devices.on_cpu(GoneTensor())
    assert devices.why_lost(1).startswith("cuda:1 was lost while running (CUDA error")
    assert devices.why_lost(0) == ""


@pytest.mark.parametrize("fails", [1, 2])
def test_a_copy_that_fails_twice_has_lost_the_device(model, opened, monkeypatch, fails):
    """Pictures are copied for the device by the stream's own thread: a fault there is tried again,
    too, and a second one is DeviceLost.
    """
    backend, left, ready = opened(), [FAULTS[0]] * fails, torch_backend.TorchBackend._ready
    pictures = [Planes((np.full((64, 64, 3), 90, np.uint8),))]

    def failing(self, picture):
        if left:
            raise left.pop()
        return ready(self, picture)

    monkeypatch.setattr(torch_backend.TorchBackend, "_ready", failing)
    views = model.manifest.preprocess.views
    if fails == 1:
        assert len(backend.cut(pictures, views, crop=None)) == 1
    else:
        with pytest.raises(DeviceLost, match="cpu was lost while running: CUDA error"):
            backend.cut(pictures, views, crop=None)


def test_frames_that_are_gone_are_passed_over(model):
    """A frame that cannot be read is counted as failed and the stream goes on, in ``score`` too."""

    class Forgetful(Scorer):
        num_left = 5

        def infer(self, batch):
            self.num_left -= 1
            if self.num_left == 0:
                raise FrameLost("gone")
            return super().infer(batch)

    with load_scorer("student-fp32", device="cpu") as scorer:
        result, _ = watch(Forgetful(model, scorer._backend))
        config = parse_config(EVERY)
        url = "pattern:noisy?size=320x240&fps=25&seconds=1"
        frames = list(score_frames(url, Forgetful(model, scorer._backend), config=config))
    assert result.error is None
    assert (result.counts[Count.SCORED], result.counts[Count.FAILED]) == (24, 1)
    assert len(frames) == 24
