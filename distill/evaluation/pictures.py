"""Models on rated pictures: agreement by degradation, ladders, models against each other."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from dgiqa_stream.errors import SourceError
from distill.data.build import NOT_A_PICTURE, read_picture, reason
from distill.data.datasets import RatedItem
from distill.evaluation.agreement import (
    FEWEST_PICTURES,
    NUM_RESAMPLES,
    Agreement,
    agreement,
    by_group,
    compare,
)
from distill.evaluation.ladders import TOLERANCE_POINTS, Rung, ladder_order
from distill.evaluation.logistic import Array
from distill.evaluation.predictors import Predictor

_DIGITS = 4
MAX_LEFT_OUT = 20
"""More pictures that cannot be read stop an evaluation."""


def readable(items: Sequence[RatedItem]) -> tuple[list[RatedItem], dict[str, str]]:
    """The items whose picture can be read, and of the others by name why not.

    Each is decoded once: all models judge the same pictures, and a broken one is told before an
    hour of scoring. Raises :class:`SourceError` where more than :data:`MAX_LEFT_OUT` are broken.
    """
    whole, unreadable = [], {}
    for item in items:
        try:
            read_picture(item.path)
        except NOT_A_PICTURE as exc:
            unreadable[item.name] = reason(exc)
            if len(unreadable) > MAX_LEFT_OUT:
                raise SourceError(
                    f"{len(unreadable)} pictures cannot be read and {MAX_LEFT_OUT} may be left "
                    f"out; the last: {item.name} ({unreadable[item.name]})"
                ) from exc
        else:
            whole.append(item)
    return whole, unreadable


def judge_pictures(
    items: Sequence[RatedItem],
    predictors: Mapping[str, Predictor],
    *,
    set_name: str,
    mos_span: float = 1.0,
    left_out: Collection[str] = (),
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> dict[str, Any]:
    """Everything that is known of models on one set, ready for JSON.

    ``predictors`` maps a model's name to its function; the first is the one that others are
    compared with. ``mos_span`` is how many units of the set's own scale the MOS of 0..1 spans:
    RMSE is given in those. ``left_out`` names degradations that training never saw. Raises
    ``ValueError`` for fewer than five pictures and for scores that are not finite.
    """
    scores = {name: _scores(name, predict, items) for name, predict in predictors.items()}
    mos = np.array([item.mos for item in items]) * mos_span
    settings = {"num_resamples": num_resamples, "seed": seed}
    first = next(iter(scores))
    return {
        "kind": "pictures",
        "set": set_name,
        "num_pictures": len(items),
        "mos_span": mos_span,
        **settings,
        "models": {
            name: {
                "agreement": as_json(agreement(x, mos, **settings)),
                "degradations": _by_degradation(items, x, mos, settings),
                "ladders": _ladders(items, x, left_out),
            }
            for name, x in scores.items()
        },
        "differences": {
            f"{first} - {name}": rounded(asdict(compare(scores[first], x, mos, **settings)))
            for name, x in scores.items()
            if name != first
        },
        "too_few": _too_few(items),
        "tolerance_points": TOLERANCE_POINTS,
        "scores": {
            item.name: {name: round(float(x[i]), 3) for name, x in scores.items()}
            for i, item in enumerate(items)
        },
    }


def _scores(name: str, predict: Predictor, items: Sequence[RatedItem]) -> Array:
    if len(items) < FEWEST_PICTURES:
        raise ValueError(
            f"{len(items)} rated pictures: {FEWEST_PICTURES} are the fewest to judge on"
        )
    found = np.asarray(predict([item.path for item in items]), np.float64)
    if found.shape != (len(items),) or not np.isfinite(found).all():
        raise ValueError(
            f"{name} gave scores of shape {found.shape} for {len(items)} pictures, or one that is "
            "no finite number"
        )
    return found


def _by_degradation(
    items: Sequence[RatedItem], scores: Array, mos: Array, settings: Mapping[str, int]
) -> dict[str, Any]:
    kinds = [item.degradation for item in items]
    if len(set(kinds)) == 1:
        return {}
    groups = by_group(scores, mos, kinds, **settings)
    return {kind or "none": as_json(found) for kind, found in groups.items()}


def _too_few(items: Sequence[RatedItem]) -> dict[str, int]:
    """Degradations that are left out, with their number of pictures."""
    counts = Counter(item.degradation or "none" for item in items)
    return {kind: n for kind, n in sorted(counts.items()) if n < FEWEST_PICTURES}


def _ladders(
    items: Sequence[RatedItem], scores: Array, left_out: Collection[str]
) -> list[dict[str, Any]]:
    rungs = [
        Rung(item.content, item.degradation, item.level, float(score))
        for item, score in zip(items, scores, strict=True)
        if item.level is not None
    ]
    return [rounded(asdict(row)) for row in ladder_order(rungs, left_out=left_out)]


def as_json(found: Agreement) -> dict[str, Any]:
    """An agreement as JSON, with four digits."""
    return rounded(asdict(found))


def rounded(value: Any) -> Any:
    """JSON of four digits; of parameters six significant ones."""
    if isinstance(value, float):
        if not math.isfinite(value):
            return None
        return round(value, _DIGITS)
    if isinstance(value, dict):
        return {k: _parameters(v) if k == "parameters" else rounded(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(v) for v in value]
    return value


def _parameters(values: Sequence[float]) -> list[float]:
    return [float(f"{value:.6g}") for value in values]
