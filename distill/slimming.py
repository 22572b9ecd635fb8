"""A trunk made slim without training: channels left out, their neighbours told what they said.

Inside a bottleneck, a channel after the depthwise convolution is left out where the others,
weighted anew, give the bottleneck's output nearly as well: channels are chosen one after the other,
each the one that lowers the squared error most, and the projection is then the least-squares
solution on pictures (as He, Zhang and Sun prune channels, arXiv 1707.06168, section 3.2, with a
greedy choice in place of the lasso). Bottleneck follows bottleneck, each asked for the original's
map from the slim one's own input, so that errors do not add up unseen.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill.models.trunks import NUM_SHARED, Bottleneck, SlimTrunk, Trunk

_PLACES = 400
"""Of a picture's map, drawn at random, that take part."""
_RIDGE = 1e-6
"""Of the mean square of a channel: keeps the solution finite where channels repeat each other."""


@dataclass(frozen=True, slots=True)
class Slimmed:
    """What leaving channels out of one bottleneck costs."""

    bottleneck: int
    num_channels: int
    num_kept: int
    unexplained: float
    """Share of the variance of the original's map that the slim one leaves, up to this place."""


@torch.no_grad()
def slim_(
    pupil: SlimTrunk,
    teacher: Trunk,
    whole: Sequence[Tensor],
    fragments: Sequence[Tensor],
    *,
    seed: int = 1,
) -> list[Slimmed]:
    """Fill a slim trunk from a trunk without BatchNorms; returns what each bottleneck lost.

    ``whole`` and ``fragments`` are normalised batches (B, 3, H, W) of the two views; the fragments
    leave the trunk after bottleneck 12. Raises ``ValueError`` where the slim trunk is wider than
    its teacher somewhere.
    """
    generator = torch.Generator().manual_seed(seed)
    views = [*whole, *fragments]
    first = _slim_stem_(pupil, teacher, views, generator)
    mine = [F.relu(pupil.stem(x)) for x in views]
    theirs = [F.relu(teacher.stem(x)) for x in views]
    lost = []
    for j, (slim, full) in enumerate(zip(pupil.blocks, teacher.blocks, strict=True)):
        assert isinstance(slim, Bottleneck)
        assert isinstance(full, Bottleneck)
        if j == NUM_SHARED:
            mine, theirs = mine[: len(whole)], theirs[: len(whole)]
        theirs = [full(x) for x in theirs]
        _slim_bottleneck_(slim, full if j else first, mine, theirs, generator)
        mine = [slim(x) for x in mine]
        num, kept = full.depthwise.out_channels, slim.depthwise.out_channels
        lost.append(Slimmed(j, num, kept, _unexplained(mine, theirs)))
    return lost


def _slim_stem_(
    pupil: SlimTrunk, teacher: Trunk, pictures: Sequence[Tensor], generator: torch.Generator
) -> Bottleneck:
    """Choose the stem's channels by what the first expansion makes of them.

    Returns the teacher's first bottleneck with an expansion that reads those channels alone.
    """
    first = copy.deepcopy(teacher.blocks[0])
    assert isinstance(first, Bottleneck)
    moments = _Moments()
    for x in pictures:
        y = F.relu(teacher.stem(x))
        moments.add(y, first.expand(y), generator)
    kept, weight, bias = moments.fitted(pupil.stem.out_channels)
    _copy_rows_(pupil.stem, teacher.stem, kept)
    first.expand = nn.Conv2d(len(kept), len(bias), 1)
    _fill_pointwise_(first.expand, weight, bias)
    return first


def _slim_bottleneck_(
    slim: Bottleneck,
    full: Bottleneck,
    mine: Sequence[Tensor],
    theirs: Sequence[Tensor],
    generator: torch.Generator,
) -> None:
    """Choose channels by what the projection, with the shortcut, is to give: ``theirs``."""
    moments = _Moments()
    for x, wanted in zip(mine, theirs, strict=True):
        y = F.relu(full.depthwise(F.relu(full.expand(x))))  # (B, inner, H, W)
        moments.add(y, wanted - x if slim.shortcut else wanted, generator)
    kept, weight, bias = moments.fitted(slim.depthwise.out_channels)
    _copy_rows_(slim.expand, full.expand, kept)
    _copy_rows_(slim.depthwise, full.depthwise, kept)
    _fill_pointwise_(slim.project, weight, bias)


class _Moments:
    """Second moments of channels (and a constant) with each other and with what is wanted."""

    def __init__(self) -> None:
        self.of_channels = torch.zeros(0)
        self.with_wanted = torch.zeros(0)
        self.num_places = 0

    def add(self, y: Tensor, wanted: Tensor, generator: torch.Generator) -> None:
        """(B, C, H, W) and (B, C', H, W): some places of every picture, the same in both."""
        num = y.shape[2] * y.shape[3]
        at = torch.randperm(num, generator=generator)[:_PLACES]
        rows = y.flatten(2)[:, :, at].transpose(1, 2).flatten(0, 1).double()  # (places, C)
        rows = torch.cat([rows, torch.ones(len(rows), 1, dtype=torch.float64)], 1)
        aims = wanted.flatten(2)[:, :, at].transpose(1, 2).flatten(0, 1).double()  # (places, C')
        if not self.num_places:
            self.of_channels = torch.zeros(rows.shape[1], rows.shape[1], dtype=torch.float64)
            self.with_wanted = torch.zeros(rows.shape[1], aims.shape[1], dtype=torch.float64)
        self.of_channels += rows.T @ rows
        self.with_wanted += rows.T @ aims
        self.num_places += len(rows)

    def fitted(self, num_kept: int) -> tuple[list[int], Tensor, Tensor]:
        """The channels kept, in order, and what they are weighted by: (C', kept) and (C',)."""
        num = len(self.of_channels) - 1
        if num_kept > num:
            raise ValueError(f"{num_kept} channels wanted and the trunk to slim has {num}")
        g, e = self.of_channels / self.num_places, self.with_wanted / self.num_places
        g = g + torch.diag(torch.full_like(g[0], _RIDGE * float(g.diagonal()[:-1].mean())))
        kept = sorted(_chosen(g, e, num_kept))
        rows = [*kept, num]  # the constant is the bias
        solution = torch.linalg.solve(g[rows][:, rows], e[rows])  # (kept + 1, C')
        return kept, solution[:-1].T.float(), solution[-1].float()


def _chosen(g: Tensor, e: Tensor, num: int) -> list[int]:
    """``num`` channels, each the one that explains most beside those before it.

    ``g`` (C + 1, C + 1) and ``e`` (C + 1, C') are second moments, the constant last. What has been
    chosen is swept out of both (Gauss-Jordan), so that the gain of a channel is a quotient.
    """
    if num == len(g) - 1:
        return list(range(num))
    g, e = g.clone(), e.clone()
    free = torch.ones(len(g), dtype=torch.bool)

    def sweep(i: int) -> None:
        pivot, column, row = g[i, i].clone(), g[:, i].clone(), e[i].clone()
        g.sub_(torch.outer(column, column) / pivot)
        e.sub_(torch.outer(column, row) / pivot)
        free[i] = False

    sweep(len(g) - 1)
    chosen = []
    for _ in range(num):
        left = g.diagonal().clamp_min(torch.finfo(g.dtype).tiny)
        gain = torch.where(free, e.square().sum(1) / left, -torch.inf)
        chosen.append(int(gain.argmax()))
        sweep(chosen[-1])
    return chosen


def _copy_rows_(slim: nn.Conv2d, full: nn.Conv2d, kept: Sequence[int]) -> None:
    assert slim.bias is not None
    assert full.bias is not None
    slim.weight.copy_(full.weight[kept])
    slim.bias.copy_(full.bias[kept])


def _fill_pointwise_(conv: nn.Conv2d, weight: Tensor, bias: Tensor) -> None:
    assert conv.bias is not None
    conv.weight.copy_(weight[:, :, None, None])
    conv.bias.copy_(bias)


def _unexplained(mine: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    num = sum(t.shape[0] * t.shape[2] * t.shape[3] for t in theirs)
    mean = sum((t.double().sum((0, 2, 3)) for t in theirs), torch.zeros(())) / num
    square = sum((t.double().square().sum() for t in theirs), torch.zeros(()))
    error = sum(
        ((m - t).double().square().sum() for m, t in zip(mine, theirs, strict=True)),
        torch.zeros(()),
    )
    return float(error / (square - num * mean.square().sum()))
