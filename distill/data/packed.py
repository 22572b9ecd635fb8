"""Decoded pictures in one flat file, so that training reads planes and never decodes.

A pack is a folder of two files: ``planes.u8`` (4:2:0 Y'CbCr samples, picture after picture) and
``index.json`` (a :class:`PackIndex`: what made it, and a :class:`Record` for each picture).
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import cv2
import msgspec
import numpy as np
from numpy.typing import NDArray

from dgiqa_stream.errors import SourceError
from dgiqa_stream.preprocess import reduced_rgb
from dgiqa_stream.types import ColorMatrix, Planes


class Record(msgspec.Struct, frozen=True, omit_defaults=True):
    """One picture of a pack and what is known about it."""

    name: str
    content: str
    """Which scene it shows: pictures of one content never lie in two splits."""
    split: str
    height: int = 0
    width: int = 0
    offset: int = 0
    """Where it begins in ``planes.u8``, in bytes."""
    mos: float | None = None
    """Human rating on 0..1, where there is one."""
    degradation: str = ""
    level: int = 0
    """0 is clean; a higher level of one degradation is worse."""


class PackIndex(msgspec.Struct, frozen=True):
    """What is in a pack and what made it."""

    made_by: str
    settings: dict[str, Any]
    records: list[Record]
    schema: Literal["dgiqa.pack/1"] = "dgiqa.pack/1"


def as_planes_420(rgb: NDArray[np.uint8]) -> Planes:
    """RGB of even size to full-range BT.601 4:2:0 planes, as a JPEG stores them."""
    height, width = rgb.shape[0] & ~1, rgb.shape[1] & ~1
    ycc = cv2.cvtColor(np.ascontiguousarray(rgb[:height, :width]), cv2.COLOR_RGB2YCrCb)
    half = (width // 2, height // 2)
    luma, cr, cb = (np.asarray(plane, np.uint8) for plane in cv2.split(ycc))
    cb, cr = (
        np.asarray(cv2.resize(c, half, interpolation=cv2.INTER_AREA), np.uint8) for c in (cb, cr)
    )
    return Planes((luma, cb, cr), matrix=ColorMatrix.BT601, full_range=True)


def _is_stored_form(planes: Planes) -> bool:
    height, width = planes.size
    return (
        len(planes.samples) == 3
        and planes.matrix is ColorMatrix.BT601
        and planes.full_range
        and planes.bit_depth == 8
        and planes.rotation == 0
        and height % 2 == width % 2 == 0
        and planes.samples[1].shape == (height // 2, width // 2)
    )


def write_pack(
    folder: Path,
    pictures: Iterable[tuple[Record, Planes]],
    *,
    made_by: str,
    settings: dict[str, Any],
) -> int:
    """Write pictures as they come; the pack appears under its name only when it is whole.

    Pictures that are not full-range BT.601 4:2:0 are converted to it. Returns their number.
    """
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / "planes.u8.part"
    records: list[Record] = []
    offset = 0
    with partial.open("wb") as out:
        for record, original in pictures:
            planes = original
            if not _is_stored_form(planes):
                planes = as_planes_420(reduced_rgb(planes, longest_px=1 << 30))
            height, width = planes.size
            for plane in planes.samples:
                out.write(np.ascontiguousarray(plane).tobytes())
            records.append(
                msgspec.structs.replace(record, height=height, width=width, offset=offset)
            )
            offset += height * width * 3 // 2
    (folder / "index.json").unlink(missing_ok=True)  # it does not belong to the new planes
    partial.replace(folder / "planes.u8")
    index = PackIndex(made_by=made_by, settings=settings, records=records)
    temporary = folder / "index.json.part"
    temporary.write_bytes(msgspec.json.format(msgspec.json.encode(index), indent=1))
    temporary.replace(folder / "index.json")
    return len(records)


def _read_index(folder: Path) -> PackIndex:
    again = "make it again with `dgiqa-distill data`"
    try:
        index = msgspec.json.decode((folder / "index.json").read_bytes(), type=PackIndex)
        num_bytes = (folder / "planes.u8").stat().st_size
    except FileNotFoundError as exc:
        raise SourceError(f"no whole pack at {folder}: {again}") from exc
    except (msgspec.DecodeError, UnicodeDecodeError) as exc:
        raise SourceError(f"{folder / 'index.json'} is not a pack's index: {exc}; {again}") from exc
    expected = sum(r.height * r.width * 3 // 2 for r in index.records)
    if expected != num_bytes or not index.records:
        raise SourceError(
            f"{folder / 'planes.u8'} has {num_bytes} bytes, its index tells of "
            f"{len(index.records)} pictures in {expected}: {again}"
        )
    return index


class Pack:
    """A written pack: ``records`` and the planes of each, mapped from disk.

    Raises :class:`SourceError` where the index or the planes are missing, damaged or do not agree.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.index = _read_index(folder)
        self._bytes = np.memmap(folder / "planes.u8", np.uint8, mode="r")

    def __reduce__(self) -> tuple[type[Pack], tuple[Path]]:
        """Another process maps the file anew: a copied map would be all of its bytes."""
        return type(self), (self.folder,)

    @property
    def records(self) -> list[Record]:
        """Every picture in the order it was written."""
        return self.index.records

    def planes(self, record: Record) -> Planes:
        """The samples of one picture, as views of the mapped file."""
        height, width, offset = record.height, record.width, record.offset
        luma_end = offset + height * width
        chroma_len = height * width // 4
        luma = self._bytes[offset:luma_end].reshape(height, width)
        cb = self._bytes[luma_end : luma_end + chroma_len].reshape(height // 2, width // 2)
        cr = self._bytes[luma_end + chroma_len : luma_end + 2 * chroma_len]
        return Planes(
            (luma, cb, cr.reshape(height // 2, width // 2)),
            matrix=ColorMatrix.BT601,
            full_range=True,
        )
