"""``dgiqa-quant leave-out``: how heads order damage that they were never taught."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dgiqa_stream.errors import ConfigError
from distill.process import command_line
from distill.say import say

if TYPE_CHECKING:
    import numpy as np
    import onnx
    from numpy.typing import NDArray

    from dgiqa_stream.manifest import LoadedModel, ModelManifest
    from distill.data.training_data import TrainingData
    from distill.evaluation.degradation_ladders import Scores
    from quant.head import Features, HeadConfig
    from quant.looks import Looks

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
) -> None:
    """Fit heads that were not taught some kinds of damage, and judge them on those kinds.

    Kinds are dealt to the folds in turn; no head is taught the kinds that the settings leave out.
    The shipped head is none of these: they say how a head made like it orders damage that it knows
    no ladder of.
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
    from quant.extra_outputs import remove_outputs_
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
    settings = load_int8_config(config).head
    settings = msgspec.structs.replace(settings, num_heads=heads or settings.num_heads)
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
    falls = None if former is None else logits_on_ladders(former, looks)
    was = msgspec.structs.replace(
        sources[1].manifest, preprocess=preprocess, interval=None, domain=None
    )
    scores: Scores = {}
    for number in range(folds):
        left_out = kinds[number::folds]
        taught = _looks_without(looks, left_out)
        fitted = _fitted(
            graphs,
            _features_of(features, taught),
            None if falls is None else falls[taught],
            settings,
        )
        scores |= _judged(fitted, was, left_out, paths, contents_per_kind)
        say(f"fold {number + 1} of {folds}: {', '.join(left_out)}")
    made: dict[str, Any] = {
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
            **_made_from(sources[0], former, data),
        },
        "contents": [path.stem for path in paths],
        **rounded(asdict(sum_up_degradations(scores, left_out=unseen))),
    }
    write_result(made, output, command=command_line())
    say(f"{output.name}: {made['unseen']['share_falling']['value']:.1%} of unseen steps fall")


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
    reference: LoadedModel, former: LoadedModel | None, data: TrainingData
) -> dict[str, Any]:
    """What else the figures hang on, by hash."""
    return {
        "float_sha256": reference.manifest.sha256,
        "falls_of": None if former is None else former.manifest.sha256,
        "data": data.identity,
    }


def _looks_without(looks: Looks, left_out: Sequence[str]) -> NDArray[np.int64]:
    """Indices of the looks but for those at ladders of some kinds.

    Raises :class:`ConfigError` where no ladder is left.
    """
    import numpy as np

    from distill.data.leave_out import kinds_of

    dropped = {
        int(ladder)
        for (_, record, _), ladder in zip(looks.drawn, looks.labels.ladder, strict=True)
        if ladder >= 0 and kinds_of(record) & set(left_out)
    }
    kept = np.array([int(n) not in dropped for n in looks.labels.ladder])
    if not (looks.labels.ladder[kept] >= 0).any():
        raise ConfigError(f"no ladder is left without {', '.join(left_out)}: give more shards")
    return np.flatnonzero(kept)


def _features_of(features: Features, taught: NDArray[np.int64]) -> Features:
    """Those of some looks, their ladders numbered anew."""
    import numpy as np

    from quant.head import Features

    labels = features.labels.at(taught)
    numbers, ladder = np.unique(labels.ladder, return_inverse=True)
    ladder = ladder + min(int(numbers[0]), 0)  # -1, of rated pictures, stays
    return Features(
        features.of_float[taught],
        features.of_int8[taught],
        replace(labels, ladder=ladder.astype(np.int64)),
    )


def _fitted(
    graphs: Sequence[onnx.ModelProto],
    features: Features,
    falls: NDArray[np.float64] | None,
    settings: HeadConfig,
) -> onnx.ModelProto:
    """The INT8 graph with a head fitted on those looks."""
    from quant.head import refit_

    reference, small = (copy.deepcopy(graph) for graph in graphs)
    refit_(reference, small, features, settings, former=falls)
    return small


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
