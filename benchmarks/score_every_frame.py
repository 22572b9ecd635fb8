"""Cost of scoring every frame of 1080p30 against decoding it, and time to the first score.

    python benchmarks/score_every_frame.py [--clip reference_1080p30.mp4] [--rounds 5]

Decode alone and decode with scoring run in turn, each in a process of its own, so that a drift of
the machine's speed meets both. CPU seconds are the process's own (user and system), less those of
a run over no frames. Writes ``benchmarks/results/score_every_frame.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from dgiqa_stream.versions import package_version

HERE = Path(__file__).parent
RESULT = HERE / "results" / "score_every_frame.json"
DEMO_CLIP = HERE.parent / "demo" / "room.mp4"

DECODE = """
import sys
from dgiqa_stream.config import SourceSettings
from dgiqa_stream.sources import open_source
settings = SourceSettings(duration_seconds=float(sys.argv[2]))
print(sum(1 for _ in open_source(sys.argv[1], settings, stream="bench").frames()))
"""
SCORE = """
import sys
from dgiqa_stream.config import OverloadSettings, SamplerSettings, SourceSettings, StreamConfig
from dgiqa_stream.pipeline import score_frames
from dgiqa_stream.scorer import load_scorer
config = StreamConfig(
    source=SourceSettings(duration_seconds=float(sys.argv[2])),
    sampler=SamplerSettings(mode="every"),
    overload=OverloadSettings(policy="wait"),
)
print(sum(1 for _ in score_frames(sys.argv[1], load_scorer(sys.argv[3]), config=config)))
"""
FIRST = """
import sys
from dgiqa_stream.config import SamplerSettings, StreamConfig
from dgiqa_stream.pipeline import score_frames
from dgiqa_stream.scorer import load_scorer
config = StreamConfig(sampler=SamplerSettings(mode="every"))
frames = score_frames(sys.argv[1], load_scorer(sys.argv[2]), config=config)
print(next(frames).score)
import os, resource
sys.stdout.flush()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
sys.stdout.flush()
os._exit(0)
"""


def run(code: str, *words: str) -> tuple[float, float, int]:
    """CPU seconds, wall seconds and the number a program prints, of one run of it."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    begin = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, check=True
    )
    wall = time.perf_counter() - begin
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return cpu, wall, int(done.stdout.split()[0])


def first_score_seconds(clip: Path, model: str) -> tuple[float, int]:
    """From the start of a fresh process to its first score, and its peak memory in KiB."""
    begin = time.perf_counter()
    with subprocess.Popen(
        [sys.executable, "-c", FIRST, str(clip), model], stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        child.stdout.readline()
        elapsed = time.perf_counter() - begin
        return elapsed, int(child.stdout.readline())


def measure(clip: Path, seconds: float, rounds: int, models: list[str]) -> dict[str, Any]:
    """All figures, medians over the rounds."""
    short = "0.001"
    decode: list[float] = []
    wall: dict[str, list[float]] = {name: [] for name in ("decode", *models)}
    score: dict[str, list[float]] = {name: [] for name in models}
    frames = 0
    idle = {"decode": run(DECODE, str(clip), short)[0]}
    idle |= {name: run(SCORE, str(clip), short, name)[0] for name in models}
    for number in range(rounds):
        print(f"round {number + 1} of {rounds}", file=sys.stderr, flush=True)
        cpu, elapsed, frames = run(DECODE, str(clip), str(seconds))
        decode.append(1e3 * (cpu - idle["decode"]) / frames)
        wall["decode"].append(frames / elapsed)
        for name in models:
            cpu, elapsed, scored = run(SCORE, str(clip), str(seconds), name)
            assert scored == frames, (scored, frames)
            score[name].append(1e3 * (cpu - idle[name]) / frames)
            wall[name].append(frames / elapsed)
    base = statistics.median(decode)
    results = {}
    for name in models:
        total = statistics.median(score[name])
        ratios = [(s - d) / d for s, d in zip(score[name], decode, strict=True)]
        starts = [first_score_seconds(clip, name) for _ in range(rounds)]
        results[name] = {
            "cpu_ms_per_frame_decode_and_score": round(total, 2),
            "scoring_over_decode": round(statistics.median(ratios), 3),
            "frames_per_second": round(statistics.median(wall[name]), 1),
            "first_score_seconds": round(statistics.median(s for s, _ in starts), 3),
            "peak_rss_mb_at_first_score": round(max(kib for _, kib in starts) / 1024, 1),
        }
    return {
        "num_frames": frames,
        "rounds": rounds,
        "cpu_ms_per_frame_decode": round(base, 2),
        "frames_per_second_decode": round(statistics.median(wall["decode"]), 1),
        "models": results,
    }


def main() -> None:
    """Read the command line, measure, write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clip", type=Path, help="A 1080p30 H.264 clip; made where absent.")
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--model", action="append", help="student by default; may be repeated.")
    parser.add_argument("-o", "--output", type=Path, default=RESULT)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        clip = arguments.clip or Path(folder) / "reference_1080p30.mp4"
        if not clip.is_file():
            maker = [sys.executable, str(HERE / "make_clip.py"), str(DEMO_CLIP), "-o", str(clip)]
            subprocess.run([*maker, "--seconds", str(arguments.seconds + 1)], check=True)
        models = arguments.model or ["student"]
        found = measure(clip, arguments.seconds, arguments.rounds, models)
    words = [Path(w).name if w.startswith("/") else w for w in sys.argv[1:]]
    packages = ("av", "onnxruntime", "opencv-python-headless", "numpy")
    result = {
        "command": " ".join(["python benchmarks/score_every_frame.py", *words]),
        "date": time.strftime("%Y-%m-%d"),
        "machine": {
            "processor": _processor(),
            "cores": len(os.sched_getaffinity(0)),
            "system": platform.platform(),
            "python": platform.python_version(),
        },
        "packages": {
            "dgiqa-stream": package_version(),
            **{name: version(name) for name in packages},
        },
        **found,
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(found, indent=1))


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


if __name__ == "__main__":
    main()
