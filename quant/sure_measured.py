"""What ``dgiqa-quant sure`` measures through a file as it is served: intervals and flags.

Only that command imports this module, as it joins evaluation to compression.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
from numpy.typing import NDArray

from dgiqa_stream.errors import ConfigError
from dgiqa_stream.manifest import DomainSpec, IntervalSpec, ModelManifest
from dgiqa_stream.scorer import Prediction, Scorer, load_scorer, planes_of_rgb
from dgiqa_stream.types import Planes
from distill.data.loader import AnyRecord, PictureSet
from distill.data.strange import JUDGE_SEED, KINDS, strange_picture
from distill.evaluation.interval_coverage import judge_intervals
from quant.conformal import (
    cross_intervals,
    fewest_for,
    half_widths,
    points_per_spread,
    threshold_for,
)
from quant.export_onnx import write_successor
from quant.extra_outputs import SPREAD, UNFAMILIAR
from quant.sure import SureConfig

_BATCH = 8


@dataclass(frozen=True, slots=True, eq=False)
class RatedPictures:
    """Pictures to measure on, and their ratings on 0..100."""

    pictures: PictureSet
    records: Sequence[AnyRecord]
    mos_points: NDArray[np.float64]

    def planes(self) -> Iterator[Planes]:
        """Of one picture after the other."""
        return (self.pictures.planes(record) for record in self.records)


def validation_part(pictures: PictureSet, config: SureConfig) -> RatedPictures:
    """Rated pictures of the validation split.

    Raises :class:`ConfigError` where they are too few for the coverage asked for.
    """
    records = [r for r in pictures.records if r.split == "validation" and r.mos is not None]
    fewest = 2 * fewest_for(config.coverage)
    if len(records) < fewest:
        raise ConfigError(
            f"{pictures.folder} has {len(records)} rated validation pictures, and sure.coverage "
            f"{config.coverage} needs {fewest}: give packs with more, or ask for less"
        )
    return RatedPictures(pictures, records, np.array([100 * (r.mos or 0.0) for r in records]))


def measure(
    graph: onnx.ModelProto, was: ModelManifest, rated: RatedPictures, config: SureConfig
) -> tuple[ModelManifest, dict[str, Any]]:
    """The manifest with interval and domain that hold for the graph, and what was measured.

    What is said of coverage is of intervals scaled on the half that a picture is not in; the scale
    in the manifest is of all.
    """
    served, drawn = _served(graph, was, rated, config)
    score, spread, unfamiliar = (
        np.array([getattr(p, name) for p in served], np.float64)
        for name in ("score", "spread", "unfamiliar")
    )
    error = rated.mos_points - score
    scale = points_per_spread(error, spread, coverage=config.coverage)
    threshold = threshold_for(unfamiliar, share_flagged=config.share_flagged)
    crossed = cross_intervals(score, error, spread, coverage=config.coverage, seed=config.seed)
    judged = judge_intervals(rated.mos_points, crossed, nominal=config.coverage)
    flags = {kind: _share_flagged(found, threshold) for kind, found in drawn.items()}
    figures = {
        "num_validation": len(served),
        "points_per_spread": scale,
        "coverage": judged.all.share_inside.value,
        "mean_width_points": judged.all.mean_width_points,
        "coverage_by_width": [part.share_inside.value for part in judged.by_width],
        "mean_width_points_by_width": [part.mean_width_points for part in judged.by_width],
        "flagged": {
            "validation": _share_flagged(served, threshold),
            "kinds": {k: v for k, v in flags.items() if k not in config.held_out},
            "held_out_kinds": {k: v for k, v in flags.items() if k in config.held_out},
        },
    }
    manifest = msgspec.structs.replace(
        was,
        interval=IntervalSpec(SPREAD, half_widths(scale), config.coverage),
        domain=DomainSpec(UNFAMILIAR, threshold),
    )
    return manifest, figures


def _served(
    graph: onnx.ModelProto, was: ModelManifest, rated: RatedPictures, config: SureConfig
) -> tuple[list[Prediction], dict[str, list[Prediction]]]:
    """What a written file says of the rated pictures, and of drawn ones by their kind."""
    provisional = msgspec.structs.replace(
        was, interval=IntervalSpec(SPREAD, half_widths(100.0)), domain=DomainSpec(UNFAMILIAR, 1.0)
    )
    drawn = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "measured.onnx"
        write_successor(graph, path, provisional, step={}, made_by="")
        with load_scorer(path) as scorer:
            served = _predictions(scorer, rated.planes())
            for kind in KINDS:
                pictures = (
                    strange_picture(kind, seed=(config.seed, JUDGE_SEED, i))
                    for i in range(config.num_judged)
                )
                drawn[kind] = _predictions(scorer, map(planes_of_rgb, pictures))
    return served, drawn


def _predictions(scorer: Scorer, pictures: Iterable[Planes]) -> list[Prediction]:
    """What the model says of each; only a few pictures are held at a time."""
    found, waiting = [], iter(pictures)
    while batch := list(islice(waiting, _BATCH)):
        found += scorer.predict(batch)
    return found


def _share_flagged(found: Sequence[Prediction], threshold: float) -> float:
    """The share of pictures with a reason against their score."""
    flagged = ["flat" in p.out_of_domain or (p.unfamiliar or 0.0) > threshold for p in found]
    return math.fsum(flagged) / len(flagged)
