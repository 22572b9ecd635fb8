"""Building and measuring the candidates of a search; what is finished outlives an interrupt."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx

from dgiqa_stream.correlation import srcc
from dgiqa_stream.errors import ConfigError
from dgiqa_stream.manifest import LoadedModel, load_model
from dgiqa_stream.scorer import load_scorer
from dgiqa_stream.types import FrameBatch
from quant.calibration import Views
from quant.calibration_methods import METHODS
from quant.export_onnx import write_successor
from quant.proof.agreement import Scores
from quant.proof.files import write_json
from quant.proof.latency import LatencySettings, measure_latency
from quant.proof.search import Candidate, Measured, SearchSpace, grid
from quant.proof.sensitivity import sensitivities
from quant.ptq import Int8StaticConfig, measured_spans, quantize_onnx
from quant.qat import Ranges

TRAINED = "trained"


@dataclass(frozen=True, slots=True, eq=False)
class SearchInputs:
    """What a search works on."""

    models: Sequence[LoadedModel]
    """Float models of the same views; the first is the one that drops are counted from."""
    config: Int8StaticConfig
    """All but the calibration method and the layers in float is taken from it."""
    calibration: Sequence[Views]
    rated: Sequence[Views]
    """Batches, whose pictures have the ratings ``mos`` (N,), in order."""
    mos: Scores
    ranges: Ranges | None
    """Of a ``qat`` run of the first model."""
    made_by: str


class SearchWalk:
    """A walk over the grid in a folder, gone on with where it stopped."""

    def __init__(self, folder: Path, inputs: SearchInputs, space: SearchSpace) -> None:
        """Take up what lies in the folder.

        Raises :class:`ConfigError` where that is a search of something else, and for a method that
        is not known or has no ranges.
        """
        _check(space, inputs)
        self._folder, self._inputs, self._space = folder, inputs, space
        self._state_path = folder / "search.json"
        self._models = {_variant(m): m for m in inputs.models}
        if len(self._models) < len(inputs.models):
            raise ConfigError("two models have one file name: rename one")
        self.state: dict[str, Any] = self._taken_up()

    def _taken_up(self) -> dict[str, Any]:
        fresh = {"of": self._identity(), "spans": {}, "sensitivity": {}, "measured": {}}
        for left in (self._folder / "candidates").glob("*.part"):
            left.unlink()  # of a walk that was killed
        if not self._state_path.is_file():
            return fresh
        try:
            found: dict[str, Any] = json.loads(self._state_path.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError):
            return fresh
        if found.get("of") != fresh["of"]:
            raise ConfigError(
                f"{self._folder} holds a search of other models, pictures or settings: give "
                "another --output, or delete it"
            )
        return found

    def _identity(self) -> str:
        """Of everything that figures depend on; a budget is not among them."""
        digest = hashlib.sha256()
        told = {
            "models": [m.manifest.sha256 for m in self._inputs.models],
            "config": msgspec.to_builtins(self._inputs.config),
            "space": msgspec.to_builtins(self._space),
            "ranges": msgspec.to_builtins(self._inputs.ranges),
        }
        digest.update(json.dumps(told, sort_keys=True).encode())
        for batch in (*self._inputs.calibration, *self._inputs.rated):
            for name in sorted(batch):
                digest.update(batch[name].tobytes())
        digest.update(self._inputs.mos.tobytes())
        return digest.hexdigest()

    def run(self, tell: Callable[[str], None]) -> list[Measured]:
        """Measure every candidate that is not yet; all of them."""
        candidates = grid(list(self._models), self._space)
        for number, candidate in enumerate(candidates, 1):
            if candidate.key not in self.state["measured"]:
                measured = self._measure(candidate)
                self._keep("measured", candidate.key, msgspec.to_builtins(measured))
                tell(
                    f"{number} of {len(candidates)}: {measured.key}, {measured.ms:.2f} ms, "
                    f"{measured.mb:.2f} MB, drop {measured.drop:+.4f}"
                )
        kept = self.state["measured"]
        return [msgspec.convert(kept[c.key], Measured) for c in candidates]

    def _keep(self, part: str, name: str, value: Any) -> None:
        self.state[part][name] = value
        write_json(self._state_path, self.state)

    def model_of(self, key: str) -> LoadedModel:
        """The file of a candidate that was measured."""
        model = self._models.get(key.removesuffix("-fp32"))
        if model is not None and key.endswith("-fp32"):
            return model
        return load_model(self._folder / "candidates" / f"{key}.onnx")

    def _measure(self, candidate: Candidate) -> Measured:
        reference = self._inputs.models[0]
        float_nodes: tuple[str, ...] = ()
        model = self._models[candidate.variant]
        if candidate.precision == "int8":
            float_nodes = self._float_nodes(candidate)
            model = self._build(candidate, float_nodes)
        timed = [reference] if model is reference else [reference, model]
        latency = measure_latency(
            timed,
            LatencySettings((1,), (self._space.threads,), self._space.num_rounds),
        )[-1][0]
        return Measured(
            key=candidate.key,
            precision=candidate.precision,
            method=candidate.method,
            float_nodes=list(float_nodes),
            ms=latency.median_ms,
            mb=model.manifest.size_bytes / 1e6,
            drop=self._agreement(reference) - self._agreement(model),
            times_faster=latency.times_faster,
            sha256=model.manifest.sha256,
        )

    def _agreement(self, model: LoadedModel) -> float:
        with load_scorer(model.path, device="cpu") as scorer:
            scores = [
                p.score for batch in self._inputs.rated for p in scorer.infer(FrameBatch(batch))
            ]
        found = srcc(scores, self._inputs.mos)
        return found if np.isfinite(found) else 0.0  # one score for all: no agreement

    def _build(self, candidate: Candidate, float_nodes: Sequence[str]) -> LoadedModel:
        model = self._models[candidate.variant]
        is_trained = candidate.method == TRAINED
        config = msgspec.structs.replace(
            self._inputs.config,
            calibration="minmax" if is_trained else candidate.method,
            float_nodes=tuple(float_nodes),
        )
        made = quantize_onnx(
            onnx.load(model.path),
            config,
            self._inputs.calibration,
            ranges=self._inputs.ranges if is_trained else None,
            measured=self._spans(candidate.variant)[config.calibration],
        )
        step = {
            "step": "int8",
            "settings": {"quantize": msgspec.to_builtins(config)},
            "num_pictures": len(self._inputs.calibration),
            "trained_ranges": is_trained,
            "from_sha256": model.manifest.sha256,
        }
        path = self._folder / "candidates" / f"{candidate.key}.onnx"
        write_successor(
            made,
            path,
            model.manifest,
            step=step,
            made_by=self._inputs.made_by,
            precision="int8",
        )
        return load_model(path)

    def _spans(self, variant: str) -> Mapping[str, Any]:
        """By each method; they are measured in one pass, once."""
        if variant not in self.state["spans"]:
            graph = onnx.load(self._models[variant].path)
            methods = [m for m in METHODS if m in self._space.methods or m == "minmax"]
            spans = measured_spans(graph, self._inputs.config, self._inputs.calibration, methods)
            self._keep("spans", variant, spans)
        found: Mapping[str, Any] = self.state["spans"][variant]
        return found

    def _float_nodes(self, candidate: Candidate) -> tuple[str, ...]:
        if candidate.num_float_layers == 0:
            return ()
        layers = self._sensitivity(candidate.variant)[: candidate.num_float_layers]
        return tuple(dict.fromkeys(node for layer in layers for node in layer["float_nodes"]))

    def _sensitivity(self, variant: str) -> list[dict[str, Any]]:
        """Layers, the most sensitive first, under plain ranges; measured once."""
        if variant not in self.state["sensitivity"]:
            graph = onnx.load(self._models[variant].path)
            plain = msgspec.structs.replace(
                self._inputs.config, calibration="minmax", correct_head=False, float_nodes=()
            )
            pictures = _spread(self._inputs.calibration, self._space.num_sensitivity_pictures)
            quantised = quantize_onnx(
                graph, plain, self._inputs.calibration, measured=self._spans(variant)["minmax"]
            )
            found = [asdict(layer) for layer in sensitivities(graph, quantised, pictures)]
            self._keep("sensitivity", variant, found)
        layers: list[dict[str, Any]] = self.state["sensitivity"][variant]
        return layers


def _variant(model: LoadedModel) -> str:
    return model.path.stem.removesuffix("-fp32")


def _spread(batches: Sequence[Views], number: int) -> list[Views]:
    """So many of them, evenly over the set and with its last: all kinds have their part."""
    picks = np.linspace(0, len(batches) - 1, min(number, len(batches)))
    return [batches[i] for i in np.unique(picks.round().astype(int))]


def _check(space: SearchSpace, inputs: SearchInputs) -> None:
    known = (*METHODS, TRAINED)
    unknown = sorted(set(space.methods) - set(known))
    if unknown or not space.methods or not space.num_float_layers:
        raise ConfigError(
            f"methods {list(space.methods)}: choose some of {', '.join(known)}, and how many "
            "layers stay in float"
        )
    if TRAINED in space.methods and (inputs.ranges is None or len(inputs.models) > 1):
        raise ConfigError(
            "method 'trained' needs --ranges of the `qat` run of the model, and no other variant"
        )
