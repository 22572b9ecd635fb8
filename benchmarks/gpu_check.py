"""Every GPU test and measurement in one command, in under ten minutes, without downloads.

    python benchmarks/gpu_check.py            # or: make gpu-check
    python benchmarks/gpu_check.py --device cpu --quick --output FOLDER   # the same code, tiny

It needs torch, NumPy and a CUDA driver. The more there is of PyAV, msgspec, onnx, OpenCV, ONNX
Runtime, nvidia-ml-py, Triton, torch-tensorrt and pytest, the more is measured; what is left out is
named with its reason.
The result is written after each part, so that a run cut short keeps what it has. Exit code 1 where
a part failed, or where ``FAIL_WITHOUT_GPU=1`` is set and there is no GPU.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
for place in (ROOT, ROOT / "benchmarks"):
    if str(place) not in sys.path:
        sys.path.insert(0, str(place))

import _gpu_goals  # noqa: E402 - found by the lines above

PACKAGES = (
    "torch", "numpy", "av", "msgspec", "onnx", "onnxruntime", "onnxruntime-gpu", "tensorrt",
    "torch-tensorrt", "triton", "nvidia-ml-py", "opencv-python-headless",
)  # fmt: skip
MODEL = "student-fp32"
TOTAL_SECONDS = 560.0
SECONDS = {  # that a part may take, at most: what it has no time for, it leaves out by name
    "environment": 20.0, "floors": 20.0, "preprocess": 40.0, "inference": 120.0, "scores": 40.0,
    "streams": 240.0, "backends": 120.0, "tests": 150.0,
}  # fmt: skip


class Left(Exception):
    """A part cannot run here; the message says what is missing."""


@dataclass(slots=True)
class Check:
    """One run: what is asked for and what was found so far."""

    device: str
    is_quick: bool
    folder: Path
    """For clips; gone at the end."""
    ends_seconds: float
    """When all must be over, by the monotonic clock."""
    found: dict[str, Any] = field(default_factory=dict)
    part_ends_seconds: float = 0.0
    """When the part that runs must be over."""
    left_out: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    took_seconds: dict[str, float] = field(default_factory=dict)
    """By part."""

    @property
    def place(self) -> str:
        """The one device that is checked, as the runtime calls it."""
        return "cuda:0" if self.device == "cuda" else self.device

    def needs(self, *packages: str) -> None:
        """Raise :class:`Left` where a package is missing."""
        for name in packages:
            if importlib.util.find_spec(name) is None:
                raise Left(f"needs the package {name}")

    @property
    def seconds_left(self) -> float:
        """Until all must be over."""
        return self.ends_seconds - time.monotonic()

    @property
    def part_left(self) -> float:
        """Seconds until the part that runs must be over."""
        return min(self.part_ends_seconds, self.ends_seconds) - time.monotonic()


# Parts ------------------------------------------------------------------------------------------


def environment(check: Check) -> dict[str, Any]:
    """What it all ran on."""
    import torch

    found: dict[str, Any] = {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "num_cpus": os.cpu_count(),
        "packages": {name: _version(name) for name in PACKAGES},
        "torch_cuda": torch.version.cuda,
    }
    if check.device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "gpu": properties.name,
            "gpu_bytes": properties.total_memory,
            "num_multiprocessors": properties.multi_processor_count,
        }
        try:
            from plugins.torch_gpu.nvml import device_status

            found["nvml"] = device_status(0)
        except (ImportError, RuntimeError) as exc:
            found["nvml"] = {"left_out": str(exc)}
    return found


def tests(check: Check) -> dict[str, Any]:
    """The tests marked ``gpu``; only their files are collected, the others' needs may lack."""
    check.needs("pytest", "hypothesis", "msgspec", "av", "onnx")
    if check.device != "cuda":
        raise Left("the tests marked gpu need a CUDA device")
    marked = [str(path) for path in sorted((ROOT / "tests").rglob("test_*.py"))
              if "mark.gpu" in path.read_text(encoding="utf-8")]  # fmt: skip
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-W", "default"]
    environment = os.environ | {"FAIL_WITHOUT_GPU": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, "-p", "no:cacheprovider", *marked],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
        timeout=max(1.0, check.part_left),
    )  # fmt: skip
    told = done.stdout.splitlines()
    if done.returncode:
        raise RuntimeError("\n".join([*told[-40:], *done.stderr.splitlines()[-5:]]))
    return {"summary": told[-1] if told else ""}


def scores(check: Check) -> dict[str, Any]:
    """Scores on the device against ONNX Runtime on the CPU, in points of 100."""
    check.needs("msgspec", "onnx", "onnxruntime", "cv2")
    import numpy as np

    from dgiqa_stream.scorer import load_scorer

    planes = [_picture(1080, 1920, seed=n) for n in range(4 if check.is_quick else 24)]
    with load_scorer(MODEL, device="cpu", num_threads=os.cpu_count() or 1) as scorer:
        wanted = np.array([p.score for p in scorer.predict(planes)])
    with load_scorer("student", device="cpu", num_threads=os.cpu_count() or 1) as scorer:
        int8 = np.array([p.score for p in scorer.predict(planes)])
    with load_scorer(MODEL, backend="torch", device=check.place) as scorer:
        found = np.array([p.score for p in scorer.predict(planes)])
        active = scorer.status.active
    return {
        "backend": active,
        "num_pictures": len(planes),
        "pictures": "synthetic: blots of colour and noise",
        "max_points_from_cpu_fp32": float(np.abs(found - wanted).max()),
        "mean_points_from_cpu_fp32": float(np.abs(found - wanted).mean()),
        "mean_points_from_cpu_int8": float(np.abs(found - int8).mean()),
    }


def floors(check: Check) -> dict[str, Any]:
    """What the device can do at best: bytes and operations a second, by torch."""
    import torch

    num_bytes = 1 << (24 if check.is_quick else 30)
    source = torch.empty(num_bytes, dtype=torch.uint8, device=check.device)
    target = torch.empty_like(source)
    copied = _seconds_of(lambda: target.copy_(source), check)
    side = 512 if check.is_quick else 8192
    dtype = torch.float16 if check.device == "cuda" else torch.float32
    a = torch.randn(side, side, device=check.device, dtype=dtype)
    multiplied = _seconds_of(lambda: a @ a, check)
    found = {
        "bytes_per_second": 2 * num_bytes / copied,
        "matmul_operations_per_second": 2 * side**3 / multiplied,
        "matmul_dtype": str(dtype),
    }
    if check.device == "cuda":
        pinned = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
        seconds = _seconds_of(lambda: target.copy_(pinned, non_blocking=True), check)
        found["upload_bytes_per_second"] = num_bytes / seconds
    return found


def preprocess(check: Check) -> dict[str, Any]:
    """Both views of 1080p NV12 that lies on the device, by kernels and by torch's operations.

    By batch size; the traffic of memory is the floor.
    """
    check.needs("msgspec", "cv2")
    import torch

    from dgiqa_stream.preprocess import ViewSpec
    from plugins.torch_gpu.views import cut_views, why_no_kernels

    views = [
        ViewSpec("whole", "whole", 224, 224),
        ViewSpec("fragments", "fragments", 160, 160, rows=4, columns=4),
    ]
    num_bytes = 1080 * 1920 * 3 // 2 + sum(v.height * v.width * 3 for v in views)
    rate = check.found.get("floors", {}).get("bytes_per_second")
    found: dict[str, Any] = {
        "bytes_read_and_written_per_frame": num_bytes,
        "floor_microseconds_per_frame": 1e6 * num_bytes / rate if rate else None,
    }
    reason = why_no_kernels(torch.device(check.device, 0) if check.device == "cuda"
                            else torch.device("cpu"))  # fmt: skip
    for name, by_kernels in (("kernels", True), ("torch", False)):
        if by_kernels and reason:
            found[name] = {"left_out": reason}
            continue
        by_batch = {}
        for size in (1, 2) if check.is_quick else (1, 8, 32, 64):
            planes = _surfaces(check.device, size)
            seconds = _seconds_of(
                lambda planes=planes, so=by_kernels: cut_views(planes, views, by_kernels=so), check
            )
            by_batch[str(size)] = {
                "frames_per_second": size / seconds,
                "microseconds_per_frame": 1e6 * seconds / size,
            }
        found[name] = {"by_batch": by_batch}
    return found


def _surfaces(device: str, num: int) -> list[Any]:
    """Noise as NV12 of 1080p, each picture in memory of its own."""
    import torch

    from plugins.torch_gpu.planes import TorchPlanes

    def noise(*shape: int) -> Any:
        return torch.randint(0, 256, shape, dtype=torch.uint8, device=device)

    return [TorchPlanes((noise(1080, 1920), noise(540, 960, 2))) for _ in range(num)]


def inference(check: Check) -> dict[str, Any]:
    """The network alone, views on the device already, by engine and batch size."""
    check.needs("msgspec", "onnx", "cv2")
    import _gpu_engines

    return _gpu_engines.alone(check, lambda call: _seconds_of(call, check))


def backends(check: Check) -> dict[str, Any]:
    """torch, torch-tensorrt and ONNX Runtime's providers, as far as they are installed."""
    check.needs("msgspec", "onnx", "onnxruntime", "cv2")
    import _gpu_engines

    return _gpu_engines.compared(check, lambda call: _seconds_of(call, check))


def streams(check: Check) -> dict[str, Any]:
    """Decoding alone, and decoding to scores, of many streams at once."""
    check.needs("msgspec", "onnx", "av", "cv2")
    import _gpu_streams

    return _gpu_streams.measure(check)


PARTS: dict[str, Callable[[Check], dict[str, Any]]] = {
    "environment": environment,
    "floors": floors,
    "preprocess": preprocess,
    "inference": inference,
    "scores": scores,
    "streams": streams,
    "backends": backends,
    "tests": tests,
}


# Measuring --------------------------------------------------------------------------------------


def _seconds_of(call: Callable[[], Any], check: Check) -> float:
    """Of one call: the median of groups of calls, each group waited for."""
    import torch

    def wait() -> None:
        if check.device == "cuda":
            torch.cuda.synchronize()

    for _ in range(1 if check.is_quick else 5):
        call()
    wait()
    num_calls, num_groups = (1, 1) if check.is_quick else (20, 7)
    took = []
    for _ in range(num_groups):
        begin = time.perf_counter()
        for _ in range(num_calls):
            call()
        wait()
        took.append((time.perf_counter() - begin) / num_calls)
    return sorted(took)[len(took) // 2]


def _picture(height: int, width: int, *, seed: int) -> Any:
    import numpy as np

    from dgiqa_stream.types import Planes

    rng = np.random.default_rng(seed)
    noise = rng.uniform(2, 12)
    planes = []
    for down in (1, 2, 2):
        blots = rng.uniform(30, 220, (height // 60, width // 60))
        plane = np.kron(blots, np.ones((60 // down, 60 // down)))
        planes.append((plane + rng.normal(0, noise, plane.shape)).clip(0, 255).astype(np.uint8))
    return Planes(tuple(planes))


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


# Running ----------------------------------------------------------------------------------------


def run(check: Check, output: Path) -> None:
    """Every part in turn, each told as it ends; the record is written after each."""
    for name, part in PARTS.items():
        begin = time.monotonic()
        check.part_ends_seconds = begin + SECONDS.get(name, check.seconds_left)
        if check.seconds_left < 5:
            check.left_out[name] = "the time was over"
        else:
            try:
                check.found[name] = part(check)
            except Left as exc:
                check.left_out[name] = str(exc)
            except Exception as exc:  # noqa: BLE001 - a part that fails must not hide the others
                check.failed[name] = f"{type(exc).__name__}: {exc}"
        state = next(
            (f"{word}: {where[name]}" for word, where in
             (("left out", check.left_out), ("FAILED", check.failed)) if name in where),
            "done",
        )  # fmt: skip
        took = time.monotonic() - begin
        check.took_seconds[name] = round(took, 1)
        print(f"{name:12} {took:6.1f} s  {state}", flush=True)
        write(check, output)
    print("\n".join(("goals:", *_gpu_goals.lines(_gpu_goals.judged(check.found)))), flush=True)


def write(check: Check, output: Path) -> None:
    """The record, beside it first, then renamed."""
    output.mkdir(parents=True, exist_ok=True)
    gpu = check.found.get("environment", {}).get("gpu", check.device)
    path = output / f"{re.sub(r'[^a-z0-9]+', '-', gpu.lower()).strip('-')}.json"
    record = {
        "schema": "dgiqa.gpu-check/1",
        "made_by": "benchmarks/gpu_check.py",
        "device": check.device,
        "quick": check.is_quick,
        **check.found,
        "goals": _gpu_goals.judged(check.found),
        "took_seconds": check.took_seconds,
        "left_out": check.left_out,
        "failed": check.failed,
    }
    beside = path.with_suffix(".part")
    beside.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    beside.replace(path)


def why_not() -> str:
    """Empty where there is a GPU to check."""
    if importlib.util.find_spec("torch") is None:
        return "torch is not installed"
    from plugins.torch_gpu.devices import why_no_cuda

    return why_no_cuda()


def main() -> int:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny, to see that all of it runs")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "gpu")
    parser.add_argument("--seconds", type=float, default=TOTAL_SECONDS, help="at most, in all")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and (reason := why_not()):
        print(f"no GPU to check: {reason}\nleft out: {', '.join(PARTS)}", flush=True)
        return int(os.environ.get("FAIL_WITHOUT_GPU") == "1")
    with tempfile.TemporaryDirectory() as folder:
        check = Check(
            arguments.device,
            arguments.quick,
            Path(folder),
            time.monotonic() + arguments.seconds,
        )
        run(check, arguments.output)
    return int(bool(check.failed))


if __name__ == "__main__":
    sys.exit(main())
