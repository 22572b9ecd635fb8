"""How wrong a score probably is, and whether its picture is of a kind that was trained on.

Both are learnt from the features that the quality head reads, of the float and of the INT8 trunk at
once, so that both precisions share them. ``spread`` is the expected |error| on 0..1: it maximises
the Laplace likelihood (Kendall and Gal, NeurIPS 2017, section 2.2, with |e| for the square) of
leave-one-out errors of kernel ridge regression, for the student's own errors on its training
pictures would say too little. ``unfamiliar`` is logistic: training pictures against drawn ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated

import msgspec
import numpy as np
import onnx
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from quant.correction import constant_of, head_nodes, regression_lines
from quant.extra_outputs import SPREAD, UNFAMILIAR, Reader, add_outputs_, remove_outputs_
from quant.head import Count, Features, Floats, HeadConfig, Positive
from quant.kernel_ridge import KernelRidge

_GUESS_ERROR = 1 / 3
"""Mean distance of two uniform numbers on 0..1: what is drawn gets a score that says nothing."""
_LEAST_LOGIT = -7.0
"""Of a spread: a thousandth. Below, the likelihood of one lucky rating would have no bound."""

Share = Annotated[float, msgspec.Meta(gt=0, lt=1)]


class SureConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How spread and familiarity are fitted and measured. Saved in the artefact's manifest."""

    coverage: Share = 0.9
    """Of validation ratings, those that lie inside their intervals."""
    share_flagged: Share = 0.04
    """Of validation pictures, those that may be called unfamiliar."""
    num_strange: Count = 800
    """Drawn pictures to learn from."""
    held_out: tuple[str, ...] = ("codes", "credits", "plates", "streaks")
    """Kinds of drawn pictures that are only judged by."""
    num_judged: Count = 12
    """Drawn pictures of each kind to judge by."""
    width: Annotated[int, msgspec.Meta(ge=2)] = 32
    """Hidden units, half for each output."""
    num_steps: Count = 300
    """Few: what is left of errors is mostly chance, and many steps learn the chance by heart."""
    batch: Count = 256
    """Looks of each kind in a step."""
    rate: Positive = 1e-3
    weight_decay: Annotated[float, msgspec.Meta(ge=0)] = 0.05
    dropout: Annotated[float, msgspec.Meta(ge=0, lt=1)] = 0.5
    agreement_weight: Annotated[float, msgspec.Meta(ge=0)] = 1.0
    """Weight of the squared difference between the logits of the two precisions."""
    strange_weight: Annotated[float, msgspec.Meta(ge=0)] = 0.1
    """Weight of drawn pictures in the spread, which is a guess's there, beside 1 for rated ones."""
    seed: int = 1
    version: int = 2


@dataclass(frozen=True, slots=True, eq=False)
class Known:
    """Looks that training saw, and drawn pictures, by their features in both precisions."""

    looks: Features
    is_familiar: NDArray[np.bool_]
    """(N,): looks that may count as familiar."""
    strange_float: Floats
    """(M, F)."""
    strange_int8: Floats


def fit_(
    reference: onnx.ModelProto,
    quantised: onnx.ModelProto,
    known: Known,
    head: HeadConfig,
    config: SureConfig,
) -> int:
    """Give a float graph and its INT8 graph the two outputs, in place; returns their parameters.

    Outputs of an earlier fit are replaced. ``head`` says how the regression is fitted.

    Raises ``ValueError`` for a graph without the quality head.
    """
    for graph in (reference, quantised):
        remove_outputs_(graph)
        head_nodes(graph)
    errors = look_errors(reference, known.looks, head)
    spread, unfamiliar, lines = _learn(known, errors, config)
    of_int8 = {
        name: reader.after_lines(*lines).on_grid()
        for name, reader in ((SPREAD, spread), (UNFAMILIAR, unfamiliar))
    }
    add_outputs_(quantised, spread=of_int8[SPREAD], unfamiliar=of_int8[UNFAMILIAR])
    return add_outputs_(reference, spread=spread, unfamiliar=unfamiliar)


def look_errors(reference: onnx.ModelProto, looks: Features, head: HeadConfig) -> Floats:
    """The |error| to expect of each look, (N,) on 0..1, NaN where nothing says it.

    Of a rated picture the leave-one-out error, for all of its looks. Of a ladder's picture with a
    pseudo-MOS, how far the quality falls otherwise than that says, beside what the clean picture
    is probably wrong by, which is the mean of rated ones: independent, so squares add up.
    """
    labels, a = looks.labels, looks.of_float
    num_rated = int((~np.isnan(labels.mos)).sum())
    as_served = slice(0, num_rated // head.num_looks)
    teacher = KernelRidge(
        a[as_served], labels.mos[as_served], width=head.kernel_width, ridge=head.ridge
    )
    of_picture = np.abs(teacher.leave_one_out_errors())
    errors = np.full(len(labels.mos), np.nan)
    errors[:num_rated] = np.tile(of_picture, head.num_looks)
    quality = _quality_of(reference, a[num_rated:])
    errors[num_rated:] = _ladder_errors(
        quality,
        labels.ladder[num_rated:],
        labels.level[num_rated:],
        labels.pseudo_mos[num_rated:].astype(np.float64),
        clean_error=float(of_picture.mean()),
    )
    return errors.astype(np.float32)


def _ladder_errors(
    quality: NDArray[np.float64],
    ladder: NDArray[np.int64],
    level: NDArray[np.int64],
    pseudo_mos: NDArray[np.float64],
    *,
    clean_error: float,
) -> NDArray[np.float64]:
    """As :func:`look_errors` says, (N,) each; ladders without a clean picture have none."""
    errors = np.full(len(quality), np.nan)
    for number in np.unique(ladder):
        members = np.flatnonzero(ladder == number)
        mildest = members[level[members].argmin()]
        if level[mildest] != 0:
            continue
        share = np.where(members == mildest, 1.0, pseudo_mos[members])
        fall_error = quality[members] - quality[mildest] * share
        errors[members] = np.hypot(fall_error, clean_error * share)
    return errors


def _quality_of(graph: onnx.ModelProto, features: Floats) -> NDArray[np.float64]:
    """What a graph's quality head says of features (N, F)."""
    hidden, quality = head_nodes(graph)
    names = (*hidden.input[1:3], *quality.input[1:3])
    return Reader(*(constant_of(graph, name) for name in names))(features)


def _learn(
    known: Known, errors: Floats, config: SureConfig
) -> tuple[Reader, Reader, tuple[NDArray[np.float64], NDArray[np.float64]]]:
    """Readers of float features, and the lines (F,) from INT8 features to those."""
    looks = known.looks
    a = np.concatenate([looks.of_float, known.strange_float])
    b = np.concatenate([looks.of_int8, known.strange_int8])
    slope, offset = regression_lines(
        looks.of_int8.astype(np.float64), looks.of_float.astype(np.float64)
    )
    b *= slope.astype(np.float32)
    b += offset.astype(np.float32)
    num_looks = len(errors)
    is_rated = ~np.isnan(looks.labels.mos)
    strange = np.arange(num_looks, len(a))
    wrong = np.concatenate([errors, np.full(len(strange), _GUESS_ERROR, np.float32)])
    groups = {
        "rated": np.flatnonzero(is_rated),
        "ladders": np.flatnonzero(~is_rated & np.isfinite(errors)),
        "strange": strange,
    }
    weights = {"rated": 1.0, "ladders": 1.0, "strange": config.strange_weight}
    fitting = _Fitting(a, b, config)
    spread = fitting(
        [(rows, weights[name]) for name, rows in groups.items()],
        _laplace(torch.from_numpy(wrong)),
        first_bias=_logit(float(np.mean(wrong[groups["rated"]]))),
    )
    is_strange = torch.zeros(len(a))
    is_strange[num_looks:] = 1
    familiar = (
        np.flatnonzero(known.is_familiar & is_rated),
        np.flatnonzero(known.is_familiar & ~is_rated),
    )
    unfamiliar = fitting(
        [(familiar[0], 0.5), (familiar[1], 0.5), (strange, 1.0)],
        lambda z, rows: F.binary_cross_entropy_with_logits(z, is_strange[rows]),
        first_bias=0.0,
    )
    return spread, unfamiliar, (slope, offset)


def _laplace(wrong: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """Mean of log s + |e| / s, s the sigmoid of the logits, e those of the rows."""

    def loss(z: Tensor, rows: Tensor) -> Tensor:
        z = z.clamp_min(_LEAST_LOGIT)
        return (F.logsigmoid(z) + wrong[rows] * (1 + torch.exp(-z))).mean()

    return loss


def _logit(share: float) -> float:
    bounded = min(max(share, 1e-3), 1 - 1e-3)
    return float(np.log(bounded / (1 - bounded)))


class _Fitting:
    """Fits readers of float features ``a`` (N, F) and of corrected INT8 ones ``b`` at once."""

    def __init__(self, a: Floats, b: Floats, config: SureConfig) -> None:
        self.config = config
        self.mean, self.std = a.mean(0), np.maximum(a.std(0), 1e-3)
        self.a, self.b = torch.from_numpy(a), torch.from_numpy(b)

    def __call__(
        self,
        groups: Sequence[tuple[NDArray[np.int64], float]],
        loss_of: Callable[[Tensor, Tensor], Tensor],
        *,
        first_bias: float,
    ) -> Reader:
        """A reader whose logits (N,) of rows (N,) have a small loss.

        ``groups`` are rows with the weight of their part of the loss; each step takes a batch of
        each. Groups without a row are left out.
        """
        config = self.config
        torch.manual_seed(config.seed)
        parts = [(torch.from_numpy(rows), weight) for rows, weight in groups if len(rows)]
        hidden, last = (
            nn.Linear(self.a.shape[1], config.width // 2),
            nn.Linear(config.width // 2, 1),
        )
        nn.init.constant_(last.bias, first_bias)
        parameters = [*hidden.parameters(), *last.parameters()]
        optimiser = torch.optim.AdamW(parameters, config.rate, weight_decay=config.weight_decay)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, config.num_steps)
        for _ in range(config.num_steps):
            loss = torch.zeros(())
            for rows, weight in parts:
                drawn = rows[torch.randint(len(rows), (config.batch,))]
                loss = loss + weight * self._loss(hidden, last, drawn, loss_of)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
        return self._of_raw_features(hidden, last)

    def _loss(
        self,
        hidden: nn.Linear,
        last: nn.Linear,
        rows: Tensor,
        loss_of: Callable[[Tensor, Tensor], Tensor],
    ) -> Tensor:
        """Of both precisions, and what they differ by."""
        mean, std = torch.from_numpy(self.mean), torch.from_numpy(self.std)
        # one mask for both: what is dropped must not count as disagreement
        kept = F.dropout(torch.ones(len(rows), len(mean)), self.config.dropout)
        za, zb = (
            last(F.relu(hidden((x[rows] - mean) / std * kept))).squeeze(1) for x in (self.a, self.b)
        )
        apart = (za - zb).square().mean()
        return loss_of(za, rows) + loss_of(zb, rows) + self.config.agreement_weight * apart

    def _of_raw_features(self, hidden: nn.Linear, last: nn.Linear) -> Reader:
        """The same function of features that are not standardised."""

        def values(tensor: Tensor) -> NDArray[np.float64]:
            return tensor.detach().numpy().astype(np.float64)

        weight = values(hidden.weight) / self.std
        bias = values(hidden.bias) - weight @ self.mean
        return Reader(weight, bias, values(last.weight), values(last.bias))
