"""benchmarks/gpu_check.py: what it does where parts are missing, fail, or there is no GPU."""

from __future__ import annotations

import importlib
import itertools
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("onnx")

from dgiqa_stream.backends.fake import FakeBackend  # noqa: E402

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
    for name in ("gpu_check", "_gpu_decoding", "_gpu_streams", "_gpu_engines", "_gpu_goals"):
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
    streams = script("_gpu_decoding")

    def frames():
        for _ in range(7):
            time.sleep(0.01)
            yield None

    found = streams.rate(frames, 3, 0.5)
    assert found["errors"] == []
    assert 3 < found["fps"] <= 310


def test_a_stream_that_fails_is_no_rate(script):
    """Where a stream fails, the rate is 0 and the reason is told."""
    streams = script("_gpu_decoding")

    def frames():
        raise RuntimeError("no surface left")
        yield

    found = streams.rate(frames, 2, 0.2)
    assert found["fps"] == 0.0
    assert "RuntimeError: no surface left" in found["errors"]


def test_streams_that_hang_take_no_more_than_what_is_left(script, monkeypatch):
    """Three streams that give no frame, or do not end: the time for the first is what is left of
    the part, that for the second is shared by all, and both are told.
    """
    streams = script("_gpu_decoding")
    monkeypatch.setattr(streams, "_JOIN_SECONDS", 0.5)
    gate = threading.Event()

    def frames(first):
        if first:
            yield None
        gate.wait(60)
        yield None

    try:
        begin = time.monotonic()
        none = streams.rate(lambda: frames(False), 3, 1.0, seconds_left=2.0)
        assert "not every stream gave a frame within 1 s" in none["errors"]
        some = streams.rate(lambda: frames(True), 3, 0.2, seconds_left=30.0)
        assert time.monotonic() - begin < 10
    finally:
        gate.set()
    assert none["fps"] == 0.0
    for found in (none, some):
        assert "3 of 3 streams did not end: what follows is slower for it" in found["errors"]


def test_the_clip_is_as_long_as_it_says(script, tmp_path):
    """Twelve frames, stored three times, decode to 36 with rising stamps 1/30 s apart."""
    av = pytest.importorskip("av")
    decoding = script("_gpu_decoding")
    path = decoding.clip(tmp_path / "a.mp4", "libx264", (180, 320), 12, copies=3)
    assert len(list(decoding.decoded(path, "cpu"))) == 36
    assert decoding.decoder_of(path, "cpu") == ("software", True)
    with av.open(str(path)) as container:
        times = [frame.time for frame in container.decode(video=0)]
    assert len(times) == 36
    assert [b - a for a, b in itertools.pairwise(times)] == pytest.approx([1 / 30] * 35, abs=1e-3)


def test_a_part_takes_nothing_that_is_kept_for_later_ones(script, monkeypatch, tmp_path):
    """A part may use what earlier ones left, and never what later ones are to have: the last has
    all that is left, in a shorter run less in proportion.
    """
    gpu_check = script("gpu_check")
    seen = []
    parts = {name: lambda c: seen.append(c.part_left) or {} for name in ("one", "two")}
    monkeypatch.setattr(gpu_check, "PARTS", parts)
    monkeypatch.setattr(gpu_check, "SECONDS", {"one": 160.0, "two": 400.0})
    for total, wanted in ((560, [160, 560]), (56, [16, 56]), (5600, [5200, 5600])):
        run_main(
            gpu_check, monkeypatch, "--device", "cpu", "--seconds", total, "--output", tmp_path
        )
        assert seen == pytest.approx(wanted, abs=4)
        seen.clear()


def test_all_budgets_together_are_under_ten_minutes(script):
    """Each part has seconds of its own; all of them and the last one's grace are under ten
    minutes.
    """
    gpu_check = script("gpu_check")
    assert set(gpu_check.SECONDS) == set(gpu_check.PARTS)
    assert sum(gpu_check.SECONDS.values()) <= gpu_check.TOTAL_SECONDS
    assert gpu_check.TOTAL_SECONDS + gpu_check.GRACE_SECONDS < 600


def run_for_a_second(script, parts, output):
    """gpu-check in a process of its own, with other parts (lines of code), a second of time."""
    code = (
        "import subprocess, sys, time, gpu_check\n"
        "gpu_check.GRACE_SECONDS = 0.5\n"
        "gpu_check._SHORTEST_SECONDS = 0.0\n"
        f"{parts}"
        f"sys.argv = ['x', '--device', 'cpu', '--seconds', '1', '--output', {str(output)!r}]\n"
        "sys.exit(gpu_check.main())\n"
    )
    return subprocess.run(
        [sys.executable, "-c", code], cwd=Path(script("gpu_check").__file__).parent,
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


def test_a_part_that_does_not_end_is_cut_off(script, tmp_path):
    """A part that heeds no time, as a build of an engine may not, ends with the run: the record
    has what was found before, the code is 1.
    """
    parts = "gpu_check.PARTS = {'quick': lambda c: {'n': 1}, 'stuck': lambda c: time.sleep(300)}\n"
    done = run_for_a_second(script, parts, tmp_path)
    assert done.returncode == 1, done.stderr
    record = json.loads((tmp_path / "cpu.json").read_text())
    assert record["quick"] == {"n": 1}
    assert record["failed"] == {"stuck": "it did not end when its time was over"}
    assert "Traceback" not in done.stderr


def is_running(number):
    """Whether a process works; one that has ended and that nobody waits for does not."""
    try:
        state = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def test_nothing_keeps_the_watchdog_from_ending_it(script, tmp_path):
    """The record cannot be written and the tests still run: both processes end, with code 1."""
    (tmp_path / "file").touch()
    parts = (
        "def stuck(check):\n"
        "    words = [sys.executable, '-c', 'import time; time.sleep(300)']\n"
        "    check.child = subprocess.Popen(words)\n"
        "    print(check.child.pid, flush=True)\n"
        "    time.sleep(300)\n"
        "gpu_check.PARTS = {'stuck': stuck}\n"
    )
    done = run_for_a_second(script, parts, tmp_path / "file" / "x")
    assert done.returncode == 1, done.stderr
    number = int(done.stdout.split()[0])
    end = time.monotonic() + 30  # it was told to end; a busy machine takes a moment
    while is_running(number) and time.monotonic() < end:
        time.sleep(0.05)
    assert not is_running(number)


def test_tests_that_take_too_long_are_ended(script, monkeypatch, tmp_path):
    """Tests that are not over in time fail the part, and their process is gone."""
    gpu_check = script("gpu_check")
    slow = tmp_path / "tests" / "test_slow.py"
    slow.parent.mkdir()
    slow.write_text("import time  # pytest.mark.gpu\ntime.sleep(300)\n")
    monkeypatch.setattr(gpu_check, "ROOT", tmp_path)
    now = time.monotonic()
    check = gpu_check.Check("cuda", False, tmp_path, now + 3, part_ends_seconds=now + 3)
    with pytest.raises(RuntimeError, match=r"not over after [23] s"):
        gpu_check.tests(check)
    assert check.child.returncode is not None
    assert time.monotonic() - now < 60


def test_files_that_lack_a_package_are_named_and_failures_are_not_hidden(script):
    """A test file whose package is missing is left out by name; a test that fails, or a file that
    is broken otherwise, fails the part.
    """
    judged = script("gpu_check").judged_tests
    lacking = "ERROR tests/a.py - ModuleNotFoundError: No module named 'timm'"
    assert judged(0, "7 passed in 3 s", "") == {"summary": "7 passed in 3 s"}
    found = judged(1, f"{lacking}\n7 passed, 1 error in 3 s", "")
    assert found == {"summary": "7 passed, 1 error in 3 s", "left_out": [lacking]}
    for other in ("FAILED tests/b.py::test - assert 1 == 2", "ERROR tests/c.py - SyntaxError"):
        with pytest.raises(RuntimeError, match=other.split()[1]):
            judged(1, f"{lacking}\n{other}\n1 failed", "")
    with pytest.raises(RuntimeError):
        judged(4, "", "usage: pytest")


def at(share, fps, num_bytes):
    """What is found of one number of streams."""
    return {"share": share, "decode_to_score_fps": fps, "beside_decoder_bytes": num_bytes}


def test_goals_are_judged_by_what_was_found(script):
    """Each bound on its right side: met just at it, missed just past it; the worst share counts."""
    judged = script("_gpu_goals").judged
    h264 = {
        "decoder": "cuda:0", "1": at(0.99, 900, 1e9), "8": {"left_out": "the time was over"},
        "32": at(0.95, 3000, 1.5e9), "128": at(0.97, 1920, 2e9),
    }  # fmt: skip
    found = {
        "scores": {"mean_points_from_cpu_int8": 1.0},
        "streams": {
            "codecs": {"h264": h264},
            "at_load": {"p99_ms": 50.0, "num_frames": 98, "expected_frames": 100},
        },
    }
    assert [g["met"] for g in judged(found).values()] == [True] * 5
    h264 |= {"32": at(0.949, 3000, 1.51e9), "128": at(0.97, 1919, 1e9)}
    found["streams"]["at_load"]["p99_ms"] = 50.1
    found["scores"]["mean_points_from_cpu_int8"] = 1.01
    assert [g["met"] for g in judged(found).values()] == [False] * 5


def test_a_latency_of_streams_that_fell_behind_is_none(script):
    """Where fewer frames were scored than were due, decoders waited: that meets no goal."""
    goals = script("_gpu_goals")
    at_load = {"p99_ms": 5.0, "num_frames": 97, "expected_frames": 100}
    found = goals.judged({"streams": {"codecs": {}, "at_load": at_load}})
    (goal,) = (g for name, g in found.items() if "p99" in name)
    assert (goal["met"], goal["why"]) == (None, "the streams fell behind")


def test_memory_beside_the_decoder_is_what_decoding_alone_does_not_take(script):
    """Of 5 GB in use, of which decoding alone took 3 over the 1 there was before, 3 are beside."""
    beside = script("_gpu_streams").beside_decoder
    told = beside({"used_bytes": 1e9}, {"used_bytes": 3e9}, {"used_bytes": 5e9})
    assert told == {"decoder_bytes": 2e9, "beside_decoder_bytes": 3e9}
    assert beside({}, {}, {}) == {}


def test_latency_is_that_of_watched_streams(script, tmp_path):
    """Two streams at their own pace come through sessions that publish: each frame that was due
    while it was measured has an age, at most one of them twice.
    """
    streams, decoding = script("_gpu_streams"), script("_gpu_decoding")
    path = decoding.clip(tmp_path / "a.mp4", "libx264", (180, 320), 10, 6)
    nothing = SimpleNamespace(batches=SimpleNamespace(mean_batch=1.0), num_failed=0, num_shrunk=0)
    backend = FakeBackend(has_spread=True, has_unfamiliar=True)
    backend.statistics = lambda: nothing
    check = SimpleNamespace(device="cpu", place="cpu", part_left=60.0)
    told = streams.at_pace(check, backend, path, 2, 0.5)
    assert told["errors"] == []
    assert told["num_playing"] == 2
    assert 0 < told["num_frames"] <= told["expected_frames"] + 4
    assert told["p99_ms"] >= told["p50_ms"] > 0


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
    with script("_gpu_decoding").PcieMeter("cpu") as meter:
        pass
    assert meter.told(30.0) == {"left_out": "only a CUDA device has counters"}


def test_pcie_counters_become_bytes(script, monkeypatch):
    """NVML's KB/s of both directions come as bytes a second, and as bytes of a frame; the device is
    found by its own name, where torch tells that.
    """
    decoding = script("_gpu_decoding")
    rates = {0: 20, 1: 3_000}
    nvml = SimpleNamespace(
        NVML_PCIE_UTIL_TX_BYTES=0, NVML_PCIE_UTIL_RX_BYTES=1, NVMLError=OSError,
        nvmlInit=lambda: None, nvmlShutdown=lambda: None,
        nvmlDeviceGetHandleByUUID=lambda uuid: uuid,
        nvmlDeviceGetPcieThroughput=lambda handle, kind: rates[kind] * (handle == "GPU-1"),
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    with decoding.PcieMeter("cuda", uuid="GPU-1") as meter:
        deadline = time.monotonic() + 5
        while not meter._samples and time.monotonic() < deadline:
            time.sleep(0.01)
    told = meter.told(100.0)
    assert told["to_device_bytes_per_second"] == 3_000_000
    assert told["from_device_bytes_per_second"] == 20_000
    assert told["to_device_bytes_per_frame"] == 30_000


HIDING = """
import importlib.machinery, sys
hidden = set(sys.argv.pop(1).split(","))
class Hiding(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in hidden else super().find_spec(name, path, target)
sys.meta_path[-1] = Hiding
import gpu_check
sys.exit(gpu_check.main())
"""
LACKING = ("msgspec", "onnx", "onnxruntime", "cv2", "pynvml", "pytest", "hypothesis", "zmq")


@pytest.mark.slow
@pytest.mark.parametrize("there", [(), ("msgspec", "onnx")])
def test_what_is_missing_is_skipped_by_name(script, tmp_path, there):
    """Beside torch, NumPy and PyAV there is nothing: decoding alone is measured, and each other
    part names what it lacks. With msgspec and onnx, streams are scored, too, without OpenCV.
    """
    folder = Path(script("gpu_check").__file__).parent
    hidden = [name for name in LACKING if name not in there]
    done = subprocess.run(
        [sys.executable, "-c", HIDING, ",".join(hidden), "--device", "cpu", "--quick",
         "--output", str(tmp_path)],
        cwd=folder, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    record = json.loads((tmp_path / "cpu.json").read_text())
    assert record["failed"] == {}
    assert record["streams"]["codecs"]["h264"]["1"]["decode_alone_fps"] > 0
    left = {"tests", "backends"} if there else {"tests", "backends", "preprocess", "scores",
                                                "inference"}  # fmt: skip
    assert set(record["left_out"]) == left
    assert all("needs the package" in why for why in record["left_out"].values())
    if there:
        assert record["streams"]["at_load"]["num_playing"] >= 1
        assert record["scores"]["reference"] == "torch on the CPU"
        assert record["goals"]["mean points from the CPU's INT8 scores"]["met"] is None
    else:
        assert record["streams"]["left_out"].startswith("scoring, for want of msgspec and onnx")


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
    assert record["streams"]["at_load"]["num_playing"] >= 1
    assert "left_out" in record["streams"]["codecs"]["h264"]["1"]["pcie"]
    assert record["goals"]["mean points from the CPU's INT8 scores"]["met"] in (True, False)
    assert all(g["met"] is None for name, g in record["goals"].items() if "points" not in name)
    assert set(record["took_seconds"]) == set(gpu_check.PARTS)
