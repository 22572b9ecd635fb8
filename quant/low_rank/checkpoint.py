"""A factored model's file: safetensors that say their ranks and how they came to be."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

import msgspec
from torch import Tensor, nn

from dgiqa_stream.errors import BackendUnavailable, ModelError, SinkError
from quant.low_rank.layers import Rank, shape_like_

SCHEMA: Literal["dgiqa.low-rank/1"] = "dgiqa.low-rank/1"
_KEY = "dgiqa.low_rank"


class FactoredAbout(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a factored model's safetensors says of itself."""

    schema: Literal["dgiqa.low-rank/1"]
    whole_shapes: dict[str, tuple[int, ...]]
    """Of the weights that were factored, by name: with those of the file they tell what the model
    was."""
    ranks: dict[str, Rank]
    history: list[dict[str, Any]]
    """The steps from trained weights to this file, with their settings."""
    made_by: str


def save_factored(model: nn.Module, path: Path, about: FactoredAbout) -> None:
    """Write weights and what they are; whole or not at all.

    Raises :class:`SinkError` where it cannot be written.
    """
    safetensors = _safetensors()
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside.touch()
        mode = beside.stat().st_mode  # safetensors makes files that only their maker may read
        told = {_KEY: msgspec.json.encode(about).decode()}
        safetensors.torch.save_file(tensors, beside, metadata=told)
        beside.chmod(mode)
        beside.replace(path)
    except (safetensors.SafetensorError, OSError) as exc:
        raise SinkError(f"{path.name} cannot be written to {path.parent}: {exc}") from exc
    finally:
        beside.unlink(missing_ok=True)


def read_factored_about(path: Path) -> FactoredAbout:
    """What a file says of itself; raises :class:`ModelError` where it is no factored model's."""
    safetensors = _safetensors()
    try:
        with safetensors.safe_open(path, "pt") as opened:
            told = (opened.metadata() or {}).get(_KEY)
    except (safetensors.SafetensorError, OSError) as exc:
        raise ModelError(f"{path.name} cannot be read as safetensors: {exc}") from exc
    try:
        return msgspec.json.decode(told or "", type=FactoredAbout)
    except msgspec.DecodeError as exc:
        raise ModelError(
            f"{path.name} is not a {SCHEMA} file: give what `dgiqa-quant factorize` wrote"
        ) from exc


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of a file, by name."""
    tensors: dict[str, Tensor] = _safetensors().torch.load_file(path)
    return tensors


def fill_factored_(
    model: nn.Module, tensors: dict[str, Tensor], about: FactoredAbout, path: Path
) -> None:
    """Give a whole model the shape and the weights of the file at ``path``.

    Raises :class:`ModelError` where they are another model's.
    """
    try:
        shape_like_(model, about.ranks)
        model.load_state_dict(tensors)
    except (RuntimeError, AttributeError, ValueError, IndexError) as exc:
        reason = str(exc).splitlines()[0]
        raise ModelError(f"{path.name} does not fit its own description: {reason}") from exc


def _safetensors() -> Any:
    try:
        import safetensors
        import safetensors.torch
    except ImportError as exc:
        raise BackendUnavailable(
            f"a factored model's file needs {exc.name!r}: pip install 'dgiqa-stream[quant]'"
        ) from exc
    return safetensors
