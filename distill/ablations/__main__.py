"""``python -m distill.ablations NAME``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dgiqa_stream.errors import ConfigError
from distill.ablations.running import ABLATIONS, run_ablation
from distill.ablations.settings import Settings
from distill.process import use_threads
from distill.say import say

_SIZES = Settings(Path(), Path(), Path())


def main(
    name: Annotated[str, typer.Argument(help=f"{', '.join(ABLATIONS)}.")],
    *,
    packs: Annotated[Path, typer.Option(help="What `dgiqa-distill data` wrote.")],
    backbone: Annotated[Path, typer.Option(help="MobileNetV2 with BatchNorm, .npz.")],
    cache: Annotated[Path, typer.Option(help="Folder that keeps what was computed.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="JSON result.")],
    num_train: Annotated[int, typer.Option(help="Training pictures.")] = _SIZES.num_train,
    num_validation: Annotated[int, typer.Option(help="Judging ones.")] = _SIZES.num_validation,
    num_crops: Annotated[int, typer.Option(help="Crops of each.")] = _SIZES.num_crops,
    num_seeds: Annotated[int, typer.Option(help="Repetitions.")] = _SIZES.num_seeds,
    num_epochs: Annotated[int, typer.Option(help="Of each fit.")] = _SIZES.num_epochs,
    rate: Annotated[float, typer.Option(help="Largest rate of AdamW.")] = _SIZES.rate,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 1,
) -> None:
    """Compare the parts of a teacher, or what its labels teach a student."""
    if name not in ABLATIONS:
        raise ConfigError(f"no ablation {name!r}: {', '.join(ABLATIONS)}")
    use_threads(threads)
    settings = Settings(
        packs / "rated",
        backbone,
        cache,
        num_train=num_train,
        num_validation=num_validation,
        num_crops=num_crops,
        num_seeds=num_seeds,
        num_epochs=num_epochs,
        rate=rate,
    )
    result = run_ablation(name, settings, output)
    for variant, figures in result["results"].items():
        say(f"{variant}: SRCC {figures['srcc']['mean']:.4f} ± {figures['srcc']['sd'] or 0:.4f}")


if __name__ == "__main__":
    typer.run(main)
