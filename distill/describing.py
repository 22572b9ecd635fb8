"""All that a teacher can teach of a picture: what it says of crops, brought over the whole."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distill.data.labels import overlap
from distill.distilling import attention_target, cross_attention_weights
from distill.models.teacher import CROP_PX, Dgiqa, TeacherOutput
from distill.models.teacher_file import Teacher


@dataclass(frozen=True, slots=True, eq=False)
class CropOutput:
    """What a teacher says of K crops, on the CPU."""

    scores: NDArray[np.float32]
    """(K,), 0..1."""
    fused: NDArray[np.float32]
    """(K, C, S, S)."""
    pooled: NDArray[np.float32]
    """(K, D)."""
    attention: NDArray[np.float32]
    """(K, S, S), sum 1; NaN of a teacher that does not ask by depth."""

    def divided(self, counts: Sequence[int]) -> list[CropOutput]:
        """The crops of several pictures, each picture's on its own."""
        ends = np.cumsum(counts)[:-1]
        arrays = (self.scores, self.fused, self.pooled, self.attention)
        return [
            CropOutput(*parts) for parts in zip(*(np.split(a, ends) for a in arrays), strict=True)
        ]


def describe_crops(model: Teacher, crops: Tensor, depth: Tensor, *, at_once: int) -> CropOutput:
    """All that a student can learn from, of crops (K, 3, 224, 224) and their depth."""
    device = next(model.parameters()).device
    made = [
        _describe(model, crops[i : i + at_once].to(device), depth[i : i + at_once].to(device))
        for i in range(0, len(crops), at_once)
    ]
    return CropOutput(*(np.concatenate(arrays) for arrays in zip(*made, strict=True)))


def _describe(model: Teacher, crops: Tensor, depth: Tensor) -> tuple[NDArray[np.float32], ...]:
    outputs: list[TeacherOutput] = []

    def run() -> None:
        with torch.no_grad():
            outputs.append(model.describe(crops, depth))

    if isinstance(model, Dgiqa):
        attention = model.depth_guided_cross_attention.multihead_attn
        seen = attention_target(cross_attention_weights(attention, run))  # (K, S, S)
    else:
        run()
        seen = outputs[0].fused[:, 0] * torch.nan
    out = outputs[0]
    return tuple(x.float().cpu().numpy() for x in (out.score, out.fused, out.pooled, seen))


def over_picture(
    maps: NDArray[Any], places: Sequence[tuple[int, int]], size: tuple[int, int]
) -> NDArray[np.float32]:
    """Maps (K, ..., S, S) of crops to one (..., S, S) over the whole picture.

    ``places`` are top and left of each crop in a picture of ``size``. Each cell is the mean of what
    the crops see of it, by area; a cell that no crop sees is the mean of all others.
    """
    side, (height, width) = maps.shape[-1], size
    total = np.zeros(maps.shape[1:], np.float32)
    seen = np.zeros((side, side), np.float32)
    for crop, (top, left) in zip(maps, places, strict=True):
        rows = _covered(top / height, (top + CROP_PX) / height, side)
        columns = _covered(left / width, (left + CROP_PX) / width, side)
        total += rows @ crop.astype(np.float32) @ columns.T
        seen += rows.sum(1)[:, None] * columns.sum(1)[None, :]
    is_seen = seen > 0
    made = total / np.where(is_seen, seen, 1)
    rest = made[..., is_seen].mean(-1)
    return np.asarray(np.where(is_seen, made, rest[..., None, None]), np.float32)


def _covered(begin: float, end: float, side: int) -> NDArray[np.float32]:
    """(side, side): how much of each of the picture's cells each of a crop's cells covers."""
    share = overlap(begin, end, side, side)  # (crop's cells, picture's cells), rows sum to 1
    return np.asarray(share.T, np.float32)
