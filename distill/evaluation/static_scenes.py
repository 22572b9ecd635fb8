"""Scenes in which nothing moves, coded at a constant quality: how much does the score wander?"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dgiqa_stream.scorer import Scorer
from distill.data.codecs import FRAMES_PER_SECOND, Rgb
from distill.evaluation.agreement import Estimate, estimate
from distill.evaluation.shares import Share, share_over_contents
from distill.evaluation.unseen import coded_planes, read_unseen, scores_of

CODECS_OF_SCENES = ("h264", "h265")
CRFS = (23, 30, 37)
GRAIN_STEPS = 2.0
"""Standard deviation of the camera's grain, of 255: slight, as of a good sensor in daylight."""
SECONDS = 3
MOST_WANDERING_POINTS = 2.0
_LONGEST_PX = 640


@dataclass(frozen=True, slots=True)
class StaticClip:
    """One coded scene."""

    content: str
    codec: str
    crf: int
    grain_steps: float
    mean_score: float
    stdev_points: float
    """Of the score over all frames."""


@dataclass(frozen=True, slots=True)
class StaticScenes:
    """All coded scenes, and the spread of their scores over time."""

    num_contents: int
    num_frames: int
    """Of each clip; a keyframe each second."""
    mean_stdev_points: Estimate
    largest_stdev_points: float
    share_steady: Share
    """Of clips whose score has a standard deviation of 2 points or less."""
    clips: list[StaticClip]


def judge_static_scenes(
    scorer: Scorer,
    paths: Sequence[Path],
    *,
    crfs: Sequence[int] = CRFS,
    seconds: int = SECONDS,
    on_content: Callable[[str], None] = lambda name: None,
) -> StaticScenes:
    """Stills of three seconds, with grain and without, at several rate factors; all frames scored.

    Pictures are area-reduced to 640 pixels, and every encoder sets a keyframe each second, as live
    streams have: it is there that scores jump.
    """
    by_content: list[list[StaticClip]] = []
    for path in paths:
        on_content(path.stem)
        by_content.append(list(_clips_of(scorer, path, crfs, seconds)))
    return sum_up_scenes(by_content, num_frames=seconds * FRAMES_PER_SECOND)


def sum_up_scenes(by_content: Sequence[Sequence[StaticClip]], *, num_frames: int) -> StaticScenes:
    """The clips of each content together."""
    stdevs = [[clip.stdev_points for clip in of_one] for of_one in by_content]
    return StaticScenes(
        num_contents=len(by_content),
        num_frames=num_frames,
        mean_stdev_points=estimate(np.mean, [float(np.mean(of_one)) for of_one in stdevs]),
        largest_stdev_points=max(max(of_one) for of_one in stdevs),
        share_steady=share_over_contents(
            [[stdev <= MOST_WANDERING_POINTS for stdev in of_one] for of_one in stdevs]
        ),
        clips=[clip for of_one in by_content for clip in of_one],
    )


def _clips_of(
    scorer: Scorer, path: Path, crfs: Sequence[int], seconds: int
) -> Iterator[StaticClip]:
    picture = read_unseen(path, longest_px=_LONGEST_PX)
    for grain_steps in (0.0, GRAIN_STEPS):
        frames = scene(picture.rgb, seconds * FRAMES_PER_SECOND, grain_steps, picture.name)
        for codec in CODECS_OF_SCENES:
            for crf in crfs:
                coded = coded_planes(frames, codec, crf, keyframe_frames=FRAMES_PER_SECOND)
                scores = scores_of(scorer, coded)
                found = float(np.mean(scores)), float(np.std(scores))
                yield StaticClip(picture.name, codec, crf, grain_steps, *found)


def scene(rgb: Rgb, num_frames: int, grain_steps: float, name: str) -> list[Rgb]:
    """The picture again and again, each time with fresh grain, the same in red, green and blue."""
    if grain_steps == 0:
        return [rgb] * num_frames
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    shape = (*rgb.shape[:2], 1)
    grains = (rng.standard_normal(shape, np.float32) for _ in range(num_frames))
    return [
        np.clip(np.rint(rgb + grain * np.float32(grain_steps)), 0, 255).astype(np.uint8)
        for grain in grains
    ]
