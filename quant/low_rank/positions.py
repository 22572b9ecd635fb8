"""Of a map that is reduced bilinearly without antialiasing, only what is read is computed.

Reduced by f, even, between centres, position i reads the mean of f i + f/2 - 1 and
f i + f/2 alone: of 8 x 8 positions the middle 2 x 2. A bridge that ends in a 3 x 3 convolution so
needs the middle 4 x 4 of each cell; everything before it works on single positions. What it then
gives, a map of twice the final size, reduces to the very same numbers.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dgiqa_stream.errors import ModelError

_PARTS = ("conv1", "attention", "conv2", "norm", "drop")
_READ = 4
"""Positions in a row of a cell that a 3 x 3 convolution reads for the two that count."""
DGIQA_REDUCTIONS: Mapping[str, int] = {
    "tcb1": 8, "tcb2": 4, "tcb1_depth": 8, "tcb2_depth": 4,
}  # fmt: skip
"""Bridges of a DGIQA whose maps are reduced by 4 or more, and by how much."""


class ReadPositions(nn.Module):
    """A transformer-CNN bridge that computes what its reduced map is read from.

    It has the bridge's own parts under their own names, so weights keep their keys. In training,
    where BatchNorm looks at all positions, and for maps that cells do not tile it computes all.
    """

    def __init__(self, bridge: nn.Module, reduction: int) -> None:
        super().__init__()
        missing = [part for part in _PARTS if not hasattr(bridge, part)]
        if missing or reduction % _READ:
            raise ModelError(
                f"{type(bridge).__name__} reduced by {reduction} cannot be computed in part: it "
                f"lacks {', '.join(missing) or 'nothing, but 4 must divide the reduction'}"
            )
        for part in _PARTS:
            setattr(self, part, getattr(bridge, part))
        self.reduction = reduction
        self.train(bridge.training)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C', 2 H / f, 2 W / f); all of (B, C', H, W) where it must."""
        f = self.reduction
        if self.training or x.shape[2] % f or x.shape[3] % f:
            x = self.conv1(x)  # (B, C', H, W)
            return self._ended(self.conv2(x * self.attention(x)))
        layout = _layout(x)
        rows, columns = (_middle(side, f, x.device) for side in x.shape[2:])
        x = x[:, :, rows[:, None], columns].contiguous(memory_format=layout)
        x = self.conv1(x)  # (B, C', 4 h, 4 w) for h = H / f
        return self._ended(self._convolved(x * self.attention(x), layout))

    def _ended(self, x: Tensor) -> Tensor:
        y: Tensor = self.drop(F.relu(self.norm(x)))
        return y

    def _convolved(self, x: Tensor, layout: torch.memory_format) -> Tensor:
        """The 3 x 3 convolution inside each 4 x 4 cell, without padding: (B, C', 2 h, 2 w)."""
        batch, channels, height, width = x.shape
        h, w = height // _READ, width // _READ
        cells = x.reshape(batch, channels, h, _READ, w, _READ).permute(0, 2, 4, 1, 3, 5)
        y = cells.reshape(-1, channels, _READ, _READ).contiguous(memory_format=layout)
        for conv in self.conv2.modules():  # one, or the layers of a factored one
            if not isinstance(conv, nn.Conv2d):
                continue
            y = F.conv2d(y, conv.weight, conv.bias, conv.stride, 0, conv.dilation, conv.groups)
        y = y.reshape(batch, h, w, -1, 2, 2).permute(0, 3, 1, 4, 2, 5)
        return y.reshape(batch, -1, 2 * h, 2 * w).contiguous(memory_format=layout)


def read_positions_only_(
    teacher: nn.Module, reductions: Mapping[str, int] = DGIQA_REDUCTIONS
) -> nn.Module:
    """Let a teacher's early bridges compute only what is read; returns the teacher.

    ``reductions`` says by how much the map of each named bridge is reduced afterwards. Every number
    is the sum of the same products, so scores are the same bit for bit where a convolution adds
    them in an order that does not depend on the picture's size: on CPUs at the published widths.
    Factor a bridge first, if at all. Raises :class:`ModelError` for a name that is
    no such bridge; then nothing is changed.
    """
    try:
        bridges = {name: teacher.get_submodule(name) for name in reductions}
    except AttributeError as exc:
        raise ModelError(f"the teacher has no such bridge: {exc}") from exc
    made = {name: ReadPositions(bridge, reductions[name]) for name, bridge in bridges.items()}
    for name, module in made.items():
        setattr(teacher, name, module)
    return teacher


def _middle(side: int, reduction: int, device: torch.device) -> Tensor:
    """Of each cell of a row the middle positions, (4 side / reduction,)."""
    first = reduction // 2 - _READ // 2
    cells = torch.arange(side // reduction, device=device)[:, None] * reduction
    return (cells + first + torch.arange(_READ, device=device)).flatten()


def _layout(x: Tensor) -> torch.memory_format:
    """What the whole map lies in memory as: kernels of the other layout add in another order."""
    is_last = not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if is_last else torch.contiguous_format
