"""Large clean pictures, set together of small ones.

Clean pictures at the size of a video frame are rare, and a small picture that is enlarged has none
of the detail that a codec takes away. So several lie side by side, each cut or enlarged a little:
at its native resolution every part of the frame is a photograph, and the whole, reduced to a few
hundred pixels, hides what a codec did to it, as it does of a real frame of 1080 lines.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np

from dgiqa_stream.errors import ConfigError
from dgiqa_stream.preprocess import reduced_rgb
from distill.data.build import clean_pictures, content_split, read_picture
from distill.data.codecs import Rgb
from distill.data.shards import encode_picture, whole_or_none

Layout = tuple[int, int, int, int]
"""Height and width in pixels, rows and columns of pictures."""
LAYOUTS: Sequence[Layout] = (
    (720, 1280, 2, 3),
    (900, 1600, 2, 4),
    (1080, 1920, 3, 4),
)
LARGEST_MAGNIFICATION = 1.6
"""Of one picture: a camera's frames are softer, pixel by pixel, than a reduced photograph."""
_MOST_MAGNIFICATION = 8


def write_mosaics(
    folder: Path,
    pristine: Path,
    *,
    number: int,
    first: int = 0,
    layouts: Sequence[Layout] = LAYOUTS,
    largest_magnification: float = LARGEST_MAGNIFICATION,
    seed: int = 0,
) -> list[Path]:
    """Write ``mosaic_000.webp`` and so on (lossless), of pictures of one split each.

    A mosaic belongs to the split that its name says (:func:`distill.data.build.content_split`), as
    do the pictures in it; those of the test split are in none. Equal arguments and pictures give
    equal files.

    Args:
        first: number of the first one, so that a second folder has others.
        layouts: each mosaic has one of them, drawn.
        largest_magnification: each picture is enlarged by 1 to so many times, drawn.

    Raises :class:`ConfigError` where a split has no picture that fills a place, and
    ``FileNotFoundError`` where there is no clean picture at all.
    """
    if number < 1 or first < 0:
        raise ConfigError(f"{number} mosaics from {first} on: give 1 or more from 0 or a later one")
    if not 1 <= largest_magnification <= _MOST_MAGNIFICATION:
        raise ConfigError(
            f"pictures magnified {largest_magnification:g} times: give 1 to {_MOST_MAGNIFICATION}"
        )
    by_split: dict[str, list[Path]] = {"train": [], "validation": []}
    for path in clean_pictures(pristine):
        by_split[content_split(path.name)].append(path)
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for i in range(first, first + number):
        path = folder / f"mosaic_{i:03d}.webp"
        rng = np.random.default_rng([seed, zlib.crc32(path.name.encode())])
        layout = layouts[int(rng.integers(len(layouts)))]
        rgb = _mosaic(by_split[content_split(path.name)], layout, largest_magnification, rng)
        with whole_or_none(path) as partial:
            partial.write_bytes(encode_picture(rgb))
        written.append(path)
    return written


def layout_of(text: str) -> Layout:
    """``540x960x2x3``: lines, columns of pixels, rows and columns of pictures."""
    parts = text.split("x")
    numbers = [int(part) for part in parts if part.isascii() and part.isdecimal()]
    if len(parts) != 4 or len(numbers) != 4 or min(numbers) < 1:
        raise ConfigError(f"{text!r} is no layout: give LINESxWIDTHxROWSxCOLUMNS, as 540x960x2x3")
    height, width, rows, columns = numbers
    if height % 2 or width % 2 or height < 64 * rows or width < 64 * columns:
        raise ConfigError(f"{text!r}: sides must be even, and each picture 64 px or more on a side")
    return height, width, rows, columns


def _mosaic(
    paths: Sequence[Path], layout: Layout, largest_magnification: float, rng: np.random.Generator
) -> Rgb:
    """One large picture."""
    height, width, rows, columns = layout
    out = np.empty((height, width, 3), np.uint8)
    waiting = [paths[i] for i in rng.permutation(len(paths))]
    for strip in np.array_split(out, rows, axis=0):
        for place in np.array_split(strip, columns, axis=1):
            place[:] = _fill(waiting, place.shape[:2], largest_magnification, rng)
    return out


def _fill(
    waiting: list[Path],
    size: tuple[int, int],
    largest_magnification: float,
    rng: np.random.Generator,
) -> Rgb:
    """A part of the next picture that is large enough, magnified at random; takes what it tried."""
    height, width = size
    while waiting:
        planes = read_picture(waiting.pop())
        least = max(1.0, height / planes.size[0], width / planes.size[1])
        if least > largest_magnification:
            continue
        rgb = reduced_rgb(planes, longest_px=max(planes.size))
        scale = rng.uniform(least, largest_magnification)
        cut = math.ceil(height / scale), math.ceil(width / scale)
        top, left = (int(rng.integers(n - c + 1)) for n, c in zip(rgb.shape[:2], cut, strict=True))
        part = rgb[top : top + cut[0], left : left + cut[1]]
        large = cv2.resize(part, (width, height), interpolation=cv2.INTER_CUBIC)
        return np.asarray(large, np.uint8)
    raise ConfigError(
        f"too few clean pictures of one split that fill {width}x{height}, magnified "
        f"{largest_magnification:g} times at most: give a folder with more"
    )
