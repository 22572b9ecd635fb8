"""``dgiqa-quant sure``: a student learns how sure it is, and which pictures it knows."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dgiqa_stream.errors import ConfigError
from distill.process import command_line, keep_freed_memory
from distill.say import say

if TYPE_CHECKING:
    import onnx

    from dgiqa_stream.manifest import ModelManifest
    from dgiqa_stream.preprocess import ViewSpec
    from distill.data.training_data import TrainingData
    from quant.calibration import Views
    from quant.ptq import Int8Recipe
    from quant.sure import Known, SureConfig

_BATCH = 8


def sure(
    model: Annotated[Path, typer.Argument(help="The float .onnx.")],
    quantised: Annotated[Path, typer.Argument(help="The INT8 .onnx made from it.")],
    *,
    config: Annotated[Path, typer.Option(help="Settings, such as configs/quant/sure.toml.")],
    packs: Annotated[Path, typer.Option(help="What `dgiqa-distill data` wrote.")],
    shards: Annotated[
        list[Path] | None,
        typer.Option(help="What `dgiqa-distill shards` wrote, as `refit` had them; repeatable."),
    ] = None,
    cache: Annotated[
        Path | None, typer.Option(help="Features that `refit --cache` kept, or to keep here.")
    ] = None,
    version: Annotated[
        str | None, typer.Option(help="Version of the models from here; else they keep theirs.")
    ] = None,
) -> None:
    """Give both files an interval and a flag for unfamiliar pictures; quality stays as it is."""
    import msgspec

    from dgiqa_stream.manifest import load_model
    from distill.data.training_data import open_packs
    from quant.export_onnx import write_successor
    from quant.extra_outputs import features_name, remove_outputs_
    from quant.proof.figures import read_graph
    from quant.ptq import load_int8_config
    from quant.sure import fit_
    from quant.sure_measured import measure, validation_part

    keep_freed_memory()
    recipe = load_int8_config(config)
    _refuse_without_table(config)
    _check_kinds(recipe.sure)
    sources = [load_model(model), load_model(quantised)]
    _refuse_other_reduction(recipe, sources[0].manifest)
    graphs = [read_graph(source) for source in sources]
    removed = [remove_outputs_(graph) for graph in graphs]
    for graph in graphs:
        features_name(graph)  # a model without the head is refused before the work begins
    data = open_packs(packs, shards)
    rated = validation_part(data.rated, recipe.sure)
    known = _known(graphs, data, sources[0].manifest.preprocess.views, recipe, cache)
    added = fit_(graphs[0], graphs[1], known, recipe.head, recipe.sure)
    found = []
    for graph, source, fewer in zip(graphs, sources, removed, strict=True):
        was = _without_sure(source.manifest, added - fewer, version)
        found.append(measure(graph, was, rated, recipe.sure))
    for graph, source, (manifest, figures) in zip(graphs, sources, found, strict=True):
        step = {"step": "sure", "settings": msgspec.to_builtins(recipe.sure)}
        metrics = {**manifest.metrics, "sure": figures}
        write_successor(
            graph, source.path, manifest, step=step, made_by=command_line(), metrics=metrics
        )
        say(
            f"{source.path.name}: intervals hold {figures['coverage']:.1%} of ratings, "
            f"{figures['flagged']['validation']:.1%} of validation pictures are unfamiliar"
        )


def _refuse_without_table(config: Path) -> None:
    """Defaults would go unnoticed: int8.toml has other looks and no [sure]."""
    if "sure" not in tomllib.loads(config.read_text(encoding="utf-8")):
        raise ConfigError(f"{config} has no [sure]: give a file like configs/quant/sure.toml")


def _refuse_other_reduction(recipe: Int8Recipe, manifest: ModelManifest) -> None:
    wanted, there = recipe.head.reduction, manifest.preprocess.reduction
    if wanted not in (None, there):
        raise ConfigError(
            f"head.reduction is {wanted}, but the models' whole views are {there}, which `sure` "
            "keeps: leave it out, or run `dgiqa-quant refit` first"
        )


def _check_kinds(config: SureConfig) -> None:
    from distill.data.strange import KINDS

    unknown = sorted(set(config.held_out) - set(KINDS))
    if unknown or set(config.held_out) == set(KINDS):
        raise ConfigError(
            f"sure.held_out is {list(config.held_out)}: choose some, not all, of {', '.join(KINDS)}"
        )


def _known(
    graphs: Sequence[onnx.ModelProto],
    data: TrainingData,
    views: Sequence[ViewSpec],
    recipe: Int8Recipe,
    cache: Path | None,
) -> Known:
    """Features of the looks that ``refit`` takes, and of drawn pictures."""
    import numpy as np

    from quant.head import features_of
    from quant.looks import features_at, looks_at
    from quant.sure import Known

    wanted = looks_at(data, views, recipe.head)
    looks = features_at(wanted, graphs[0], graphs[1], cache=cache)
    say(f"drawing {recipe.sure.num_strange} pictures")
    drawn = features_of(graphs[0], graphs[1], _strange_views(views, recipe.sure), wanted.labels)
    is_familiar = np.array([not _is_screen(content) for content in wanted.contents()])
    return Known(looks, is_familiar, drawn.of_float, drawn.of_int8)


def _is_screen(content: str) -> bool:
    """Whether a content is one of GB82's screens, by which models are judged.

    They are on ladders too, where they say how quality falls; familiar or not is left open.
    """
    return content.startswith("gb82_") and not content.endswith("-lossless")


def _strange_views(views: Sequence[ViewSpec], config: SureConfig) -> Iterator[Views]:
    """Drawn pictures to learn from, of the kinds that are not held out."""
    from dgiqa_stream.scorer import planes_of_rgb
    from distill.data.loader import read_ahead, stack, views_of
    from distill.data.strange import FIT_SEED, KINDS, strange_picture

    kinds = [kind for kind in KINDS if kind not in config.held_out]

    def batch(number: int) -> Views:
        if number % 25 == 0:
            say(f"{number * _BATCH} of {config.num_strange} drawn")
        last = min((number + 1) * _BATCH, config.num_strange)
        drawn = [
            strange_picture(kinds[i % len(kinds)], seed=(config.seed, FIT_SEED, i))
            for i in range(number * _BATCH, last)
        ]
        return stack([views_of(planes_of_rgb(rgb), views, None) for rgb in drawn])

    return read_ahead(batch, 0, math.ceil(config.num_strange / _BATCH))


def _without_sure(manifest: ModelManifest, num_more: int, version: str | None) -> ModelManifest:
    """What a manifest said before an earlier run, with other parameters."""
    import msgspec

    return msgspec.structs.replace(
        manifest,
        version=version or manifest.version,
        num_parameters=manifest.num_parameters + num_more,
        history=[step for step in manifest.history if step.get("step") != "sure"],
        metrics={name: value for name, value in manifest.metrics.items() if name != "sure"},
        interval=None,
        domain=None,
    )
