"""Any model as one function: paths of pictures to scores on 0..100.

The served model goes through the runtime's own scorer; a checkpoint through the same views; a
teacher through a fixed set of crops, because random ones would make its scores a lottery.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dgiqa_stream.preprocess import ViewSpec, make_batch, reduced_rgb
from dgiqa_stream.scorer import load_scorer
from distill.data.build import read_picture
from distill.models.student import IMAGENET_MEAN, IMAGENET_STD, load_student

Predictor = Callable[[Sequence[Path]], NDArray[np.float64]]
"""Paths of N pictures to scores (N,) on 0..100, 100 best."""
DepthOf = Callable[[NDArray[np.uint8]], NDArray[np.float32]]
"""A picture, uint8 (H, W, 3), to its depth (H, W) on any scale."""
_BATCH = 8
_LONGEST_PX = 16384


@contextmanager
def onnx_predictor(model: str | Path, *, num_threads: int = 1) -> Iterator[Predictor]:
    """A shipped model's name, or an ``.onnx`` with its manifest beside it."""
    with load_scorer(model, num_threads=num_threads) as scorer:

        def predict(paths: Sequence[Path]) -> NDArray[np.float64]:
            found: list[float] = []
            for part in _batches(paths):
                found += [p.score for p in scorer.predict([read_picture(path) for path in part])]
            return np.array(found)

        yield predict


def student_predictor(checkpoint: Path, views: Sequence[ViewSpec]) -> Predictor:
    """A student's weights, as training wrote them; ``views`` are its recipe's.

    Raises :class:`ModelError` where the file holds something else.
    """
    student = load_student(checkpoint).eval()

    def predict(paths: Sequence[Path]) -> NDArray[np.float64]:
        found: list[float] = []
        for part in _batches(paths):
            cut = make_batch([read_picture(path) for path in part], views).views
            with torch.no_grad():
                quality = student(*(torch.from_numpy(cut[view.name]) for view in views))
            found += (100 * quality.double()).tolist()
        return np.array(found)

    return predict


def teacher_predictor(
    teacher: nn.Module, *, depth_of: DepthOf | None = None, crop_px: int = 224, short_px: int = 384
) -> Predictor:
    """A teacher over five fixed crops (corners and centre) of the picture at ``short_px``.

    ``teacher(picture, depth)`` takes ImageNet-normalised (B, 3, crop_px, crop_px) and the depth's
    crops three times over, or None without ``depth_of``, and gives (B,) on 0..1. Depth is computed
    of the whole picture and brought to 0..1 by its own range.
    """
    teacher.eval()

    def predict(paths: Sequence[Path]) -> NDArray[np.float64]:
        return np.array([100 * _of_crops(teacher, path) for path in paths])

    def _of_crops(teacher: nn.Module, path: Path) -> float:
        rgb = _with_short_side(reduced_rgb(read_picture(path), longest_px=_LONGEST_PX), short_px)
        depth = None if depth_of is None else _as_picture(depth_of(rgb))
        with torch.no_grad():
            crops = _five_crops(rgb, crop_px)
            scores: Tensor = teacher(crops, None if depth is None else _five_crops(depth, crop_px))
        return float(scores.mean())

    return predict


def _batches(paths: Sequence[Path]) -> Iterator[Sequence[Path]]:
    for first in range(0, len(paths), _BATCH):
        yield paths[first : first + _BATCH]


def _with_short_side(rgb: NDArray[np.uint8], short_px: int) -> NDArray[np.uint8]:
    height, width = rgb.shape[:2]
    scale = short_px / min(height, width)
    size = max(short_px, round(width * scale)), max(short_px, round(height * scale))
    how = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    return np.asarray(cv2.resize(rgb, size, interpolation=how), np.uint8)


def _as_picture(depth: NDArray[np.float32]) -> NDArray[np.uint8]:
    span = float(np.ptp(depth)) or 1.0
    grey = np.rint(255 * (depth - depth.min()) / span).astype(np.uint8)
    return np.repeat(grey[:, :, None], 3, axis=2)


def _five_crops(rgb: NDArray[np.uint8], side: int) -> Tensor:
    """uint8 (H, W, 3) to normalised (5, 3, side, side); raises ``ValueError`` if it is smaller."""
    height, width = rgb.shape[:2]
    if min(height, width) < side:
        raise ValueError(f"a picture of {width}x{height} holds no crop of {side} px")
    down, right = height - side, width - side
    at = [(0, 0), (0, right), (down, 0), (down, right), (down // 2, right // 2)]
    crops = np.stack([rgb[y : y + side, x : x + side] for y, x in at])  # (5, side, side, 3)
    x = torch.from_numpy(crops).permute(0, 3, 1, 2).float() / 255  # (5, 3, side, side)
    mean, std = (torch.tensor(c)[:, None, None] for c in (IMAGENET_MEAN, IMAGENET_STD))
    return (x - mean) / std
