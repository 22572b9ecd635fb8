"""Small drawn pictures and what the shipped models say of them: ``pictures/`` and its maker.

``python tests/golden/pictures_golden.py`` draws the pictures that are missing and writes the scores
of both shipped models anew: after a release, never to make a test pass.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from dgiqa_stream.manifest import load_model
from dgiqa_stream.scorer import load_scorer

Rgb = NDArray[np.uint8]
PICTURES = Path(__file__).with_name("pictures")
SCORES = PICTURES / "scores.json"
MODELS = ("student", "student-fp32", "student-xs", "student-xs-fp32")
HEIGHT, WIDTH = 192, 256


def scene(seed: int) -> Rgb:
    """Soft light, discs and stripes with sharp edges, and fine texture."""
    rng = np.random.default_rng(seed)
    light = cv2.resize(
        rng.uniform(60, 190, (3, 4, 3)), (WIDTH, HEIGHT), interpolation=cv2.INTER_CUBIC
    )
    for _ in range(9):
        at = (int(rng.integers(WIDTH)), int(rng.integers(HEIGHT)))
        cv2.circle(
            light, at, int(rng.integers(8, 40)), rng.uniform(0, 255, 3).tolist(), -1, cv2.LINE_AA
        )
    for x in range(0, 80, 8):
        cv2.line(
            light,
            (x, HEIGHT),
            (x + 60, HEIGHT - 50),
            rng.uniform(0, 255, 3).tolist(),
            2,
            cv2.LINE_AA,
        )
    texture = cv2.GaussianBlur(rng.normal(0, 14, light.shape), (0, 0), 0.7)
    return np.clip(light + texture, 0, 255).astype(np.uint8)


def noisy(rgb: Rgb) -> Rgb:
    """White Gaussian noise of 30 steps."""
    drawn = np.random.default_rng(1).normal(0, 30, rgb.shape)
    return np.clip(rgb + drawn, 0, 255).astype(np.uint8)


def coded(rgb: Rgb) -> Rgb:
    """Through JPEG of quality 6 and back."""
    _, data = cv2.imencode(".jpg", rgb[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 6])
    return np.ascontiguousarray(cv2.imdecode(data, cv2.IMREAD_COLOR)[..., ::-1])


def blurred(rgb: Rgb) -> Rgb:
    """A Gaussian of 2.5 pixels."""
    return cv2.GaussianBlur(rgb, (0, 0), 2.5)


def letterboxed(rgb: Rgb) -> Rgb:
    """Black bars above and below."""
    out = np.full_like(rgb, 16)
    out[32:-32] = rgb[32:-32]
    return out


DRAWN: dict[str, Callable[[], Rgb]] = {
    "scene-1": lambda: scene(1),
    "scene-2": lambda: scene(2),
    "scene-3": lambda: scene(3),
    "scene-1-noise": lambda: noisy(scene(1)),
    "scene-2-noise": lambda: noisy(scene(2)),
    "scene-1-jpeg": lambda: coded(scene(1)),
    "scene-3-jpeg": lambda: coded(scene(3)),
    "scene-2-blur": lambda: blurred(scene(2)),
    "scene-3-blur": lambda: blurred(scene(3)),
    "scene-1-bars": lambda: letterboxed(scene(1)),
    "black": lambda: np.zeros((HEIGHT, WIDTH, 3), np.uint8),
}


def read(path: Path) -> Rgb:
    """A picture's pixels."""
    return np.ascontiguousarray(cv2.imread(str(path))[..., ::-1])


def main() -> None:
    """Draw what is missing, score everything, write the scores."""
    PICTURES.mkdir(exist_ok=True)
    for name, draw in DRAWN.items():
        path = PICTURES / f"{name}.png"
        if not path.is_file():
            cv2.imwrite(str(path), draw()[..., ::-1])
    told = {
        "command": "python tests/golden/pictures_golden.py",
        "machine": platform.machine(),
        "onnxruntime": version("onnxruntime"),
        "models": {},
    }
    for name in MODELS:
        with load_scorer(name, device="cpu") as scorer:
            pictures = sorted(PICTURES.glob("*.png"))
            scores = {p.stem: round(scorer.score(read(p)), 3) for p in pictures}
        manifest = load_model(name).manifest
        told["models"][name] = {"version": manifest.version, "scores": scores}
    SCORES.write_text(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    main()
