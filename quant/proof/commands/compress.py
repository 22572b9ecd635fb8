"""``dgiqa-quant compress``: a trained student through the steps of a recipe, with proof at each."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from distill.process import command_line, keep_freed_memory
from distill.say import say

if TYPE_CHECKING:
    from quant.proof.chain import Files
    from quant.proof.commands.steps import ChainRequest

LARGEST_EXPORT_POINTS = 0.1
"""Between torch and its export: more than float32 reordering explains."""


def compress(
    model: Annotated[Path, typer.Argument(help="best.pt of a training run, or a float .onnx.")],
    *,
    recipe: Annotated[
        Path, typer.Option(help="Settings, such as configs/quant/int8.toml: its tables are steps.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder; goes on with it.")],
    packs: Annotated[Path, typer.Option(help="What `dgiqa-distill data` wrote.")],
    shards: Annotated[
        Path | None, typer.Option(help="What `dgiqa-distill shards` wrote, used as well.")
    ] = None,
    trained_by: Annotated[
        list[Path] | None, typer.Option(help="Recipes that a .pt was trained by, oldest first.")
    ] = None,
    fine_tuning: Annotated[
        Path | None, typer.Option(help="Recipe of `qat`: data, losses and rates.")
    ] = None,
    low_rank: Annotated[
        Path | None, typer.Option(help="Settings of `factorize`, which then comes first.")
    ] = None,
    ranges: Annotated[
        Path | None, typer.Option(help="ranges.json of the `qat` that a .onnx comes from.")
    ] = None,
    version: Annotated[str, typer.Option(help="Version of the model.")] = "0.0.0",
    skip: Annotated[
        list[str] | None, typer.Option(help="A step to leave out; may be repeated.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Training steps of `qat`; for trials.")] = None,
) -> None:
    """Run a recipe's chain: factorize, qat, export, int8, refit, sure; the same command goes on."""
    from quant.proof.chain import run_chain
    from quant.proof.commands.steps import ChainRequest, files_of, steps_of
    from quant.proof.files import write_json

    keep_freed_memory()
    request = ChainRequest(
        model=model,
        recipe=recipe,
        packs=packs,
        shards=shards,
        trained_by=tuple(trained_by or ()),
        fine_tuning=fine_tuning,
        low_rank=low_rank,
        version=version,
        skip=tuple(skip or ()),
        num_steps=steps,
    )
    given = files_of(request, ranges)
    chain = steps_of(request)
    files, told = run_chain(chain, given, output, say)
    proof = _proof(given, files, request)
    made = _write_models(files, request, [step.name for step in chain], output)
    result = {
        "kind": "compress",
        "command": command_line(),
        "steps": told,
        "proof": proof,
        "models": made,
    }
    write_json(output / "chain.json", result)
    for line in proof:
        found = line["agreement"]
        say(
            f"{line['a']} against {line['b']}: mean {found['mean_points']:.3f}, "
            f"p99 {found['p99_points']:.3f}, max {found['max_points']:.3f} points"
        )
    typer.echo(f"{', '.join(made)} in {output}")


def _proof(given: Files, files: Files, request: ChainRequest) -> list[dict[str, Any]]:
    """Agreement from stage to stage, on generated pictures.

    Raises :class:`ModelError` where an export is not the model it was made of.
    """
    from dgiqa_stream.errors import ModelError
    from distill.recipe import load_recipe
    from quant.proof.agreement import agreement
    from quant.proof.artefacts import TorchSettings, open_artefact, score_all
    from quant.proof.pictures import generated_pictures

    stages = {role: files[role] for role in ("weights", "float", "int8") if role in files}
    is_refitted = "refit" in request.chosen()
    if "weights" in stages and (is_refitted or "float" not in stages):
        del stages["weights"]  # its head is another one
    views = load_recipe(request.trained_by[-1]).views if "weights" in stages else None
    settings = TorchSettings(views, snap_weights="qat" in request.chosen())
    opened = [open_artefact(str(path), settings) for path in stages.values()]
    if len(opened) < 2:
        return []
    names, scores = score_all(opened, generated_pictures())
    found = []
    for i in range(1, len(opened)):
        apart = agreement(scores[i - 1], scores[i], names)
        if opened[i - 1].kind == "torch" and apart.max_points > LARGEST_EXPORT_POINTS:
            raise ModelError(
                f"the export differs from {opened[i - 1].name} by up to {apart.max_points:.2f} "
                "points: report it as a fault"
            )
        found.append({"a": opened[i - 1].kind, "b": opened[i].kind, "agreement": asdict(apart)})
    return found


def _write_models(
    files: Files, request: ChainRequest, chain: list[str], output: Path
) -> dict[str, str]:
    """The chain's models in its folder, their manifests with recipe and chain; name to SHA-256."""
    import onnx

    from dgiqa_stream.manifest import load_model
    from quant.export_onnx import write_successor

    step = {"step": "compress", "chain": chain, "recipe": request.tables()}
    made = {}
    for role, ending in (("float", "-fp32.onnx"), ("int8", ".onnx")):
        if role not in files:
            continue
        source = load_model(files[role])
        path = output / f"{source.manifest.id}{ending}"
        manifest = write_successor(
            onnx.load(source.path),
            path,
            source.manifest,
            step=step,
            made_by=command_line(),
            metrics=source.manifest.metrics,
        )
        made[path.name] = manifest.sha256
    return made
