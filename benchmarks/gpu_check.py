"""Every GPU test and measurement in one command, in under ten minutes, without downloads.

    python benchmarks/gpu_check.py            # or: make gpu-check
    python benchmarks/gpu_check.py --device cpu --quick --output FOLDER   # the same code, tiny

It needs torch, NumPy and a CUDA driver; with PyAV beside them decoding is measured, with msgspec
the preprocess, with onnx the network, whole streams and scores. ONNX Runtime, OpenCV, nvidia-ml-py,
Triton, torch-tensorrt and pytest each add more; what is left out is named with its reason.
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
import threading
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
SECONDS = {  # kept for each part, which may also take what those before it left
    "environment": 10.0, "floors": 15.0, "preprocess": 35.0, "tests": 120.0, "scores": 30.0,
    "streams": 210.0, "inference": 70.0, "backends": 70.0,
}  # fmt: skip
_SHORTEST_SECONDS = 5.0  # less is not begun with
GRACE_SECONDS = 25.0
"""After which a part that does not heed its time, such as a build, ends with the whole run."""


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
    running: str = ""
    """The part that runs now."""
    child: subprocess.Popen[str] | None = None
    """The tests, which would outlive this process."""
    writing: threading.Lock = field(default_factory=threading.Lock)

    @property
    def place(self) -> str:
        """The one device that is checked, as the runtime calls it."""
        return "cuda:0" if self.device == "cuda" else self.device

    def needs(self, *packages: str) -> None:
        """Raise :class:`Left` where a package is missing."""
        missing = [name for name in packages if importlib.util.find_spec(name) is None]
        if missing:
            raise Left(f"needs the package{'s' * (len(missing) > 1)} {', '.join(missing)}")

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
            from plugins.torch_gpu.devices import uuid_of
            from plugins.torch_gpu.nvml import device_status

            found["nvml"] = device_status(0, uuid=uuid_of(torch.device("cuda", 0)))
        except (ImportError, RuntimeError) as exc:
            found["nvml"] = {"left_out": str(exc)}
    return found


def tests(check: Check) -> dict[str, Any]:
    """The tests marked ``gpu``; only their files are collected, the others' needs may lack."""
    check.needs("pytest", "hypothesis", "msgspec", "av", "onnx", "onnxruntime", "cv2")
    if check.device != "cuda":
        raise Left("the tests marked gpu need a CUDA device")
    marked = [str(path) for path in sorted((ROOT / "tests").rglob("test_*.py"))
              if "mark.gpu" in path.read_text(encoding="utf-8")]  # fmt: skip
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-W", "default"]
    environment = os.environ | {"FAIL_WITHOUT_GPU": "1", "PYTHONPATH": str(ROOT)}
    seconds = max(1.0, check.part_left)
    with subprocess.Popen(
        [*command, "-p", "no:cacheprovider", "--continue-on-collection-errors", *marked],
        cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as check.child:  # fmt: skip
        try:
            output, errors = check.child.communicate(timeout=seconds)
        except subprocess.TimeoutExpired as exc:
            check.child.kill()
            told = (exc.stdout or b"").decode(errors="replace").splitlines()
            wording = "\n".join([f"not over after {seconds:.0f} s", *told[-40:]])
            raise RuntimeError(wording) from None
        except BaseException:
            check.child.kill()
            raise
    return judged_tests(check.child.returncode, output, errors)


def judged_tests(code: int, output: str, errors: str) -> dict[str, Any]:
    """What pytest told; raises where a test failed, and names files that lack a package."""
    told = output.splitlines()
    bad = [line for line in told if line.startswith(("FAILED ", "ERROR "))]
    lacking = [line for line in bad if line.startswith("ERROR ") and "No module named" in line]
    if code and (not bad or len(lacking) < len(bad)):
        raise RuntimeError("\n".join([*told[-40:], *errors.splitlines()[-5:]]))
    found: dict[str, Any] = {"summary": told[-1] if told else ""}
    return found | ({"left_out": lacking} if lacking else {})


def scores(check: Check) -> dict[str, Any]:
    """Scores on the device against the CPU's, in points of 100.

    Those are ONNX Runtime's; where it or OpenCV is missing, torch's.
    """
    check.needs("msgspec", "onnx")
    import numpy as np

    from dgiqa_stream.scorer import load_scorer

    planes = [_picture(1080, 1920, seed=n) for n in range(4 if check.is_quick else 24)]

    def scored(model: str, backend: str, device: str) -> tuple[Any, str]:
        threads = os.cpu_count() or 1
        with load_scorer(model, backend=backend, device=device, num_threads=threads) as scorer:
            return np.array([p.score for p in scorer.predict(planes)]), scorer.status.active

    has_both = all(importlib.util.find_spec(name) for name in ("onnxruntime", "cv2"))
    reference = "onnxruntime" if has_both else "torch"
    wanted, _ = scored(MODEL, reference, "cpu")
    int8, _ = scored("student", reference, "cpu")
    found, active = scored(MODEL, "torch", check.place)
    of_cpu = "cpu" if has_both else "torch_cpu"  # a goal is for ONNX Runtime's alone
    return {
        "backend": active,
        "reference": f"{reference} on the CPU",
        "num_pictures": len(planes),
        "pictures": "synthetic: blots of colour and noise",
        f"max_points_from_{of_cpu}_fp32": float(np.abs(found - wanted).max()),
        f"mean_points_from_{of_cpu}_fp32": float(np.abs(found - wanted).mean()),
        f"mean_points_from_{of_cpu}_int8": float(np.abs(found - int8).mean()),
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
    check.needs("msgspec")
    import torch

    from dgiqa_stream.preprocess import ViewSpec
    from plugins.torch_gpu.views import cut_views, why_no_kernels

    views = [
        ViewSpec("whole", "whole", 224, 224, reduction="halved-smoothed"),
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
    check.needs("msgspec", "onnx")
    import _gpu_engines

    return _gpu_engines.alone(check, lambda call: _seconds_of(call, check))


def backends(check: Check) -> dict[str, Any]:
    """torch, torch-tensorrt and ONNX Runtime's providers, as far as they are installed."""
    check.needs("msgspec", "onnx", "onnxruntime", "cv2")
    import _gpu_engines

    return _gpu_engines.compared(check, lambda call: _seconds_of(call, check))


def streams(check: Check) -> dict[str, Any]:
    """Decoding alone, and decoding to scores, of many streams at once."""
    check.needs("av")
    import _gpu_streams

    return _gpu_streams.measure(check)


PARTS: dict[str, Callable[[Check], dict[str, Any]]] = {
    "environment": environment,
    "floors": floors,
    "preprocess": preprocess,
    "tests": tests,
    "scores": scores,
    "streams": streams,
    "inference": inference,  # these two build engines, which may outlast their time
    "backends": backends,
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
    watchdog = threading.Timer(check.seconds_left + GRACE_SECONDS, give_up, (check, output))
    watchdog.daemon = True
    watchdog.start()
    scale = min(1.0, check.seconds_left / TOTAL_SECONDS)
    for name, part in PARTS.items():
        begin = time.monotonic()
        names = list(PARTS)
        later = sum(SECONDS.get(n, 0.0) for n in names[names.index(name) + 1 :])
        check.part_ends_seconds = check.ends_seconds - scale * later
        run_part(check, name, part)
        check.took_seconds[name] = round(time.monotonic() - begin, 1)
        print(f"{name:12} {check.took_seconds[name]:6.1f} s  {state_of(check, name)}", flush=True)
        write(check, output)
    watchdog.cancel()
    print("\n".join(("goals:", *_gpu_goals.lines(_gpu_goals.judged(check.found)))), flush=True)


def run_part(check: Check, name: str, part: Callable[[Check], dict[str, Any]]) -> None:
    """What the part found, or why it was left out or failed."""
    if check.part_left < _SHORTEST_SECONDS:
        check.left_out[name] = "the time was over"
        return
    check.running = name
    try:
        check.found[name] = part(check)
    except Left as exc:
        check.left_out[name] = str(exc)
    except Exception as exc:  # noqa: BLE001 - a part that fails must not hide the others
        check.failed[name] = f"{type(exc).__name__}: {exc}"


def state_of(check: Check, name: str) -> str:
    """How a part ended, in a line."""
    for word, where in (("left out", check.left_out), ("FAILED", check.failed)):
        if name in where:
            return f"{word}: {where[name]}"
    return "done"


def give_up(check: Check, output: Path) -> None:
    """End the program while a part still runs: what was found before it is kept.

    The tests, which run in a process of their own, end first. Whatever cannot be written or told
    any more, the program ends.
    """
    try:
        name, told = check.running, "it did not end when its time was over"
        if check.child is not None:
            check.child.kill()
        check.failed[name] = told
        write(check, output)
        print(f"{name:12} FAILED: {told}", flush=True)
    finally:
        os._exit(1)  # the part may be in a library that does not come back


def write(check: Check, output: Path) -> None:
    """The record, beside it first, then renamed.

    Of copies: where the watchdog writes, the parts may go on meanwhile.
    """
    output.mkdir(parents=True, exist_ok=True)
    found = dict(check.found)
    gpu = found.get("environment", {}).get("gpu", check.device)
    path = output / f"{re.sub(r'[^a-z0-9]+', '-', gpu.lower()).strip('-')}.json"
    record = {
        "schema": "dgiqa.gpu-check/1",
        "made_by": "benchmarks/gpu_check.py",
        "device": check.device,
        "quick": check.is_quick,
        **found,
        "goals": _gpu_goals.judged(found),
        "took_seconds": dict(check.took_seconds),
        "left_out": dict(check.left_out),
        "failed": dict(check.failed),
    }
    beside = path.with_suffix(".part")
    with check.writing:
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
