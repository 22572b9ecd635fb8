"""``dgiqa-stream watch``: live streams to ZeroMQ, files and people."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dgiqa_stream.cli import _shared as shared
from dgiqa_stream.cli._interrupts import Interrupts
from dgiqa_stream.cli._outputs import Outputs, open_outputs
from dgiqa_stream.cli._pool import Pools, names_of
from dgiqa_stream.cli._settings import Wording, settle
from dgiqa_stream.cli._streams import check_entries, entries_of
from dgiqa_stream.cli._table import LiveTable
from dgiqa_stream.errors import DgiqaError

if TYPE_CHECKING:
    from dgiqa_stream.config import StreamConfig, StreamEntry
    from dgiqa_stream.pipeline import Monitor
    from dgiqa_stream.session import SessionResult
    from dgiqa_stream.sinks import Sink
    from dgiqa_stream.sinks.systemd import ServiceSink

_POLL_SECONDS = 0.1
_LEAVE_SECONDS = 3.0
"""The bound for a busy machine, where the last words should be heard, too; else it is 0.1 to 0.7 s,
and a test holds an idle machine to one second."""
_ANNOUNCE_SECONDS = 0.5


def watch(
    urls: Annotated[
        list[str] | None,
        typer.Argument(metavar="URL...", help="rtsp, rtmp, udp, srt, http(s), camera:0, a file"),
    ] = None,
    *,
    config: Annotated[
        Path | None,
        typer.Option(
            "--config",
            "-c",
            envvar="DGIQA_CONFIG",
            parser=shared.path_with_a_name,
            help="stream.toml",
        ),
    ] = None,
    id: Annotated[
        list[str] | None, typer.Option("--id", help="A name for each URL, in their order.")
    ] = None,
    fps: Annotated[float | None, typer.Option(help="Frames scored a second; 5 by default.")] = None,
    every: Annotated[int | None, typer.Option(help="Score each Nth frame instead.")] = None,
    publish: Annotated[
        str | None,
        typer.Option(metavar="ENDPOINT", help="ZeroMQ endpoint; an empty one publishes nothing."),
    ] = None,
    encoding: Annotated[str | None, typer.Option(help="json or msgpack.")] = None,
    ndjson: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Record every message; appended to what is there."),
    ] = None,
    csv: Annotated[
        str | None, typer.Option(metavar="FILE", help="A row per scored frame; appended.")
    ] = None,
    report: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="HTML report of this run at the end; replaces the file."),
    ] = None,
    duration: Annotated[float | None, typer.Option(help="Stop after so many seconds.")] = None,
    realtime: Annotated[
        bool | None, typer.Option("--realtime", help="Play files at their own pace.")
    ] = None,
    reconnect: Annotated[
        bool | None, typer.Option("--reconnect", help="Open a live source again that goes away.")
    ] = None,
    programme: Annotated[int | None, typer.Option(help="MPEG-TS service number.")] = None,
    track: Annotated[int | None, typer.Option(help="Video track, from 0.")] = None,
    deinterlace: shared.Deinterlace = None,
    hardware: shared.Hardware = None,
    stream_option: shared.StreamOptions = None,
    open_timeout: shared.OpenTimeout = None,
    read_timeout: shared.ReadTimeout = None,
    pool: Pools = None,
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
    curve_dir: Annotated[str | None, typer.Option(help="Folder of CURVE keys.")] = None,
    insecure: Annotated[
        bool | None, typer.Option("--insecure", help="Publish beyond this machine without CURVE.")
    ] = None,
    quiet: shared.Quiet = False,
    log_level: shared.Level = shared.LogLevel.WARNING,
) -> None:
    """Watch live streams: publish scores until they end or you press Ctrl-C."""
    shared.set_up_logging(log_level)
    from dgiqa_stream.config import StreamConfig, load_config

    options = shared.pairs_of(stream_option)
    read = load_config(config) if config else StreamConfig()
    merged = {**read.source.options, **options}
    mode = "every" if every is not None else "time" if fps is not None else None
    settings, wording = settle(
        read,
        {
            "source.options": ("--stream-option", merged if options else None),
            "source.programme": ("--programme", programme),
            "source.track": ("--track", track),
            "source.realtime": ("--realtime", realtime),
            "source.duration_seconds": ("--duration", duration),
            "source.deinterlace": ("--deinterlace", deinterlace),
            "source.hardware": ("--hardware", hardware),
            "source.strict": ("--strict", strict),
            "source.open_timeout_seconds": ("--open-timeout", open_timeout),
            "source.read_timeout_seconds": ("--read-timeout", read_timeout),
            "reconnect.enabled": ("--reconnect", reconnect),
            "sampler.mode": ("", mode),
            "sampler.frames_per_second": ("--fps", fps),
            "sampler.every": ("--every", every),
            "picture.crop": ("--crop", crop),
            "picture.letterbox": ("--letterbox", letterbox),
            "pooling.poolers": ("--pool", names_of(pool)),
            "model.name": ("--model", model),
            "model.backend": ("--backend", backend),
            "model.device": ("--device", device),
            "model.strict": ("--strict", strict),
            "model.threads": ("--threads", threads),
            "model.on_device_loss": ("--on-device-loss", on_device_loss),
            "model.gpu_profile": ("--gpu-profile", gpu_profile),
            "model.max_gpu_mb": ("--max-gpu-mb", max_gpu_mb),
            "publish.endpoint": ("--publish", publish),
            "publish.encoding": ("--encoding", encoding),
            "publish.curve_dir": ("--curve-dir", curve_dir),
            "publish.insecure": ("--insecure", insecure),
            "output.ndjson": ("--ndjson", ndjson),
            "output.csv": ("--csv", csv),
            "output.report": ("--report", report),
        },
        has_file=config is not None,
    )
    with wording.errors():
        shared.leave(_watch(entries_of(urls or [], id or [], settings), settings, wording, quiet))


def _watch(
    entries: list[StreamEntry], settings: StreamConfig, wording: Wording, quiet: bool
) -> int:
    """Watch every stream in a thread of its own until all end; return the exit code."""
    import msgspec

    from dgiqa_stream.cli._jobs import for_several
    from dgiqa_stream.pipeline import Monitor
    from dgiqa_stream.scorer import scorer_of
    from dgiqa_stream.sinks.systemd import service_of
    from dgiqa_stream.wire import new_id

    check_entries(entries, settings)
    settings = for_several(settings, len(entries))
    with contextlib.ExitStack() as stack:
        scorer = stack.enter_context(scorer_of(settings.model))
        interrupts = stack.enter_context(Interrupts())
        outputs = open_outputs(settings, stack)
        if service := service_of(os.environ):
            stack.callback(service.close)
        is_shown = not quiet and settings.output.ndjson != "-"
        table = LiveTable(sys.stderr, only_opened=True) if is_shown else None
        run = new_id()
        monitors = []
        for entry in entries:
            options = {**settings.source.options, **entry.options}
            source = msgspec.structs.replace(settings.source, options=options)
            told: list[Sink] = [table] if table else []
            told += [service.of_stream(entry.id or entry.url)] if service else []
            monitors.append(
                Monitor(
                    entry.url,
                    stream=entry.id,
                    config=msgspec.structs.replace(settings, source=source),
                    scorer=scorer,
                    sinks=[*outputs.sinks, *told],
                    run=run,
                )
            )
        # Nobody else can know the port that was free.
        is_told = not quiet or settings.publish.endpoint.endswith(":*")
        published_at = outputs.published_at if is_told else ""
        if service:
            service.ready()
        results, crashed = _run_all(monitors, table, published_at, interrupts, service)
    return _conclude(results, crashed, outputs, wording, quiet=quiet)


def _run_all(
    monitors: list[Monitor],
    table: LiveTable | None,
    published_at: str,
    interrupts: Interrupts,
    service: ServiceSink | None,
) -> tuple[list[SessionResult], list[BaseException]]:
    """Run each monitor in a thread; the first signal stops all of them.

    ``published_at`` is told once a stream plays, or soon all the same; not where all fail at once.
    """
    results: list[SessionResult] = []
    crashed: list[BaseException] = []

    def work(monitor: Monitor) -> None:
        try:
            results.append(monitor.run())
        except BaseException as exc:  # noqa: BLE001 - told when all have ended
            crashed.append(exc)

    threads = [
        threading.Thread(target=work, args=(m,), name=f"monitor {m.stream}", daemon=True)
        for m in monitors
    ]
    for thread in threads:
        thread.start()
    begin = time.monotonic()
    with table or contextlib.nullcontext():
        while any(thread.is_alive() for thread in threads) and not interrupts:
            time.sleep(_POLL_SECONDS)
            is_late = time.monotonic() - begin > _ANNOUNCE_SECONDS
            if published_at and (is_late or any(map(_has_played, monitors))):
                shared.say(f"publishing on {published_at}")
                published_at = ""
            if table is not None:
                table.refresh()
        if service is not None:
            service.stopping()
        for monitor in monitors:
            monitor.stop()
        deadline = time.monotonic() + _LEAVE_SECONDS
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()) if interrupts else None)
    return results, crashed


def _has_played(monitor: Monitor) -> bool:
    from dgiqa_stream.telemetry import Count

    return monitor.telemetry.counts()[Count.DECODED] > 0


def _conclude(
    results: list[SessionResult],
    crashed: list[BaseException],
    outputs: Outputs,
    wording: Wording,
    *,
    quiet: bool,
) -> int:
    """Say how each stream ended, write the report, and choose the exit code."""
    from dgiqa_stream.telemetry import Count

    codes: set[int] = set()
    for error in crashed:
        if not isinstance(error, DgiqaError):
            raise error
        shared.complain(wording(str(error)))
        codes.add(shared.exit_code_of(error))
    for result in results:
        if result.error is not None:
            text = wording(str(result.error))
            shared.complain(text if result.stream in text else f"{result.stream}: {text}")
        for sink_error in result.sink_errors:
            shared.complain(wording(str(sink_error)))
            codes.add(shared.BROKEN)
        never_opened = result.error is not None and not result.counts[Count.DECODED]
        if not quiet and not never_opened:
            shared.say(_summary(result))
    failures = [r for r in results if r.error is not None]
    source_failures = [f for f in failures if shared.exit_code_of(_error(f)) == shared.NOTHING]
    codes |= {shared.exit_code_of(_error(f)) for f in failures} - {shared.NOTHING}
    if source_failures:
        scored = any(r.session is not None for r in results)
        codes.add(shared.PARTIAL if scored else shared.NOTHING)
    if outputs.report is not None:
        outputs.report.write()
        if outputs.report.is_partial:
            shared.say(
                f"warning: {outputs.report.recording} was moved away or emptied on the way; the "
                "report is of what came after"
            )
        if not quiet:
            shared.say(f"report: {outputs.report.page}")
    return shared.first_code(codes)


def _error(result: SessionResult) -> DgiqaError:
    assert result.error is not None
    return result.error


def _summary(result: SessionResult) -> str:
    """One line: what was watched, for how long, how good it was, what was lost."""
    from dgiqa_stream.telemetry import Count

    counts = result.counts
    lost = counts[Count.DROPPED_QUEUE] + counts[Count.DROPPED_STALE]
    head = (
        f"{result.stream}: {result.reason.replace('_', ' ')} after {result.duration_seconds:.1f} s"
    )
    scored = f"{counts[Count.SCORED]} of {counts[Count.DECODED]} frames scored"
    tail = f"{lost} dropped, {counts[Count.CORRUPT]} corrupt"
    if errors := counts[Count.DECODE_ERRORS]:
        tail += f", {shared.counted(errors, 'decode error')}"
    session = result.session
    if session is None:
        return f"{head}; {scored}; {tail}"
    pool = {k: v for k, v in session.pool.items() if v is not None}
    shown = "  ".join(
        f"{label} {pool[name]:.1f}"
        for label, name in (
            ("hysteresis", "hysteresis"),
            ("mean", "mean"),
            ("worst 5 %", "low5"),
            ("min", "min"),
        )
        if name in pool
    )
    return f"{head}; {shown}; {scored}; {tail}"
