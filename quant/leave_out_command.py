"""``dgiqa-quant leave-out``: how heads order damage that they were never taught."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dgiqa_stream.errors import ConfigError
from distill.options import Device, Threads
from distill.process import command_line
from distill.say import say

if TYPE_CHECKING:
    import onnx

    from dgiqa_stream.manifest import LoadedModel, ModelManifest
    from distill.data.training_data import TrainingData
    from distill.evaluation.degradation_ladders import Scores

_SEED = 1  # of the ladders that heads are judged on


def leave_out(
    model: Annotated[Path, typer.Argument(help="The float .onnx.")],
    quantised: Annotated[Path, typer.Argument(help="The INT8 .onnx made from it.")],
    *,
    config: Annotated[Path, typer.Option(help="Settings, such as configs/quant/int8.toml.")],
    packs: Annotated[Path, typer.Option(help="What `dgiqa-distill data` wrote.")],
    shards: Annotated[
        list[Path], typer.Option(help="What `dgiqa-distill shards` wrote; may be repeated.")
    ],
    pristine: Annotated[
        list[Path], typer.Option(help="Folder of clean pictures: those of the test split judge.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The JSON to write.")],
    known_to_trunk: Annotated[
        list[str] | None,
        typer.Option(help="A degradation that the trunk learnt from: judged, but not as unseen."),
    ] = None,
    kind: Annotated[
        list[str] | None, typer.Option(help="Judge this degradation; repeat it.  [default: all]")
    ] = None,
    folds: Annotated[int, typer.Option(min=2, help="Parts that take turns at being left out.")] = 5,
    heads: Annotated[
        int | None, typer.Option(min=1, help="Heads for each fold; as the settings say by default.")
    ] = None,
    contents: Annotated[int, typer.Option(min=1, help="Number of unseen pictures.")] = 24,
    contents_per_kind: Annotated[
        int, typer.Option(min=1, help="Of them, those that each degradation is judged on.")
    ] = 12,
    cache: Annotated[
        Path | None, typer.Option(help="Keep the features in this .npz, as `refit` does.")
    ] = None,
    falls_of: Annotated[
        str | None,
        typer.Option(help="Student whose falls on ladders are kept; the float model's own."),
    ] = None,
    run: Annotated[
        Path | None,
        typer.Option(
            help="Teach a fragment trunk for each fold as `fragments` does, in folders of this "
            "one; resumes from them."
        ),
    ] = None,
    device: Device = "auto",
    threads: Threads = 0,
) -> None:
    """Make students that were not taught some kinds of damage, and judge them on those kinds.

    Kinds are dealt to the folds in turn; no student is taught the kinds that the settings leave
    out. Their heads are fitted as by `refit`, or with --run taught with a fragment trunk. The
    shipped student is none of these: they say how one made like it orders damage that it knows no
    ladder of.
    """
    from datetime import UTC, datetime

    import msgspec

    from dgiqa_stream.manifest import load_model
    from distill.data.training_data import open_packs
    from distill.evaluate import machine
    from distill.evaluation.degradation_ladders import picture_kinds, sum_up_degradations
    from distill.evaluation.ladders import TOLERANCE_POINTS
    from distill.evaluation.pictures import rounded
    from distill.evaluation.tables import write_result
    from distill.evaluation.unseen import unseen_paths
    from distill.models.student import load_trunk
    from distill.training_commands import begin_training
    from quant.calibration import TrainingPlanes, calibration_set
    from quant.extra_outputs import remove_outputs_
    from quant.folds import Lore, RefittedHead, TaughtFragments
    from quant.looks import features_at, logits_on_ladders, looks_at
    from quant.proof.figures import read_graph
    from quant.ptq import load_int8_config
    from quant.refusals import refuse_other_precisions, refuse_unwritable

    kinds = [name for name in picture_kinds() if name in (kind or picture_kinds())]
    unseen = [name for name in kinds if name not in (known_to_trunk or ())]
    _refuse_kinds(kinds, unseen, [*(kind or ()), *(known_to_trunk or ())], folds=folds)
    refuse_unwritable(output)
    sources = [load_model(model), load_model(quantised)]
    refuse_other_precisions(*sources)
    former = None if falls_of is None else load_model(falls_of)
    paths = unseen_paths(pristine, number=contents)
    recipe = load_int8_config(config)
    if heads is not None:
        recipe = msgspec.structs.replace(
            recipe,
            head=msgspec.structs.replace(recipe.head, num_heads=heads),
            fragments=msgspec.structs.replace(recipe.fragments, num_heads=heads),
        )
    settings = recipe.head
    if settings.taught_by == "own_head":
        raise ConfigError(
            'head.taught_by = "own_head" would tell heads of kinds that they are not to know: give '
            'settings with "regression"'
        )
    preprocess = sources[0].manifest.preprocess.reduced_by(settings.reduction)
    graphs = [read_graph(source) for source in sources]
    for graph in graphs:
        remove_outputs_(graph)
    data = open_packs(packs, shards)
    looks = looks_at(data, preprocess.views, settings)
    features = features_at(looks, graphs[0], graphs[1], cache=cache)
    lore = Lore(looks, features, None if former is None else logits_on_ladders(former, looks))
    origin = _made_from(sources, former, data)
    make: RefittedHead | TaughtFragments = RefittedHead(graphs, settings)
    if run is not None:
        make = TaughtFragments(
            graphs,
            load_trunk(model),
            recipe,
            calibration_set(
                recipe.calibration,
                preprocess.views,
                rated=TrainingPlanes(data.rated),
                degraded=TrainingPlanes(data.ladders),
            ),
            run,
            begin_training(device, "auto", threads=threads),
            {**origin, "the settings": msgspec.to_builtins(recipe)},
        )
    was = msgspec.structs.replace(
        sources[1].manifest, preprocess=preprocess, interval=None, domain=None
    )
    scores: Scores = {}
    for number in range(folds):
        left_out = kinds[number::folds]
        made = make(lore.without(left_out), left_out)
        scores |= _judged(made, was, left_out, paths, contents_per_kind)
        say(f"fold {number + 1} of {folds}: {', '.join(left_out)}")
    result: dict[str, Any] = {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": machine(),
        "kind": "leave_out",
        "model": {"id": was.id, "version": was.version, "sha256": was.sha256},
        "settings": {
            "folds": [kinds[n::folds] for n in range(folds)],
            "known_to_trunk": known_to_trunk or [],
            "contents_per_kind": contents_per_kind,
            "seed": _SEED,
            "tolerance_points": TOLERANCE_POINTS,
            "head": msgspec.to_builtins(settings),
            **({"fragments": msgspec.to_builtins(recipe.fragments)} if run else {}),
            **origin,
        },
        "contents": [path.stem for path in paths],
        **rounded(asdict(sum_up_degradations(scores, left_out=unseen))),
    }
    write_result(result, output, command=command_line())
    say(f"{output.name}: {result['unseen']['share_falling']['value']:.1%} of unseen steps fall")


def _refuse_kinds(
    kinds: Sequence[str], unseen: Sequence[str], named: Sequence[str], *, folds: int
) -> None:
    from distill.evaluation.degradation_ladders import picture_kinds, refuse_unknown

    refuse_unknown(named, among=picture_kinds())
    if folds > len(kinds):
        raise ConfigError(
            f"--folds {folds} is more than the {len(kinds)} kinds that are judged: give "
            f"{len(kinds)} at most"
        )
    if not unseen:
        raise ConfigError(
            "every kind that is judged is --known-to-trunk, so none is unseen: name fewer"
        )


def _made_from(
    sources: Sequence[LoadedModel], former: LoadedModel | None, data: TrainingData
) -> dict[str, Any]:
    """What else the figures hang on, by hash."""
    return {
        "float_sha256": sources[0].manifest.sha256,
        "falls_of": None if former is None else former.manifest.sha256,
        "data": data.identity,
    }


def _judged(
    graph: onnx.ModelProto,
    was: ModelManifest,
    kinds: Sequence[str],
    paths: Sequence[Path],
    contents_per_kind: int,
) -> Scores:
    """What the graph says of ladders of those kinds on unseen pictures."""
    from dgiqa_stream.scorer import load_scorer
    from distill.evaluation.degradation_ladders import degradation_scores
    from quant.export_onnx import write_successor

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "judged.onnx"
        write_successor(graph, path, was, step={"step": "leave_out"}, made_by=command_line())
        with load_scorer(path, device="cpu") as scorer:
            return degradation_scores(
                scorer, paths, kinds=kinds, contents_per_kind=contents_per_kind, seed=_SEED
            )
