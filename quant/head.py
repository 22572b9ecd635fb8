"""One head for both precisions, distilled from kernel ridge regression.

A small network fitted to nine thousand ratings by gradient descent agrees with people markedly less
than kernel ridge regression on the very same features (`distill/EXPERIMENTS.md`), but that needs
every training picture at inference. So it teaches: the regression is fitted to the ratings, then a
head of two layers learns its predictions on many looks at rated pictures. Of degraded pictures,
which nobody rated, the regression knows little; there the head keeps the falls of the head that
was trained with the trunk, or those of another student. It learns from the float and from the INT8
trunk's features at once, so that both precisions share one head, which looks away from what
rounding disturbs.
"""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Literal

import msgspec
import numpy as np
import onnx
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from dgiqa_stream.errors import ConfigError
from dgiqa_stream.preprocess import Reduction, ViewSpec
from quant.calibration import Views
from quant.correction import (
    constant_of,
    head_nodes,
    outputs_of_each,
    parts_before,
    regression_lines,
    replace_constant,
)
from quant.kernel_ridge import KernelRidge
from quant.narrow import on_grid

_SMALLEST_QUALITY = 0.02
_LINEAR_BEYOND = 0.5
"""Logits of error beyond which the loss grows linearly."""

Floats = NDArray[np.float32]
Positive = Annotated[float, msgspec.Meta(gt=0)]
Count = Annotated[int, msgspec.Meta(ge=1)]


class HeadConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How the head is fitted. Saved in the artefact's manifest."""

    reduction: Reduction | None = None
    """How whole views are made small from this head on; as before unless given."""
    without_twins: bool = False
    """Whether training pictures with a twin among those for validation are left out."""
    leave_out: list[str] = []
    """Degradations whose ladders are not looked at, as the trunk's recipe has them."""
    taught_by: Literal["regression", "own_head"] = "regression"
    """Who says what rated pictures and the mildest of ladders get: kernel ridge regression, or the
    float model's own head, which then says how far scores fall, too."""
    num_looks: Count = 3
    """Looks at each rated picture: as it is served, then random crops, mirrored or not."""
    smallest_crop: Annotated[float, msgspec.Meta(gt=0, le=1)] = 0.85
    """Crops keep at least this share of each side."""
    num_ladders: Annotated[int, msgspec.Meta(ge=0)] = 800
    """Ladders of one content and one degradation, clean first, about seven pictures each."""
    kernel_width: Positive = 1.5
    """g of the kernel exp(-g d^2 / m), m the median of d^2 between training pictures."""
    ridge: Positive = 0.25
    num_heads: Count = 3
    """Heads whose mean logit is the answer: each is off by its own draw, their mean by less."""
    width: Count = 128
    """Hidden units of each."""
    num_steps: Count = 2000
    batch: Count = 256
    """Looks at rated pictures in a step."""
    ladders_at_once: Annotated[int, msgspec.Meta(ge=0)] = 16
    """Whole ladders in a step, beside them."""
    rate: Positive = 1e-3
    weight_decay: Annotated[float, msgspec.Meta(ge=0)] = 0.01
    dropout: Annotated[float, msgspec.Meta(ge=0, lt=1)] = 0.3
    agreement_weight: Annotated[float, msgspec.Meta(ge=0)] = 4.0
    """Weight of the squared difference between the logits of the two precisions."""
    fall_weight: Annotated[float, msgspec.Meta(ge=0)] = 0.5
    """Weight of what the pictures of ladders should get, beside 1 for rated ones."""
    pseudo_mos_from_px: Annotated[int, msgspec.Meta(ge=0)] = 0
    """Longer side from which on a picture falls as its pseudo-MOS says."""
    pseudo_mos_share: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.0
    """How much pseudo-MOS says of a smaller one's fall (in logits); the head before this one says
    the rest."""
    order_only: list[str] = []
    """Degradations whose falls the head before this one says, not pseudo-MOS."""
    ladder_weight: Annotated[float, msgspec.Meta(ge=0)] = 1.0
    """Weight of the hinge between pictures of one ladder."""
    ladder_margin: Annotated[float, msgspec.Meta(ge=0)] = 0.08
    """Logits by which one level more should lie lower."""
    seed: int = 1
    version: int = 9


@dataclass(frozen=True, slots=True, eq=False)
class Labels:
    """What is known of each look, (N,) each: rounds of the rated pictures first, ladders last."""

    mos: Floats
    """Rating on 0..1, NaN where there is none."""
    ladder: NDArray[np.int64]
    """Number of the ladder, -1 where there is none."""
    level: NDArray[np.int64]
    """0 is clean; of one ladder the higher is the worse."""
    pseudo_mos: Floats
    """Quality on 0..1 as full-reference measures say, 1 as good as clean; NaN where none said."""
    share: Floats
    """How much that says of a fall, 0..1; the head before this one says the rest."""

    def at(self, chosen: NDArray[np.int64]) -> Labels:
        """Those of some looks, in that order; ladders keep their numbers."""
        return Labels(*(getattr(self, field.name)[chosen] for field in fields(Labels)))


@dataclass(frozen=True, slots=True, eq=False)
class Features:
    """Pooled features (N, F) of looks in both precisions, and their labels."""

    of_float: Floats
    of_int8: Floats
    labels: Labels


def save_features(features: Features, path: Path, *, origin: str) -> None:
    """Write them beside, then rename: a kill leaves no half file.

    ``origin`` says what they were measured with: :func:`origin_of`.
    """
    part = path.with_name(path.name + ".part.npz")
    stored = {field.name: getattr(features.labels, field.name) for field in fields(Labels)}
    stored |= {"of_float": features.of_float, "of_int8": features.of_int8}
    np.savez(part, origin=np.array(origin), **stored)
    part.replace(path)


def load_features(path: Path, *, origin: str) -> Features:
    """What :func:`save_features` wrote.

    Raises :class:`ConfigError` where the file holds something else, or features of another origin.
    """
    try:
        with np.load(path) as stored:
            found = str(stored["origin"])
            labels = Labels(*(stored[field.name] for field in fields(Labels)))
            features = Features(stored["of_float"], stored["of_int8"], labels)
    except (KeyError, ValueError, OSError, zipfile.BadZipFile) as exc:
        raise ConfigError(
            f"{path.name} holds no features that this version kept ({exc}): give another --cache"
        ) from exc
    if found != origin:
        raise ConfigError(
            f"{path.name} has features of other models or views: give the models that it was made "
            "with and the same head.reduction, or another --cache"
        )
    return features


def origin_of(
    reference: onnx.ModelProto, quantised: onnx.ModelProto, views: Sequence[ViewSpec]
) -> str:
    """SHA-256 of the views and of what both graphs compute before their heads, in hex."""
    digest = hashlib.sha256(msgspec.json.encode(list(views)))
    for graph in (reference, quantised):
        for part in parts_before(graph, head_nodes(graph)[0].input[0]):
            digest.update(part.SerializeToString(deterministic=True))
    return digest.hexdigest()


@dataclass(frozen=True, slots=True, eq=False)
class Head:
    """Two layers: weight (W, F) and bias (W,), then weight (1, W) and bias (1,)."""

    hidden_weight: NDArray[np.float64]
    hidden_bias: NDArray[np.float64]
    quality_weight: NDArray[np.float64]
    quality_bias: NDArray[np.float64]

    def __call__(self, features: Floats) -> NDArray[np.float64]:
        """Features (N, F) to logits (N,)."""
        hidden = np.maximum(features @ self.hidden_weight.T + self.hidden_bias, 0)
        return (hidden @ self.quality_weight.T + self.quality_bias)[:, 0]


def distil_heads(
    of_float: Floats,
    of_int8: Floats,
    logits: NDArray[np.float64],
    labels: Labels,
    config: HeadConfig,
) -> Head:
    """The mean of ``config.num_heads`` heads of :func:`distil_head`, as one head."""
    heads = [
        distil_head(
            of_float,
            of_int8,
            logits,
            labels,
            msgspec.structs.replace(config, seed=config.seed + i),
        )
        for i in range(config.num_heads)
    ]
    return Head(
        np.concatenate([h.hidden_weight for h in heads]),
        np.concatenate([h.hidden_bias for h in heads]),
        np.concatenate([h.quality_weight for h in heads], 1) / len(heads),
        np.mean([h.quality_bias for h in heads], 0),
    )


def distil_head(
    of_float: Floats,
    of_int8: Floats,
    logits: NDArray[np.float64],
    labels: Labels,
    config: HeadConfig,
) -> Head:
    """A head that gives ``logits`` (N,) from features (N, F) of either precision.

    A step sees rated looks and whole ladders; of two pictures of one ladder the head gives the
    worse the lower one: a hinge beside the distillation.
    """
    mean, std = of_float.mean(0), np.maximum(of_float.std(0), 1e-3)
    a, b = (torch.from_numpy((x - mean) / std) for x in (of_float, of_int8))
    wanted = torch.from_numpy(logits.astype(np.float32))
    torch.manual_seed(config.seed)
    draw = Draw(labels, batch=config.batch, ladders_at_once=config.ladders_at_once)
    hidden, last = nn.Linear(a.shape[1], config.width), nn.Linear(config.width, 1)
    parameters = [*hidden.parameters(), *last.parameters()]
    optimiser = torch.optim.AdamW(parameters, config.rate, weight_decay=config.weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, config.num_steps)
    for _ in range(config.num_steps):
        chosen, worse_by = draw()
        # one mask for both: what is dropped must not count as disagreement
        kept = F.dropout(torch.ones(len(chosen), a.shape[1]), config.dropout)
        za, zb = (last(F.relu(hidden(x[chosen] * kept))).squeeze(1) for x in (a, b))
        loss = config.agreement_weight * (za - zb).square().mean()
        for z in (za, zb):
            loss = loss + head_loss(z, wanted[chosen], worse_by, config)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    return _of_raw_features(hidden, last, mean, std)


class Draw:
    """The looks of a step: rated ones, then whole ladders, and by how many levels each is worse."""

    def __init__(self, labels: Labels, *, batch: int, ladders_at_once: int) -> None:
        """So many looks at rated pictures, and so many ladders where there are any."""
        self.rated = torch.from_numpy(np.flatnonzero(labels.ladder < 0))
        self.ladders = [torch.from_numpy(m) for m in _ladders(labels) if len(m) > 1]
        self.level = torch.from_numpy(labels.level)
        self.num_rated = batch
        self.num_ladders = ladders_at_once if self.ladders else 0

    def __call__(self, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Indices (N,), and for the last M of them, from ladders, (M, M): column less row, or 0."""
        chosen = torch.randint(len(self.rated), (self.num_rated,), generator=generator)
        picked = torch.randint(
            max(1, len(self.ladders)), (self.num_ladders,), generator=generator
        ).tolist()
        members = [self.ladders[i] for i in picked]
        steps = [self.level[m][None] - self.level[m][:, None] for m in members]
        worse_by = torch.block_diag(*steps) if steps else torch.zeros(0, 0)
        return torch.cat([self.rated[chosen], *members]), worse_by.clamp_min(0).float()


def head_loss(z: Tensor, wanted: Tensor, worse_by: Tensor, config: HeadConfig) -> Tensor:
    """Distillation of all looks (N,), and the hinge between those of ladders, the last ones.

    ``worse_by`` is (M, M): by how many levels the look of the column is worse than the row's.
    """
    num_rated = len(z) - len(worse_by)
    errors = F.smooth_l1_loss(z, wanted, beta=_LINEAR_BEYOND, reduction="none")
    loss = errors[:num_rated].mean()
    if not len(worse_by):
        return loss
    of_ladders = z[num_rated:]
    gap = of_ladders[:, None] - of_ladders[None]  # row less column
    hinge = F.relu(config.ladder_margin * worse_by - gap)[worse_by > 0].mean()
    return loss + config.fall_weight * errors[num_rated:].mean() + config.ladder_weight * hinge


def logits_of(quality: NDArray[np.float64]) -> NDArray[np.float64]:
    """What the sigmoid was given; qualities at the ends count as 0.02 and 0.98."""
    bounded = np.clip(quality, _SMALLEST_QUALITY, 1 - _SMALLEST_QUALITY)
    return np.log(bounded / (1 - bounded))


def _anchored(
    taught: NDArray[np.float64],
    former: NDArray[np.float64],
    labels: Labels,
) -> NDArray[np.float64]:
    """Logits to learn: on a ladder those of its mildest picture, and falls from there.

    Far from what people rated the teacher says the mean, so strong damage would look fair to it.
    How far a picture falls its pseudo-MOS says, as a share of the mildest one's quality, and the
    head that was trained on ladders; that one alone where a ladder has no pseudo-MOS.
    """
    wanted = taught.copy()
    for members in _ladders(labels):
        mildest = members[labels.level[members].argmin()]
        others = members[members != mildest]
        fall = former[others] - former[mildest]
        left = labels.pseudo_mos[others].astype(np.float64)
        if not np.isnan(left).any():
            quality = 1 / (1 + np.exp(-taught[mildest]))
            measured = logits_of(quality * left) - taught[mildest]
            share = labels.share[others]
            fall = share * measured + (1 - share) * fall
        wanted[others] = taught[mildest] + fall
    return wanted


def _constants(graph: onnx.ModelProto) -> tuple[str, str, str, str]:
    """Names of a head's constants, in the order of :class:`Head`'s fields."""
    hidden, quality = head_nodes(graph)
    return hidden.input[1], hidden.input[2], quality.input[1], quality.input[2]


def head_of(graph: onnx.ModelProto) -> Head:
    """The head that a graph has now."""
    return Head(*(constant_of(graph, name) for name in _constants(graph)))


def _ladders(labels: Labels) -> Iterator[NDArray[np.int64]]:
    """Indices of the looks of each ladder."""
    for number in range(labels.ladder.max(initial=-1) + 1):
        yield np.flatnonzero(labels.ladder == number)


def _of_raw_features(hidden: nn.Linear, last: nn.Linear, mean: Floats, std: Floats) -> Head:
    """The same function of features that are not standardised."""

    def values(tensor: Tensor) -> NDArray[np.float64]:
        return tensor.detach().numpy().astype(np.float64)

    weight = values(hidden.weight) / std
    bias = values(hidden.bias) - weight @ mean
    return Head(weight, bias, values(last.weight), values(last.bias))


def features_of(
    reference: onnx.ModelProto, quantised: onnx.ModelProto, batches: Iterable[Views], labels: Labels
) -> Features:
    """What the heads of a float graph and of its INT8 graph read of each look."""
    wanted = [(graph, head_nodes(graph)[0].input[0]) for graph in (reference, quantised)]
    of_float, of_int8 = outputs_of_each(wanted, batches)  # (N, F) each
    return Features(of_float.astype(np.float32), of_int8.astype(np.float32), labels)


def refit_(
    reference: onnx.ModelProto,
    quantised: onnx.ModelProto,
    features: Features,
    config: HeadConfig,
    *,
    former: NDArray[np.float64] | None = None,
) -> int:
    """Give a float graph and its INT8 graph one distilled head, in place; returns its parameters.

    Each INT8 feature first goes through its regression line on the float one, which is folded into
    the INT8 graph's head. ``former`` has the logits (N,) of who says how far pictures of ladders
    fall, read there alone; the float graph's own head unless given.
    """
    slope, offset, b = corrected(features)
    wanted = wanted_logits(features, config, own=head_of(reference), former=former)
    head = distil_heads(features.of_float, b, wanted, features.labels, config)
    _put(reference, head)
    weight = on_grid(head.hidden_weight * slope)  # so that the file can hold it as INT8
    bias = head.hidden_bias + head.hidden_weight @ offset
    _put(quantised, Head(weight, bias, head.quality_weight, head.quality_bias))
    return head_size(quantised)


def corrected(features: Features) -> tuple[NDArray[np.float64], NDArray[np.float64], Floats]:
    """The regression lines of INT8's features on the float ones (F,), and what they make of them.

    Slopes and offsets, then the features (N, F).
    """
    slope, offset = regression_lines(
        features.of_int8.astype(np.float64), features.of_float.astype(np.float64)
    )
    return slope, offset, (features.of_int8 * slope + offset).astype(np.float32)


def wanted_logits(
    features: Features,
    config: HeadConfig,
    *,
    own: Head,
    former: NDArray[np.float64] | None = None,
) -> NDArray[np.float64]:
    """What a head is to say of each look, (N,).

    ``own`` is the float graph's head now. ``former``: as of :func:`refit_`, which raises as this
    does: :class:`ConfigError` where the float graph's own head teaches and another is to say how
    far scores fall.
    """
    a, labels = features.of_float, features.labels
    if config.taught_by == "own_head":
        if former is not None:
            raise ConfigError(
                'taught_by = "own_head" says how far scores fall, too: leave --falls-of away'
            )
        return own(a)
    as_served = slice(0, int((~np.isnan(labels.mos)).sum()) // config.num_looks)
    teacher = KernelRidge(
        a[as_served], labels.mos[as_served], width=config.kernel_width, ridge=config.ridge
    )
    return _anchored(logits_of(teacher(a)), own(a) if former is None else former, labels)


def head_size(graph: onnx.ModelProto) -> int:
    """Parameters of a graph's head."""
    return sum(constant_of(graph, name).size for name in _constants(graph))


def _put(graph: onnx.ModelProto, head: Head) -> None:
    """Replace the head of a graph; shapes that depended on its width are forgotten."""
    hidden, quality = head_nodes(graph)
    values = (head.hidden_weight, head.hidden_bias, head.quality_weight, head.quality_bias)
    for name, value in zip(_constants(graph), values, strict=True):
        replace_constant(graph, name, value)
    readers = [n for n in graph.graph.node if hidden.output[0] in n.input]
    stale = {name for node in (hidden, *readers) for name in node.output}
    stale |= {name for node in (hidden, quality) for name in node.input}
    kept = [v for v in graph.graph.value_info if v.name not in stale]
    del graph.graph.value_info[:]
    graph.graph.value_info.extend(kept)
    onnx.checker.check_model(graph, full_check=True)
