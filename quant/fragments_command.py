"""``dgiqa-quant fragments``: a trunk of their own for a student's fragments."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from distill.options import Device, Threads
from distill.process import command_line
from distill.say import say


def fragments(
    model: Annotated[Path, typer.Argument(help="The float .onnx, whose trunk stays as it is.")],
    quantised: Annotated[Path, typer.Argument(help="The INT8 .onnx made from it.")],
    *,
    config: Annotated[Path, typer.Option(help="Settings, such as configs/quant/fragments.toml.")],
    packs: Annotated[Path, typer.Option(help="What `dgiqa-distill data` wrote.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The float .onnx to write.")],
    run: Annotated[Path, typer.Option(help="Folder for checkpoints and logs; resumes from it.")],
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
    steps: Annotated[int | None, typer.Option(help="End early, at the settings' rates.")] = None,
    device: Device = "auto",
    threads: Threads = 0,
) -> None:
    """Teach a small trunk for the fragments in place of the one that both views pass.

    The head is taught with it, for both precisions; `int8` and `sure` come next. Interrupt it at
    will: the same command goes on from its last checkpoint.
    """
    import msgspec

    from dgiqa_stream.manifest import load_model
    from distill.data.training_data import open_packs
    from distill.models.student import Deployed, load_trunk
    from distill.run_folder import RunFolder
    from distill.training_commands import begin_training
    from quant.export_onnx import export_graph, write_successor
    from quant.extra_outputs import remove_outputs_
    from quant.fragments_training import Teaching, wanted_of
    from quant.looks import features_at, logits_on_ladders, looks_at
    from quant.proof.figures import read_graph
    from quant.ptq import load_int8_config
    from quant.refusals import refuse_other_precisions, refuse_unwritable

    recipe = load_int8_config(config)
    refuse_unwritable(output)
    sources = [load_model(model), load_model(quantised)]
    refuse_other_precisions(*sources)
    trunk = load_trunk(model)
    former = None if falls_of is None else load_model(falls_of)
    graphs = [read_graph(source) for source in sources]
    for graph in graphs:
        remove_outputs_(graph)
    compute = begin_training(device, "auto", threads=threads)
    preprocess = sources[0].manifest.preprocess.reduced_by(recipe.head.reduction)
    data = open_packs(packs, shards)
    looks = looks_at(data, preprocess.views, recipe.head)
    features = features_at(looks, graphs[0], graphs[1], cache=cache)
    falls = None if former is None else logits_on_ladders(former, looks)
    about = {
        "the model": sources[0].manifest.sha256,
        "the INT8 model": sources[1].manifest.sha256,
        "--falls-of": None if former is None else former.manifest.sha256,
        "the data": data.identity,
        "[fragments]": msgspec.to_builtins(recipe.fragments),
        "[head]": msgspec.to_builtins(recipe.head),
    }
    teaching = Teaching(
        looks,
        features,
        wanted_of(graphs[0], features, recipe.head, recipe.fragments, falls),
        settings=(recipe.fragments, recipe.head),
        folder=RunFolder(run),
        compute=compute,
        about=about,
    )
    student = teaching.student(trunk, steps)
    deployed = Deployed(student)
    num_parameters = sum(p.numel() for p in deployed.parameters())
    was = msgspec.structs.replace(
        sources[0].manifest,
        num_parameters=num_parameters,
        preprocess=preprocess,
        interval=None,
        domain=None,
    )
    step = {"step": "fragments", "settings": about["[fragments]"], "head": about["[head]"]}
    if former is not None:
        step["falls_of"] = former.manifest.sha256
    write_successor(
        export_graph(deployed, preprocess.views), output, was, step=step, made_by=command_line()
    )
    say(f"{output.name}: {num_parameters} parameters; `int8` comes next")
