"""What a GPU raises, raised on the CPU at a chosen call; on pytest's path. Needs torch."""

from __future__ import annotations

import numpy as np
import torch

from dgiqa_stream.types import FrameBatch

FaultOfTorch = getattr(torch, "AcceleratorError", RuntimeError)
"""Of torch 2.8 on; what it raised before."""
FAULTS = [
    FaultOfTorch("CUDA error: unspecified launch failure"),
    RuntimeError("CUDA error: an illegal memory access was encountered"),
    RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"),
]


class Failing:
    """The network, but for the calls in ``fails``, numbered from 0, which raise ``exc``."""

    def __init__(self, backend, exc, fails):
        self.network, self.exc, self.fails = backend._engine._network, exc, fails
        self.output_names, self.num_calls = self.network.output_names, 0
        backend._engine._network = self

    def __call__(self, views):
        """Score, or fail."""
        self.num_calls += 1
        if self.num_calls - 1 in self.fails:
            raise self.exc
        return self.network(views)


def noise(model, num_frames, seed=0):
    """A batch of noise of the model's views."""
    rng = np.random.default_rng(seed)
    shapes = {v.name: v.shape for v in model.manifest.preprocess.views}
    return FrameBatch(
        {n: rng.integers(0, 256, (num_frames, *s), dtype=np.uint8) for n, s in shapes.items()}
    )
