"""Torch to ONNX: uint8 pictures in, quality in 0..1 out, with its manifest beside it."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import onnx
import torch
from onnx import helper, numpy_helper
from torch import nn

from dgiqa_stream.manifest import (
    SCHEMA,
    DomainSpec,
    IntervalSpec,
    ModelManifest,
    OutputSpec,
    PreprocessSpec,
    ScoreMapping,
    manifest_path,
)
from dgiqa_stream.preprocess import ViewSpec, reduction_of
from quant.narrow import narrow_
from quant.shared_constants import share_constants_

OPSET = 20
OUTPUT = "quality"
_NOT_HASHED_YET = 64 * "0"
LINEAR = ScoreMapping(raw=[0.0, 1.0], score=[0.0, 100.0])


def export_graph(model: nn.Module, views: Sequence[ViewSpec]) -> onnx.ModelProto:
    """The float graph with a dynamic batch; inputs are named after the views."""
    example = tuple(torch.zeros((3, *view.shape), dtype=torch.uint8) for view in views)
    batch = torch.export.Dim("batch", min=1, max=4096)
    exported = torch.onnx.export(
        model.eval(),
        example,
        dynamo=True,
        input_names=[view.name for view in views],
        output_names=[OUTPUT],
        dynamic_shapes=tuple({0: batch} for _ in views),
        opset_version=OPSET,
        verbose=False,
    )
    if exported is None:
        raise RuntimeError("torch.onnx.export returned no program")
    return with_pooling_nodes(exported.model_proto)


def with_pooling_nodes(graph: onnx.ModelProto) -> onnx.ModelProto:
    """Means over height and width as GlobalAveragePool, which INT8 engines know; in place.

    GlobalAveragePool keeps the two axes; a Flatten after it drops them as ReduceMean did. Constants
    that nothing reads any more, of which engines warn, are gone.
    """
    constants = {t.name: numpy_helper.to_array(t) for t in graph.graph.initializer}
    nodes = []
    for node in graph.graph.node:
        axes = constants.get(node.input[1]) if node.op_type == "ReduceMean" else None
        if axes is None or axes.tolist() not in ([2, 3], [-2, -1]):
            nodes.append(node)
            continue
        pooled = node.output[0] + "_pooled"
        nodes.append(helper.make_node("GlobalAveragePool", node.input[:1], [pooled]))
        nodes.append(helper.make_node("Flatten", [pooled], node.output, axis=1))
    del graph.graph.node[:]
    graph.graph.node.extend(nodes)
    read = {name for node in nodes for name in node.input}
    stored = [t for t in graph.graph.initializer if t.name in read]
    del graph.graph.initializer[:]
    graph.graph.initializer.extend(stored)
    for number, node in enumerate(graph.graph.node):
        node.name = f"{node.op_type.lower()}_{number}"
    onnx.checker.check_model(graph, full_check=True)
    return graph


def _forget_origins(graph: onnx.ModelProto) -> None:
    """Drop what the exporter notes for debugging: it holds folders of the exporting machine."""
    inner = graph.graph
    values = (*inner.input, *inner.output, *inner.value_info)
    for part in (graph, inner, *inner.node, *inner.initializer, *values):
        del part.metadata_props[:]
        part.doc_string = ""


def write_model(
    graph: onnx.ModelProto,
    path: Path,
    *,
    name: str,
    version: str,
    precision: str,
    views: Sequence[ViewSpec],
    normalisation: tuple[float, float],
    num_parameters: int,
    made_by: str,
    history: list[dict[str, Any]],
    metrics: dict[str, Any] | None = None,
    mapping: ScoreMapping = LINEAR,
    calibration: str = "biq2021-train-1",
    licence: str = "Apache-2.0",
    interval: IntervalSpec | None = None,
    domain: DomainSpec | None = None,
    target: str = "onnxruntime",
) -> ModelManifest:
    """Write ``path`` and its manifest; both appear whole or not at all.

    Of an INT8 model for ONNX Runtime the head's weights are narrowed in ``graph``, too, and equal
    constants kept once; see :mod:`quant.narrow` and :mod:`quant.shared_constants`. TensorRT takes
    integers from Q/DQ nodes alone.
    """
    _forget_origins(graph)
    if precision == "int8" and target == "onnxruntime":
        narrow_(graph)
        share_constants_(graph)
    manifest = ModelManifest(
        schema=SCHEMA,
        id=name,
        version=version,
        precision=precision,  # type: ignore[arg-type]
        sha256=_NOT_HASHED_YET,
        size_bytes=0,
        licence=licence,
        num_parameters=num_parameters,
        preprocess=PreprocessSpec(
            views=list(views),
            reduction=reduction_of(views),
            mean=normalisation[0],
            std=normalisation[1],
        ),
        output=OutputSpec(OUTPUT, mapping),
        calibration=calibration,
        made_by=made_by,
        history=history,
        metrics=metrics or {},
        interval=interval,
        domain=domain,
        target=target,  # type: ignore[arg-type]
    )
    for key, value in about(manifest).items():
        graph.metadata_props.add(key=key, value=value)
    return write_files(graph.SerializeToString(), path, manifest)


def write_files(content: bytes, path: Path, manifest: ModelManifest) -> ModelManifest:
    """Write an artefact and its manifest, which gets the hash and size; each appears whole."""
    manifest = msgspec.structs.replace(
        manifest, sha256=hashlib.sha256(content).hexdigest(), size_bytes=len(content)
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(msgspec.to_builtins(manifest), indent=1) + "\n"
    for target, data in ((path, content), (manifest_path(path), text.encode())):
        part = target.with_name(f"{target.name}.{os.getpid()}.part")
        part.write_bytes(data)
        part.replace(target)
    return manifest


def about(manifest: ModelManifest) -> dict[str, str]:
    """What a file says of itself, by ``dgiqa.`` keys: its manifest but for hash, size and metrics.

    ``data`` and ``teacher_sha256`` stand there where a step of the history tells them.
    """
    told: dict[str, Any] = {
        "id": manifest.id,
        "version": manifest.version,
        "precision": manifest.precision,
        "target": manifest.target,
        "licence": manifest.licence,
        "views": manifest.preprocess.views,
        "normalisation": {"mean": manifest.preprocess.mean, "std": manifest.preprocess.std},
        "score_mapping": manifest.output.mapping,
        "calibration": manifest.calibration,
        "steps": manifest.history,
    }
    for key in ("data", "teacher_sha256"):
        known = [step[key] for step in manifest.history if step.get(key)]
        told |= {key: known[-1]} if known else {}
    return {
        f"dgiqa.{key}": value if isinstance(value, str) else msgspec.json.encode(value).decode()
        for key, value in told.items()
    }


def write_successor(
    graph: onnx.ModelProto,
    path: Path,
    was: ModelManifest,
    *,
    step: dict[str, Any],
    made_by: str,
    precision: str | None = None,
    target: str | None = None,
    metrics: dict[str, Any] | None = None,
) -> ModelManifest:
    """Write what one more step made of a model: all else in its manifest stays true.

    But for its metrics, which were measured before the step: ``metrics`` are those that hold now.
    """
    return write_model(
        graph,
        path,
        name=was.id,
        version=was.version,
        precision=precision or was.precision,
        views=was.preprocess.views,
        normalisation=(was.preprocess.mean, was.preprocess.std),
        num_parameters=was.num_parameters,
        made_by=made_by,
        history=[*was.history, step],
        mapping=was.output.mapping,
        calibration=was.calibration,
        licence=was.licence,
        metrics=metrics,
        interval=was.interval,
        domain=was.domain,
        target=target or was.target,
    )
