"""A teacher as it is trained: where its weights begin, what moves, what a step's loss is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dgiqa_stream.errors import ConfigError, ModelError
from distill.models.backbones import (
    MobileNetPyramid,
    load_mobilenetv2_,
)
from distill.models.glint import GlintIQA
from distill.models.official import read_backbone_weights
from distill.models.qfm import QfmRegulariser
from distill.models.teacher import Dgiqa
from distill.models.teacher_file import Teacher
from distill.teachers.pictures import Crops
from distill.teachers.recipe import DgiqaModel, FitConfig, GlintModel, QfmConfig, TeacherRecipe


def make_teacher(
    recipe: TeacherRecipe, *, backbone: Path | None = None, vit: Path | None = None
) -> Teacher:
    """The recipe's network on ImageNet weights, the rest random (by torch's generator).

    ``backbone`` are weights of the pyramids, or of the CNN of a GlintIQA, ``vit`` of its ViT: the
    ``.npz`` of MobileNetV2, else timm's state dict as ``.safetensors`` or ``.pth``. Raises
    :class:`ConfigError` where extractors would be frozen at random weights, :class:`ModelError`
    for weights that do not fit.
    """
    model = recipe.model
    given = [backbone] if isinstance(model, DgiqaModel) else [backbone, vit]
    if recipe.train.pyramid_rate == 0 and not model.pretrained and None in given:
        options = "--backbone" if len(given) == 1 else "--backbone and --vit"
        raise ConfigError(
            f"train.pyramid_rate 0 would freeze random weights: give {options}, or pretrained = "
            "true where timm can fetch them"
        )
    if isinstance(model, GlintModel):
        fetched = model.pretrained and None in given
        glint = GlintIQA(replace(model.config, pretrained=fetched))
        load_pyramid_(glint.local.cnn, backbone)
        load_pyramid_(glint.wide.vit, vit)
        return glint
    if vit is not None:
        raise ConfigError(f"{vit}: weights of a ViT are for the architecture glint")
    dgiqa = Dgiqa(model.spec, pretrained=model.pretrained and backbone is None)
    for pyramid in (dgiqa.backbone, dgiqa.depth_backbone):
        load_pyramid_(pyramid, backbone)
    return dgiqa


def load_pyramid_(net: nn.Module, weights: Path | None) -> None:
    """Fill an extractor from a file; None leaves it as it is.

    What the file has beyond the extractor (a classifier) is passed over. Raises
    :class:`ModelError` where the extractor needs what the file lacks.
    """
    if weights is None:
        return
    if isinstance(net, MobileNetPyramid):
        try:
            load_mobilenetv2_(net, weights)
        except ValueError as exc:
            raise ModelError(str(exc)) from exc
        return
    found, wanted = read_backbone_weights(weights), net.state_dict()
    lacking = [n for n, t in wanted.items() if n not in found or found[n].shape != t.shape]
    if lacking:
        raise ModelError(
            f"{weights.name} does not fit {type(net).__name__}: {len(lacking)} tensors are "
            f"missing or of another shape, first {lacking[0]}; give timm's weights of it"
        )
    net.load_state_dict({name: found[name] for name in wanted})


def extractors(teacher: Teacher) -> list[nn.Module]:
    """What came with ImageNet weights."""
    if isinstance(teacher, Dgiqa):
        return [teacher.backbone, teacher.depth_backbone]
    return [teacher.wide.vit, teacher.local.cnn]


def head_of(teacher: Teacher) -> Callable[[Tensor], Tensor]:
    """Pooled features (B, D) to logits (B,): the teacher's last layers."""
    if isinstance(teacher, Dgiqa):
        return lambda pooled: teacher.fc(pooled).squeeze(1)
    return teacher.head


def set_training_(teacher: Teacher, *, frozen: bool) -> None:
    """Training mode; extractors keep their statistics, and all else where they are frozen.

    Statistics of small batches are noisy, and those of ImageNet are what the weights expect.
    """
    teacher.train()
    for net in extractors(teacher):
        for module in net.modules():
            if frozen or isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        net.requires_grad_(not frozen)


def parameter_groups(teacher: Teacher, config: FitConfig) -> list[dict[str, Any]]:
    """What moves: extractors at their rate, unless frozen, and the rest at the head's."""
    slow = {id(p) for net in extractors(teacher) for p in net.parameters()}
    head = [p for p in teacher.parameters() if id(p) not in slow]
    groups: list[dict[str, Any]] = [{"params": head, "lr": config.head_rate}]
    if config.pyramid_rate > 0:
        moving = [p for p in teacher.parameters() if id(p) in slow]
        groups.append({"params": moving, "lr": config.pyramid_rate})
    return groups


class Semantics:
    """What the picture's extractor says last while the teacher looks: a mean over space (B, C).

    Pictures are matched by it. Hooked, so that the extractor runs once.
    """

    def __init__(self, teacher: Teacher) -> None:
        self._net = teacher.backbone if isinstance(teacher, Dgiqa) else teacher.local.cnn
        self._seen: list[Tensor] = []
        self._net.register_forward_hook(self._keep)

    def _keep(self, module: nn.Module, inputs: object, output: list[Tensor]) -> None:
        last = output[-1].detach()
        is_nhwc = getattr(module, "output_fmt", "NCHW") == "NHWC"
        self._seen.append(last.float().mean((1, 2) if is_nhwc else (2, 3)))

    def take(self) -> Tensor:
        """Of the last batch."""
        found = self._seen[-1]
        self._seen.clear()
        return found


def make_regulariser(teacher: Teacher, config: QfmConfig) -> QfmRegulariser:
    """Without a gate: the teacher's file holds no more than its architecture."""
    width = teacher.spec.pooled_channels if isinstance(teacher, Dgiqa) else teacher.wide.width
    return QfmRegulariser(
        width, tolerance=config.tolerance, most_noise=config.most_noise, gated=False
    )


_DISTANCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mse": lambda logits, y: (torch.sigmoid(logits) - y).square(),
    "l1": lambda logits, y: (torch.sigmoid(logits) - y).abs(),
    "bce": lambda logits, y: F.binary_cross_entropy_with_logits(logits, y, reduction="none"),
}


def weighted_plcc_loss(scores: Tensor, quality: Tensor, weight: Tensor) -> Tensor:
    """(1 - PLCC) / 2 of (B,) scores and quality, moments weighted; 0 on one rising line."""
    share = weight / weight.sum().clamp_min(1e-6)
    s, y = scores - (share * scores).sum(), quality - (share * quality).sum()
    spread = ((share * s * s).sum() * (share * y * y).sum()).clamp_min(1e-12).sqrt()
    return (1 - (share * s * y).sum() / spread) / 2


def losses_of(
    teacher: Teacher,
    crops: Crops,
    recipe: TeacherRecipe,
    qfm: tuple[QfmRegulariser, Semantics] | None = None,
) -> dict[str, Tensor]:
    """The weighted losses of one batch of crops; ``loss`` is their sum."""
    config, head = recipe.train, head_of(teacher)
    kind = crops.picture.device.type
    with torch.autocast(kind, torch.bfloat16, enabled=config.precision == "bfloat16"):
        pooled = teacher.describe(crops.picture, crops.depth).pooled  # type: ignore[arg-type]
    pooled = pooled.float()
    logits = head(pooled)
    distance = _DISTANCES[config.loss](logits, crops.quality)
    parts = {"score": (distance * crops.weight).sum() / crops.weight.sum().clamp_min(1e-6)}
    if config.plcc_weight:
        found = weighted_plcc_loss(torch.sigmoid(logits), crops.quality, crops.weight)
        parts["plcc"] = config.plcc_weight * found
    if qfm is not None:
        regulariser, semantics = qfm
        noisy = regulariser(pooled, crops.quality, head, semantics=semantics.take())
        parts["insensitivity"] = recipe.qfm.weight * noisy.insensitivity
        parts["contrast"] = recipe.qfm.contrast_weight * noisy.contrast
    return {"loss": torch.stack(list(parts.values())).sum(), **parts}
