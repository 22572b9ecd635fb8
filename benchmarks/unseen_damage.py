"""What a model says of damage that its training knew little or nothing of.

``python benchmarks/unseen_damage.py PICTURES... [--model student] [-o JSON]`` damages each clean
picture in the ways below and writes the scores' mean, lowest and highest for each strength, from
slight to strong. Ladders say whether a worse version scores lower; this says how low, and where it
does not. The figures under "Known failures" in the model card are from it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import _pictures as shared
import cv2
import numpy as np
from _pictures import Rgb

from dgiqa_stream.scorer import Scorer

RESULT = Path(__file__).parent / "results" / "unseen_damage.json"
GREEN = (0, 255, 0)


def jpeg(rgb: Rgb, quality: float) -> Rgb:
    """Through JPEG at a quality and back."""
    _, coded = cv2.imencode(".jpg", rgb[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, int(quality)])
    return np.ascontiguousarray(cv2.imdecode(coded, cv2.IMREAD_COLOR)[..., ::-1])


def pixelated(rgb: Rgb, factor: float) -> Rgb:
    """Means of squares, each drawn as a square."""
    height, width = rgb.shape[:2]
    small = (max(1, round(width / factor)), max(1, round(height / factor)))
    reduced = cv2.resize(rgb, small, interpolation=cv2.INTER_AREA)
    return cv2.resize(reduced, (width, height), interpolation=cv2.INTER_NEAREST)


def lost_blocks(rgb: Rgb, share: float) -> Rgb:
    """A share of the 16x16 blocks in bright green."""
    height, width = rgb.shape[:2]
    drawn = np.random.default_rng(1).random((-(-height // 16), -(-width // 16))) < share
    mask = drawn.repeat(16, 0).repeat(16, 1)[:height, :width]
    return np.where(mask[..., None], np.array(GREEN, np.uint8), rgb)


def salt_and_pepper(rgb: Rgb, share: float) -> Rgb:
    """A share of the pixels black or white."""
    drawn = np.random.default_rng(1).random(rgb.shape[:2])
    made = rgb.copy()
    made[drawn < share / 2] = 0
    made[drawn > 1 - share / 2] = 255
    return made


def posterised(rgb: Rgb, levels: float) -> Rgb:
    """So many levels of each colour."""
    steps = np.round(rgb / 255 * (levels - 1)) / (levels - 1)
    return np.round(steps * 255).astype(np.uint8)


def blurred(rgb: Rgb, sigma_px: float) -> Rgb:
    """A Gaussian."""
    return cv2.GaussianBlur(rgb, (0, 0), sigma_px)


def noisy(rgb: Rgb, sigma: float) -> Rgb:
    """White Gaussian noise, in 8-bit steps."""
    drawn = np.random.default_rng(1).normal(0, sigma, rgb.shape)
    return np.clip(rgb + drawn, 0, 255).astype(np.uint8)


def turned(rgb: Rgb, quarters: float) -> Rgb:
    """By so many quarters of a circle."""
    return np.ascontiguousarray(np.rot90(rgb, int(quarters)))


DAMAGE: dict[str, tuple[Callable[[Rgb, float], Rgb], tuple[float, ...]]] = {
    "jpeg": (jpeg, (75, 30, 10, 8, 6, 4, 2, 1)),
    "pixelated": (pixelated, (2, 4, 8, 16, 32)),
    "lost_blocks": (lost_blocks, (0.01, 0.03, 0.1, 0.3)),
    "salt_and_pepper": (salt_and_pepper, (0.001, 0.01, 0.1, 0.5)),
    "posterised": (posterised, (16, 8, 4, 2)),
    "blurred": (blurred, (1, 3, 8, 16)),
    "noisy": (noisy, (10, 30, 60)),
    "turned": (turned, (1, 2, 3)),
}


def summary(scores: list[float]) -> dict[str, float]:
    """Mean, lowest and highest, to a tenth of a point."""
    found = {"mean": np.mean(scores), "min": min(scores), "max": max(scores)}
    return {name: round(float(value), 1) for name, value in found.items()}


def measure(scorer: Scorer, pictures: list[Rgb]) -> dict[str, object]:
    """Scores of the pictures as they are, by damage and strength, and of plain fields."""
    made: dict[str, object] = {"clean": summary(scorer.score_batch(pictures))}
    for name, (damage, strengths) in DAMAGE.items():
        made[name] = {
            str(s): summary(scorer.score_batch([damage(p, s) for p in pictures])) for s in strengths
        }
    plain = {"black": 0, "grey": 128, "white": 255}
    made["plain"] = {
        name: round(scorer.score(np.full((512, 512, 3), value, np.uint8)), 1)
        for name, value in plain.items()
    }
    return made


def main() -> None:
    """Measure and write."""
    args = shared.arguments(__doc__, RESULT)
    pictures = [shared.read_rgb(path) for path in args.pictures]
    names = [path.name for path in args.pictures]
    shared.measure_models(args, "unseen_damage", names, lambda scorer: measure(scorer, pictures))


if __name__ == "__main__":
    main()
