"""Part of ``gpu_check.py``: what was found against what is wanted."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

SHARE, NUM_STREAMS, FPS = 0.95, 64, 30
AT_PACE = 0.98
"""Share of the frames that were due at the load: with fewer, streams fell behind, and decoders
waited before latency began to count.
"""
P99_MS, GPU_BYTES, POINTS = 50.0, 1.5e9, 1.0


def judged(found: Mapping[str, Any]) -> dict[str, Any]:
    """Each goal with what is wanted, what was found and whether that meets it.

    ``met`` is None where it was not measured, or where no GPU's decoder was at work: then ``why``
    says so.
    """
    streams = found.get("streams", {})
    of_h264 = streams.get("codecs", {}).get("h264", {})
    by_number = {n: v for n, v in of_h264.items() if isinstance(v, dict) and v.get("share")}
    at_load = streams.get("at_load", {})
    is_at_pace = at_load.get("num_frames", 0) >= AT_PACE * at_load.get("expected_frames", 1)
    goals = {
        "share of the decoder's rate, at every number of streams": _goal(
            min((v["share"] for v in by_number.values()), default=None), at_least=SHARE
        ),
        f"streams of 1080p at {FPS} frames a second, every frame scored": _goal(
            max((v["decode_to_score_fps"] / FPS for n, v in by_number.items()
                 if int(n) >= NUM_STREAMS), default=None),
            at_least=NUM_STREAMS,
        ),
        "p99 from decoded to published at 80 % load, ms": _goal(
            at_load.get("p99_ms") if is_at_pace else None, at_most=P99_MS
        ),
        "GPU memory of 32 streams beside the decoder's, bytes": _goal(
            by_number.get("32", {}).get("beside_decoder_bytes"), at_most=GPU_BYTES
        ),
        "mean points from the CPU's INT8 scores": _goal(
            found.get("scores", {}).get("mean_points_from_cpu_int8"), at_most=POINTS
        ),
    }  # fmt: skip
    decoder = of_h264.get("decoder", "")
    for name, goal in goals.items():
        if goal["found"] is None:
            fell_behind = "p99" in name and at_load.get("p99_ms") is not None
            goal["why"] = "the streams fell behind" if fell_behind else "not measured"
        elif "points" not in name and "cuda" not in decoder:
            goal |= {"met": None, "why": f"decoded by {decoder or 'nothing'}, and not by NVDEC"}
    return goals


def _goal(
    found: float | None, *, at_least: float | None = None, at_most: float | None = None
) -> dict[str, Any]:
    bound = {"at_least": at_least} if at_least is not None else {"at_most": at_most}
    if found is None:
        return {**bound, "found": None, "met": None}
    is_met = found >= at_least if at_least is not None else found <= (at_most or 0.0)
    return {**bound, "found": found, "met": is_met}


def lines(goals: Mapping[str, Any]) -> Iterator[str]:
    """For people: one line for each goal."""
    for name, goal in goals.items():
        word = {True: "met", False: "MISSED", None: goal.get("why", "")}[goal["met"]]
        found = "nothing" if goal["found"] is None else f"{goal['found']:.4g}"
        bound = f">= {goal['at_least']:g}" if "at_least" in goal else f"<= {goal['at_most']:g}"
        yield f"  {name}: {found} ({bound}): {word}"
