"""A stand-in for human ratings of degraded pictures: full-reference measures on one scale.

MDSI (Nafchi et al. 2016), HaarPSI (Reisenhofer et al. 2018), VSI (Zhang et al. 2014) and MS-GMSD
(Zhang et al. 2017) compare a picture with its clean source; for codecs SSIMULACRA2 joins them where
it is installed. Each value becomes a distance ``d`` from the clean picture (0 for the clean one)
and then an impairment on 0..1 by ``1 - exp(-(d / scale)^power)``, see :data:`MAPS`. The pseudo-MOS
is one minus their mean; how well they agree is its confidence.
"""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dgiqa_stream.errors import ConfigError
from distill.data.codecs import Rgb

ENSEMBLE = ("mdsi", "haarpsi", "vsi", "ms_gmsd")
CODEC_ENSEMBLE = (*ENSEMBLE, "ssimulacra2")

SHORTEST_PX = 96
"""Of a side: MS-GMSD halves pictures three times."""

ROUNDING = 2e-5
"""Distances below it are rounding of float32 sums: HaarPSI of a picture with itself is 1.000006."""


@dataclass(frozen=True, slots=True)
class ImpairmentMap:
    """A rising map of distance to impairment: 0 at 0, towards 1 for ever larger distances."""

    scale: float
    """The distance at which the impairment is 1 - 1/e = 0.63."""
    power: float

    def __call__(self, distance: float) -> float:
        """Impairment 0..1 of a distance of 0 or more."""
        return float(-np.expm1(-((distance / self.scale) ** self.power)))


MAPS: Mapping[str, ImpairmentMap] = MappingProxyType(
    {
        "mdsi": ImpairmentMap(scale=0.3487, power=2.9554),
        "haarpsi": ImpairmentMap(scale=0.2801, power=1.0209),
        "vsi": ImpairmentMap(scale=0.0272, power=0.7128),
        "ms_gmsd": ImpairmentMap(scale=0.1018, power=0.9653),
        "ssimulacra2": ImpairmentMap(scale=0.9619, power=1.433),
    }
)
"""As :func:`fit_maps` gave them on 2,316 pictures: every picture ladder (seed 0) of the middle
384 px of 12 clean pictures drawn from the training split; the test split had no part in it."""


@dataclass(frozen=True, slots=True)
class PseudoMos:
    """What full-reference measures say of a degraded picture."""

    score: float
    """0..1, 1 for the clean picture."""
    confidence: float
    """0..1: one minus twice the standard deviation of the impairments, which is at most 1/2."""
    values: Mapping[str, float]
    """Each measure as its package states it."""
    impairments: Mapping[str, float]
    """Each measure on the one scale, 0 clean."""


def measure(clean: Rgb, degraded: Rgb, *, measures: Sequence[str] = ENSEMBLE) -> dict[str, float]:
    """The values of some measures, as their packages state them.

    Args:
        clean: uint8 (H, W, 3), :data:`SHORTEST_PX` or more on a side.
        degraded: of the same shape.

    Raises ``ValueError`` for pictures that do not fit, ``ConfigError`` where a package is missing.
    """
    if clean.shape != degraded.shape or clean.dtype != np.uint8 or degraded.dtype != np.uint8:
        raise ValueError(
            f"both pictures are uint8 of one shape, not {clean.dtype} {clean.shape} and "
            f"{degraded.dtype} {degraded.shape}"
        )
    if min(clean.shape[:2]) < SHORTEST_PX:
        raise ValueError(f"pictures are {SHORTEST_PX} px or more on a side, not {clean.shape[:2]}")
    unknown = [name for name in measures if name not in MAPS]
    if unknown:
        raise ConfigError(f"no measure {unknown[0]!r}; known: {', '.join(MAPS)}")
    values = _piq_values(clean, degraded, [m for m in measures if m != "ssimulacra2"])
    if "ssimulacra2" in measures:
        values["ssimulacra2"] = _ssimulacra2(clean, degraded)
    return values


def _piq_values(clean: Rgb, degraded: Rgb, measures: Sequence[str]) -> dict[str, float]:
    try:
        import piq  # type: ignore[import-not-found]
        import torch
    except ImportError as exc:
        raise ConfigError(f"pseudo-MOS needs {exc.name!r}: pip install piq torchvision") from exc
    functions: dict[str, Callable[..., Any]] = {
        "mdsi": piq.mdsi,
        "haarpsi": piq.haarpsi,
        "vsi": piq.vsi,
        "ms_gmsd": piq.multi_scale_gmsd,
    }
    pair = [
        torch.from_numpy(p.transpose(2, 0, 1)[None].astype(np.float32)) for p in (degraded, clean)
    ]
    with torch.no_grad():
        return {name: float(functions[name](*pair, data_range=255.0)) for name in measures}


def has_ssimulacra2() -> bool:
    """Whether the optional package is installed."""
    return importlib.util.find_spec("ssimulacra2") is not None


def _ssimulacra2(clean: Rgb, degraded: Rgb) -> float:
    """At most 100, which is the clean picture; far below 0 for ruins."""
    try:
        from ssimulacra2 import compute_ssimulacra2  # type: ignore[import-not-found]
    except ImportError as exc:
        raise ConfigError(f"this measure needs {exc.name!r}: pip install ssimulacra2") from exc
    import cv2

    files = [
        io.BytesIO(cv2.imencode(".png", cv2.cvtColor(p, cv2.COLOR_RGB2BGR))[1].tobytes())
        for p in (clean, degraded)
    ]
    return float(compute_ssimulacra2(*files))


def distance(name: str, value: float) -> float:
    """How far a measure's value is from that of the clean picture, 0 or more."""
    best = {"haarpsi": 1.0, "vsi": 1.0, "ssimulacra2": 100.0}.get(name)
    far = value if best is None else (best - value) / best
    return far if far > ROUNDING else 0.0


def pool(values: Mapping[str, float]) -> PseudoMos:
    """Measures' values to one pseudo-MOS."""
    impairments = {name: MAPS[name](distance(name, value)) for name, value in values.items()}
    each = np.array(list(impairments.values()))
    return PseudoMos(
        score=float(1 - each.mean()),
        confidence=float(1 - 2 * each.std()),
        values=MappingProxyType(dict(values)),
        impairments=MappingProxyType(impairments),
    )


def pseudo_mos(
    clean: Rgb,
    degraded: Rgb,
    *,
    measures: Sequence[str] = ENSEMBLE,
    components: Sequence[Rgb] = (),
) -> PseudoMos:
    """The pseudo-MOS of one degraded picture.

    Args:
        components: for a chain of degradations, each of its steps alone on the clean picture: the
            chain is never rated better than the worst of them.
    """
    made = pool(measure(clean, degraded, measures=measures))
    worst = [pool(measure(clean, part, measures=measures)).score for part in components]
    return with_score(made, min([made.score, *worst]))


def with_score(made: PseudoMos, score: float) -> PseudoMos:
    """The same measures under another score."""
    return PseudoMos(score, made.confidence, made.values, made.impairments)


def order_ladder(ladder: Sequence[PseudoMos]) -> list[PseudoMos]:
    """The levels of one ladder, from slight to severe, with scores that never rise.

    Isotonic regression, weighted by confidence: where measures contradict the order of levels, the
    levels share their mean.
    """
    from scipy.optimize import isotonic_regression

    if not ladder:
        return []
    scores = np.array([made.score for made in ladder])
    weights = np.array([max(1e-3, made.confidence) for made in ladder])
    ordered = isotonic_regression(scores, weights=weights, increasing=False).x
    return [with_score(made, float(s)) for made, s in zip(ladder, ordered, strict=True)]


def fit_maps(distances: Mapping[str, NDArray[np.float64]]) -> dict[str, ImpairmentMap]:
    """Maps that bring several measures of the same pictures to one scale.

    The scale is the mean over :data:`ENSEMBLE` of each measure's rank among the pictures, 0..1: an
    impairment of 0.7 is worse than 70 % of them. Each map is the least-squares fit of its form to
    that scale. NaN stands for a picture that a measure (SSIMULACRA2) did not see.

    Args:
        distances: (N,) for each measure, as :func:`distance` gives them.
    """
    from scipy.optimize import curve_fit
    from scipy.stats import rankdata

    number = len(distances[ENSEMBLE[0]])
    ranks = [(rankdata(distances[name]) - 0.5) / number for name in ENSEMBLE]
    common = np.mean(ranks, axis=0)

    def form(x: NDArray[np.float64], scale: float, power: float) -> NDArray[np.float64]:
        return -np.expm1(-((x / scale) ** power))

    maps: dict[str, ImpairmentMap] = {}
    for name, values in distances.items():
        seen = np.isfinite(values)
        begin = (float(np.median(values[seen])), 1.0)
        fitted, _ = curve_fit(form, values[seen], common[seen], begin, bounds=(1e-4, 20))
        maps[name] = ImpairmentMap(*(round(float(v), 4) for v in fitted))
    return maps
