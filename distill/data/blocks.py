"""What block-based coding and broken decoding do to a picture, each a ladder of levels.

Each function takes uint8 RGB (H, W, 3), a level from 1 (slight) and a generator, and returns the
same shape. What it draws does not depend on the level: what is lost at one level is lost at every
higher one of a generator in the same state, and it is filled in the same way.
"""

from __future__ import annotations

from collections.abc import Callable

import cv2
import numpy as np
from numpy.typing import NDArray

from distill.data.codecs import Rgb

Float = NDArray[np.float32]

PIXEL_PX = (1.6, 2.4, 3.6, 5.4, 8.0, 12.0, 19.0, 30.0)
LOST_BLOCK_SHARE = (0.008, 0.02, 0.045, 0.09, 0.17, 0.3, 0.5)
LOST_BELOW_SHARE = (0.05, 0.11, 0.19, 0.3, 0.46, 0.7)
BASELINE_QUALITY = (60, 38, 25, 16, 10, 6, 3)
LUMA_STEP = (14.0, 26.0, 46.0, 80.0, 140.0, 240.0, 420.0)
CHROMA_CELL_PX = (2.5, 4.0, 6.5, 10.5, 17.0, 28.0)

_MACROBLOCK_PX = 16
_BLANKS = (
    (0, 135, 0),  # zeros as Y'CbCr, shown by BT.601
    (0, 77, 0),  # the same by BT.709
    (0, 255, 0),  # the same where a renderer takes full range
    (128, 128, 128),  # a predictor that was never filled
    (16, 16, 16),
)
_DEAD_ZONE = 0.35  # of a step added before it is cut off: encoders round towards zero


def _bytes(picture: object) -> Rgb:
    return np.asarray(picture, np.uint8)


def pixelation(rgb: Rgb, level: int, rng: np.random.Generator) -> Rgb:
    """A mosaic: sent at a fraction of the size and enlarged by repeating pixels.

    Calls that drop to their smallest resolution, and renderers without a filter, show it.
    """
    height, width = rgb.shape[:2]
    side = PIXEL_PX[level - 1]
    cells = max(1, round(width / side)), max(1, round(height / side))
    reduced = cv2.resize(rgb, cells, interpolation=cv2.INTER_AREA)
    return _bytes(cv2.resize(reduced, (width, height), interpolation=cv2.INTER_NEAREST))


def lost_blocks(rgb: Rgb, level: int, rng: np.random.Generator) -> Rgb:
    """Macroblocks or larger coding units that were not decoded, in runs, as streams lose them.

    A ladder has one size of block, one length of runs and one way to fill the gaps: a colour
    (green is a buffer of zeros, grey one that was never predicted), a wrong part of the picture
    (its vectors were lost), or what lies to the left, drawn over it (concealment).
    """
    side = int(rng.choice([_MACROBLOCK_PX, _MACROBLOCK_PX, 2 * _MACROBLOCK_PX]))
    rows, columns = -(-rgb.shape[0] // side), -(-rgb.shape[1] // side)
    order = _in_runs(rows * columns, int(rng.integers(1, 9)), rng)
    filled = _FILLS[int(rng.integers(len(_FILLS)))](rgb, side, rng)
    num_lost = max(level, round(LOST_BLOCK_SHARE[level - 1] * len(order)))
    lost = np.zeros(rows * columns, bool)
    lost[order[:num_lost]] = True
    mask = lost.reshape(rows, columns).repeat(side, 0).repeat(side, 1)
    mask = mask[: rgb.shape[0], : rgb.shape[1]]
    return np.where(mask[..., None], filled, rgb)


def _in_runs(number: int, length: int, rng: np.random.Generator) -> NDArray[np.intp]:
    """0 to ``number`` - 1 in the order in which they are lost, so many neighbours at a time."""
    run_of = np.arange(number) // length
    place = rng.permutation(run_of[-1] + 1)[run_of]
    return np.argsort(place, kind="stable")


def _blank(rgb: Rgb, side: int, rng: np.random.Generator) -> Rgb:
    colour = _BLANKS[int(rng.integers(len(_BLANKS)))]
    return np.broadcast_to(np.array(colour, np.uint8), rgb.shape)


def _misplaced(rgb: Rgb, side: int, rng: np.random.Generator) -> Rgb:
    """The picture from elsewhere, each row of blocks from another place."""
    out = np.empty_like(rgb)
    for top in range(0, len(rgb), side):
        down, right = (int(rng.integers(side, max(side + 1, n - side))) for n in rgb.shape[:2])
        out[top : top + side] = np.roll(rgb, (-down, -right), (0, 1))[top : top + side]
    return out


def _drawn_over(rgb: Rgb, side: int, rng: np.random.Generator) -> Rgb:
    """In each block the column of pixels that ends the block before it; the first has its own."""
    columns = np.arange(rgb.shape[1]) // side * side
    return rgb[:, np.maximum(columns - 1, 0)]


_FILLS: tuple[Callable[[Rgb, int, np.random.Generator], Rgb], ...] = (
    _blank,
    _misplaced,
    _drawn_over,
    _blank,
)


def partial_frame(rgb: Rgb, level: int, rng: np.random.Generator) -> Rgb:
    """A frame that ends too early: below the last row that arrived stands something else.

    A ladder shows one of: the last row of pixels down to the bottom, the last slice again and
    again, or one colour, as decoders and capture drivers leave it when the rest never comes.
    """
    how, colour = int(rng.integers(3)), _blank(rgb, _MACROBLOCK_PX, rng)
    height = len(rgb)
    begin = min(height - 1, max(1, round((1 - LOST_BELOW_SHARE[level - 1]) * height)))
    slice_px = min(begin, (1, _MACROBLOCK_PX)[how % 2])
    below = np.arange(begin, height)
    out = rgb.copy()
    out[begin:] = colour[begin:] if how == 2 else rgb[begin - slice_px + (below - begin) % slice_px]
    return out


def jpeg(rgb: Rgb, level: int, rng: np.random.Generator) -> Rgb:
    """Baseline JPEG down to hardly more than the mean of each block, as cheap cameras send it.

    A ladder has halved colour (4:2:0) or not (4:4:4).
    """
    full_colour = cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444
    sampling = (cv2.IMWRITE_JPEG_SAMPLING_FACTOR_420, full_colour)[int(rng.integers(2))]
    quality = BASELINE_QUALITY[level - 1]
    options = [cv2.IMWRITE_JPEG_QUALITY, quality, cv2.IMWRITE_JPEG_SAMPLING_FACTOR, sampling]
    ok, coded = cv2.imencode(".jpg", cv2.cvtColor(rgb, cv2.COLOR_RGB2BGR), options)
    if not ok:
        raise RuntimeError(f"OpenCV did not encode a JPEG of shape {rgb.shape}")
    return _bytes(cv2.cvtColor(_bytes(cv2.imdecode(coded, cv2.IMREAD_COLOR)), cv2.COLOR_BGR2RGB))


def luma_blocks(rgb: Rgb, level: int, rng: np.random.Generator) -> Rgb:
    """Blocks of a coarse transform of the luma alone, without a filter that hides their edges.

    Old and fast encoders, starved of bits, show it. All coefficients have one step and a dead
    zone; the size of the blocks is drawn among those that codecs have.
    """
    side = int(rng.choice([4, 8, 8, 16]))
    height, width = rgb.shape[:2]
    ycc = _bytes(cv2.cvtColor(rgb, cv2.COLOR_RGB2YCrCb))
    luma = np.pad(ycc[..., 0], ((0, -height % side), (0, -width % side)), mode="edge")
    rebuilt = _quantised(luma.astype(np.float32) - 128, side, LUMA_STEP[level - 1]) + 128
    ycc[..., 0] = np.clip(np.rint(rebuilt[:height, :width]), 0, 255)
    return _bytes(cv2.cvtColor(ycc, cv2.COLOR_YCrCb2RGB))


def _cosines(side: int) -> Float:
    """The orthonormal DCT-II: a row for each frequency."""
    place = np.arange(side)
    rows = np.cos(np.pi * (2 * place[None] + 1) * place[:, None] / (2 * side))
    rows *= np.sqrt(np.where(place[:, None] == 0, 1, 2) / side)
    return np.asarray(rows, np.float32)


def _quantised(plane: Float, side: int, step: float) -> Float:
    """A plane (H, W), of whole blocks, after quantisation of each block's coefficients.

    The mean of a block has a finer step, as in every codec: a quarter.
    """
    basis = _cosines(side)
    down, across = plane.shape[0] // side, plane.shape[1] // side
    blocks = plane.reshape(down, side, across, side).swapaxes(1, 2)
    found = basis @ blocks @ basis.T
    steps = np.full((side, side), step, np.float32)
    steps[0, 0] = step / 4
    kept = np.sign(found) * np.floor(np.abs(found) / steps + (1 - _DEAD_ZONE) * 0.5) * steps
    kept[..., 0, 0] = np.rint(found[..., 0, 0] / steps[0, 0]) * steps[0, 0]
    made = basis.T @ kept @ basis
    return np.asarray(made.swapaxes(1, 2).reshape(plane.shape), np.float32)


def chroma_subsampling(rgb: Rgb, level: int, rng: np.random.Generator) -> Rgb:
    """Colour at a fraction of the luma's resolution, in cells or smooth (drawn once).

    Beyond 4:2:0, as analogue sources, tiny substreams and repeated conversion leave it.
    """
    height, width = rgb.shape[:2]
    side = CHROMA_CELL_PX[level - 1]
    cells = max(1, round(width / side)), max(1, round(height / side))
    how = (cv2.INTER_NEAREST, cv2.INTER_LINEAR)[int(rng.integers(2))]
    ycc = _bytes(cv2.cvtColor(rgb, cv2.COLOR_RGB2YCrCb))
    reduced = cv2.resize(ycc, cells, interpolation=cv2.INTER_AREA)
    ycc[..., 1:] = _bytes(cv2.resize(reduced, (width, height), interpolation=how))[..., 1:]
    return _bytes(cv2.cvtColor(ycc, cv2.COLOR_YCrCb2RGB))
