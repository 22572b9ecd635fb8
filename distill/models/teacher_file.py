"""A teacher's own file: safetensors that say what they hold, and with which depth it learned."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import msgspec
from torch import Tensor

from dgiqa_stream.errors import BackendUnavailable, ModelError, SinkError
from dgiqa_stream.versions import package_version
from distill.data.shards import sha256_of
from distill.models.glint import GlintConfig, GlintIQA
from distill.models.teacher import Dgiqa, TeacherSpec

Teacher = Dgiqa | GlintIQA
"""What a teacher's file can hold."""
SCHEMA: Literal["dgiqa.teacher/1"] = "dgiqa.teacher/1"
_MOST_NAMED = 4


class TeacherAbout(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a teacher's safetensors says of itself."""

    schema: Literal["dgiqa.teacher/1"]
    backbone: str
    bridge_channels: tuple[int, ...]
    num_heads: int
    pooled_channels: int
    version: str
    """Of the weights; a change that moves scores changes it."""
    made_by: str
    """Package and version that wrote the file."""
    source_name: str = ""
    """The checkpoint it was converted from, where it was."""
    source_bytes: int = 0
    source_sha256: str = ""
    depth: str = ""
    """What made the depth maps it was trained with, where that is known."""
    glint: GlintConfig | None = None
    """The architecture where it is not DGIQA's."""

    @property
    def spec(self) -> TeacherSpec:
        """The architecture of a DGIQA."""
        return TeacherSpec(
            self.backbone, self.bridge_channels, self.num_heads, self.pooled_channels
        )

    def build(self) -> Teacher:
        """A network of this architecture, with random weights."""
        return Dgiqa(self.spec) if self.glint is None else GlintIQA(self.glint)


@dataclass(frozen=True, slots=True, eq=False)
class LoadedTeacher:
    """A teacher in evaluation mode, and the file it came from."""

    model: Teacher
    version: str
    sha256: str
    size_bytes: int
    depth: str = ""
    """Identity of the provider of depth maps that it learned with, where that is known."""

    @property
    def backbone(self) -> str:
        """What it looks through."""
        return backbone_of(self.model)


def save_teacher(
    model: Teacher, path: Path, *, version: str, source: Path | None = None, depth: str = ""
) -> None:
    """Write a teacher as safetensors that say what they hold; whole or not at all.

    ``depth`` is the identity of the provider that its depth maps came from in training. Raises
    :class:`SinkError` or ``OSError`` where it cannot be written.
    """
    safetensors = import_safetensors()
    about = TeacherAbout(
        schema=SCHEMA,
        backbone=backbone_of(model),
        **_shape_of(model),
        version=version,
        made_by=f"dgiqa-stream {package_version()}",
        source_name=source.name if source else "",
        source_bytes=source.stat().st_size if source else 0,
        source_sha256=sha256_of(source) if source else "",
        depth=depth,
    )
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        beside.touch()
        mode = beside.stat().st_mode  # safetensors makes files that only their maker may read
        told = {"dgiqa": msgspec.json.encode(about).decode()}
        safetensors.torch.save_file(tensors, beside, metadata=told)
        beside.chmod(mode)
        beside.replace(path)
    except safetensors.SafetensorError as exc:  # how it tells of a full disk
        raise SinkError(
            f"{path.name} cannot be written to {path.parent} ({exc}): make room and run the same "
            "command"
        ) from exc
    finally:
        beside.unlink(missing_ok=True)


def read_about(path: Path) -> TeacherAbout | None:
    """What a safetensors says of itself; None where it is no teacher's.

    Raises :class:`ModelError` for a file that is no safetensors at all.
    """
    safetensors = import_safetensors()
    try:
        with safetensors.safe_open(path, "pt") as opened:
            told = (opened.metadata() or {}).get("dgiqa")
    except (safetensors.SafetensorError, OSError) as exc:
        raise ModelError(f"{path.name} cannot be read as safetensors: {exc}") from exc
    try:
        return None if told is None else msgspec.json.decode(told, type=TeacherAbout)
    except msgspec.DecodeError as exc:
        raise ModelError(f"{path.name} is not a {SCHEMA} file: {exc}") from exc


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of a safetensors file, by name."""
    tensors: dict[str, Tensor] = import_safetensors().torch.load_file(path)
    return tensors


def _shape_of(model: Teacher) -> dict[str, Any]:
    """The fields of :class:`TeacherAbout` that say the architecture."""
    if isinstance(model, GlintIQA):
        width, config = model.wide.width, replace(model.config, pretrained=False)
        return {"bridge_channels": (), "num_heads": 0, "pooled_channels": width, "glint": config}
    spec = model.spec
    return {
        "bridge_channels": spec.bridge_channels,
        "num_heads": spec.num_heads,
        "pooled_channels": spec.pooled_channels,
    }


def backbone_of(model: Teacher) -> str:
    """What a teacher looks through."""
    return model.spec.backbone if isinstance(model, Dgiqa) else model.config.name


def fill_(model: Teacher, tensors: dict[str, Tensor], path: Path) -> None:
    """Load weights; :class:`ModelError` where they are not the model's own or not finite."""
    wanted = model.state_dict()
    problems = [
        _listed("missing", wanted.keys() - tensors.keys()),
        _listed("unknown", tensors.keys() - wanted.keys()),
        _listed(
            "of another shape",
            (
                f"{key} {tuple(tensors[key].shape)} where {tuple(wanted[key].shape)} is needed"
                for key in wanted.keys() & tensors.keys()
                if tensors[key].shape != wanted[key].shape
            ),
        ),
    ]
    if any(problems):
        raise ModelError(
            f"{path.name} does not fit {type(model).__name__} on {backbone_of(model)}: "
            f"{'; '.join(filter(None, problems))}. Give a published DGIQA checkpoint, or name the "
            "backbone it was trained with (--backbone)"
        )
    broken = [
        name for name, t in tensors.items() if t.is_floating_point() and not t.isfinite().all()
    ]
    if broken:
        raise ModelError(
            f"{path.name} is spoilt: {_listed('with NaN or infinity', broken)}. Give another file, "
            "or weights saved before the training diverged"
        )
    model.load_state_dict(tensors)


def _listed(what: str, keys: Iterable[str]) -> str:
    names = sorted(keys)
    if not names:
        return ""
    more = ", …" if len(names) > _MOST_NAMED else ""
    noun = "tensor" if len(names) == 1 else "tensors"
    return f"{len(names)} {noun} {what} ({', '.join(names[:_MOST_NAMED])}{more})"


def import_safetensors() -> Any:
    """The package; raises :class:`BackendUnavailable` where it is not installed."""
    try:
        import safetensors
        import safetensors.torch
    except ImportError as exc:
        raise BackendUnavailable(
            f"a teacher's file needs {exc.name!r}: pip install 'dgiqa-stream[teacher]'"
        ) from exc
    return safetensors
