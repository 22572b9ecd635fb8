"""What the published DGIQA answers to seeded weights and pictures: ``teacher.json`` and its maker.

``python tests/golden/teacher_golden.py PUBLISHED`` writes the file anew, where PUBLISHED is a
checkout of github.com/uf-robopi/DGIQA (it has no licence, so nothing of it is kept here). It needs
torch, timm and einops. No ImageNet weights are fetched: every tensor is drawn here.
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import zlib
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

GOLDEN = Path(__file__).with_name("teacher.json")
SEED = 20250524
BATCH = 2
SCHEME = (
    "for each key: PCG64([seed, crc32(key)]).random_raw gives pairs of little-endian uint32, made "
    "uniform with mean 0 and variance 1; matrices and kernels are these / sqrt(fan_in), tables of "
    "relative positions / 10, scales and variances 1 + these / 10, other vectors these / 10"
)
PLACES = [(0, 0, 0, 0), (0, 959, 6, 6), (1, 64, 3, 0), (1, 500, 0, 5), (0, 448, 3, 3)]


def uniform(shape: tuple[int, ...], name: str) -> NDArray[np.float32]:
    """Uniform numbers of mean 0 and variance 1, from the bit generator alone: stable for ever."""
    size = int(np.prod(shape))
    raw = np.random.PCG64([SEED, zlib.crc32(name.encode())]).random_raw((size + 1) // 2)
    words = raw.astype("<u8").view("<u4")[:size].astype(np.float32)
    spread = np.float32(2 * 3**0.5)
    return ((words / np.float32(2**32) - np.float32(0.5)) * spread).reshape(shape)


def fill_(net: nn.Module) -> None:
    """Give every floating tensor its seeded values, by its name alone; see ``SCHEME``."""
    with torch.no_grad():
        for name, tensor in sorted(net.state_dict().items()):
            if not tensor.is_floating_point():
                continue
            drawn = torch.from_numpy(uniform(tuple(tensor.shape), name))
            if name.endswith("relative_position_bias_table"):
                drawn = drawn / 10
            elif tensor.ndim >= 2:
                drawn = drawn / tensor[0].numel() ** 0.5
            elif name.endswith(("running_var", "weight")):
                drawn = 1 + drawn / 10
            else:
                drawn = drawn / 10
            tensor.copy_(drawn)


def pictures() -> tuple[Tensor, Tensor]:
    """Normalised pictures and depth maps, (B, 3, 224, 224) each, with structure at two scales."""
    coarse = uniform((2, BATCH, 3, 14, 14), "coarse").repeat(16, axis=3).repeat(16, axis=4)
    drawn = torch.from_numpy(coarse + 0.3 * uniform((2, BATCH, 3, 224, 224), "fine"))
    depth = drawn[1, :, :1].expand(-1, 3, -1, -1).contiguous()
    return drawn[0], depth


def summary(score: Tensor, fused: Tensor, pooled: Tensor) -> dict[str, Any]:
    """What is compared: scores, and statistics of the features."""
    stages = fused.double().split([64, 128, 256, 512], 1)
    return {
        "score": score.double().tolist(),
        "fused_mean_by_stage": [[float(s.mean()) for s in stage] for stage in stages],
        "fused_std_by_stage": [[float(s.std()) for s in stage] for stage in stages],
        "fused_at": {str(place): float(fused[place]) for place in PLACES},
        "pooled_mean": pooled.double().mean(1).tolist(),
        "pooled_std": pooled.double().std(1).tolist(),
    }


def _published(folder: Path) -> nn.Module:
    import timm

    create = timm.create_model
    timm.create_model = lambda *words, **options: create(*words, **{**options, "pretrained": False})
    sys.path.insert(0, str(folder))
    from model.DGIQA import DGIQA

    return DGIQA()


def make(folder: Path) -> dict[str, Any]:
    """Run the published definition once, in double precision."""
    net = _published(folder).eval()
    fill_(net)
    net = net.double()
    kept: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        return lambda module, given, made: kept.__setitem__(name, made)

    net.refinement_attention.register_forward_hook(keep("fused"))
    net.global_pool.register_forward_hook(keep("pooled"))
    with torch.no_grad():
        score = net(*(p.double() for p in pictures()))
    revision = subprocess.run(
        ["git", "-C", str(folder), "rev-parse", "HEAD"], check=True, capture_output=True, text=True
    ).stdout.strip()
    return {
        "made_from": {"repository": "github.com/uf-robopi/DGIQA", "commit": revision},
        "made_by": "python tests/golden/teacher_golden.py PUBLISHED",
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("numpy", "torch", "timm")},
        },
        "seed": SEED,
        "weights": SCHEME,
        "precision": "float64",
        "num_parameters": sum(p.numel() for p in net.parameters()),
        "num_tensors": len(net.state_dict()),
        "names_crc32": zlib.crc32("\n".join(sorted(net.state_dict())).encode()),
        "expected": summary(score, kept["fused"], kept["pooled"].flatten(1)),
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    GOLDEN.write_text(json.dumps(make(Path(sys.argv[1])), indent=1) + "\n")
