"""From decoded planes to the model's views: the one preprocess of training and serving.

A model looks at a frame in small views (:class:`ViewSpec`):

* ``whole``: the whole picture, reduced to a fixed size (its aspect ratio is not kept): means of
  pairs along each axis while it is twice the target or more, then bilinear, smoothed before that
  (``ViewSpec.reduction``) or not;
* ``fragments``: native-resolution squares on a grid, side by side, so that blocking, blur and
  noise reach the model undiminished (after FAST-VQA, arXiv 2207.02595, section 3.1).

Both are cut from the planes: no full-size RGB picture is ever made. A picture that says how it is
HDR (``Planes.hdr``) is reduced as it is coded, like any other, and what is left of it tone mapped.
Everything here is passive and thread-safe.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

import msgspec
import numpy as np

from dgiqa_stream.tone_mapping import to_sdr
from dgiqa_stream.types import ColorMatrix, Crop, FrameBatch, Planes

if TYPE_CHECKING:
    from numpy.typing import NDArray

_LUMA_WEIGHTS = {  # K_R, K_B of ITU-R BT.601-7, BT.709-6 and BT.2020-2 (non-constant luminance)
    ColorMatrix.BT601: (0.299, 0.114),
    ColorMatrix.BT709: (0.2126, 0.0722),
    ColorMatrix.BT2020: (0.2627, 0.0593),
}
_MIN_PICTURE_PX = 8
_SMOOTHING_ONE = 256  # what the weights of :func:`smoothing` are parts of
_SMOOTHING_IN_PLACE = 25  # 256 * (4 - sqrt(8)) / 12

Reduction: TypeAlias = Literal["halved-bilinear", "halved-smoothed"]
"""How a whole view is made small; smoothed, its sharpness does not jump where a halving begins."""


class ViewSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One model input: how it is cut from a frame.

    ``rows`` and ``columns`` are the grid of fragments; a whole view has one of each. ``reduction``
    says nothing of fragments.
    """

    name: str
    kind: Literal["whole", "fragments"]
    height: Annotated[int, msgspec.Meta(ge=8, le=4096)]
    width: Annotated[int, msgspec.Meta(ge=8, le=4096)]
    rows: Annotated[int, msgspec.Meta(ge=1, le=64)] = 1
    columns: Annotated[int, msgspec.Meta(ge=1, le=64)] = 1
    reduction: Reduction = "halved-bilinear"

    def __post_init__(self) -> None:
        """Refuse a grid of uneven fragments, and fragments that are reduced."""
        if self.kind == "whole" and (self.rows, self.columns) != (1, 1):
            raise ValueError(f"view {self.name!r} is whole: rows and columns must be 1")
        if self.kind == "fragments" and self.reduction != "halved-bilinear":
            raise ValueError(f"view {self.name!r} is fragments, which no reduction makes small")
        if self.height % (2 * self.rows) or self.width % (2 * self.columns):
            raise ValueError(
                f"view {self.name!r}: {self.height}x{self.width} is not a grid of "
                f"{self.rows}x{self.columns} fragments with even sides"
            )

    @property
    def shape(self) -> tuple[int, int, int]:
        """Height, width, 3."""
        return self.height, self.width, 3


def reduction_of(views: Sequence[ViewSpec]) -> Reduction:
    """How the first whole view is reduced; as ever where there is none."""
    return next((v.reduction for v in views if v.kind == "whole"), "halved-bilinear")


def make_batch(
    pictures: Sequence[Planes], views: Sequence[ViewSpec], *, crop: Crop | None = None
) -> FrameBatch:
    """Cut every view from every picture; see :func:`cut_view`."""
    if len(pictures) == 1:  # as of every frame of a stream; stacking would copy it
        return FrameBatch({v.name: cut_view(pictures[0], v, crop=crop)[None] for v in views})
    return FrameBatch(
        {view.name: np.stack([cut_view(p, view, crop=crop) for p in pictures]) for view in views}
    )


def cut_view(
    planes: Planes,
    view: ViewSpec,
    *,
    crop: Crop | None = None,
    jitter: NDArray[np.float64] | None = None,
) -> NDArray[np.uint8]:
    """Cut one view from a picture.

    ``crop`` is in upright pixels; what is outside it (or outside the picture) is left out.
    ``jitter``, for training, moves each fragment within its cell: (rows, columns, 2), uniform in
    0..1, where 0.5 is the serving position. Returns uint8 (height, width, 3), RGB, upright.

    Raises ``ValueError`` when the crop leaves less than 8 pixels of a side.
    """
    turned = planes.rotation in (90, 270)
    region = stored_region(planes, crop)
    height, width = (view.width, view.height) if turned else (view.height, view.width)
    if view.kind == "whole":
        cut = _whole(planes, region, height, width, view.reduction)
    else:
        rows, columns = (view.columns, view.rows) if turned else (view.rows, view.columns)
        cut = _fragments(planes, region, (height, width), (rows, columns), jitter)
    rgb = _to_rgb(cut, planes)
    return np.ascontiguousarray(np.rot90(rgb, -planes.rotation // 90)) if planes.rotation else rgb


def reduced_rgb(planes: Planes, *, longest_px: int) -> NDArray[np.uint8]:
    """The upright picture as uint8 RGB, area-reduced so that its longer side fits; never enlarged.

    With ``longest_px`` at least the longer side, this is the full-size picture.
    """
    height, width = planes.size
    scale = min(1.0, longest_px / max(height, width))
    target = max(1, round(height * scale)), max(1, round(width * scale))
    reduced = _whole(planes, (0, 0, height, width), *target, "halved-bilinear")
    rgb = _to_rgb(reduced, planes)
    return np.ascontiguousarray(np.rot90(rgb, -planes.rotation // 90))


def stored_region(planes: Planes, crop: Crop | None) -> tuple[int, int, int, int]:
    """Top, left, bottom, right of the crop among the stored samples, before rotation.

    Corners are moved to even samples, so that 4:2:0 chroma stays aligned.
    """
    height, width = planes.size
    if crop is None:
        return 0, 0, height, width
    top, left = crop.top, crop.left
    bottom, right = top + crop.height, left + crop.width
    if planes.rotation == 90:  # upright (x, y) was stored at (column y, row H - x)
        top, left, bottom, right = height - right, top, height - left, bottom
    elif planes.rotation == 180:
        top, left, bottom, right = height - bottom, width - right, height - top, width - left
    elif planes.rotation == 270:
        top, left, bottom, right = left, width - bottom, right, width - top
    top, left = max(0, top) & ~1, max(0, left) & ~1
    bottom, right = min(height, bottom), min(width, right)
    if bottom - top < min(_MIN_PICTURE_PX, height) or right - left < min(_MIN_PICTURE_PX, width):
        shown = f"{width}x{height}" if planes.rotation in (0, 180) else f"{height}x{width}"
        raise ValueError(
            f"crop {crop.left},{crop.top},{crop.width},{crop.height} leaves less than "
            f"{_MIN_PICTURE_PX} pixels of a side of the {shown} picture"
        )
    return top, left, bottom, right


def rgb_matrix(planes: Planes) -> NDArray[np.float64]:
    """The 3x4 affine matrix from 8-bit-scaled Y'CbCr to R'G'B' in 0..255; not to be written.

    ITU-T H.273 equations 38 to 40 (limited range: luma 16..235, chroma 16..240).
    """
    return _rgb_matrix(planes.matrix, planes.full_range)


@lru_cache
def _rgb_matrix(matrix: ColorMatrix, full_range: bool) -> NDArray[np.float64]:
    kr, kb = _LUMA_WEIGHTS[matrix]
    kg = 1.0 - kr - kb
    y_gain, c_gain, y_zero = (1.0, 1.0, 0.0)
    if not full_range:
        y_gain, c_gain, y_zero = 255.0 / 219.0, 255.0 / 224.0, 16.0
    to_rgb = np.array(
        [
            [1.0, 0.0, 2.0 * (1.0 - kr)],
            [1.0, -2.0 * kb * (1.0 - kb) / kg, -2.0 * kr * (1.0 - kr) / kg],
            [1.0, 2.0 * (1.0 - kb), 0.0],
        ]
    )
    gains = to_rgb * [y_gain, c_gain, c_gain]
    offset = -gains @ [y_zero, 128.0, 128.0]
    found = np.concatenate([gains, offset[:, None]], axis=1)
    found.flags.writeable = False
    return found


def _whole(
    planes: Planes,
    region: tuple[int, int, int, int],
    height: int,
    width: int,
    reduction: Reduction,
) -> NDArray[Any]:
    """The region of all planes as one picture of (height, width)."""
    luma = planes.samples[0]
    cut = [_halve(plane[_scaled(region, plane, luma)], height, width) for plane in planes.samples]
    if len({plane.shape for plane in cut}) == 1:  # as of most: one call for all, the same bytes
        cut = [_packed(cut)]
    if reduction == "halved-smoothed":
        cut = [_smooth(plane, height, width) for plane in cut]
    return _packed([_resize(plane, height, width) for plane in cut])


def _fragments(
    planes: Planes,
    region: tuple[int, int, int, int],
    size: tuple[int, int],
    grid: tuple[int, int],
    jitter: NDArray[np.float64] | None,
) -> NDArray[Any]:
    """Squares of all planes at native resolution, side by side; chroma repeated to luma's size."""
    from dgiqa_stream.opencv import cv2

    luma = planes.samples[0]
    out = []
    for plane in planes.samples:
        down, across = _subsampling(plane, luma)
        h, w = size[0] // grid[0] // down, size[1] // grid[1] // across
        mosaic = np.empty((h * grid[0], w * grid[1], *plane.shape[2:]), plane.dtype)
        if jitter is None:
            cells = _serving_cells(region, size, grid, (down, across))
        else:
            cells = _cells(region, size, grid, (down, across), jitter)
        for place, squares in cells:
            piece: NDArray[Any] = plane[squares]
            if piece.shape[:2] != (h, w):  # a picture smaller than one fragment
                missing = (0, h - piece.shape[0]), (0, w - piece.shape[1])
                piece = np.pad(piece, (*missing, *[(0, 0)] * (plane.ndim - 2)), mode="edge")
            mosaic[place] = piece
        if mosaic.shape[:2] != size:
            mosaic = cv2.resize(mosaic, size[::-1], interpolation=cv2.INTER_NEAREST)
        out.append(mosaic)
    return _packed(out)


def _cells(
    region: tuple[int, int, int, int],
    size: tuple[int, int],
    grid: tuple[int, int],
    step: tuple[int, int],
    jitter: NDArray[np.float64] | None,
) -> list[tuple[tuple[slice, slice], tuple[slice, slice]]]:
    """Where each fragment of a plane with such a subsampling goes to, and where it comes from."""
    (rows, columns), (down, across) = grid, step
    tall, wide = size[0] // rows, size[1] // columns
    tops = fragment_starts(region[0], region[2], rows, tall)
    lefts = fragment_starts(region[1], region[3], columns, wide)
    h, w = tall // down, wide // across
    cells = []
    for row in range(rows):
        for column in range(columns):
            moved = (0.5, 0.5) if jitter is None else jitter[row, column]
            top, left = tops(row, float(moved[0])) // down, lefts(column, float(moved[1])) // across
            place = slice(row * h, (row + 1) * h), slice(column * w, (column + 1) * w)
            cells.append((place, (slice(top, top + h), slice(left, left + w))))
    return cells


_serving_cells = lru_cache(maxsize=64)(partial(_cells, jitter=None))  # the same for every frame


def fragment_starts(begin: int, end: int, count: int, length: int) -> Any:
    """First samples of the fragments along one axis: (cell, place in it 0..1) -> even start."""

    def start(cell: int, place: float) -> int:
        cell_length = (end - begin) / count
        free = cell_length - length  # negative where fragments overlap
        first = begin + cell * cell_length + place * free
        return int(min(max(first, begin), max(begin, end - length))) & ~1

    return start


def _subsampling(plane: NDArray[Any], luma: NDArray[Any]) -> tuple[int, int]:
    """How many luma samples one sample of the plane stands for, down and across (1, 2 or 4)."""
    return -(-luma.shape[0] // plane.shape[0]), -(-luma.shape[1] // plane.shape[1])


def _scaled(
    region: tuple[int, int, int, int], plane: NDArray[Any], luma: NDArray[Any]
) -> tuple[slice, slice]:
    top, left, bottom, right = region
    down, across = _subsampling(plane, luma)
    return slice(top // down, -(-bottom // down)), slice(left // across, -(-right // across))


def _halve(plane: NDArray[Any], height: int, width: int) -> NDArray[Any]:
    """Means of neighbouring samples, along each axis that is twice the target or more.

    A bilinear sample half-way between two is their mean, and OpenCV is quickest at those.
    """
    from dgiqa_stream.opencv import cv2

    while (tall := plane.shape[0] >= 2 * height) | (wide := plane.shape[1] >= 2 * width):
        h, w = plane.shape[0] >> tall, plane.shape[1] >> wide
        even = plane[: h << tall, : w << wide]
        plane = cv2.resize(even, (w, h), interpolation=cv2.INTER_LINEAR)
    return plane


def smoothing(num_in: int, num_out: int) -> int:
    """What each neighbour weighs, in 256ths, before bilinear sampling reduces an axis; 0 to 64.

    The three weights (a, 1 - 2 a, a) leave white noise, over the places a sample may fall, the
    power 2/3 - 2 a + 8/3 a^2, which is to be that of bilinear sampling alone, 2/3, over the ratio
    r = num_in / num_out: a = (3 - sqrt(16 / r - 7)) / 8, for r in 1..2. At 2 that is 1/4 and a
    power of 1/3, which is what means of pairs, sampled at a ratio of 1, leave: so a picture a
    little less than twice the target and one a little more come out as sharp. 0 where an axis
    grows. Where it stays as it is, every sample would fall on one place and keep all its power:
    there 1 - 4 a + 6 a^2 = 2/3, what its neighbours in size leave.
    """
    if num_in == num_out:
        return _SMOOTHING_IN_PLACE
    ratio = min(max(num_in / num_out, 1.0), 2.0)
    return round(_SMOOTHING_ONE * (3.0 - math.sqrt(16.0 / ratio - 7.0)) / 8.0)


def _smooth(plane: NDArray[Any], height: int, width: int) -> NDArray[Any]:
    """Weighted means of three samples along each axis that is then reduced; ends are repeated.

    OpenCV's Gaussian of three taps is exact in integers, and of one with this deviation the
    weights are ours.
    """
    from dgiqa_stream.opencv import cv2

    down, across = smoothing(plane.shape[0], height), smoothing(plane.shape[1], width)
    if not (down or across):
        return plane
    return cv2.GaussianBlur(
        plane,
        (3 if across else 1, 3 if down else 1),
        sigmaX=_deviation(across),
        sigmaY=_deviation(down),
        borderType=cv2.BORDER_REPLICATE,
    )


@lru_cache
def _deviation(weight: int) -> float:
    """Of the Gaussian whose neighbours weigh so much, in 256ths; 1 where it has none."""
    if not weight:
        return 1.0
    return math.sqrt(0.5 / math.log((_SMOOTHING_ONE - 2 * weight) / weight))


def _resize(plane: NDArray[Any], height: int, width: int) -> NDArray[Any]:
    """Bilinear to (height, width), from less than twice that."""
    from dgiqa_stream.opencv import cv2

    if plane.shape[:2] == (height, width):
        return plane
    return cv2.resize(plane, (width, height), interpolation=cv2.INTER_LINEAR)


def _packed(cut: list[NDArray[Any]]) -> NDArray[Any]:
    """Planes of one size as one array: (H, W) of grey or packed RGB as it is, else (H, W, 3)."""
    from dgiqa_stream.opencv import cv2

    return cut[0] if len(cut) == 1 else cv2.merge(cut)


def _to_rgb(cut: NDArray[Any], planes: Planes) -> NDArray[np.uint8]:
    """Reduced samples, (H, W) of luma or (H, W, 3), to uint8 RGB (H, W, 3)."""
    from dgiqa_stream.opencv import cv2

    if planes.bit_depth > 8 or planes.hdr:
        cut = cut.astype(np.float32) * np.float32(2.0 ** (8 - planes.bit_depth))
    if planes.is_rgb:
        rgb = cut
    else:
        if cut.ndim == 2:
            neutral = np.full_like(cut, 128)
            cut = cv2.merge([cut, neutral, neutral])
        rgb = cv2.transform(cut, rgb_matrix(planes))
    if planes.hdr:
        rgb = to_sdr(rgb, planes.hdr)
    if rgb.dtype == np.uint8:
        return np.ascontiguousarray(rgb)
    return np.ascontiguousarray(np.clip(np.rint(rgb), 0, 255).astype(np.uint8))
