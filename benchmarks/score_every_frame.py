"""Cost of scoring every frame of 1080p30 against decoding it.

    python benchmarks/score_every_frame.py [--clip reference_1080p30.mp4] [--rounds 5]

Decode alone, decode with scoring and inference alone run in turn, each in a process of its own, so
that a drift of the machine's speed meets all; what scoring takes beside decoding and inference is
``cpu_ms_per_frame_neither``. CPU seconds are the process's own (user and system), less those of
a run over one frame. Writes ``benchmarks/results/score_every_frame.json``.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import _bench as bench


def measure(clip: Path, seconds: float, rounds: int, models: list[str]) -> dict[str, Any]:
    """All figures, medians over the rounds."""
    programs = {"decode": (bench.DECODE, ()), **{name: (bench.SCORE, (name,)) for name in models}}
    idle = {
        name: bench.run_code(code, clip, bench.NO_FRAMES_SECONDS, *words).cpu_seconds
        for name, (code, words) in programs.items()
    }
    cpu_ms: dict[str, list[float]] = {name: [] for name in programs}
    rate: dict[str, list[float]] = {name: [] for name in programs}
    inference_ms: dict[str, list[float]] = {name: [] for name in models}
    counts = set()
    for number in range(rounds):
        bench.say(f"round {number + 1} of {rounds}")
        for name, (code, words) in programs.items():
            spent = bench.run_code(code, clip, str(seconds), *words)
            num_frames = int(spent.output)
            counts.add(num_frames)
            cpu_ms[name].append(1e3 * (spent.cpu_seconds - idle[name]) / num_frames)
            rate[name].append(num_frames / spent.wall_seconds)
        for name in models:
            found = bench.run_code(bench.INFER, clip, str(num_frames), name)
            inference_ms[name].append(float(found.output))
    (num_frames,) = counts  # every program saw every frame
    return {
        "num_frames": num_frames,
        "rounds": rounds,
        "cpu_ms_per_frame_decode": round(statistics.median(cpu_ms["decode"]), 2),
        "frames_per_second_decode": round(statistics.median(rate["decode"]), 1),
        "models": {
            name: _of_model(cpu_ms[name], cpu_ms["decode"], inference_ms[name], rate[name])
            for name in models
        },
    }


def _of_model(
    cpu_ms: list[float], decode_ms: list[float], inference_ms: list[float], rate: list[float]
) -> dict[str, float]:
    """Medians; what is neither decoding nor inference is the rest of each round."""
    ratios = [(both - alone) / alone for both, alone in zip(cpu_ms, decode_ms, strict=True)]
    rounds = list(zip(cpu_ms, decode_ms, inference_ms, strict=True))
    rest = [both - decode - inference for both, decode, inference in rounds]
    rest_ratios = [left / decode for left, decode in zip(rest, decode_ms, strict=True)]
    return {
        "cpu_ms_per_frame_inference": round(statistics.median(inference_ms), 2),
        "cpu_ms_per_frame_neither": round(statistics.median(rest), 2),
        "neither_over_decode": round(statistics.median(rest_ratios), 3),
        "cpu_ms_per_frame_decode_and_score": round(statistics.median(cpu_ms), 2),
        "scoring_over_decode": round(statistics.median(ratios), 3),
        "frames_per_second": round(statistics.median(rate), 1),
    }


def main() -> None:
    """Read the command line, measure, write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    bench.add_common(parser, "score_every_frame.json")
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--model", action="append", help="student by default; may be repeated.")
    arguments = parser.parse_args()
    with bench.clip_of(arguments.clip, arguments.seconds + 1) as clip:
        models = arguments.model or ["student"]
        found = measure(clip, arguments.seconds, arguments.rounds, models)
    bench.write("score_every_frame.py", found, arguments.output)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
