"""Small comparisons of the teacher's parts and its relatives on frozen features.

BIQ2021's training part alone: a part of it trains, pictures held back from it judge, the official
test part is never read. The backbone is frozen and computed once (:mod:`.features`), depth is the
classical stand-in, and the widths are an eighth of the published ones: what is compared is the
parts with each other, not with any published figure.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import numpy as np
import torch

from dgiqa_stream.correlation import plcc, srcc
from distill.ablations.features import Seen, depth_of_nothing
from distill.ablations.nets import (
    DepthCar,
    Fitted,
    Integration,
    Noise,
    PlainHead,
    Pooling,
    Targets,
    agreement,
    all_targets,
    crop_scores,
    fit,
    pooled_of,
)
from distill.ablations.settings import Settings
from distill.data.content_similarity import transfer_labels
from distill.models.qfm import pseudo_labels, sensitivity
from distill.say import say

Figures = dict[str, float]
Comparison = dict[str, list[Figures]]
"""Variant to its figures, one for each seed."""


def depth(train: Seen, validation: Seen, settings: Settings) -> Comparison:
    """DGIQA's fusion with depth, with a constant map, with the picture asking itself; no fusion."""
    nothing = depth_of_nothing(settings)
    variants: dict[str, Callable[[], Pooling]] = {
        "depth": lambda: DepthCar("map", nothing),
        "constant depth": lambda: DepthCar("constant", nothing),
        "picture asks itself": lambda: DepthCar("picture", nothing),
        "plain pooled head": PlainHead,
    }
    return _compare(variants, train, validation, settings)


def integration(train: Seen, validation: Seen, settings: Settings) -> Comparison:
    """GlintIQA's progressive integration against plain concatenation and local maps alone.

    No weights of a ViT are at hand: the last four bottlenecks stand where its blocks would.
    """
    variants: dict[str, Callable[[], Pooling]] = {
        "progressive": lambda: Integration("progressive"),
        "concatenated": lambda: Integration("concatenated"),
        "local maps alone": lambda: Integration("local"),
    }
    return _compare(variants, train, validation, settings)


def qfm(train: Seen, validation: Seen, settings: Settings) -> Comparison:
    """Training against semantic noise, on DGIQA's fusion with depth."""
    nothing = depth_of_nothing(settings)
    variants = {
        "none": None,
        "insensitivity 0.5": Noise(0.5),
        "insensitivity 0.5, gated": Noise(0.5, gated=True),
        "insensitivity 0.5, contrast 0.05": Noise(0.5, 0.05),
    }
    found: Comparison = {name: [] for name in variants}
    for seed in range(settings.num_seeds):
        for name, noise in variants.items():
            fitted = fit(
                lambda: DepthCar("map", nothing),
                train, all_targets(train), settings, seed=seed, noise=noise,
            )  # fmt: skip
            figures = agreement(fitted, validation)
            figures["sensitivity"] = _sensitivity(fitted, validation)
            told(found, name, figures)
    return found


def _sensitivity(fitted: Fitted, seen: Seen) -> float:
    return sensitivity(
        pooled_of(fitted, seen)[:, 0],
        seen.mos,
        lambda f: torch.sigmoid(fitted.head(f)),
        semantics=seen.semantics()[:, 0],
    )


def transfer(train: Seen, validation: Seen, settings: Settings) -> Comparison:
    """Half of the ratings hidden, taken from similar content: ridge regression with and without."""
    x, y = train.pooled().mean(1).numpy(), train.mos.numpy()
    found: Comparison = {}
    for seed in range(settings.num_seeds):
        order = np.random.default_rng([settings.seed, seed]).permutation(len(y))
        known, hidden = np.split(order, 2)
        cases = {"rated half": (known, y[known], np.ones(len(known)))}
        for number in (1, 8):
            made = transfer_labels(x[hidden], x[known], y[known], num_neighbours=number)
            confidence = np.clip(made.similarity, 0, 1)
            for name, weight in (("by similarity", confidence), ("at full weight", 1.0)):
                cases[f"and {number} neighbours, {name}"] = (
                    order,
                    np.concatenate([y[known], made.labels]),
                    np.concatenate([np.ones(len(known)), weight * np.ones(len(hidden))]),
                )
            labels = {"srcc": srcc(made.labels, y[hidden]), "plcc": plcc(made.labels, y[hidden])}
            told(found, f"labels of {number} neighbours themselves", labels)
        cases["all ratings"] = (order, y[order], np.ones(len(y)))
        for name, (rows, labels_of, weight) in cases.items():
            told(found, name, _ridge(x[rows], labels_of, weight, validation))
    return found


def _ridge(x: Any, y: Any, weight: Any, validation: Seen) -> Figures:
    """Weighted ridge regression, a penalty of a third of the rows on standardised features."""
    mean, deviation = x.mean(0), x.std(0) + 1e-6
    rows = (x - mean) / deviation
    centre = np.average(y, weights=weight)
    weighted = rows * weight[:, None]
    gram = weighted.T @ rows + len(rows) / 3 * np.eye(rows.shape[1])
    solved = np.linalg.solve(gram, weighted.T @ (y - centre))
    scores = (validation.pooled().mean(1).numpy() - mean) / deviation @ solved + centre
    mos = validation.mos.numpy()
    return {"srcc": srcc(scores, mos), "plcc": plcc(scores, mos)}


def expansion(train: Seen, validation: Seen, settings: Settings) -> Comparison:
    """A teacher on a part of the ratings labels the other pictures for a student on all of them.

    The teacher is DGIQA's fusion with depth, the student a plain head. A quarter is rated.
    """
    nothing = depth_of_nothing(settings)
    found: Comparison = {}
    for seed in range(settings.num_seeds):
        order = torch.randperm(len(train.mos), generator=torch.Generator().manual_seed(1000 + seed))
        rated, unrated = order[: len(order) // 4], order[len(order) // 4 :]
        human = Targets(rated, train.mos[rated], torch.ones(len(rated)))
        teacher = fit(lambda: DepthCar("map", nothing), train, human, settings, seed=seed)
        told(found, "teacher on a quarter", agreement(teacher, validation))
        pseudo = pseudo_labels(crop_scores(teacher, train, unrated))
        # as many steps for every student: more labels must not mean more training
        longer = replace(settings, num_epochs=4 * settings.num_epochs)
        cases = {"student on a quarter": (human, longer)}
        for name, weights in (("weighted", pseudo.weights), ("unweighted", None)):
            extra = torch.ones_like(pseudo.weights) if weights is None else weights
            joined = Targets(
                torch.cat([rated, unrated]),
                torch.cat([human.quality, pseudo.quality]),
                torch.cat([human.weight, extra]),
            )
            cases[f"student, expanded, {name}"] = (joined, settings)
        cases["student on all ratings"] = (all_targets(train), settings)
        for name, (targets, chosen) in cases.items():
            fitted = fit(PlainHead, train, targets, chosen, seed=100 + seed)
            told(found, name, agreement(fitted, validation))
    return found


def _compare(
    variants: Mapping[str, Callable[[], Pooling]],
    train: Seen,
    validation: Seen,
    settings: Settings,
) -> Comparison:
    found: Comparison = {}
    for seed in range(settings.num_seeds):
        for name, make in variants.items():
            fitted = fit(make, train, all_targets(train), settings, seed=seed)
            figures = agreement(fitted, validation)
            figures["num_parameters"] = sum(p.numel() for p in make().parameters())
            told(found, name, figures)
    return found


def told(found: Comparison, name: str, figures: Figures) -> None:
    """Keep a variant's figures of one more seed, and say them."""
    found.setdefault(name, []).append(figures)
    say(f"{name}: " + ", ".join(f"{k} {v:.4g}" for k, v in figures.items()))


ON_FROZEN_FEATURES: Mapping[str, Callable[[Seen, Seen, Settings], Comparison]] = MappingProxyType(
    {
        "depth": depth,
        "qfm": qfm,
        "integration": integration,
        "transfer": transfer,
        "expansion": expansion,
    }
)
