"""A backend that needs no engine: the mean brightness of the first view is the score.

Part of the product: plugins and tests use it where the model's own numbers do not matter.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from dgiqa_stream.backends import BackendStatus

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from dgiqa_stream.manifest import LoadedModel
    from dgiqa_stream.types import FrameBatch


class FakeBackend:
    """Mean of the first view over 255: deterministic, fast, monotone in brightness."""

    status = BackendStatus(requested="fake", active="fake:cpu")

    def infer(self, batch: FrameBatch) -> NDArray[np.float32]:
        """Mean brightness of each frame in 0..1, (N,)."""
        first = next(iter(batch.views.values()))
        return np.asarray(first.reshape(len(first), -1).mean(axis=1) / 255.0, np.float32)

    def close(self) -> None:
        """Nothing to release."""


def open_model(model: LoadedModel, *, device: str, num_threads: int) -> FakeBackend:
    """The same backend for every model."""
    return FakeBackend()
