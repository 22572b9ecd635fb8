"""The head's first fit, on features of a trunk that does not move yet."""

from __future__ import annotations

import numpy as np
import torch

from dgiqa_stream.errors import SourceError
from distill.compute import Compute
from distill.data.loader import AnyRecord, PictureSet, random_look
from distill.data.training_data import TrainingData
from distill.losses import score_loss
from distill.models.student import Student
from distill.recipe import Recipe
from distill.validating import mapped

_BATCH, _FEWEST = 100, 2


def fit_head_(
    model: Student, data: TrainingData, recipe: Recipe, *, compute: Compute | None = None
) -> None:
    """Fit the head on frozen features of training pictures, mirrored and not.

    To human ratings; where no picture has one, to the teacher's scores, else to pseudo-MOS.
    """
    config, where = recipe.train, compute or Compute()
    fragments = next(v for v in recipe.views if v.kind == "fragments")
    pictures, records, wanted = _targets(data)
    targets = torch.tensor(wanted, dtype=torch.float32)
    rng = np.random.default_rng([config.seed, 3])
    looks = {r.name: random_look(rng, 0.999, fragments) for r in records}
    x = mapped(model.features, pictures, records, recipe.views, compute=where, looks=looks)
    read = x.isfinite().all(1)
    x, targets = x[read], targets[read]
    if len(x) < _FEWEST:
        raise SourceError(
            f"{len(x)} training pictures in {pictures.folder} can be read: make them again"
        )
    model.feature_mean.copy_(x.mean(0))
    model.feature_std.copy_(x.std(0).clamp_min(1e-3))
    x, targets = x.to(where.device), targets.to(where.device)
    x = (x - model.feature_mean) / model.feature_std
    head = [*model.hidden.parameters(), *model.quality.parameters()]
    steps = config.head_epochs * max(1, len(x) // _BATCH)
    optimiser = torch.optim.AdamW(head, config.head_rate, weight_decay=config.weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    generator = torch.Generator().manual_seed(config.seed)
    for _ in range(steps):
        chosen = torch.randint(len(x), (_BATCH,), generator=generator).to(where.device)
        loss = score_loss(model.head(x[chosen]), targets[chosen])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()


def _targets(data: TrainingData) -> tuple[PictureSet, list[AnyRecord], list[float]]:
    rated = [r for r in data.rated.records if r.split == "train"]
    if rated:
        return data.rated, rated, [float(r.mos or 0.0) for r in rated]
    assert data.unrated is not None
    labels = data.labels
    known = [
        (r, value)
        for r in data.unrated.records
        if r.split == "train"
        and (value := labels.score(r.name) if labels else getattr(r, "pseudo_mos", None))
        is not None
    ]
    if not known:
        raise ValueError(f"{data.unrated.folder}: no training picture has any label")
    return data.unrated, [r for r, _ in known], [v for _, v in known]
