"""One-pixel shifts and one-percent rescales: nobody sees them, and the score should not either."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from dgiqa_stream.scorer import Scorer, planes_of_rgb
from distill.data.codecs import Rgb
from distill.data.degradations import degradation, ladder_rng
from distill.evaluation.agreement import Estimate, estimate
from distill.evaluation.logistic import Array
from distill.evaluation.unseen import read_unseen, scores_of

DIRECTIONS = tuple((y, x) for y in (-1, 0, 1) for x in (-1, 0, 1) if (y, x) != (0, 0))
FACTORS = (0.99, 1.01)
MILD = (("gaussian_blur", 2), ("gaussian_noise", 1), ("mjpeg", 2), ("h264", 2))
"""Degradations and their levels that the clean pictures are also judged with."""
PERCENTILE = 95


@dataclass(frozen=True, slots=True)
class Changes:
    """How far scores move, without sign."""

    num_contents: int
    num_changes: int
    mean_points: Estimate
    p95_points: Estimate
    largest_points: float


@dataclass(frozen=True, slots=True)
class SmallMoves:
    """Shifts by one pixel in eight directions, and enlarging or reducing by one percent."""

    shifts: Changes
    rescales: Changes
    shifts_by_picture: Mapping[str, Changes]
    """Of clean pictures, and of each mild degradation."""
    rescales_by_picture: Mapping[str, Changes]


def judge_small_moves(
    scorer: Scorer,
    paths: Sequence[Path],
    *,
    on_content: Callable[[str], None] = lambda name: None,
) -> SmallMoves:
    """Clean and mildly degraded pictures, each against its shifted and rescaled versions.

    All are one pixel smaller on each side than the picture: a shift takes another window of it, so
    that the size stays.
    """
    shifts: dict[str, list[list[float]]] = {}
    rescales: dict[str, list[list[float]]] = {}
    for path in paths:
        picture = read_unseen(path)
        on_content(picture.name)
        for kind, rgb in _versions(picture.rgb, picture.name).items():
            still, *moved = scores_of(
                scorer, [planes_of_rgb(p) for p in (shifted(rgb, (0, 0)), *_moved(rgb))]
            )
            changes = [abs(score - still) for score in moved]
            shifts.setdefault(kind, []).append(changes[: len(DIRECTIONS)])
            rescales.setdefault(kind, []).append(changes[len(DIRECTIONS) :])
    return SmallMoves(
        shifts=_changes(np.concatenate(list(shifts.values()), axis=1)),
        rescales=_changes(np.concatenate(list(rescales.values()), axis=1)),
        shifts_by_picture={kind: _changes(np.array(found)) for kind, found in shifts.items()},
        rescales_by_picture={kind: _changes(np.array(found)) for kind, found in rescales.items()},
    )


def _versions(rgb: Rgb, name: str) -> dict[str, Rgb]:
    made = {
        f"{kind} {level}": degradation(kind).apply(rgb, level, ladder_rng(0, name, kind))
        for kind, level in MILD
    }
    return {"clean": rgb, **made}


def _moved(rgb: Rgb) -> list[Rgb]:
    inner = shifted(rgb, (0, 0))
    return [
        *(shifted(rgb, direction) for direction in DIRECTIONS),
        *(rescaled(inner, factor) for factor in FACTORS),
    ]


def shifted(rgb: Rgb, direction: tuple[int, int]) -> Rgb:
    """The window one pixel inside the picture, moved by (down, right) of -1, 0 or 1."""
    down, right = direction
    height, width = rgb.shape[:2]
    return np.ascontiguousarray(rgb[1 + down : height - 1 + down, 1 + right : width - 1 + right])


def rescaled(rgb: Rgb, factor: float) -> Rgb:
    """The picture at a factor of its size, bicubic."""
    height, width = rgb.shape[:2]
    size = (round(width * factor), round(height * factor))
    return np.asarray(cv2.resize(rgb, size, interpolation=cv2.INTER_CUBIC), np.uint8)


def _changes(by_content: Array) -> Changes:
    """Of changes (contents, changes of each); intervals draw contents."""
    return Changes(
        num_contents=len(by_content),
        num_changes=by_content.size,
        mean_points=estimate(np.mean, by_content),
        p95_points=estimate(lambda drawn: float(np.percentile(drawn, PERCENTILE)), by_content),
        largest_points=float(by_content.max()),
    )
