"""Students and factorization: their files, their calibration data, their fine-tuning.

Only commands import this module, as it joins training to compression.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dgiqa_stream.errors import ModelError
from dgiqa_stream.preprocess import ViewSpec
from distill.data.loader import PictureSet, Views, random_look, read_ahead, stack, views_of
from distill.models.student import Student, load_student, trunk_of
from distill.optimising import learning_rate_share, relative_rates
from distill.say import say
from quant.low_rank.checkpoint import fill_factored_, read_factored_about, read_tensors
from quant.low_rank.config import DataConfig, FineTuneConfig

Pair = tuple[Tensor, Tensor]
"""The two views of some pictures."""
_LARGEST_GRADIENT = 5.0
_SAY_EVERY = 10


def open_student(path: Path) -> tuple[Student, list[dict[str, Any]]]:
    """A trained student, whole or factored, its BatchNorms folded, and the steps after training.

    Raises :class:`ModelError` where the file holds none.
    """
    if path.suffix != ".safetensors":
        return load_student(path), []
    about, tensors = read_factored_about(path), read_tensors(path)
    whole = {n: torch.empty(shape, device="meta") for n, shape in about.whole_shapes.items()}
    try:
        student = Student(trunk=trunk_of({**tensors, **whole}))
    except (KeyError, IndexError, TypeError, ValueError) as exc:
        raise ModelError(f"{path.name} does not hold a student's weights: no {exc}") from exc
    fill_factored_(student, tensors, about, path)
    return student.eval(), about.history


def shapes_of(student: Student, names: Iterable[str]) -> dict[str, tuple[int, ...]]:
    """Shapes of the weights of some layers, for a file that holds their factors."""
    state = student.state_dict()
    return {f"{name}.weight": tuple(state[f"{name}.weight"].shape) for name in names}


def calibration_pairs(
    pictures: PictureSet, views: Sequence[ViewSpec], config: DataConfig
) -> list[Pair]:
    """A seeded draw of training pictures as they are served, in batches.

    Raises ``ValueError`` where there are none.
    """
    records = [r for r in pictures.records if r.split == "train"]
    if not records:
        raise ValueError(f"{pictures.folder} holds no training pictures to calibrate on")
    rng = np.random.default_rng(config.seed)
    count = min(config.num_pictures, len(records))
    chosen = [records[i] for i in rng.choice(len(records), count, replace=False)]
    cuts = [views_of(pictures.planes(r), views, None) for r in chosen]
    size = config.batch
    return [_tensors(stack(cuts[i : i + size])) for i in range(0, len(cuts), size)]


def fine_tune_(
    student: Student,
    teacher: Student,
    pictures: PictureSet,
    views: Sequence[ViewSpec],
    config: FineTuneConfig,
) -> None:
    """Distil the whole student into the factored one: logits and standardised features.

    Raises :class:`ModelError` where the loss is no longer a number.
    """
    teacher.eval().requires_grad_(False)
    student.eval()  # BatchNorms are folded, and there is no dropout against a teacher of one's own
    optimiser = torch.optim.AdamW(relative_rates(student, config.rate), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda s: learning_rate_share(s, config.num_steps, config.num_steps // 10)
    )
    for step, pair in enumerate(_looks(pictures, views, config)):
        with torch.no_grad():
            wanted = teacher.describe(*pair)
        told = student.describe(*pair)
        of_features = F.mse_loss(told.features, wanted.features)
        loss = F.mse_loss(told.logits, wanted.logits) + config.feature_weight * of_features
        if not math.isfinite(loss.item()):
            raise ModelError(f"the loss became {loss.item()} at step {step}: lower fine_tune.rate")
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), _LARGEST_GRADIENT)
        optimiser.step()
        schedule.step()
        if step % _SAY_EVERY == 0:
            say(f"step {step}/{config.num_steps}  loss {loss.item():.4f}")


def _looks(
    pictures: PictureSet, views: Sequence[ViewSpec], config: FineTuneConfig
) -> Iterator[Pair]:
    """Batches of training pictures at random looks, read ahead; the same for the same seed."""
    records = [r for r in pictures.records if r.split == "train"]
    fragments = next(v for v in views if v.kind == "fragments")

    def batch(step: int) -> Views:
        rng = np.random.default_rng([config.seed, step])
        chosen = [records[i] for i in rng.integers(len(records), size=config.batch)]
        looks = [random_look(rng, config.smallest_crop, fragments) for _ in chosen]
        pairs = zip(chosen, looks, strict=True)
        return stack([views_of(pictures.planes(r), views, look) for r, look in pairs])

    return map(_tensors, read_ahead(batch, 0, config.num_steps))


def _tensors(views: Views) -> Pair:
    return torch.from_numpy(views["whole"]), torch.from_numpy(views["fragments"])
