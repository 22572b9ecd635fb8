"""``dgiqa-quant search``: the best artefact that a user's budget allows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from distill.process import command_line, keep_freed_memory
from distill.say import say

if TYPE_CHECKING:
    from dgiqa_stream.manifest import LoadedModel
    from dgiqa_stream.preprocess import ViewSpec
    from quant.calibration import CalibrationConfig, Views
    from quant.proof.agreement import Scores
    from quant.proof.search import Budget, Measured, Prefer
    from quant.proof.search_walk import SearchWalk

UNMET = 1
"""Exit code: no candidate keeps the budget."""
_BATCH = 8


def search(
    model: Annotated[str, typer.Argument(help="The float .onnx, or a shipped name.")],
    *,
    packs: Annotated[Path, typer.Option(help="Pictures to calibrate on, and validation ratings.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder; goes on with it.")],
    config: Annotated[Path, typer.Option(help="Its [calibration] and [quantize] hold.")] = Path(
        "configs/quant/int8.toml"
    ),
    variant: Annotated[
        list[str] | None, typer.Option(help="Another float .onnx of it, as of lower ranks.")
    ] = None,
    ranges: Annotated[
        Path | None, typer.Option(help="ranges.json of its `qat`, or an INT8 .onnx.")
    ] = None,
    max_ms: Annotated[float | None, typer.Option(help="Of one picture, inference alone.")] = None,
    max_mb: Annotated[float | None, typer.Option(help="Of the file, in 10^6 bytes.")] = None,
    max_drop: Annotated[float, typer.Option(help="Of SRCC with MOS, against MODEL.")] = 0.003,
    prefer: Annotated[str, typer.Option(help="Within the budget: least ms, mb or drop.")] = "ms",
    methods: Annotated[
        str | None, typer.Option(help="Calibration methods, with commas between.")
    ] = None,
    float_layers: Annotated[
        str, typer.Option(help="How many sensitive layers stay in float, with commas.")
    ] = "0,1,2,4,8",
    threads: Annotated[int, typer.Option(min=1, help="Of one inference.")] = 1,
    num_rated: Annotated[int, typer.Option(min=5, help="Rated validation pictures.")] = 300,
    rounds: Annotated[int, typer.Option(min=1, help="Of the interleaved timing.")] = 9,
) -> None:
    """Walk precision, float layers, calibration and variants; exit code 1 if no budget is kept."""
    from quant.calibration_methods import METHODS
    from quant.proof.files import write_text
    from quant.proof.search import Budget, SearchSpace, best, search_page, unmet

    keep_freed_memory()
    budget = Budget(max_ms, max_mb, max_drop)
    known = (*METHODS, *(["trained"] if ranges else []))
    space = SearchSpace(
        methods=tuple(methods.split(",")) if methods is not None else known,
        num_float_layers=_numbers(float_layers),
        threads=threads,
        num_rated=num_rated,
        num_rounds=rounds,
    )
    wanted = _preference(prefer)
    walk = _walk([model, *(variant or [])], packs, config, ranges, output, space, max_mb)
    measured = walk.run(say)
    chosen = best(measured, budget, prefer=wanted)
    write_text(output / "search.md", search_page(walk.state, chosen.key if chosen else None))
    if chosen is None:
        typer.echo(unmet(measured, budget))
        raise typer.Exit(UNMET)
    _write_best(walk, chosen, budget, output)
    left = f"; in float {', '.join(chosen.float_nodes)}" if chosen.float_nodes else ""
    typer.echo(
        f"best.onnx is {chosen.key}: {chosen.ms:.2f} ms (×{chosen.times_faster:.2f}), "
        f"{chosen.mb:.2f} MB, drop {chosen.drop:+.4f}{left}"
    )


def _numbers(text: str) -> tuple[int, ...]:
    from dgiqa_stream.errors import ConfigError

    words = text.split(",")
    if not all(word.strip().isdecimal() for word in words):
        raise ConfigError(f"--float-layers {text!r}: give whole numbers with commas, as in 0,2,4")
    return tuple(int(word) for word in words)


def _preference(text: str) -> Prefer:
    from dgiqa_stream.errors import ConfigError

    for known in ("ms", "mb", "drop"):
        if text == known:
            found: Prefer = known
            return found
    raise ConfigError(f"--prefer {text!r}: known are ms, mb, drop")


def _walk(
    names: Sequence[str],
    packs: Path,
    config: Path,
    ranges: Path | None,
    output: Path,
    space: Any,
    max_mb: float | None,
) -> SearchWalk:
    from dgiqa_stream.errors import ConfigError
    from quant.calibration_methods import refuse_useless
    from quant.proof.figures import load_models
    from quant.proof.search_walk import SearchInputs, SearchWalk
    from quant.ptq import load_int8_config
    from quant.rounded_tensors import open_ranges

    settings = load_int8_config(config)
    models = load_models(names)
    wrong = [m for m in models if m.manifest.precision != "fp32"]
    if wrong:
        raise ConfigError(f"{wrong[0].path.name} is not FP32: give the float model")
    _refuse_impossible(models, max_mb)
    views = models[0].manifest.preprocess.views
    calibration = _calibration(packs, settings.calibration, views)
    refuse_useless(calibration)
    rated, mos = _rated(packs, views, space.num_rated)
    inputs = SearchInputs(
        models=models,
        config=settings.quantize,
        calibration=calibration,
        rated=rated,
        mos=mos,
        ranges=open_ranges(ranges) if ranges is not None else None,
        made_by=command_line(),
    )
    return SearchWalk(output, inputs, space)


def _refuse_impossible(models: Sequence[LoadedModel], max_mb: float | None) -> None:
    """Tell of a size that no precision reaches before the work begins."""
    from dgiqa_stream.errors import ConfigError
    from quant.proof.figures import read_graph
    from quant.proof.macs import num_weights

    least = min(num_weights(read_graph(model)) for model in models) / 1e6
    if max_mb is not None and max_mb < least:
        raise ConfigError(
            f"--max-mb {max_mb:g} cannot be met: {least:.3g} million weights take {least:.3g} MB "
            "in INT8, a byte each; allow more, or give a smaller --variant"
        )


def _calibration(packs: Path, config: CalibrationConfig, views: Sequence[ViewSpec]) -> list[Views]:
    from distill.data.training_data import open_packs
    from quant.calibration import TrainingPlanes, calibration_set

    data = open_packs(packs)
    rated, degraded = TrainingPlanes(data.rated), TrainingPlanes(data.ladders)
    return calibration_set(config, views, rated=rated, degraded=degraded)


def _rated(packs: Path, views: Sequence[ViewSpec], number: int) -> tuple[list[Views], Scores]:
    """Batches of rated validation pictures, and their ratings."""
    from dgiqa_stream.preprocess import make_batch
    from quant.proof.commands.rated import rated_pictures

    chosen = rated_pictures(packs, num_rated=number, num_ladders=1)
    planes = [chosen.rated.planes(record) for record in chosen.rated_records]
    batches = [
        dict(make_batch(planes[first : first + _BATCH], views).views)
        for first in range(0, len(planes), _BATCH)
    ]
    return batches, chosen.mos


def _write_best(walk: SearchWalk, chosen: Measured, budget: Budget, output: Path) -> None:
    """Copy the chosen candidate with its manifest, which tells of the search."""
    import msgspec
    import onnx

    from quant.export_onnx import write_successor

    model = walk.model_of(chosen.key)
    step = {
        "step": "search",
        "budget": msgspec.to_builtins(budget),
        "chosen": msgspec.to_builtins(chosen),
        "num_candidates": len(walk.state["measured"]),
    }
    write_successor(
        onnx.load(model.path),
        output / "best.onnx",
        model.manifest,
        step=step,
        made_by=command_line(),
        metrics=model.manifest.metrics,
    )
