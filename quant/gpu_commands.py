"""``dgiqa-quant half``, ``program``, ``check-tensorrt`` and ``engine``: artefacts for GPUs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from distill.process import command_line
from distill.say import say

if TYPE_CHECKING:
    import onnx

    from dgiqa_stream.manifest import LoadedModel, ModelManifest
    from dgiqa_stream.preprocess import ViewSpec
    from quant.tensorrt.engine import Engine, EngineConfig
    from quant.tensorrt.rules import Violation

BROKEN_RULES = 1
"""Exit code of ``check-tensorrt``: the file can be read, and breaks at least one rule."""

FloatModel = Annotated[Path, typer.Argument(help="A float .onnx with its manifest.")]
Batch = Annotated[int, typer.Option(min=1, help="Pictures at once.")]


def half(
    model: FloatModel,
    *,
    output: Annotated[Path, typer.Option("--output", "-o", help="The .onnx file to write.")],
    kind: Annotated[Literal["fp16", "bf16"], typer.Option(help="The type of half the size.")],
    float_node: Annotated[
        list[str] | None, typer.Option(help="Name of a node left in float32; may be repeated.")
    ] = None,
) -> None:
    """Write a float model in FP16 or BF16, for GPUs; inputs and outputs stay what they were."""
    import onnxruntime

    from dgiqa_stream.manifest import load_model
    from quant.export_onnx import write_successor
    from quant.half import to_half
    from quant.proof.figures import read_graph, refuse_unless_float

    _refuse_unless_named(output, ".onnx")
    source = load_model(model)
    refuse_unless_float(source)
    float_nodes = float_node or []
    made = to_half(read_graph(source), kind, float_nodes=float_nodes)
    step = {
        "step": kind,
        "float_nodes": float_nodes,
        "from_sha256": source.manifest.sha256,
        "onnxruntime": onnxruntime.__version__,
    }
    was = source.manifest
    manifest = write_successor(made, output, was, step=step, made_by=command_line(), precision=kind)
    say(f"{output.name}: {manifest.size_bytes} bytes of {was.size_bytes} in {was.precision}")


def program(
    model: FloatModel,
    *,
    output: Annotated[Path, typer.Option("--output", "-o", help="The .pt2 file to write.")],
) -> None:
    """Write a float model as a torch.export program, which torch loads without this package."""
    from dgiqa_stream.manifest import load_model
    from quant.export_program import export_program, write_program
    from quant.proof.figures import read_graph

    _refuse_unless_named(output, ".pt2")
    source = load_model(model)
    exported = export_program(read_graph(source), source.manifest.preprocess.views)
    manifest = write_program(exported, output, source.manifest, made_by=command_line())
    say(f"{output.name}: {manifest.size_bytes} bytes")


def check_tensorrt(
    model: Annotated[Path, typer.Argument(help="An .onnx with its manifest.")],
    *,
    report: Annotated[Path | None, typer.Option(help="Write what was found here, as JSON.")] = None,
) -> None:
    """Whether TensorRT takes a model and fuses its Q/DQ; exit code 1 names every broken rule."""
    from dgiqa_stream.manifest import load_model
    from quant.proof.figures import read_graph

    source = load_model(model)
    graph = read_graph(source)
    found = _violations(graph, source.manifest)
    if report is not None:
        _write_report(report, source, graph, found)
    for violation in found:
        say(str(violation))
    if found:
        raise typer.Exit(BROKEN_RULES)
    say(f"{model.name}: {source.manifest.precision}, no rule broken")


def engine(
    model: Annotated[
        Path, typer.Argument(help="An .onnx (built by TensorRT) or a .pt2 (by torch-tensorrt).")
    ],
    *,
    output: Annotated[Path, typer.Option("--output", "-o", help="The .engine file to write.")],
    min_batch: Batch = 1,
    best_batch: Batch = 16,
    max_batch: Batch = 64,
    effort: Annotated[int, typer.Option(min=0, max=5, help="How long kernels are tried.")] = 3,
    hardware_compatible: Annotated[
        bool, typer.Option("--hardware-compatible", help="For all GPUs from Ampere on.")
    ] = False,
    version_compatible: Annotated[
        bool, typer.Option("--version-compatible", help="For later versions of TensorRT, too.")
    ] = False,
    cache: Annotated[
        Path | None, typer.Option(help="Folder that keeps timings and engines.")
    ] = None,
) -> None:
    """Build a TensorRT engine on this machine's GPU, in the precision of the file."""
    import msgspec

    from dgiqa_stream.errors import ConfigError
    from dgiqa_stream.manifest import load_model
    from quant.export_onnx import write_files
    from quant.tensorrt.engine import EngineConfig

    _refuse_unless_named(output, ".engine")
    try:
        config = EngineConfig(
            min_batch=min_batch,
            best_batch=best_batch,
            max_batch=max_batch,
            effort=effort,
            hardware_compatible=hardware_compatible,
            version_compatible=version_compatible,
        )
    except ValueError as exc:
        raise ConfigError(str(exc)) from exc
    source = load_model(model)
    built = (_of_program if model.suffix == ".pt2" else _of_onnx)(source, config, cache)
    step = {
        "step": "engine",
        "settings": msgspec.to_builtins(config),
        "from_sha256": source.manifest.sha256,
        "tensorrt": built.tensorrt,
        "gpu": built.gpu,
    }
    manifest = msgspec.structs.replace(
        source.manifest,
        history=[*source.manifest.history, step],
        made_by=command_line(),
        metrics={},
        target="tensorrt",
    )
    write_files(built.plan, output, manifest)
    how = "read from the cache" if built.is_reused else "built"
    say(f"{output.name}: {how}, {len(built.plan)} bytes, for {built.gpu or 'the GPU here'}")


def _of_onnx(source: LoadedModel, config: EngineConfig, cache: Path | None) -> Engine:
    from dgiqa_stream.errors import ModelError
    from quant.proof.figures import read_graph
    from quant.tensorrt.engine import build_from_onnx, import_tensorrt
    from quant.tensorrt.layout import lay_out_

    import_tensorrt()  # where it is absent, that is what to say first
    manifest = source.manifest
    if manifest.precision == "int8" and manifest.target != "tensorrt":
        raise ModelError(
            f"{source.path.name} is INT8 for {manifest.target}: TensorRT takes that of "
            "`dgiqa-quant int8 --target tensorrt`"
        )
    graph = lay_out_(read_graph(source))
    found = _violations(graph, manifest)
    if found:
        raise ModelError(
            f"{source.path.name}: {found[0]}; `dgiqa-quant check-tensorrt` names all of "
            f"{len(found)} broken rules"
        )
    return build_from_onnx(
        graph.SerializeToString(), manifest.preprocess.views, config, cache=cache
    )


def _of_program(source: LoadedModel, config: EngineConfig, cache: Path | None) -> Engine:
    from quant.export_program import load_program
    from quant.tensorrt.engine import build_from_program, import_torch_tensorrt

    import_torch_tensorrt()
    exported, manifest = load_program(source.path)
    more = [spec.output for spec in (manifest.interval, manifest.domain) if spec is not None]
    names = [manifest.output.name, *more]
    views: Sequence[ViewSpec] = manifest.preprocess.views
    return build_from_program(exported, views, config, output_names=names, cache=cache)


def _violations(graph: onnx.ModelProto, manifest: ModelManifest) -> list[Violation]:
    """What a graph breaks, but for convolutions that its manifest names as left in float."""
    from quant.tensorrt.rules import check_tensorrt as check

    named: list[str] = []
    for step in manifest.history:
        settings: Any = step.get("settings")
        if step.get("step") == "int8" and isinstance(settings, dict):
            named += settings.get("quantize", {}).get("float_nodes", [])
    return check(graph, float_nodes=named, int8=manifest.precision == "int8")


def _write_report(
    path: Path, source: LoadedModel, graph: onnx.ModelProto, found: Sequence[Violation]
) -> None:
    """What was asked of which file, and what was found, as JSON; whole or not at all."""
    import dataclasses

    from quant.proof.files import write_json
    from quant.tensorrt.graph_view import CONVOLUTIONS, DEQUANTIZE, GraphView
    from quant.tensorrt.rules import RULES

    view = GraphView(graph)
    convolutions = list(view.of_kind(*CONVOLUTIONS))
    in_int8 = [n for n in convolutions if view.made_by(n.input[1], DEQUANTIZE) is not None]
    about = {
        "model": source.path.name,
        "sha256": source.manifest.sha256,
        "precision": source.manifest.precision,
        "target": source.manifest.target,
        "rules": [r for r, (int8, _) in RULES.items() if _is_int8(source) or not int8],
        "num_convolutions": len(convolutions),
        "num_int8_convolutions": len(in_int8),
        "violations": [dataclasses.asdict(v) for v in found],
    }
    write_json(path, about)


def _is_int8(source: LoadedModel) -> bool:
    return source.manifest.precision == "int8"


def _refuse_unless_named(path: Path, suffix: str) -> None:
    from dgiqa_stream.errors import ConfigError

    if path.suffix != suffix:
        raise ConfigError(f"--output {path.name} must end in {suffix}")
