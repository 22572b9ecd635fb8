"""How good a model is: agreement with people, order on ladders, INT8 against FP32.

Every figure goes through the runtime's own scorer, from files as a user has them.
"""

from __future__ import annotations

import io
import os
import platform
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
from numpy.typing import NDArray

from dgiqa_stream.correlation import krcc, plcc, rmse, srcc
from dgiqa_stream.preprocess import reduced_rgb
from dgiqa_stream.scorer import Scorer
from dgiqa_stream.sources._planes import planes_of
from dgiqa_stream.types import Planes
from distill.data.biq2021 import load_biq2021
from distill.data.build import content_split, read_named
from distill.data.degrade import Rgb, encode, pan
from distill.data.packed import as_planes_420
from distill.say import show_progress

TOLERANCE_POINTS = 0.5
CRF_LADDER = (18, 24, 30, 36, 42, 48)
BLUR_LADDER_PX = (0.0, 0.7, 1.2, 2.0, 3.2, 5.0)
NOISE_LADDER = (0.0, 4.0, 8.0, 14.0, 24.0, 40.0)
_LONGEST_PX = 1280
_CLIP_FRAMES, _SCORED_FRAMES = 12, (2, 5, 8, 11)
_BATCH = 8
_NUM_RESAMPLES = 1000


@dataclass(frozen=True, slots=True, eq=False)
class Content:
    """A short clean clip that took no part in training."""

    name: str
    frames: list[Rgb]


def held_out_contents(pristine: Path, clips: Path) -> Iterator[Content]:
    """Pans over the pictures of the test split, and the middle of every clip."""
    for path in sorted(pristine.glob("*.webp")):
        if content_split(path.name) == "test":
            rgb = reduced_rgb(read_named(path), longest_px=_LONGEST_PX)
            yield Content(path.stem, list(pan(rgb, num_frames=_CLIP_FRAMES)))
    for path in sorted(clips.glob("*.mp4")):
        yield Content(path.stem, _middle_of(path))


def _middle_of(path: Path) -> list[Rgb]:
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        first = max(0, min(stream.frames // 2, stream.frames - _CLIP_FRAMES))
        frames: list[Rgb] = []
        for i, frame in enumerate(container.decode(stream)):
            if i >= first:
                rgb = reduced_rgb(planes_of(frame), longest_px=_LONGEST_PX)
                frames.append(rgb[: rgb.shape[0] & ~1, : rgb.shape[1] & ~1])
            if len(frames) == _CLIP_FRAMES:
                break
    if len(frames) < _CLIP_FRAMES:
        raise ValueError(f"{path} has {len(frames)} frames, and a ladder needs {_CLIP_FRAMES}")
    return frames


def ladder_scores(scorer: Scorer, content: Content) -> dict[str, list[float]]:
    """Degradation to the mean score at each level, mildest first."""
    chosen = [content.frames[i] for i in _SCORED_FRAMES]
    rng = np.random.default_rng(5)
    grain = [rng.standard_normal(f.shape, np.float32) for f in chosen]

    def mean_score(pictures: Sequence[Planes]) -> float:
        return float(np.mean([p.score for p in scorer.predict(pictures)]))

    def blurred(rgb: Rgb, sigma: float) -> Rgb:
        return rgb if sigma == 0 else np.asarray(cv2.GaussianBlur(rgb, (0, 0), sigma), np.uint8)

    def noisy(rgb: Rgb, noise: NDArray[np.float32], sigma: float) -> Rgb:
        return np.clip(np.rint(rgb + noise * np.float32(sigma)), 0, 255).astype(np.uint8)

    return {
        "h264": [mean_score(_coded(content.frames, "libx264", crf)) for crf in CRF_LADDER],
        "blur": [
            mean_score([as_planes_420(blurred(f, sigma)) for f in chosen])
            for sigma in BLUR_LADDER_PX
        ],
        "noise": [
            mean_score([as_planes_420(noisy(f, g, s)) for f, g in zip(chosen, grain, strict=True)])
            for s in NOISE_LADDER
        ],
    }


def _coded(frames: list[Rgb], codec: str, crf: int) -> list[Planes]:
    """With libx264's macroblock tree: the released figures were measured with it.

    Their streams are therefore not the same bytes from run to run at every size (see
    :data:`distill.data.codecs.X264_PARAMS`); training's are.
    """
    coded = encode(frames, codec, crf, macroblock_tree=True)
    with av.open(io.BytesIO(coded)) as container:
        decoded = [planes_of(frame) for frame in container.decode(video=0)]
    return [decoded[i] for i in _SCORED_FRAMES]


def evaluate_ladders(scorer: Scorer, pristine: Path, clips: Path) -> dict[str, Any]:
    """Share of neighbouring steps that fall (tolerance 0.5 point), by degradation and content."""
    contents: dict[str, dict[str, list[float]]] = {}
    for number, content in enumerate(held_out_contents(pristine, clips), 1):
        show_progress(f"{number} contents")
        contents[content.name] = ladder_scores(scorer, content)
    show_progress(None)
    if not contents:
        raise FileNotFoundError(
            f"no held-out content: neither clic_*.webp in {pristine} nor *.mp4 in {clips}"
        )
    by_ladder = {}
    for name in next(iter(contents.values())):
        steps = np.diff([scores[name] for scores in contents.values()], axis=1)
        falls = steps <= TOLERANCE_POINTS
        by_ladder[name] = {
            "num_contents": len(contents),
            "num_steps": int(falls.size),
            "share_falling": round(float(falls.mean()), 4),
            "mean_drop_points": round(float(-steps.sum(1).mean()), 2),
        }
    levels = {"h264": CRF_LADDER, "blur": BLUR_LADDER_PX, "noise": NOISE_LADDER}
    rounded = {
        content: {name: [round(s, 2) for s in scores] for name, scores in ladders.items()}
        for content, ladders in contents.items()
    }
    return {
        "tolerance_points": TOLERANCE_POINTS,
        "levels": levels,
        "ladders": by_ladder,
        "scores": rounded,
    }


def score_rated(
    scorers: dict[str, Scorer], root: Path, *, split: str, num_validation: int, seed: int
) -> tuple[dict[str, NDArray[np.float64]], NDArray[np.float64]]:
    """Scores (N,) of each model and MOS (N,) on 0..100 of one split of BIQ2021."""
    rated = [
        r for r in load_biq2021(root, num_validation=num_validation, seed=seed) if r.split == split
    ]
    if not rated:
        raise ValueError(f"no picture of BIQ2021 is in split {split!r}: train, validation or test")
    scores: dict[str, list[float]] = {name: [] for name in scorers}
    for first in range(0, len(rated), _BATCH):
        pictures = [read_named(r.path) for r in rated[first : first + _BATCH]]
        for name, scorer in scorers.items():
            scores[name] += [p.score for p in scorer.predict(pictures)]
    mos = np.array([100 * r.mos for r in rated])
    return {name: np.array(values) for name, values in scores.items()}, mos


def agreement(scores: NDArray[np.float64], mos: NDArray[np.float64]) -> dict[str, Any]:
    """SRCC (with its 95 % bootstrap interval), PLCC, KRCC and RMSE in points."""
    rng = np.random.default_rng(0)
    draws = rng.integers(len(mos), size=(_NUM_RESAMPLES, len(mos)))
    found = [srcc(scores[d], mos[d]) for d in draws]
    low, high = np.nanpercentile(found, [2.5, 97.5])  # a draw of one value alone has no SRCC
    return {
        "num_pictures": len(mos),
        "srcc": round(srcc(scores, mos), 4),
        "srcc_interval_95": [round(float(low), 4), round(float(high), 4)],
        "plcc": round(plcc(scores, mos), 4),
        "krcc": round(krcc(scores, mos), 4),
        "rmse_points": round(rmse(scores, mos), 2),
    }


def difference(scores: NDArray[np.float64], reference: NDArray[np.float64]) -> dict[str, float]:
    """How far scores lie from a reference's, in points."""
    gap = np.abs(scores - reference)
    return {
        "mean_points": round(float(gap.mean()), 3),
        "p99_points": round(float(np.percentile(gap, 99)), 3),
        "max_points": round(float(gap.max()), 3),
        "srcc": round(srcc(scores, reference), 5),
    }


def machine() -> dict[str, Any]:
    """The computer that figures come from."""
    about = Path("/proc/cpuinfo")
    lines = about.read_text().splitlines() if about.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "processor": names[0] if names else platform.processor() or platform.machine(),
        "num_cores": os.cpu_count(),
        "system": platform.system(),
    }


def provenance(command: str) -> dict[str, Any]:
    """What a result file says about how it was made."""
    packages = ("dgiqa-stream", "onnxruntime", "av", "numpy", "opencv-python-headless")
    found: dict[str, str] = {}
    for package in packages:
        try:
            found[package] = version(package)
        except ImportError:
            found[package] = "not installed"
    return {
        "command": command,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "packages": found,
    }
