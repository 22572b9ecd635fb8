"""``teach`` and ``transfer-labels``: to be registered with an app by ``app.command()(teach)``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dgiqa_stream.errors import ConfigError
from distill.data.label_files import Missing
from distill.options import Depth, DepthCache, Device, Threads
from distill.process import use_threads
from distill.say import say

if TYPE_CHECKING:
    from distill.data.depth import DepthProvider
    from distill.recipe import DataConfig
    from distill.teachers.pictures import PictureSet
    from distill.teachers.recipe import TeacherRecipe

Shards = Annotated[Path | None, typer.Option(help="Rated pictures: what `shards` wrote.")]
Biq2021 = Annotated[Path | None, typer.Option(help="Or the folder of BIQ2021.")]
Packs = Annotated[Path | None, typer.Option(help="Or what `data` wrote: quick to read.")]


def teach(
    recipe: Annotated[Path, typer.Argument(help="A configs/distill/teacher-*.toml.")],
    *,
    run: Annotated[Path, typer.Option(help="Folder for the teacher and its curves; resumes.")],
    shards: Shards = None,
    biq2021: Biq2021 = None,
    packs: Packs = None,
    missing: Annotated[
        Missing, typer.Option(help="Where --biq2021 has labels without a file: stop, or go on.")
    ] = "refuse",
    backbone: Annotated[
        Path | None, typer.Option(help="Weights of the pyramids: MobileNetV2's .npz, or timm's.")
    ] = None,
    vit: Annotated[Path | None, typer.Option(help="Weights of a GlintIQA's ViT: timm's.")] = None,
    depth: Depth = None,
    depth_cache: DepthCache = None,
    pictures: Annotated[
        Path | None, typer.Option(help="Folder of further pictures, with --labels.")
    ] = None,
    labels: Annotated[
        Path | None, typer.Option(help="Their labels (.csv), as `transfer-labels` writes them.")
    ] = None,
    unrated: Annotated[
        Path | None, typer.Option(help="Folder of pictures that --labeller is to label first.")
    ] = None,
    labeller: Annotated[Path | None, typer.Option(help="A teacher's .safetensors.")] = None,
    device: Device = "auto",
    steps: Annotated[int | None, typer.Option(help="Stop early; for trials.")] = None,
    threads: Threads = 0,
    workers: Annotated[int, typer.Option(help="Threads that read and cut pictures.")] = 2,
) -> None:
    """Fit a teacher to human ratings. Interrupt it at will: the same command goes on."""
    import msgspec

    from distill.teachers.pictures import JoinedPictures, LabelledFolder
    from distill.teachers.recipe import DgiqaModel, load_teacher_recipe
    from distill.teachers.teaching import teach as fit

    _together("--pictures", pictures, "--labels", labels)
    _together("--unrated", unrated, "--labeller", labeller)
    settings = load_teacher_recipe(recipe)
    sets = [_rated(settings.data, shards, biq2021, packs, missing)]
    use_threads(threads)
    is_dgiqa = isinstance(settings.model, DgiqaModel)
    maps = _depth(depth, device, depth_cache) if is_dgiqa or labeller else None
    if pictures is not None and labels is not None:
        sets.append(LabelledFolder(pictures, labels))
    if unrated is not None and labeller is not None and maps is not None:
        sets.append(_expanded(settings, run, unrated, labeller, maps, device))
    taught = fit(
        settings,
        JoinedPictures(*sets),
        run,
        depth=maps,
        backbone=backbone,
        vit=vit,
        device=device,
        num_steps=steps,
        workers=workers,
    )
    typer.echo(
        msgspec.json.format(msgspec.json.encode(asdict(taught) | {"path": taught.path.name}))
    )


def transfer_labels(
    folder: Annotated[Path, typer.Argument(help="Pictures that nobody rated.")],
    *,
    output: Annotated[Path, typer.Option("--output", "-o", help="Labels to write (.csv).")],
    backbone: Annotated[Path, typer.Option(help="Weights: MobileNetV2's .npz, or timm's.")],
    shards: Shards = None,
    biq2021: Biq2021 = None,
    packs: Packs = None,
    extractor: Annotated[
        str, typer.Option(help="What the weights are of: mobilenetv2, or a timm network.")
    ] = "mobilenetv2",
    neighbours: Annotated[int, typer.Option(help="Rated pictures to average.", min=1)] = 1,
    num_validation: Annotated[
        int, typer.Option(help="Of --biq2021, as in the recipe that the labels are for.", min=0)
    ] = 1000,
    seed: Annotated[
        int, typer.Option(min=0, help="Likewise: other pictures would be held back.")
    ] = 1,
    device: Device = "auto",
    threads: Threads = 0,
) -> None:
    """Give each picture the rating of the rated one that shows the most similar content."""
    from distill.recipe import DataConfig
    from distill.teachers.unrated import label_by_content

    use_threads(threads)
    number = label_by_content(
        folder,
        _rated(DataConfig(num_validation=num_validation, seed=seed), shards, biq2021, packs),
        output,
        extractor=extractor,
        weights=backbone,
        num_neighbours=neighbours,
        device=device,
    )
    say(f"{number} labels in {output}; each at its similarity")


def _together(name: str, given: object, other: str, also: object) -> None:
    if (given is None) != (also is None):
        raise ConfigError(f"{name} and {other} go together: give both or neither")


def _rated(
    data: DataConfig,
    shards: Path | None,
    biq2021: Path | None,
    packs: Path | None,
    missing: Missing = "refuse",
) -> PictureSet:
    """The one set that was given."""
    from distill.teachers.pictures import BiqPictures, LabelledShards, PackPictures

    if [shards, biq2021, packs].count(None) != 2:
        raise ConfigError("rated pictures come from one place: give --shards, --biq2021 or --packs")
    if shards is not None:
        return LabelledShards(shards)
    if biq2021 is not None:
        return BiqPictures(
            biq2021, num_validation=data.num_validation, seed=data.seed, missing=missing
        )
    assert packs is not None
    return PackPictures(packs / "rated")


def _depth(choice: str | None, device: str, cache: Path | None) -> DepthProvider:
    from distill.data.depth import PUBLISHED_DEPTH, open_depth
    from distill.teacher_score import torch_device

    return open_depth(choice or PUBLISHED_DEPTH, device=str(torch_device(device)), cache=cache)


def _expanded(
    recipe: TeacherRecipe,
    run: Path,
    unrated: Path,
    labeller: Path,
    depth: DepthProvider,
    device: str,
) -> PictureSet:
    """Unrated pictures with another teacher's labels, which are made once for a run."""
    from distill.teachers.pictures import LabelledFolder
    from distill.teachers.unrated import label_by_teacher

    made = run / "pseudo-labels.csv"
    number = label_by_teacher(
        unrated, labeller, made, depth=depth, config=recipe.expansion, device=device
    )
    say(f"{number} unrated pictures with labels of {labeller.name}")
    return LabelledFolder(unrated, made)
