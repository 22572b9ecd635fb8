"""The table of poolers.

To add one: write a class with the methods of :class:`~dgiqa_stream.pooling.Pooler` in
``_order_free.py`` or ``_memory.py``, add a row here, and its formula to the tests.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from dgiqa_stream.config import PoolingSettings
from dgiqa_stream.pooling._holds import Pooler
from dgiqa_stream.pooling._memory import Ewma, Hysteresis
from dgiqa_stream.pooling._order_free import (
    HarmonicMean,
    LowMean,
    Maximum,
    Mean,
    Minimum,
    Percentile,
    Stdev,
)

POOLERS: Mapping[str, Callable[[PoolingSettings], Pooler]] = MappingProxyType(
    {  # name: what makes an empty pooler
        "mean": lambda _: Mean(),
        "median": lambda _: Percentile(0.50),
        "min": lambda _: Minimum(),
        "max": lambda _: Maximum(),
        "stdev": lambda _: Stdev(),
        "harmonic_mean": lambda _: HarmonicMean(),
        "p5": lambda _: Percentile(0.05),
        "low5": lambda _: LowMean(0.05),
        "ewma": lambda settings: Ewma(settings.ewma_seconds),
        "hysteresis": lambda settings: Hysteresis(settings.hysteresis_seconds),
    }
)
