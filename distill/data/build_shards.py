"""Makes shards: rated pictures as they are, clean ones with their ladders and chains.

The work is cut into jobs (a clean picture, or a batch of rated ones) that depend on nothing but the
settings, so that any number of processes makes the same bytes. A job that is done leaves
``jobs/<number>.json``; after an interruption, however hard, the same command goes on and makes
again only what is missing or damaged.
"""

from __future__ import annotations

import concurrent.futures
import hashlib
import multiprocessing
import os
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from types import MappingProxyType
from typing import Any

import cv2
import msgspec

from dgiqa_stream.errors import ConfigError, SourceError
from distill.data.build import content_split
from distill.data.codecs import library_versions
from distill.data.datasets import RatedItem
from distill.data.degradations import degradation
from distill.data.rated_sets import DATASETS
from distill.data.shard_records import (
    CleanPicture,
    Job,
    RatedPicture,
    ShardSettings,
    job_pictures,
)
from distill.data.shards import (
    MANIFEST,
    LeftOut,
    Manifest,
    ShardInfo,
    ShardWriter,
    is_whole,
    write_json,
)
from distill.say import say, show_progress

RATED_PER_JOB = 64
NUM_NAMED = 3
CLEAN_LICENCES = {
    "cid22_": "CC BY-SA 4.0",
    "gb82_": "CC0 1.0",
    "clic_": "Unsplash licence",
}
"""By the beginning of a clean picture's name; what others may is for their owner to say."""
_PACKAGES = ("numpy", "opencv-python-headless", "piq", "torch", "ssimulacra2")


class JobDone(msgspec.Struct, frozen=True):
    """What a finished job left."""

    shards: list[ShardInfo]
    num_pictures: dict[str, int]
    """By split."""
    left_out: list[LeftOut]


class _Plan(msgspec.Struct, frozen=True):
    """What is made in a folder; settings that an older plan lacks have their defaults."""

    settings: ShardSettings
    jobs: int
    of: str


def plan_jobs(
    pristine: Path | Sequence[Path] | None,
    rated: Mapping[str, Sequence[RatedItem]],
    *,
    halved: Mapping[str, Sequence[RatedItem]] = MappingProxyType({}),
) -> list[Job]:
    """The work, in an order that names alone decide.

    Args:
        pristine: one or several folders of clean ``.webp`` or ``.png`` pictures; those of the test
            split (:func:`distill.data.build.content_split`) are left out.
        rated: the loaded pictures of each rated set, by its name in ``DATASETS``. Their test parts
            are left out: no training may see them.
        halved: rated pictures that become clean ones when they are halved, likewise by set, as
            :func:`distill.data.halved.clean_when_halved` chooses them.
    """
    folders = [pristine] if isinstance(pristine, Path) else list(pristine or ())
    jobs: list[Job] = [job for folder in folders for job in _clean_jobs(folder)]
    _refuse_equal_names([job for job in jobs if isinstance(job, CleanPicture)])
    for source, items in halved.items():
        pictures = [RatedPicture(item, source) for item in _pictures_of(source, items)]
        jobs += [CleanPicture(p.item.path, "train", f"{source}-halved", p) for p in pictures]
    for source, items in rated.items():
        loaded = _pictures_of(source, items)
        seen = [RatedPicture(item, source) for item in loaded if not item.split.startswith("test")]
        jobs += [tuple(seen[i : i + RATED_PER_JOB]) for i in range(0, len(seen), RATED_PER_JOB)]
    if not jobs:
        raise ConfigError("nothing to put into shards: give clean pictures or a rated set")
    return jobs


def _clean_jobs(folder: Path) -> list[CleanPicture]:
    paths = sorted([*folder.glob("*.webp"), *folder.glob("*.png")])
    splits = {path: content_split(path.name) for path in paths}
    jobs = [CleanPicture(p, splits[p], folder.name) for p in paths if splits[p] != "test"]
    if not jobs:
        raise FileNotFoundError(f"no clean pictures in {folder}: give .webp or .png files")
    return jobs


def _refuse_equal_names(jobs: Sequence[CleanPicture]) -> None:
    """A name stands for one content, whatever its folder."""
    seen: dict[str, Path] = {}
    for job in jobs:
        other = seen.setdefault(job.content, job.path)
        if other != job.path:
            raise ConfigError(f"{other} and {job.path} have one name: rename or remove one of them")


def _pictures_of(source: str, items: Sequence[RatedItem]) -> Sequence[RatedItem]:
    if DATASETS[source].kind != "picture":
        raise ConfigError(f"{source} is a set of clips; shards hold pictures")
    return items


def build_shards(
    folder: Path,
    jobs: Sequence[Job],
    *,
    settings: ShardSettings,
    made_by: str,
    workers: int = 2,
    max_left_out: int = 20,
) -> Manifest:
    """Make, or go on making, the shards of all jobs, and the manifest last.

    Args:
        workers: processes; 1 works in this one.
        max_left_out: so many pictures may be unreadable; they are named, left out and told at the
            end. One more stops the run.

    Raises ``ConfigError`` where the folder holds shards of other settings, ``SourceError`` where
    too many pictures cannot be read, ``SinkError`` on a full disk.
    """
    _check(settings)
    (folder / "jobs").mkdir(parents=True, exist_ok=True)
    for partial in [*folder.glob("*.part"), *(folder / "jobs").glob("*.part")]:
        partial.unlink()
    _keep_plan(folder, jobs, settings)
    done: list[JobDone] = []
    num_left_out = 0
    for result in _results(folder, jobs, settings, workers):
        done.append(result)
        num_left_out += len(result.left_out)
        if num_left_out > max_left_out:
            raise SourceError(
                f"{num_left_out} pictures cannot be read and {max_left_out} may be left out: "
                f"{_named([left for d in done for left in d.left_out])}"
            )
        num_pictures = sum(s.num_pictures for d in done for s in d.shards)
        show_progress(f"{len(done)}/{len(jobs)} jobs, {num_pictures} pictures")
    show_progress(None)
    return _finish(folder, jobs, done, settings, made_by)


def _check(settings: ShardSettings) -> None:
    for name in settings.degradations:
        degradation(name)
    number = settings.ladders_per_picture
    if number is not None and number < 1:
        raise ConfigError(f"a clean picture gets 1 ladder or more, not {number}")


def _named(left_out: Sequence[LeftOut]) -> str:
    more = len(left_out) - NUM_NAMED
    first = "; ".join(f"{left.name} ({left.reason})" for left in left_out[:NUM_NAMED])
    return first + (f"; and {more} more" if more > 0 else "")


def _plan_digest(jobs: Sequence[Job]) -> str:
    """Of names, splits and ratings. The files are not looked into: a broken one may be repaired."""
    lines = []
    for job in jobs:
        if isinstance(job, CleanPicture):
            lines.append(f"{job.source} {job.path.name} {job.split}")
        else:
            lines += [f"{p.source} {p.item.name} {p.item.split} {p.item.mos:.9f}" for p in job]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _keep_plan(folder: Path, jobs: Sequence[Job], settings: ShardSettings) -> None:
    """Remember what is being made here; refuse to mix it with something else."""
    plan = _Plan(settings, len(jobs), _plan_digest(jobs))
    path = folder / "jobs" / "plan.json"
    if path.is_file() and msgspec.json.decode(path.read_bytes(), type=_Plan) != plan:
        raise ConfigError(
            f"{folder} holds shards of other settings or pictures: give another folder"
        )
    if not path.is_file():
        write_json(path, plan)


def _results(
    folder: Path, jobs: Sequence[Job], settings: ShardSettings, workers: int
) -> Iterator[JobDone]:
    """What every job left, in order; only those without a whole result are done."""
    numbered = [(folder, number, job, settings) for number, job in enumerate(jobs)]
    finished = [finished_job(folder, number) for number in range(len(jobs))]
    missing = [work for work, result in zip(numbered, finished, strict=True) if result is None]
    if workers <= 1 or not missing:
        made: Iterator[JobDone] = map(_do_job, missing)
        yield from (next(made) if result is None else result for result in finished)
        return
    spawn = multiprocessing.get_context("spawn")  # decoders have threads: a fork could hang
    with concurrent.futures.ProcessPoolExecutor(
        min(workers, len(missing)), mp_context=spawn, initializer=_begin_worker
    ) as pool:
        made = pool.map(_do_job, missing)
        try:
            for result in finished:
                yield next(made) if result is None else result
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _begin_worker() -> None:
    """One thread for each process; and it ends when its parent does, however that ends."""
    cv2.setNumThreads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: Any) -> None:
    parent.join()
    os._exit(1)


def finished_job(folder: Path, number: int) -> JobDone | None:
    """What a job left, if all of it is there as it was written.

    A job that left pictures out is none: they may have been repaired.
    """
    path = folder / "jobs" / f"{number:05d}.json"
    try:
        done = msgspec.json.decode(path.read_bytes(), type=JobDone)
    except (FileNotFoundError, msgspec.DecodeError, UnicodeDecodeError):
        return None
    whole = not done.left_out and all(is_whole(folder, shard) for shard in done.shards)
    return done if whole else None


def _do_job(work: tuple[Path, int, Job, ShardSettings]) -> JobDone:
    folder, number, job, settings = work
    writer = ShardWriter(folder, f"shard-{number:05d}", max_bytes=settings.max_shard_bytes)
    left_out: list[LeftOut] = []
    num_pictures: Counter[str] = Counter()
    for record, rgb in job_pictures(job, settings, left_out):
        writer.add(record, rgb)
        num_pictures[record.split] += 1
    writer.flush()
    done = JobDone(writer.written, dict(num_pictures), left_out)
    write_json(folder / "jobs" / f"{number:05d}.json", done)
    return done


def _finish(
    folder: Path,
    jobs: Sequence[Job],
    done: Sequence[JobDone],
    settings: ShardSettings,
    made_by: str,
) -> Manifest:
    """Write the manifest and delete shards that no job owns."""
    shards = [shard for result in done for shard in result.shards]
    left_out = [left for result in done for left in result.left_out]
    if not shards:
        raise SourceError(f"no picture could be read: {_named(left_out)}")
    manifest = Manifest(
        made_by=made_by,
        settings=msgspec.to_builtins(settings),
        sources=_sources(jobs),
        versions=_versions(),
        num_pictures=dict(sorted(sum((Counter(d.num_pictures) for d in done), Counter()).items())),
        shards=shards,
        left_out=left_out,
    )
    for stray in set(folder.glob("shard-*.zip")) - {folder / shard.name for shard in shards}:
        stray.unlink()
    write_json(folder / MANIFEST, manifest)
    if left_out:
        say(f"{len(left_out)} pictures could not be read and are left out: {_named(left_out)}")
    return manifest


def _sources(jobs: Sequence[Job]) -> list[dict[str, Any]]:
    """Name, licence and number of pictures of everything that went in.

    Rated pictures that became clean ones have their own row, with ``halved``.
    """
    found: Counter[tuple[str, str, bool]] = Counter()
    for job in jobs:
        if not isinstance(job, CleanPicture):
            for picture in job:
                found[picture.source, DATASETS[picture.source].licence, False] += 1
        elif job.halved_from is not None:
            found[job.source, DATASETS[job.halved_from.source].licence, True] += 1
        else:
            known = (text for key, text in CLEAN_LICENCES.items() if job.path.name.startswith(key))
            found[job.source, next(known, "not known here: ask their owner"), False] += 1
    return [
        {
            "name": name,
            "licence": text,
            "num_pictures": number,
            **({"halved": True} if half else {}),
        }
        for (name, text, half), number in found.items()
    ]


def _versions() -> dict[str, str]:
    """Of everything that had a hand in the bytes."""
    found = library_versions()
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found
