"""Codec ladders: does the score fall as one content is coded ever more coarsely?"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dgiqa_stream.scorer import Scorer
from distill.data.codecs import CODECS, Rgb
from distill.data.damage import moving
from distill.data.packed import as_planes_420
from distill.evaluation.agreement import Estimate, estimate
from distill.evaluation.falling import FallingSteps, falling_steps, together
from distill.evaluation.shares import Share, share_over_contents
from distill.evaluation.unseen import UnseenPicture, coded_planes, mean_score, read_unseen

LADDER_CODECS = ("h264", "h265", "av1", "vp9")
CRF_CODECS = ("h264", "h265")
"""Those whose rate factor is on the 0-51 scale: 45 of AV1 or VP9 is a good picture."""
STRONG_CRF = 45
STRONG_DROP_POINTS = 25.0
"""By which a clean 1080p source should lie above its version at that rate factor."""
_LADDER_FRAMES, _LADDER_SCORED = 5, (2, 4)
_FULL_FRAMES, _FULL_SCORED, _FULL_STEP_PX = 8, (3, 5, 7), 2
_LONG_PX, _SHORT_PX = 1920, 1080

Scores = dict[str, dict[str, list[float]]]
"""Codec to content to the scores of its ladder, clean first."""


@dataclass(frozen=True, slots=True)
class CodecLadders:
    """Ladders of each codec, then of all."""

    points: Mapping[str, Sequence[int]]
    """Quality values after the clean source."""
    by_codec: Mapping[str, FallingSteps]
    all: FallingSteps
    scores: Scores


def judge_codecs(
    scorer: Scorer,
    pictures: Iterable[UnseenPicture],
    *,
    codecs: Sequence[str] = LADDER_CODECS,
    on_content: Callable[[str], None] = lambda name: None,
) -> CodecLadders:
    """A short pan over each whole picture at its own size, coded at each of the codecs' points.

    A level's score is the mean of two inter-coded frames, decoded as the runtime decodes; the
    ladder begins with the same frames uncoded.
    """
    scores: Scores = {codec: {} for codec in codecs}
    for picture in pictures:
        on_content(picture.name)
        pan = moving(picture.rgb, num_frames=_LADDER_FRAMES, step_px=2)
        clean = _score(scorer, pan, _LADDER_SCORED)
        for codec in codecs:
            coded = [_coded_score(scorer, pan, codec, p, _LADDER_SCORED) for p in _points(codec)]
            scores[codec][picture.name] = [clean, *coded]
    return CodecLadders(
        points={codec: _points(codec) for codec in codecs},
        by_codec={codec: falling_steps(together([scores[codec]])) for codec in codecs},
        all=falling_steps(together(list(scores.values()))),
        scores=scores,
    )


def _points(codec: str) -> Sequence[int]:
    return CODECS[codec].points


def _score(scorer: Scorer, frames: Sequence[Rgb], scored: Sequence[int]) -> float:
    return mean_score(scorer, [as_planes_420(frames[i]) for i in scored])


def _coded_score(
    scorer: Scorer, frames: Sequence[Rgb], codec: str, point: int, scored: Sequence[int]
) -> float:
    decoded = coded_planes(frames, codec, point)
    return mean_score(scorer, [decoded[i] for i in scored])


@dataclass(frozen=True, slots=True)
class StrongCoding:
    """How far a clean 1080p source lies above its version at one high rate factor."""

    crf: int
    num_contents: int
    drop_points: Estimate
    lowest_drop_points: float
    share_at_floor: Share
    """Of contents that fall by :data:`STRONG_DROP_POINTS` or more."""


@dataclass(frozen=True, slots=True)
class FullSizeDrops:
    """1080p sources and their strongly coded versions."""

    source: str
    by_codec: Mapping[str, StrongCoding]
    scores: Scores
    """Clean, then coded."""
    too_small: list[str]


def judge_full_size(
    scorer: Scorer,
    paths: Sequence[Path],
    *,
    codecs: Sequence[str] = CRF_CODECS,
    on_content: Callable[[str], None] = lambda name: None,
) -> FullSizeDrops:
    """A pan of 1920x1080 (upright: 1080x1920) windows over larger pictures, clean and at CRF 45.

    Nothing is enlarged: smaller pictures are named and left out. Raises ``ValueError`` where all
    are too small.
    """
    scores: Scores = {codec: {} for codec in codecs}
    too_small = []
    for path in paths:
        picture = read_unseen(path)
        on_content(picture.name)
        frames = full_hd_pan(picture.rgb)
        if not frames:
            too_small.append(picture.name)
            continue
        clean = _score(scorer, frames, _FULL_SCORED)
        for codec in codecs:
            coded = _coded_score(scorer, frames, codec, STRONG_CRF, _FULL_SCORED)
            scores[codec][picture.name] = [clean, coded]
    if len(too_small) == len(paths):
        raise ValueError(f"none of {len(paths)} pictures holds a pan of {_LONG_PX}x{_SHORT_PX}")
    return FullSizeDrops(
        source=f"native {_LONG_PX}x{_SHORT_PX} windows (or upright) panning over larger pictures",
        by_codec={codec: _strong(by_content) for codec, by_content in scores.items()},
        scores=scores,
        too_small=too_small,
    )


def full_hd_pan(rgb: Rgb) -> list[Rgb]:
    """Windows about the centre, two pixels on from frame to frame; none where they do not fit."""
    height, width = rgb.shape[:2]
    tall, wide = (_LONG_PX, _SHORT_PX) if height > width else (_SHORT_PX, _LONG_PX)
    travel = _FULL_STEP_PX * (_FULL_FRAMES - 1)
    top, left = (height - tall - travel) // 2, (width - wide - travel) // 2
    if top < 0 or left < 0:
        return []
    places = [i * _FULL_STEP_PX for i in range(_FULL_FRAMES)]
    return [rgb[top + p : top + p + tall, left + p : left + p + wide] for p in places]


def _strong(by_content: Mapping[str, Sequence[float]]) -> StrongCoding:
    drops = [clean - coded for clean, coded in by_content.values()]
    return StrongCoding(
        crf=STRONG_CRF,
        num_contents=len(drops),
        drop_points=estimate(np.mean, drops),
        lowest_drop_points=min(drops),
        share_at_floor=share_over_contents([[drop >= STRONG_DROP_POINTS] for drop in drops]),
    )
