"""``torch.export`` files (``.pt2``): a float model with a dynamic batch, its manifest beside it."""

from __future__ import annotations

import io
import json
import pickle
import re
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import onnx
import torch
from torch.export import ExportedProgram

from dgiqa_stream.errors import ModelError
from dgiqa_stream.manifest import ModelManifest, load_model
from dgiqa_stream.preprocess import ViewSpec
from quant.export_onnx import about, write_files
from quant.onnx_module import OnnxModule
from quant.tensorrt.layout import lay_out_

_LARGEST_BATCH = 4096
_ABOUT = "dgiqa.json"
_MOST_EXPANDED = 20
"""Times a file's own size that its parts may have together: torch stores tensors as they are."""
_TENSORS = re.compile(r"(weight|tensor)_\d+")
_KNOWN_PARTS = re.compile(
    r"models/\w+\.json|data/(weights|constants)/(\w+_config\.json|(weight|tensor)_\d+)"
    r"|data/sample_inputs/\w+\.pt|extra/[\w.]+|archive_(format|version)|byteorder|\.data/\w+"
)
"""The parts of an archive that torch's loader reads without unpickling, but for sample inputs."""


def export_program(graph: onnx.ModelProto, views: Sequence[ViewSpec]) -> ExportedProgram:
    """A float graph as a program of torch's own operators, its batch dynamic.

    Takes views (N, H, W, 3) uint8 in the graph's order and gives a tuple of its outputs, (N, 1)
    each. Raises :class:`ModelError` naming a node of an unknown kind.
    """
    ready = onnx.ModelProto()
    ready.CopyFrom(graph)
    module = OnnxModule(lay_out_(ready)).eval()
    by_name = {view.name: view for view in views}
    if set(by_name) != set(module.input_names):
        raise ModelError(
            f"the graph takes {', '.join(module.input_names)}, its manifest says "
            f"{', '.join(by_name)}: they belong to different models"
        )
    # three pictures: a batch of one would be taken for a constant
    shapes = [(3, *by_name[name].shape) for name in module.input_names]
    example = tuple(torch.zeros(shape, dtype=torch.uint8) for shape in shapes)
    batch = torch.export.Dim("batch", min=1, max=_LARGEST_BATCH)
    with torch.no_grad():
        return torch.export.export(
            module, example, dynamic_shapes=(tuple({0: batch} for _ in example),)
        )


def write_program(
    program: ExportedProgram,
    path: Path,
    was: ModelManifest,
    *,
    made_by: str,
) -> ModelManifest:
    """Write a ``.pt2`` made of a model with manifest ``was``, and its own manifest; whole or not.

    What the manifest says, but for the hash, is in the file too, as ``extra_files["dgiqa.json"]``.
    """
    step = {"step": "program", "torch": str(torch.__version__), "from_sha256": was.sha256}
    manifest = msgspec.structs.replace(
        was, history=[*was.history, step], made_by=made_by, metrics={}
    )
    stored = io.BytesIO()
    torch.export.save(program, stored, extra_files={_ABOUT: json.dumps(about(manifest))})
    return write_files(stored.getvalue(), path, manifest)


def load_program(path: Path) -> tuple[ExportedProgram, ModelManifest]:
    """A ``.pt2`` and its manifest, which is checked against the file first.

    torch's own loader falls back on unpickling whatever a file holds. Here each part that could be
    a pickle must load as tensors alone before the loader sees it; raises :class:`ModelError`
    otherwise. What is left is the trust that any program needs: open only files whose maker you
    know.
    """
    loaded = load_model(path)
    _refuse_pickles(path)
    try:
        return torch.export.load(path), loaded.manifest
    except (RuntimeError, ValueError, KeyError, OSError) as exc:
        raise ModelError(
            f"{path.name} cannot be read by torch {torch.__version__}: {_line(exc)}; "
            "export it again with `dgiqa-quant program`"
        ) from exc


def about_program(path: Path) -> dict[str, str]:
    """What a ``.pt2`` says of itself, without loading the program."""
    with zipfile.ZipFile(path) as archive:
        name = next((n for n in archive.namelist() if n.endswith(f"extra/{_ABOUT}")), None)
        found: Any = json.loads(archive.read(name)) if name else {}
    return {str(k): str(v) for k, v in found.items()}


def _refuse_pickles(path: Path) -> None:
    """Raise unless every part of an archive is JSON, raw bytes, or a pickle of tensors alone."""
    try:
        with zipfile.ZipFile(path) as archive:
            _refuse_disguises(archive, path)
            for name in archive.namelist():
                _refuse_pickle(name.partition("/")[2], archive.read(name), path.name)
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, zlib.error, EOFError) as exc:
        raise ModelError(f"{path.name} is no torch.export file: {exc}") from exc


def _refuse_disguises(archive: zipfile.ZipFile, path: Path) -> None:
    """Raise where torch's reader, which ignores case, could see other parts than ``zipfile``."""
    parts = archive.infolist()
    seen: set[str] = set()
    for part in parts:
        name = part.filename.casefold()
        if name in seen or part.filename != part.orig_filename:
            raise ModelError(
                f"{path.name} holds {part.filename!r} more than once or by two names, which could "
                "hide code"
            )
        seen.add(name)
    size = sum(part.file_size for part in parts)
    if size > _MOST_EXPANDED * path.stat().st_size:
        raise ModelError(f"{path.name} would grow to {size} bytes: no torch.export file does")


def _refuse_pickle(part: str, content: bytes, file: str) -> None:
    if not _KNOWN_PARTS.fullmatch(part):
        raise ModelError(f"{file} holds {part!r}, which could run code: only tensors are read")
    if part.endswith("_config.json") and not _are_tensors(part, content, file):
        raise ModelError(f"{file} holds pickled objects, which could run code ({part})")
    if part.startswith("data/sample_inputs/") and content:
        try:
            torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as exc:
            raise ModelError(
                f"{file} holds more than tensors, which could run code ({part})"
            ) from exc


def _are_tensors(part: str, content: bytes, file: str) -> bool:
    """Whether everything that a part lists is raw bytes."""
    try:
        stored = list(json.loads(content)["config"].values())
        return all(
            p["use_pickle"] is False and _TENSORS.fullmatch(p["path_name"]) is not None
            for p in stored
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as exc:
        raise ModelError(f"{file} is no torch.export file: {part} lists no tensors") from exc


def _line(exc: Exception) -> str:
    return str(exc).strip().splitlines()[0] if str(exc).strip() else type(exc).__name__
