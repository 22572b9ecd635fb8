"""Whether watching a live stream takes more and more memory.

    python benchmarks/memory.py [--clip live.mp4] [--seconds 1800] [--streams 1] [--fps 5]

``dgiqa-stream watch`` follows live 1080p30 streams, publishes and records, as in ``streams.py``;
its resident memory is read every second. What counts is how much higher it goes after the first
five minutes (a sixth of a shorter run) than it went in them. Writes
``benchmarks/results/memory.json``.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import _bench as bench
import _live as live
import numpy as np

_WARM_SECONDS = 300.0
_WARM_SHARE = 1 / 6


class Reading(NamedTuple):
    """Resident memory at one moment."""

    at_seconds: float
    """Since all streams played."""
    rss_mb: float


def follow(clip: Path, num_streams: int, frames_per_second: float, seconds: float) -> list[Reading]:
    """Watch for so long."""
    with (
        tempfile.TemporaryDirectory() as folder,
        live.broadcast(clip, num_streams) as played,
        live.watching(played.urls, Path(folder), frames_per_second=frames_per_second) as follower,
    ):
        follower.wait_for(num_streams)
        begin, readings = time.monotonic(), list[Reading]()
        while (now := time.monotonic() - begin) < seconds:
            if follower.process.poll() is not None:
                raise RuntimeError(f"the watching ended after {now:.0f} s")
            readings.append(Reading(now, bench.memory_of(follower.process.pid)[0]))
            time.sleep(1.0)
    return readings


def judge(readings: list[Reading]) -> dict[str, Any]:
    """How much more it took after the first minutes, and the slope of what came then."""
    warm_seconds = min(_WARM_SECONDS, readings[-1].at_seconds * _WARM_SHARE)
    before = [r for r in readings if r.at_seconds <= warm_seconds]
    after = [r for r in readings if r.at_seconds > warm_seconds]
    highest_before = max(r.rss_mb for r in before)
    at, mb = np.array(after).T
    slope = float(np.polyfit(at, mb, 1)[0])
    return {
        "first_seconds": round(warm_seconds, 1),
        "highest_rss_mb_in_the_first": round(highest_before, 2),
        "highest_rss_mb_afterwards": round(float(mb.max()), 2),
        "growth_mb": round(max(0.0, float(mb.max()) - highest_before), 2),
        "slope_mb_per_hour": round(3600 * slope, 2),
        "rss_mb_each_minute": [
            round(float(np.median([r.rss_mb for r in readings if r.at_seconds // 60 == minute])), 1)
            for minute in range(int(readings[-1].at_seconds // 60) + 1)
        ],
    }


def main() -> None:
    """Read the command line, measure, write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    bench.add_common(parser, "memory.json", rounds=None)
    parser.add_argument("--seconds", type=float, default=1800.0)
    parser.add_argument("--streams", type=int, default=1)
    parser.add_argument("--fps", type=float, default=5.0, help="Frames scored a second.")
    arguments = parser.parse_args()
    with bench.clip_of(arguments.clip, 6, keyframe_seconds=2) as clip:
        readings = follow(clip, arguments.streams, arguments.fps, arguments.seconds)
    found = {
        "seconds": arguments.seconds,
        "num_streams": arguments.streams,
        "frames_per_second": arguments.fps,
        **judge(readings),
    }
    bench.write("memory.py", found, arguments.output)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
