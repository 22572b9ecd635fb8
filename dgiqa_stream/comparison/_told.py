"""A comparison in words and as plain values."""

from __future__ import annotations

import math
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Mapping

    from dgiqa_stream.comparison._values import Comparison, Difference

CAVEAT = (
    "The interval tells how far chance over time may have moved the difference in content like "
    "this. It knows nothing of other content, nor of the model's own errors, which both recordings "
    "share as far as their pictures are alike."
)
NAMES: Mapping[str, str] = MappingProxyType(
    {"hysteresis": "hysteresis (headline)", "mean": "mean", "low5": "worst 5 % (mean)"}
)


def clock_text(seconds: float) -> str:
    """``1:02:03.4`` or ``2:03.4``."""
    tenths = round(abs(seconds) * 10)
    minutes, rest = divmod(tenths, 600)
    hours, minutes = divmod(minutes, 60)
    whole = f"{hours}:{minutes:02}" if hours else f"{minutes}"
    return f"{'-' if seconds < 0 else ''}{whole}:{rest // 10:02}.{rest % 10}"


def overlap_text(found: Comparison) -> str:
    """What was compared, and how it was aligned."""
    alignment = found.alignment
    r = alignment.correlation
    how = {
        "given": "as given",
        "found": "found from the curves",
        "own times": "the recordings' own times",
    }[alignment.how]
    how += "" if math.isnan(r) else f", correlation {r:.2f}"
    if alignment.rival_seconds is not None:
        how += (
            f"; {alignment.rival_seconds:+.2f} s fits better, not clearly: --offset takes it if "
            "it is right"
        )
    return (
        f"{found.overlap_seconds:.1f} s in common, {clock_text(found.begin_seconds)} to "
        f"{clock_text(found.end_seconds)}; B's clock is {alignment.offset_seconds:+.2f} s from "
        f"A's ({how})"
    )


def interval_facts(found: Comparison) -> dict[str, Any]:
    """How the intervals were made; whoever has the scores can make them again with these."""
    return {
        "method": "moving-block bootstrap over time, circular",
        "confidence": 0.95,
        "cell_seconds": round(found.cells.step_seconds, 6),
        "num_cells": int(np.count_nonzero(found.cells.weight)),
        "block_seconds": round(found.block_seconds, 6),
        "block_rule": "twice that of Politis and White 2004, the longest of the pooled values",
        "num_blocks": found.num_blocks,
        "num_resamples": found.num_resamples,
        "seed": found.seed,
    }


def document_of(found: Comparison) -> dict[str, Any]:
    """The comparison as plain values for JSON: finite numbers, None where there is none."""
    alignment = found.alignment
    offset = alignment.offset_seconds
    return {
        "verdict": found.verdict,
        "alignment": {
            "offset_seconds": round(offset, 6),
            "how": alignment.how,
            "correlation": _number(alignment.correlation),
            "rival_seconds": alignment.rival_seconds,
        },
        "overlap": {
            "begin_seconds": round(found.begin_seconds, 6),
            "end_seconds": round(found.end_seconds, 6),
            "scored_seconds": round(found.overlap_seconds, 6),
        },
        "headline": found.headline.name,
        "differences": {d.name: _difference(d) for d in found.differences},
        "worse": [
            {
                "begin_seconds": round(s.begin_seconds, 6),
                "end_seconds": round(s.end_seconds, 6),
                "begin_seconds_in_b": round(s.begin_seconds + offset, 6),
                "difference": _number(s.difference),
                "lowest": _number(s.lowest),
            }
            for s in found.stretches
        ],
        "seconds": [
            {"begin_seconds": round(begin, 6), "difference": _number(difference)}
            for begin, difference in zip(
                found.second_seconds.tolist(), found.second_difference.tolist(), strict=True
            )
        ],
        "interval": interval_facts(found),
        "caveat": CAVEAT,
    }


def _difference(found: Difference) -> dict[str, float | None]:
    return {
        "a": _number(found.a),
        "b": _number(found.b),
        "difference": _number(found.difference),
        "low": _number(found.low),
        "high": _number(found.high),
    }


def _number(value: float) -> float | None:
    return round(value, 4) if math.isfinite(value) else None
