"""``dgiqa-quant check``: whether two artefacts say the same of the same pictures."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from quant.proof.agreement import Agreement, Tolerance
    from quant.proof.artefacts import Artefact, NamedPicture, TorchSettings

OVER = 1
"""Exit code: the artefacts differ by more than the tolerance."""

Folder = Annotated[Path | None, typer.Option(help="Folder of pictures to compare on, too.")]
Bound = Annotated[float, typer.Option(min=0, help="Points of 0..100.")]


def check(
    a: Annotated[str, typer.Argument(help="A shipped name, .onnx, .pt, .safetensors or .pt2.")],
    b: Annotated[str, typer.Argument(help="The artefact that should say the same.")],
    *,
    recipe: Annotated[
        Path | None, typer.Option(help="Of the training of a .pt: it names the views.")
    ] = None,
    snap_weights: Annotated[
        bool, typer.Option("--snap-weights", help="Of a .pt, as `export` has it.")
    ] = False,
    pictures: Folder = None,
    packs: Annotated[
        Path | None, typer.Option(help="Compare on validation pictures of these packs, too.")
    ] = None,
    num_pictures: Annotated[int, typer.Option(min=1, help="So many of the packs.")] = 128,
    generated: Annotated[
        bool, typer.Option("--generated/--no-generated", help="Compare on generated pictures.")
    ] = True,
    max_mean: Bound = 0.5,
    max_p99: Bound = 2.0,
    max_max: Annotated[float | None, typer.Option(min=0)] = None,
    min_srcc: Annotated[float | None, typer.Option(min=-1, max=1)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="The result as JSON.")] = False,
) -> None:
    """Compare two artefacts on the same pictures; exit code 1 over the tolerance."""
    from quant.proof.agreement import Tolerance, agreement
    from quant.proof.artefacts import open_artefact, score_all

    settings = _torch_settings(recipe, snap_weights)
    opened = [open_artefact(model, settings) for model in (a, b)]
    names, (of_a, of_b) = score_all(
        opened, _pictures(pictures, packs, num_pictures, generated=generated)
    )
    found = agreement(of_a, of_b, names)
    tolerance = Tolerance(max_mean, max_p99, max_max, min_srcc)
    exceeded = tolerance.exceeded(found)
    if as_json:
        typer.echo(json.dumps(_as_json(opened, names, found, tolerance, exceeded), indent=1))
    else:
        typer.echo(_in_words(opened, found, exceeded))
    if exceeded:
        raise typer.Exit(OVER)


def _torch_settings(recipe: Path | None, snap_weights: bool) -> TorchSettings:
    from distill.recipe import load_recipe
    from quant.proof.artefacts import TorchSettings

    return TorchSettings(None if recipe is None else load_recipe(recipe).views, snap_weights)


def _pictures(
    folder: Path | None, packs: Path | None, number: int, *, generated: bool
) -> Iterator[NamedPicture]:
    from dgiqa_stream.errors import ConfigError
    from quant.proof.commands.pictures import pictures_of_folder, pictures_of_packs
    from quant.proof.pictures import generated_pictures

    parts: list[Iterator[NamedPicture]] = [generated_pictures()] if generated else []
    if folder is not None:
        parts.append(pictures_of_folder(folder))
    if packs is not None:
        parts.append(pictures_of_packs(packs, number))
    if not parts:
        raise ConfigError("nothing to compare on: add --pictures or --packs, or --generated")
    return chain.from_iterable(parts)


def _as_json(
    opened: list[Artefact],
    names: list[str],
    found: Agreement,
    tolerance: Tolerance,
    exceeded: list[str],
) -> dict[str, Any]:
    import msgspec

    from distill.evaluate import provenance
    from distill.process import command_line

    about = [{"name": m.name, "kind": m.kind, "sha256": m.sha256} for m in opened]
    places = Counter(name.partition("/")[0] if "/" in name else "pictures" for name in names)
    return {
        "kind": "check",
        **provenance(command_line()),
        "a": about[0],
        "b": about[1],
        "pictures": dict(places),
        "agreement": asdict(found),
        "tolerance": msgspec.to_builtins(tolerance),
        "exceeded": exceeded,
        "within": not exceeded,
    }


def _in_words(opened: list[Artefact], found: Agreement, exceeded: list[str]) -> str:
    a, b = (f"{m.name} ({m.kind})" for m in opened)
    ranks = [
        f"{name} {'-' if value is None else format(value, '.4f')}"
        for name, value in (("SRCC", found.srcc), ("KRCC", found.krcc))
    ]
    verdict = "over the tolerance: " + "; ".join(exceeded) if exceeded else "within the tolerance"
    return (
        f"{a} against {b}, {found.num_pictures} pictures\n"
        f"|delta score|: mean {found.mean_points:.3f}, p99 {found.p99_points:.3f}, "
        f"max {found.max_points:.3f} points ({found.worst}); bias {found.bias_points:+.3f}\n"
        f"rank agreement: {', '.join(ranks)}\n"
        f"{verdict}"
    )
