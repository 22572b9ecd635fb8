"""Any model as one function: paths of pictures to scores on 0..100.

The served model goes through the runtime's own scorer; a checkpoint through the same views; a
teacher through the fixed crops of :mod:`distill.teacher_score`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from dgiqa_stream.preprocess import ViewSpec, make_batch, reduced_rgb
from dgiqa_stream.scorer import Scorer
from distill.data.build import read_named
from distill.models.student import load_student
from distill.teacher_score import CropProtocol, GridProtocol, TeacherScorer, score_picture

Predictor = Callable[[Sequence[Path]], NDArray[np.float64]]
"""Paths of N pictures to scores (N,) on 0..100, 100 best."""
_BATCH = 8


def scorer_predictor(scorer: Scorer) -> Predictor:
    """An opened scorer of the runtime: an ONNX model as it is served, or a teacher with depth."""

    def score_of(path: Path, teacher: TeacherScorer) -> float:
        with teacher.reading(str(path)):  # depth from files is found by the picture's path
            return teacher.predict([read_named(path)])[0].score

    def predict(paths: Sequence[Path]) -> NDArray[np.float64]:
        if isinstance(scorer, TeacherScorer):
            return np.array([score_of(path, scorer) for path in paths])
        found: list[float] = []
        for part in _batches(paths):
            found += [p.score for p in scorer.predict([read_named(path) for path in part])]
        return np.array(found)

    return predict


def student_predictor(checkpoint: Path, views: Sequence[ViewSpec]) -> Predictor:
    """A student's weights, as training wrote them; ``views`` are its recipe's.

    Raises :class:`ModelError` where the file holds something else.
    """
    student = load_student(checkpoint).eval()

    def predict(paths: Sequence[Path]) -> NDArray[np.float64]:
        found: list[float] = []
        for part in _batches(paths):
            cut = make_batch([read_named(path) for path in part], views).views
            with torch.no_grad():
                quality = student(*(torch.from_numpy(cut[view.name]) for view in views))
            found += (100 * quality.double()).tolist()
        return np.array(found)

    return predict


def depth_free_predictor(teacher: nn.Module, *, protocol: CropProtocol | None = None) -> Predictor:
    """A teacher that reads no depth, such as :class:`~distill.models.glint.GlintIQA`.

    ``teacher(picture, depth)`` takes ImageNet-normalised crops (B, 3, 224, 224) twice, the second
    of a map that is 0 everywhere, and gives (B,) on 0..1. Crops are on a 3x3 grid without a
    ``protocol``: random ones would make its scores a lottery.
    """
    model: Any = teacher.eval()
    crops = protocol or GridProtocol()

    def predict(paths: Sequence[Path]) -> NDArray[np.float64]:
        found = []
        for path in paths:
            planes = read_named(path)
            rgb = reduced_rgb(planes, longest_px=max(planes.size))
            flat = np.zeros(rgb.shape[:2], np.uint8)
            found.append(score_picture(model, rgb, flat, protocol=crops).score)
        return np.array(found)

    return predict


def _batches(paths: Sequence[Path]) -> Iterator[Sequence[Path]]:
    for first in range(0, len(paths), _BATCH):
        yield paths[first : first + _BATCH]
