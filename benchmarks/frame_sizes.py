"""How a model's score changes with the size of the very same picture.

``python benchmarks/frame_sizes.py PICTURES... [--model student] [-o JSON]`` reduces the square in
each picture's upper left corner to sides of 430 to 1080 pixels, by the mean over areas, and writes
the mean score at each side and the largest change between neighbouring sides, of the mean and of
single pictures. A score should move slowly: less is left of a picture that is made smaller.
"""

from __future__ import annotations

import sys
from pathlib import Path

import _pictures as shared
import cv2
import numpy as np

from dgiqa_stream.scorer import Scorer

RESULT = Path(__file__).parent / "results" / "frame_sizes.json"
# close together where a view of 224, halved once or twice, has its bounds
SIDES = (430, 440, 444, 446, 448, 450, 452, 456, 470, 500, 540, 600, 700, 800, 860,
         880, 890, 894, 896, 898, 900, 902, 910, 930, 960, 1000, 1080)  # fmt: skip


def squares(paths: list[Path]) -> dict[str, shared.Rgb]:
    """The upper left square of each picture that is at least 1080 pixels high and wide."""
    found = {}
    for path in paths:
        rgb = shared.read_rgb(path)
        side = min(rgb.shape[:2])
        if side >= SIDES[-1]:
            found[path.name] = np.ascontiguousarray(rgb[:side, :side])
    if not found:
        sys.exit(f"none of {len(paths)} pictures has {SIDES[-1]} pixels on each side")
    return found


def measure(scorer: Scorer, rgbs: list[shared.Rgb]) -> dict[str, object]:
    """The mean score at each side, and the largest changes from one side to the next."""
    scores = np.array([
        [scorer.score(cv2.resize(p, (side, side), interpolation=cv2.INTER_AREA)) for p in rgbs]
        for side in SIDES
    ])  # fmt: skip
    steps = np.abs(np.diff(scores, axis=0))
    of_mean = np.abs(np.diff(scores.mean(1)))
    return {
        "mean_by_side": {
            str(s): round(float(v), 1) for s, v in zip(SIDES, scores.mean(1), strict=True)
        },
        "largest_step_of_mean": round(float(of_mean.max()), 2),
        "it_is_at": f"{SIDES[of_mean.argmax()]} to {SIDES[of_mean.argmax() + 1]}",
        "largest_step_of_a_picture": round(float(steps.max()), 2),
        "p95_step_of_a_picture": round(float(np.quantile(steps, 0.95)), 2),
    }


def main() -> None:
    """Measure and write."""
    args = shared.arguments(__doc__, RESULT)
    found = squares(args.pictures)
    shared.measure_models(
        args, "frame_sizes", found, lambda scorer: measure(scorer, list(found.values()))
    )


if __name__ == "__main__":
    main()
