"""``dgiqa-stream watch`` and ``sub``: live streams to ZeroMQ, and from ZeroMQ to people."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
import time
from enum import StrEnum
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dgiqa_stream.cli import _shared as shared
from dgiqa_stream.cli._table import LiveTable
from dgiqa_stream.errors import ConfigError, DgiqaError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from dgiqa_stream.config import StreamConfig, StreamEntry
    from dgiqa_stream.pipeline import Monitor, SessionResult
    from dgiqa_stream.sinks import Sink

_POLL_SECONDS = 0.1
_LEAVE_SECONDS = 0.8


class Shown(StrEnum):
    """What ``sub`` prints."""

    TABLE = "table"
    NDJSON = "ndjson"


def watch(
    urls: Annotated[
        list[str] | None,
        typer.Argument(metavar="URL...", help="rtsp, rtmp, udp, srt, http(s), camera:0, a file"),
    ] = None,
    *,
    config: Annotated[
        Path | None, typer.Option("--config", "-c", envvar="DGIQA_CONFIG", help="stream.toml")
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
        str | None, typer.Option(metavar="FILE", help="Record every message.")
    ] = None,
    csv: Annotated[str | None, typer.Option(metavar="FILE", help="A row per scored frame.")] = None,
    report: Annotated[
        str | None, typer.Option(metavar="FILE", help="HTML report at the end.")
    ] = None,
    duration: Annotated[float | None, typer.Option(help="Stop after so many seconds.")] = None,
    realtime: Annotated[
        bool | None, typer.Option("--realtime", help="Play files at their own pace.")
    ] = None,
    programme: Annotated[int | None, typer.Option(help="MPEG-TS service number.")] = None,
    track: Annotated[int | None, typer.Option(help="Video track, from 0.")] = None,
    stream_option: shared.StreamOptions = None,
    open_timeout: Annotated[float | None, typer.Option(help="Seconds to open; 10.")] = None,
    read_timeout: Annotated[float | None, typer.Option(help="Seconds of silence; 10.")] = None,
    model: Annotated[str | None, typer.Option("--model", "-m", envvar="DGIQA_MODEL")] = None,
    device: Annotated[str | None, typer.Option(envvar="DGIQA_DEVICE")] = None,
    threads: Annotated[int | None, typer.Option(envvar="DGIQA_THREADS", min=1, max=256)] = None,
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
    settings = load_config(config) if config else StreamConfig()
    settings = shared.changed(
        settings,
        {
            "source": {
                "options": {**settings.source.options, **options} if options else None,
                "programme": programme,
                "track": track,
                "realtime": realtime,
                "duration_seconds": duration,
                "open_timeout_seconds": open_timeout,
                "read_timeout_seconds": read_timeout,
            },
            "sampler": {
                "mode": "every" if every is not None else "time" if fps is not None else None,
                "frames_per_second": fps,
                "every": every,
            },
            "picture": {"crop": crop, "letterbox": letterbox},
            "model": {"name": model, "device": device, "threads": threads},
            "publish": {
                "endpoint": publish,
                "encoding": encoding,
                "curve_dir": curve_dir,
                "insecure": insecure,
            },
            "output": {"ndjson": ndjson, "csv": csv, "report": report},
        },
    )
    shared.leave(_watch(_entries(urls or [], id or [], settings), settings, quiet=quiet))


def _entries(urls: list[str], ids: list[str], settings: StreamConfig) -> list[StreamEntry]:
    """The streams of the command line, or else of the file; each with an id of its own."""
    import msgspec

    from dgiqa_stream.config import StreamEntry, StreamId
    from dgiqa_stream.urls import stream_id_of

    if ids and len(ids) != len(urls):
        raise ConfigError(f"{len(ids)} --id for {len(urls)} URLs: name each URL, in order, or none")
    named = [StreamEntry(u, i) for u, i in zip_longest(urls, ids)]
    entries = named or list(settings.stream)
    if not entries:
        raise ConfigError("nothing to watch: give a URL, or [[stream]] tables in --config FILE")
    taken: set[str] = set()
    unique = []
    for entry in entries:
        name = entry.id or stream_id_of(entry.url)
        try:
            msgspec.convert(name, StreamId)
        except msgspec.ValidationError:
            raise ConfigError(
                f"stream id {name!r} is not 1 to 64 letters, digits, dots, dashes or underscores"
            ) from None
        if name in taken:
            raise ConfigError(f"two streams are named {name!r}: give each an --id of its own")
        taken.add(name)
        unique.append(msgspec.structs.replace(entry, id=name))
    return unique


def _watch(entries: list[StreamEntry], settings: StreamConfig, *, quiet: bool) -> int:
    """Watch every stream in a thread of its own until all end; return the exit code."""
    import msgspec

    from dgiqa_stream.inputs import refuse_overwriting
    from dgiqa_stream.pipeline import Monitor
    from dgiqa_stream.scorer import scorer_of
    from dgiqa_stream.wire import new_id

    output = settings.output
    outputs = [path for path in (output.ndjson, output.csv, output.report) if path not in ("", "-")]
    for number, path in enumerate(outputs):
        refuse_overwriting(path, [*(e.url for e in entries), *outputs[:number]])
    if settings.output.report:
        from dgiqa_stream.report import require_matplotlib

        require_matplotlib()
    with contextlib.ExitStack() as stack:
        scorer = stack.enter_context(scorer_of(settings.model))
        sinks = _open_sinks(settings, stack)
        table = None if quiet or settings.output.ndjson == "-" else LiveTable(sys.stderr)
        run = new_id()
        monitors = []
        for entry in entries:
            options = {**settings.source.options, **entry.options}
            source = msgspec.structs.replace(settings.source, options=options)
            monitors.append(
                Monitor(
                    entry.url,
                    stream=entry.id,
                    config=msgspec.structs.replace(settings, source=source),
                    scorer=scorer,
                    sinks=[*sinks, table] if table else sinks,
                    run=run,
                )
            )
        results, crashed = _run_all(monitors, table)
    return _conclude(monitors, results, crashed, settings, quiet=quiet)


def _open_sinks(settings: StreamConfig, stack: contextlib.ExitStack) -> list[Sink]:
    from dgiqa_stream.sinks.csvfile import CsvSink
    from dgiqa_stream.sinks.ndjson import NdjsonSink
    from dgiqa_stream.sinks.zeromq import ZeromqSink

    sinks: list[Sink] = []
    if settings.publish.endpoint:
        publisher = ZeromqSink(settings.publish)
        sinks.append(publisher)
        stack.callback(publisher.close)
        shared.say(f"publishing on {publisher.endpoint}")
    recordings = {settings.output.ndjson, _recording_path(settings)} - {""}
    for path in sorted(recordings):  # one that only serves the report begins anew
        recorder = NdjsonSink(path, append=path == settings.output.ndjson)
        sinks.append(recorder)
        stack.callback(recorder.close)
    if settings.output.csv:
        rows = CsvSink(settings.output.csv)
        sinks.append(rows)
        stack.callback(rows.close)
    return sinks


def _run_all(
    monitors: list[Monitor], table: LiveTable | None
) -> tuple[list[SessionResult], list[BaseException]]:
    """Run each monitor in a thread; the first signal stops all of them."""
    results: list[SessionResult] = []
    crashed: list[BaseException] = []

    def work(monitor: Monitor) -> None:
        try:
            results.append(monitor.run())
        except BaseException as exc:  # noqa: BLE001 - told when all have ended
            crashed.append(exc)

    # Not an Event: a handler runs in this thread, and set() would wait for the lock that wait()
    # holds in the very same thread.
    received: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: received.append(number))
    threads = [
        threading.Thread(target=work, args=(m,), name=f"monitor {m.stream}", daemon=True)
        for m in monitors
    ]
    for thread in threads:
        thread.start()
    with table or contextlib.nullcontext():
        while any(thread.is_alive() for thread in threads) and not received:
            time.sleep(_POLL_SECONDS)
            if table is not None:
                table.refresh()
        for monitor in monitors:
            monitor.stop()
        deadline = time.monotonic() + _LEAVE_SECONDS
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()) if received else None)
    return results, crashed


def _conclude(
    monitors: list[Monitor],
    results: list[SessionResult],
    crashed: list[BaseException],
    settings: StreamConfig,
    *,
    quiet: bool,
) -> int:
    """Say how each stream ended, write the report, and choose the exit code."""
    codes: set[int] = set()
    for error in crashed:
        if not isinstance(error, DgiqaError):
            raise error
        shared.complain(error)
        codes.add(shared.exit_code_of(error))
    for result in results:
        if result.error is not None:
            text = str(result.error)
            shared.complain(text if result.stream in text else f"{result.stream}: {text}")
        for sink_error in result.sink_errors:
            shared.complain(sink_error)
            codes.add(shared.BROKEN)
        if not quiet:
            shared.say(_summary(result))
    failures = [r for r in results if r.error is not None]
    source_failures = [f for f in failures if shared.exit_code_of(_error(f)) == shared.NOTHING]
    codes |= {shared.exit_code_of(_error(f)) for f in failures} - {shared.NOTHING}
    if source_failures:
        scored = any(r.session is not None for r in results)
        codes.add(shared.PARTIAL if scored else shared.NOTHING)
    if settings.output.report:
        from dgiqa_stream.recording import read_recording
        from dgiqa_stream.report import write_html

        write_html(read_recording(Path(_recording_path(settings))), Path(settings.output.report))
        shared.say(f"report: {settings.output.report}")
    return shared.first_code(codes)


def _recording_path(settings: StreamConfig) -> str:
    """Where messages are recorded; a report is made from a recording, so it brings one along."""
    output = settings.output
    if output.report and output.ndjson in ("", "-"):
        return str(Path(output.report).with_suffix(".ndjson"))
    return output.ndjson


def _error(result: SessionResult) -> DgiqaError:
    assert result.error is not None
    return result.error


def _summary(result: SessionResult) -> str:
    """One line: what was watched, for how long, how good it was, what was lost."""
    from dgiqa_stream.telemetry import Count

    lost = result.counts[Count.DROPPED_QUEUE] + result.counts[Count.DROPPED_STALE]
    head = (
        f"{result.stream}: {result.reason.replace('_', ' ')} after {result.duration_seconds:.1f} s"
    )
    scored = f"{result.counts[Count.SCORED]} of {result.counts[Count.DECODED]} frames scored"
    tail = f"{lost} dropped, {result.counts[Count.CORRUPT]} corrupt"
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


def sub(
    endpoint: Annotated[str, typer.Argument(metavar="ENDPOINT", help="tcp://HOST:PORT or ipc://")],
    *,
    format: Annotated[
        Shown | None, typer.Option("--format", "-f", help="table on a terminal, else ndjson.")
    ] = None,
    latest: Annotated[
        bool, typer.Option("--latest", help="Skip to the newest message when behind.")
    ] = False,
    stream: Annotated[list[str] | None, typer.Option(help="Only this stream.")] = None,
    kind: Annotated[
        list[str] | None, typer.Option(help="Only frame, window, status, meta or final.")
    ] = None,
    timeout: Annotated[
        float | None, typer.Option(help="Stop after so many seconds without a message.")
    ] = None,
    count: Annotated[int | None, typer.Option(min=1, help="Stop after so many messages.")] = None,
    curve_dir: Annotated[str, typer.Option(help="Folder of CURVE keys.")] = "",
    log_level: shared.Level = shared.LogLevel.WARNING,
) -> None:
    """Subscribe to a publisher: a live table, or one message per line."""
    shared.set_up_logging(log_level)
    from dgiqa_stream.subscriber import Subscriber

    shared.check_number("--timeout", timeout, least=0, most=1e9)
    shown = format or (Shown.TABLE if sys.stdout.isatty() else Shown.NDJSON)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    received = 0
    with Subscriber(
        endpoint,
        streams=tuple(stream or ()),
        kinds=tuple(kind or ()),
        latest=latest,
        curve_dir=curve_dir,
        timeout_seconds=timeout,
    ) as subscriber:
        with contextlib.suppress(KeyboardInterrupt):
            received = _show(subscriber, shown, count)
        for topic, missing in subscriber.gaps.items():
            shared.say(f"{topic}: {missing} messages missed (a slow subscriber, or the network)")
        if subscriber.num_undecodable:
            shared.say(f"{subscriber.num_undecodable} messages could not be read")
    if not received:
        hint = subscriber.problem or "is a publisher running there?"
        shared.complain(f"no message from {endpoint}: {hint}")
    shared.leave(shared.OK if received else shared.NOTHING)


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def _show(subscriber: Any, shown: Shown, count: int | None) -> int:
    """Print messages as they come; returns their number."""
    from dgiqa_stream.wire import encode

    received = 0
    with LiveTable(sys.stdout) if shown is Shown.TABLE else contextlib.nullcontext() as table:
        for message in _counted(subscriber, count):
            received += 1
            if table is None:
                sys.stdout.write(encode(message).decode() + "\n")
                sys.stdout.flush()
            else:
                table.send(message)
                table.refresh()
    return received


def _counted(messages: Any, count: int | None) -> Iterator[Any]:
    for number, message in enumerate(messages, 1):
        yield message
        if number == count:
            return
