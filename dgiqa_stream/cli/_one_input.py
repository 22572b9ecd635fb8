"""Scoring one input, from any thread: its frames to a writer, and what became of it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dgiqa_stream.cli._rows import InputResult
from dgiqa_stream.errors import ConfigError, SourceError, SourceUnsupported
from dgiqa_stream.inputs import refuse_folder, refuse_pattern
from dgiqa_stream.urls import redact, scheme_of, stream_id_of

if TYPE_CHECKING:
    from dgiqa_stream.cli._progress import InputProgress, Progress
    from dgiqa_stream.cli._rows import RowWriter
    from dgiqa_stream.cli._settings import Wording
    from dgiqa_stream.cli.scoring import OpenedScorer
    from dgiqa_stream.config import StreamConfig
    from dgiqa_stream.pooling import TemporalPooling


@dataclass(frozen=True, slots=True)
class InputScoring:
    """Scores inputs one after the other, or several at once."""

    settings: StreamConfig
    wording: Wording
    opened: OpenedScorer
    progress: Progress
    check: Callable[[], None]
    """Raises ``KeyboardInterrupt`` to end the scoring; called several times a second."""

    def __call__(self, path: str, writer: RowWriter) -> InputResult:
        """Score all of it; a fault or an interrupt is in the result, nothing of it is raised."""
        import msgspec

        from dgiqa_stream.pooling import TemporalPooling

        result = InputResult(path if scheme_of(path) == "file" else redact(path))
        # the whole input is pooled; nobody reads sliding windows here
        settings = msgspec.structs.replace(self.settings.pooling, windows_seconds=())
        pooling = TemporalPooling(settings, stream=stream_id_of(path), period_seconds=None)
        shown = self.progress.begin(result.path)
        begin = time.monotonic()
        try:
            with self.opened.reading(path):
                self._score_frames(path, result, pooling, writer, shown)
        except (SourceError, ConfigError) as exc:  # the latter: a crop outside of this picture
            result.error = self.wording(str(exc))
            result.is_refused = isinstance(exc, ConfigError)
        except KeyboardInterrupt:
            result.error, result.is_interrupted = "interrupted", True
        result.seconds = time.monotonic() - begin
        if result.num_frames:
            result.take(pooling.session())
        shown.ended()
        return result

    def _score_frames(
        self,
        path: str,
        result: InputResult,
        pooling: TemporalPooling,
        writer: RowWriter,
        progress: InputProgress,
    ) -> None:
        from dgiqa_stream.pipeline import score_frames

        self.check()
        refuse_folder(path)
        refuse_pattern(path)
        frames = score_frames(
            path,
            self.opened.scorer,
            config=self.settings,
            on_open=progress.opened,
            on_tick=self.check,
        )
        with contextlib.closing(frames):
            for scored in frames:
                writer.frame(result.path, scored)
                pooling.add(scored)
                result.num_frames += 1
                result.last = scored
                result.num_corrupt += scored.info.corrupt
                progress.scored(scored.info.pts_seconds)
        if not result.num_frames:
            raise SourceUnsupported(f"{result.path}: no frame to score in the chosen range")
