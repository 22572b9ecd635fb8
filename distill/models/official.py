"""Teachers from files: the published checkpoints, and our own (:mod:`.teacher_file`).

A ``.pth`` is opened with ``weights_only``: it can run no code. It is converted once to safetensors
beside it, which later loads take as long as the ``.pth`` is the one it was made from.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dgiqa_stream.errors import ConfigError, ModelError, SinkError
from distill.data.shards import sha256_of
from distill.models.backbones import SWIN
from distill.models.teacher import Dgiqa, TeacherSpec
from distill.models.teacher_file import (
    SCHEMA,
    LoadedTeacher,
    TeacherAbout,
    fill_,
    import_safetensors,
    read_about,
    read_tensors,
    save_teacher,
)
from distill.say import say

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
        return LoadedTeacher(model, "published", sha256_of(path), path.stat().st_size)
    about = read_about(path)
    if about is None:
        raise ModelError(
            f"{path.name} does not say that it is a teacher ({SCHEMA}): convert the .pth with "
            "`dgiqa-distill convert`"
        )
    if backbone not in (None, about.backbone):
        raise ConfigError(f"{path.name} is of backbone {about.backbone}, not {backbone}")
    built = about.build()
    fill_(built, read_tensors(path), path)
    size = path.stat().st_size
    return LoadedTeacher(built.eval(), about.version, sha256_of(path), size, about.depth)


def load_official(path: Path, *, backbone: str = SWIN) -> Dgiqa:
    """A published checkpoint, in evaluation mode; nothing missing, nothing left over.

    Takes a bare state dict or one wrapped in a dict, names with ``module.`` before them, and those
    of an earlier release. Raises :class:`ModelError` naming what does not fit.
    """
    source = _Source(path)
    beside = path.with_suffix(".safetensors")
    about = read_about(beside) if beside.is_file() else None
    if about is not None and about.backbone == backbone and source.is_that_of(about, beside):
        return _fitted(about.spec, read_tensors(beside), beside)
    model = _fitted(TeacherSpec(backbone), _read_pickle(path), path)
    if beside.is_file() and about is None:
        say(f"{beside.name} is not a conversion of {path.name}: left as it is")
        return model
    try:
        save_teacher(model, beside, version="published", source=path)
    except (OSError, SinkError) as exc:  # a folder that may only be read, or a full disk
        reason = exc.strerror if isinstance(exc, OSError) else exc
        say(f"{path.name} is loaded, but {beside.name} cannot be written: {reason}")
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
        safetensors = import_safetensors()
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
            and about.source_sha256 == sha256_of(self._path)
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


def _fitted(spec: TeacherSpec, tensors: dict[str, Tensor], path: Path) -> Dgiqa:
    """A DGIQA with these weights, in evaluation mode; raises as :func:`fill_`."""
    model = Dgiqa(spec)
    fill_(model, tensors, path)
    return model.eval()
