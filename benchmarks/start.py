"""From the start of a fresh process to its first score, and how much memory it holds by then.

    python benchmarks/start.py [--clip reference_1080p30.mp4] [--rounds 9]

Three programs in turn: one that decodes the first frame and no more, one that scores it, and
``dgiqa-stream score`` until its first row has come. Each is started anew; the disk's cache is warm.
Writes ``benchmarks/results/start.json``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import _bench as bench

DECODE_FIRST = """
import sys
from dgiqa_stream.config import SourceSettings
from dgiqa_stream.sources import open_source
frames = open_source(sys.argv[1], SourceSettings(), stream="bench").frames()
print(next(frames).info.index, flush=True)
sys.stdin.read()
"""
SCORE_FIRST = """
import sys
from dgiqa_stream.config import SamplerSettings, StreamConfig
from dgiqa_stream.pipeline import score_frames
from dgiqa_stream.scorer import load_scorer
config = StreamConfig(sampler=SamplerSettings(mode="every"))
frames = score_frames(sys.argv[1], load_scorer(), config=config)
print(next(frames).score, flush=True)
sys.stdin.read()
"""


def first_line(command: list[str], *, num_headers: int = 0) -> tuple[float, float]:
    """Seconds from the start to the first line after the headers, and the peak memory then, MB."""
    begin = time.perf_counter()
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        for _ in range(num_headers + 1):
            line = child.stdout.readline()
        elapsed = time.perf_counter() - begin
        assert line, f"{command} wrote nothing"
        peak_mb = bench.memory_of(child.pid)[1]
        child.kill()
    return elapsed, peak_mb


def measure(clip: Path, rounds: int) -> dict[str, Any]:
    """All figures, medians over the rounds; memory at most."""
    python = [sys.executable, "-c"]
    command = [sys.executable, "-m", "dgiqa_stream", "score", str(clip), "--quiet"]
    programs = {
        "decode": ([*python, DECODE_FIRST, str(clip)], 0),
        "score": ([*python, SCORE_FIRST, str(clip)], 0),
        "command_line": (command, 1),
    }
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in programs}
    for number in range(rounds + 1):
        bench.say(f"round {number} of {rounds}")
        for name, (words, num_headers) in programs.items():
            found[name].append(first_line(words, num_headers=num_headers))
    return {
        "rounds": rounds,
        "first_frame_seconds_decode": _seconds(found["decode"]),
        "first_score_seconds": _seconds(found["score"]),
        "first_row_seconds_command_line": _seconds(found["command_line"]),
        "peak_rss_mb_decode": _peak(found["decode"]),
        "peak_rss_mb_at_first_score": _peak(found["score"]),
    }


def _seconds(found: list[tuple[float, float]]) -> float:
    return round(statistics.median(s for s, _ in found[1:]), 3)  # the first warms the disk's cache


def _peak(found: list[tuple[float, float]]) -> float:
    return round(max(mb for _, mb in found), 1)


def main() -> None:
    """Read the command line, measure, write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    bench.add_common(parser, "start.json", rounds=9)
    arguments = parser.parse_args()
    with bench.clip_of(arguments.clip, 9) as clip:
        found = measure(clip, arguments.rounds)
    bench.write("start.py", found, arguments.output)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
