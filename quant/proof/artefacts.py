"""Any model file as one function: decoded pictures to scores.

``.onnx`` files, float or INT8, run as they are served: through the runtime's scorer, on a CPU.
Checkpoints of a training run and TensorRT engines have openers of their own.
"""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import numpy as np

from dgiqa_stream.errors import ConfigError, ModelError
from dgiqa_stream.manifest import shipped_models
from dgiqa_stream.preprocess import ViewSpec
from dgiqa_stream.scorer import load_scorer
from dgiqa_stream.types import Planes
from quant.proof.agreement import Scores

Predict = Callable[[Sequence[Planes]], Scores]
NamedPicture = tuple[str, Planes]
Item = TypeVar("Item")
_BATCH = 8


@dataclass(frozen=True, slots=True, eq=False)
class Artefact:
    """An opened model: ``predict`` takes N pictures and gives scores (N,) on 0..100."""

    name: str
    """As it was asked for, without folders."""
    kind: str
    """Such as ``onnx fp32``, ``onnx int8``, ``torch``."""
    sha256: str
    predict: Predict


@dataclass(frozen=True, slots=True)
class TorchSettings:
    """What a checkpoint does not say of itself."""

    views: Sequence[ViewSpec] | None = None
    """Of the recipe that it was trained by."""
    snap_weights: bool = False
    """Put its weights on INT8's grid first, as ``export --snap-weights`` does."""


OPENERS: Mapping[str, str] = MappingProxyType(
    {  # suffix: module with open_artefact(path, settings)
        ".onnx": "quant.proof.onnx_artefact",
        ".pt": "quant.proof.commands.torch_artefact",
        ".safetensors": "quant.proof.commands.torch_artefact",
        ".pt2": "quant.proof.program_artefact",
        ".engine": "quant.proof.engine_artefact",
        ".plan": "quant.proof.engine_artefact",
    }
)


def open_artefact(model: str, settings: TorchSettings | None = None) -> Artefact:
    """A shipped name, an ONNX file with its manifest, a checkpoint or an engine.

    Raises :class:`ModelError` for a file that is not there or does not hold what its name says,
    :class:`ConfigError` for another kind of file.
    """
    path = shipped_models().get(model) or Path(model)
    if path.suffix not in OPENERS:
        raise ConfigError(
            f"{model!r} is no artefact: give {', '.join(OPENERS)} or one of "
            f"{', '.join(shipped_models())}"
        )
    if not path.is_file():
        raise ModelError(f"no file {str(model)!r}: give a model that is there")
    opener: Any = importlib.import_module(OPENERS[path.suffix])
    opened: Artefact = opener.open_artefact(path, settings or TorchSettings())
    return opened


def score_all(
    artefacts: Sequence[Artefact], pictures: Iterable[NamedPicture]
) -> tuple[list[str], list[Scores]]:
    """Names (N) and each model's scores (N,) of the same pictures, of which few are held at once.

    Raises :class:`ModelError` where a model gives something else than one finite score a picture.
    """
    names: list[str] = []
    found: list[list[Scores]] = [[] for _ in artefacts]
    for part in _batches(pictures):
        names += [name for name, _ in part]
        for artefact, scores in zip(artefacts, found, strict=True):
            scores.append(_checked(artefact, [planes for _, planes in part]))
    return names, [np.concatenate(scores) if scores else np.zeros(0) for scores in found]


def _checked(artefact: Artefact, pictures: Sequence[Planes]) -> Scores:
    scores = np.asarray(artefact.predict(pictures), np.float64)
    if scores.shape != (len(pictures),) or not np.isfinite(scores).all():
        raise ModelError(
            f"{artefact.name} gave {scores.tolist()} for {len(pictures)} pictures: not one score "
            "for each"
        )
    return scores


def _batches(items: Iterable[Item]) -> Iterator[list[Item]]:
    waiting = iter(items)
    while part := list(islice(waiting, _BATCH)):
        yield part


def sha256_of(path: Path) -> str:
    """In hexadecimal."""
    with path.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def scorer_artefact(path: Path, *, num_threads: int = 1) -> Artefact:
    """An ONNX file as it is served; raises as :func:`~dgiqa_stream.scorer.load_scorer`."""
    scorer = load_scorer(path, device="cpu", num_threads=num_threads)
    manifest = scorer.manifest

    def predict(pictures: Sequence[Planes]) -> Scores:
        return np.array([p.score for p in scorer.predict(pictures)])

    return Artefact(path.name, f"onnx {manifest.precision}", manifest.sha256, predict)
