"""Cost of scoring every frame of 1080p30 against decoding it.

    python benchmarks/score_every_frame.py [--clip reference_1080p30.mp4] [--rounds 5]
    python benchmarks/score_every_frame.py --clip moving.mp4 \
        -o benchmarks/results/score_every_frame_moving.json

The clip made where none is given is of a still room, which is cheap to decode; ``make_clip.py``
makes one of any four clips. Decoding alone and decoding with scoring run in turn, each in a process
of its own, so that a drift of the machine's speed meets both. CPU seconds are the process's (user
and system) after its first frame; inference is what its thread spends in it, of the same run, and
what scoring takes beside decoding and inference is ``cpu_ms_per_frame_neither``. Writes
``benchmarks/results/score_every_frame.json``.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import _bench as bench
import av
import numpy as np

_DECODE = "decode"


def measure(clip: Path, seconds: float, rounds: int, models: list[str]) -> dict[str, Any]:
    """All figures, medians over the rounds."""
    cpu_ms: dict[str, list[float]] = {name: [] for name in [_DECODE, *models]}
    rate: dict[str, list[float]] = {name: [] for name in cpu_ms}
    inference_ms: dict[str, list[float]] = {name: [] for name in models}
    counts = set()
    for number in range(rounds):
        bench.say(f"round {number + 1} of {rounds}")
        for name in cpu_ms:
            spent = _run(clip, seconds, name)
            num_frames = spent["num_frames"]
            counts.add(num_frames)
            cpu_ms[name].append(1e3 * spent["cpu_seconds"] / num_frames)
            rate[name].append(num_frames / spent["wall_seconds"])
            if name != _DECODE:
                inference_ms[name].append(1e3 * spent["inference_cpu_seconds"] / num_frames)
    (num_frames,) = counts  # every program saw every frame
    return {
        "num_frames": num_frames,
        "rounds": rounds,
        "cpu_ms_per_frame_decode": round(statistics.median(cpu_ms[_DECODE]), 2),
        "frames_per_second_decode": round(statistics.median(rate[_DECODE]), 1),
        "models": {
            name: _of_model(cpu_ms[name], cpu_ms[_DECODE], inference_ms[name], rate[name])
            for name in models
        },
    }


def megabits_per_second(clip: Path) -> float:
    """Of the picture alone, over the whole clip: what there is to decode."""
    with av.open(str(clip)) as container:
        stream = container.streams.video[0]
        sizes = [packet.size for packet in container.demux(stream) if packet.size]
        assert stream.average_rate is not None
        return round(8e-6 * sum(sizes) * float(stream.average_rate) / len(sizes), 1)


def _run(clip: Path, seconds: float, name: str) -> Any:
    """Decode so much of the clip, and score it where ``name`` is a model's."""
    if name == _DECODE:
        return json.loads(bench.run_code(bench.DECODE, clip, str(seconds)).output)
    return json.loads(bench.run_code(bench.SCORE, clip, str(seconds), name).output)


def _of_model(
    cpu_ms: list[float], decode_ms: list[float], inference_ms: list[float], rate: list[float]
) -> dict[str, Any]:
    """Medians; what is neither decoding nor inference is the rest of each round.

    How far the rounds lie apart is told by their tenth and ninetieth percentile.
    """
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
        "scoring_over_decode_p10_p90": np.quantile(ratios, [0.1, 0.9]).round(3).tolist(),
        "frames_per_second": round(statistics.median(rate), 1),
    }


def main() -> None:
    """Read the command line, measure, write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    bench.add_common(parser, "score_every_frame.json")
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--model", action="append", help="May be repeated; student and student-xs.")
    arguments = parser.parse_args()
    with bench.clip_of(arguments.clip, arguments.seconds + 1) as clip:
        models = arguments.model or ["student", "student-xs"]
        found = {"megabits_per_second": megabits_per_second(clip)}
        found |= measure(clip, arguments.seconds, arguments.rounds, models)
    bench.write("score_every_frame.py", found, arguments.output)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
