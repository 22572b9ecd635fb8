"""What goes into shards: the pictures of one job with their records, in a fixed order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np

from dgiqa_stream.preprocess import reduced_rgb
from distill.data import pseudo_mos as full_reference
from distill.data.build import NOT_A_PICTURE, read_picture, reason
from distill.data.codecs import Rgb
from distill.data.datasets import RatedItem
from distill.data.degradations import (
    DEGRADATIONS,
    PICTURE_DEGRADATIONS,
    Chain,
    chain,
    degradation,
    ladder_rng,
)
from distill.data.shards import MAX_SHARD_BYTES, LeftOut, ShardRecord


class ShardSettings(msgspec.Struct, frozen=True, kw_only=True):
    """What decides the bytes of shards, besides the pictures."""

    seed: int = 0
    degradations: tuple[str, ...] = PICTURE_DEGRADATIONS
    ladders_per_picture: int | None = None
    """How many of them each clean picture gets, drawn by its name and the seed; None is all."""
    num_chains: int = 4
    """Random pairs of degradations for each clean picture."""
    pseudo_mos: bool = True
    ssimulacra2: bool = False
    """Whether it joins the measures of codecs."""
    longest_px: int = 1088
    max_shard_bytes: int = MAX_SHARD_BYTES


@dataclass(frozen=True, slots=True)
class RatedPicture:
    """A picture of a rated set."""

    item: RatedItem
    source: str


@dataclass(frozen=True, slots=True)
class CleanPicture:
    """A clean picture whose ladders are made."""

    path: Path
    split: str
    source: str
    halved_from: RatedPicture | None = None
    """The rated picture that becomes a clean one when it is halved; ``path`` is its file."""

    @property
    def content(self) -> str:
        """Its name without the suffix; that of a rated picture where it is one, halved."""
        if self.halved_from is None:
            return self.path.stem
        return f"{self.halved_from.source}/{self.halved_from.item.content}"

    @property
    def prefix(self) -> str:
        """With which the names of its pictures begin."""
        if self.halved_from is None:
            return self.content
        return f"{self.source}/{self.halved_from.item.name}"


Job = CleanPicture | tuple[RatedPicture, ...]


def job_pictures(
    job: Job, settings: ShardSettings, left_out: list[LeftOut]
) -> Iterator[tuple[ShardRecord, Rgb]]:
    """Every picture of a job with its record; what cannot be read is put on ``left_out``."""
    if isinstance(job, CleanPicture):
        return _clean_records(job, settings, left_out)
    return _rated_records(job, settings, left_out)


def read_rgb(path: Path, *, longest_px: int, halved: bool = False) -> Rgb:
    """A still picture as uint8 RGB (H, W, 3), upright and no longer than ``longest_px``.

    Args:
        halved: reduced to half of each side at least, by area.

    Raises one of ``NOT_A_PICTURE`` for a file that is no whole picture, such as a JPEG cut off.
    """
    planes = read_picture(path)
    if halved:
        longest_px = min(longest_px, max(planes.size) // 2)
    return np.asarray(reduced_rgb(planes, longest_px=longest_px), np.uint8)


def _rated_records(
    job: Sequence[RatedPicture], settings: ShardSettings, left_out: list[LeftOut]
) -> Iterator[tuple[ShardRecord, Rgb]]:
    for picture in job:
        item = picture.item
        try:
            rgb = read_rgb(item.path, longest_px=settings.longest_px)
        except NOT_A_PICTURE as exc:
            left_out.append(LeftOut(f"{picture.source}/{item.name}", reason(exc)))
            continue
        record = ShardRecord(
            f"{picture.source}/{item.name}",
            f"{picture.source}/{item.content}",
            item.split,
            picture.source,
            mos=round(item.mos, 6),
            mos_std=None if item.mos_std is None else round(item.mos_std, 6),
            degradation=item.degradation,
            level=item.level,
        )
        yield record, rgb


def _clean_records(
    job: CleanPicture, settings: ShardSettings, left_out: list[LeftOut]
) -> Iterator[tuple[ShardRecord, Rgb]]:
    """The clean picture, then its ladders by rising level, then the chains."""
    halved = job.halved_from is not None
    try:
        clean = read_rgb(job.path, longest_px=settings.longest_px, halved=halved)
        if min(clean.shape[:2]) < full_reference.SHORTEST_PX:
            raise ValueError(f"{full_reference.SHORTEST_PX} px or more on a side are needed")
    except NOT_A_PICTURE as exc:
        left_out.append(LeftOut(f"{job.source}/{job.path.name}", reason(exc)))
        return
    base = ShardRecord(f"{job.prefix}/clean", job.content, job.split, job.source, level=0)
    rated = {"pseudo_mos": 1.0, "confidence": 1.0} if settings.pseudo_mos else {}
    yield msgspec.structs.replace(base, degradation="clean", **rated), clean
    made_of = _Clean(job.prefix, base, clean)
    for name in drawn_ladders(settings, job.prefix):
        yield from _ladder_records(made_of, name, settings)
    rng = ladder_rng(settings.seed, job.prefix, "chains")
    for number in range(settings.num_chains):
        made = random_chain(rng, settings.degradations)
        yield _chain_record(made_of, made, number, settings)


def drawn_ladders(settings: ShardSettings, name: str) -> tuple[str, ...]:
    """The ladders that a clean picture of this name gets, in the order of the settings."""
    number, names = settings.ladders_per_picture, settings.degradations
    if number is None or number >= len(names):
        return names
    chosen = ladder_rng(settings.seed, name, "ladders").choice(len(names), number, replace=False)
    return tuple(names[i] for i in sorted(chosen))


@dataclass(frozen=True, slots=True, eq=False)
class _Clean:
    """A clean picture and the record that its degraded versions start from."""

    prefix: str
    base: ShardRecord
    rgb: Rgb


def _measures(names: Sequence[str], settings: ShardSettings) -> Sequence[str]:
    """SSIMULACRA2 was made for codecs: it joins where nothing but a codec was at work."""
    codecs_only = all(DEGRADATIONS[name].kind == "codec" for name in names)
    with_it = settings.ssimulacra2 and codecs_only
    return full_reference.CODEC_ENSEMBLE if with_it else full_reference.ENSEMBLE


def _ladder_records(
    clean: _Clean, name: str, settings: ShardSettings
) -> Iterator[tuple[ShardRecord, Rgb]]:
    chosen, ladder_id = degradation(name), f"{clean.prefix}/{name}"
    levels = range(1, chosen.num_levels + 1)
    pictures = [
        chosen.apply(clean.rgb, level, ladder_rng(settings.seed, clean.prefix, name))
        for level in levels
    ]
    rated: list[full_reference.PseudoMos | None] = [None for _ in levels]
    if settings.pseudo_mos:
        measures = _measures([name], settings)
        each = [full_reference.pseudo_mos(clean.rgb, p, measures=measures) for p in pictures]
        rated = list(full_reference.order_ladder(each))
    for level, rgb, made in zip(levels, pictures, rated, strict=True):
        record = msgspec.structs.replace(
            clean.base, name=f"{ladder_id}/{level}", ladder=ladder_id, degradation=name, level=level
        )
        yield _with_pseudo_mos(record, made), rgb


def random_chain(rng: np.random.Generator, names: Sequence[str]) -> Chain:
    """Two different degradations at random levels, a codec last where there is one."""
    first, second = (str(name) for name in rng.choice(names, 2, replace=len(names) < 2))
    if DEGRADATIONS[first].kind != "still" and DEGRADATIONS[second].kind == "still":
        first, second = second, first  # the scene and the camera come before the stream
    return chain(
        *((n, int(rng.integers(1, DEGRADATIONS[n].num_levels + 1))) for n in (first, second))
    )


def _chain_record(
    clean: _Clean, made: Chain, number: int, settings: ShardSettings
) -> tuple[ShardRecord, Rgb]:
    key = f"chain{number}"
    rgb = made.apply(clean.rgb, ladder_rng(settings.seed, clean.prefix, key))
    record = msgspec.structs.replace(
        clean.base, name=f"{clean.prefix}/{key}", degradation=made.name, level=None
    )
    if not settings.pseudo_mos:
        return record, rgb
    components = made.components(clean.rgb, ladder_rng(settings.seed, clean.prefix, key))
    measures = _measures([step.name for step, _ in made.steps], settings)
    rated = full_reference.pseudo_mos(clean.rgb, rgb, measures=measures, components=components)
    return _with_pseudo_mos(record, rated), rgb


def _with_pseudo_mos(record: ShardRecord, made: full_reference.PseudoMos | None) -> ShardRecord:
    if made is None:
        return record
    return msgspec.structs.replace(
        record,
        pseudo_mos=round(made.score, 6),
        confidence=round(made.confidence, 6),
        impairments={name: round(value, 6) for name, value in made.impairments.items()},
    )
