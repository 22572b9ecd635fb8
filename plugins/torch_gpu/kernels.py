"""Views of pictures by a few Triton kernels, from the decoder's own surfaces.

One kernel halves planes until they are less than twice the view's size, and reads each sample once;
one smooths what is left, where a view asks for it; one interpolates luma and chroma, or picks
fragments out of the surfaces, applies the colour matrix and writes the view. The arithmetic is that
of :mod:`plugins.torch_gpu.views`, so that both give the same bytes: integers for 8 bits; for deeper
samples (P010) float32 with a rounding after each step, which is why the compiler may fuse nothing.
HDR is left to torch itself.

Imported where Triton is; with ``TRITON_INTERPRET=1`` the same code runs on a CPU, for tests.
"""

# ruff: noqa: N803 - compile-time arguments are capitals, as is the habit
# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.errors import TritonError

from dgiqa_stream.preprocess import smoothing
from plugins.torch_gpu import views as plain

if TYPE_CHECKING:
    from dgiqa_stream.preprocess import ViewSpec
    from plugins.torch_gpu.planes import TorchPlanes

Refused = TritonError
"""What is raised where a kernel cannot be compiled for a size or a GPU."""

_CPU = torch.device("cpu")
_GREY, _YCBCR, _RGB = 0, 1, 2
_NUM = 128  # samples or pixels that a block makes, at most
_LOADED = 4096  # samples that it reads at once, about


@triton.jit
def halve_kernel(surfaces, out, height, width, top, left, FIRST: tl.constexpr,
                 STEP: tl.constexpr, DOWN: tl.constexpr, ACROSS: tl.constexpr,
                 NUM: tl.constexpr, IS_DEEP: tl.constexpr):  # fmt: skip
    """NUM samples of a plane halved DOWN times down and ACROSS times across, rounding each time:
    halves up, or to the even number where samples are deep.

    Blocks go over samples, pictures and planes, of which FIRST is the first.
    """
    picture, plane = tl.program_id(1), tl.program_id(2)
    number = tl.program_id(0) * NUM + tl.arange(0, NUM)
    last = height * width - 1
    inside = tl.minimum(number, last)
    surfaces += picture * 6 + (plane + FIRST) * 2
    row_stride = tl.load(surfaces + 1)
    origin = tl.load(surfaces).to(tl.pointer_type(tl.uint16 if IS_DEEP else tl.uint8))
    origin += top * row_stride + left * STEP
    y = ((inside // width)[:, None, None] << DOWN) + tl.arange(0, 1 << DOWN)[None, :, None]
    x = ((inside % width)[:, None, None] << ACROSS) + tl.arange(0, 1 << ACROSS)[None, None, :]
    v = tl.load(origin + y * row_stride + x * STEP).to(tl.int32)  # (NUM, 2**DOWN, 2**ACROSS)
    for k in tl.static_range(max(DOWN, ACROSS)):
        if k < DOWN and k < ACROSS:
            v = tl.reshape(v, (NUM, 1 << (DOWN - k - 1), 2, 1 << (ACROSS - k - 1), 2))
            v = _rounded_shift(tl.sum(tl.sum(v, axis=4), axis=2), 2, IS_DEEP)
        elif k < DOWN:
            v = tl.sum(tl.reshape(v, (NUM, 1 << (DOWN - k - 1), 2, 1)), axis=2)
            v = _rounded_shift(v, 1, IS_DEEP)
        else:
            v = tl.sum(tl.reshape(v, (NUM, 1, 1 << (ACROSS - k - 1), 2)), axis=3)
            v = _rounded_shift(v, 1, IS_DEEP)
    target = out + (plane.to(tl.int64) * tl.num_programs(1) + picture) * height * width + inside
    v = tl.reshape(v, (NUM,)).to(tl.uint16 if IS_DEEP else tl.uint8)
    tl.store(target, v, mask=number <= last)


@triton.jit
def smooth_kernel(surfaces, out, height, width, top, left, down, across,
                  FIRST: tl.constexpr, STEP: tl.constexpr, NUM: tl.constexpr,
                  IS_DEEP: tl.constexpr):  # fmt: skip
    """NUM samples of a plane, each the weighted mean of three by three: neighbours weigh ``down``
    and ``across`` 256ths, and beyond an edge lies its last sample. Blocks as of ``halve_kernel``.
    """
    picture, plane = tl.program_id(1), tl.program_id(2)
    number = tl.program_id(0) * NUM + tl.arange(0, NUM)
    last = height * width - 1
    inside = tl.minimum(number, last)
    surfaces += picture * 6 + (plane + FIRST) * 2
    row_stride = tl.load(surfaces + 1)
    origin = tl.load(surfaces).to(tl.pointer_type(tl.uint16 if IS_DEEP else tl.uint8))
    origin += top * row_stride + left * STEP
    y, x = inside // width, inside % width
    total = tl.zeros((NUM,), tl.int64 if IS_DEEP else tl.int32)
    for row in tl.static_range(-1, 2):
        line = origin + tl.minimum(tl.maximum(y + row, 0), height - 1) * row_stride
        of_row = 256 - 2 * down if row == 0 else down
        for column in tl.static_range(-1, 2):
            place = tl.minimum(tl.maximum(x + column, 0), width - 1) * STEP
            of_column = 256 - 2 * across if column == 0 else across
            total += tl.load(line + place).to(total.dtype) * (of_row * of_column)
    target = out + (plane.to(tl.int64) * tl.num_programs(1) + picture) * height * width + inside
    v = ((total + (1 << 15)) >> 16).to(tl.uint16 if IS_DEEP else tl.uint8)
    tl.store(target, v, mask=number <= last)


@triton.jit
def _rounded_shift(total, BITS: tl.constexpr, TO_EVEN: tl.constexpr):
    """A sum of 2 ** BITS whole numbers to their mean, a whole number."""
    half = 1 << (BITS - 1)
    return (total + half - 1 + ((total >> BITS) & 1 if TO_EVEN else 1)) >> BITS


@triton.jit
def _whole_number(value):
    """Float32, 0 or more, to the nearest int32; halves to the even one."""
    below = value.to(tl.int32)
    rest = value - below.to(tl.float32)  # exact
    return below + ((rest > 0.5) | ((rest == 0.5) & ((below & 1) == 1))).to(tl.int32)


@triton.jit
def _between(first, second, weight):
    """``first + weight * (second - first)``, float32, rounded once: see ``views._between``."""
    step = (second - first).to(tl.float64) * weight.to(tl.float64)
    return (first.to(tl.float64) + step).to(tl.float32)


@triton.jit
def _value(surfaces, tables, height, width, y, x, top, left, PLANE: tl.constexpr,
           STEP: tl.constexpr, IS_WHOLE: tl.constexpr, IS_DEEP: tl.constexpr):  # fmt: skip
    """What one plane is at pixels of a view: int32."""
    row_stride = tl.load(surfaces + 2 * PLANE + 1)
    origin = tl.load(surfaces + 2 * PLANE)
    origin = origin.to(tl.pointer_type(tl.uint16 if IS_DEEP else tl.uint8))
    origin += top * row_stride + left * STEP
    rows, columns = tables + y, tables + 4 * height + x
    upper = origin + tl.load(rows) * row_stride
    left_of = tl.load(columns) * STEP
    value = tl.load(upper + left_of).to(tl.int32)
    if IS_WHOLE:
        lower = origin + tl.load(rows + height) * row_stride
        right_of = tl.load(columns + width) * STEP
        upper_right = tl.load(upper + right_of).to(tl.int32)
        lower_left = tl.load(lower + left_of).to(tl.int32)
        lower_right = tl.load(lower + right_of).to(tl.int32)
        of_left, of_right = tl.load(columns + 2 * width), tl.load(columns + 3 * width)
        of_upper, of_lower = tl.load(rows + 2 * height), tl.load(rows + 3 * height)
        if IS_DEEP:
            across = of_right.to(tl.float32, bitcast=True)
            a = _between(value.to(tl.float32), upper_right.to(tl.float32), across)
            b = _between(lower_left.to(tl.float32), lower_right.to(tl.float32), across)
            value = _whole_number(_between(a, b, of_lower.to(tl.float32, bitcast=True)))
        else:
            a = value * of_left + upper_right * of_right
            b = lower_left * of_left + lower_right * of_right
            a = ((a >> 4) * of_upper) >> 16
            b = ((b >> 4) * of_lower) >> 16
            value = (a + b + 2) >> 2
    return value


@triton.jit
def view_kernel(surfaces, tables, matrices, out, height, width, matrix_stride,
                luma_top, luma_left, chroma_top, chroma_left,
                LUMA_STEP: tl.constexpr, CHROMA_STEP: tl.constexpr, IS_WHOLE: tl.constexpr,
                KIND: tl.constexpr, NUM: tl.constexpr, BITS: tl.constexpr):  # fmt: skip
    """NUM pixels of one view of one picture; blocks go over pixels and pictures."""
    is_deep: tl.constexpr = BITS > 8
    picture = tl.program_id(1)
    number = tl.program_id(0) * NUM + tl.arange(0, NUM)
    last = height * width - 1
    inside = tl.minimum(number, last)
    y, x = inside // width, inside % width
    surfaces += picture * 6
    first = _value(surfaces, tables, height, width, y, x, luma_top, luma_left,
                   0, LUMA_STEP, IS_WHOLE, is_deep)  # fmt: skip
    if KIND == 0:
        second = tl.full((NUM,), 128 << (BITS - 8), tl.int32)
        third = second
    else:
        tables += 4 * (height + width)
        second = _value(surfaces, tables, height, width, y, x, chroma_top, chroma_left,
                        1, CHROMA_STEP, IS_WHOLE, is_deep)  # fmt: skip
        third = _value(surfaces, tables, height, width, y, x, chroma_top, chroma_left,
                       2, CHROMA_STEP, IS_WHOLE, is_deep)  # fmt: skip
    if is_deep:  # steps of 255, which a power of two makes of them exactly
        scale: tl.constexpr = 1.0 / (1 << (BITS - 8))
        first = first.to(tl.float32) * scale
        second, third = second.to(tl.float32) * scale, third.to(tl.float32) * scale
    m = matrices + picture * matrix_stride
    target = out + (picture.to(tl.int64) * height * width + inside) * 3
    for c in tl.static_range(3):
        if KIND == 2:
            value = first if c == 0 else (second if c == 1 else third)
        else:
            value = tl.load(m + 4 * c) * first + tl.load(m + 4 * c + 1) * second
            value = value + tl.load(m + 4 * c + 2) * third + tl.load(m + 4 * c + 3)
            if not is_deep:
                value = value >> 10
        if is_deep:
            value = _whole_number(tl.minimum(tl.maximum(value, 0.0), 255.0))
        value = tl.minimum(tl.maximum(value, 0), 255)
        tl.store(target + c, value.to(tl.uint8), mask=number <= last)


# Calling it -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Geometry:
    """How the samples of one plane come to a view."""

    top: int = 0
    left: int = 0
    down: int = 0
    """How often lines are halved."""
    across: int = 0
    height: int = 0
    """Once halved."""
    width: int = 0
    tensor: Tensor | None = None
    """What holds the samples that a kernel made, until they are read."""


def why_not(alike: Sequence[TorchPlanes]) -> str:
    """Empty where the kernel knows these pictures, all of one layout."""
    first = alike[0]
    if first.hdr:
        return "HDR pictures"
    if len({tuple(t.stride()[1:] for t in picture.tensors) for picture in alike}) > 1:
        return "samples that lie differently apart"
    return ""


def cut(
    alike: Sequence[TorchPlanes],
    region: tuple[int, int, int, int],
    view: ViewSpec,
    size: tuple[int, int],
    grid: tuple[int, int],
) -> Tensor:
    """One view of pictures of one layout, as stored: uint8 (N, height, width, 3).

    ``size`` and ``grid`` are the view's height and width, rows and columns, before any turn. The
    pictures must live until the device has read them.
    """
    first, device = alike[0], alike[0].device
    planes = _planes_of(first)
    is_whole = view.kind == "whole"
    shapes = tuple((p.shape[0], p.shape[1]) for p in (planes[0], planes[-1]))
    prepare = _whole_tables if is_whole else _fragment_tables
    is_deep = first.bit_depth > 8
    tables, luma, chroma = prepare(shapes, region, size, grid, device, is_deep)
    steps = planes[0].stride(1), planes[-1].stride(1)
    surfaces = _surfaces(alike)
    if is_whole:
        read = _Surfaces(surfaces, len(planes), luma, chroma, steps, device, planes[0].dtype)
        read = read.made_by(_halve)
        if view.reduction == "halved-smoothed":
            read = read.made_by(partial(_smooth, size=size))
        surfaces, luma, chroma, steps = read.surfaces, read.luma, read.chroma, read.steps
    kinds = [(p.matrix, p.full_range) for p in alike]
    chosen = tuple(kinds if len(set(kinds)) > 1 else kinds[:1])
    out = torch.empty((len(alike), *size, 3), dtype=torch.uint8, device=device)
    view_kernel[-(-size[0] * size[1] // _NUM), len(alike)](
        surfaces.to(device), tables, plain.matrices(chosen, device, not is_deep), out,
        size[0], size[1], 12 if len(chosen) > 1 else 0,
        luma.top, luma.left, chroma.top, chroma.left, LUMA_STEP=steps[0], CHROMA_STEP=steps[1],
        IS_WHOLE=is_whole, KIND=_RGB if first.is_rgb else _YCBCR if len(planes) > 1 else _GREY,
        NUM=_NUM, BITS=first.bit_depth, enable_fp_fusion=False,
    )  # fmt: skip
    return out


def _planes_of(picture: TorchPlanes) -> tuple[Tensor, ...]:
    """One or three planes (H, W), where they lie."""
    return tuple(
        plane
        for tensor in picture.tensors
        for plane in (tensor.unbind(-1) if tensor.ndim == 3 else (tensor,))
    )


def _surfaces(alike: Sequence[TorchPlanes]) -> Tensor:
    """Address and length of a row of each plane: int64 (N, 3, 2), on the CPU."""
    rows = []
    for picture in alike:
        planes = _planes_of(picture)
        planes = planes if len(planes) == 3 else (planes[0],) * 3
        rows.append([(plane.data_ptr(), plane.stride(0)) for plane in planes])
    return torch.tensor(rows, dtype=torch.int64)


_Step: TypeAlias = Callable[[Tensor, int, _Geometry, int, Tensor], bool]


@dataclass(frozen=True, slots=True)
class _Surfaces:
    """Where the planes of pictures of one layout lie, and which part of them a view reads."""

    surfaces: Tensor
    """As of :func:`_surfaces`."""
    num_planes: int
    luma: _Geometry
    chroma: _Geometry
    steps: tuple[int, int]
    """From one sample to the next, in luma and chroma."""
    device: torch.device
    dtype: torch.dtype

    def made_by(self, step: _Step) -> _Surfaces:
        """The planes that a step makes of these; those that need it not, as they are."""
        source, target = self.surfaces.to(self.device), self.surfaces.clone()
        kept: list[tuple[_Geometry, int]] = []
        for first, last, plane, apart in (
            (0, 1, self.luma, self.steps[0]),
            (1, self.num_planes, self.chroma, self.steps[1]),
        ):
            count = max(0, last - first)
            out = torch.empty((count, len(source), plane.height, plane.width),
                              dtype=self.dtype, device=self.device)  # fmt: skip
            if not count or not step(source, first, plane, apart, out):
                kept.append((plane, apart))
                continue
            numbers = torch.arange(count * len(source)).reshape(count, -1).t()  # (N, count)
            num_bytes = plane.height * plane.width * out.element_size()
            target[:, first:last, 0] = out.data_ptr() + numbers * num_bytes
            target[:, first:last, 1] = plane.width
            kept.append((_Geometry(height=plane.height, width=plane.width, tensor=out), 1))
        (luma, luma_step), (chroma, chroma_step) = kept
        return replace(self, surfaces=target, luma=luma, chroma=chroma,
                       steps=(luma_step, chroma_step))  # fmt: skip


def _halve(source: Tensor, first: int, plane: _Geometry, apart: int, out: Tensor) -> bool:
    """Halve the planes from the first on as often as they need it; whether they do."""
    if not (plane.down or plane.across):
        return False
    num = min(_NUM, max(4, _LOADED >> (plane.down + plane.across)))
    halve_kernel[-(-plane.height * plane.width // num), len(source), len(out)](
        source, out, plane.height, plane.width, plane.top, plane.left,
        FIRST=first, STEP=apart, DOWN=plane.down, ACROSS=plane.across, NUM=num,
        IS_DEEP=out.dtype == torch.uint16,
    )  # fmt: skip
    return True


def _smooth(
    source: Tensor, first: int, plane: _Geometry, apart: int, out: Tensor, *, size: tuple[int, int]
) -> bool:
    """Smooth the planes from the first on along the axes that are then reduced; whether any is."""
    down, across = smoothing(plane.height, size[0]), smoothing(plane.width, size[1])
    if not (down or across):
        return False
    smooth_kernel[-(-plane.height * plane.width // _NUM), len(source), len(out)](
        source, out, plane.height, plane.width, plane.top, plane.left, down, across,
        FIRST=first, STEP=apart, NUM=_NUM, IS_DEEP=out.dtype == torch.uint16,
    )  # fmt: skip
    return True


@lru_cache(maxsize=128)
def _whole_tables(
    shapes: tuple[tuple[int, int], ...],
    region: tuple[int, int, int, int],
    size: tuple[int, int],
    _grid: tuple[int, int],
    device: torch.device,
    is_deep: bool,
) -> tuple[Tensor, _Geometry, _Geometry]:
    """Between which halved samples each pixel lies, in luma and in chroma: int32, flat."""
    found, geometries = [], []
    for shape in shapes:
        down, across = -(-shapes[0][0] // shape[0]), -(-shapes[0][1] // shape[1])
        top, left = region[0] // down, region[1] // across
        tall = min(-(-region[2] // down), shape[0]) - top
        wide = min(-(-region[3] // across), shape[1]) - left
        halved = _halvings(tall, size[0]), _halvings(wide, size[1])
        geometries.append(_Geometry(top, left, *halved, tall >> halved[0], wide >> halved[1]))
        found += [
            _axis(tall >> halved[0], size[0], is_row=False, is_deep=is_deep),
            _axis(wide >> halved[1], size[1], is_row=True, is_deep=is_deep),
        ]
    return torch.cat(found).to(device), geometries[0], geometries[1]  # whole, for every stream


def _halvings(length: int, target: int) -> int:
    """How often a length is halved until it is less than twice the target."""
    return 0 if length < 2 * target else 1 + _halvings(length // 2, target)


def _axis(num_in: int, num_out: int, *, is_row: bool, is_deep: bool) -> Tensor:
    """First and second neighbour and their weights, each (num_out,): int32, flat.

    For deep samples both weights are the bits of the second one's, float32.
    """
    first, second, weight = plain.places(num_in, num_out, _CPU, is_row=is_row, is_deep=is_deep)
    weights = plain.fixed(1 - weight), plain.fixed(weight)
    if is_deep:
        weights = (weight.view(torch.int32),) * 2
    return torch.cat([n.to(torch.int32) for n in (first, second, *weights)])


@lru_cache(maxsize=128)
def _fragment_tables(
    shapes: tuple[tuple[int, int], ...],
    region: tuple[int, int, int, int],
    size: tuple[int, int],
    grid: tuple[int, int],
    device: torch.device,
    _is_deep: bool,
) -> tuple[Tensor, _Geometry, _Geometry]:
    """Which sample each pixel is, in the places that :func:`_whole_tables` has."""
    found: list[Any] = []
    for shape in shapes:
        for axis in (0, 1):
            step = -(-shapes[0][axis] // shape[axis])
            ends = region[axis], region[axis + 2]
            sources = plain.sources(*ends, grid[axis], size[axis], shape[axis], step, _CPU)
            found.append(sources.to(torch.int32).repeat(4))
    return torch.cat(found).to(device), _Geometry(), _Geometry()
