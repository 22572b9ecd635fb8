"""``--fail-under``: the least that a pooled value may be, and what is said of one that is lower."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from dgiqa_stream.errors import ConfigError

_OPTION = "--fail-under"
_NO_QUALITY = ("stdev",)
"""Pooled values that are no quality: a higher one is not better."""

_SHOWN_STEP = 0.01


@dataclass(frozen=True, slots=True)
class Threshold:
    """The least that each input may pool to."""

    pooler: str
    """A name of ``POOLERS``."""
    least: float
    """0..100."""

    def __str__(self) -> str:
        """Such as ``p5=40``, as the option takes it."""
        return f"{self.pooler}={self.least:g}"

    def shortfall(self, pooled: Mapping[str, float | None]) -> str:
        """What is too low, and by how much; empty where nothing is."""
        value = pooled.get(self.pooler)
        if value is None:
            return f"{self.pooler} has no value to hold against {_OPTION} {self}"
        if value >= self.least:
            return ""
        missing = self.least - value
        by = f"{missing:.2f}" if missing >= _SHOWN_STEP else f"{missing:.1g}"
        return f"{self.pooler} {value:.2f} is below {_OPTION} {self} by {by}"


def thresholds_of(words: Iterable[str]) -> tuple[Threshold, ...]:
    """What ``--fail-under`` was given: ``POOLER=VALUE`` each, or ``VALUE`` for the mean.

    Raises :class:`ConfigError` for an unknown pooler, for one that is no quality and for a value
    outside 0..100.
    """
    return tuple(map(_threshold, words))


def _threshold(word: str) -> Threshold:
    from dgiqa_stream.config import PoolingSettings

    name, equals, number = word.rpartition("=")
    pooler = name.strip() if equals else "mean"
    try:
        least = float(number)
    except ValueError:
        raise ConfigError(f"{_OPTION} {word!r} is no number, and not POOLER=VALUE") from None
    if not 0 <= least <= 100:
        raise ConfigError(f"{_OPTION} {word} is not within 0..100")
    try:
        PoolingSettings(poolers=(pooler,))
    except ValueError as exc:
        raise ConfigError(str(exc).replace("poolers =", _OPTION)) from exc
    if pooler in _NO_QUALITY:
        raise ConfigError(f"{_OPTION} {word}: {pooler} says how much scores vary, not how good")
    return Threshold(pooler, least)


def poolers_needed(chosen: list[str] | None, thresholds: Iterable[Threshold]) -> list[str] | None:
    """The chosen poolers and those that thresholds name; None, for all, stays None."""
    if chosen is None:
        return None
    return [*chosen, *(t.pooler for t in thresholds if t.pooler not in chosen)]
