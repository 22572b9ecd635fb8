"""plugins.torch_gpu at work: devices that fail, are full, are several, and are watched.

There is no GPU here. Two torch services on the CPU stand for two devices, and what a device would
raise is raised, as the very exception that torch raises, by a network at a chosen call.
"""

from __future__ import annotations

import itertools
import logging
import threading
from types import SimpleNamespace

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("onnx")

# ruff: noqa: E402 - what follows needs torch
from dgiqa_stream.backends import BackendStatus, lasting, open_backend
from dgiqa_stream.backends._fallback import FallbackBackend
from dgiqa_stream.config import ModelSettings, parse_config
from dgiqa_stream.errors import BackendUnavailable, ConfigError, DeviceLost, FrameLost, ModelError
from dgiqa_stream.manifest import load_model
from dgiqa_stream.messages import StatusMessage
from dgiqa_stream.pipeline import Monitor, score_frames
from dgiqa_stream.scorer import Scorer, load_scorer, scorer_of
from dgiqa_stream.sinks.memory import MemorySink
from dgiqa_stream.telemetry import Count, DeviceStatus
from dgiqa_stream.types import FrameBatch, Planes
from plugins.torch_gpu import backend as torch_backend
from plugins.torch_gpu import devices
from plugins.torch_gpu.batching import Batcher
from plugins.torch_gpu.memory import MEGABYTE, batch_within, peak_bytes
from plugins.torch_gpu.nvml import DeviceWatch, device_status
from plugins.torch_gpu.planes import TorchPlanes
from plugins.torch_gpu.service import BatchService
from plugins.torch_gpu.spread import Loads, SpreadBackend

CPU = torch.device("cpu")
HAS_CUDA = torch.cuda.is_available()
FaultOfTorch = getattr(torch, "AcceleratorError", RuntimeError)
EVERY = {"sampler": {"mode": "every"}, "overload": {"policy": "wait"}}
NV12 = ((120, 160), (60, 80, 2))
FAULTS = [
    FaultOfTorch("CUDA error: unspecified launch failure"),
    RuntimeError("CUDA error: an illegal memory access was encountered"),
    RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"),
]


@pytest.fixture(scope="module")
def model():
    """The shipped model in single precision."""
    return load_model("student-fp32")


@pytest.fixture
def opened(model):
    """Opens torch backends on the CPU; closes them at the end."""
    backends = []

    def opens(**settings):
        one = torch_backend.open_model(model, device="cpu", num_threads=1, **settings)
        backends.append(one)
        return one

    yield opens
    for one in backends:
        one.close()


@pytest.fixture(autouse=True)
def nothing_is_lost_for_good():
    """What one test loses is whole again for the next."""
    yield
    devices._lost.clear()
    devices._in_use.clear()


class Failing:
    """The network, but for the calls in ``fails``, numbered from 0, which raise ``exc``."""

    def __init__(self, backend, exc, fails):
        self.network, self.exc, self.fails = backend._engine._network, exc, fails
        self.output_names, self.num_calls = self.network.output_names, 0
        backend._engine._network = self

    def __call__(self, views):
        """Score, or fail."""
        self.num_calls += 1
        if self.num_calls - 1 in self.fails:
            raise self.exc
        return self.network(views)


def noise(model, num_frames, seed=0):
    """A batch of noise of the model's views."""
    rng = np.random.default_rng(seed)
    shapes = {v.name: v.shape for v in model.manifest.preprocess.views}
    return FrameBatch(
        {n: rng.integers(0, 256, (num_frames, *s), dtype=np.uint8) for n, s in shapes.items()}
    )


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


# Several devices -------------------------------------------------------------------------------


def test_streams_go_where_there_is_most_room():
    """Eight streams of one rate are four on each of two devices."""
    loads = Loads(2)
    places = [loads.place_of(n, 0.0) for n in range(8)]
    assert sorted(places) == [0, 0, 0, 0, 1, 1, 1, 1]


def test_a_load_is_frames_a_second():
    """A stream of 30 frames a second outweighs three of 5: a new one joins these."""
    loads, rates = Loads(2), {"a": 30.0, "b": 5.0, "c": 5.0, "d": 5.0}
    places = {"a": 0, "b": 1, "c": 1, "d": 1}
    for stream, rate in rates.items():
        for n in range(int(10 * rate)):
            loads.add(stream, places[stream], 1, n / rate)
    found = loads.loads()
    assert found[0] == pytest.approx(30, rel=0.1)
    assert found[1] == pytest.approx(15, rel=0.25)
    assert loads.place_of("e", 10.0) == 1


def test_a_load_is_evened_out_one_stream_at_a_time():
    """Where all streams of one device ended, others move there, one a second, until both do alike;
    then none moves any more.
    """
    loads, moves = Loads(2), []
    place = dict.fromkeys(range(6), 0)
    for stream in place:
        loads.add(stream, 0, 1, 0.0)
    for tick in range(1, 200):
        now = tick / 10
        for stream in place:
            to = loads.place_of(stream, now)
            if to != place[stream]:
                moves.append((now, stream))
                place[stream] = to
            loads.add(stream, to, 1, now)
    assert sorted(place.values()) == [0, 0, 0, 1, 1, 1]
    assert len(moves) == 3
    assert all(b - a >= 1.0 for (a, _), (b, _) in itertools.pairwise(moves))


def test_a_device_that_is_gone_takes_no_stream():
    """Its streams move to those that are left; without any, LookupError."""
    loads = Loads(2)
    assert [loads.place_of(s, 0.0) for s in "ab"] == [0, 1]
    assert loads.drop(0)
    assert [loads.place_of(s, 1.0) for s in "abc"] == [1, 1, 1]
    assert not loads.drop(1)
    with pytest.raises(LookupError):
        loads.place_of("a", 2.0)


def run_streams(backend, batches, num_rounds=4):
    """Each batch in a thread of its own, several times; scores by thread."""
    found, ready = {}, threading.Barrier(len(batches))

    def work(n):
        ready.wait(30)
        found[n] = [backend.infer(batches[n]).quality.item() for _ in range(num_rounds)]

    threads = [threading.Thread(target=work, args=(n,)) for n in range(len(batches))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    return found


def test_two_devices_share_the_streams(model, opened):
    """Four threads on two services are two on each, and every score is that of one device."""
    pair = [opened(), opened()]
    batches = [noise(model, 1, seed=n) for n in range(4)]
    wanted = [pair[0].infer(b).quality.item() for b in batches]
    before = [b.statistics().batches.num_taken for b in pair]
    backend = SpreadBackend(pair)
    found = run_streams(backend, batches)
    taken = [b.statistics().batches.num_taken - n for b, n in zip(pair, before, strict=True)]
    assert taken == [8, 8]
    for n in range(4):
        assert found[n] == pytest.approx([wanted[n]] * 4, abs=1e-5)
    assert len(backend.devices()) == 2


def test_one_of_two_devices_is_lost(model, opened, caplog):
    """Streams of the lost device go on by the other, with the right scores; only when that is lost,
    too, DeviceLost is raised.
    """
    pair = [opened(), opened()]
    batches = [noise(model, 1, seed=n) for n in range(4)]
    wanted = [pair[0].infer(b).quality.item() for b in batches]
    backend = SpreadBackend(pair)
    Failing(pair[0], FAULTS[0], range(2, 10**9))
    with caplog.at_level(logging.WARNING, "dgiqa_stream.backends"):
        found = run_streams(backend, batches)
    for n in range(4):
        assert found[n] == pytest.approx([wanted[n]] * 4, abs=1e-5)
    assert len(caplog.messages) == 1
    assert "the other devices go on" in caplog.text
    assert "lost while running" in backend.status.reason
    assert len(backend.devices()) == 1
    Failing(pair[1], FAULTS[1], range(10**9))
    for _ in range(2):
        with pytest.raises(DeviceLost, match="illegal memory access"):
            backend.infer(batches[0])


def test_pictures_are_cut_and_scored_together(model, opened):
    """Planes go the same way: ``cut`` and ``infer`` of a thread meet on one device."""
    pictures = [Planes((np.full((64, 64, 3), 90 * n, np.uint8),)) for n in (1, 2)]
    views = model.manifest.preprocess.views
    one, pair = opened(), SpreadBackend([opened(), opened()])
    wanted = one.infer(one.cut(pictures, views, crop=None)).quality
    found = pair.infer(pair.cut(pictures, views, crop=None)).quality
    assert found == pytest.approx(wanted, abs=1e-6)
    pair.close()


@pytest.mark.parametrize(
    ("wanted", "numbers"),
    [("cuda", (0, 1, 2)), ("cuda:2", (2,)), ("cuda:1,cuda:0", (1, 0))],
)
def test_devices_by_name(wanted, numbers):
    """``cuda`` is all that there are; others are those named, in their order."""
    assert devices.numbers_of(wanted, 3) == numbers


def test_devices_that_cannot_be_meant():
    """One twice is a ConfigError, one that is not there BackendUnavailable, both by name."""
    with pytest.raises(ConfigError, match="names one device twice"):
        devices.numbers_of("cuda:1,cuda:1", 3)
    with pytest.raises(BackendUnavailable, match=r"'cuda:0,cuda:3'.*3 CUDA devices"):
        devices.numbers_of("cuda:0,cuda:3", 3)
    for wanted in ("cuda,cuda:1", "cuda:0,", "cpu,cpu", "auto,cuda:0"):
        with pytest.raises(ConfigError, match="unknown device"):
            devices.devices_of(wanted)


# Memory and profiles ---------------------------------------------------------------------------


def test_memory_is_measured():
    """Three tensors of 4 MB of which two live at once are 8 MB, whatever was there before."""
    before = torch.zeros(10**6)

    def call():
        first = before + 1
        second = first * 2
        del first
        return second.view(-1) - 1

    assert peak_bytes(CPU, call) == pytest.approx(8 * MEGABYTE, rel=0.01)


def test_a_view_is_no_memory():
    """Views and operations in place take nothing."""
    x = torch.zeros(10**6)
    assert peak_bytes(CPU, lambda: x.view(10, -1)[2:].add_(1)) < 0.01 * MEGABYTE


def test_a_budget_is_a_batch(model, opened):
    """More memory, larger batches; what a batch then takes is measured to be within the budget."""
    network = opened()._engine._network
    views, batches = model.manifest.preprocess.views, {}
    for megabytes in (300, 600, 10**5):
        batches[megabytes] = batch_within(
            megabytes * MEGABYTE, network, views, CPU, weight_bytes=12 * MEGABYTE, most=64, name="m"
        )
    assert 1 <= batches[300] < batches[600] < batches[10**5] == 64
    pixels = {v.name: torch.zeros((batches[300], *v.shape), dtype=torch.uint8) for v in views}
    with torch.inference_mode():
        assert peak_bytes(CPU, lambda: network(pixels)) < 288 * MEGABYTE


def test_a_model_is_opened_within_a_budget(model, opened):
    """``max_gpu_mb`` makes the largest batch smaller, and its scores are the same."""
    whole, small = opened(), opened(max_gpu_mb=300)
    batch = noise(model, 3)
    assert small.devices()[0].max_batch < whole.devices()[0].max_batch == 64
    assert small.infer(batch).quality == pytest.approx(whole.infer(batch).quality, abs=1e-5)


def test_a_budget_that_holds_no_frame_is_refused(model):
    """One line names what was given and what is needed, and giving that opens the model."""
    with pytest.raises(ModelError, match=r"--max-gpu-mb 5 does not hold .* takes \d+: ") as caught:
        torch_backend.open_model(model, device="cpu", num_threads=1, max_gpu_mb=5)
    assert "\n" not in str(caught.value)
    needed = int(str(caught.value).partition("takes ")[2].partition(":")[0])
    backend = torch_backend.open_model(model, device="cpu", num_threads=1, max_gpu_mb=needed)
    assert backend.devices()[0].max_batch >= 1
    backend.close()


def test_a_profile_is_a_wait_and_a_batch(opened):
    """``low-clock`` gathers up to 128 frames for ten times as long; numbers given by hand win."""
    assert opened(gpu_profile="low-clock").devices()[0].max_batch == 128
    assert opened(gpu_profile="low-clock", max_batch=8).devices()[0].max_batch == 8
    (latency, _), (low, _) = (torch_backend.PROFILES[p] for p in ("latency", "low-clock"))
    assert low == pytest.approx(10 * latency)


def test_settings_reach_the_backend():
    """``model.max_gpu_mb`` and ``model.gpu_profile`` are the torch backend's; ONNX Runtime refuses
    them by name instead of ignoring them.
    """
    settings = {"name": "student-fp32", "backend": "torch", "device": "cpu"}
    config = parse_config({"model": {**settings, "gpu_profile": "low-clock"}})
    with scorer_of(config.model) as scorer:
        assert [d.max_batch for d in scorer.devices()] == [128]
    config = parse_config({"model": {"max_gpu_mb": 500, "device": "cpu"}})
    with pytest.raises(ConfigError, match=r"model\.max_gpu_mb = 500 .* --backend onnxruntime"):
        scorer_of(config.model)


def test_memory_that_is_shared_needs_no_copy(monkeypatch):
    """Pictures are copied to page-locked memory for a GPU of its own memory alone, and not for
    a Jetson, whose GPU is integrated, or a CPU.
    """
    gpu = torch.device("cuda", 0)
    for is_integrated in (0, 1):
        properties = SimpleNamespace(is_integrated=is_integrated)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _, p=properties: p)
        assert devices.shares_memory(gpu) == bool(is_integrated)
    assert devices.shares_memory(CPU)


# What the driver tells -------------------------------------------------------------------------


def test_the_driver_is_asked_once_a_second():
    """A hundred streams that ask at once are one question; a second later there is another."""
    asked, now = [], [0.0]

    def ask():
        asked.append(now[0])
        return {"load_percent": len(asked)}

    watch = DeviceWatch(ask, clock=lambda: now[0])
    assert {watch.status()["load_percent"] for _ in range(100)} == {1}
    now[0] = 1.01
    assert watch.status() == {"load_percent": 2}
    assert asked == [0.0, 1.01]


def test_a_driver_that_does_not_answer_ends_nothing():
    """No package, no driver or a device that is gone: nothing is told, and scoring goes on."""
    for exc in (ImportError("pynvml"), RuntimeError("NVML: GPU is lost")):

        def ask(exc=exc):
            raise exc

        assert DeviceWatch(ask).status() == {}


@pytest.mark.skipif(HAS_CUDA, reason="this machine has a CUDA device")
def test_without_a_driver_nvml_says_so():
    """The real package, where it is installed, has a reason of its own."""
    pytest.importorskip("pynvml")
    with pytest.raises(RuntimeError, match="NVML: "):
        device_status(0)


def test_what_the_driver_tells_is_in_the_status(opened, monkeypatch):
    """Percent become shares; what is not told is None; batches are counted beside it."""
    backend = opened()
    facts = {"name": "H200", "load_percent": 40, "used_bytes": 10**9, "temperature_celsius": 51}
    backend._watch = DeviceWatch(lambda: facts)
    (told,) = backend.devices()
    assert told == DeviceStatus(
        "cpu", "H200", load=0.4, used_bytes=10**9, temperature_celsius=51,
        max_batch=64, mean_batch=1.0, num_shrunk=0, num_retried=0,
    )  # fmt: skip
