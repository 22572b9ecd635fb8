"""The model's views, cut from many pictures at once by torch operations.

The arithmetic is that of :mod:`dgiqa_stream.preprocess`, rounding included, because a difference of
one in a chroma sample is one of two in blue: smoothing is done in whole numbers; 8-bit pictures are
interpolated in OpenCV's own fixed point (11 bits of weight), deeper ones in float32 with a rounding
after each step. Passive, thread-safe, the same on every device; on CUDA devices
:mod:`plugins.torch_gpu.kernels` does the same faster.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dgiqa_stream.preprocess import (
    ViewSpec,
    fragment_starts,
    rgb_matrix,
    smoothing,
    stored_region,
)
from dgiqa_stream.tone_mapping import to_sdr
from dgiqa_stream.types import ColorMatrix, Planes
from plugins.torch_gpu.planes import TorchPlanes

if TYPE_CHECKING:
    from dgiqa_stream.types import Crop, HdrTags

_logger = logging.getLogger("dgiqa_stream.backends")
_Region = tuple[int, int, int, int]
_told: set[object] = set()  # layouts whose refusal by the kernels was told
_WEIGHT_ONE = 1 << 11  # of bilinear weights, in OpenCV's fixed point
_COLOUR_BITS = 10  # of the colour matrix, likewise


def cut_views(
    pictures: Sequence[TorchPlanes],
    views: Sequence[ViewSpec],
    *,
    crops: Sequence[Crop | None] | None = None,
    by_kernels: bool | None = None,
) -> dict[str, Tensor]:
    """Every view of every picture: name to uint8 (N, height, width, 3), RGB, upright.

    Pictures of one layout and crop are cut together; all lie on one device, where the views will.
    ``crops`` has one for each picture, in upright pixels. ``by_kernels`` is chosen for the device
    unless it is given; the bytes are the same. Raises ``ValueError`` when a crop leaves less than 8
    pixels of a side.
    """
    crops = crops or [None] * len(pictures)
    groups: dict[object, list[int]] = {}
    for number, (picture, crop) in enumerate(zip(pictures, crops, strict=True)):
        region = stored_region(cast(Planes, picture), crop)
        groups.setdefault((picture.layout, region), []).append(number)
    device = pictures[0].device
    if by_kernels is None:
        by_kernels = not why_no_kernels(device)
    cut = {v.name: torch.empty((len(pictures), *v.shape), dtype=torch.uint8, device=device)
           for v in views}  # fmt: skip
    for numbers in groups.values():
        alike = [pictures[n] for n in numbers]
        region = stored_region(cast(Planes, alike[0]), crops[numbers[0]])
        for name, found in _views_of(alike, region, views, by_kernels).items():
            if len(groups) == 1:
                cut[name] = found
            else:
                cut[name][torch.tensor(numbers, device=device)] = found
    return cut


def _views_of(
    alike: Sequence[TorchPlanes], region: _Region, views: Sequence[ViewSpec], by_kernels: bool
) -> dict[str, Tensor]:
    """Every view of pictures of one layout, by kernels where they are wanted and know it."""
    if by_kernels and (found := _by_kernels(alike, region, views)):
        return found
    planes = _planes_of(alike)
    return {v.name: _turned(_cut(planes, alike, region, v), alike) for v in views}


def _by_kernels(
    alike: Sequence[TorchPlanes], region: _Region, views: Sequence[ViewSpec]
) -> dict[str, Tensor]:
    """The same by kernels; empty where they do not know the layout or do not compile for it."""
    from plugins.torch_gpu import kernels

    if kernels.why_not(alike):
        return {}
    try:
        return {
            v.name: _turned(kernels.cut(alike, region, v, *_stored(v, alike[0].rotation)), alike)
            for v in views
        }
    except kernels.Refused as exc:
        if alike[0].layout not in _told:
            _told.add(alike[0].layout)
            _logger.warning(
                "views of %s pixels are cut by torch's operations: %s",
                "x".join(str(n) for n in reversed(alike[0].size)), " ".join(str(exc).split())[:200],
            )  # fmt: skip
        return {}


def _stored(view: ViewSpec, rotation: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Height and width, rows and columns of a view before it is turned upright."""
    if rotation in (90, 270):
        return (view.width, view.height), (view.columns, view.rows)
    return (view.height, view.width), (view.rows, view.columns)


def _turned(rgb: Tensor, alike: Sequence[TorchPlanes]) -> Tensor:
    rotation = alike[0].rotation
    return torch.rot90(rgb, -rotation // 90, (1, 2)).contiguous() if rotation else rgb


@lru_cache(maxsize=16)
def why_no_kernels(device: torch.device) -> str:
    """Empty where the device's kernels compile and give what torch's operations give; else why not.

    Asked once for each device: a compiler may be missing, or a GPU too old. Only CUDA has them.
    """
    if device.type != "cuda":
        return "kernels are for CUDA devices"
    try:
        shapes = (61, 75), (31, 38, 2)
        pictures = [
            TorchPlanes(tuple(
                torch.randint(0, 256, s, dtype=torch.int16, device=device).to(torch.uint8)
                for s in shapes
            )),
            TorchPlanes(tuple(
                torch.randint(-(1 << 15), 1 << 15, s, dtype=torch.int16, device=device)
                .view(torch.uint16)
                for s in shapes
            ), bit_depth=16),
        ]  # fmt: skip
        views = [
            ViewSpec("whole", "whole", 24, 20),
            ViewSpec("smooth", "whole", 24, 20, reduction="halved-smoothed"),
            ViewSpec("fragments", "fragments", 16, 24, rows=2, columns=3),
        ]
        found, wanted = (cut_views(pictures, views, by_kernels=is_so) for is_so in (True, False))
        off = max(int((found[v.name].int() - wanted[v.name].int()).abs().max()) for v in views)
    except torch.OutOfMemoryError:
        raise
    except Exception as exc:  # noqa: BLE001 - torch's operations need neither Triton nor a compiler
        reason = f"{type(exc).__name__}: {' '.join(str(exc).split())[:200]}"
    else:
        reason = f"they are up to {off} off" if off > 1 else ""
    if reason:
        _logger.warning("views on %s are cut by torch's operations: %s", device, reason)
    return reason


def _planes_of(alike: Sequence[TorchPlanes]) -> list[Tensor]:
    """Planes (N, H, W) of pictures of one layout; packed RGB as three of them."""
    columns = zip(*(picture.tensors for picture in alike), strict=True)
    stacked = [c[0][None] if len(c) == 1 else _stack(c) for c in columns]
    return [p for s in stacked for p in (s.unbind(-1) if s.ndim == 4 else (s,))]


def _stack(tensors: Sequence[Tensor]) -> Tensor:
    """As ``torch.stack``, which not every device has for uint16."""
    if tensors[0].dtype != torch.uint16:
        return torch.stack(tuple(tensors))
    return torch.stack([t.view(torch.int16) for t in tensors]).view(torch.uint16)


def _cut(
    planes: Sequence[Tensor], alike: Sequence[TorchPlanes], region: _Region, view: ViewSpec
) -> Tensor:
    """One view of pictures of one layout, as stored: uint8 (N, height, width, 3)."""
    size, grid = _stored(view, alike[0].rotation)
    if view.kind == "whole":
        is_smoothed = view.reduction == "halved-smoothed"
        cut = [_whole(p, planes[0], region, *size, is_smoothed=is_smoothed) for p in planes]
    else:
        cut = [_fragments(p, planes[0], region, size, grid) for p in planes]
    return _to_rgb(cut, alike)


# Geometry ---------------------------------------------------------------------------------------


def _subsampling(plane: Tensor, luma: Tensor) -> tuple[int, int]:
    """How many luma samples one sample of the plane stands for, down and across."""
    return -(-luma.shape[1] // plane.shape[1]), -(-luma.shape[2] // plane.shape[2])


def _whole(
    plane: Tensor, luma: Tensor, region: _Region, height: int, width: int, *, is_smoothed: bool
) -> Tensor:
    """The region (N, height, width), reduced: halved, smoothed or not, then bilinear; int32 or
    float32.
    """
    top, left, bottom, right = region
    down, across = _subsampling(plane, luma)
    x = plane[:, top // down : -(-bottom // down), left // across : -(-right // across)]
    is_deep = plane.dtype == torch.uint16
    x = _halve((_integers(x) if is_deep else x).float(), height, width, is_deep=is_deep)
    if is_smoothed:
        x = _smooth(x, height, width)
    if x.shape[1:] == (height, width):
        return x if is_deep else x.to(torch.int32)
    return _bilinear_deep(x, height, width) if is_deep else _bilinear(x, height, width)


def _integers(x: Tensor) -> Tensor:
    """Samples of uint16, or their bits as int16, as int32."""
    return x.view(torch.int16).to(torch.int32) & 0xFFFF


def _halve(x: Tensor, height: int, width: int, *, is_deep: bool) -> Tensor:
    """Means of neighbours along each axis that is twice the target or more, whole numbers again."""
    while (tall := x.shape[1] >= 2 * height) | (wide := x.shape[2] >= 2 * width):
        x = F.avg_pool2d(x, (1 + tall, 1 + wide))  # (N, H >> tall, W >> wide), exact in float32
        # OpenCV rounds halves up, and those of deep samples to the even number.
        x = torch.round(x) if is_deep else torch.floor(x + 0.5)
    return x


def _smooth(x: Tensor, height: int, width: int) -> Tensor:
    """Weighted means of three whole numbers along each axis that is reduced, as float32 again."""
    down, across = smoothing(x.shape[1], height), smoothing(x.shape[2], width)
    if not (down or across):
        return x
    n = x.to(torch.int64)
    for axis, weight in ((2, across), (1, down)):
        last = n.shape[axis] - 1
        before = torch.cat((n.narrow(axis, 0, 1), n.narrow(axis, 0, last)), axis)
        after = torch.cat((n.narrow(axis, 1, last), n.narrow(axis, last, 1)), axis)
        n = (before + after) * weight + n * (256 - 2 * weight)
    return ((n + (1 << 15)) >> 16).float()


def _bilinear(x: Tensor, height: int, width: int) -> Tensor:
    """8-bit whole numbers (N, H, W) to int32 (N, height, width), as OpenCV rounds them."""
    left, right, of_right = places(x.shape[2], width, x.device, is_row=True, is_deep=False)
    upper, lower, of_lower = places(x.shape[1], height, x.device, is_row=False, is_deep=False)
    x = x.to(torch.int32)
    a = fixed(1 - of_right), fixed(of_right)  # (width,)
    b = fixed(1 - of_lower)[:, None], fixed(of_lower)[:, None]  # (height, 1)
    x = x.index_select(2, left) * a[0] + x.index_select(2, right) * a[1]  # (N, H, width)
    x = x >> 4
    x = ((x.index_select(1, upper) * b[0]) >> 16) + ((x.index_select(1, lower) * b[1]) >> 16)
    return (x + 2) >> 2


def fixed(weights: Tensor) -> Tensor:
    """Weights of 0..1 as OpenCV's integers, int32."""
    return torch.round(weights * _WEIGHT_ONE).to(torch.int32)


def _bilinear_deep(x: Tensor, height: int, width: int) -> Tensor:
    """Whole numbers of up to 16 bits, float32 (N, H, W) to (N, height, width)."""
    left, right, of_right = places(x.shape[2], width, x.device, is_row=True, is_deep=True)
    upper, lower, of_lower = places(x.shape[1], height, x.device, is_row=False, is_deep=True)
    x = _between(x.index_select(2, left), x.index_select(2, right), of_right)
    x = _between(x.index_select(1, upper), x.index_select(1, lower), of_lower[:, None])
    return torch.round(x)


def _between(first: Tensor, second: Tensor, weight: Tensor) -> Tensor:
    """``first + weight * (second - first)``, rounded to float32 once, as by OpenCV's FMA."""
    return (first.double() + (second - first).double() * weight.double()).float()


@lru_cache(maxsize=256)
def places(
    num_in: int, num_out: int, device: torch.device, *, is_row: bool, is_deep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """For each target sample: the two it lies between and the weight of the second.

    Beyond the ends both are the last one. OpenCV then forgets the weight within a row and keeps it
    between rows, which shows in the rounding; of 8-bit samples it knows places in float32.
    """
    place = (np.arange(num_out) + 0.5) * (num_in / num_out) - 0.5
    place = place if is_deep else place.astype(np.float32)
    first = np.floor(place).astype(np.int64)
    weight = (place - first).astype(np.float32)
    if is_row:
        weight[(first < 0) | (first >= num_in - 1)] = 0
    lower, upper = (np.clip(n, 0, num_in - 1) for n in (first, first + 1))
    return (
        torch.from_numpy(lower).to(device),
        torch.from_numpy(upper).to(device),
        torch.from_numpy(weight).to(device),
    )


def _fragments(
    plane: Tensor, luma: Tensor, region: _Region, size: tuple[int, int], grid: tuple[int, int]
) -> Tensor:
    """Native squares side by side (N, height, width), int32; chroma repeated to luma's size."""
    down, across = _subsampling(plane, luma)
    where = plane.device
    rows = sources(region[0], region[2], grid[0], size[0], plane.shape[1], down, where)
    columns = sources(region[1], region[3], grid[1], size[1], plane.shape[2], across, where)
    if plane.dtype == torch.uint16:  # few operations know uint16
        return _integers(plane.view(torch.int16)[:, rows[:, None], columns])
    return plane[:, rows[:, None], columns].to(torch.int32)


@lru_cache(maxsize=256)
def sources(
    begin: int,
    end: int,
    num_cells: int,
    length: int,
    num_in: int,
    step: int,
    device: torch.device,
) -> Tensor:
    """Which sample of a plane each sample of the mosaic is, along one axis: (length,)."""
    cell = length // num_cells
    start, kept = fragment_starts(begin, end, num_cells, cell), cell // step
    places = [start(n, 0.5) // step + m for n in range(num_cells) for m in range(kept)]
    repeated = np.floor(np.arange(length) * (1.0 / (length / len(places)))).astype(np.int64)
    mosaic = np.minimum(places, num_in - 1)  # a picture smaller than one fragment: its last sample
    return torch.from_numpy(mosaic[np.minimum(repeated, len(places) - 1)]).to(device)


# Colour -----------------------------------------------------------------------------------------


def _to_rgb(cut: list[Tensor], alike: Sequence[TorchPlanes]) -> Tensor:
    """Reduced planes (N, H, W), all of one size, to uint8 RGB (N, H, W, 3)."""
    first = alike[0]
    is_exact = first.bit_depth == 8 and not first.hdr
    if not is_exact:
        cut = [c.to(torch.float32) * 2.0 ** (8 - first.bit_depth) for c in cut]
    if not first.is_rgb:
        if len(cut) == 1:
            cut = [cut[0], *[torch.full_like(cut[0], 128)] * 2]
        tags = [(p.matrix, p.full_range) for p in alike]
        kinds = tuple(tags if len(set(tags)) > 1 else tags[:1])  # one is broadcast
        m = matrices(kinds, cut[0].device, is_exact)
        y, cb, cr = cut
        cut = [m[:, i, 0] * y + m[:, i, 1] * cb + m[:, i, 2] * cr + m[:, i, 3] for i in range(3)]
        cut = [c >> _COLOUR_BITS for c in cut] if is_exact else cut
    rgb = torch.stack(cut, -1)  # (N, H, W, 3)
    if first.hdr:
        rgb = _tone_mapped(rgb, first.hdr)
    return (rgb if is_exact else torch.round(rgb)).clamp(0, 255).to(torch.uint8)


@lru_cache(maxsize=256)
def matrices(
    kinds: tuple[tuple[ColorMatrix, bool], ...], device: torch.device, is_exact: bool
) -> Tensor:
    """To R'G'B', for each kind: (len, 3, 4, 1, 1), float32, or int32 in OpenCV's fixed point."""
    blank = np.zeros((1, 1), np.uint8)
    planes = [Planes((blank,), matrix=matrix, full_range=full) for matrix, full in kinds]
    found = np.stack([rgb_matrix(p) for p in planes])
    if is_exact:
        found[:, :, 3] += 0.5  # what is cut off below rounds
        found = np.rint(found * (1 << _COLOUR_BITS))
    chosen = found.astype(np.int32 if is_exact else np.float32)
    return torch.from_numpy(chosen).to(device)[..., None, None]


def _tone_mapped(rgb: Tensor, hdr: HdrTags) -> Tensor:
    """HDR views (N, H, W, 3), by the one tone mapping there is, which is the CPU's."""
    mapped = [np.asarray(to_sdr(one, hdr), np.float32) for one in rgb.cpu().numpy()]
    return torch.from_numpy(np.stack(mapped)).to(rgb.device)
