"""What the benchmarks on pictures share: their words, the pictures, and the record of a run."""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Callable, Collection
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from dgiqa_stream import load_scorer
from dgiqa_stream.scorer import Scorer

Rgb = NDArray[np.uint8]


def arguments(about: str, result: Path) -> argparse.Namespace:
    """The words of a command that judges clean pictures by models; the student unless named."""
    parser = argparse.ArgumentParser(description=about.split("\n")[0])
    parser.add_argument("pictures", nargs="+", type=Path, help="Clean pictures, unseen in training")
    parser.add_argument("--model", action="append", help="student by default; may be repeated.")
    parser.add_argument("-o", "--output", type=Path, default=result)
    args = parser.parse_args()
    args.model = list(dict.fromkeys(args.model or ["student"]))
    return args


def read_rgb(path: Path) -> Rgb:
    """A picture, uint8 (H, W, 3); ends the program where OpenCV reads none."""
    bgr = cv2.imread(str(path))
    if bgr is None:
        sys.exit(f"{path} is no picture that OpenCV reads: give PNG, JPEG or WebP")
    return np.ascontiguousarray(bgr[..., ::-1])


def measure_models(
    args: argparse.Namespace,
    script: str,
    names: Collection[str],
    measure: Callable[[Scorer], dict[str, object]],
) -> None:
    """Measure each model and write what was found, by what it was asked for, with its version."""
    models: dict[str, Any] = {}
    for model in args.model:
        with load_scorer(model, device="cpu") as scorer:
            told = {"version": scorer.manifest.version, "sha256": scorer.manifest.sha256}
            models[model] = {**told, **measure(scorer)}
    found = {
        "command": f"python benchmarks/{script}.py PICTURES... "
        + " ".join(f"--model {m}" for m in args.model),
        "pictures": sorted(names),
        "date": datetime.now(UTC).date().isoformat(),
        "python": platform.python_version(),
        "models": models,
    }
    args.output.write_text(json.dumps(found, indent=1) + "\n")
