"""Builds the packs a recipe trains on: rated pictures as they are, clean ones on ladders."""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import zlib
from collections.abc import Iterator
from pathlib import Path

import av
import cv2
import numpy as np

from dgiqa_stream.errors import SourceError
from dgiqa_stream.preprocess import reduced_rgb
from dgiqa_stream.sources._jpeg import is_cut_short
from dgiqa_stream.sources._planes import planes_of
from dgiqa_stream.types import Planes
from distill.data.biq2021 import RatedPicture, load_biq2021
from distill.data.degrade import CODEC_LADDERS, PICTURE_LADDERS, Rgb, coded_frame
from distill.data.packed import Record, as_planes_420, write_pack
from distill.say import show_progress

LONGEST_PX = 1088
NOT_A_PICTURE = (av.FFmpegError, SourceError, OSError, StopIteration, ValueError)
"""What :func:`read_picture` may raise."""


def read_picture(path: Path) -> Planes:
    """The upright planes of a still picture.

    Raises one of PyAV's errors, ``OSError`` or ``ValueError`` for a file that is no whole picture.
    """
    if is_cut_short(path.read_bytes()):
        raise ValueError("the JPEG is cut off")  # FFmpeg would fill the rest with grey
    with av.open(str(path)) as container:
        frame = next(container.decode(video=0))
        return planes_of(frame, rotation=-frame.rotation % 360)


def read_named(path: Path) -> Planes:
    """The same; raises :class:`SourceError` naming the file that cannot be read."""
    try:
        return read_picture(path)
    except NOT_A_PICTURE as exc:
        raise SourceError(f"{path} is no picture that can be read: {reason(exc)}") from exc


def reason(exc: BaseException) -> str:
    """Why a picture cannot be read, without its folders: it goes into manifests and results."""
    if isinstance(exc, av.FFmpegError | OSError):
        return str(exc.strerror or type(exc).__name__)
    return str(exc) or "no picture in it"


def build_rated(root: Path, folder: Path, *, num_validation: int, seed: int, made_by: str) -> int:
    """Pack BIQ2021 with its splits; the test part is left out: no training may see it."""
    rated = [
        r for r in load_biq2021(root, num_validation=num_validation, seed=seed) if r.split != "test"
    ]

    def pictures() -> Iterator[tuple[Record, Planes]]:
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            for picture, planes in zip(rated, pool.map(_planes_of_rated, rated), strict=True):
                name = picture.path.name
                yield Record(name, name, picture.split, mos=picture.mos), planes

    settings = {"num_validation": num_validation, "seed": seed}
    return write_pack(folder, pictures(), made_by=made_by, settings=settings)


def _planes_of_rated(picture: RatedPicture) -> Planes:
    return read_named(picture.path)


def content_split(name: str, *, validation_share: float = 0.08) -> str:
    """Which split a clean picture belongs to, by its name alone.

    All CLIC pictures are kept for the final evaluation (``test``); of the others a share chosen
    by a checksum of the name is for validation.
    """
    if name.startswith("clic_"):
        return "test"
    place = zlib.crc32(name.encode()) / 2**32
    return "validation" if place < validation_share else "train"


def _ladders_of(job: tuple[Path, str, int]) -> list[tuple[Record, Planes]]:
    """Every degradation of one clean picture, clean first."""
    path, split, seed = job
    rgb: Rgb = reduced_rgb(read_named(path), longest_px=LONGEST_PX)
    out: list[tuple[Record, Planes]] = []

    def keep(planes: Planes, degradation: str, level: int) -> None:
        name = f"{path.stem}/{degradation}/{level}"
        record = Record(name, path.stem, split, degradation=degradation, level=level)
        out.append((record, planes))

    keep(as_planes_420(rgb), "clean", 0)
    rng = np.random.default_rng([seed, zlib.crc32(path.stem.encode())])
    for name, (degrade, num_levels) in PICTURE_LADDERS.items():
        for level in range(1, num_levels + 1):
            keep(as_planes_420(degrade(rgb, level, rng)), name, level)
    for name, (_, rates) in CODEC_LADDERS.items():
        for level in range(len(rates) + 1):
            keep(coded_frame(rgb, name, level), name, level)
    return out


def clean_pictures(pristine: Path) -> list[Path]:
    """The clean pictures outside the test split; raises ``FileNotFoundError`` where none is."""
    paths = [p for p in sorted(pristine.glob("*.webp")) if content_split(p.name) != "test"]
    if not paths:
        raise FileNotFoundError(f"no clean pictures to degrade in {pristine}: give *.webp files")
    return paths


def build_ladders(pristine: Path, folder: Path, *, seed: int, made_by: str, workers: int) -> int:
    """Pack every clean picture outside the test split with all its degradations."""
    jobs = [(p, content_split(p.name), seed) for p in clean_pictures(pristine)]
    spawn = multiprocessing.get_context("spawn")  # decoders have threads: a fork could hang

    def pictures() -> Iterator[tuple[Record, Planes]]:
        with concurrent.futures.ProcessPoolExecutor(
            workers, mp_context=spawn, initializer=_one_thread
        ) as pool:
            for done, made in enumerate(pool.map(_ladders_of, jobs), 1):
                show_progress(f"{done}/{len(jobs)} contents")
                yield from made
        show_progress(None)

    settings = {"seed": seed, "longest_px": LONGEST_PX}
    return write_pack(folder, pictures(), made_by=made_by, settings=settings)


def _one_thread() -> None:
    cv2.setNumThreads(1)
