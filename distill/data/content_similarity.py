"""Labels of degraded pictures from the rated picture that shows the most similar content.

Inspired by the content-similarity labels of GlintIQA (Wang et al., arXiv 2408.03885): a new clean
picture takes, for each type and level of degradation, the label of the rated reference whose
feature has the largest cosine similarity to its own. Any feature serves; the similarity comes back
as the labels' confidence.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Feature = Callable[[Any], ArrayLike]
"""One clean picture to its feature, (D,)."""


@dataclass(frozen=True, slots=True, eq=False)
class TransferredLabels:
    """Labels of new pictures and where each came from."""

    labels: NDArray[np.float64]
    """(N, ...): as the rated labels, a row for each new picture."""
    similarity: NDArray[np.float64]
    """(N,) cosine similarity to the reference, at most 1; the mean of several."""
    reference: NDArray[np.int64]
    """(N,) which rated picture the labels are of, the most similar of several."""


def transfer_labels(
    features_new: ArrayLike | Sequence[Any],
    features_rated: ArrayLike | Sequence[Any],
    labels: ArrayLike,
    *,
    feature: Feature | None = None,
    num_neighbours: int = 1,
) -> TransferredLabels:
    """The labels of the most similar rated content for each new one.

    Args:
        features_new: (N, D), or N pictures where ``feature`` is given.
        features_rated: (M, D), or M pictures.
        labels: (M, ...), for example (M, types, levels); NaN stands for a label that is missing.
        feature: takes a picture to its feature.
        num_neighbours: the mean label of so many references; the paper's one by default.

    Of equally similar references the first is taken. ``similarity`` is the mean over the
    references, ``reference`` the most similar. Raises ``ValueError`` where shapes do not fit, a
    feature is zero or not finite, or there are fewer references than neighbours.
    """
    new, rated = (_unit_rows(given, feature) for given in (features_new, features_rated))
    known = np.asarray(labels, np.float64)
    if new.shape[1] != rated.shape[1]:
        raise ValueError(f"features have {new.shape[1]} values, the rated ones {rated.shape[1]}")
    if len(known) != len(rated):
        raise ValueError(f"{len(rated)} rated features and labels of {len(known)} pictures")
    if not 1 <= num_neighbours <= len(rated):
        raise ValueError(f"{num_neighbours} neighbours among {len(rated)} rated features")
    similarity = new @ rated.T  # (N, M)
    nearest = np.argsort(-similarity, axis=1, kind="stable")[:, :num_neighbours]  # (N, k)
    best = np.minimum(np.take_along_axis(similarity, nearest, 1), 1.0).mean(1)
    return TransferredLabels(known[nearest].mean(1), best, nearest[:, 0].astype(np.int64))


def _unit_rows(given: ArrayLike | Sequence[Any], feature: Feature | None) -> NDArray[np.float64]:
    """(N, D) features of length 1."""
    rows: Any = given if feature is None else [feature(picture) for picture in given]  # type: ignore[union-attr]
    found = np.asarray(rows, np.float64)
    if found.ndim != 2 or not found.size:
        raise ValueError(f"features are (N, D) with N and D at least 1, not {found.shape}")
    lengths = np.linalg.norm(found, axis=1, keepdims=True)
    wrong = np.flatnonzero(~(np.isfinite(lengths) & (lengths > 0)))
    if wrong.size:
        raise ValueError(f"feature {wrong[0]} is zero or not finite: it has no direction")
    return np.asarray(found / lengths, np.float64)
