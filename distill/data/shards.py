"""Pictures and their labels in small files that travel: shards, read at random.

A folder of shards has ``shard-<job>-<part>.zip`` and ``manifest.json``. A shard is an ordinary ZIP
file whose members are stored, not compressed again: lossless WebP pictures and ``records.json``, a
list of :class:`ShardRecord`. Equal pictures and records give equal bytes. The manifest says what
made the shards and has the SHA-256 of each.
"""

from __future__ import annotations

import errno
import hashlib
import os
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import cv2
import msgspec
import numpy as np

from dgiqa_stream.errors import ConfigError, SinkError, SourceError
from distill.data.codecs import Rgb

MAX_SHARD_BYTES = 14 << 20
MANIFEST = "manifest.json"
_RECORDS = "records.json"
_MEMBER_OVERHEAD_BYTES = 200  # two ZIP headers with a name of a few characters, 120 of them used
_OPEN_SHARDS = 32


class ShardRecord(msgspec.Struct, frozen=True, omit_defaults=True):
    """One picture and what is known about it."""

    name: str
    """Unique in its folder of shards."""
    content: str
    """Which scene it shows: pictures of one content never lie in two splits."""
    split: str
    source: str
    """The rated set, or the folder of clean pictures."""
    height: int = 0
    width: int = 0
    mos: float | None = None
    """Human rating on 0..1, where there is one."""
    mos_std: float | None = None
    pseudo_mos: float | None = None
    """From full-reference measures, 0..1; never beside a human one."""
    confidence: float | None = None
    """Of the pseudo-MOS, 0..1."""
    impairments: dict[str, float] = {}
    """What each measure says, 0 clean."""
    ladder: str = ""
    """Pictures of one ladder differ in level alone."""
    degradation: str = ""
    level: int | None = None
    """0 is clean; a higher level of one ladder is worse."""
    member: str = ""
    shard: str = ""


class ShardInfo(msgspec.Struct, frozen=True):
    """One shard, as its maker left it."""

    name: str
    sha256: str
    num_bytes: int
    num_pictures: int


class LeftOut(msgspec.Struct, frozen=True):
    """A picture that could not be read."""

    name: str
    reason: str


class Manifest(msgspec.Struct, frozen=True):
    """What is in a folder of shards and what made it."""

    made_by: str
    settings: dict[str, Any]
    sources: list[dict[str, Any]]
    """Name, licence and number of pictures of each."""
    versions: dict[str, str]
    num_pictures: dict[str, int]
    """By split."""
    shards: list[ShardInfo]
    left_out: list[LeftOut]
    schema: Literal["dgiqa.shards/1"] = "dgiqa.shards/1"


def encode_picture(rgb: Rgb) -> bytes:
    """Lossless WebP."""
    bgr = cv2.cvtColor(rgb, cv2.COLOR_RGB2BGR)
    ok, coded = cv2.imencode(".webp", bgr, [cv2.IMWRITE_WEBP_QUALITY, 101])  # above 100: lossless
    if not ok:
        raise ValueError(f"OpenCV did not encode a WebP of shape {rgb.shape}")
    return coded.tobytes()


def decode_picture(coded: bytes) -> Rgb:
    """uint8 RGB (H, W, 3); raises ``ValueError`` for bytes that are no picture."""
    bgr = cv2.imdecode(np.frombuffer(coded, np.uint8), cv2.IMREAD_COLOR)
    if bgr is None:
        raise ValueError(f"{len(coded)} bytes are not a picture")
    return np.asarray(cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB), np.uint8)


class ShardWriter:
    """Writes the shards of one job, each under its name only when it is whole."""

    def __init__(self, folder: Path, stem: str, *, max_bytes: int = MAX_SHARD_BYTES) -> None:
        self.folder, self.stem, self.max_bytes = folder, stem, max_bytes
        self.written: list[ShardInfo] = []
        self._waiting: list[tuple[ShardRecord, bytes]] = []
        self._num_bytes = 1024  # the list's brackets and the end of the ZIP file

    def add(self, record: ShardRecord, rgb: Rgb) -> None:
        """Take one picture; writes a shard when it is full.

        Raises ``ConfigError`` for a picture that fills no shard, ``SinkError`` on a full disk.
        """
        coded = encode_picture(rgb)
        height, width = rgb.shape[:2]
        record = msgspec.structs.replace(record, height=height, width=width)
        size = len(coded) + len(msgspec.json.encode(record)) + _MEMBER_OVERHEAD_BYTES
        if size + 1024 > self.max_bytes:
            raise ConfigError(
                f"{record.name} takes {size} bytes, a shard at most {self.max_bytes}: "
                "reduce the longest side"
            )
        if self._num_bytes + size > self.max_bytes:
            self.flush()
        self._waiting.append((record, coded))
        self._num_bytes += size

    def flush(self) -> None:
        """Write what waits, if anything does."""
        if self._waiting:
            name = f"{self.stem}-{len(self.written):02d}.zip"
            self.written.append(_write_shard(self.folder / name, self._waiting))
        self._waiting, self._num_bytes = [], 1024


def _write_shard(path: Path, pictures: Sequence[tuple[ShardRecord, bytes]]) -> ShardInfo:
    named = [
        (msgspec.structs.replace(record, member=f"{i:06d}.webp"), coded)
        for i, (record, coded) in enumerate(pictures)
    ]
    listing = msgspec.json.encode([record for record, _ in named])
    members = [*((record.member, coded) for record, coded in named), (_RECORDS, listing)]
    with whole_or_none(path) as partial, zipfile.ZipFile(partial, "w") as archive:
        for name, content in members:
            entry = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))  # no clock: equal bytes
            entry.create_system, entry.external_attr = 3, 0o644 << 16
            archive.writestr(entry, content)
    return ShardInfo(path.name, sha256_of(path), path.stat().st_size, len(named))


class whole_or_none:  # noqa: N801  (used as a verb)
    """A file beside ``path`` to write to, renamed to it at the end or deleted on an error.

    Raises :class:`SinkError` where the disk is full.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.partial = path, path.with_name(path.name + ".part")

    def __enter__(self) -> Path:
        return self.partial

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is None:
            with self.partial.open("rb") as written:
                os.fsync(written.fileno())
            self.partial.replace(self.path)
            return
        self.partial.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise SinkError(
                f"no room for {self.path.name} in {self.path.parent} ({error.strerror}): make "
                "room and run the same command; what is finished is kept"
            ) from error


def write_json(path: Path, value: object) -> None:
    """A message struct or plain values as indented JSON, whole or not at all."""
    text = msgspec.json.format(msgspec.json.encode(value), indent=1)
    with whole_or_none(path) as partial:
        partial.write_bytes(text + b"\n")


def sha256_of(path: Path) -> str:
    """In hexadecimal."""
    with path.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


class ShardReader:
    """A folder of shards: ``records`` and the picture of each, in any order.

    Not to be shared between threads; a copy sent to another process opens the shards anew.
    Raises :class:`SourceError` where manifest or shards are missing or damaged.
    """

    def __init__(self, folder: Path, *, split: str | None = None, verify: bool = False) -> None:
        """Read all records, or those of one split.

        Args:
            verify: also compare every shard's SHA-256 with the manifest's.
        """
        self.folder = folder
        self.manifest = read_manifest(folder)
        self._open: OrderedDict[str, zipfile.ZipFile] = OrderedDict()
        found: list[ShardRecord] = []
        for shard in self.manifest.shards:
            if verify and not is_whole(folder, shard):
                raise SourceError(f"{folder / shard.name} is not as it was written: {_AGAIN}")
            found += self._records_of(shard)
        self.records = [r for r in found if split in (None, r.split)]
        if not self.records:
            parts = sorted(self.manifest.num_pictures)
            raise ConfigError(f"{folder} has no split {split!r}; its splits are {', '.join(parts)}")

    def _records_of(self, shard: ShardInfo) -> list[ShardRecord]:
        try:
            listing = msgspec.json.decode(self._read(shard.name, _RECORDS), type=list[ShardRecord])
        except (msgspec.DecodeError, UnicodeDecodeError) as exc:
            raise SourceError(f"{self.folder / shard.name}: {exc}; {_AGAIN}") from exc
        return [msgspec.structs.replace(record, shard=shard.name) for record in listing]

    def __len__(self) -> int:
        return len(self.records)

    def __iter__(self) -> Iterator[tuple[ShardRecord, Rgb]]:
        for record in self.records:
            yield record, self.picture(record)

    def picture(self, record: ShardRecord) -> Rgb:
        """uint8 RGB (H, W, 3)."""
        try:
            return decode_picture(self._read(record.shard, record.member))
        except ValueError as exc:
            raise SourceError(f"{record.name} in {self.folder / record.shard}: {exc}") from exc

    def _read(self, shard: str, member: str) -> bytes:
        try:
            return self._archive(shard).read(member)
        except (OSError, KeyError, zipfile.BadZipFile) as exc:
            raise SourceError(f"{self.folder / shard} cannot be read: {exc}; {_AGAIN}") from exc

    def _archive(self, shard: str) -> zipfile.ZipFile:
        if shard not in self._open:
            if len(self._open) >= _OPEN_SHARDS:
                self._open.popitem(last=False)[1].close()
            self._open[shard] = zipfile.ZipFile(self.folder / shard)
        self._open.move_to_end(shard)
        return self._open[shard]

    def close(self) -> None:
        """Close the shards that are open; reading opens them again."""
        while self._open:
            self._open.popitem()[1].close()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": OrderedDict()}


_AGAIN = "run the command that made it again"


def read_manifest(folder: Path) -> Manifest:
    """What is in a folder of shards; raises :class:`SourceError` where it is not whole."""
    try:
        return msgspec.json.decode((folder / MANIFEST).read_bytes(), type=Manifest)
    except FileNotFoundError as exc:
        raise SourceError(f"no whole set of shards at {folder}: {_AGAIN}") from exc
    except (msgspec.DecodeError, UnicodeDecodeError) as exc:
        raise SourceError(f"{folder / MANIFEST} is no manifest: {exc}; {_AGAIN}") from exc


class WrittenFile(Protocol):
    """A file as its maker left it."""

    @property
    def name(self) -> str:
        """Within its folder."""

    @property
    def num_bytes(self) -> int:
        """Its length."""

    @property
    def sha256(self) -> str:
        """Of its bytes."""


def is_whole(folder: Path, file: WrittenFile) -> bool:
    """Whether a file is on disk with the bytes it was written with."""
    path = folder / file.name
    if not path.is_file() or path.stat().st_size != file.num_bytes:
        return False
    return sha256_of(path) == file.sha256
