"""What the benchmarks share: the clip, programs measured from outside, and the record of a run."""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

from dgiqa_stream.manifest import load_model
from dgiqa_stream.versions import package_version

HERE = Path(__file__).parent
RESULTS = HERE / "results"
DEMO_CLIP = HERE.parent / "demo" / "room.mp4"
CLIP_FPS = 30
LOAD_AT_START = os.getloadavg()[0]
PACKAGES = ("av", "onnxruntime", "opencv-python-headless", "numpy")

DECODE = """
import json, sys, time
from dgiqa_stream.config import SourceSettings
from dgiqa_stream.sources import open_source
settings = SourceSettings(duration_seconds=float(sys.argv[2]))
frames = open_source(sys.argv[1], settings, stream="bench").frames()
next(frames)
wall, cpu = time.perf_counter(), time.process_time()
num_frames = sum(1 for _ in frames)
wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
print(json.dumps({"num_frames": num_frames, "cpu_seconds": cpu, "wall_seconds": wall}))
"""
"""Prints what decoding took after the first frame."""
SCORE = """
import json, sys, time
from dgiqa_stream.config import OverloadSettings, SamplerSettings, SourceSettings, StreamConfig
from dgiqa_stream.pipeline import score_frames
from dgiqa_stream.scorer import load_scorer
config = StreamConfig(
    source=SourceSettings(duration_seconds=float(sys.argv[2])),
    sampler=SamplerSettings(mode="every"),
    overload=OverloadSettings(policy="wait"),
)
scorer, inference = load_scorer(sys.argv[3]), []
infer = scorer.infer
def timed(batch):
    begin = time.thread_time()
    found = infer(batch)
    inference.append(time.thread_time() - begin)
    return found
scorer.infer = timed
scores = score_frames(sys.argv[1], scorer, config=config)
next(scores)
inference.clear()
wall, cpu = time.perf_counter(), time.process_time()
num_frames = sum(1 for _ in scores)
wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
told = {"num_frames": num_frames, "cpu_seconds": cpu, "wall_seconds": wall}
print(json.dumps({**told, "inference_cpu_seconds": sum(inference)}))
"""
"""Prints what decoding and scoring every frame took after the first score, and what of the CPU's
time the thread that infers spent at it."""
NO_FRAMES_SECONDS = "0.001"
"""Of a clip: one frame, so that what a run over it costs is its start."""


class Spent(NamedTuple):
    """What a program took, and what it wrote."""

    cpu_seconds: float
    """User and system, of all its threads and children."""
    wall_seconds: float
    output: str


def run(*command: str | Path) -> Spent:
    """Run a program to its end; raises ``CalledProcessError`` with its words where it fails."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    begin = time.perf_counter()
    done = subprocess.run([str(w) for w in command], capture_output=True, text=True, check=True)
    wall = time.perf_counter() - begin
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Spent(cpu, wall, done.stdout)


def run_code(code: str, *words: str | Path) -> Spent:
    """Run a Python program in a process of its own."""
    return run(sys.executable, "-c", code, *words)


def cpu_seconds_of(pid: int) -> float:
    """User and system time so far of a running process; Linux."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def memory_of(pid: int) -> tuple[float, float]:
    """Resident memory of a running process in MB (10 ** 6 bytes): now, and at most so far; Linux.

    The peak is the kernel's ``VmHWM``: unlike ``ru_maxrss`` it begins anew with the program.
    """
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    kib = {key: int(rest.split()[0]) for key, _, rest in (line.partition(":") for line in lines)
           if key in ("VmRSS", "VmHWM")}  # fmt: skip
    return kib["VmRSS"] * 1024 / 1e6, kib["VmHWM"] * 1024 / 1e6


def add_common(parser: argparse.ArgumentParser, result: str, *, rounds: int | None = 5) -> None:
    """The options that every benchmark of the clip has."""
    parser.add_argument("--clip", type=Path, help="A 1080p30 H.264 clip; made where absent.")
    if rounds is not None:
        parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("-o", "--output", type=Path, default=RESULTS / result)


@contextmanager
def clip_of(wanted: Path | None, seconds: float, *, keyframe_seconds: float = 0) -> Iterator[Path]:
    """The clip that was named, or one made for the length of the block."""
    with tempfile.TemporaryDirectory() as folder:
        clip = wanted or Path(folder) / "reference_1080p30.mp4"
        if not clip.is_file():
            say("making the clip")
            maker = [sys.executable, str(HERE / "make_clip.py"), str(DEMO_CLIP), "-o", str(clip)]
            maker += ["--seconds", str(seconds), "--keyframe-seconds", str(keyframe_seconds)]
            subprocess.run(maker, check=True)
        yield clip


def write(script: str, found: Mapping[str, Any], output: Path, *more_packages: str) -> None:
    """Write what was found with how: command, date, machine, versions, model."""
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps({**made_by(script, *more_packages), **found}, indent=1) + "\n")
    say(f"wrote {output}")


def made_by(script: str, *more_packages: str) -> dict[str, Any]:
    """Command, date, machine, versions and the model that is shipped."""
    words = [Path(w).name if w.startswith("/") else w for w in sys.argv[1:]]
    model = load_model("student").manifest
    return {
        "command": " ".join([f"python benchmarks/{script}", *words]),
        "date": time.strftime("%Y-%m-%d"),
        "machine": {
            "processor": _processor(),
            "cores": len(os.sched_getaffinity(0)),
            "load_average_at_start": round(LOAD_AT_START, 2),
            "system": platform.platform(),
            "python": platform.python_version(),
        },
        "packages": {
            "dgiqa-stream": package_version(),
            **{name: _version_of(name) for name in (*PACKAGES, *more_packages)},
        },
        "model": {
            "id": model.id,
            "version": model.version,
            "precision": model.precision,
            "sha256": model.sha256,
        },
    }


def say(text: str) -> None:
    """Progress, for people."""
    print(text, file=sys.stderr, flush=True)


def _version_of(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
