"""Engines on disk: each of one model, precision, set of batches, GPU and pair of versions.

A file is a line of JSON, which says what the engine is of, and the engine. An engine is machine
code that the driver trusts, so the folder is for its owner alone, and a file that another user owns
is not read.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

SCHEMA = "dgiqa.engine/1"
_VERSIONS = ("tensorrt", "torch_tensorrt")
_LONGEST_LINE_BYTES = 1 << 16


@dataclass(frozen=True, slots=True)
class EngineKey:
    """What an engine is of: another value of any field needs another engine."""

    model_sha256: str
    precision: str
    """``fp16``, or ``int8`` of explicit Q/DQ."""
    buckets: tuple[int, ...]
    """Batch sizes that it is captured with; the largest is the largest it takes."""
    gpu: str
    """Name of the GPU."""
    capability: str
    """Its compute capability, such as ``9.0``."""
    tensorrt: str
    """Version of TensorRT, which reads its own engines alone."""
    torch_tensorrt: str
    """Version of torch-tensorrt; empty for an engine that TensorRT's parser made."""

    @property
    def file_name(self) -> str:
        """One for all versions, so that an engine of a new one takes the place of the old one."""
        parts = {k: v for k, v in asdict(self).items() if k not in _VERSIONS}
        digest = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
        return f"{self.model_sha256[:12]}-{self.precision}-{digest[:16]}.engine"

    @property
    def versions(self) -> str:
        """For people: ``TensorRT 10.9, torch-tensorrt 2.8``."""
        more = f", torch-tensorrt {self.torch_tensorrt}" if self.torch_tensorrt else ""
        return f"TensorRT {self.tensorrt}{more}"


@dataclass(frozen=True, slots=True, eq=False)
class Kept:
    """What the cache has for a key."""

    plan: bytes | None
    """The serialised engine; None where a new one has to be built."""
    reason: str = ""
    """Why a file that is there is not used; empty where there is none."""


class EngineCache:
    """A folder of engines, which processes may share: files are written whole or not at all."""

    def __init__(self, folder: Path) -> None:
        """The folder is made when the first engine is written."""
        self.folder = folder

    def find(self, key: EngineKey) -> Kept:
        """The engine of a key, or why what lies in its place is another; never raises."""
        path = self.folder / key.file_name
        try:
            with path.open("rb") as file:
                if os.name == "posix" and os.fstat(file.fileno()).st_uid != os.geteuid():
                    return Kept(None, f"{path.name} belongs to another user")
                line, plan = file.readline(_LONGEST_LINE_BYTES), file.read()
        except FileNotFoundError:
            return Kept(None)
        except OSError as exc:
            return Kept(None, f"{path.name} cannot be read ({exc.strerror})")
        return _checked(path.name, _parsed(line), plan, key)

    def write(self, key: EngineKey, plan: bytes) -> None:
        """Keep an engine, in the place of one of other versions. Raises ``OSError``."""
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        line = json.dumps({"schema": SCHEMA, **asdict(key), "plan_sha256": _sha256(plan)})
        path = self.folder / key.file_name
        part = path.with_name(f"{path.name}.{os.getpid()}.part")
        try:
            part.write_bytes(line.encode() + b"\n" + plan)
            part.replace(path)
        except BaseException:
            part.unlink(missing_ok=True)
            raise


def _parsed(line: bytes) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _checked(name: str, about: dict[str, Any], plan: bytes, key: EngineKey) -> Kept:
    """The engine, where it is said to be the key's and its bytes are those that were written."""
    if about.get("schema") != SCHEMA or about.get("plan_sha256") != _sha256(plan):
        return Kept(None, f"{name} is damaged")
    fields = asdict(key) | {"buckets": list(key.buckets)}
    if [f for f in fields if f not in _VERSIONS and about.get(f) != fields[f]]:
        return Kept(None, f"{name} is of another model or GPU")
    if any(about.get(f) != fields[f] for f in _VERSIONS):
        was = ", ".join(f"{f.replace('_', '-')} {about.get(f) or 'none'}" for f in _VERSIONS)
        return Kept(None, f"{name} was built by {was}")
    return Kept(plan)


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
