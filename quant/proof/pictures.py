"""Generated pictures to compare models on: what streams send, from clean to broken, by one seed.

Textures of every scale stand in for content, each clean and damaged, so that scores spread; black,
white, noise and letterboxed frames are what INT8 ranges most easily get wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType

import cv2
import numpy as np
from numpy.typing import NDArray

from dgiqa_stream.scorer import planes_of_rgb
from quant.proof.artefacts import NamedPicture

Rgb = NDArray[np.uint8]
"""(H, W, 3)."""
_SIZE = 384, 512
_SMALL = 47, 61  # smaller than every view, and odd
_CELLS = (3, 6, 12, 24, 48, 96, 192)


def generated_pictures(num_textures: int = 8, *, seed: int = 1) -> Iterator[NamedPicture]:
    """Names and pictures; the same for the same seed."""
    for name, rgb in _generated_rgb(num_textures, seed):
        yield f"generated/{name}", planes_of_rgb(rgb)


def _generated_rgb(num_textures: int, seed: int) -> Iterator[tuple[str, Rgb]]:
    rng = np.random.default_rng(seed)
    for name, value in (("black", 0), ("grey", 128), ("white", 255)):
        yield name, np.full((*_SIZE, 3), value, np.uint8)
    yield "noise", rng.integers(0, 256, (*_SIZE, 3), dtype=np.uint8)
    ramp = np.linspace(0, 255, _SIZE[1]).astype(np.uint8)
    yield "ramp", np.ascontiguousarray(np.broadcast_to(ramp[None, :, None], (*_SIZE, 3)))
    yield "small", texture(rng, _SMALL)
    for number in range(num_textures):
        clean = texture(rng, _SIZE)
        yield f"{number}/clean", clean
        for name, damage in DAMAGES.items():
            yield f"{number}/{name}", damage(clean, rng)


def texture(rng: np.random.Generator, size: tuple[int, int]) -> Rgb:
    """Coloured structure at every scale, (H, W, 3); brightness and contrast are drawn."""
    height, width = size
    total = np.zeros((height, width, 3), np.float32)
    steepness = rng.uniform(0.2, 0.9)
    for cells in _CELLS:
        grid = rng.standard_normal((cells, cells, 3)).astype(np.float32)
        grown = cv2.resize(grid, (width, height), interpolation=cv2.INTER_CUBIC)
        total += np.asarray(grown, np.float32) / cells**steepness
    made = rng.uniform(80, 170) + rng.uniform(20, 60) * total
    return np.clip(made, 0, 255).astype(np.uint8)


def letterboxed_rgb(rgb: Rgb) -> Rgb:
    """The picture with black bars over its upper and lower eighth."""
    barred = rgb.copy()
    bar = len(barred) // 8
    barred[:bar], barred[-bar:] = 0, 0
    return barred


def _blurred(rgb: Rgb, _rng: np.random.Generator) -> Rgb:
    return np.asarray(cv2.GaussianBlur(rgb, (0, 0), 2.5), np.uint8)


def _grainy(rgb: Rgb, rng: np.random.Generator) -> Rgb:
    return np.clip(rgb + rng.normal(0, 16, rgb.shape), 0, 255).astype(np.uint8)


def _coded(rgb: Rgb, _rng: np.random.Generator) -> Rgb:
    ok, coded = cv2.imencode(".jpg", rgb, [cv2.IMWRITE_JPEG_QUALITY, 12])
    if not ok:
        raise RuntimeError(f"OpenCV did not encode a JPEG of shape {rgb.shape}")
    return np.asarray(cv2.imdecode(coded, cv2.IMREAD_COLOR), np.uint8)


def _dark(rgb: Rgb, _rng: np.random.Generator) -> Rgb:
    return np.asarray(rgb // 6, np.uint8)


def _barred(rgb: Rgb, _rng: np.random.Generator) -> Rgb:
    return letterboxed_rgb(rgb)


DAMAGES: Mapping[str, Callable[[Rgb, np.random.Generator], Rgb]] = MappingProxyType(
    {
        "blur": _blurred,
        "grain": _grainy,
        "jpeg": _coded,
        "dark": _dark,
        "letterbox": _barred,
    }
)
"""By name, one step each: enough that scores differ."""
