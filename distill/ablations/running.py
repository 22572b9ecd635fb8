"""Runs a comparison and writes what it found."""

from __future__ import annotations

import platform
import time
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from distill.ablations.attention import attention
from distill.ablations.comparisons import ON_FROZEN_FEATURES, Comparison
from distill.ablations.features import features
from distill.ablations.settings import Settings
from distill.data.shards import write_json
from distill.process import command_line

ABLATIONS = {name: compare.__doc__ or "" for name, compare in ON_FROZEN_FEATURES.items()}
ABLATIONS["attention"] = attention.__doc__ or ""
"""Name to the question that it asks."""


def summary(found: Comparison) -> dict[str, Any]:
    """Mean and (for two seeds or more) standard deviation of every figure, and each seed's own."""
    return {
        name: {
            key: {
                "mean": round(float(np.mean([r[key] for r in rows])), 4),
                "sd": round(float(np.std([r[key] for r in rows], ddof=1)), 4)
                if len(rows) > 1
                else None,
                "seeds": [round(r[key], 4) for r in rows],
            }
            for key in rows[0]
        }
        for name, rows in found.items()
    }


def run_ablation(name: str, settings: Settings, output: Path) -> dict[str, Any]:
    """Run one comparison and write its JSON; returns what was written."""
    began = time.monotonic()
    if name == "attention":
        found = attention(settings)
    else:
        found = ON_FROZEN_FEATURES[name](*features(settings), settings)
    sizes = {k: v for k, v in asdict(settings).items() if not isinstance(v, Path)}
    result = {
        "ablation": name,
        "question": ABLATIONS[name].strip().splitlines()[0],
        "date": datetime.now(UTC).date().isoformat(),
        "command": command_line().replace("__main__.py", "python -m distill.ablations", 1),
        "machine": machine(),
        "settings": sizes,
        "depth": "classical cues, a stand-in: no depth network's weights were at hand",
        "seconds": round(time.monotonic() - began, 1),
        "results": summary(found),
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    write_json(output, result)
    return result


def machine() -> dict[str, Any]:
    """What the figures were computed on."""
    cpus = Path("/proc/cpuinfo")
    lines = cpus.read_text().splitlines() if cpus.is_file() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "processor": models[0] if models else platform.processor() or platform.machine(),
        "num_cores": len(models) or None,
        "num_threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
        "python": platform.python_version(),
    }
