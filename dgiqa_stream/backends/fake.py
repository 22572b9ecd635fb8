"""A backend that needs no engine: the mean brightness of the first view is the score.

Part of the product: plugins and tests use it where the model's own numbers do not matter.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from dgiqa_stream.backends import BackendStatus, Outputs

if TYPE_CHECKING:
    from dgiqa_stream.manifest import LoadedModel
    from dgiqa_stream.types import FrameBatch


class FakeBackend:
    """Mean of the first view over 255: deterministic, fast, monotone in brightness.

    With ``has_spread``, the spread is the standard deviation of the first view over 127.5; with
    ``has_unfamiliar``, unfamiliar is the share of its samples that are 0 or 255.
    """

    status = BackendStatus(requested="fake", active="fake:cpu")

    def __init__(self, *, has_spread: bool = False, has_unfamiliar: bool = False) -> None:
        """Which outputs there are beside the quality."""
        self._has_spread, self._has_unfamiliar = has_spread, has_unfamiliar

    def infer(self, batch: FrameBatch) -> Outputs:
        """Numbers in 0..1 of each frame's first view, (N,) each."""
        view = next(iter(batch.views.values()))
        first = view.reshape(len(view), -1)
        clipped = (first == 0) | (first == 255)
        return Outputs(
            (first.mean(axis=1) / 255.0).astype(np.float32),
            (first.std(axis=1) / 127.5).astype(np.float32) if self._has_spread else None,
            clipped.mean(axis=1).astype(np.float32) if self._has_unfamiliar else None,
        )

    def close(self) -> None:
        """Nothing to release."""


def open_model(model: LoadedModel, *, device: str, num_threads: int) -> FakeBackend:
    """The same backend for every model, with the outputs that its manifest names."""
    manifest = model.manifest
    return FakeBackend(
        has_spread=manifest.interval is not None, has_unfamiliar=manifest.domain is not None
    )
