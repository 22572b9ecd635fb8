"""``dgiqa-quant refit``: one head for a float file and for its INT8 file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from distill.process import command_line
from distill.say import say


def refit(
    model: Annotated[Path, typer.Argument(help="The float .onnx.")],
    quantised: Annotated[Path, typer.Argument(help="The INT8 .onnx made from it.")],
    *,
    config: Annotated[Path, typer.Option(help="Settings, such as configs/quant/int8.toml.")],
    packs: Annotated[Path, typer.Option(help="What `dgiqa-distill data` wrote.")],
    shards: Annotated[
        list[Path] | None,
        typer.Option(
            help="What `dgiqa-distill shards` wrote: ladders of more kinds; may be repeated."
        ),
    ] = None,
    cache: Annotated[
        Path | None, typer.Option(help="Keep the features in this .npz, for another try.")
    ] = None,
    falls_of: Annotated[
        str | None,
        typer.Option(
            help="A shipped student or an .onnx that says how far degraded pictures fall; the head "
            "that MODEL has says it unless given."
        ),
    ] = None,
) -> None:
    """Distil one head for both precisions from kernel ridge regression; rewrites both files.

    Intervals and flags of unfamiliar pictures, which were fitted to the head before, are taken out:
    `sure` makes new ones.
    """
    import msgspec

    from dgiqa_stream.manifest import load_model
    from distill.data.training_data import open_packs
    from quant.export_onnx import write_successor
    from quant.extra_outputs import remove_outputs_
    from quant.head import head_size, refit_
    from quant.looks import features_at, logits_on_ladders, looks_at
    from quant.proof.figures import read_graph
    from quant.ptq import load_int8_config

    settings = load_int8_config(config).head
    sources = [load_model(model), load_model(quantised)]
    former = None if falls_of is None else load_model(falls_of)
    reference, small = (read_graph(source) for source in sources)
    fewer = [remove_outputs_(graph) for graph in (reference, small)]
    preprocess = sources[0].manifest.preprocess.reduced_by(settings.reduction)
    views = preprocess.views
    looks = looks_at(open_packs(packs, shards), views, settings)
    features = features_at(looks, reference, small, cache=cache)
    falls = None if former is None else logits_on_ladders(former, looks)
    size_before = head_size(reference)
    grown = refit_(reference, small, features, settings, former=falls) - size_before
    step: dict[str, object] = {"step": "refit", "settings": msgspec.to_builtins(settings)}
    if former is not None:
        step["falls_of"] = former.manifest.sha256
    for graph, source, removed in zip((reference, small), sources, fewer, strict=True):
        was = msgspec.structs.replace(
            source.manifest,
            num_parameters=source.manifest.num_parameters + grown - removed,
            preprocess=preprocess,
            interval=None,
            domain=None,
        )
        write_successor(graph, source.path, was, step=step, made_by=command_line())
        if removed:
            say(f"{source.path.name} has lost its interval and flag: `dgiqa-quant sure` comes next")
    num_looks = len(features.labels.mos)
    say(f"{model.name} and {quantised.name}: one head, distilled on {num_looks} looks")
