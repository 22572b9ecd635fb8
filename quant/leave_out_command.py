"""``dgiqa-quant leave-out``: how heads order damage that they were never taught."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
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

    from dgiqa_stream.manifest import LoadedModel
    from distill.evaluation.degradation_ladders import Scores
    from quant.head import Features, HeadConfig
    from quant.looks import Looks


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
        list[str] | None, typer.Option(help="Leave out and judge this one, not all; repeat it.")
    ] = None,
    folds: Annotated[int, typer.Option(min=2, help="Parts that take turns at being left out.")] = 5,
    heads: Annotated[
        int | None, typer.Option(min=1, help="Heads for each fold; as the settings say by default.")
    ] = None,
    contents: Annotated[int, typer.Option(min=1, help="Unseen pictures.")] = 24,
    contents_per_kind: Annotated[int, typer.Option(min=1, help="For each degradation.")] = 12,
    cache: Annotated[
        Path | None, typer.Option(help="Keep the features in this .npz, as `refit` does.")
    ] = None,
    falls_of: Annotated[
        str | None, typer.Option(help="As of `refit`: who says how far pictures fall.")
    ] = None,
) -> None:
    """Fit heads that were not taught some kinds of damage, and judge them on those kinds.

    Kinds are dealt to the folds in turn; those that the settings leave out no head is taught. The
    shipped head is none of these: they say how such a head orders damage that is in no ladder of
    its own.
    """
    from datetime import UTC, datetime

    import msgspec

    from dgiqa_stream.manifest import load_model
    from distill.data.training_data import open_packs
    from distill.evaluate import machine
    from distill.evaluation.degradation_ladders import (
        picture_kinds,
        refuse_unknown,
        sum_up_degradations,
    )
    from distill.evaluation.pictures import rounded
    from distill.evaluation.tables import write_result
    from distill.evaluation.unseen import unseen_paths
    from quant.extra_outputs import remove_outputs_
    from quant.looks import features_at, logits_on_ladders, looks_at
    from quant.proof.figures import read_graph
    from quant.ptq import load_int8_config

    refuse_unknown([*(kind or ()), *(known_to_trunk or ())], among=picture_kinds())
    kinds = [name for name in picture_kinds() if name in (kind or picture_kinds())]
    unseen = [name for name in kinds if name not in (known_to_trunk or ())]
    if len(kinds) < folds or not unseen:
        raise ConfigError(
            f"{len(kinds)} kinds of damage, {len(unseen)} of them unknown to the trunk, are too "
            f"few for --folds {folds}: name more of them, or fewer --known-to-trunk"
        )
    paths = unseen_paths(pristine, number=contents)
    settings = load_int8_config(config).head
    settings = msgspec.structs.replace(settings, num_heads=heads or settings.num_heads)
    sources = [load_model(model), load_model(quantised)]
    graphs = [read_graph(source) for source in sources]
    for graph in graphs:
        remove_outputs_(graph)
    looks = looks_at(open_packs(packs, shards), sources[0].manifest.preprocess.views, settings)
    features = features_at(looks, graphs[0], graphs[1], cache=cache)
    former = None if falls_of is None else logits_on_ladders(load_model(falls_of), looks)
    scores: Scores = {}
    for number in range(folds):
        left_out = kinds[number::folds]
        chosen = _without(looks, left_out)
        fitted = _fitted(graphs, _part(features, chosen), _part_of(former, chosen), settings)
        scores |= _judged(fitted, sources[1], left_out, paths, contents_per_kind)
        say(f"fold {number + 1} of {folds}: {', '.join(left_out)}")
    made: dict[str, Any] = {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": machine(),
        "kind": "leave_out",
        "model": {"id": sources[1].manifest.id, "sha256": sources[1].manifest.sha256},
        "settings": {
            "folds": [kinds[n::folds] for n in range(folds)],
            "known_to_trunk": known_to_trunk or [],
            "head": msgspec.to_builtins(settings),
        },
        "contents": [path.stem for path in paths],
        **rounded(asdict(sum_up_degradations(scores, left_out=unseen))),
    }
    write_result(made, output, command=command_line())
    say(f"{output.name}: {made['unseen']['share_falling']['value']:.1%} of unseen steps fall")


def _without(looks: Looks, left_out: Sequence[str]) -> NDArray[np.int64]:
    """The looks but for those at ladders of some kinds; ``ConfigError`` where none is taught."""
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


def _part(features: Features, at: NDArray[np.int64]) -> Features:
    """Those looks, their ladders numbered anew."""
    import numpy as np

    from quant.head import Features, Labels

    labels = Labels(*(getattr(features.labels, field.name)[at] for field in fields(Labels)))
    numbers, ladder = np.unique(labels.ladder, return_inverse=True)
    ladder = ladder + min(int(numbers[0]), 0)  # -1, of rated pictures, stays
    return Features(
        features.of_float[at], features.of_int8[at], replace(labels, ladder=ladder.astype(np.int64))
    )


def _part_of(former: NDArray[np.float64] | None, at: NDArray[np.int64]) -> Any:
    return None if former is None else former[at]


def _fitted(
    graphs: Sequence[onnx.ModelProto],
    features: Features,
    former: NDArray[np.float64] | None,
    settings: HeadConfig,
) -> onnx.ModelProto:
    """The INT8 graph with a head fitted on those looks."""
    from quant.head import refit_

    reference, small = (copy.deepcopy(graph) for graph in graphs)
    refit_(reference, small, features, settings, former=former)
    return small


def _judged(
    graph: onnx.ModelProto,
    source: LoadedModel,
    kinds: Sequence[str],
    paths: Sequence[Path],
    contents_per_kind: int,
) -> Scores:
    """What the graph says of ladders of those kinds on unseen pictures."""
    import msgspec

    from dgiqa_stream.scorer import load_scorer
    from distill.evaluation.degradation_ladders import degradation_scores
    from quant.export_onnx import write_successor

    was = msgspec.structs.replace(source.manifest, interval=None, domain=None)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / source.path.name
        write_successor(graph, path, was, step={"step": "leave_out"}, made_by=command_line())
        with load_scorer(path, device="cpu") as scorer:
            return degradation_scores(
                scorer, paths, kinds=kinds, contents_per_kind=contents_per_kind, seed=1
            )
