"""One decoded frame to its score."""

from __future__ import annotations

import logging
import time

from dgiqa_stream.config import PictureSettings
from dgiqa_stream.errors import ConfigError
from dgiqa_stream.letterbox import LetterboxDetector
from dgiqa_stream.scorer import Scorer
from dgiqa_stream.telemetry import Count, Stage, Telemetry
from dgiqa_stream.types import Frame, FrameScore, OutOfDomain

log = logging.getLogger(__name__)


class FrameScoring:
    """A decoded frame to its score: crop, letterbox, views, inference. Use one per stream."""

    def __init__(self, scorer: Scorer, picture: PictureSettings, telemetry: Telemetry) -> None:
        """Nothing is opened; the scorer may be shared by several streams."""
        self._scorer, self._telemetry = scorer, telemetry
        self._crop = picture.rectangle
        self._letterbox = LetterboxDetector() if picture.letterbox and not self._crop else None
        self._told_of_crop = False

    def __call__(self, frame: Frame) -> FrameScore:
        """Score one frame; counts it as scored or failed, and raises what went wrong."""
        try:
            score = self._score(frame)
        except BaseException:
            self._telemetry.count(Count.FAILED)
            raise
        self._telemetry.count(Count.SCORED)
        return score

    def _score(self, frame: Frame) -> FrameScore:
        with self._telemetry.timed(Stage.PREPROCESS):
            crop = self._crop
            if self._letterbox is not None:
                crop = self._letterbox.update(frame.planes, frame.info.pts_seconds)
            try:
                batch = self._scorer.cut([frame.planes], crop=crop)
            except ValueError as exc:  # the picture became smaller than the crop
                raise ConfigError(str(exc)) from exc
            self._warn_of_crop(frame)
        with self._telemetry.timed(Stage.INFER):
            (found,) = self._scorer.infer(batch)
        hdr: tuple[OutOfDomain, ...] = () if frame.info.dynamic_range == "sdr" else ("hdr",)
        return FrameScore(
            info=frame.info,
            stream=frame.stream,
            score=found.score,
            raw=found.raw,
            interval=found.interval,
            out_of_domain=(*hdr, *found.out_of_domain),
            scored_at_seconds=time.time(),
        )

    def _warn_of_crop(self, frame: Frame) -> None:
        """Say once that the crop is not wholly inside; a stream may change its size on the way."""
        crop, info = self._crop, frame.info
        if crop is None or self._told_of_crop:
            return
        if crop.left + crop.width > info.width or crop.top + crop.height > info.height:
            self._told_of_crop = True
            log.warning(
                "%s: the crop %d,%d,%d,%d reaches beyond the %dx%d picture; what is inside is "
                "scored",
                *(frame.stream, crop.left, crop.top, crop.width, crop.height),
                *(info.width, info.height),
            )
