"""``pictures``, ``clips``, ``robustness`` and ``table``: evaluation from the command line."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dgiqa_stream.errors import ConfigError
from distill.data.datasets import RatedItem
from distill.data.label_files import Missing
from distill.data.rated_sets import DATASETS
from distill.evaluation.agreement import FEWEST_PICTURES, NUM_RESAMPLES
from distill.process import command_line
from distill.say import say

if TYPE_CHECKING:
    from dgiqa_stream.scorer import Scorer

app = typer.Typer(
    name="judge",
    help="Judge models on rated pictures and clips, with intervals.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Rated = Annotated[str, typer.Argument(help="A known set's name, or a CSV with path and mos.")]
Folder = Annotated[Path | None, typer.Option(help="Where a known set was unpacked to.")]
Split = Annotated[str, typer.Option(help="Part of the set: train, validation, test or all.")]
Worst = Annotated[float, typer.Option(help="The worst MOS of a CSV's scale.")]
Best = Annotated[float, typer.Option(help="The best MOS of a CSV's scale.")]
Output = Annotated[Path, typer.Option("--output", "-o", help="JSON result.")]
Gaps = Annotated[Missing, typer.Option(help="Where labels have no file: stop, or go on.")]
Resamples = Annotated[int, typer.Option(min=1, help="Bootstrap resamples.")]
Seed = Annotated[int, typer.Option(help="Of the bootstrap.")]


@app.command()
def pictures(
    rated: Rated,
    *,
    output: Output,
    model: Annotated[list[str] | None, typer.Option(help="Shipped name or .onnx.")] = None,
    student: Annotated[list[Path] | None, typer.Option(help="best.pt of a training run.")] = None,
    recipe: Annotated[Path, typer.Option(help="Its views are those of --student.")] = Path(
        "configs/distill/student.toml"
    ),
    teacher: Annotated[Path | None, typer.Option(help="A teacher, .safetensors or .pth.")] = None,
    depth: Annotated[
        str, typer.Option(help="The teacher's depth: classical, hf:ID, hf:FOLDER or a folder.")
    ] = "classical",
    root: Folder = None,
    split: Split = "test",
    worst: Worst = 0.0,
    best: Best = 1.0,
    missing: Gaps = "refuse",
    left_out: Annotated[
        list[str] | None, typer.Option(help="A degradation that training never saw.")
    ] = None,
    num_resamples: Resamples = NUM_RESAMPLES,
    seed: Seed = 0,
) -> None:
    """Agreement with MOS by degradation, ladders, and each model against the first."""
    from dgiqa_stream.scorer import load_scorer
    from distill.evaluation.pictures import judge_pictures, readable
    from distill.evaluation.predictors import scorer_predictor, student_predictor
    from distill.evaluation.tables import markdown, read_result, write_result
    from distill.recipe import load_recipe

    items, span = _rated(rated, root, split, worst, best, missing)
    with contextlib.ExitStack() as opened:
        scorers = {Path(m).name: opened.enter_context(load_scorer(m)) for m in model or []}
        predictors = {name: scorer_predictor(scorer) for name, scorer in scorers.items()}
        for checkpoint in student or []:
            views = load_recipe(recipe).views
            predictors[_run_and_file(checkpoint)] = student_predictor(checkpoint, views)
        if teacher is not None:
            scorers[teacher.name] = opened.enter_context(_teacher(teacher, depth))
            predictors[teacher.name] = scorer_predictor(scorers[teacher.name])
        num_given = len(model or []) + len(student or []) + (teacher is not None)
        if not num_given or len(predictors) < num_given:
            raise ConfigError(
                "give models of different file names with --model, --student or --teacher, not "
                f"{list(predictors)}"
            )
        items, unreadable = readable(items)
        for name, why in unreadable.items():
            say(f"left out: {name}: {why}")
        say(f"{len(items)} pictures, {num_given} models")
        result = judge_pictures(
            items,
            predictors,
            set_name=_set_name(rated, split),
            mos_span=span,
            left_out=left_out or [],
            num_resamples=num_resamples,
            seed=seed,
        )
        result["left_out"] = unreadable
        result["served"] = {name: _about(scorer) for name, scorer in scorers.items()}
    write_result(result, output, command=command_line())
    typer.echo(markdown(read_result(output)))


@app.command()
def clips(
    rated: Rated,
    *,
    output: Output,
    model: Annotated[str, typer.Option(help="Shipped name or .onnx.")] = "student",
    config: Annotated[Path | None, typer.Option(help="Runtime settings, as `watch` takes.")] = None,
    root: Folder = None,
    split: Split = "all",
    worst: Worst = 0.0,
    best: Best = 1.0,
    missing: Gaps = "refuse",
    num_resamples: Resamples = NUM_RESAMPLES,
    seed: Seed = 0,
) -> None:
    """Agreement of every temporal pooling with MOS, through the runtime's pipeline."""
    from dgiqa_stream.config import StreamConfig, load_config
    from dgiqa_stream.scorer import load_scorer
    from distill.evaluation.tables import markdown, read_result, write_result
    from distill.evaluation.video import judge_clips, score_clips

    settings = load_config(config) if config else StreamConfig()
    items, span = _rated(rated, root, split, worst, best, missing)
    with load_scorer(model) as scorer:
        scored = score_clips(
            items,
            scorer,
            config=settings,
            on_clip=lambda clip: say(f"{clip.name}: {clip.error or f'{clip.num_frames} frames'}"),
        )
        served = {Path(model).name: _about(scorer)}
    result = judge_clips(
        scored,
        set_name=_set_name(rated, split),
        mos_span=span,
        num_resamples=num_resamples,
        seed=seed,
    )
    write_result({**result, "served": served}, output, command=command_line())
    typer.echo(markdown(read_result(output)))


@app.command()
def robustness(
    model: Annotated[str, typer.Argument(help="Shipped name or .onnx.")] = "student",
    *,
    pristine: Annotated[list[Path], typer.Option(help="Folder of clean pictures; repeat it.")],
    output: Output,
    full_size: Annotated[
        Path | None, typer.Option(help="Folder of pictures (clic_*) that hold 1080p windows.")
    ] = None,
    biq2021: Annotated[Path | None, typer.Option(help="Folder of BIQ2021, for validation.")] = None,
    recipe: Annotated[Path, typer.Option(help="Its data seeds give BIQ2021's validation.")] = Path(
        "configs/distill/student.toml"
    ),
    unseen: Annotated[
        list[str] | None, typer.Option(help="A degradation that training never saw; repeat it.")
    ] = None,
    kind: Annotated[
        list[str] | None, typer.Option(help="Judge this degradation alone; repeat it.")
    ] = None,
    contents: Annotated[int, typer.Option(min=1, help="Unseen pictures.")] = 24,
    contents_per_kind: Annotated[int, typer.Option(min=1, help="For each degradation.")] = 12,
    scenes: Annotated[int, typer.Option(min=1, help="Static scenes.")] = 6,
    skip: Annotated[
        list[str] | None, typer.Option(help="A section that is not wanted; repeat it.")
    ] = None,
) -> None:
    """Ladders, stability, familiarity and intervals: what decides whether a student ships.

    Ten minutes on one core. Interrupt it at will: the same command goes on where it stopped.
    """
    from datetime import UTC, datetime

    from dgiqa_stream.scorer import load_scorer
    from distill.evaluate import machine
    from distill.evaluation.degradation_ladders import refuse_unknown
    from distill.evaluation.finished import FinishedParts
    from distill.evaluation.robustness import SECTIONS, RobustnessRequest, judge_robustness
    from distill.evaluation.tables import markdown, read_result, write_result
    from distill.recipe import load_recipe

    refuse_unknown(skip or (), among=SECTIONS)
    wanted = tuple(name for name in SECTIONS if name not in (skip or ()))
    drawn = load_recipe(recipe).data if biq2021 else None
    request = RobustnessRequest(
        pristine=tuple(pristine),
        full_size=full_size,
        biq2021=biq2021,
        num_validation=drawn.num_validation if drawn else 0,
        seed=drawn.seed if drawn else 0,
        num_contents=contents,
        contents_per_kind=contents_per_kind,
        num_scenes=scenes,
        kinds=tuple(kind) if kind else None,
        unseen=tuple(unseen or ()),
    )
    with load_scorer(model) as scorer:
        found = judge_robustness(scorer, request, result=output, sections=wanted)
    made = {"date": datetime.now(UTC).date().isoformat(), "machine": machine(), **found}
    write_result(made, output, command=command_line())
    FinishedParts(output).forget()
    typer.echo(markdown(read_result(output)))


@app.command()
def table(
    results: Annotated[
        list[Path], typer.Argument(help="JSON of `pictures`, `clips`, `robustness` or leave-out.")
    ],
    *,
    into: Annotated[
        Path | None,
        typer.Option(help="A page whose tables of floors are made anew, of these results."),
    ] = None,
) -> None:
    """The markdown tables of results, one set after the other."""
    from distill.evaluation.tables import markdown, read_result

    if into is not None:
        _write_tables(into, results)
        return
    for result in results:
        typer.echo(markdown(read_result(result)))


def _write_tables(page: Path, results: list[Path]) -> None:
    from distill.data.shards import whole_or_none
    from distill.evaluation.floors import with_tables
    from distill.evaluation.tables import read_result

    by_name = {path.name: path for path in results}

    def read(name: str) -> dict[str, Any]:
        if name not in by_name:
            raise ConfigError(f"{page.name} has a table of {name}: give that file, too")
        return read_result(by_name[name])

    made = with_tables(page.read_text(encoding="utf-8"), read)
    with whole_or_none(page) as partial:
        partial.write_text(made, encoding="utf-8")


def _about(scorer: Scorer) -> dict[str, str]:
    return {"version": scorer.manifest.version, "sha256": scorer.manifest.sha256}


def _teacher(path: Path, depth: str) -> Scorer:
    from distill.data.depth import open_depth
    from distill.models.official import open_teacher
    from distill.teacher_score import teacher_scorer

    return teacher_scorer(open_teacher(path), open_depth(depth), path=path)


def _run_and_file(checkpoint: Path) -> str:
    """Every run calls its weights best.pt: the folder tells them apart."""
    return f"{checkpoint.parent.name}/{checkpoint.name}"


def _set_name(rated: str, split: str) -> str:
    return f"{rated} {split}" if rated in DATASETS else Path(rated).name


def _rated(
    rated: str, root: Path | None, split: str, worst: float, best: float, missing: Missing
) -> tuple[list[RatedItem], float]:
    """The items asked for, and the span of their MOS scale."""
    from distill.data.datasets import load_dataset
    from distill.evaluation.tables import read_table

    if rated not in DATASETS:
        if not Path(rated).is_file():
            raise ConfigError(f"no rated set or CSV {rated!r}; known: {', '.join(DATASETS)}")
        items = read_table(Path(rated), worst=worst, best=best, missing=missing)
        span = abs(best - worst)
        items = [item for item in items if split in ("all", item.split)]
    elif root is None:
        raise ConfigError(f"{rated} needs --root: the folder its release was unpacked to")
    else:
        known = DATASETS[rated]
        part = None if split == "all" else split
        items = load_dataset(rated, root, split=part, missing=missing)
        span = abs(known.best - known.worst)
    if len(items) < FEWEST_PICTURES:  # told before an hour of scoring, not after it
        raise ValueError(
            f"{rated} has {len(items)} files in part {split!r}: {FEWEST_PICTURES} are the fewest "
            "to judge on"
        )
    return items, span
