"""Teachers from files: the published checkpoints, and safetensors that say what they hold.

A ``.pth`` is opened with ``weights_only``: it can run no code. It is converted once to safetensors
beside it, which later loads take as long as the ``.pth`` is the one it was made from.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import msgspec
import torch
from torch import Tensor

from dgiqa_stream.errors import BackendUnavailable, ConfigError, ModelError, SinkError
from dgiqa_stream.versions import package_version
from distill.models.backbones import SWIN
from distill.models.glint import GlintConfig, GlintIQA
from distill.models.teacher import Dgiqa, TeacherSpec
from distill.say import say

Teacher = Dgiqa | GlintIQA
"""What a teacher's file can hold."""
SCHEMA: Literal["dgiqa.teacher/1"] = "dgiqa.teacher/1"
_WRAPPERS = ("state_dict", "model_state_dict", "model", "net", "params")
_PREFIXES = ("module.", "_orig_mod.")  # of DataParallel and of torch.compile
_RENAMED = (  # an earlier release of the definition, and of timm
    (re.compile(r"^tsb(?=\d)"), "tcb"),
    (re.compile(r"^cross_spatialattention\."), "depth_guided_cross_attention."),
    (re.compile(r"^spatialattention\."), "refinement_attention."),
    (re.compile(r"^((?:depth_)?backbone\.)layers\.(?=\d)"), r"\1layers_"),
)
_DERIVED = re.compile(r"\.(relative_position_index|attn_mask)$")
_LATER_DOWNSAMPLE = re.compile(r"^((?:depth_)?backbone\.layers_)(\d)(\.downsample\.)")
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

    @property
    def backbone(self) -> str:
        """What it looks through."""
        return _backbone_of(self.model)


def open_teacher(path: Path, *, backbone: str | None = None) -> LoadedTeacher:
    """A teacher from its safetensors or from a published ``.pth``.

    ``backbone`` is what a ``.pth`` was trained with (Swin-T where None); a safetensors knows, and
    one of another backbone raises :class:`ConfigError`. Files that do not fit, or cannot be read,
    raise :class:`ModelError`.
    """
    if not path.is_file():
        raise ModelError(f"no teacher at {path}: give a .safetensors or a published .pth")
    if path.suffix != ".safetensors":
        model = load_official(path, backbone=backbone or SWIN)
        return LoadedTeacher(model, "published", _sha256(path), path.stat().st_size)
    about = read_about(path)
    if about is None:
        raise ModelError(
            f"{path.name} does not say that it is a teacher ({SCHEMA}): convert the .pth with "
            "`dgiqa-distill convert`"
        )
    if backbone not in (None, about.backbone):
        raise ConfigError(f"{path.name} is of backbone {about.backbone}, not {backbone}")
    built = about.build()
    _fill_(built, _read_tensors(path), path)
    return LoadedTeacher(built.eval(), about.version, _sha256(path), path.stat().st_size)


def load_official(path: Path, *, backbone: str = SWIN) -> Dgiqa:
    """A published checkpoint, in evaluation mode; nothing missing, nothing left over.

    Takes a bare state dict or one wrapped in a dict, names with ``module.`` before them, and those
    of an earlier release. Raises :class:`ModelError` naming what does not fit.
    """
    source = _Source(path)
    beside = path.with_suffix(".safetensors")
    about = read_about(beside) if beside.is_file() else None
    if about is not None and about.backbone == backbone and source.is_that_of(about, beside):
        return _fitted(about.spec, _read_tensors(beside), beside)
    model = _fitted(TeacherSpec(backbone), _read_pickle(path), path)
    if beside.is_file() and about is None:
        say(f"{beside.name} is not a conversion of {path.name}: left as it is")
        return model
    try:
        save_teacher(model, beside, version="published", source=path)
    except OSError as exc:  # a folder that may only be read
        say(f"{path.name} is loaded, but {beside.name} cannot be written: {exc.strerror}")
    else:
        say(f"{path.name} is converted: later loads take {beside.name} as long as both agree")
    return model


def convert_official(
    path: Path, target: Path, *, backbone: str = SWIN, version: str = "published"
) -> None:
    """Write a published checkpoint as safetensors; raises as :func:`load_official` does.

    Also :class:`ConfigError` where the target is not named ``.safetensors`` or is the source.
    """
    if target.suffix != ".safetensors" or target.resolve() == path.resolve():
        raise ConfigError(f"output {target} must be another file, named .safetensors")
    if not path.is_file():
        raise ModelError(f"no checkpoint at {path}: give a published .pth")
    model = _fitted(TeacherSpec(backbone), _read_pickle(path), path)
    try:
        save_teacher(model, target, version=version, source=path)
    except OSError as exc:
        raise SinkError(f"cannot write {target}: {exc.strerror}; choose another -o") from exc


def save_teacher(
    model: Teacher, path: Path, *, version: str, source: Path | None = None, depth: str = ""
) -> None:
    """Write a teacher as safetensors that say what they hold; whole or not at all.

    ``depth`` is the identity of the provider that its depth maps came from in training.
    """
    save_file = _safetensors().torch.save_file
    about = TeacherAbout(
        schema=SCHEMA,
        backbone=_backbone_of(model),
        **_shape_of(model),
        version=version,
        made_by=f"dgiqa-stream {package_version()}",
        source_name=source.name if source else "",
        source_bytes=source.stat().st_size if source else 0,
        source_sha256=_sha256(source) if source else "",
        depth=depth,
    )
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        beside.touch()
        mode = beside.stat().st_mode  # safetensors makes files that only their maker may read
        save_file(tensors, beside, metadata={"dgiqa": msgspec.json.encode(about).decode()})
        beside.chmod(mode)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def read_about(path: Path) -> TeacherAbout | None:
    """What a safetensors says of itself; None where it is no teacher's.

    Raises :class:`ModelError` for a file that is no safetensors at all.
    """
    safetensors = _safetensors()
    try:
        with safetensors.safe_open(path, "pt") as opened:
            told = (opened.metadata() or {}).get("dgiqa")
    except (safetensors.SafetensorError, OSError) as exc:
        raise ModelError(f"{path.name} cannot be read as safetensors: {exc}") from exc
    try:
        return None if told is None else msgspec.json.decode(told, type=TeacherAbout)
    except msgspec.DecodeError as exc:
        raise ModelError(f"{path.name} is not a {SCHEMA} file: {exc}") from exc


def official_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under the names that :class:`Dgiqa` has, from those of any release.

    Tables that the network derives from its shape are left out.
    """
    named: dict[str, Tensor] = {}
    for key, tensor in state.items():
        while key.startswith(_PREFIXES):
            key = key.partition(".")[2]
        for old, new in _RENAMED:
            key = old.sub(new, key)
        if not _DERIVED.search(key):
            named[key] = tensor
    if any(re.match(r"(depth_)?backbone\.layers_0\.downsample\.", key) for key in named):
        # timm before 0.9 kept a stage's downsampling at its end, now it is at the next one's start
        named = {
            _LATER_DOWNSAMPLE.sub(lambda m: f"{m[1]}{int(m[2]) + 1}{m[3]}", key): tensor
            for key, tensor in named.items()
        }
    return named


def read_backbone_weights(path: Path) -> dict[str, Tensor]:
    """timm's weights of an extractor, under the names that ``features_only`` gives them.

    ``.safetensors``, or a pickle of tensors alone. Raises :class:`ModelError` for another file.
    """
    if path.suffix == ".safetensors":
        safetensors = _safetensors()
        try:
            found = safetensors.torch.load_file(path)
        except (safetensors.SafetensorError, OSError) as exc:
            raise ModelError(f"{path} cannot be read as safetensors: {exc}") from exc
    else:
        found = _read_pickle(path)
    named = official_names({f"backbone.{name}": tensor for name, tensor in found.items()})
    return {name.removeprefix("backbone."): tensor for name, tensor in named.items()}


class _Source:
    """A checkpoint, hashed at most once."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def is_that_of(self, about: TeacherAbout, converted: Path) -> bool:
        """Whether a conversion is younger than the checkpoint and was made from this content."""
        mine, theirs = self._path.stat(), converted.stat()
        return (
            theirs.st_mtime_ns >= mine.st_mtime_ns
            and about.source_bytes == mine.st_size
            and about.source_sha256 == _sha256(self._path)
        )


def _read_pickle(path: Path) -> dict[str, Tensor]:
    """The tensors of a ``.pth``, whatever they are wrapped in."""
    try:
        found: Any = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError) as exc:
        raise ModelError(
            f"{path.name} is no checkpoint of tensors alone, and loading anything else could run "
            "code: give a network's state_dict() as torch.save writes it"
        ) from exc
    for wrapper in _WRAPPERS:
        if isinstance(found, Mapping) and isinstance(found.get(wrapper), Mapping):
            found = found[wrapper]
    if not isinstance(found, Mapping) or not all(isinstance(t, Tensor) for t in found.values()):
        raise ModelError(
            f"{path.name} holds no state dict: neither names with tensors nor such a dict under "
            f"{', '.join(_WRAPPERS)}"
        )
    return official_names(found)


def _read_tensors(path: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = _safetensors().torch.load_file(path)
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


def _backbone_of(model: Teacher) -> str:
    return model.spec.backbone if isinstance(model, Dgiqa) else model.config.name


def _fitted(spec: TeacherSpec, tensors: dict[str, Tensor], path: Path) -> Dgiqa:
    """A DGIQA with these weights, in evaluation mode; raises as :func:`_fill_`."""
    model = Dgiqa(spec)
    _fill_(model, tensors, path)
    return model.eval()


def _fill_(model: Teacher, tensors: dict[str, Tensor], path: Path) -> None:
    """Load weights; raises :class:`ModelError` where they are not the model's own."""
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
            f"{path.name} does not fit {type(model).__name__} on {_backbone_of(model)}: "
            f"{'; '.join(filter(None, problems))}. Give a published DGIQA checkpoint, or name the "
            "backbone it was trained with (--backbone)"
        )
    model.load_state_dict(tensors)


def _listed(what: str, keys: Iterable[str]) -> str:
    names = sorted(keys)
    if not names:
        return ""
    more = ", …" if len(names) > _MOST_NAMED else ""
    noun = "tensor" if len(names) == 1 else "tensors"
    return f"{len(names)} {noun} {what} ({', '.join(names[:_MOST_NAMED])}{more})"


def _sha256(path: Path) -> str:
    with path.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _safetensors() -> Any:
    try:
        import safetensors
        import safetensors.torch
    except ImportError as exc:
        raise BackendUnavailable(
            f"a teacher's file needs {exc.name!r}: pip install 'dgiqa-stream[teacher]'"
        ) from exc
    return safetensors
