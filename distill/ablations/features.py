"""What a frozen MobileNetV2 sees of rated pictures and of their depth, computed once and kept.

Every map is averaged to 7x7, the size that a teacher's bridges bring it to in the end. So a bridge
learns from means where the network itself would read the middle of each cell: heads and fusions
are compared on equal terms, and no figure here is that of the network as published.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from distill.ablations.settings import Settings
from distill.data.depth import ClassicalDepth, three_channels
from distill.data.loader import read_ahead
from distill.models.backbones import MobileNetPyramid
from distill.models.teacher import CROP_PX
from distill.models.trunks import CHANNELS, Trunk, load_imagenet_
from distill.say import say, show_progress
from distill.teacher_score import with_smallest_side
from distill.teachers.pictures import PackPictures, crop

STAGES = MobileNetPyramid.STAGE_ENDS
"""Bottlenecks that a teacher reads, at strides 4, 8, 16 and 32."""
LATE = (13, 14, 15)
"""Bottlenecks of stride 32 before the last: with it, four consecutive blocks on one grid."""
SIDE = 7
_BATCH = 32


@dataclass(frozen=True, slots=True, eq=False)
class Seen:
    """One part of the pictures, K crops each."""

    stages: Tensor
    """float16 (N, K, 504, 7, 7): the four stages side by side."""
    late: Tensor
    """float16 (N, K, 480, 7, 7): bottlenecks 13 to 15."""
    depth: Tensor
    """float16 (N, K, 504, 7, 7): the four stages of the depth maps."""
    mos: Tensor
    """(N,), 0..1."""

    def pooled(self) -> Tensor:
        """float32 (N, K, 504): means over space."""
        return self.stages.float().mean((3, 4))

    def semantics(self) -> Tensor:
        """float32 (N, K, 320): the last stage's means."""
        return self.pooled()[..., -CHANNELS[STAGES[-1]] :]


class FrozenTaps(nn.Module):
    """MobileNetV2, BatchNorm folded, to its stages and late bottlenecks on 7x7.

    In bfloat16 it is twice as fast; float32 is for checks.
    """

    def __init__(self, weights: Path, *, precision: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        self.precision = precision
        trunk = Trunk()
        load_imagenet_(trunk, weights)
        self.pyramid = MobileNetPyramid()
        self.pyramid.stem, self.pyramid.blocks = trunk.stem, trunk.blocks
        self._maps: dict[int, Tensor] = {}
        for number in (*STAGES, *LATE):
            self.pyramid.blocks[number].register_forward_hook(self._keeping(number))
        self.eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def _keeping(self, number: int):  # type: ignore[no-untyped-def]
        def keep(module: nn.Module, inputs: object, output: Tensor) -> None:
            self._maps[number] = F.adaptive_avg_pool2d(output.float(), SIDE).half()

        return keep

    @torch.no_grad()
    def forward(self, crops: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised (B, 3, 224, 224) to float16 (B, 504, 7, 7) and (B, 480, 7, 7)."""
        with torch.autocast("cpu", torch.bfloat16, enabled=self.precision == torch.bfloat16):
            self.pyramid(crops.to(memory_format=torch.channels_last))
        stages, late = ([self._maps[j] for j in numbers] for numbers in (STAGES, LATE))
        return torch.cat(stages, 1), torch.cat(late, 1)


def features(settings: Settings) -> tuple[Seen, Seen]:
    """Training and validation pictures as the network sees them, from the cache where it is there.

    Raises ``ValueError`` where the pack has fewer pictures than the settings ask for.
    """
    pictures = PackPictures(settings.pack)
    chosen = choose([p.split for p in pictures.pictures], settings)
    key = hashlib.sha256(repr((chosen, settings.num_crops, settings.seed)).encode()).hexdigest()
    kept = settings.cache / f"mobilenetv2-{key[:12]}.pt"
    if kept.is_file():
        made = torch.load(kept, weights_only=True, mmap=True)
    else:
        made = _compute(pictures, chosen, settings)
        settings.cache.mkdir(parents=True, exist_ok=True)
        beside = kept.with_suffix(".part")
        torch.save(made, beside)
        beside.replace(kept)
    mos = torch.tensor([pictures.pictures[i].quality for i in chosen])
    parts = slice(0, settings.num_train), slice(settings.num_train, None)
    train, validation = (
        Seen(made["stages"][p], made["late"][p], made["depth"][p], mos[p]) for p in parts
    )
    return train, validation


def choose(splits: list[str], settings: Settings) -> list[int]:
    """Pictures drawn by the seed: those for training, then those of validation."""
    chosen: list[int] = []
    for split, number in (("train", settings.num_train), ("validation", settings.num_validation)):
        there = np.flatnonzero(np.array(splits) == split)
        if len(there) < number:
            raise ValueError(
                f"{settings.pack} has {len(there)} pictures for {split}, not {number}: ask for less"
            )
        chosen += np.random.default_rng(settings.seed).permutation(there)[:number].tolist()
    return chosen


def _compute(pictures: PackPictures, chosen: list[int], settings: Settings) -> dict[str, Tensor]:
    say(f"{len(chosen)} pictures, {settings.num_crops} crops each: the backbone sees them once")
    net, depth = FrozenTaps(settings.backbone), ClassicalDepth()
    per_batch = max(1, _BATCH // settings.num_crops)

    def batch(number: int) -> tuple[Tensor, Tensor]:
        part = chosen[number * per_batch : (number + 1) * per_batch]
        cuts = [c for i in part for c in _cuts(pictures, i, depth, settings)]
        return torch.stack([c[0] for c in cuts]), torch.stack([c[1] for c in cuts])

    found: dict[str, list[Tensor]] = {"stages": [], "late": [], "depth": []}
    num_batches = -(-len(chosen) // per_batch)
    for number, (seen, near) in enumerate(read_ahead(batch, 0, num_batches), 1):
        stages, late = net(seen)
        of_depth, _ = net(near)
        for name, maps in (("stages", stages), ("late", late), ("depth", of_depth)):
            found[name].append(maps.unflatten(0, (-1, settings.num_crops)))
        if number % 20 == 0:
            show_progress(f"{number}/{num_batches} batches")
    show_progress(None)
    return {name: torch.cat(maps) for name, maps in found.items()}


def _cuts(
    pictures: PackPictures, index: int, depth: ClassicalDepth, settings: Settings
) -> list[tuple[Tensor, Tensor]]:
    """Random crops of a picture and the same of its depth map."""
    rgb = pictures.rgb(index)
    seen = with_smallest_side(rgb)
    near = with_smallest_side(three_channels(depth(rgb)))
    rng = np.random.default_rng([settings.seed, index])
    limits = np.array(seen.shape[:2]) - CROP_PX + 1
    places: list[NDArray[np.int64]] = [rng.integers(limits) for _ in range(settings.num_crops)]
    return [(crop(seen, *map(int, p)), crop(near, *map(int, p))) for p in places]


def depth_of_nothing(settings: Settings) -> Tensor:
    """float16 (504, 7, 7): what the network sees of a depth map that is 0 everywhere."""
    nothing = crop(np.zeros((CROP_PX, CROP_PX, 3), np.uint8), 0, 0)
    stages, _ = FrozenTaps(settings.backbone)(nothing[None])
    return stages[0]
