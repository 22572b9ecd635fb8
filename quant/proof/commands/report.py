"""``dgiqa-quant report``: what each artefact weighs, costs and says, as JSON, page and plot."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from distill.process import command_line
from distill.say import say

if TYPE_CHECKING:
    from dgiqa_stream.manifest import LoadedModel
    from quant.proof.agreement import Scores
    from quant.proof.commands.rated import RatedPictures
    from quant.proof.latency import LatencySettings

_SQNR_FROM = 6
"""The first texture of the generated pictures: flat ones say little of a layer."""


def report(
    models: Annotated[list[str], typer.Argument(help="Shipped names or .onnx, one of them FP32.")],
    *,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the report.")],
    packs: Annotated[
        Path | None, typer.Option(help="Their validation part gives ratings and ladders.")
    ] = None,
    num_rated: Annotated[int, typer.Option(min=5, help="Rated pictures of them.")] = 400,
    num_ladders: Annotated[int, typer.Option(min=1, help="Ladders of them.")] = 60,
    num_layer_pictures: Annotated[int, typer.Option(min=1, help="For SQNR per layer.")] = 4,
    rounds: Annotated[int, typer.Option(min=1, help="Of the interleaved timing.")] = 15,
) -> None:
    """Measure artefacts against the FP32 one; writes report.json, report.md and report.png."""
    from dgiqa_stream.report import require_matplotlib
    from quant.proof.figures import load_models
    from quant.proof.files import write_json, write_text, write_whole
    from quant.proof.latency import LatencySettings
    from quant.proof.report_page import draw_front, markdown

    require_matplotlib()  # its absence is told before minutes of measuring
    loaded = load_models(models)
    rated = None
    if packs is not None:
        from quant.proof.commands.rated import rated_pictures

        rated = rated_pictures(packs, num_rated=num_rated, num_ladders=num_ladders)
    settings = LatencySettings(num_rounds=rounds)
    made = make_report(loaded, rated, settings, num_layer_pictures=num_layer_pictures)
    page = markdown(made)
    write_json(output / "report.json", made)
    write_text(output / "report.md", page)
    write_whole(output / "report.png", lambda part: draw_front(made, part))
    typer.echo(page)
    say(f"report.json, report.md and report.png in {output}")


def make_report(
    models: Sequence[LoadedModel],
    rated: RatedPictures | None,
    settings: LatencySettings,
    *,
    num_layer_pictures: int,
) -> dict[str, Any]:
    """Everything, ready for JSON; the first model is the reference."""
    from distill.evaluate import provenance
    from quant.proof.artefacts import score_all, scorer_artefact
    from quant.proof.figures import (
        batches_of,
        cost_figures,
        labels_of,
        noise_figures,
        read_graph,
        settings_json,
        static_figures,
    )
    from quant.proof.latency import machine
    from quant.proof.pictures import generated_pictures

    about = machine()
    graphs = [read_graph(model) for model in models]
    say("latency and memory")
    costs = cost_figures(models, settings)
    say("scores")
    opened = [scorer_artefact(model.path) for model in models]
    names, scores = score_all(opened, chain(rated or (), generated_pictures()))
    pictures = list(islice(generated_pictures(), _SQNR_FROM, _SQNR_FROM + num_layer_pictures))
    artefacts = []
    for i, label in enumerate(labels_of(models)):
        say(f"layers of {label}")
        of_layers = noise_figures(graphs[0], graphs[i], batches_of(pictures, models[i]))
        artefacts.append(
            {
                "name": label,
                **static_figures(models[i], graphs[i]),
                **costs[i],
                "sqnr": of_layers if i else None,
                **_score_figures(names, scores[0], scores[i], rated, is_reference=i == 0),
            }
        )
    return {
        "kind": "compression",
        **provenance(command_line()),
        "date": datetime.now(UTC).date().isoformat(),
        "machine": about,
        "latency_settings": settings_json(settings),
        "reference": artefacts[0]["name"],
        "pictures": dict(Counter(name.partition("/")[0] for name in names)),
        "artefacts": artefacts,
    }


def _score_figures(
    names: Sequence[str],
    reference: Scores,
    scores: Scores,
    rated: RatedPictures | None,
    *,
    is_reference: bool,
) -> dict[str, Any]:
    from quant.proof.agreement import agreement

    apart = None if is_reference else asdict(agreement(reference, scores, names))
    if rated is None:
        return {"scores": apart, "mos": None, "ladders": None}
    from quant.proof.commands.rated import ladder_figures, mos_figures

    number = len(rated.rated_records)
    return {
        "scores": apart,
        "mos": mos_figures(reference[:number], scores[:number], rated.mos),
        "ladders": ladder_figures(rated.of_ladders(reference), rated.of_ladders(scores)),
    }
