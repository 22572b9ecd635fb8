"""benchmarks/gpu_check.py: what it does where parts are missing, fail, or there is no GPU."""

from __future__ import annotations

import importlib
import itertools
import json
import os
import sys
import time
from pathlib import Path

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
    for name in ("gpu_check", "_gpu_streams"):
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
    assert record["preprocess"]["by_batch"]["1"]["frames_per_second"] > 0
