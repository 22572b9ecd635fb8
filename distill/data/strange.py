"""Pictures of kinds that nobody rated, to learn what a student does not know.

Text, interfaces, charts, test patterns, noise and empty pictures, each drawn anew from a seed and
then coded at a random strength, for what is foreign should be told whatever its damage. What judges
a model (:mod:`distill.evaluation.strange_pictures`) is drawn by other code, on purpose.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from itertools import pairwise
from types import MappingProxyType
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from distill.data.codecs import Rgb, transcode
from distill.data.strange_text import (
    Colour,
    chats,
    credits_,
    listings,
    pages,
    slides,
    tables,
    theme,
    windows,
)

SIDE_PX = 512
FIT_SEED, JUDGE_SEED = 0, 1
"""Second numbers of the seeds of pictures to learn from, and of those to judge by."""
Rng = np.random.Generator
_JPEG_SHARE, _H264_SHARE = 0.45, 0.25
"""Of pictures; the others stay as drawn."""
_JPEG_QUALITIES, _H264_FACTORS = (15, 96), (18, 42)


def strange_picture(kind: str, *, seed: tuple[int, ...], side_px: int = SIDE_PX) -> Rgb:
    """One picture of a kind, coded or not, uint8 (side, side, 3).

    Raises ``ValueError`` for a kind that is not in :data:`KINDS`.
    """
    if kind not in KINDS:
        raise ValueError(f"no kind of strange picture {kind!r}; known here: {', '.join(KINDS)}")
    rng = np.random.default_rng([*seed, zlib.crc32(kind.encode())])
    drawn = KINDS[kind](rng, side_px)
    return _coded(np.ascontiguousarray(drawn), rng)


def _coded(rgb: Rgb, rng: Rng) -> Rgb:
    """As it was drawn, or through JPEG or H.264."""
    how = rng.uniform()
    if how < _JPEG_SHARE:
        quality = int(rng.integers(*_JPEG_QUALITIES))
        _, coded = cv2.imencode(".jpg", rgb[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])
        return np.ascontiguousarray(np.asarray(cv2.imdecode(coded, 1), np.uint8)[..., ::-1])
    if how < _JPEG_SHARE + _H264_SHARE:
        return transcode([rgb], "h264", int(rng.integers(*_H264_FACTORS)))[0]
    return rgb


def charts(rng: Rng, side: int) -> Rgb:
    """Axes with a grid and lines, columns or a pie."""
    paper, ink = theme(rng)
    page = np.full((side, side, 3), paper, np.uint8)
    low, high = side // 8, side - side // 10
    for place in np.linspace(low, high, int(rng.integers(4, 12)), dtype=int).tolist():
        cv2.line(page, (low, place), (high, place), _between(paper, ink, 0.2), 1)
    cv2.rectangle(page, (low, low), (high, high), ink, 1)
    how = int(rng.integers(3))
    if how == 0:
        for _ in range(int(rng.integers(1, 6))):
            across = np.linspace(low, high, int(rng.integers(6, 60)))
            up = np.clip(
                (low + high) / 2 + rng.normal(0, side / 20, len(across)).cumsum(), low, high
            )
            points = np.stack([across, up], 1).astype(np.int32)
            cv2.polylines(
                page, [points], False, colour(rng), int(rng.integers(1, 4)), lineType=cv2.LINE_AA
            )
    elif how == 1:
        edges = np.linspace(low, high, int(rng.integers(4, 25)), dtype=int).tolist()
        fill = colour(rng)
        for a, b in pairwise(edges):
            top = int(rng.integers(low, high))
            cv2.rectangle(page, (a + 2, top), (b - 2, high), fill, -1)
    else:
        ends = np.sort(rng.uniform(0, 360, int(rng.integers(3, 9))))
        centre, axes = (side // 2, side // 2), (side // 3, side // 3)
        for a, b in zip(ends, [*ends[1:], ends[0] + 360], strict=True):
            cv2.ellipse(page, centre, axes, 0, a, b, colour(rng), -1, cv2.LINE_AA)
    for place in np.linspace(low, high, 6, dtype=int).tolist():
        label = f"{rng.uniform(0, 100):.1f}"
        cv2.putText(page, label, (4, place), cv2.FONT_HERSHEY_SIMPLEX, 0.4, ink, 1, cv2.LINE_AA)
    return page


def gratings(rng: Rng, side: int) -> Rgb:
    """Waves, bars and chequers of any colours, at any angle and width."""
    rows, columns = np.indices((side, side)).astype(np.float64)
    angle = rng.choice([0, np.pi / 2, rng.uniform(0, np.pi)])
    period = np.exp(rng.uniform(np.log(3), np.log(side / 2)))
    along = (columns * np.cos(angle) + rows * np.sin(angle)) / period + rng.uniform()
    how = int(rng.integers(4))
    if how == 0:
        wave = 0.5 + 0.5 * np.sin(2 * np.pi * along)
    elif how == 1:
        wave = np.floor(along) % 2
    elif how == 2:
        across = (rows * np.cos(angle) - columns * np.sin(angle)) / period
        wave = (np.floor(along) + np.floor(across)) % 2
    else:  # bars of many colours
        bars = rng.integers(0, 256, (64, 3))
        return bars[np.floor(along).astype(int) % 64].astype(np.uint8)
    return _mixed(wave, *theme(rng))


def ramps(rng: Rng, side: int) -> Rgb:
    """Between two to four colours along a line or around a place, smooth or in steps."""
    rows, columns = np.indices((side, side)) / side
    if rng.uniform() < 0.7:
        angle = rng.choice([0, np.pi / 2, rng.uniform(0, np.pi)])
        along = columns * np.cos(angle) + rows * np.sin(angle)
    else:
        along = np.hypot(rows - rng.uniform(), columns - rng.uniform())
    along = (along - along.min()) / np.ptp(along)
    if rng.uniform() < 0.4:
        num_steps = int(rng.integers(4, 40))
        along = np.floor(along * num_steps) / num_steps
    stops = rng.integers(0, 256, (int(rng.integers(2, 5)), 3))
    if rng.uniform() < 0.4:
        stops = np.repeat(stops[:, :1], 3, 1)
    places = np.linspace(0, 1, len(stops))
    return _bytes(np.stack([np.interp(along, places, stops[:, c]) for c in range(3)], -1))


def plates(rng: Rng, side: int) -> Rgb:
    """Rings and stars: zone plates off the centre, Siemens stars, concentric circles."""
    rows, columns = np.indices((side, side)) - rng.uniform(0.3, 0.7, 2)[:, None, None] * side
    how = int(rng.integers(3))
    if how == 0:
        wave = 0.5 + 0.5 * np.cos(np.pi * (rows**2 + columns**2) / (side * rng.uniform(0.6, 4)))
    elif how == 1:
        wave = 0.5 + 0.5 * np.sin(np.arctan2(rows, columns) * int(rng.integers(6, 72)))
        wave = np.round(wave) if rng.uniform() < 0.5 else wave
    else:
        wave = np.floor(np.hypot(rows, columns) / rng.uniform(3, 40)) % 2
    return _mixed(wave, *theme(rng))


def grain(rng: Rng, side: int) -> Rgb:
    """Noise and nothing else: of any correlation, depth and colour, in cells or single pixels."""
    how = int(rng.integers(4))
    channels = int(rng.choice([1, 3]))
    if how == 0:  # spectra that fall steeply or hardly, not as 1/f
        power = float(rng.choice([rng.uniform(0, 0.7), rng.uniform(1.3, 2.5)]))
        made = _coloured_noise(rng, side, channels, power) * rng.uniform(10, 80)
    elif how == 1:  # cells of any size
        tall, wide = (int(n) for n in rng.choice([1, 2, 3, 4, 5, 6, 10, 12, 20, 32, 48], 2))
        small = rng.uniform(-128, 128, (side // tall + 1, side // wide + 1, channels))
        made = small.repeat(tall, 0).repeat(wide, 1)[:side, :side] * rng.uniform(0.2, 1)
    elif how == 2:  # salt and pepper
        chance = rng.uniform(size=(side, side, channels))
        share = rng.uniform(0.005, 0.06)
        made = 255.0 * (chance < share) - 255.0 * (chance > 1 - share * rng.uniform())
    else:
        made = rng.normal(0, rng.uniform(8, 90), (side, side, channels))
    return _bytes(np.broadcast_to(rng.uniform(0, 255) + made, (side, side, 3)))


def streaks(rng: Rng, side: int) -> Rgb:
    """Noise that is the same along rows or columns, as of a lost signal."""
    lines = rng.normal(128, rng.uniform(20, 90), (side, 1, int(rng.choice([1, 3]))))
    lines = lines + rng.normal(0, rng.uniform(0, 30), (side, side, 1))
    made = _bytes(np.broadcast_to(lines, (side, side, 3)))
    return made if rng.uniform() < 0.5 else made.transpose(1, 0, 2)


def flats(rng: Rng, side: int) -> Rgb:
    """One colour, often black or white, with the noise of a sensor and light that falls off."""
    base = np.array(colour(rng), np.float64)
    if rng.uniform() < 0.6:
        base[:] = rng.choice([0, 8, 16, 128, 235, 255])
    rows, columns = np.indices((side, side)) / side - 0.5
    fall = 1 - rng.choice([0, rng.uniform(0, 0.3)]) * (rows**2 + columns**2) * 2
    noise = rng.normal(0, rng.choice([0, 0.5, rng.uniform(0.5, 8)]), (side, side, 3))
    return _bytes(base * fall[..., None] + noise)


def codes(rng: Rng, side: int) -> Rgb:
    """Blocks of two colours in a frame, or bars, as machines read."""
    paper, ink = theme(rng)
    if rng.uniform() < 0.5:
        cells = int(rng.integers(17, 60))
        bits = rng.integers(0, 2, (cells, cells))
        for top, left in ((0, 0), (0, cells - 7), (cells - 7, 0)):
            bits[top : top + 7, left : left + 7] = 1
            bits[top + 1 : top + 6, left + 1 : left + 6] = 0
            bits[top + 2 : top + 5, left + 2 : left + 5] = 1
    else:
        bits = np.repeat(rng.integers(0, 2, (1, int(rng.integers(40, 120)))), 40, 0)
    inner = int(side * rng.uniform(0.5, 0.95))
    wave = cv2.resize(bits.astype(np.float32), (inner, inner), interpolation=cv2.INTER_NEAREST)
    edge = (side - inner) // 2
    framed = np.pad(np.asarray(wave, np.float64), ((edge, side - inner - edge),) * 2)
    return _mixed(framed, paper, ink)


def colour(rng: Rng) -> Colour:
    """Any colour, red, green, blue."""
    red, green, blue = rng.integers(0, 256, 3).tolist()
    return red, green, blue


def _coloured_noise(rng: Rng, side: int, channels: int, power: float) -> NDArray[np.float64]:
    """(side, side, channels) of mean 0 and deviation 1 whose amplitudes fall as f to -power."""
    rows, columns = np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)
    fall = np.maximum(np.hypot(rows, columns), 1 / side) ** -power
    drawn = np.fft.rfft2(rng.standard_normal((side, side, channels)), axes=(0, 1))
    made = np.fft.irfft2(drawn * fall[..., None], (side, side), axes=(0, 1))
    return np.asarray((made - made.mean()) / made.std())


def _between(a: Colour, b: Colour, share: float) -> Colour:
    red, green, blue = (round(x + share * (y - x)) for x, y in zip(a, b, strict=True))
    return red, green, blue


def _mixed(share: NDArray[np.floating[Any]], a: Colour, b: Colour) -> Rgb:
    """From one colour at 0 to the other at 1, (H, W) to (H, W, 3)."""
    first, second = np.array(a, np.float64), np.array(b, np.float64)
    return _bytes(first + share[..., None] * (second - first))


def _bytes(values: NDArray[np.floating[Any]]) -> Rgb:
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)


KINDS: Mapping[str, Callable[[Rng, int], Rgb]] = MappingProxyType(
    {
        "pages": pages,
        "listings": listings,
        "tables": tables,
        "slides": slides,
        "windows": windows,
        "chats": chats,
        "credits": credits_,
        "charts": charts,
        "gratings": gratings,
        "ramps": ramps,
        "plates": plates,
        "grain": grain,
        "streaks": streaks,
        "flats": flats,
        "codes": codes,
    }
)
"""Kind to what draws one of a side in pixels."""
