"""What one ONNX model weighs, costs and loses per layer: the figures that need no ratings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from statistics import median
from typing import Any

import msgspec
import onnx

from dgiqa_stream.errors import ConfigError, ModelError
from dgiqa_stream.manifest import LoadedModel, load_model
from dgiqa_stream.preprocess import make_batch
from quant.calibration import Views
from quant.narrow import widen_
from quant.proof.artefacts import NamedPicture
from quant.proof.latency import LatencySettings, measure_latency
from quant.proof.layers import float_convs, integer_convs, layer_noise
from quant.proof.macs import total_macs
from quant.proof.memory import peak_memory


def load_models(names: Sequence[str]) -> list[LoadedModel]:
    """Shipped names or ``.onnx`` files, the FP32 model they are all compared with first.

    Raises :class:`ConfigError` where there is no FP32 model, for one named twice and for views that
    differ; :class:`ModelError` for a file that does not match its manifest.
    """
    models = [load_model(name) for name in names]
    floats = [m for m in models if m.manifest.precision == "fp32"]
    if not floats:
        raise ConfigError("nothing to compare with: give the FP32 .onnx, too")
    ordered = [floats[0], *(m for m in models if m is not floats[0])]
    hashes = [m.manifest.sha256 for m in ordered]
    for model in ordered:
        if hashes.count(model.manifest.sha256) > 1:
            raise ConfigError(f"{model.path.name} is given twice: give each model once")
        if model.manifest.preprocess.views != ordered[0].manifest.preprocess.views:
            raise ConfigError(
                f"{model.path.name} and {ordered[0].path.name} have other views: only models that "
                "see the same of a picture are compared"
            )
    return ordered


def read_graph(model: LoadedModel) -> onnx.ModelProto:
    """The graph, its head in float; raises :class:`ModelError` for a file that is none."""
    try:
        graph = onnx.load(model.path)
        onnx.checker.check_model(graph)
        widen_(graph)
    except (onnx.checker.ValidationError, ValueError, OSError) as exc:
        raise ModelError(f"{model.path.name} is no ONNX model: {str(exc).splitlines()[0]}") from exc
    except Exception as exc:
        if type(exc).__name__ != "DecodeError":  # of protobuf, which onnx does not export
            raise
        raise ModelError(f"{model.path.name} is no ONNX model: {exc}") from exc
    return graph


def refuse_unless_float(model: LoadedModel) -> None:
    """Raise :class:`ModelError` for a model that its manifest does not call FP32."""
    if model.manifest.precision != "fp32":
        raise ModelError(
            f"{model.path.name} is {model.manifest.precision}: give the FP32 model it was made of"
        )


def labels_of(models: Sequence[LoadedModel]) -> list[str]:
    """A name for each model: its file's, with a number where two have one."""
    names = [m.path.name for m in models]
    return [
        name if names.count(name) == 1 else f"{name} ({names[: i + 1].count(name)})"
        for i, name in enumerate(names)
    ]


def batches_of(pictures: Sequence[NamedPicture], model: LoadedModel) -> list[Views]:
    """Pictures as batches of one, as the model sees them."""
    views = model.manifest.preprocess.views
    return [dict(make_batch([planes], views).views) for _, planes in pictures]


def static_figures(model: LoadedModel, graph: onnx.ModelProto) -> dict[str, Any]:
    """What can be said without running it for time: parameters, MACs, bytes, layers in float."""
    manifest = model.manifest
    return {
        "id": manifest.id,
        "version": manifest.version,
        "precision": manifest.precision,
        "sha256": manifest.sha256,
        "steps": [str(step.get("step", "?")) for step in manifest.history],
        "num_parameters": manifest.num_parameters,
        "macs": total_macs(graph),
        "size_bytes": manifest.size_bytes,
        "float_convs": float_convs(graph),
        "num_integer_convs": len(integer_convs(graph)),
    }


def noise_figures(
    reference: onnx.ModelProto, graph: onnx.ModelProto, batches: Sequence[Views]
) -> dict[str, Any] | None:
    """SQNR per layer; None where the two graphs have no layer in common."""
    layers = layer_noise(reference, graph, batches)
    if not layers:
        return None
    worst = min(layers, key=lambda layer: layer.sqnr_db)
    return {
        "num_pictures": len(batches),
        "median_db": median(layer.sqnr_db for layer in layers),
        "lowest_db": worst.sqnr_db,
        "lowest_at": worst.node,
        "layers": [asdict(layer) for layer in layers],
    }


def cost_figures(models: Sequence[LoadedModel], settings: LatencySettings) -> list[dict[str, Any]]:
    """Latency, interleaved, and peak memory of each model; the first is the reference."""
    latencies = measure_latency(models, settings)
    found: list[dict[str, Any]] = []
    for model, latency in zip(models, latencies, strict=True):
        memory = peak_memory(model.path)
        of_memory = {
            "peak_bytes": memory.peak_bytes,
            "before_bytes": memory.before_bytes,
            "model_bytes": memory.model_bytes,
        }
        found.append({"latency": [asdict(one) for one in latency], "memory": of_memory})
    return found


def latency_at(artefact: dict[str, Any], *, batch: int = 1) -> dict[str, Any]:
    """Of a report's artefact, that of a batch with the fewest threads."""
    of_batch = [one for one in artefact["latency"] if one["batch"] == batch]
    chosen: dict[str, Any] = min(of_batch or artefact["latency"], key=lambda one: one["threads"])
    return chosen


def settings_json(settings: LatencySettings) -> dict[str, Any]:
    """For the report."""
    found: dict[str, Any] = msgspec.to_builtins(settings)
    return found
