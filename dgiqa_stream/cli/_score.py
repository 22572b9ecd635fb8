"""``dgiqa-stream score``: files, pictures, folders and standard input."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dgiqa_stream.cli import _shared as shared
from dgiqa_stream.cli._pool import Pools, names_of
from dgiqa_stream.cli._thresholds import poolers_needed, thresholds_of
from dgiqa_stream.cli.scoring import Format, OpenedScorer, ScoreRequest, score_inputs, told
from dgiqa_stream.errors import ConfigError

if TYPE_CHECKING:
    from dgiqa_stream.config import StreamConfig


def score(
    paths: Annotated[
        list[str],
        typer.Argument(
            metavar="PATH...", help="Videos, pictures, folders, 'patterns/**', @list.txt, or -."
        ),
    ],
    *,
    config: Annotated[
        Path | None,
        typer.Option(
            "--config",
            "-c",
            parser=shared.path_with_a_name,
            help="stream.toml: how `watch` opens, crops and pools, and its model; options go over "
            "it.",
        ),
    ] = None,
    format: Annotated[Format, typer.Option("--format", "-f")] = Format.CSV,
    output: Annotated[str, typer.Option("--output", "-o", metavar="FILE")] = "-",
    fps: Annotated[
        float | None, typer.Option(help="Score this many frames a second instead of all.")
    ] = None,
    every: Annotated[int | None, typer.Option(help="Score each Nth frame.")] = None,
    start: Annotated[
        float | None, typer.Option(help="Skip so many seconds; index counts from there.")
    ] = None,
    duration: Annotated[float | None, typer.Option(help="Stop after so many seconds.")] = None,
    fail_under: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[POOLER=]VALUE",
            help="Exit with 1 where an input's pooled value, else its mean, is lower, as p5=40; "
            "may be repeated.",
        ),
    ] = None,
    junit: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="JUnit XML too: a case per input and --fail-under."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Skip inputs that -o FILE has already, complete.")
    ] = False,
    pool: Pools = None,
    jobs: Annotated[
        int,
        typer.Option("--jobs", "-j", min=0, max=256, help="Inputs scored at once; 0: all cores."),
    ] = 1,
    model: shared.GivenModel = None,
    backend: shared.GivenBackend = None,
    device: shared.GivenDevice = None,
    strict: shared.GivenStrict = None,
    threads: shared.GivenThreads = None,
    on_device_loss: shared.OnDeviceLoss = None,
    gpu_profile: shared.GpuProfile = None,
    max_gpu_mb: shared.MaxGpuMb = None,
    crop: shared.CropOption = None,
    letterbox: Annotated[bool | None, typer.Option(help="Leave black bars out.")] = None,
    deinterlace: shared.Deinterlace = None,
    hardware: shared.Hardware = None,
    stream_option: shared.StreamOptions = None,
    open_timeout: shared.OpenTimeout = None,
    read_timeout: shared.ReadTimeout = None,
    quiet: shared.Quiet = False,
    log_level: shared.Level = shared.LogLevel.WARNING,
) -> None:
    """Score files: every frame unless --fps or --every says otherwise; data to standard output."""
    shared.set_up_logging(log_level)
    thresholds = thresholds_of(fail_under or ())
    if fps is not None and every is not None:
        raise ConfigError("--fps and --every cannot both choose the frames: give one of them")
    base = _of_file(config)
    options = shared.pairs_of(stream_option)
    merged = {**base.source.options, **options}
    chosen = names_of(pool)
    if chosen is None and base.pooling.poolers:
        chosen = list(base.pooling.poolers)
    request = ScoreRequest(
        paths,
        {
            "sampler.mode": ("", "time" if fps is not None else "every"),
            "sampler.frames_per_second": ("--fps", fps),
            "sampler.every": ("--every", every),
            "source.start_seconds": ("--start", start),
            "source.duration_seconds": ("--duration", duration),
            "source.options": ("--stream-option", merged if options else None),
            "source.deinterlace": ("--deinterlace", deinterlace),
            "source.hardware": ("--hardware", hardware),
            "source.strict": ("--strict", strict),
            "source.open_timeout_seconds": ("--open-timeout", open_timeout),
            "source.read_timeout_seconds": ("--read-timeout", read_timeout),
            "overload.policy": ("", "wait"),
            "picture.crop": ("--crop", crop),
            "picture.letterbox": ("--letterbox", letterbox),
            "pooling.poolers": ("--pool", poolers_needed(chosen, thresholds)),
            "model.name": ("--model", model),
            "model.backend": ("--backend", backend),
            "model.device": ("--device", device),
            "model.strict": ("--strict", strict),
            "model.threads": ("--threads", threads),
            "model.on_device_loss": ("--on-device-loss", on_device_loss),
            "model.gpu_profile": ("--gpu-profile", gpu_profile),
            "model.max_gpu_mb": ("--max-gpu-mb", max_gpu_mb),
        },
        base=base,
        has_file=config is not None,
        format=format,
        output=output,
        fail_under=thresholds,
        junit=junit,
        jobs=jobs,
        resume=resume,
        quiet=quiet,
    )
    shared.leave(score_inputs(request, _open_model))


def _of_file(path: Path | None) -> StreamConfig:
    """The defaults and, over them, what a file says of opening, cropping, pooling and the model.

    Which frames are scored, and where to, is for the options to say.
    """
    import msgspec

    from dgiqa_stream.config import StreamConfig, load_config

    if path is None:
        return StreamConfig()
    read = load_config(path)
    source = msgspec.structs.replace(read.source, realtime=False)  # files wait for nobody
    return StreamConfig(source=source, picture=read.picture, model=read.model, pooling=read.pooling)


def _open_model(settings: StreamConfig) -> OpenedScorer:
    from dgiqa_stream.scorer import scorer_of

    return OpenedScorer(scorer_of(settings.model), told(settings))
