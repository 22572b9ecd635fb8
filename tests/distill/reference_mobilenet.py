"""MobileNetV2 with its BatchNorms, written from the paper's table 2 and Gluon's strides.

Nothing here knows the student: it is the outside truth that the folded trunk is held against.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

PREFIX = "mobilenetv20_features_"
BATCHNORM = {"gamma": "weight", "beta": "bias", "running_mean": "running_mean"}
BATCHNORM |= {"running_var": "running_var"}
STAGES = (  # expansion, channels, stride of the first block; one row for each run of equal blocks
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 2, 3),
    (6, 64, 1, 4),
    (6, 96, 2, 3),
    (6, 160, 2, 3),
    (6, 320, 1, 1),
)
TAPPED = (2, 5, 9, 12, 15)


class ReferenceMobileNet(nn.Module):
    """ImageNet-normalised RGB to the means over space that the student's head reads."""

    def __init__(self) -> None:
        super().__init__()
        self.convs, self.norms = nn.ModuleDict(), nn.ModuleDict()
        self.blocks: list[tuple[bool, int]] = []  # whether it has a shortcut, and its stride
        self._add("", 0, nn.Conv2d(3, 32, 3, 2, padding=0, bias=False))
        cin = 32
        for expansion, cout, stride, repeats in STAGES:
            for i in range(repeats):
                step, inner = stride if i == 0 else 1, cin * expansion
                prefix = f"linearbottleneck{len(self.blocks)}_"
                deep = nn.Conv2d(inner, inner, 3, step, 1, groups=inner, bias=False)
                self._add(prefix, 0, nn.Conv2d(cin, inner, 1, bias=False))
                self._add(prefix, 1, deep)
                self._add(prefix, 2, nn.Conv2d(inner, cout, 1, bias=False))
                self.blocks.append((step == 1 and cin == cout, step))
                cin = cout
        self._add("", 1, nn.Conv2d(cin, 1280, 1, bias=False))

    def _add(self, prefix: str, number: int, conv: nn.Conv2d) -> None:
        fan_in = conv.weight[0].numel()
        nn.init.normal_(conv.weight, std=(2.0 / fan_in) ** 0.5)
        norm = nn.BatchNorm2d(conv.out_channels, eps=1e-5, momentum=1.0)
        nn.init.uniform_(norm.weight, 0.7, 1.3)
        nn.init.normal_(norm.bias, std=0.2)
        self.convs[f"{prefix}conv{number}"] = conv
        self.norms[f"{prefix}batchnorm{number}"] = norm

    def _layer(self, prefix: str, number: int, x: Tensor, *, linear: bool = False) -> Tensor:
        y = self.norms[f"{prefix}batchnorm{number}"](self.convs[f"{prefix}conv{number}"](x))
        return y if linear else torch.relu(y)

    def forward(self, padded: Tensor) -> Tensor:
        """(B, 3, H + 2, W + 2), already padded, to (B, features)."""
        taps = []
        x = self._layer("", 0, padded)
        for j, (shortcut, _) in enumerate(self.blocks):
            prefix = f"linearbottleneck{j}_"
            y = self._layer(prefix, 1, self._layer(prefix, 0, x))
            y = self._layer(prefix, 2, y, linear=True)
            x = x + y if shortcut else y
            if j in TAPPED:
                taps.append(x.mean((2, 3)))
        taps.append(self._layer("", 1, x).mean((2, 3)))
        return torch.cat(taps, 1)

    def arrays(self) -> dict[str, NDArray[np.float32]]:
        """The weights under the names of the published file."""
        found = {f"{PREFIX}{name}_weight": conv.weight for name, conv in self.convs.items()}
        for name, norm in self.norms.items():
            for theirs, ours in BATCHNORM.items():
                found[f"{PREFIX}{name}_{theirs}"] = getattr(norm, ours)
        return {name: tensor.detach().numpy() for name, tensor in found.items()}

    def take(self, arrays: dict[str, NDArray[np.float32]]) -> None:
        """Take weights by the names of the published file."""
        with torch.no_grad():
            for name, conv in self.convs.items():
                conv.weight.copy_(torch.from_numpy(arrays[f"{PREFIX}{name}_weight"]))
            for name, norm in self.norms.items():
                for theirs, ours in BATCHNORM.items():
                    getattr(norm, ours).copy_(torch.from_numpy(arrays[f"{PREFIX}{name}_{theirs}"]))


def plausible_weights(seed: int) -> dict[str, NDArray[np.float32]]:
    """Weights whose activations stay of one size through the layers, as trained ones do."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = ReferenceMobileNet().train()
        with torch.no_grad():
            net(torch.randn(8, 3, 98, 98))  # momentum 1: the statistics become this batch's
    return net.arrays()
