"""``dgiqa-quant``: export a trained student to ONNX, make it INT8."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from dgiqa_stream.cli.running import Verdict, run
from dgiqa_stream.errors import ConfigError, DgiqaError
from distill.process import command_line, keep_freed_memory
from distill.say import say
from quant.fragments_command import fragments
from quant.gpu_commands import check_tensorrt, engine, half, program
from quant.leave_out_command import leave_out
from quant.low_rank.command import factorize
from quant.proof.commands.check import check
from quant.proof.commands.compress import compress
from quant.proof.commands.report import report
from quant.proof.commands.search import search
from quant.refit_command import refit
from quant.sure_command import sure

app = typer.Typer(
    name="dgiqa-quant",
    help="Export a trained student to ONNX and compress it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
Packs = Annotated[Path, typer.Option(help="What `dgiqa-distill data` wrote.")]
Shards = Annotated[
    Path | None, typer.Option(help="What `dgiqa-distill shards` wrote: ladders of more kinds.")
]
Output = Annotated[Path, typer.Option("--output", "-o", help="The .onnx file to write.")]


@app.command()
def export(
    weights: Annotated[
        Path, typer.Argument(help="best.pt of a training run, or what `factorize` wrote.")
    ],
    *,
    recipe: Annotated[
        list[Path], typer.Option(help="The recipes it was trained by, oldest first.")
    ],
    output: Output,
    version: Annotated[str, typer.Option(help="Version of the model.")],
    snap_weights: Annotated[
        bool, typer.Option("--snap-weights", help="Weights of a `qat` run, on INT8's grid.")
    ] = False,
    data: Annotated[
        list[str] | None, typer.Option(help="A set it was trained on, to be told in the file.")
    ] = None,
    teacher: Annotated[
        Path | None, typer.Option(help="Its teacher, whose hash is to be told in the file.")
    ] = None,
) -> None:
    """Write the float model as ONNX with its manifest."""
    import msgspec
    import torch

    from distill.data.shards import sha256_of
    from distill.models.student import Deployed
    from distill.models.trunks import INPUT_MEAN, INPUT_STD
    from distill.recipe import load_recipe
    from quant.export_onnx import export_graph, write_model
    from quant.low_rank.student import open_student
    from quant.qat import snap_weights_

    recipes = [load_recipe(path) for path in recipe]
    settings = recipes[-1]
    student, steps = open_student(weights)
    deployed = Deployed(student)
    if snap_weights:
        snap_weights_(deployed)
    trained = [{"step": "train", "recipe": msgspec.to_builtins(r)} for r in recipes]
    manifest = write_model(
        export_graph(deployed, settings.views),
        output,
        name=settings.name,
        version=version,
        precision="fp32",
        views=settings.views,
        normalisation=(INPUT_MEAN, INPUT_STD),
        num_parameters=sum(p.numel() for p in deployed.parameters()),
        made_by=command_line(),
        history=[
            *trained,
            *steps,
            {
                "step": "export",
                "snap_weights": snap_weights,
                "torch": str(torch.__version__),
                **({"data": data} if data else {}),
                **({"teacher_sha256": sha256_of(teacher)} if teacher else {}),
            },
        ],
    )
    say(f"{output.name}: {manifest.num_parameters} parameters, {manifest.size_bytes} bytes")


@app.command()
def qat(
    weights: Annotated[Path, typer.Argument(help="best.pt of a training run.")],
    *,
    recipe: Annotated[Path, typer.Option(help="Data, losses and rates of the fine-tuning.")],
    config: Annotated[Path, typer.Option(help="Settings, such as configs/quant/int8.toml.")],
    packs: Packs,
    run: Annotated[Path, typer.Option(help="Folder for weights and ranges; resumes from it.")],
    shards: Shards = None,
    steps: Annotated[int | None, typer.Option(help="Steps instead of the recipe's epochs.")] = None,
) -> None:
    """Fine-tune a student with INT8's rounding in place; its weights stay float."""
    import torch

    from distill.data.training_data import open_packs
    from distill.models.student import load_student, quantised_points
    from distill.recipe import load_recipe
    from distill.trainer import train
    from quant.calibration import CalibrationConfig, TrainingPlanes, calibration_set
    from quant.ptq import load_int8_config
    from quant.qat import find_ranges, load_ranges, prepare_qat_, save_ranges

    keep_freed_memory()
    settings, fine_tuning = load_int8_config(config), load_recipe(recipe)
    data, kept = open_packs(packs, shards), run / "ranges.json"
    if not kept.is_file():
        student = load_student(weights)
        half = settings.qat.num_pictures // 2
        chosen = CalibrationConfig(num_rated=half, num_degraded=half, num_letterboxed=0)
        batches = calibration_set(
            chosen,
            fine_tuning.views,
            rated=TrainingPlanes(data.rated),
            degraded=TrainingPlanes(data.ladders),
        )
        tensors = [tuple(map(torch.from_numpy, batch.values())) for batch in batches]
        points = quantised_points(student)
        run.mkdir(parents=True, exist_ok=True)
        save_ranges(find_ranges(student, points, tensors, settings.qat), kept)
    ranges = load_ranges(kept)
    best = train(
        fine_tuning,
        data,
        run,
        weights=weights,
        prepare=lambda model: prepare_qat_(quantised_points(model), ranges),
        num_steps=steps,
    )
    say(f"validation SRCC {best['srcc']:.4f} with rounding; weights and ranges in {run}")


@app.command()
def int8(
    model: Annotated[Path, typer.Argument(help="A float .onnx with its manifest.")],
    *,
    config: Annotated[Path, typer.Option(help="Settings, such as configs/quant/int8.toml.")],
    packs: Packs,
    output: Output,
    shards: Shards = None,
    ranges: Annotated[
        Path | None,
        typer.Option(help="ranges.json of `qat`, or an INT8 .onnx whose trunk this model has."),
    ] = None,
    target: Annotated[
        Literal["onnxruntime", "tensorrt"],
        typer.Option(help="CPUs, by ONNX Runtime, or GPUs: TensorRT wants symmetric INT8."),
    ] = "onnxruntime",
) -> None:
    """Quantise a float model to INT8, calibrated on training pictures."""
    import msgspec
    import onnxruntime

    from dgiqa_stream.manifest import load_model
    from distill.data.training_data import open_packs
    from quant.calibration import TrainingPlanes, calibration_set, training_batches
    from quant.calibration_methods import refuse_useless
    from quant.export_onnx import write_successor
    from quant.proof.figures import read_graph, refuse_unless_float
    from quant.ptq import choose_calibration, load_int8_config, quantize_onnx
    from quant.rounded_tensors import open_ranges
    from quant.tensorrt.quantize import (
        choose_for_tensorrt,
        quantize_for_tensorrt,
        tune_and_quantize,
    )

    settings = load_int8_config(config)
    if settings.tune.num_steps and target != "tensorrt":
        raise ConfigError(f"{config.name} has [tune], which is for --target tensorrt alone")
    source = load_model(model)
    refuse_unless_float(source)
    graph = read_graph(source)
    manifest = source.manifest
    views = manifest.preprocess.views
    data = open_packs(packs, shards)
    rated, degraded = TrainingPlanes(data.rated), TrainingPlanes(data.ladders)
    calibration = calibration_set(settings.calibration, views, rated=rated, degraded=degraded)
    refuse_useless(calibration)
    trained = open_ranges(ranges) if ranges else None
    for_gpu = target == "tensorrt"
    choose = choose_for_tensorrt if for_gpu else choose_calibration
    quantize, errors = choose(graph, settings.quantize, calibration, ranges=trained)
    settings = msgspec.structs.replace(settings, quantize=quantize)
    step = {
        "step": "int8",
        "target": target,
        "settings": msgspec.to_builtins(settings),
        **({"calibration_errors_points": errors} if errors else {}),
        "num_pictures": len(calibration),
        "from_sha256": manifest.sha256,
        "onnxruntime": onnxruntime.__version__,
    }
    if settings.tune.num_steps:
        keep_freed_memory()
        tune = settings.tune
        batches = training_batches(
            views, rated=rated, degraded=degraded, batch=tune.batch, seed=tune.seed
        )
        quantised = tune_and_quantize(
            graph, quantize, tune, calibration, batches, ranges=trained, tell=say
        )
    else:
        make = quantize_for_tensorrt if for_gpu else quantize_onnx
        quantised = make(graph, quantize, calibration, ranges=trained)
    made = write_successor(
        quantised,
        output,
        manifest,
        step=step,
        made_by=command_line(),
        precision="int8",
        target=target,
    )
    say(f"{output.name}: {made.size_bytes} bytes of {manifest.size_bytes} in {manifest.precision}")


app.command()(factorize)
app.command()(fragments)
app.command()(refit)
app.command()(leave_out)
app.command()(sure)
app.command()(half)
app.command()(program)
app.command()(check_tensorrt)
app.command()(engine)
app.command()(check)
app.command()(compress)
app.command()(report)
app.command()(search)


def main() -> None:
    """Run the command line; errors are one line and an exit code."""
    sys.exit(run(app, program="dgiqa-quant", prefix="DGIQA_QUANT", judge=_judge, extra="quant"))


def _judge(exc: Exception) -> Verdict | None:
    """Settings 2, the rest that people can mend 5."""
    if isinstance(exc, ConfigError):
        return 2, str(exc)
    if isinstance(exc, DgiqaError | OSError | ValueError):
        return 5, str(exc)
    return None


if __name__ == "__main__":
    main()
