"""Batches of training views, cut by the serving preprocess, decided by (seed, step) alone."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from dgiqa_stream.preprocess import ViewSpec, cut_view
from dgiqa_stream.types import Crop, Planes
from distill.data.packed import Pack, Record

Views = dict[str, NDArray[np.uint8]]
Batch = TypeVar("Batch")


@dataclass(frozen=True, slots=True, eq=False)
class RatedBatch:
    """Views (N, H, W, 3) and MOS (N,) on 0..1."""

    views: Views
    mos: NDArray[np.float32]


@dataclass(frozen=True, slots=True, eq=False)
class LadderBatch:
    """Views (G * L, H, W, 3) and levels (G, L): G contents, L levels of one degradation each."""

    views: Views
    levels: NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Look:
    """How one training picture is looked at; a ladder's levels share one."""

    crop_share: tuple[float, float, float, float]
    mirrored: bool
    jitter: NDArray[np.float64]


def random_look(rng: np.random.Generator, smallest_crop: float, view: ViewSpec) -> Look:
    """A random crop, mirroring and place of each fragment."""
    tall, wide = rng.uniform(smallest_crop, 1.0, 2)
    top, left = rng.uniform(0, 1 - tall), rng.uniform(0, 1 - wide)
    jitter = rng.uniform(0, 1, (view.rows, view.columns, 2))
    return Look((top, left, tall, wide), bool(rng.integers(2)), jitter)


def views_of(planes: Planes, views: Sequence[ViewSpec], look: Look | None) -> Views:
    """Every view of one picture, as served (``look=None``) or as a training look sees it."""
    if look is None:
        return {view.name: cut_view(planes, view) for view in views}
    height, width = planes.size
    top, left, tall, wide = look.crop_share
    crop = Crop(
        int(left * width), int(top * height), max(8, int(wide * width)), max(8, int(tall * height))
    )
    cut = {
        view.name: cut_view(
            planes, view, crop=crop, jitter=look.jitter if view.kind == "fragments" else None
        )
        for view in views
    }
    if look.mirrored:
        cut = {name: np.ascontiguousarray(v[:, ::-1]) for name, v in cut.items()}
    return cut


def stack(cuts: Sequence[Views]) -> Views:
    """Views of single pictures to one batch."""
    return {name: np.stack([cut[name] for cut in cuts]) for name in cuts[0]}


class RatedLoader:
    """Batches over the rated pictures; an epoch is one seeded permutation."""

    def __init__(
        self, pack: Pack, views: Sequence[ViewSpec], *, batch: int, seed: int, smallest_crop: float
    ) -> None:
        self.pack, self.views, self.batch, self.seed = pack, views, batch, seed
        self.smallest_crop = smallest_crop
        self.records = [r for r in pack.records if r.split == "train"]
        if not self.records:
            raise ValueError(f"{pack.folder} holds no training pictures")
        self._fragments = next(v for v in views if v.kind == "fragments")

    def steps_per_epoch(self) -> int:
        """Whole batches in one epoch."""
        return max(1, len(self.records) // self.batch)

    def __call__(self, step: int) -> RatedBatch:
        """The batch of a global step, from 0."""
        epoch, within = divmod(step, self.steps_per_epoch())
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self.records))
        rng = np.random.default_rng([self.seed, 7, step])
        chosen = [self.records[i] for i in order[within * self.batch : (within + 1) * self.batch]]
        cuts = [
            views_of(
                self.pack.planes(r),
                self.views,
                random_look(rng, self.smallest_crop, self._fragments),
            )
            for r in chosen
        ]
        return RatedBatch(stack(cuts), np.array([r.mos for r in chosen], np.float32))


class LadderLoader:
    """Groups of one content at several levels of one degradation."""

    def __init__(
        self,
        pack: Pack,
        views: Sequence[ViewSpec],
        *,
        groups: int,
        levels: int,
        seed: int,
        smallest_crop: float,
        split: str = "train",
    ) -> None:
        self.pack, self.views, self.groups, self.levels = pack, views, groups, levels
        self.seed, self.smallest_crop = seed, smallest_crop
        self._fragments = next(v for v in views if v.kind == "fragments")
        self.ladders = ladders_of(pack.records, split)
        lengths = [len(ladder) for by_name in self.ladders.values() for ladder in by_name.values()]
        if min(lengths, default=0) < levels:
            raise ValueError(
                f"{pack.folder}: the shortest ladder of {split} has {min(lengths, default=0)} "
                f"pictures, and the recipe's ladder_levels asks for {levels}"
            )

    def __call__(self, step: int) -> LadderBatch:
        """The batch of a global step, from 0."""
        rng = np.random.default_rng([self.seed, 11, step])
        contents = sorted(self.ladders)
        cuts: list[Views] = []
        levels: list[list[int]] = []
        for content in rng.choice(contents, self.groups, replace=len(contents) < self.groups):
            by_name = self.ladders[str(content)]
            ladder = by_name[sorted(by_name)[int(rng.integers(len(by_name)))]]
            chosen = sorted(rng.choice(len(ladder), self.levels, replace=False))
            look = random_look(rng, self.smallest_crop, self._fragments)
            cuts += [views_of(self.pack.planes(ladder[i]), self.views, look) for i in chosen]
            levels.append([ladder[i].level for i in chosen])
        return LadderBatch(stack(cuts), np.array(levels, np.int64))


def ladders_of(records: Sequence[Record], split: str) -> dict[str, dict[str, list[Record]]]:
    """Content, then degradation, to its pictures by rising level, clean first.

    The clean picture heads every picture ladder; a codec ladder has its own (a frame of the pan).
    """
    clean: dict[str, Record] = {}
    found: dict[str, dict[str, list[Record]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        if record.split != split:
            continue
        if record.degradation == "clean":
            clean[record.content] = record
        else:
            found[record.content][record.degradation].append(record)
    for content, by_name in found.items():
        for ladder in by_name.values():
            ladder.sort(key=lambda r: r.level)
            if ladder[0].level > 0:
                ladder.insert(0, clean[content])
    return {content: dict(by_name) for content, by_name in found.items()}


def read_ahead(
    make: Callable[[int], Batch], first: int, end: int, *, depth: int = 3
) -> Iterator[Batch]:
    """``make(first) ... make(end - 1)``, prepared by one thread while the caller computes."""
    with ThreadPoolExecutor(1) as pool:
        waiting = [pool.submit(make, s) for s in range(first, min(first + depth, end))]
        for step in range(first, end):
            batch = waiting.pop(0).result()
            if step + depth < end:
                waiting.append(pool.submit(make, step + depth))
            yield batch
