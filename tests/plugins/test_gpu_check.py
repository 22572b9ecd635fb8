"""benchmarks/gpu_check.py: what it does where parts are missing, fail, or there is no GPU."""

from __future__ import annotations

import importlib
import itertools
import json
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("onnx")

CHECKOUT = Path(os.environ.get("DGIQA_CHECKOUT", Path(__file__).parents[2]))
HAS_CUDA = torch.cuda.is_available()


@pytest.fixture
def script(monkeypatch):
    """Imports a file of ``benchmarks``; it is forgotten afterwards."""
    folder = CHECKOUT / "benchmarks"
    if not (folder / "gpu_check.py").is_file():
        pytest.skip("needs the checkout; DGIQA_CHECKOUT names it")
    monkeypatch.syspath_prepend(str(folder))
    yield importlib.import_module
    for name in ("gpu_check", "_gpu_streams", "_gpu_engines", "_gpu_goals"):
        sys.modules.pop(name, None)


def run_main(gpu_check, monkeypatch, *arguments):
    """Its exit code."""
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", *map(str, arguments)])
    return gpu_check.main()


@pytest.mark.skipif(HAS_CUDA, reason="this machine has a CUDA device")
@pytest.mark.parametrize(("promised", "code"), [("", 0), ("1", 1)])
def test_without_a_gpu_it_says_what_is_left_out(
    script, monkeypatch, capsys, tmp_path, promised, code
):
    """No GPU: one reason, every part by name, nothing written; a failure only where promised."""
    monkeypatch.setenv("FAIL_WITHOUT_GPU", promised)
    gpu_check = script("gpu_check")
    assert run_main(gpu_check, monkeypatch, "--output", tmp_path / "gpu") == code
    told = capsys.readouterr().out
    assert "no GPU to check: torch" in told
    assert all(name in told for name in gpu_check.PARTS)
    assert not (tmp_path / "gpu").exists()


def test_a_part_that_fails_hides_no_other(script, monkeypatch, capsys, tmp_path):
    """What is missing and what failed stand in the record beside what was found; the code is 1."""
    gpu_check = script("gpu_check")

    def missing(check):
        check.needs("json", "no_such_package")

    def broken(check):
        raise RuntimeError("the device went away")

    parts = {"one": missing, "two": broken, "three": lambda check: {"frames_per_second": 3}}
    monkeypatch.setattr(gpu_check, "PARTS", parts)
    assert run_main(gpu_check, monkeypatch, "--device", "cpu", "--output", tmp_path) == 1
    record = json.loads((tmp_path / "cpu.json").read_text())
    assert record["left_out"] == {"one": "needs the package no_such_package"}
    assert record["failed"] == {"two": "RuntimeError: the device went away"}
    assert record["three"] == {"frames_per_second": 3}
    assert [p.name for p in tmp_path.iterdir()] == ["cpu.json"]
    assert "FAILED: RuntimeError" in capsys.readouterr().out


def test_when_the_time_is_over_the_rest_is_named(script, monkeypatch, tmp_path):
    """Parts that no time is left for are left out, not begun, and that is no failure."""
    gpu_check = script("gpu_check")
    monkeypatch.setattr(gpu_check, "PARTS", {"long": lambda check: pytest.fail("was begun")})
    given = ("--device", "cpu", "--seconds", "1", "--output", tmp_path)
    assert run_main(gpu_check, monkeypatch, *given) == 0
    record = json.loads((tmp_path / "cpu.json").read_text())
    assert record["left_out"] == {"long": "the time was over"}


def test_a_rate_is_frames_over_time(script):
    """Three streams of a frame each 10 ms come to at most 300 a second, and to some."""
    streams = script("_gpu_streams")

    def frames():
        for _ in range(7):
            time.sleep(0.01)
            yield None

    found = streams.rate(frames, 3, 0.5)
    assert found["errors"] == []
    assert 3 < found["fps"] <= 310


def test_a_stream_that_fails_is_no_rate(script):
    """Where a stream fails, the rate is 0 and the reason is told."""
    streams = script("_gpu_streams")

    def frames():
        raise RuntimeError("no surface left")
        yield

    found = streams.rate(frames, 2, 0.2)
    assert found["fps"] == 0.0
    assert "RuntimeError: no surface left" in found["errors"]


def test_the_clip_is_as_long_as_it_says(script, tmp_path):
    """Twelve frames, stored three times, decode to 36 with rising stamps 1/30 s apart."""
    av = pytest.importorskip("av")
    streams = script("_gpu_streams")
    path = streams.clip(tmp_path / "a.mp4", "libx264", (180, 320), 12, copies=3)
    with av.open(str(path)) as container:
        times = [frame.time for frame in container.decode(video=0)]
    assert len(times) == 36
    assert [b - a for a, b in itertools.pairwise(times)] == pytest.approx([1 / 30] * 35, abs=1e-3)


def test_a_part_has_its_own_time(script, monkeypatch, tmp_path):
    """A part sees the seconds that it may take, and no more than are left in all."""
    gpu_check = script("gpu_check")
    seen = []
    monkeypatch.setattr(gpu_check, "PARTS", {"one": lambda c: seen.append(c.part_left) or {}})
    for total, wanted in ((100, 7), (6, 6)):
        monkeypatch.setattr(gpu_check, "SECONDS", {"one": 7.0})
        run_main(
            gpu_check, monkeypatch, "--device", "cpu", "--seconds", total, "--output", tmp_path
        )
        assert wanted - 1 < seen.pop() <= wanted


def test_all_budgets_together_are_under_ten_minutes(script):
    """Were every part to take all of its time, the last would still be cut off in time."""
    gpu_check = script("gpu_check")
    assert set(gpu_check.SECONDS) == set(gpu_check.PARTS)
    assert gpu_check.TOTAL_SECONDS < 600


def at(share, fps, num_bytes):
    """What is found of one number of streams."""
    return {"share": share, "decode_to_score_fps": fps, "torch_bytes": num_bytes}


def test_goals_are_judged_by_what_was_found(script):
    """Each bound on its right side: met just at it, missed just past it; the worst share counts."""
    judged = script("_gpu_goals").judged
    h264 = {
        "decoder": "cuda:0", "1": at(0.99, 900, 1e9), "8": {"left_out": "the time was over"},
        "32": at(0.95, 3000, 1.5e9), "128": at(0.97, 1920, 2e9),
    }  # fmt: skip
    found = {
        "scores": {"mean_points_from_cpu_int8": 1.0},
        "streams": {"codecs": {"h264": h264}, "at_load": {"p99_ms": 50.0}},
    }
    assert [g["met"] for g in judged(found).values()] == [True] * 5
    h264 |= {"32": at(0.949, 3000, 1.51e9), "128": at(0.97, 1919, 1e9)}
    found["streams"]["at_load"]["p99_ms"] = 50.1
    found["scores"]["mean_points_from_cpu_int8"] = 1.01
    assert [g["met"] for g in judged(found).values()] == [False] * 5


def test_no_goal_is_met_by_what_was_not_measured(script):
    """Nothing found, and rates of a software decoder, are neither met nor missed, and say why."""
    goals = script("_gpu_goals")
    assert {g["why"] for g in goals.judged({}).values()} == {"not measured"}
    by_software = {"decoder": "software", "128": at(1.0, 9999, 1)}
    found = goals.judged({"streams": {"codecs": {"h264": by_software}}})
    share = found["share of the decoder's rate, at every number of streams"]
    assert (share["met"], share["found"]) == (None, 1.0)
    assert "not by NVDEC" in share["why"]
    assert all("not measured" in line or "NVDEC" in line for line in goals.lines(found))


def test_pcie_that_has_no_counter_is_left_out_by_name(script):
    """Without a CUDA device there is a reason in the place of numbers."""
    with script("_gpu_streams").PcieMeter("cpu") as meter:
        pass
    assert meter.told(30.0) == {"left_out": "only a CUDA device has counters"}


def test_pcie_counters_become_bytes(script, monkeypatch):
    """NVML's KB/s of both directions come as bytes a second, and as bytes of a frame."""
    streams = script("_gpu_streams")
    rates = {0: 20, 1: 3_000}
    nvml = SimpleNamespace(
        NVML_PCIE_UTIL_TX_BYTES=0, NVML_PCIE_UTIL_RX_BYTES=1, NVMLError=OSError,
        nvmlInit=lambda: None, nvmlShutdown=lambda: None,
        nvmlDeviceGetHandleByIndex=lambda number: number,
        nvmlDeviceGetPcieThroughput=lambda _handle, kind: rates[kind],
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    with streams.PcieMeter("cuda") as meter:
        deadline = time.monotonic() + 5
        while not meter._samples and time.monotonic() < deadline:
            time.sleep(0.01)
    told = meter.told(100.0)
    assert told["to_device_bytes_per_second"] == 3_000_000
    assert told["from_device_bytes_per_second"] == 20_000
    assert told["to_device_bytes_per_frame"] == 30_000


@pytest.mark.slow
def test_every_part_runs_on_a_cpu(script, monkeypatch, tmp_path):
    """The quick check on a CPU fails nowhere, leaves only the GPU's tests out, and is a record."""
    gpu_check = script("gpu_check")
    given = ("--device", "cpu", "--quick", "--output", tmp_path)
    assert run_main(gpu_check, monkeypatch, *given) == 0
    record = json.loads((tmp_path / "cpu.json").read_text())
    assert list(record["left_out"]) == ["tests"]
    assert record["scores"]["max_points_from_cpu_fp32"] < 0.001
    assert record["streams"]["codecs"]["h264"]["1"]["decode_alone_fps"] > 0
    assert record["preprocess"]["torch"]["by_batch"]["1"]["frames_per_second"] > 0
    assert "left_out" in record["preprocess"]["kernels"]
    assert record["inference"]["operations_per_frame"] > 10**6
    assert record["inference"]["engines"]["torch"]["by_batch"]["1"]["frames_per_second"] > 0
    assert (
        "TensorRT needs a CUDA device"
        in record["inference"]["engines"]["torch-tensorrt"]["left_out"]
    )
    assert {n for n, b in record["backends"].items() if "left_out" not in b} == {
        "torch",
        "onnxruntime",
    }
    assert record["backends"]["torch"]["mean_points_from_cpu_fp32"] < 0.01
    assert set(record["streams"]["codecs"]) == {"h264", "hevc", "av1"}
    assert record["streams"]["at_load"]["p99_ms"] > 0
    assert "left_out" in record["streams"]["codecs"]["h264"]["1"]["pcie"]
    assert record["goals"]["mean points from the CPU's INT8 scores"]["met"] in (True, False)
    assert all(g["met"] is None for name, g in record["goals"].items() if "points" not in name)
    assert set(record["took_seconds"]) == set(gpu_check.PARTS)
