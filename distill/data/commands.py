"""``shards`` and ``mosaics``: commands to register with an app by ``app.command()(shards)``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dgiqa_stream.errors import ConfigError
from distill.data.label_files import Missing
from distill.process import command_line
from distill.say import say


def shards(
    folder: Annotated[Path, typer.Argument(help="Folder to write, or to go on with.")],
    *,
    pristine: Annotated[
        list[Path] | None,
        typer.Option(help="Folder of clean pictures (.webp, .png) to degrade; may be repeated."),
    ] = None,
    rated: Annotated[
        list[str] | None, typer.Option(help="A rated set and its folder, as biq2021=FOLDER.")
    ] = None,
    halved: Annotated[
        list[str] | None,
        typer.Option(help="A rated set, as above, whose training pictures are degraded, halved."),
    ] = None,
    num_halved: Annotated[
        int | None, typer.Option(help="At most so many of each such set, drawn; all by default.")
    ] = None,
    halved_least_mos: Annotated[
        float, typer.Option(help="Such pictures have this MOS (0..1) or a higher one.")
    ] = 0.6,
    degradations: Annotated[
        str, typer.Option(help="Ladders to make, with commas between; all by default.")
    ] = "",
    ladders_per_picture: Annotated[
        int | None, typer.Option(help="So many of them for each, drawn; all by default.")
    ] = None,
    chains: Annotated[int, typer.Option(help="Random chains for each clean picture.")] = 4,
    pseudo_mos: Annotated[
        bool, typer.Option(help="Rate degraded pictures by full-reference measures.")
    ] = True,
    longest_px: Annotated[int, typer.Option(help="Larger pictures are reduced to it.")] = 1088,
    seed: Annotated[int, typer.Option(min=0, help="Of ladders, chains and drawn splits.")] = 0,
    missing: Annotated[
        Missing, typer.Option(help="Where a rated set's labels have no file: stop, or go on.")
    ] = "refuse",
    twins_together: Annotated[
        bool, typer.Option(help="Draw the validation part anew, so that no twin is in training.")
    ] = False,
    workers: Annotated[int, typer.Option(help="Processes.")] = 2,
    max_left_out: Annotated[
        int, typer.Option(help="So many unreadable pictures are passed over.")
    ] = 20,
) -> None:
    """Put rated, clean and degraded pictures with their labels into small files.

    Interrupt it at will: the same command goes on where it stopped.
    """
    from distill.data.build_shards import build_shards, plan_jobs
    from distill.data.datasets import RatedItem, load_dataset
    from distill.data.degradations import PICTURE_DEGRADATIONS
    from distill.data.halved import clean_when_halved
    from distill.data.pseudo_mos import has_ssimulacra2
    from distill.data.shard_records import ShardSettings
    from distill.data.twins import regrouped

    def load(sets: list[str] | None) -> dict[str, list[RatedItem]]:
        named = dict(name_and_folder(text) for text in sets or ())
        made = {n: load_dataset(n, root, seed=seed, missing=missing) for n, root in named.items()}
        if not twins_together:
            return made
        return {name: regrouped(items, seed=seed) for name, items in made.items()}

    clean = {
        name: clean_when_halved(items, least_mos=halved_least_mos, number=num_halved, seed=seed)
        for name, items in load(halved).items()
    }
    chosen = tuple(word.strip() for word in degradations.split(",") if word.strip())
    settings = ShardSettings(
        seed=seed,
        degradations=chosen or PICTURE_DEGRADATIONS,
        ladders_per_picture=ladders_per_picture,
        num_chains=chains,
        pseudo_mos=pseudo_mos,
        ssimulacra2=pseudo_mos and has_ssimulacra2(),
        longest_px=longest_px,
    )
    manifest = build_shards(
        folder,
        plan_jobs(pristine, load(rated), halved=clean),
        settings=settings,
        made_by=command_line(),
        workers=workers,
        max_left_out=max_left_out,
    )
    total = ", ".join(f"{number} {split}" for split, number in manifest.num_pictures.items())
    say(f"{len(manifest.shards)} shards in {folder}: {total}")


def mosaics(
    folder: Annotated[Path, typer.Argument(help="Folder to write them to.")],
    *,
    pristine: Annotated[Path, typer.Option(help="Folder of clean pictures (.webp).")],
    number: Annotated[int, typer.Option(help="How many.")] = 40,
    first: Annotated[
        int, typer.Option(help="Number of the first, so that a second folder has others.")
    ] = 0,
    layout: Annotated[
        list[str] | None,
        typer.Option(
            help="LINESxWIDTHxROWSxCOLUMNS; may be repeated. Three of 720 to 1080 lines by default."
        ),
    ] = None,
    largest_magnification: Annotated[
        float, typer.Option(help="Each picture is enlarged by 1 to so many times.")
    ] = 1.6,
    seed: Annotated[int, typer.Option(min=0, help="Of layouts, pictures and how each is cut.")] = 0,
) -> None:
    """Large clean pictures, set together of small ones, for `shards` to degrade."""
    from distill.data.mosaics import LAYOUTS, layout_of, write_mosaics

    made = write_mosaics(
        folder,
        pristine,
        number=number,
        first=first,
        layouts=[layout_of(text) for text in layout] if layout else LAYOUTS,
        largest_magnification=largest_magnification,
        seed=seed,
    )
    say(f"{len(made)} large pictures in {folder}")


def name_and_folder(text: str) -> tuple[str, Path]:
    """``biq2021=FOLDER`` in its two parts; raises :class:`ConfigError` for anything else."""
    name, equals, root = text.partition("=")
    if not equals:
        raise ConfigError(f"--rated {text!r} is not NAME=FOLDER")
    return name, Path(root)
