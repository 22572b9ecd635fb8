"""Rated sets of pictures and clips in one form: path, MOS on 0..1, content, split.

A set of :data:`distill.data.rated_sets.DATASETS` is loaded from the folder its release unpacks to.
Nothing is downloaded.

The official parts are kept where a set has them; a set with a training part only beside its test
part has a validation part drawn from the training part. A set without parts is drawn 80:10:10 by
content, so that all versions of one scene lie in one part.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dgiqa_stream.errors import ConfigError
from distill.data.label_files import HOW_TO_GO_ON, Label, Missing, media_index
from distill.data.rated_sets import DATASETS, Dataset
from distill.data.splits import assign_splits
from distill.say import say

NUM_NAMED = 3
"""How many files a message names before it gives their number."""


@dataclass(frozen=True, slots=True)
class RatedItem:
    """A picture or clip, what people thought of it, and what is known about it."""

    name: str
    """Unique within its set: the path relative to the set's folder."""
    path: Path
    content: str
    """Pictures of one content never lie in two splits of a drawn split."""
    mos: float
    """0..1, 1 best."""
    mos_std: float | None
    """Standard deviation of the ratings on the scale of ``mos``."""
    split: str
    """train, validation or test; LSVQ also has test_1080p."""
    degradation: str = ""
    level: int | None = None


def load_dataset(
    name: str,
    root: Path,
    *,
    split: str | None = None,
    seed: int = 0,
    missing: Missing = "refuse",
) -> list[RatedItem]:
    """Every rated picture or clip of a set, in the order of its label file.

    Args:
        split: only this part; None gives all of them.
        seed: of the parts that are drawn; the official ones do not depend on it.
        missing: what to do where a label has no file: stop, or go on without it and say so.

    Raises ``ConfigError`` for a name or split that does not exist, ``FileNotFoundError`` naming
    missing files, ``ValueError`` naming the row of a label that cannot be right.
    """
    dataset = DATASETS.get(name)
    if dataset is None:
        raise ConfigError(f"no rated set {name!r}; known: {', '.join(DATASETS)}")
    found = media_index(root, dataset.media)
    labels = list(dataset.read(root, found))
    _refuse_wrong_labels(dataset, labels)
    _tell_unlabelled(name, labels, found)
    splits = assign_splits(labels, seed=seed)  # before files are looked for: it knows no gaps
    _tell_missing(name, root, labels, found, missing)
    items = [
        _item(dataset, label, found[label.path.lower()], part)
        for label, part in zip(labels, splits, strict=True)
        if label.path.lower() in found
    ]
    parts = sorted({item.split for item in items})
    if split is not None and split not in parts:
        raise ConfigError(f"{name} has no part {split!r}; its parts are {', '.join(parts)}")
    return [item for item in items if split in (None, item.split)]


def _item(dataset: Dataset, label: Label, path: Path, split: str) -> RatedItem:
    span = dataset.best - dataset.worst
    mos = min(1.0, max(0.0, (label.value - dataset.worst) / span))
    spread = None if label.std is None else label.std / abs(span)
    return RatedItem(
        label.path, path, label.content, mos, spread, split, label.degradation, label.level
    )


def _refuse_wrong_labels(dataset: Dataset, labels: Sequence[Label]) -> None:
    low, high = sorted((dataset.worst, dataset.best))
    for label in labels:
        if not low - dataset.beyond <= label.value <= high + dataset.beyond:
            raise ValueError(
                f"{label.where}: {label.value:g} of {label.path} is outside {low:g}..{high:g}"
            )
    times = Counter(label.path.lower() for label in labels)
    for label in labels:
        if times[label.path.lower()] > 1:
            number = times[label.path.lower()]
            raise ValueError(f"{label.where}: {label.path} is rated {number} times: once is right")


def _named(names: Sequence[str]) -> str:
    """The first few names, then how many more there are."""
    more = len(names) - NUM_NAMED
    return ", ".join(names[:NUM_NAMED]) + (f" and {more} more" if more > 0 else "")


def _tell_missing(
    name: str, root: Path, labels: Sequence[Label], found: Mapping[str, Path], missing: Missing
) -> None:
    """Refuse labels without a file, or say how many there are."""
    absent = [label.path for label in labels if label.path.lower() not in found]
    if len(absent) == len(labels):
        raise FileNotFoundError(f"none of {len(labels)} files of {name} is in {root}")
    if absent and missing == "refuse":
        raise FileNotFoundError(
            f"{len(absent)} of {len(labels)} files of {name} are missing in {root}: "
            f"{_named(absent)}. {HOW_TO_GO_ON}"
        )
    if absent:
        say(f"{name}: {len(absent)} labels have no file and are left out: {_named(absent)}")


def _tell_unlabelled(name: str, labels: Sequence[Label], found: Mapping[str, Path]) -> None:
    """Say how many files have no label; some releases have them, so it is no error."""
    folders = {Path(label.path.lower()).parent for label in labels}
    rated = {label.path.lower() for label in labels}
    extra = sorted(path for path in found if path not in rated and Path(path).parent in folders)
    if extra:
        say(f"{name}: {len(extra)} files have no label and are left out: {_named(extra)}")
