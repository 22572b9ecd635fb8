"""Pictures that are no photographs: text, noise, black, flat colours and test patterns.

All are drawn from a seed, at sizes that videos have. None is damage: a model may say of each that
it does not know its kind.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from dgiqa_stream.errors import ConfigError
from distill.data.codecs import Rgb

SIZES = ((720, 1280), (480, 640), (1080, 1920), (960, 540))
"""Height, width."""
Size = tuple[int, int]
_LETTERS = tuple("etaoinshrdlucmfwypvbgkjqxz")
_THEMES = (
    ((255, 255, 255), (20, 20, 20)),
    ((18, 18, 20), (220, 220, 220)),
    ((253, 246, 227), (88, 110, 117)),
    ((0, 0, 0), (60, 230, 90)),
)
"""Paper and ink: a document, a dark page, a warm one, a terminal."""
_TEXT_PX = (14, 18, 24, 36)


def text_pages(seed: int) -> Iterator[Rgb]:
    """Pages of words in paragraphs, in four sizes of letters and four pairs of colours.

    Raises ``ConfigError`` where Pillow, which draws them, is not installed.
    """
    rng = np.random.default_rng(seed)
    for i, text_px in enumerate(_TEXT_PX):
        for k, theme in enumerate(_THEMES):
            yield _page(SIZES[(i + k) % len(SIZES)], text_px, *theme, rng=rng)


def _page(
    size: Size,
    text_px: int,
    paper: tuple[int, ...],
    ink: tuple[int, ...],
    *,
    rng: np.random.Generator,
) -> Rgb:
    try:
        from PIL import Image, ImageDraw, ImageFont
    except ImportError as exc:
        raise ConfigError(
            "pages of text are drawn by Pillow: pip install 'dgiqa-stream[report]'"
        ) from exc
    height, width = size
    page = Image.new("RGB", (width, height), paper)
    draw = ImageDraw.Draw(page)
    font = ImageFont.load_default(text_px)
    margin, line_px = width // 20, round(1.4 * text_px)
    for top in range(margin, height - margin - line_px, line_px):
        if rng.uniform() < 0.15:  # between paragraphs
            continue
        draw.text((margin, top), _line(width - 2 * margin, text_px, rng), fill=ink, font=font)
    return np.asarray(page, np.uint8)


def _line(width_px: int, text_px: int, rng: np.random.Generator) -> str:
    """Words of made-up letters that fill most of a line, or part of it where a paragraph ends."""
    share = 1.0 if rng.uniform() < 0.8 else rng.uniform(0.2, 0.9)
    words: list[str] = []
    while len(" ".join(words)) * text_px * 0.5 < share * width_px:
        words.append("".join(rng.choice(_LETTERS, int(rng.integers(1, 11)))))
    return " ".join(words[:-1]) or words[0]


def noise(seed: int) -> Iterator[Rgb]:
    """Nothing but noise: white, grey, binary, pink, of coloured squares, and sparse."""
    rng = np.random.default_rng(seed)
    for make in (_white, _grey, _binary, _pink, _squares, _sparse):
        for size in SIZES:
            yield make(size, rng)


def _white(size: Size, rng: np.random.Generator) -> Rgb:
    return rng.integers(0, 256, (*size, 3), np.uint8)


def _grey(size: Size, rng: np.random.Generator) -> Rgb:
    return _three(128 + 50 * rng.standard_normal(size))


def _binary(size: Size, rng: np.random.Generator) -> Rgb:
    """As a television without a signal."""
    return _three(255.0 * rng.integers(0, 2, size))


def _pink(size: Size, rng: np.random.Generator) -> Rgb:
    """Amplitudes fall as 1/f, as in photographs, but nothing is shown."""
    rows, columns = np.fft.fftfreq(size[0])[:, None], np.fft.rfftfreq(size[1])
    fall = 1 / np.maximum(np.hypot(rows, columns), 1 / max(size))
    planes = [np.fft.irfft2(np.fft.rfft2(rng.standard_normal(size)) * fall, size) for _ in range(3)]
    return _bytes(128 + 45 * np.stack([p / p.std() for p in planes], -1))


def _squares(size: Size, rng: np.random.Generator) -> Rgb:
    """Squares of 8 pixels, each of a colour of its own."""
    small = rng.integers(0, 256, (size[0] // 8 + 1, size[1] // 8 + 1, 3), np.uint8)
    return np.ascontiguousarray(small.repeat(8, 0).repeat(8, 1)[: size[0], : size[1]])


def _sparse(size: Size, rng: np.random.Generator) -> Rgb:
    """White dots on black, one pixel in ten."""
    return _three(255.0 * (rng.uniform(size=size) < 0.1))


def black(seed: int) -> Iterator[Rgb]:
    """Black as it is coded: 0, and up to 3 steps above it with the last grain of a codec."""
    rng = np.random.default_rng(seed)
    for size in SIZES:
        for lightest in range(4):
            yield rng.integers(0, lightest + 1, (*size, 3), np.uint8)


def flat(seed: int) -> Iterator[Rgb]:
    """One colour: greys, pure colours and random ones."""
    rng = np.random.default_rng(seed)
    colours = [(g, g, g) for g in (64, 128, 192, 255)]
    colours += [(255, 0, 0), (0, 255, 0), (0, 0, 255), (0, 255, 255)]
    colours += [tuple(c) for c in rng.integers(0, 256, (8, 3)).tolist()]
    for i, colour in enumerate(colours):
        yield np.full((*SIZES[i % len(SIZES)], 3), colour, np.uint8)


def patterns(seed: int) -> Iterator[Rgb]:
    """What engineers look at: bars, ramps, chequers, gratings, zone plates and crosshatches."""
    for make in (_bars, _ramp, _chequers, _grating, _zone_plate, _crosshatch):
        for size in SIZES:
            yield make(size)


def _bars(size: Size) -> Rgb:
    """Eight bars, 75 % (SMPTE EG 1)."""
    bars = [[191 * (7 - i >> k & 1) for k in (1, 2, 0)] for i in range(8)]
    places = np.arange(size[1]) * 8 // size[1]
    return np.ascontiguousarray(np.broadcast_to(np.array(bars, np.uint8)[places], (*size, 3)))


def _ramp(size: Size) -> Rgb:
    return _three(np.broadcast_to(np.linspace(0, 255, size[1]), size))


def _chequers(size: Size) -> Rgb:
    rows, columns = np.indices(size) // 32
    return _three(255.0 * ((rows + columns) % 2))


def _grating(size: Size) -> Rgb:
    """Lines ever finer from left to right, as a sweep."""
    places = np.arange(size[1]) / size[1]
    return _three(np.broadcast_to(127.5 + 127.5 * np.sin(0.2 * size[1] * places**2), size))


def _zone_plate(size: Size) -> Rgb:
    rows, columns = np.indices(size)
    squared = (rows - size[0] / 2) ** 2 + (columns - size[1] / 2) ** 2
    return _three(127.5 + 127.5 * np.cos(np.pi * squared / (2 * max(size))))


def _crosshatch(size: Size) -> Rgb:
    page = np.zeros((*size, 3), np.uint8)
    for place in range(0, max(size), 40):
        cv2.line(page, (place, 0), (place, size[0]), (255, 255, 255), 1)
        cv2.line(page, (0, place), (size[1], place), (255, 255, 255), 1)
    return page


def _three(grey: NDArray[np.floating[Any]]) -> Rgb:
    return np.ascontiguousarray(np.repeat(_bytes(grey)[..., None], 3, axis=-1))


def _bytes(values: NDArray[np.floating[Any]]) -> Rgb:
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)


STRANGE: Mapping[str, Callable[[int], Iterator[Rgb]]] = MappingProxyType(
    {
        "text": text_pages,
        "noise": noise,
        "black": black,
        "flat": flat,
        "patterns": patterns,
    }
)
"""Group to its pictures from a seed."""
