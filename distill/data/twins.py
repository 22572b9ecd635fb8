"""Twins: pictures of a rated set that are one photograph, saved again under another name.

Thumbnails of 16x16 are compared. A twin correlates by more than :data:`LEAST_CORRELATION` and
differs by less than :data:`MOST_DIFFERENCE` in the mean, which the same photograph saved again does
and another view of one scene hardly does. Flat pictures are nobody's twins: they all look alike.
No rating is read.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from dgiqa_stream.errors import SourceError
from dgiqa_stream.preprocess import reduced_rgb
from dgiqa_stream.types import Planes
from distill.data.build import NOT_A_PICTURE, read_picture
from distill.data.codecs import Rgb
from distill.data.datasets import RatedItem
from distill.data.loader import AnyRecord, PictureSet
from distill.data.training_data import TrainingData
from distill.say import say

Floats = NDArray[np.float32]

LEAST_CORRELATION = 0.99
MOST_DIFFERENCE = 4.0
"""Of 255 steps."""
LEAST_DEVIATION = 10.0
"""Of a thumbnail, in steps; a flatter one is left out."""
_SIDE_PX, _ROWS_AT_ONCE = 16, 1024
_FLAT = np.zeros(3 * _SIDE_PX**2, np.float32)


def thumbnail(picture: Rgb) -> Floats:
    """16x16 means of a picture (H, W, 3), flat: (768,) in 0..255."""
    small = cv2.resize(picture, (_SIDE_PX, _SIDE_PX), interpolation=cv2.INTER_AREA)
    return np.asarray(small, np.float32).ravel()


def thumbnail_of(planes: Planes) -> Floats:
    """The same of decoded samples."""
    return thumbnail(np.asarray(reduced_rgb(planes, longest_px=8 * _SIDE_PX), np.uint8))


def thumbnails_of_files(paths: Sequence[Path]) -> Floats:
    """(N, 768) of picture files; one that cannot be read is flat, and so nobody's twin."""

    def of(path: Path) -> Floats:
        try:
            return thumbnail_of(read_picture(path))
        except NOT_A_PICTURE:
            return _FLAT

    return np.stack([of(path) for path in paths])


def _unit(rows: Floats) -> Floats:
    """Rows of mean 0 and length 1."""
    centred = rows - rows.mean(1, keepdims=True)
    return np.asarray(centred / np.maximum(np.linalg.norm(centred, axis=1, keepdims=True), 1e-6))


def twin_pairs(first: Floats, second: Floats) -> NDArray[np.intp]:
    """(P, 2) places of twins, one of each part, by rising place in ``first``.

    Args:
        first: (N, 768) thumbnails.
        second: (M, 768); may be ``first`` itself, and each picture is then its own twin too.
    """
    ours, theirs = _unit(first), _unit(second).T
    structured = first.std(1) > LEAST_DEVIATION
    found: list[NDArray[np.intp]] = []
    for begin in range(0, len(first), _ROWS_AT_ONCE):  # 10,000 against themselves are 400 MB
        rows, columns = np.nonzero(ours[begin : begin + _ROWS_AT_ONCE] @ theirs > LEAST_CORRELATION)
        rows = rows + begin
        near = np.abs(first[rows] - second[columns]).mean(1) < MOST_DIFFERENCE
        near &= structured[rows]
        found.append(np.stack([rows[near], columns[near]], 1))
    return np.concatenate(found) if found else np.zeros((0, 2), np.intp)


def twin_groups(thumbnails: Floats) -> NDArray[np.intp]:
    """(N,) a group for each picture, numbered by first appearance; twins of twins are in one."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    number = len(thumbnails)
    rows, columns = twin_pairs(thumbnails, thumbnails).T
    graph = coo_array((np.ones(len(rows), np.int8), (rows, columns)), shape=(number, number))
    _, labels = connected_components(graph, directed=False)
    return np.asarray(np.unique(labels, return_inverse=True)[1], np.intp)


def draw_by_group(groups: Sequence[int], number: int, *, seed: int) -> set[int]:
    """Places of ``number`` pictures, whole groups alone, by a seeded draw.

    Fewer where no whole group fits any more, which singles make rare. The draw depends on which
    pictures are together, not on the groups' numbers.
    """
    members: dict[int, list[int]] = {}
    for place, group in enumerate(groups):
        members.setdefault(group, []).append(place)
    whole = list(members.values())
    chosen: set[int] = set()
    for i in np.random.default_rng(seed).permutation(len(whole)):
        if len(chosen) + len(whole[i]) <= number:
            chosen.update(whole[i])
    return chosen


def regrouped(items: Sequence[RatedItem], *, seed: int) -> list[RatedItem]:
    """The pictures with another validation part: as many, but twins of one part.

    Training and validation are drawn anew by :func:`draw_by_group`; test parts stay.
    """
    places = [i for i, item in enumerate(items) if item.split in ("train", "validation")]
    number = sum(items[i].split == "validation" for i in places)
    groups = twin_groups(thumbnails_of_files([items[i].path for i in places]))
    held_back = {places[i] for i in draw_by_group(groups.tolist(), number, seed=seed)}
    parts = {i: "validation" if i in held_back else "train" for i in places}
    return [
        dataclasses.replace(item, split=parts.get(i, item.split)) for i, item in enumerate(items)
    ]


class SomePictures:
    """Some records of a pack or of shards."""

    def __init__(self, pictures: PictureSet, records: list[Any]) -> None:
        self.folder, self.pictures, self.records = pictures.folder, pictures, records

    def planes(self, record: Any) -> Planes:
        """The samples of one picture; raises as the pack or the shards do."""
        return self.pictures.planes(record)


def without_twins(data: TrainingData) -> TrainingData:
    """The data less the training pictures that have a twin among the validation pictures.

    The validation part stays as it is. With a rated picture go clean and degraded versions of the
    same content. How many are dropped is said.
    """
    training, validation = (
        [r for r in data.rated.records if r.split == part] for part in ("train", "validation")
    )
    if not training or not validation:
        return data
    pairs = twin_pairs(_thumbnails(data.rated, training), _thumbnails(data.rated, validation))
    dropped = {training[i].content for i in pairs[:, 0]}
    say(
        f"{len(set(pairs[:, 0].tolist()))} of {len(training)} rated training pictures have a twin "
        f"among {len(validation)} validation pictures and are left out"
    )
    return dataclasses.replace(
        data,
        rated=_but(data.rated, dropped),
        ladders=_but(data.ladders, dropped),
        unrated=None if data.unrated is None else _but(data.unrated, dropped),
        identity=f"{data.identity} without {len(dropped)} twins",
    )


def _thumbnails(pictures: PictureSet, records: Sequence[AnyRecord]) -> Floats:
    def each() -> Iterator[Floats]:
        for record in records:
            try:
                yield thumbnail_of(pictures.planes(record))
            except SourceError:  # the training names it; grey is nobody's twin
                yield _FLAT

    return np.stack(list(each()))


def _but(pictures: PictureSet, dropped: set[str]) -> SomePictures:
    """Without training pictures of some contents."""
    kept = [r for r in pictures.records if r.split != "train" or r.content not in dropped]
    return SomePictures(pictures, kept)
