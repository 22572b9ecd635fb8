"""What factoring one layer does to the score and to the time, measured."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from dgiqa_stream.errors import ModelError
from quant.low_rank.layers import replace_
from quant.low_rank.statistics import Batch

Score = Callable[..., Tensor]
"""A model and its arguments to the scores of the batch."""
_FEWEST_TIMINGS, _LEAST_SECONDS = 7, 0.25


@contextmanager
def swapped(model: nn.Module, name: str, module: nn.Module) -> Iterator[None]:
    """A model with another module at a name, for a while."""
    former = replace_(model, name, module)
    try:
        yield
    finally:
        replace_(model, name, former)


def scores_of(model: nn.Module, batches: Sequence[Batch], score: Score) -> Tensor:
    """The scores of all batches, flat, float64; raises :class:`ModelError` for other outputs."""
    found = []
    with torch.no_grad():
        for batch in batches:
            told = score(model, *batch)
            if not isinstance(told, Tensor):
                raise ModelError(
                    f"the model gives a {type(told).__name__}, not a tensor of scores: give "
                    "score=, which takes the model and a batch"
                )
            found.append(told.double().flatten().cpu())
    scores = torch.cat(found)
    if not bool(scores.isfinite().all()):
        raise ModelError(
            "the model's scores of calibration data are not finite numbers: look for them in the "
            "pictures and in the weights"
        )
    return scores


def mean_square(a: Tensor, b: Tensor) -> float:
    """Of the difference."""
    return float((a - b).square().mean())


def latency_seconds(run: Callable[[], object]) -> float:
    """The least time of several runs, after one to warm up: what else runs only adds to it."""
    with torch.no_grad():
        run()
        times: list[float] = []
        while len(times) < _FEWEST_TIMINGS or sum(times) < _LEAST_SECONDS:
            begun = time.perf_counter()
            run()
            times.append(time.perf_counter() - begun)
    return min(times)
