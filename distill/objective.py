"""What a student is trained for: the recipe's weighted losses, and what only training needs.

The adapters and gates here are trained beside the student and kept in a run's checkpoint; no
student's weights hold them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from dgiqa_stream.errors import ConfigError
from distill.data.batch import Batch, TeacherTargets
from distill.data.labels import LabelShapes
from distill.data.training_data import TrainingData
from distill.distilling import (
    DepthGuidedGate,
    FeatureAdapter,
    Gated,
    VectorAdapter,
    attention_loss,
    fused_loss,
    pooled_loss,
    ranking_loss,
    relation_distance_loss,
    relation_similarity_loss,
    teacher_score_loss,
)
from distill.losses import falls_loss, ladder_loss, plcc_loss, pseudo_mos_loss, score_loss
from distill.models.qfm import QfmLosses, QfmRegulariser, pseudo_labels
from distill.models.student import HEAD_WIDTH, Student, StudentOutput
from distill.models.trunks import CHANNELS, NUM_SHARED, make_trunk
from distill.recipe import LossConfig, Recipe, TrainConfig

_MAP_CHANNELS = CHANNELS[NUM_SHARED - 1]
_SEED_OFFSET = 5
_SEMANTIC = ("gated_score", "insensitivity", "contrast")


class Objective(nn.Module):
    """The losses of a batch, by name and weighted; ``parameters()`` are the training-only parts.

    Raises :class:`ConfigError` where the recipe asks for a loss that the data has nothing for.
    """

    def __init__(self, recipe: Recipe, data: TrainingData) -> None:
        super().__init__()
        self.train_config, self.losses = recipe.train, recipe.losses
        _refuse_unfounded(recipe.losses, recipe.train, data)
        shapes = data.labels.manifest.shapes if data.labels else None
        with torch.random.fork_rng(devices=[]):  # the student's own draws stay what they were
            torch.manual_seed(recipe.train.seed + _SEED_OFFSET)
            self._make_parts(recipe, shapes)

    def _make_parts(self, recipe: Recipe, shapes: LabelShapes | None) -> None:
        losses = recipe.losses
        self.fused = self.pooled = self.gate = self.gated = self.semantic = None
        if shapes is not None:
            if losses.fused:
                self.fused = FeatureAdapter(_MAP_CHANNELS, shapes.channels)
            if losses.pooled:
                self.pooled = VectorAdapter(HEAD_WIDTH, shapes.pooled)
            if losses.attention or losses.gated:
                self.gate = DepthGuidedGate(_MAP_CHANNELS, side=shapes.side)
            if losses.gated:
                self.gated = VectorAdapter(_MAP_CHANNELS, shapes.pooled)
        if any(getattr(losses, name) for name in _SEMANTIC):
            self.semantic = QfmRegulariser(
                Student(trunk=make_trunk(recipe.model)).hidden.in_features
            )

    def forward(
        self, told: StudentOutput, batch: Batch[Tensor], head: Callable[[Tensor], Tensor]
    ) -> dict[str, Tensor]:
        """Every weighted loss; their sum is what a step lowers. ``head`` is the student's."""
        logits = told.logits.float()
        parts = {
            **self._human(logits, batch),
            **self._pseudo(logits, batch),
        }
        teacher = batch.teacher
        if teacher is not None and self.losses.needing_teacher():
            weights, scores = teacher_weights(teacher, self.losses.confidence_temperature)
            parts |= self._teacher_score(logits, batch, scores, weights)
            parts |= self._teacher_features(told, teacher, weights)
        if self.semantic is not None:
            parts |= self._semantic(told, batch, head)
        return parts

    def _human(self, logits: Tensor, batch: Batch[Tensor]) -> dict[str, Tensor]:
        config, none = self.train_config, logits.sum() * 0.0
        is_rated, on_ladder = ~batch.mos.isnan(), batch.ladders >= 0
        of_rated, mos = logits[is_rated], batch.mos[is_rated]
        parts = {"score": none, "plcc": none, "ladder": none}
        if len(mos):
            parts["score"] = score_loss(of_rated, mos)
            parts["plcc"] = config.plcc_weight * plcc_loss(torch.sigmoid(of_rated), mos)
        if batch.num_ladders:
            levels = batch.levels[on_ladder].view(batch.num_ladders, -1)
            of_ladder = logits[on_ladder].view_as(levels)
            parts["ladder"] = config.ladder_weight * ladder_loss(
                of_ladder, levels, config.ladder_margin
            )
        if self.losses.rank_mos:
            parts["rank_mos"] = self.losses.rank_mos * ranking_loss(
                logits,
                batch.mos,
                is_rated.float(),
                contents=batch.contents,
                kind=self.losses.ranking_kind,
            )
        return parts

    def _pseudo(self, logits: Tensor, batch: Batch[Tensor]) -> dict[str, Tensor]:
        parts: dict[str, Tensor] = {}
        if self.losses.falls and batch.num_ladders:
            of_ladders = batch.ladders >= 0
            shape = (batch.num_ladders, -1)
            parts["falls"] = self.losses.falls * falls_loss(
                logits[of_ladders].view(shape),
                batch.pseudo_mos[of_ladders].view(shape),
                batch.confidence[of_ladders].view(shape),
            )
        if self.losses.pseudo_mos:
            parts["pseudo_mos"] = self.losses.pseudo_mos * pseudo_mos_loss(
                logits, batch.pseudo_mos, batch.confidence
            )
        if self.losses.rank_pseudo_mos:
            parts["rank_pseudo_mos"] = self.losses.rank_pseudo_mos * ranking_loss(
                logits,
                batch.pseudo_mos,
                batch.confidence,
                contents=batch.contents,
                kind=self.losses.ranking_kind,
            )
        return parts

    def _teacher_score(
        self, logits: Tensor, batch: Batch[Tensor], scores: Tensor, weights: Tensor
    ) -> dict[str, Tensor]:
        parts: dict[str, Tensor] = {}
        if self.losses.teacher_score:
            parts["teacher_score"] = self.losses.teacher_score * teacher_score_loss(
                logits, scores, weights
            )
        if self.losses.rank_teacher:
            parts["rank_teacher"] = self.losses.rank_teacher * ranking_loss(
                logits,
                scores,
                weights,
                contents=batch.contents,
                kind=self.losses.ranking_kind,
            )
        return parts

    def _teacher_features(
        self, told: StudentOutput, teacher: TeacherTargets[Tensor], weights: Tensor
    ) -> dict[str, Tensor]:
        losses, hidden, seen = self.losses, told.hidden.float(), told.whole_map.float()
        fused, pooled = teacher.fused.float(), teacher.pooled.float()
        parts: dict[str, Tensor] = {}
        if self.fused is not None:
            adapted = self.fused(seen, size=(fused.shape[2], fused.shape[3]))
            parts["fused"] = losses.fused * fused_loss(adapted, fused, weights)
        if self.pooled is not None:
            parts["pooled"] = losses.pooled * pooled_loss(
                self.pooled(hidden), pooled, weights, kind=losses.pooled_kind
            )
        if losses.relation_distance:
            parts["relation_distance"] = losses.relation_distance * relation_distance_loss(
                hidden, pooled, weights
            )
        if losses.relation_similarity:
            parts["relation_similarity"] = losses.relation_similarity * (
                relation_similarity_loss(hidden, pooled, weights)
            )
        if self.gate is not None:
            parts |= self._gate_losses(self.gate(seen), teacher.attention, pooled, weights)
        return parts

    def _gate_losses(
        self, gated: Gated, attention: Tensor, pooled: Tensor, weights: Tensor
    ) -> dict[str, Tensor]:
        parts: dict[str, Tensor] = {}
        if self.losses.attention:
            parts["attention"] = self.losses.attention * attention_loss(
                gated.log_map, attention, weights
            )
        if self.gated is not None:
            parts["gated"] = self.losses.gated * pooled_loss(
                self.gated(gated.pooled), pooled, weights, kind=self.losses.pooled_kind
            )
        return parts

    def _semantic(
        self, told: StudentOutput, batch: Batch[Tensor], head: Callable[[Tensor], Tensor]
    ) -> dict[str, Tensor]:
        assert self.semantic is not None
        quality = torch.where(batch.mos.isnan(), batch.pseudo_mos, batch.mos)
        known = ~quality.isnan()
        none = told.logits.sum() * 0.0
        if not known.any():
            return {name: none for name in _SEMANTIC if getattr(self.losses, name)}
        made: QfmLosses = self.semantic(told.features[known], quality[known], head)
        parts = {
            "gated_score": score_loss(made.logits.float(), quality[known]),
            "insensitivity": made.insensitivity,
            "contrast": made.contrast,
        }
        weights = {name: getattr(self.losses, name) for name in parts}
        return {name: weights[name] * part for name, part in parts.items() if weights[name]}


def teacher_weights(teacher: TeacherTargets[Tensor], temperature: float) -> tuple[Tensor, Tensor]:
    """How much each picture counts, 0 without a label, and its target: (N,) each, 0..1.

    By :func:`distill.models.qfm.pseudo_labels`: the less its crops agree, the less it counts.
    """
    crops = teacher.crop_scores  # (N, K)
    has_label = ~crops.isnan().any(1)
    weights, scores = crops.new_zeros(len(crops)), crops.new_full((len(crops),), torch.nan)
    if not has_label.any():
        return weights, scores
    labels = pseudo_labels(crops[has_label].clamp(0, 1), temperature=temperature)
    weights[has_label], scores[has_label] = labels.weights, labels.quality
    return weights, scores


def _refuse_unfounded(losses: LossConfig, train: TrainConfig, data: TrainingData) -> None:
    asked = losses.needing_teacher()
    if asked and data.labels is None:
        raise ConfigError(
            f"the recipe's loss {asked[0]} needs a teacher's labels: make them with `dgiqa-distill "
            "label` and give --labels"
        )
    if losses.attention and data.labels and not data.labels.manifest.shapes.has_attention:
        raise ConfigError(
            "the recipe's loss attention needs a teacher guided by depth: these labels are of "
            f"{data.labels.manifest.teacher.backbone}"
        )
    records = data.unrated.records if data.unrated else []
    asked = losses.needing_pseudo_mos()
    if losses.falls and not train.ladders_from_clean:
        raise ConfigError("the loss falls compares with the clean picture: set ladders_from_clean")
    if asked and not any(getattr(r, "pseudo_mos", None) is not None for r in records):
        raise ConfigError(
            f"the recipe's loss {asked[0]} needs pseudo-MOS: give shards that were made with "
            "--pseudo-mos"
        )
