"""What a teacher's two frozen pyramids see of rated pictures and their depth, computed once.

One crop of 224 pixels of each picture: a random one of those that train, mirrored or not, the
middle one of those that judge. Depth is the classical stand-in. Maps are kept whole, so that what
learns from them is the teacher itself.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from distill.data.depth import ClassicalDepth, three_channels
from distill.models.backbones import MobileNetPyramid, load_mobilenetv2_
from distill.models.teacher import CROP_PX
from distill.say import say
from distill.teacher_score import with_smallest_side
from distill.teachers.pictures import PackPictures, crop

_BATCH = 16
_SAY_EVERY = 20


class Maps(NamedTuple):
    """Of N pictures; rows are the four maps one after the other, as :class:`Kept` takes them."""

    picture: NDArray[np.float16]
    """(N, D)."""
    depth: NDArray[np.float16]
    """(N, D)."""
    mos: NDArray[np.float64]
    """(N,), 0..1."""

    def rows(self, chosen: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """The arguments of a teacher on :class:`Kept` pyramids, float32 (B, D) each."""
        picture, depth = (torch.from_numpy(part[chosen]).float() for part in self[:2])
        return picture, depth


class Kept(nn.Module):
    """Stands where a pyramid was: takes rows (B, D), gives its four maps."""

    def __init__(self, channels: tuple[int, ...]) -> None:
        super().__init__()
        self.shapes = [(c, *2 * (CROP_PX // 4 // 2**j,)) for j, c in enumerate(channels)]

    def forward(self, rows: Tensor) -> list[Tensor]:
        """To (B, C_j, H_j, W_j), strides 4, 8, 16 and 32."""
        parts = rows.split([int(np.prod(s)) for s in self.shapes], 1)
        return [p.reshape(-1, *s) for p, s in zip(parts, self.shapes, strict=True)]


def teacher_maps(
    pack: Path, weights: Path, cache: Path, *, num_train: int, num_validation: int, seed: int = 1
) -> tuple[Maps, Maps]:
    """Maps of a seeded draw of training and of validation pictures; the cache keeps them.

    Raises ``ValueError`` where the pack has too few.
    """
    pictures = PackPictures(pack)
    parts = []
    for split, number in (("train", num_train), ("validation", num_validation)):
        there = np.flatnonzero([p.split == split for p in pictures.pictures])
        if len(there) < number:
            raise ValueError(f"{pack} has {len(there)} pictures for {split}, not {number}")
        chosen = np.random.default_rng(seed).permutation(there)[:number]
        mos = np.array([pictures.pictures[i].quality for i in chosen])
        key = hashlib.sha256(repr((split, chosen.tolist(), seed)).encode()).hexdigest()[:12]
        kept = cache / f"maps-{split}-{key}.npy"
        if not kept.is_file():
            _compute(pictures, chosen, weights, kept, seed=seed if split == "train" else None)
        rows = np.load(kept, mmap_mode="r")
        parts.append(Maps(rows[0], rows[1], mos))
    return parts[0], parts[1]


@torch.no_grad()
def _compute(
    pictures: PackPictures,
    chosen: NDArray[np.int64],
    weights: Path,
    path: Path,
    *,
    seed: int | None,
) -> None:
    """Write (2, N, D); ``seed`` draws the crops, which are the middle ones without."""
    net, depth = MobileNetPyramid().eval(), ClassicalDepth()
    load_mobilenetv2_(net, weights)
    net = net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    width = sum(c * (CROP_PX // 4 // 2**j) ** 2 for j, c in enumerate(net.channels))
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    rows = np.lib.format.open_memmap(part, "w+", np.float16, (2, len(chosen), width))
    for begin in range(0, len(chosen), _BATCH):
        cuts = [_cut(pictures, int(i), depth, seed) for i in chosen[begin : begin + _BATCH]]
        for stream in (0, 1):
            crops = torch.stack([c[stream] for c in cuts]).to(memory_format=torch.channels_last)
            with torch.autocast("cpu", torch.bfloat16):
                maps = net(crops)
            seen = torch.cat([m.float().contiguous().flatten(1) for m in maps], 1)
            rows[stream, begin : begin + len(cuts)] = seen.half().numpy()
        if begin // _BATCH % _SAY_EVERY == 0:
            say(f"{path.stem}: {begin} of {len(chosen)} pictures seen")
    rows.flush()
    part.replace(path)


def _cut(
    pictures: PackPictures, index: int, depth: ClassicalDepth, seed: int | None
) -> tuple[Tensor, Tensor]:
    """One crop of a picture, and the same of its depth map, normalised (3, 224, 224) each."""
    rgb = pictures.rgb(index)
    seen = with_smallest_side(rgb)
    near = with_smallest_side(three_channels(depth(rgb)))
    room = np.array(seen.shape[:2]) - CROP_PX
    if seed is None:
        top, left = (int(x) for x in room // 2)
        return crop(seen, top, left), crop(near, top, left)
    rng = np.random.default_rng([seed, index])
    top, left = (int(x) for x in rng.integers(room + 1))
    mirrored = bool(rng.integers(2))
    return crop(seen, top, left, mirrored=mirrored), crop(near, top, left, mirrored=mirrored)
