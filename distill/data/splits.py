"""Which part of a rated set a picture belongs to: the official one, or one drawn by content."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from distill.data.label_files import Label

VALIDATION_SHARE, TEST_SHARE = 0.1, 0.1


def assign_splits(labels: Sequence[Label], *, seed: int) -> list[str]:
    """The part of every label: the official one, else one drawn by content with a seed."""
    if all(label.split is None for label in labels):
        drawn = draw_splits([label.content for label in labels], seed=seed)
        return [drawn[label.content] for label in labels]
    parts = [label.split or "train" for label in labels]
    if "validation" in parts:
        return parts
    pairs = zip(labels, parts, strict=True)
    training = list(dict.fromkeys(label.content for label, part in pairs if part == "train"))
    number = round(VALIDATION_SHARE * len(training))
    # as `load_biq2021` draws, so that its packs and this loader hold back the same pictures
    chosen = np.random.default_rng(seed).choice(len(training), number, replace=False)
    held_back = {training[i] for i in chosen}
    return [
        "validation" if part == "train" and label.content in held_back else part
        for label, part in zip(labels, parts, strict=True)
    ]


def draw_splits(contents: Sequence[str], *, seed: int) -> dict[str, str]:
    """Content to train, validation or test (80:10:10 of the contents, one of each where it can).

    Depends on the set of contents and the seed, not on their order.
    """
    unique = sorted(set(contents))
    order = np.random.default_rng(seed).permutation(len(unique))
    num_test = max(1, round(TEST_SHARE * len(unique))) if len(unique) > 2 else 0
    num_validation = max(1, round(VALIDATION_SHARE * len(unique))) if len(unique) > 2 else 0
    parts = dict.fromkeys(unique, "train")
    for place, i in enumerate(order[: num_test + num_validation]):
        parts[unique[i]] = "test" if place < num_test else "validation"
    return parts
