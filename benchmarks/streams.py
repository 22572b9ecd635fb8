"""Live 1080p30 streams at once: CPU per stream, lag and memory, against decoding them alone.

    python benchmarks/streams.py [--clip live.mp4] [--seconds 10] [--rounds 3]

Each case in turn, in each round: the streams are decoded and nothing else, then watched by
``dgiqa-stream watch``. They play over MPEG-TS/UDP on this machine from a process of their own,
whose cost is not counted. CPU is a process's own (user and system) while all streams play. Lag is
from when a frame was to be shown, on the sender's clock, to when it was decoded or scored.
Writes ``benchmarks/results/streams.json``.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import _bench as bench
import _live as live

_SETTLE_SECONDS = 1.0


class Case(NamedTuple):
    """How many streams, how densely scored, by how many processes."""

    num_streams: int
    frames_per_second: float
    num_processes: int = 1


CASES = (Case(1, 10), Case(1, 2), Case(4, 2), Case(8, 2), Case(8, 2, num_processes=8))


class Figures(NamedTuple):
    """One run of one case."""

    cpu_percent_per_stream: float
    """Of one core."""
    lag_p95_ms: float
    frames_per_second_per_stream: float
    peak_rss_mb: float
    """Of all processes together; what they share is counted in each."""
    num_lost: int = 0
    """Frames that were dropped or arrived damaged."""


def decoded(clip: Path, num_streams: int, seconds: float) -> Figures:
    """Decode streams alone."""
    with (
        tempfile.TemporaryDirectory() as folder,
        live.broadcast(clip, num_streams) as played,
        live.decoding(played.urls, Path(folder)) as follower,
    ):
        return _figures([follower], played, seconds)


def watched(clip: Path, case: Case, seconds: float) -> Figures:
    """Watch streams."""
    with (
        tempfile.TemporaryDirectory() as folder,
        live.broadcast(clip, case.num_streams) as played,
    ):
        share = case.num_streams // case.num_processes
        with contextlib.ExitStack() as stack:
            followers = [
                stack.enter_context(
                    live.watching(
                        played.urls[first : first + share],
                        Path(folder),
                        frames_per_second=case.frames_per_second,
                        first=first,
                    )
                )
                for first in range(0, case.num_streams, share)
            ]
            figures = _figures(followers, played, seconds)
        lost = [f.counts() for f in followers]
    num_lost = sum(c.get(n, 0) for c in lost for n in ("dropped_queue", "dropped_stale", "corrupt"))
    return figures._replace(num_lost=num_lost)


def _figures(followers: Sequence[live.Follower], played: live.Broadcast, seconds: float) -> Figures:
    """What the followers take while all streams play."""
    num_streams = len(played.urls)
    for follower in followers:
        follower.wait_for(num_streams // len(followers))
    time.sleep(_SETTLE_SECONDS)
    begin, cpu = time.time(), _cpu_seconds(followers)
    time.sleep(seconds)
    end, cpu = time.time(), _cpu_seconds(followers) - cpu
    heard = [h for f in followers for h in f.heard() if begin <= h.at_seconds < end]
    peak = sum(bench.memory_of(f.process.pid)[1] for f in followers)
    return Figures(
        100 * cpu / (end - begin) / num_streams,
        live.p95_ms(played.lags_of(heard)),
        len(heard) / (end - begin) / num_streams,
        peak,
    )


def _cpu_seconds(followers: Sequence[live.Follower]) -> float:
    return sum(bench.cpu_seconds_of(f.process.pid) for f in followers)


def measure(clip: Path, cases: Sequence[Case], seconds: float, rounds: int) -> list[dict[str, Any]]:
    """Every case against decoding, medians over the rounds."""
    runs: dict[Case, list[tuple[Figures, Figures]]] = {case: [] for case in cases}
    for number in range(rounds):
        for case in cases:
            bench.say(f"round {number + 1} of {rounds}: {case}")
            alone = decoded(clip, case.num_streams, seconds)
            runs[case].append((alone, watched(clip, case, seconds)))
    return [_told(case, found) for case, found in runs.items()]


def _told(case: Case, found: list[tuple[Figures, Figures]]) -> dict[str, Any]:
    alone, both = (_medians(figures) for figures in zip(*found, strict=True))
    ratio = both["cpu_percent_per_stream"] / alone["cpu_percent_per_stream"] - 1
    del alone["num_lost"]
    return {
        **case._asdict(),
        "decode": alone,
        "watch": both,
        "watching_over_decode": round(ratio, 3),
    }


def _medians(figures: Sequence[Figures]) -> dict[str, float]:
    named = zip(Figures._fields, zip(*figures, strict=True), strict=True)
    return {name: round(statistics.median(values), 2) for name, values in named}


def main() -> None:
    """Read the command line, measure, write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    bench.add_common(parser, "streams.json", rounds=3)
    parser.add_argument("--seconds", type=float, default=10.0, help="Of each measurement.")
    parser.add_argument("--case", type=_case, action="append", help="STREAMS,FPS[,PROCESSES]")
    arguments = parser.parse_args()
    with bench.clip_of(arguments.clip, 6, keyframe_seconds=2) as clip:
        cases = arguments.case or CASES
        found = measure(clip, cases, arguments.seconds, arguments.rounds)
    result = {"seconds": arguments.seconds, "rounds": arguments.rounds, "cases": found}
    bench.write("streams.py", result, arguments.output)
    print(json.dumps(found, indent=1))


def _case(text: str) -> Case:
    streams, fps, *processes = text.split(",")
    return Case(int(streams), float(fps), *map(int, processes))


if __name__ == "__main__":
    main()
