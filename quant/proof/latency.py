"""Latency of models against a reference, interleaved: what slows the machine slows all of them."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np

from dgiqa_stream.backends import Backend, open_backend
from dgiqa_stream.errors import ConfigError
from dgiqa_stream.manifest import LoadedModel
from dgiqa_stream.types import FrameBatch


class LatencySettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is timed."""

    batches: tuple[int, ...] = (1, 8)
    threads: tuple[int, ...] = (1, 2)
    num_rounds: int = 15
    """In each round every model runs once, the first one in turn another."""
    num_warmups: int = 2
    seed: int = 1

    def __post_init__(self) -> None:
        """Refuse what cannot be timed."""
        numbers = (*self.batches, *self.threads, self.num_rounds)
        if not (self.batches and self.threads) or min(numbers) < 1:
            raise ConfigError("latency needs batches, threads and rounds of 1 or more")


@dataclass(frozen=True, slots=True)
class Latency:
    """One inference of one batch, without the cutting of views."""

    batch: int
    threads: int
    median_ms: float
    """Of one batch, over the rounds."""
    best_ms: float
    """The quickest round: what the machine can do when it is not disturbed."""
    times_faster: float
    """Median over rounds of the reference's time divided by this one's; 1 for itself."""


def measure_latency(
    models: Sequence[LoadedModel], settings: LatencySettings
) -> list[list[Latency]]:
    """For each model, of which the first is the reference, every batch with every thread count."""
    found: list[list[Latency]] = [[] for _ in models]
    for threads in settings.threads:
        opened = [open_backend(m, device="cpu", num_threads=threads) for m in models]
        try:
            for batch in settings.batches:
                inputs = [_noise(model, batch, settings.seed) for model in models]
                seconds = _interleaved(opened, inputs, settings)
                for i, of_model in enumerate(found):
                    of_model.append(_latency(batch, threads, seconds[:, i], seconds[:, 0]))
        finally:
            for backend in opened:
                backend.close()
    return found


def _noise(model: LoadedModel, batch: int, seed: int) -> FrameBatch:
    rng = np.random.default_rng(seed)
    return FrameBatch(
        {
            view.name: rng.integers(0, 256, (batch, *view.shape), dtype=np.uint8)
            for view in model.manifest.preprocess.views
        }
    )


def _interleaved(
    backends: Sequence[Backend], inputs: Sequence[FrameBatch], settings: LatencySettings
) -> np.ndarray:
    """Seconds (rounds, models)."""
    rounds = [
        _round(backends, inputs, first=number % len(backends))
        for number in range(-settings.num_warmups, settings.num_rounds)
    ]
    return np.array(rounds[settings.num_warmups :])


def _round(
    backends: Sequence[Backend],
    inputs: Sequence[FrameBatch],
    *,
    first: int,
    clock: Callable[[], float] = time.perf_counter,
) -> list[float]:
    seconds = [0.0] * len(backends)
    for step in range(len(backends)):
        i = (first + step) % len(backends)
        begin = clock()
        backends[i].infer(inputs[i])
        seconds[i] = clock() - begin
    return seconds


def _latency(batch: int, threads: int, seconds: np.ndarray, reference: np.ndarray) -> Latency:
    return Latency(
        batch=batch,
        threads=threads,
        median_ms=float(np.median(seconds) * 1e3),
        best_ms=float(seconds.min() * 1e3),
        times_faster=float(np.median(reference / seconds)),
    )


def machine() -> dict[str, object]:
    """What figures of time hold for; ``load_average`` tells whether others ran beside."""
    return {
        "cpu": _cpu_name(),
        "num_cores": os.cpu_count(),
        "system": platform.system(),
        "load_average": _load_average(),
    }


def _load_average() -> list[float] | None:
    """Over 1, 5 and 15 minutes; None where the system keeps none, as Windows."""
    read = getattr(os, "getloadavg", None)
    return None if read is None else [round(x, 2) for x in read()]


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.machine())
