"""Fitting a teacher to human ratings: resumable at any step, the same result as if never killed.

On a CPU that is bit for bit; on a GPU some of torch's gradients are sums in no fixed order.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import msgspec
import torch
from torch import Tensor, nn

from dgiqa_stream.correlation import plcc, srcc
from dgiqa_stream.errors import ConfigError, SourceError
from distill.data.depth import DepthProvider, Map, Rgb
from distill.data.loader import read_ahead
from distill.data.shards import write_json
from distill.models.qfm import QfmRegulariser
from distill.models.teacher_file import Teacher, save_teacher
from distill.optimising import Averaged, learning_rate_share
from distill.run_folder import CHECKPOINT, LOG, VALIDATION, RunFolder
from distill.say import say
from distill.teacher_score import GridProtocol, score_picture, torch_device
from distill.teachers.pictures import CropLoader, Crops, PictureSet
from distill.teachers.recipe import DgiqaModel, TeacherRecipe
from distill.teachers.training import (
    Semantics,
    losses_of,
    make_regulariser,
    make_teacher,
    parameter_groups,
    set_training_,
)

TEACHER, RESULT = "teacher.safetensors", "teacher.json"
LOG_EVERY = 10
_FEWEST = 2


@dataclass(frozen=True, slots=True)
class Taught:
    """The best teacher of a run."""

    path: Path
    """Its safetensors: for ``open_teacher`` and ``dgiqa-distill score --teacher``."""
    srcc: float
    """On the validation pictures, scored as they are served; -1 where it was not a number."""
    plcc: float
    step: int


def teach(
    recipe: TeacherRecipe,
    pictures: PictureSet,
    run: Path,
    *,
    depth: DepthProvider | None,
    backbone: Path | None = None,
    vit: Path | None = None,
    device: str = "auto",
    num_steps: int | None = None,
    workers: int = 1,
) -> Taught:
    """Fit a teacher; returns the weights that agreed best with the validation pictures' MOS.

    Args:
        pictures: training and validation pictures with their labels.
        run: folder that receives ``checkpoint.pt`` (to resume), ``teacher.safetensors`` (the best,
            averaged weights), ``teacher.json``, ``log.csv`` and ``validation.csv``.
        depth: of DGIQA's depth maps; a GlintIQA reads none.
        backbone: weights of the pyramids, ``vit`` of a GlintIQA's ViT; random without.
        num_steps: stop early, for trials; the rates' schedule ends there.

    Raises :class:`ConfigError` where data and recipe do not fit, or the run was begun otherwise,
    :class:`ModelError` for weights that do not fit, and ``FloatingPointError`` where a loss or
    gradient is no longer a number.
    """
    is_dgiqa = isinstance(recipe.model, DgiqaModel)
    if is_dgiqa and depth is None:
        raise ConfigError("DGIQA learns with depth maps: give a depth provider")
    fit = _Teaching(
        recipe, pictures, RunFolder(run), depth if is_dgiqa else None, num_steps, workers
    )
    try:
        fit.begin(torch_device(device), backbone, vit)
        return fit.run()
    finally:
        fit.loader.close()


class _Teaching:
    """One run: its data, its model and optimiser, and how far it is."""

    def __init__(
        self,
        recipe: TeacherRecipe,
        pictures: PictureSet,
        files: RunFolder,
        depth: DepthProvider | None,
        num_steps: int | None,
        workers: int,
    ) -> None:
        self.recipe, self.config = recipe, recipe.train
        self.files, self.folder = files, files.folder
        self.pictures, self.depth = pictures, depth
        judged = [i for i, p in enumerate(pictures.pictures) if p.split == "validation"]
        self.judged = judged[: self.config.num_evaluated]
        if len(self.judged) < _FEWEST:
            raise ConfigError(
                f"{len(self.judged)} validation pictures choose nothing, 2 is the least: raise "
                "data.num_validation"
            )
        self.loader = CropLoader(
            pictures, depth, batch=self.config.batch, seed=self.config.seed, workers=workers
        )
        per_epoch = max(1, self.loader.batches_per_epoch // self.config.accumulate)
        self.validate_every = self.config.validate_every or per_epoch
        self.num_steps = num_steps or self.config.num_steps or self.config.num_epochs * per_epoch
        self.first, self.best = 0, {"srcc": -2.0, "plcc": -2.0, "step": 0}

    def begin(self, device: torch.device, backbone: Path | None, vit: Path | None) -> None:
        """Make model and optimiser: where the last checkpoint stopped, or from the start."""
        torch.manual_seed(self.config.seed)
        self.device = device
        self.model: Teacher = make_teacher(self.recipe, backbone=backbone, vit=vit).to(device)
        set_training_(self.model, frozen=self.config.pyramid_rate == 0)
        groups = parameter_groups(self.model, self.config)
        self.moving: list[nn.Parameter] = [p for group in groups for p in group["params"]]
        self.rates = [group["lr"] for group in groups]
        self.optimiser = torch.optim.AdamW(groups, weight_decay=self.config.weight_decay)
        self.averaged = Averaged(self.model, self.config.ema_decay)
        self.qfm: tuple[QfmRegulariser, Semantics] | None = None
        if self.recipe.qfm.is_on:
            self.qfm = make_regulariser(self.model, self.recipe.qfm), Semantics(self.model)
        if self.files.has_checkpoint():
            self._restore()

    def _identity(self) -> str:
        """What must be the same for a run to go on."""
        labels = [(p.name, p.split, p.quality, p.weight) for p in self.pictures.pictures]
        depth = self.depth.identity if self.depth else ""
        about = [msgspec.to_builtins(self.recipe), self.num_steps, depth, labels]
        return hashlib.sha256(msgspec.json.encode(about)).hexdigest()

    def _restore(self) -> None:
        state = self.files.load_checkpoint()
        if state["identity"] != self._identity():
            raise ConfigError(
                f"{self.folder} was begun with another recipe, depth, number of steps or other "
                "pictures: give the same, or another --run folder"
            )
        self.model.load_state_dict(state["model"])
        self.averaged.model.load_state_dict(state["averaged"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.first, self.best = state["step"], state["best"]
        say(f"going on after step {self.first}")

    def _save_checkpoint(self, step: int) -> None:
        state = {
            "identity": self._identity(),
            "model": self.model.state_dict(),
            "averaged": self.averaged.model.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "step": step,
            "best": self.best,
        }
        self.files.save(state, CHECKPOINT)

    def run(self) -> Taught:
        """Every step that is left."""
        self.files.forget_after(self.first)
        began = time.monotonic()
        for step, batches in enumerate(self._batches(), self.first):
            values = self._step(step, batches)
            done = step + 1
            is_last = done == self.num_steps
            if done % LOG_EVERY == 0 or is_last:
                self.files.log(LOG, {"step": done, **values})
                pace = (time.monotonic() - began) / (done - self.first)
                say(f"step {done}/{self.num_steps}  loss {values['loss']:.4f}  {pace:.2f} s a step")
            if done % self.validate_every == 0 or is_last:
                self._validate(done)
            if done % self.config.checkpoint_every == 0 or is_last:
                self._save_checkpoint(done)
        path = self.folder / TEACHER
        return Taught(path, self.best["srcc"], self.best["plcc"], int(self.best["step"]))

    def _batches(self) -> Iterator[list[Crops]]:
        """For each step that is left, its batches."""
        each = self.config.accumulate
        found = read_ahead(self.loader, self.first * each, self.num_steps * each, depth=3)
        waiting: list[Crops] = []
        for crops in found:
            waiting.append(crops)
            if len(waiting) == each:
                yield waiting
                waiting = []

    def _step(self, step: int, batches: list[Crops]) -> dict[str, float]:
        torch.manual_seed(self.config.seed + 1 + step)  # dropout and noise: same after a resume
        share = learning_rate_share(step, self.num_steps, self.config.warmup_steps)
        for group, rate in zip(self.optimiser.param_groups, self.rates, strict=True):
            group["lr"] = rate * share
        self.optimiser.zero_grad()
        values: dict[str, float] = {}
        for crops in batches:
            losses = losses_of(self.model, crops.to(self.device), self.recipe, self.qfm)
            (losses["loss"] / len(batches)).backward()
            for name, loss in losses.items():
                values[name] = values.get(name, 0.0) + loss.item() / len(batches)
        norm = nn.utils.clip_grad_norm_(self.moving, self.config.largest_gradient)
        self._refuse_nan(step, values["loss"], norm)
        self.optimiser.step()
        self.averaged.update(self.model, step)
        return values

    def _refuse_nan(self, step: int, loss: float, norm: Tensor) -> None:
        if not (math.isfinite(loss) and bool(torch.isfinite(norm))):
            raise FloatingPointError(
                f"the loss became {loss} and its gradient {norm.item()} at step {step}: lower "
                'head_rate or pyramid_rate, or set precision = "float32", and train in another '
                "--run folder (a checkpoint keeps what it began with)"
            )

    def _validate(self, done: int) -> None:
        found = self.agreement(self.averaged.model)
        self.files.log(VALIDATION, {"step": done, **found})
        say(f"step {done}: validation SRCC {found['srcc']:.4f}, PLCC {found['plcc']:.4f}")
        # not a number where all scores are one
        best = {name: v if math.isfinite(v) else -1.0 for name, v in found.items()}
        if best["srcc"] > self.best["srcc"]:
            self.best = {**best, "step": done}
            self._save_best()

    def _save_best(self) -> None:
        depth = self.depth.identity if self.depth else ""
        version = self.recipe.version
        save_teacher(self.averaged.model, self.folder / TEACHER, version=version, depth=depth)
        taught = Taught(Path(TEACHER), self.best["srcc"], self.best["plcc"], int(self.best["step"]))
        about = {**asdict(taught), "path": TEACHER, "depth": depth}
        about["recipe"] = msgspec.to_builtins(self.recipe)
        write_json(self.folder / RESULT, about)

    def agreement(self, model: Teacher) -> dict[str, float]:
        """SRCC and PLCC to MOS on the validation pictures, scored as a user's pictures are."""
        side = math.isqrt(self.config.evaluation_crops)
        protocol = GridProtocol(side, side)

        def read(number: int) -> tuple[int, Rgb, Map] | None:
            index = self.judged[number]
            rgb = self.loader.read(index)
            if rgb is None:
                return None
            if self.depth is None:
                return index, rgb, rgb[..., 0]  # not read
            return index, rgb, self.depth(rgb, path=self.pictures.pictures[index].name)

        scores, mos = [], []
        for found in read_ahead(read, 0, len(self.judged)):
            if found is not None:
                index, rgb, near = found
                scores.append(score_picture(model, rgb, near, protocol=protocol).score)
                mos.append(self.pictures.pictures[index].quality)
        if len(scores) < _FEWEST:
            raise SourceError(f"{len(scores)} validation pictures can be read: repair the set")
        return {"srcc": srcc(scores, mos), "plcc": plcc(scores, mos)}
