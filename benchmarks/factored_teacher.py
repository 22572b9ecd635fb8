"""What a factored teacher loses in agreement with people, rank by rank, before and after tuning.

    python benchmarks/factored_teacher.py --packs PACKS --backbone NPZ --cache DIR [--steps 300]

DGIQA's bridges, Depth-CAR and head are taught on frozen MobileNetV2 pyramids, as in
``configs/distill/teacher-mobilenetv2.toml`` (half of the published widths, or what ``--narrower``
leaves of it), for so many steps on
one crop each of some training pictures. Then the layers that ``configs/quant/dgiqa-light.toml``
names are factored, at its rank times the width over the published 960 and at others, BatchNorms
are estimated again, and a short distillation from the whole teacher follows. SRCC is over
validation pictures, one middle crop each; its loss has a paired bootstrap interval over them. The
official test part is not read. Writes ``benchmarks/results/factored_teacher.json``, and the whole
teacher to ``--keep``, for ``dgiqa-distill score`` and ``compression.py --teacher``.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import _bench as bench
import msgspec
import numpy as np
import torch
import torch.nn.functional as F
from _teacher_maps import Kept, Maps, teacher_maps
from numpy.typing import NDArray
from torch import Tensor, nn

from dgiqa_stream.correlation import srcc
from distill.data.depth import ClassicalDepth
from distill.evaluation.agreement import compare, estimate
from distill.models.backbones import MobileNetPyramid, load_mobilenetv2_
from distill.models.official import open_teacher
from distill.models.teacher import Dgiqa, TeacherSpec
from distill.models.teacher_file import save_teacher
from distill.optimising import Averaged, learning_rate_share
from distill.process import use_threads
from distill.teachers.recipe import load_teacher_recipe
from distill.teachers.training import weighted_plcc_loss
from quant.low_rank.config import LowRankConfig, load_low_rank_recipe
from quant.low_rank.factorize import factorize_
from quant.low_rank.plan import planned_size
from quant.low_rank.positions import read_positions_only_

CONFIGS = bench.HERE.parent / "configs"
PUBLISHED_WIDTH = 960
SHARES = (1.5, 1.0, 0.75, 0.5)
"""Of the plan's rank."""
_TUNING_RATE = 2e-4
_LARGEST_GRADIENT = 1.0
_SAY_EVERY = 20


def new_teacher(spec: TeacherSpec) -> Dgiqa:
    """On kept maps, computing only what its reduced maps are read from, as in evaluation."""
    return on_kept_maps(Dgiqa(spec))


def on_kept_maps(model: Dgiqa) -> Dgiqa:
    """With stand-ins for its pyramids, in place."""
    channels = model.backbone.channels
    model.backbone, model.depth_backbone = Kept(channels), Kept(channels)
    read_positions_only_(model)
    return model


def narrowed(spec: TeacherSpec, times: int) -> TeacherSpec:
    """The recipe's shape with all widths divided, heads of the same number of channels."""
    return replace(
        spec,
        bridge_channels=tuple(c // times for c in spec.bridge_channels),
        num_heads=max(1, spec.num_heads // times),
        pooled_channels=spec.pooled_channels // times,
    )


def set_training_(model: nn.Module) -> None:
    """Training mode, but early bridges go on computing what is read alone."""
    model.train()
    for name in ("tcb1", "tcb2", "tcb1_depth", "tcb2_depth"):
        model.get_submodule(name).training = False


def taught(train: Maps, spec: TeacherSpec, fit: Any, num_steps: int) -> Dgiqa:
    """Fitted to MOS by the recipe's losses and rates; the averaged weights."""
    torch.manual_seed(fit.seed)
    model = new_teacher(spec)
    set_training_(model)
    averaged = Averaged(model, fit.ema_decay)
    optimiser = torch.optim.AdamW(model.parameters(), fit.head_rate, weight_decay=fit.weight_decay)
    warmup = max(1, num_steps // 10)
    for step in range(num_steps):
        for group in optimiser.param_groups:
            group["lr"] = fit.head_rate * learning_rate_share(step, num_steps, warmup)
        rows = drawn(len(train.mos), fit.batch, step, fit.seed)
        quality = torch.from_numpy(train.mos[rows]).float()
        score = torch.sigmoid(logits_and_features(model, *train.rows(rows))[0])
        correlated = weighted_plcc_loss(score, quality, torch.ones_like(quality))
        moved_(optimiser, model, F.mse_loss(score, quality) + fit.plcc_weight * correlated)
        averaged.update(model, step)
        if step % _SAY_EVERY == 0:
            bench.say(f"step {step} of {num_steps}: PLCC loss {correlated.item():.3f}")
    return averaged.model


def drawn(count: int, batch: int, step: int, seed: int) -> NDArray[np.int64]:
    """Rows of a step: every picture once in each pass."""
    per_pass = count // batch
    order = np.random.default_rng([seed, step // per_pass]).permutation(count)
    return order[step % per_pass * batch :][:batch]


def logits_and_features(model: Dgiqa, picture: Tensor, depth: Tensor) -> tuple[Tensor, Tensor]:
    """Logits (B,) and pooled features (B, D), by bfloat16 but for the last layer."""
    with torch.autocast("cpu", torch.bfloat16):
        pooled = model.describe(picture, depth).pooled
    pooled = pooled.float()
    return model.fc(pooled).squeeze(1), pooled


def moved_(optimiser: torch.optim.Optimizer, model: nn.Module, loss: Tensor) -> None:
    """One step."""
    optimiser.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), _LARGEST_GRADIENT)
    optimiser.step()


@torch.no_grad()
def scores_of(model: Dgiqa, maps: Maps) -> NDArray[np.float64]:
    """(N,) on 0..1, in float32."""
    found = [
        model.eval()(*maps.rows(rows)).numpy()
        for rows in np.array_split(np.arange(len(maps.mos)), max(1, len(maps.mos) // 32))
    ]
    return np.concatenate(found).astype(np.float64)


def tuned(model: Dgiqa, whole: Dgiqa, train: Maps, num_steps: int, batch: int) -> Dgiqa:
    """Distilled from the whole one: logits and standardised pooled features, no dropout."""
    made = copy.deepcopy(model).eval()
    optimiser = torch.optim.AdamW(made.parameters(), _TUNING_RATE, weight_decay=0.0)
    for step in range(num_steps):
        for group in optimiser.param_groups:
            group["lr"] = _TUNING_RATE * learning_rate_share(step, num_steps, num_steps // 10)
        rows = train.rows(drawn(len(train.mos), batch, step, 2))
        with torch.no_grad():
            wanted, features = logits_and_features(whole, *rows)
        told, found = logits_and_features(made, *rows)
        spread = features.var(0).mean()
        loss = F.mse_loss(told, wanted) + F.mse_loss(found, features) / spread
        moved_(optimiser, made, loss)
    return made


def loss_of(found: NDArray[np.float64], was: NDArray[np.float64], mos: NDArray[np.float64]) -> Any:
    """SRCC, and how it differs from the whole teacher's, with 95 % intervals over pictures."""
    return {
        "srcc": rounded(estimate(srcc, found, mos)),
        "srcc_difference": rounded(compare(found, was, mos).srcc),
        "srcc_with_whole": round(srcc(found, was), 4),
        "mean_points": round(float(100 * np.abs(found - was).mean()), 3),
    }


def rounded(value: Any) -> dict[str, float]:
    """An estimate for JSON."""
    return {name: round(number, 4) for name, number in asdict(value).items()}


def factored(
    whole: Dgiqa,
    was: NDArray[np.float64],
    config: LowRankConfig,
    train: Maps,
    validation: Maps,
    arguments: argparse.Namespace,
) -> dict[str, Any]:
    """One rank: what it saves, and what it loses before and after tuning."""
    data = load_low_rank_recipe(CONFIGS / "quant" / "dgiqa-light.toml").calibration
    chosen = np.random.default_rng(data.seed).permutation(len(train.mos))[: data.num_pictures]
    batches = [train.rows(rows) for rows in np.array_split(chosen, len(chosen) // data.batch)]
    model = copy.deepcopy(whole)
    report = factorize_(model, config, batches)
    published_rank = config.rank * PUBLISHED_WIDTH // whole.spec.width
    with torch.device("meta"):
        published = Dgiqa(TeacherSpec(arguments.published_backbone))
    whole_size, size = planned_size(published, msgspec.structs.replace(config, rank=published_rank))
    found = {
        "rank": config.rank,
        "published_rank": published_rank,
        "num_layers": len(report.ranks),
        "head_parameters": [report.num_parameters_before, report.num_parameters_after],
        "published_parameters": [whole_size, size],
        "factored": loss_of(scores_of(model, validation), was, validation.mos),
    }
    if arguments.tuning_steps:
        made = tuned(model, whole, train, arguments.tuning_steps, arguments.batch)
        found["tuned"] = loss_of(scores_of(made, validation), was, validation.mos)
    return found


def keep(model: Dgiqa, backbone: Path, path: Path) -> None:
    """Write the whole teacher with its pyramids, as ``teach`` does."""
    whole = Dgiqa(model.spec)
    for pyramid in (whole.backbone, whole.depth_backbone):
        assert isinstance(pyramid, MobileNetPyramid)
        load_mobilenetv2_(pyramid, backbone)
    whole.load_state_dict({**whole.state_dict(), **model.state_dict()})
    save_teacher(whole, path, version="0.0.0", depth=ClassicalDepth().identity)


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Teach, factor at each rank, judge."""
    recipe = load_teacher_recipe(CONFIGS / "distill" / "teacher-mobilenetv2.toml")
    light = load_low_rank_recipe(CONFIGS / "quant" / "dgiqa-light.toml").low_rank
    train, validation = teacher_maps(
        arguments.packs / "rated",
        arguments.backbone,
        arguments.cache,
        num_train=arguments.num_train,
        num_validation=arguments.num_validation,
    )
    begin = time.monotonic()
    spec = narrowed(recipe.model.spec, arguments.narrower)
    kept = arguments.keep
    if kept is not None and kept.is_file():
        whole = on_kept_maps(open_teacher(kept).model)
    else:
        whole = taught(train, spec, recipe.train, arguments.steps)
    minutes = (time.monotonic() - begin) / 60
    if kept is not None and not kept.is_file():
        keep(whole, arguments.backbone, kept)
    was = scores_of(whole, validation)
    agreed = estimate(srcc, was, validation.mos)
    bench.say(f"the whole teacher: SRCC {agreed.value:.4f}, taught in {minutes:.1f} minutes")
    planned = light.rank * spec.width / PUBLISHED_WIDTH
    rows = []
    for share in arguments.shares:
        rank = max(light.multiple, round(share * planned / light.multiple) * light.multiple)
        config = msgspec.structs.replace(light, rank=rank)
        rows.append(factored(whole, was, config, train, validation, arguments))
        bench.say(str(rows[-1]))
    return {
        "teacher": {
            "recipe": "configs/distill/teacher-mobilenetv2.toml",
            "width": spec.width,
            "depth": ClassicalDepth().identity,
            "num_train": len(train.mos),
            "num_validation": len(validation.mos),
            "num_steps": arguments.steps,
            "minutes": round(minutes, 1),
            "srcc": rounded(agreed),
        },
        "tuning_steps": arguments.tuning_steps,
        "planned_rank": round(planned),
        "ranks": rows,
    }


def main(words: Sequence[str] | None = None) -> None:
    """Read the command line, measure, write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--packs", type=Path, required=True, help="Of `dgiqa-distill data`.")
    parser.add_argument("--backbone", type=Path, required=True, help="MobileNetV2, .npz.")
    parser.add_argument("--cache", type=Path, required=True, help="Keeps the frozen maps.")
    parser.add_argument("--keep", type=Path, help="The whole teacher: written, or read.")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--narrower", type=int, default=1, help="Divides the recipe's widths.")
    parser.add_argument("--tuning-steps", type=int, default=60)
    parser.add_argument("--num-train", type=int, default=2000)
    parser.add_argument("--num-validation", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=32, help="Of the tuning.")
    parser.add_argument("--shares", type=float, nargs="+", default=SHARES)
    parser.add_argument("--published-backbone", default=TeacherSpec().backbone)
    parser.add_argument("--threads", type=int, default=1)
    output = bench.RESULTS / "factored_teacher.json"
    parser.add_argument("-o", "--output", type=Path, default=output)
    arguments = parser.parse_args(words)
    use_threads(arguments.threads)
    bench.write("factored_teacher.py", measure(arguments), arguments.output, "torch", "timm")


if __name__ == "__main__":
    main()
