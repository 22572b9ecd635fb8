"""A network for the fragments alone: what damage leaves in native pixels.

The trunk was made to tell objects apart and sees squares of 32 pixels as noise; blocks, ringing and
lost detail are small and the same everywhere. So a few dense convolutions learn them from nothing,
and cost half of what the trunk's depthwise ones do on the same pixels in INT8.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill.models.trunks import NormConv2d

FRAGMENT_WIDTHS: tuple[int, int, int, int] = (24, 48, 96, 128)
_STEM_KERNEL = 4


class Residual(nn.Module):
    """Two convolutions beside a shortcut, and a ReLU over the sum."""

    def __init__(self, channels: int, *, normalised: bool) -> None:
        super().__init__()
        self.first = _convolution(channels, channels, normalised=normalised)
        self.second = _convolution(channels, channels, normalised=normalised)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to the same."""
        y: Tensor = self.second(F.relu(self.first(x)))
        return F.relu(x + y)


class FragmentTrunk(nn.Module):
    """Fragments to means over space of three maps, a quarter, an eighth and a sixteenth as large.

    Only Conv, ReLU, Add and mean pooling. With ``normalised`` each convolution has a BatchNorm,
    as training wants it; :func:`folded` gives the same network without.
    """

    def __init__(
        self, widths: Sequence[int] = FRAGMENT_WIDTHS, *, normalised: bool = False
    ) -> None:
        """``widths``: channels at a half, a quarter, an eighth and a sixteenth of the size."""
        super().__init__()
        if len(widths) != len(FRAGMENT_WIDTHS):
            raise ValueError(f"{len(widths)} widths, and a fragment trunk has 4")
        half, quarter, eighth, sixteenth = self.widths = tuple(widths)
        self.stem = _convolution(3, half, kernel=_STEM_KERNEL, stride=2, normalised=normalised)
        self.to_quarter = _convolution(half, quarter, stride=2, normalised=normalised)
        self.at_quarter = Residual(quarter, normalised=normalised)
        self.to_eighth = _convolution(quarter, eighth, stride=2, normalised=normalised)
        self.at_eighth = Residual(eighth, normalised=normalised)
        self.to_sixteenth = _convolution(eighth, sixteenth, stride=2, normalised=normalised)

    @property
    def num_features(self) -> int:
        """Length of the vector that one picture gives."""
        return sum(self.widths[1:])

    def forward(self, x: Tensor) -> Tensor:
        """Normalised RGB (B, 3, H, W) to means (B, num_features)."""
        x = F.relu(self.stem(x))  # (B, widths[0], H/2, W/2)
        quarter = self.at_quarter(F.relu(self.to_quarter(x)))  # (B, widths[1], H/4, W/4)
        eighth = self.at_eighth(F.relu(self.to_eighth(quarter)))  # (B, widths[2], H/8, W/8)
        sixteenth = F.relu(self.to_sixteenth(eighth))  # (B, widths[3], H/16, W/16)
        return torch.cat([y.mean((2, 3)) for y in (quarter, eighth, sixteenth)], 1)


def folded(trunk: FragmentTrunk) -> FragmentTrunk:
    """The same network in evaluation, each BatchNorm folded into its convolution."""
    made = FragmentTrunk(trunk.widths).eval()
    into = dict(made.named_modules())
    with torch.no_grad():
        for name, conv in trunk.named_modules():
            if not isinstance(conv, NormConv2d):
                continue
            norm, plain = conv.norm, into[name]
            assert isinstance(plain, nn.Conv2d)
            assert plain.bias is not None
            assert norm.running_mean is not None
            assert norm.running_var is not None
            scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
            plain.weight.copy_(conv.weight * scale[:, None, None, None])
            plain.bias.copy_(norm.bias - norm.running_mean * scale)
    return made


def fragment_trunk_of(state: dict[str, Tensor]) -> FragmentTrunk | None:
    """One that a student's weights fit; None where its fragments pass the trunk."""
    prefix = "fragment_trunk."
    if f"{prefix}stem.weight" not in state:
        return None
    layers = ("stem", "to_quarter", "to_eighth", "to_sixteenth")
    return FragmentTrunk([len(state[f"{prefix}{layer}.weight"]) for layer in layers])


def _convolution(
    cin: int, cout: int, *, kernel: int = 3, stride: int = 1, normalised: bool
) -> nn.Conv2d:
    padding = (kernel - 1) // 2
    if not normalised:
        return nn.Conv2d(cin, cout, kernel, stride, padding)
    return NormConv2d(cin, cout, kernel, stride, padding, groups=1)
