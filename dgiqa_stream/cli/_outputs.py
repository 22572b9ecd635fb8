"""Where ``watch`` sends what it scores: the publisher, files, and the report at the end."""

from __future__ import annotations

import contextlib
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from dgiqa_stream.errors import SinkError, SourceError

if TYPE_CHECKING:
    from dgiqa_stream.config import StreamConfig
    from dgiqa_stream.sinks import Sink
    from dgiqa_stream.sinks.ndjson import NdjsonSink


@dataclass(frozen=True, slots=True)
class ReportPlan:
    """The page to make, and the recording it is made from."""

    page: Path
    recording: Path
    begin_byte: int
    """Where this run begins in the recording, which may hold earlier ones."""
    is_temporary: bool
    recorder: NdjsonSink | None = None

    @property
    def is_partial(self) -> bool:
        """Whether the recording was moved away or emptied, and holds only what came after."""
        return self.recorder is not None and self.recorder.was_moved

    def write(self) -> None:
        """Make the page; a recording of its own goes, unless the page could not be made.

        Raises :class:`SinkError` where it could not, as of a recording that somebody has moved.
        """
        from dgiqa_stream.recording import read_recording
        from dgiqa_stream.report import write_html

        begin_byte = 0 if self.is_partial else self.begin_byte
        try:
            write_html(read_recording(self.recording, begin_byte=begin_byte), self.page)
        except (SinkError, SourceError) as exc:
            reason = str(exc)
            if isinstance(exc, SourceError):
                reason = f"cannot make the report {self.page}: {exc}"
            if self.is_temporary:  # it may be the work of a day
                reason += f"; the recording is kept as {self.recording}"
            raise SinkError(reason) from exc
        if self.is_temporary:
            self.recording.unlink(missing_ok=True)


@dataclass(frozen=True, slots=True)
class Outputs:
    """What was opened."""

    sinks: list[Sink]
    published_at: str
    """The publisher's address; empty where there is none."""
    report: ReportPlan | None


def refuse_outputs_that_clash(settings: StreamConfig, urls: list[str]) -> None:
    """Raise :class:`ConfigError` where an output is an input, or two are one file."""
    from dgiqa_stream.inputs import refuse_overwriting, refuse_same_file

    output = settings.output
    named = [("output.ndjson", output.ndjson), ("output.csv", output.csv)]
    named += [("output.report", output.report)]
    for _, path in named:
        refuse_overwriting(path, urls)
    refuse_same_file(dict(named))


def open_outputs(settings: StreamConfig, stack: contextlib.ExitStack) -> Outputs:
    """Open the publisher and the files; ``stack`` closes them."""
    from dgiqa_stream.sinks.csvfile import CsvSink
    from dgiqa_stream.sinks.ndjson import NdjsonSink
    from dgiqa_stream.sinks.zeromq import ZeromqSink

    output = settings.output
    sinks: list[Sink] = []
    published_at = ""
    if settings.publish.endpoint:
        publisher = ZeromqSink(settings.publish)
        sinks.append(publisher)
        stack.callback(publisher.close)
        published_at = publisher.endpoint
    plan = _plan_report(settings)
    recordings = [output.ndjson] if output.ndjson else []
    if plan is not None and plan.is_temporary:
        recordings.append(str(plan.recording))
    for path in recordings:
        recorder = NdjsonSink(path)
        sinks.append(recorder)
        stack.callback(recorder.close)
        if plan is not None and Path(path) == plan.recording:
            plan = replace(plan, recorder=recorder)
    if output.csv:
        rows = CsvSink(output.csv)
        sinks.append(rows)
        stack.callback(rows.close)
    return Outputs(sinks, published_at, plan)


def _plan_report(settings: StreamConfig) -> ReportPlan | None:
    """From the recording that is made anyway, or else from a temporary one beside the page."""
    output = settings.output
    if not output.report:
        return None
    from dgiqa_stream.report import require_matplotlib

    require_matplotlib()
    page, asked = Path(output.report), Path(output.ndjson)
    if output.ndjson not in ("", "-") and (asked.is_file() or not asked.exists()):
        begin_byte = asked.stat().st_size if asked.exists() else 0
        return ReportPlan(page, asked, begin_byte, is_temporary=False)
    try:  # beside the page, where there is room for it, and not in a /tmp of memory
        with tempfile.NamedTemporaryFile(
            dir=page.parent, prefix=f".{page.stem}-", suffix=".ndjson", delete=False
        ) as made:
            return ReportPlan(page, Path(made.name), 0, is_temporary=True)
    except OSError as exc:
        raise SinkError(
            f"cannot write the report {page}: {exc.strerror}; choose another folder"
        ) from exc
