"""``dgiqa-quant factorize``: a trained student's layers become thinner ones."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from distill.process import command_line, keep_freed_memory
from distill.say import say

if TYPE_CHECKING:
    from quant.low_rank.config import LowRankRecipe
    from quant.low_rank.report import LowRankReport


def factorize(
    weights: Annotated[Path, typer.Argument(help="best.pt of a training run.")],
    *,
    recipe: Annotated[Path, typer.Option(help="The recipe it was trained by, for its views.")],
    config: Annotated[Path, typer.Option(help="Settings of the factorization, a TOML file.")],
    packs: Annotated[Path, typer.Option(help="What `dgiqa-distill data` wrote.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The .safetensors to write, for `export`.")
    ],
    shards: Annotated[
        Path | None, typer.Option(help="What `dgiqa-distill shards` wrote, used as well.")
    ] = None,
) -> None:
    """Factor a student's convolutions, tune it against itself as it was, write its weights."""
    import copy

    from dgiqa_stream.errors import ConfigError
    from distill.data.training_data import open_packs
    from distill.models.student import Student, load_student
    from distill.recipe import load_recipe
    from quant.low_rank.checkpoint import SCHEMA, FactoredAbout, save_factored
    from quant.low_rank.config import load_low_rank_recipe
    from quant.low_rank.factorize import factorize_
    from quant.low_rank.student import calibration_pairs, fine_tune_, shapes_of

    keep_freed_memory()
    settings, views = load_low_rank_recipe(config), load_recipe(recipe).views
    if output.suffix != ".safetensors":
        raise ConfigError(f"--output {output.name} must end in .safetensors")
    student: Student = load_student(weights).eval()
    whole = copy.deepcopy(student)
    data = open_packs(packs, shards)
    pairs = calibration_pairs(data.rated, views, settings.calibration)
    report = factorize_(student, settings.low_rank, pairs)
    for layer in report.layers:
        if layer.rank is not None:
            say(f"{layer.name}: rank {layer.rank}, error {layer.weighted_error:.3f}")
    say(str(report))
    if settings.fine_tune.num_steps and report.ranks:
        fine_tune_(student, whole, data.rated, views, settings.fine_tune)
    about = FactoredAbout(
        schema=SCHEMA,
        whole_shapes=shapes_of(whole, report.ranks),
        ranks=report.ranks,
        history=_steps(weights, settings, report),
        made_by=command_line(),
    )
    save_factored(student, output, about)
    say(f"{output.name}: {report.num_parameters_after} parameters, for `dgiqa-quant export`")


def _steps(weights: Path, settings: LowRankRecipe, report: LowRankReport) -> list[dict[str, Any]]:
    """The chain's steps as the manifest's history tells them."""
    import msgspec
    import torch

    from distill.data.shards import sha256_of

    step: dict[str, Any] = {
        "step": "low-rank",
        "settings": msgspec.to_builtins(settings.low_rank),
        "calibration": msgspec.to_builtins(settings.calibration),
        "ranks": {name: list(rank) for name, rank in report.ranks.items()},
        "num_parameters": [report.num_parameters_before, report.num_parameters_after],
        "macs": [report.macs_before, report.macs_after],
        "score_change_rms": report.score_change_rms,
        "from_sha256": sha256_of(weights),
        "torch": str(torch.__version__),
    }
    if not settings.fine_tune.num_steps or not report.ranks:
        return [step]
    tuned = {"step": "fine-tune", "settings": msgspec.to_builtins(settings.fine_tune)}
    return [step, tuned]
