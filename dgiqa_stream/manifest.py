"""The contract that travels with a model: what it takes, what its number means, what made it.

``student.onnx`` has ``student.onnx.json`` beside it. Loading checks the file against the manifest's
SHA-256 before any engine sees it.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import msgspec

from dgiqa_stream.errors import ModelError
from dgiqa_stream.preprocess import Reduction, ViewSpec

SCHEMA: Final = "dgiqa.manifest/2"
DEFAULT_MODEL = "student"
_MAX_MANIFEST_BYTES = 1 << 20
_SMALLEST_STEP = 1e-6  # between points closer than that a line is no line in floating point


class PreprocessSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How a frame becomes the model's inputs; normalisation is inside the graph."""

    views: list[ViewSpec]
    reduction: Reduction
    """How whole views are made small: a model trained on another reduction scores otherwise, so it
    must be said, and each of them says the same.
    """
    color: Literal["rgb"] = "rgb"
    layout: Literal["nhwc"] = "nhwc"
    dtype: Literal["uint8"] = "uint8"
    mean: float = 0.0
    """What the graph subtracts, in 8-bit steps; for information."""
    std: float = 1.0

    def __post_init__(self) -> None:
        """Refuse views that are reduced otherwise than is said for all."""
        for view in self.views:
            if view.kind == "whole" and view.reduction != self.reduction:
                raise ValueError(
                    f"view {view.name!r} is {view.reduction}, but reduction is {self.reduction}"
                )

    def reduced_by(self, reduction: Reduction | None) -> PreprocessSpec:
        """The same views, whole ones made small as told; this where nothing is told."""
        if reduction is None:
            return self
        views = [
            msgspec.structs.replace(view, reduction=reduction) if view.kind == "whole" else view
            for view in self.views
        ]
        return msgspec.structs.replace(self, views=views, reduction=reduction)


class ScoreMapping(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """From the network's output to the 0-100 score: straight lines between rising points."""

    raw: Annotated[list[float], msgspec.Meta(min_length=2)]
    score: Annotated[list[float], msgspec.Meta(min_length=2)]

    def __post_init__(self) -> None:
        """Refuse a mapping that could fold or leave the scale."""
        _refuse_unless_rising(raw=self.raw, score=self.score)
        if self.score[0] < 0 or self.score[-1] > 100:
            raise ValueError("the mapping leaves the 0..100 scale")

    def __call__(self, raw: float) -> float:
        """The score of an output; outputs beyond the ends stay at the ends."""
        return _interpolated(raw, self.raw, self.score)


class OutputSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The graph's output and what it means."""

    name: str
    mapping: ScoreMapping


class HalfWidthMapping(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """From the network's spread to half an interval: straight lines between rising points."""

    spread: Annotated[list[float], msgspec.Meta(min_length=2)]
    points: Annotated[list[float], msgspec.Meta(min_length=2)]
    """Of the 0-100 scale, to either side of the score."""

    def __post_init__(self) -> None:
        """Refuse a mapping that could fold or leave the scale."""
        _refuse_unless_rising(spread=self.spread, points=self.points)
        if self.points[0] < 0 or self.points[-1] > 100:
            raise ValueError("points leave 0..100: half an interval is no wider than the scale")

    def __call__(self, spread: float) -> float:
        """Half the interval's width; spreads beyond the ends stay at the ends."""
        return _interpolated(spread, self.spread, self.points)


def _interpolated(x: float, xs: list[float], ys: list[float]) -> float:
    """What ``numpy.interp`` gives, to the bit; it makes arrays of both lists for each frame."""
    if x <= xs[0]:
        return ys[0]
    if x >= xs[-1]:
        return ys[-1]
    right = min(bisect_right(xs, x), len(xs) - 1)  # of NaN, which stays one, it would be beyond
    left = right - 1
    slope = (ys[right] - ys[left]) / (xs[right] - xs[left])
    return slope * (x - xs[left]) + ys[left]


def _refuse_unless_rising(**values: list[float]) -> None:
    steps = [b - a for each in values.values() for a, b in pairwise(each)]
    rising = all(step >= _SMALLEST_STEP for step in steps)
    if len({len(each) for each in values.values()}) != 1 or not rising:
        raise ValueError(
            f"{' and '.join(values)} must be lists of one length, rising by 1e-6 or more"
        )


class IntervalSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The graph's output that says how sure a score is, and what it means."""

    output: str
    mapping: HalfWidthMapping
    coverage: Annotated[float, msgspec.Meta(gt=0, lt=1)] = 0.9
    """Share of pictures, like those of the calibration, whose mean opinion lies inside."""

    def around(self, score: float, spread: float) -> tuple[float, float]:
        """Low and high, 0..100, for a score and the network's spread."""
        half = self.mapping(spread)
        return max(0.0, score - half), min(100.0, score + half)


class DomainSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The graph's output that says how unlike the training pictures a picture is."""

    output: str
    threshold: Annotated[float, msgspec.Meta(ge=0, le=1)]
    """Outputs above it are of pictures of a kind the model was never tried on."""


class ModelManifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What a model file is. Fields at their defaults are not written: older readers take it."""

    schema: Literal["dgiqa.manifest/2"]
    id: str
    version: str
    precision: Literal["fp32", "fp16", "bf16", "int8"]
    sha256: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]
    size_bytes: int
    licence: str
    num_parameters: int
    preprocess: PreprocessSpec
    output: OutputSpec
    calibration: str
    """Which scale the score is on: what fitted the mapping."""
    made_by: str
    """The command that wrote the file."""
    history: list[dict[str, Any]] = []
    """Each step that made it, with its settings and versions, oldest first."""
    metrics: dict[str, Any] = {}
    interval: IntervalSpec | None = None
    """How sure a score is; None where the model does not say."""
    domain: DomainSpec | None = None
    """Which pictures the model knows; None where it does not say."""
    target: Literal["onnxruntime", "tensorrt"] = "onnxruntime"
    """The engine that the file was made for: INT8 for one is slow or refused in another."""

    def __post_init__(self) -> None:
        """Refuse one output for two meanings."""
        names = [self.output.name, *(s.output for s in (self.interval, self.domain) if s)]
        if len(set(names)) != len(names):
            raise ValueError(
                f"output, interval and domain name the graph's outputs {', '.join(names)}: "
                "each needs one of its own"
            )


class _AnyManifest(msgspec.Struct, frozen=True):
    schema: str


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model file whose manifest has been checked."""

    path: Path
    manifest: ModelManifest


def manifest_path(model: Path) -> Path:
    """``x.onnx`` to ``x.onnx.json``."""
    return model.with_name(model.name + ".json")


def shipped_models() -> dict[str, Path]:
    """Name to file of the models in this package."""
    folder = Path(__file__).with_name("assets")
    return {p.stem: p for p in sorted(folder.glob("*.onnx"))}


def load_model(name_or_path: str | Path = DEFAULT_MODEL) -> LoadedModel:
    """A shipped model by name, or a ``.onnx`` file with its manifest beside it.

    Raises :class:`ModelError` where the file, the manifest or their agreement is missing.
    """
    shipped = shipped_models()
    path = shipped.get(str(name_or_path)) or Path(name_or_path)
    beside = manifest_path(path) if path.name else path
    try:
        is_there, is_described = path.is_file(), beside.is_file()
        content = path.read_bytes() if is_there else b""
    except (OSError, ValueError) as exc:  # a name that is too long, a file that may not be read
        raise ModelError(f"model {str(name_or_path)!r} cannot be read: {exc}") from exc
    if not is_there:
        raise ModelError(
            f"no model {str(name_or_path)!r}: give a .onnx file or one of {', '.join(shipped)}"
        )
    if not is_described:
        raise ModelError(
            f"{path.name} has no manifest {beside.name} beside it: "
            "copy both files, or export again with `dgiqa-quant export`"
        )
    manifest = read_manifest(beside)
    digest = hashlib.sha256(content).hexdigest()
    if digest != manifest.sha256:
        raise ModelError(
            f"{path.name} has sha256 {digest[:12]}…, its manifest says {manifest.sha256[:12]}…: "
            "they belong to different exports; copy both files again, or export with "
            "`dgiqa-quant export`"
        )
    return LoadedModel(path, manifest)


def read_manifest(path: Path) -> ModelManifest:
    """Parse and check a manifest; raises :class:`ModelError` naming the field."""
    try:
        if path.stat().st_size > _MAX_MANIFEST_BYTES:
            raise ModelError(f"{path.name} is over {_MAX_MANIFEST_BYTES} bytes: not a manifest")
        content = path.read_bytes()
        schema = msgspec.json.decode(content, type=_AnyManifest).schema
        if schema.startswith("dgiqa.manifest/") and schema != SCHEMA:
            raise ModelError(
                f"{path.name} is of schema {schema} and this package reads {SCHEMA}, whose "
                "pictures are made small in another way: train and export the model again, or use "
                "the package it was made with"
            )
        return msgspec.json.decode(content, type=ModelManifest)
    except (msgspec.DecodeError, OSError, UnicodeDecodeError) as exc:
        raise ModelError(f"{path.name} is not a {SCHEMA} manifest: {exc}") from exc
