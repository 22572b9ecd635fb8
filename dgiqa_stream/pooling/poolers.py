"""The table of poolers.

To add one: write a summary in ``_order_free.py`` or a file of its own (or a value read from one
that is there), add a row here and its name to ``POOLER_NAMES`` in ``config.py``, and its formula to
the tests.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType
from typing import Any

from dgiqa_stream.config import PoolingSettings
from dgiqa_stream.pooling._holds import Holds, Pooler, Summary
from dgiqa_stream.pooling._hysteresis import Hysteresis
from dgiqa_stream.pooling._memory import Ewma, Primacy, Recency
from dgiqa_stream.pooling._order_free import Distribution, Moments
from dgiqa_stream.pooling._p1203 import SessionInSeconds


@dataclass(frozen=True, slots=True)
class PoolerKind:
    """How a pooled value is made. Called with settings, it makes a pooler of its own."""

    summary: Callable[[PoolingSettings], Summary]
    """Makes what is kept; kinds with the same one share it."""
    read: Callable[[Any, PoolingSettings], float | None]
    """The value, from such a summary."""
    parameters: tuple[str, ...] = ()
    """Names of the settings that change the value."""

    def __call__(self, settings: PoolingSettings) -> Pooler:
        """A pooler that shares nothing."""
        return _Alone(self, settings)


class _Alone:
    """One pooled value and the summary it is read from."""

    def __init__(self, kind: PoolerKind, settings: PoolingSettings) -> None:
        self._kind, self._settings = kind, settings
        self._summary = kind.summary(settings)

    def add(self, holds: Holds) -> None:
        self._summary.add(holds)

    def forget(self) -> None:
        self._summary.forget()

    def value(self) -> float | None:
        return self._kind.read(self._summary, self._settings)


def _moments(settings: PoolingSettings) -> Summary:
    return Moments(settings.minkowski_p)


def _distribution(_: PoolingSettings) -> Summary:
    return Distribution()


def _hysteresis(settings: PoolingSettings) -> Summary:
    return Hysteresis(settings.hysteresis_seconds, settings.hysteresis_alpha)


def _percentile(share: float) -> PoolerKind:
    return PoolerKind(_distribution, lambda kept, _: kept.percentile(share))


def _low_mean(share: float) -> PoolerKind:
    return PoolerKind(_distribution, lambda kept, _: kept.low_mean(share))


_HYSTERESIS = ("hysteresis_seconds", "hysteresis_alpha")

POOLERS: Mapping[str, PoolerKind] = MappingProxyType(
    {
        "mean": PoolerKind(_moments, lambda kept, _: kept.mean()),
        "median": _percentile(0.50),
        "min": PoolerKind(_moments, lambda kept, _: kept.lowest()),
        "max": PoolerKind(_moments, lambda kept, _: kept.highest()),
        "stdev": PoolerKind(_moments, lambda kept, _: kept.stdev()),
        "harmonic_mean": PoolerKind(_moments, lambda kept, _: kept.harmonic_mean()),
        "p1": _percentile(0.01),
        "p5": _percentile(0.05),
        "p10": _percentile(0.10),
        "low1": _low_mean(0.01),
        "low5": _low_mean(0.05),
        "minkowski": PoolerKind(_moments, lambda kept, _: kept.minkowski(), ("minkowski_p",)),
        "vqpool": PoolerKind(
            _distribution, lambda kept, s: kept.vqpool(s.vqpool_exponent), ("vqpool_exponent",)
        ),
        "ewma": PoolerKind(
            lambda s: Ewma(s.ewma_seconds), lambda kept, _: kept.value(), ("ewma_seconds",)
        ),
        "hysteresis": PoolerKind(_hysteresis, lambda kept, _: kept.causal(), _HYSTERESIS),
        "hysteresis_exact": PoolerKind(_hysteresis, lambda kept, _: kept.exact(), _HYSTERESIS),
        "primacy": PoolerKind(
            lambda s: Primacy(s.primacy_seconds), lambda kept, _: kept.value(), ("primacy_seconds",)
        ),
        "recency": PoolerKind(
            lambda s: Recency(s.recency_seconds), lambda kept, _: kept.value(), ("recency_seconds",)
        ),
        "p1203_style": PoolerKind(
            lambda s: SessionInSeconds(s.p1203_seconds),
            lambda kept, _: kept.value(),
            ("p1203_seconds",),
        ),
    }
)
"""Name to kind, in the order of messages and tables."""
ALWAYS = ("mean", "low5", "ewma", "hysteresis")
"""Pooled whatever is chosen: the headlines, what must stand beside them, and the baseline."""


@lru_cache(maxsize=32)  # windows ask at every hop
def chosen(settings: PoolingSettings) -> Mapping[str, PoolerKind]:
    """The kinds that the settings ask for and those that always come, in the table's order."""
    names = {*settings.poolers, *ALWAYS} if settings.poolers else set(POOLERS)
    return {name: kind for name, kind in POOLERS.items() if name in names}


def pooler_names(settings: PoolingSettings) -> tuple[str, ...]:
    """Names of the values that these settings pool to, in the order of messages."""
    return tuple(chosen(settings))


class PoolerSet:
    """All poolers that settings ask for; a summary that several need is kept once."""

    def __init__(self, settings: PoolingSettings) -> None:
        self._settings = settings
        self._kinds = chosen(settings)
        self._summaries: dict[Callable[[PoolingSettings], Summary], Summary] = {}
        for kind in self._kinds.values():
            if kind.summary not in self._summaries:
                self._summaries[kind.summary] = kind.summary(settings)

    def add(self, holds: Holds) -> None:
        """Take the next holds."""
        for summary in self._summaries.values():
            summary.add(holds)

    def forget(self) -> None:
        """The stream's clock jumped."""
        for summary in self._summaries.values():
            summary.forget()

    def values(self) -> dict[str, float | None]:
        """The pooled values by name; rounding errors do not leave the scale."""
        found = {}
        for name, kind in self._kinds.items():
            value = kind.read(self._summaries[kind.summary], self._settings)
            found[name] = None if value is None else min(max(value, 0.0), 100.0)
        return found

    def parameters(self) -> dict[str, float]:
        """What changes these values, by the name of the setting."""
        names = dict.fromkeys(name for kind in self._kinds.values() for name in kind.parameters)
        return {name: float(getattr(self._settings, name)) for name in names}
