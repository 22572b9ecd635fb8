"""plugins.torch_gpu on several devices, within budgets, and what the driver tells of them.

There is no GPU here: two torch services on the CPU stand for two devices.
"""

from __future__ import annotations

import itertools
import logging
import threading
import warnings
from types import SimpleNamespace

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("onnx")

# ruff: noqa: E402 - what follows needs torch
from gpu_faults import FAULTS, Failing, noise

from dgiqa_stream.config import parse_config
from dgiqa_stream.errors import (
    BackendUnavailable,
    ConfigError,
    DeviceLost,
    FrameLost,
    ModelError,
)
from dgiqa_stream.scorer import scorer_of
from dgiqa_stream.telemetry import DeviceStatus
from dgiqa_stream.types import Planes
from plugins.torch_gpu import backend as torch_backend
from plugins.torch_gpu import devices
from plugins.torch_gpu.memory import MEGABYTE, batch_within, peak_bytes
from plugins.torch_gpu.nvml import DeviceWatch, device_status
from plugins.torch_gpu.pictures import Pictures
from plugins.torch_gpu.planes import TorchPlanes
from plugins.torch_gpu.spread import Loads, SpreadBackend

pytestmark = pytest.mark.usefixtures("nothing_is_lost_for_good")
CPU = torch.device("cpu")
HAS_CUDA = torch.cuda.is_available()


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


def test_strict_ends_with_the_first_device(model, opened, caplog):
    """Fewer devices than were asked for are a fallback, too: where it is strict, the loss of one of
    two ends the streams of both, which are told which one and why; nothing goes on.
    """
    pair = [opened(), opened()]
    batches = [noise(model, 1, seed=n) for n in range(2)]
    backend = SpreadBackend(pair, is_strict=True)
    Failing(pair[1], FAULTS[0], range(10**9))
    ended = run_streams_to_the_end(backend, batches)
    assert all("CUDA error" in str(exc) for exc in ended.values())
    with pytest.raises(DeviceLost, match="unspecified launch failure; --strict ends with"):
        backend.infer(batches[0])
    assert caplog.messages == []


def run_streams_to_the_end(backend, batches):
    """Each batch in a thread of its own, again and again; what ended each."""
    ended, ready = {}, threading.Barrier(len(batches))

    def work(n):
        ready.wait(30)
        try:
            for _ in range(10**4):
                backend.infer(batches[n])
        except DeviceLost as exc:
            ended[n] = exc

    threads = [threading.Thread(target=work, args=(n,)) for n in range(len(batches))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(ended) == len(batches)
    return ended


class OnDevice:
    """A backend that says that it is on a CUDA device; whatever else is the backend's own."""

    def __init__(self, backend, number):
        self._backend, self.device = backend, torch.device("cuda", number)

    def __getattr__(self, name):
        return getattr(self._backend, name)


class OnDevicePlanes(TorchPlanes):
    """Planes of a CUDA device that is gone, though their samples can be read where that is said."""

    is_gone = True

    def plain(self):
        """The same samples, in memory."""
        return Planes((self.tensors[0].numpy(), *self.tensors[1].numpy().transpose(2, 0, 1)))

    @property
    def device(self):
        """The first device."""
        return torch.device("cuda", 0)

    def on_cpu(self):
        """As of a device that is gone."""
        if self.is_gone:
            raise FrameLost("a picture cannot be read any more")
        return super().on_cpu()


@pytest.mark.parametrize("is_gone", [True, False])
def test_pictures_of_a_lost_device_take_no_other_with_them(model, opened, monkeypatch, is_gone):
    """Frames that lie on a lost device are lost, or are read back and scored by the other one: they
    never reach it as they are, where they would fail it as well.
    """
    monkeypatch.setattr(OnDevicePlanes, "is_gone", is_gone)
    pair = [OnDevice(opened(), 0), OnDevice(opened(), 1)]
    backend = SpreadBackend(pair)
    views = model.manifest.preprocess.views
    luma = torch.full((64, 64), 90, dtype=torch.uint8)
    picture = OnDevicePlanes((luma, luma[:32, :32, None].repeat(1, 1, 2)))
    waiting = Pictures([picture], views, None)
    Failing(pair[0]._backend, FAULTS[0], range(10**9))
    with pytest.raises(DeviceLost):
        pair[0].infer(noise(model, 1))
    wanted = pair[1].infer(pair[1].cut([picture.plain()], views, crop=None)).quality
    for score in (lambda: backend.infer(waiting),
                  lambda: backend.infer(backend.cut([picture], views, crop=None))):  # fmt: skip
        if is_gone:
            with pytest.raises(FrameLost):
                score()
        else:
            assert score().quality == pytest.approx(wanted, abs=1e-6)
    assert "cuda:0" in backend.status.reason
    assert "cuda:1" not in backend.status.reason


def test_a_copy_that_fails_leaves_the_other_device(model, opened, monkeypatch):
    """A device that is lost while a picture is copied for it leaves the picture to the other."""
    pair = [opened(), opened()]
    failing = pair[0]

    def lost(*_, **__):
        raise DeviceLost("cuda:0 was lost while running: CUDA error")

    monkeypatch.setattr(failing, "cut", lost)
    backend = SpreadBackend(pair)
    pictures = [Planes((np.full((64, 64, 3), 90, np.uint8),))]
    batch = backend.cut(pictures, model.manifest.preprocess.views, crop=None)
    assert backend.infer(batch).quality.shape == (1,)
    assert len(backend.devices()) == 1


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


TOO_OLD = "The NVIDIA driver on your system is too old (found version 11040). Please update it"


@pytest.mark.parametrize(
    ("cuda", "told", "reason"),
    [
        (None, "", "is built without CUDA: install one"),
        ("13.0", "Found no NVIDIA driver on your system.", "Found no NVIDIA driver"),
        ("13.0", f"{TOO_OLD}\nby downloading", "is too old \\(found version 11040\\)"),
        ("13.0", "", "finds no CUDA device"),
    ],
)
def test_a_driver_that_is_missing_or_wrong_is_told_in_a_line(monkeypatch, cuda, told, reason):
    """torch without CUDA, no driver, one too old for this torch and no device each have a reason of
    one line, without torch's own warning; a device asked for by name is refused with it.
    """

    def is_available():
        warnings.warn(f"CUDA initialization: {told}", UserWarning, stacklevel=2)
        return False

    def init():
        if told:
            raise RuntimeError(told)

    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "is_available", is_available)
    monkeypatch.setattr(torch.cuda, "init", init)
    assert "\n" not in devices.why_no_cuda()
    with pytest.raises(BackendUnavailable, match=rf"'cuda:0': torch .*{reason}.*--device cpu"):
        devices.devices_of("cuda:0")
    place, why = devices.device_of("auto")
    assert place.type == "cpu"
    assert why == devices.why_no_cuda()


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
    with pytest.raises(
        ModelError, match=r"--max-gpu-mb 5 does not hold .* takes \d+ MB: "
    ) as caught:
        torch_backend.open_model(model, device="cpu", num_threads=1, max_gpu_mb=5)
    assert "\n" not in str(caught.value)
    needed = int(str(caught.value).partition("takes ")[2].partition(" MB")[0])
    backend = torch_backend.open_model(model, device="cpu", num_threads=1, max_gpu_mb=needed)
    assert backend.devices()[0].max_batch >= 1
    backend.close()


def test_a_profile_that_is_none_is_named(model):
    """From Python, too, where no configuration has read it."""
    with pytest.raises(ConfigError, match="unknown gpu_profile"):
        torch_backend.open_model(model, device="cpu", num_threads=1, gpu_profile="x")


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
