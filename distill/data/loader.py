"""Which pictures a training step takes and how it looks at them, decided by (seed, step) alone.

Views are cut by the serving preprocess.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from dgiqa_stream.preprocess import ViewSpec, cut_view
from dgiqa_stream.types import Crop, Planes
from distill.data.batch import NO_LADDER
from distill.data.packed import Record
from distill.data.shards import ShardRecord

Views = dict[str, NDArray[np.uint8]]
AnyRecord = Record | ShardRecord
Made = TypeVar("Made")


class PictureSet(Protocol):
    """Where training pictures lie: a pack, or shards."""

    folder: Path

    @property
    def records(self) -> Sequence[AnyRecord]:
        """Every picture."""

    def planes(self, record: Any) -> Planes:
        """The samples of one picture; raises :class:`SourceError` where it cannot be read."""


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


@dataclass(frozen=True, slots=True)
class Draw:
    """A picture that a step takes, and how it is looked at."""

    record: AnyRecord
    look: Look
    ladder: int = NO_LADDER
    """Which of the step's ladders it is a level of."""
    is_level: bool = True
    """Whether the record's level says how it compares with the others of that ladder."""


class EpochDraws:
    """Each picture at most once in an epoch, which is one seeded permutation."""

    def __init__(
        self,
        records: Sequence[AnyRecord],
        view: ViewSpec,
        *,
        batch: int,
        seed: int,
        smallest_crop: float,
        order_key: tuple[int, ...] = (),
        look_key: tuple[int, ...] = (7,),
    ) -> None:
        """Draw from ``records``.

        Args:
            view: the one whose fragments are moved at random.
            order_key: of the permutation; parts of one step must differ.
            look_key: of crops and fragments; likewise.
        """
        self.records, self.view, self.batch, self.smallest_crop = (
            records,
            view,
            batch,
            smallest_crop,
        )
        self._order_key, self._look_key = (seed, *order_key), (seed, *look_key)

    def steps_per_epoch(self) -> int:
        """Whole batches in one epoch."""
        return max(1, len(self.records) // self.batch)

    def __call__(self, step: int) -> list[Draw]:
        """What a global step takes, from 0."""
        epoch, within = divmod(step, self.steps_per_epoch())
        order = np.random.default_rng([*self._order_key, epoch]).permutation(len(self.records))
        rng = np.random.default_rng([*self._look_key, step])
        chosen = [self.records[i] for i in order[within * self.batch : (within + 1) * self.batch]]
        return [Draw(r, random_look(rng, self.smallest_crop, self.view)) for r in chosen]


class LadderDraws:
    """Groups of one content at several levels of one degradation; a group shares one look.

    Some groups may be mixed instead: pictures of one content with any damage, chains too.
    """

    def __init__(
        self,
        pictures: PictureSet,
        view: ViewSpec,
        *,
        groups: int,
        levels: int,
        seed: int,
        smallest_crop: float,
        mixed: float = 0.0,
        from_clean: bool = False,
        split: str = "train",
    ) -> None:
        """Draw from the ladders of a split.

        Args:
            mixed: share of groups that are mixed.
            from_clean: whether the first of every group is the clean picture.
        """
        self.view, self.groups, self.levels = view, groups, levels
        self.seed, self.smallest_crop = seed, smallest_crop
        self.mixed, self.from_clean = mixed, from_clean
        self.ladders = ladders_of(pictures.records, split)
        self._all = _mixtures(pictures.records, split) if mixed else {}
        lengths = [len(ladder) for by_name in self.ladders.values() for ladder in by_name.values()]
        if min(lengths, default=0) < levels:
            raise ValueError(
                f"{pictures.folder}: the shortest ladder of {split} has {min(lengths, default=0)} "
                f"pictures, and the recipe's ladder_levels asks for {levels}"
            )

    def __call__(self, step: int) -> list[Draw]:
        """What a global step takes, from 0: group after group, by rising level."""
        rng = np.random.default_rng([self.seed, 11, step])
        contents = sorted(self.ladders)
        drawn: list[Draw] = []
        places = rng.choice(contents, self.groups, replace=len(contents) < self.groups)
        for number, content in enumerate(places):
            is_mixed = bool(self.mixed) and rng.uniform() < self.mixed
            pictures = self._of(str(content), rng, is_mixed=is_mixed)
            look = random_look(rng, self.smallest_crop, self.view)
            drawn += [Draw(record, look, number, not is_mixed) for record in pictures]
        return drawn

    def _of(self, content: str, rng: np.random.Generator, *, is_mixed: bool) -> list[AnyRecord]:
        """The pictures of one group, by rising level where they are of one ladder."""
        by_name = self.ladders[content]
        ladder = by_name[sorted(by_name)[int(rng.integers(len(by_name)))]]
        if is_mixed and len(self._all[content]) >= self.levels:
            ladder = self._all[content]
        if self.from_clean:
            others = rng.choice(len(ladder) - 1, self.levels - 1, replace=False) + 1
            return [ladder[0], *(ladder[i] for i in sorted(others))]
        return [ladder[i] for i in sorted(rng.choice(len(ladder), self.levels, replace=False))]


def _mixtures(records: Sequence[AnyRecord], split: str) -> dict[str, list[AnyRecord]]:
    """Content to all of its pictures, the clean one first."""
    found: dict[str, list[AnyRecord]] = defaultdict(list)
    for record in records:
        if record.split == split:
            found[record.content].append(record)
    return {c: sorted(rs, key=lambda r: r.degradation != "clean") for c, rs in found.items()}


def ladders_of(records: Sequence[AnyRecord], split: str) -> dict[str, dict[str, list[AnyRecord]]]:
    """Content, then degradation, to its pictures by rising level, clean first.

    The clean picture heads every picture ladder; a codec ladder has its own (a frame of the pan).
    Pictures without a level (chains of degradations) are on no ladder.
    """
    clean: dict[str, AnyRecord] = {}
    found: dict[str, dict[str, list[AnyRecord]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        if record.split != split or record.level is None:
            continue
        if record.degradation == "clean":
            clean[record.content] = record
        else:
            found[record.content][record.degradation].append(record)
    for content, by_name in found.items():
        for ladder in by_name.values():
            ladder.sort(key=_level)
            if _level(ladder[0]) > 0 and content in clean:
                ladder.insert(0, clean[content])
    return {content: dict(by_name) for content, by_name in found.items()}


def _level(record: AnyRecord) -> int:
    return record.level or 0


def read_ahead(
    make: Callable[[int], Made], first: int, end: int, *, depth: int = 3
) -> Iterator[Made]:
    """``make(first) ... make(end - 1)``, prepared by one thread while the caller computes."""
    with ThreadPoolExecutor(1) as pool:
        waiting = [pool.submit(make, s) for s in range(first, min(first + depth, end))]
        for step in range(first, end):
            batch = waiting.pop(0).result()
            if step + depth < end:
                waiting.append(pool.submit(make, step + depth))
            yield batch
