"""Clean pictures that no training sees, and what a codec makes of a short pan over one."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np

from dgiqa_stream.inputs import STILL_SUFFIXES
from dgiqa_stream.preprocess import reduced_rgb
from dgiqa_stream.scorer import Scorer
from dgiqa_stream.sources._planes import planes_of
from dgiqa_stream.types import Planes
from distill.data.build import content_split, read_named
from distill.data.codecs import Rgb, encode

_WHOLE_PX = 1 << 30


@dataclass(frozen=True, slots=True, eq=False)
class UnseenPicture:
    """A clean picture of the test split."""

    name: str
    rgb: Rgb
    """At its own size, less a row or column where that is odd."""


def unseen_paths(folders: Sequence[Path], *, number: int | None = None) -> list[Path]:
    """The test split's pictures of some folders by name; ``number`` of them, evenly spaced.

    Raises ``FileNotFoundError`` where there is none.
    """
    found = [
        path
        for folder in folders
        for path in sorted(folder.glob("*"))
        if path.suffix.lower() in STILL_SUFFIXES and content_split(path.name) == "test"
    ]
    if not found:
        raise FileNotFoundError(
            f"no unseen clean picture (clic_*) in {', '.join(map(str, folders))}: ladders need some"
        )
    if number is None or number >= len(found):
        return found
    places = np.linspace(0, len(found) - 1, number).round().astype(int)
    return [found[i] for i in places]


def read_unseen(path: Path, *, longest_px: int = _WHOLE_PX) -> UnseenPicture:
    """A picture of even size; ``longest_px`` area-reduces a larger one.

    Raises :class:`SourceError` where it cannot be read.
    """
    rgb = reduced_rgb(read_named(path), longest_px=longest_px)
    height, width = rgb.shape[0] & ~1, rgb.shape[1] & ~1
    return UnseenPicture(path.stem, np.ascontiguousarray(rgb[:height, :width]))


def coded_planes(
    frames: Sequence[Rgb], codec: str, point: int, *, keyframe_frames: int | None = None
) -> list[Planes]:
    """Frames of even size after one generation of a codec, as the runtime decodes them."""
    coded = encode(frames, codec, point, keyframe_frames=keyframe_frames)
    with av.open(io.BytesIO(coded)) as container:
        container.streams.video[0].codec_context.thread_count = 1
        found = [planes_of(frame) for frame in container.decode(video=0)]
    if len(found) != len(frames):
        raise RuntimeError(f"{codec} gave {len(found)} frames for {len(frames)}")
    return found


def scores_of(scorer: Scorer, pictures: Sequence[Planes]) -> list[float]:
    """The score of each, 0..100."""
    return [p.score for p in scorer.predict(pictures)]


def mean_score(scorer: Scorer, pictures: Sequence[Planes]) -> float:
    """Their mean score, 0..100."""
    return float(np.mean(scores_of(scorer, pictures)))
