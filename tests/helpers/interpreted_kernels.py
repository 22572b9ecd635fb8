"""Compares the kernels of ``plugins.torch_gpu.kernels`` with what they stand in for, on a CPU.

    TRITON_INTERPRET=1 python tests/helpers/interpreted_kernels.py

Triton decides when it is imported whether it interprets, so this runs in a process of its own. It
prints JSON: for each case how far the bytes are, at most, from torch's operations and the CPU's.
"""

from __future__ import annotations

import functools
import itertools
import json
import sys

import numpy as np
import torch

from dgiqa_stream.preprocess import ViewSpec, make_batch
from dgiqa_stream.types import ColorMatrix, Crop
from plugins.torch_gpu import kernels
from plugins.torch_gpu.planes import TorchPlanes
from plugins.torch_gpu.views import cut_views

VIEWS = [
    ViewSpec("whole", "whole", 18, 14),
    ViewSpec("smooth", "whole", 18, 14, reduction="halved-smoothed"),
    ViewSpec("fragments", "fragments", 16, 24, rows=2, columns=3),
]
LAYOUTS = {  # down and across of chroma; None for packed RGB; no chroma for grey
    "4:2:0": (2, 2), "4:2:2": (1, 2), "4:4:4": (1, 1), "NV12": "NV12", "grey": (), "RGB": None,
    "P010": "NV12", "4:2:0 of 10 bits": (2, 2), "grey of 12 bits": (), "RGB of 16 bits": None,
}  # fmt: skip
BITS = {"P010": 16, "4:2:0 of 10 bits": 10, "grey of 12 bits": 12, "RGB of 16 bits": 16}
SIZES = {  # height, width, crop, rotation
    "halved": (61, 122, None, 0),
    "odd, turned": (45, 37, None, 90),
    "as large": (36, 28, None, 0),
    "enlarged, upside down": (12, 10, None, 180),
    "cropped, turned": (70, 131, Crop(5, 3, 33, 60), 270),
}


def plane(rng: np.random.Generator, *shape: int, bits: int = 8, unused: int = 0) -> torch.Tensor:
    """Samples whose rows lie further apart than they are long, as a decoder's do; of the lowest
    bits some may be unused.
    """
    dtype = np.uint8 if bits == 8 else np.uint16
    wide = rng.integers(0, 1 << bits, (shape[0], shape[1] + 5, *shape[2:]), dtype=dtype)
    return torch.from_numpy(wide >> unused << unused)[:, : shape[1]]


def picture(layout: str, height: int, width: int, seed: int, rotation: int) -> TorchPlanes:
    """Noise of one layout; matrix and range by the seed."""
    bits = BITS.get(layout, 8)
    unused = 6 if layout == "P010" else 0
    made = functools.partial(plane, np.random.default_rng(seed), bits=bits, unused=unused)
    kind = LAYOUTS[layout]
    if kind is None:
        tensors = [made(height, width, 3)]
    elif kind == "NV12":
        height, width = height // 2 * 2, width // 2 * 2
        tensors = [made(height, width), made(height // 2, width // 2, 2)]
    else:
        tensors = [made(height, width)]
        if kind:
            tensors += [made(-(-height // kind[0]), -(-width // kind[1])) for _ in range(2)]
    return TorchPlanes(
        tuple(tensors),
        matrix=list(ColorMatrix)[seed % len(ColorMatrix)],
        full_range=bool(seed % 2),
        rotation=rotation,
        bit_depth=bits,
    )


def main() -> None:
    """Print what was found."""
    cut, calls = kernels.cut, []
    kernels.cut = lambda *given: calls.append(given) or cut(*given)
    found = {}
    for layout, (name, (height, width, crop, rotation)) in itertools.product(
        LAYOUTS, SIZES.items()
    ):
        pictures = [picture(layout, height, width, seed, rotation) for seed in (0, 1)]
        calls.clear()
        made = cut_views(pictures, VIEWS, crops=[crop, crop], by_kernels=True)
        plain = cut_views(pictures, VIEWS, crops=[crop, crop], by_kernels=False)
        cpu = make_batch([p.on_cpu() for p in pictures], VIEWS, crop=crop).views
        found[f"{layout}, {name}"] = {
            "num_kernel_calls": len(calls),
            "from_torch": max(_apart(made[v.name], plain[v.name].numpy()) for v in VIEWS),
            "from_cpu": max(_apart(made[v.name], cpu[v.name]) for v in VIEWS),
        }
    json.dump(found, sys.stdout, indent=1)


def _apart(made: torch.Tensor, wanted: np.ndarray) -> int:
    assert made.shape == wanted.shape
    return int(np.abs(made.numpy().astype(int) - wanted.astype(int)).max())


if __name__ == "__main__":
    main()
