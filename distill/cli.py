"""``dgiqa-distill``: pictures, labels, training, evaluation; a teacher's commands."""

from __future__ import annotations

import json
import os
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from dgiqa_stream.cli.running import Verdict, run
from dgiqa_stream.cli.scoring import Format
from dgiqa_stream.errors import ConfigError, DgiqaError, SourceError
from distill.data.commands import mosaics, name_and_folder, shards
from distill.evaluation.commands import app as judge_app
from distill.options import DepthCache, Device, Threads
from distill.process import command_line
from distill.say import say
from distill.teachers.commands import teach, transfer_labels
from distill.training_commands import begin_training, imitate, label, train


class Protocol(StrEnum):
    """Where a teacher's crops lie."""

    GRID = "grid"
    OFFICIAL = "official"


app = typer.Typer(
    name="dgiqa-distill",
    help="Make the models: pack data, train a student, evaluate a model, ask the teacher.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


_EXTRAS = {"shards": "shards"} | dict.fromkeys(("convert", "label", "score", "teach"), "teacher")
"""What a command needs beyond the runtime; ``train`` where it is not here."""

app.command()(mosaics)
app.command()(shards)
app.command()(label)
app.command()(imitate)
app.command()(train)
app.command()(teach)
app.command()(transfer_labels)
app.add_typer(judge_app, name="judge")


@app.command()
def data(
    recipe: Annotated[Path, typer.Argument()],
    *,
    biq2021: Annotated[Path, typer.Option(help="Folder of BIQ2021: Images/ and both tables.")],
    pristine: Annotated[Path, typer.Option(help="Folder of clean pictures (.webp).")],
    packs: Annotated[Path, typer.Option(help="Folder to write.")],
    workers: Annotated[int, typer.Option(help="Processes that degrade pictures.")] = 2,
) -> None:
    """Pack rated and degraded pictures for training; about 10 GB."""
    from distill.data import build
    from distill.recipe import load_recipe

    settings = load_recipe(recipe).data
    build.clean_pictures(pristine)  # what is missing is told now, not after the rated pictures
    made_by = command_line()
    rated = build.build_rated(
        biq2021,
        packs / "rated",
        num_validation=settings.num_validation,
        seed=settings.seed,
        made_by=made_by,
    )
    ladders = build.build_ladders(
        pristine, packs / "ladders", seed=settings.seed, made_by=made_by, workers=workers
    )
    say(f"{rated} rated and {ladders} clean or degraded pictures in {packs}")


@app.command()
def chain(
    recipe: Annotated[Path, typer.Argument(help="With a table [chain]: what comes before.")],
    *,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder; goes on with it.")],
    backbone: Annotated[Path, typer.Option(help="MobileNetV2 with BatchNorm, .npz.")],
    pristine: Annotated[Path | None, typer.Option(help="Folder of clean pictures.")] = None,
    rated: Annotated[
        list[str] | None, typer.Option(help="A rated set and its folder, as biq2021=FOLDER.")
    ] = None,
    teacher: Annotated[
        Path | None, typer.Option(help="Its checkpoint; taught by the recipe unless given.")
    ] = None,
    int8: Annotated[Path, typer.Option(help="Settings of the INT8 model.")] = Path(
        "configs/quant/int8.toml"
    ),
    steps: Annotated[int | None, typer.Option(help="The student's; for trials.")] = None,
    device: Device = "auto",
    workers: Annotated[int, typer.Option(help="Processes that degrade pictures.")] = 2,
    threads: Threads = 0,
) -> None:
    """Pictures to shards, a teacher, its labels, a student, and its ONNX, float and INT8.

    Interrupt it at will: the same command goes on where it stopped.
    """
    from distill.chain import ChainRequest, run_chain
    from distill.recipe import load_recipe
    from quant.cli import export
    from quant.cli import int8 as quantise

    settings = load_recipe(recipe)
    sets = dict(name_and_folder(text) for text in rated or ())
    compute = begin_training(device, settings.train.precision, threads=threads)

    def make_models(weights: Path, packs: Path, folder: Path) -> list[Path]:
        whole, small = folder / f"{settings.name}-fp32.onnx", folder / f"{settings.name}.onnx"
        export(weights, recipe=[recipe], output=whole, version="0.0.0")
        quantise(whole, config=int8, packs=packs, output=small)
        return [whole, small]

    request = ChainRequest(
        recipe=settings,
        folder=output,
        backbone=backbone,
        pristine=pristine,
        rated=sets,
        teacher=teacher,
        num_steps=steps,
        workers=workers,
        made_by=command_line(),
    )
    print(json.dumps(run_chain(request, compute, make_models)["student"], indent=1))


@app.command()
def evaluate(
    models: Annotated[list[str], typer.Argument(help="Shipped names or .onnx files.")],
    *,
    output: Annotated[Path, typer.Option("--output", "-o", help="JSON result.")],
    recipe: Annotated[Path, typer.Option(help="Its data seeds give the splits.")] = Path(
        "configs/distill/student.toml"
    ),
    biq2021: Annotated[Path | None, typer.Option(help="Folder of BIQ2021.")] = None,
    split: Annotated[str, typer.Option(help="validation, or test: once per released model.")] = (
        "validation"
    ),
    pristine: Annotated[Path | None, typer.Option(help="Folder of clean pictures.")] = None,
    clips: Annotated[Path | None, typer.Option(help="Folder of clips (.mp4).")] = None,
) -> None:
    """Agreement with human ratings, and order on ladders of held-out contents.

    The first model is the one judged; every other is compared with it.
    """
    from dgiqa_stream.scorer import load_scorer
    from distill import evaluate as measure
    from distill.recipe import load_recipe

    if (pristine is None) != (clips is None) or (biq2021 is None and pristine is None):
        raise ConfigError("nothing to evaluate on: give --biq2021, or --pristine and --clips")
    settings = load_recipe(recipe).data
    by_name = {Path(model).name: model for model in models}  # a result carries no folders
    if len(by_name) < len(models):
        raise ConfigError(f"models of one file name cannot be told apart: {', '.join(by_name)}")
    scorers = {name: load_scorer(model, num_threads=2) for name, model in by_name.items()}
    first = next(iter(scorers))
    result: dict[str, Any] = measure.provenance(command_line())
    result["models"] = {
        name: {"version": s.manifest.version, "sha256": s.manifest.sha256}
        for name, s in scorers.items()
    }
    if biq2021 is not None:
        scores, mos = measure.score_rated(
            scorers,
            biq2021,
            split=split,
            num_validation=settings.num_validation,
            seed=settings.seed,
        )
        result[f"biq2021_{split}"] = {
            **{name: measure.agreement(values, mos) for name, values in scores.items()},
            "differences": {
                f"{first} - {name}": measure.difference(scores[first], values)
                for name, values in scores.items()
                if name != first
            },
        }
    if pristine is not None and clips is not None:
        result["ladders"] = measure.evaluate_ladders(scorers[first], pristine, clips)
    text = json.dumps(result, indent=1) + "\n"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(text)
    summary = {k: v for k, v in result.items() if k.startswith("biq2021")}
    if "ladders" in result:
        summary["ladders"] = result["ladders"]["ladders"]
    print(json.dumps(summary, indent=1))


@app.command()
def convert(
    checkpoint: Annotated[Path, typer.Argument(help="A published DGIQA .pth.")],
    *,
    output: Annotated[Path, typer.Option("--output", "-o", help="The .safetensors to write.")],
    backbone: Annotated[
        str | None, typer.Option(help="What it was trained with; Swin-T unless given.")
    ] = None,
    version: Annotated[str, typer.Option(help="What to call these weights.")] = "published",
) -> None:
    """Convert a teacher's checkpoint to safetensors that say what they hold."""
    from distill.models.backbones import SWIN
    from distill.models.official import convert_official

    convert_official(checkpoint, output, backbone=backbone or SWIN, version=version)
    say(f"{output}: the teacher of {checkpoint.name}")


@app.command()
def score(
    paths: Annotated[
        list[str], typer.Argument(metavar="PATH...", help="Videos, pictures, folders, or -.")
    ],
    *,
    teacher: Annotated[Path, typer.Option(help="Its .safetensors, or a published .pth.")],
    backbone: Annotated[
        str | None, typer.Option(help="What a .pth was trained with; a safetensors knows.")
    ] = None,
    depth: Annotated[
        str | None,
        typer.Option(
            help="hf:ID, hf:FOLDER, a folder of maps, or classical (a stand-in); the published "
            "network unless given."
        ),
    ] = None,
    depth_cache: DepthCache = None,
    protocol: Annotated[Protocol, typer.Option(help="Where crops lie.")] = Protocol.GRID,
    crops: Annotated[int | None, typer.Option(help="Crops; of a grid 1, 4, 9, 16 …")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the official protocol's places.")] = 42,
    format: Annotated[Format, typer.Option("--format", "-f")] = Format.CSV,
    output: Annotated[str, typer.Option("--output", "-o", metavar="FILE")] = "-",
    fps: Annotated[float | None, typer.Option(help="Score so many frames a second.")] = None,
    every: Annotated[int | None, typer.Option(help="Score each Nth frame.")] = None,
    device: Device = "auto",
    threads: Threads = 0,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no summary.")] = False,
) -> None:
    """Score with the teacher, for audits: slow, rows as of `dgiqa-stream score`."""
    import torch

    from distill.audit import AuditRequest, run_audit
    from distill.data.depth import PUBLISHED_DEPTH

    torch.set_num_threads(threads or len(os.sched_getaffinity(0)))
    request = AuditRequest(
        teacher=teacher,
        backbone=backbone,
        depth=depth or PUBLISHED_DEPTH,
        depth_cache=depth_cache,
        protocol=protocol.value,
        num_crops=crops,
        seed=seed,
        fps=fps,
        every=every,
        device=device,
    )
    raise typer.Exit(run_audit(paths, request, format=format, output=output, quiet=quiet))


def main() -> None:
    """Run the command line; errors are one line and an exit code."""
    sys.exit(
        run(
            app,
            program="dgiqa-distill",
            prefix="DGIQA_DISTILL",
            judge=_judge,
            interrupted="interrupted; run the same command to go on",
            extra=_EXTRAS.get("".join(sys.argv[1:2]), "train"),
        )
    )


def _judge(exc: Exception) -> Verdict | None:
    """Settings 2, data 3, the rest that people can mend 5."""
    if isinstance(exc, ConfigError):
        return 2, str(exc)
    if isinstance(exc, SourceError | FileNotFoundError | ValueError):
        return 3, str(exc)
    if isinstance(exc, DgiqaError | FloatingPointError | OSError):
        return 5, str(exc)
    return None


if __name__ == "__main__":
    main()
