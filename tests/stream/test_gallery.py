"""gallery: the worst frames of a session as small pictures, spread over time."""

from __future__ import annotations

from itertools import pairwise

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dgiqa_stream.gallery import LONGEST_PX, WorstFrames
from dgiqa_stream.types import FrameInfo, FrameScore, Planes

SMALL = Planes((np.full((16, 16, 3), 90, np.uint8),), full_range=True)
scored = st.lists(
    st.tuples(st.integers(0, 200), st.integers(0, 100)), unique_by=lambda s: s[0], max_size=40
).map(sorted)


def make_score(pts_seconds, score):
    """A scored frame of 16x16 pixels."""
    info = FrameInfo(0, pts_seconds, 0.04, None, None, 16, 16, "rgb24")
    return FrameScore(info, "s", float(score), score / 100)


@settings(deadline=None)
@given(frames=scored, most=st.integers(1, 5), apart=st.sampled_from([0.0, 1.0, 3.0]))
def test_the_worst_frame_is_kept_and_the_rest_is_spread(frames, most, apart):
    """At most ``most`` are kept, worst first, no two nearer than ``apart_seconds``; the lowest
    score of all is the first of them.
    """
    gallery = WorstFrames(most, apart_seconds=apart)
    for tenths, score in frames:
        gallery.offer(make_score(tenths / 10, score), SMALL)
    kept = [t.frame for t in gallery.frames]
    assert len(kept) <= most
    assert bool(kept) == bool(frames)
    if kept:
        assert kept[0].score == min(score for _, score in frames)
    assert all(a.score <= b.score for a, b in pairwise(kept))
    times = sorted(k.info.pts_seconds for k in kept)
    assert all(b - a >= apart for a, b in pairwise(times))


def test_without_distance_the_lowest_scores_are_kept():
    """Where frames may lie close together, exactly the N lowest scores are kept."""
    gallery = WorstFrames(3, apart_seconds=0.0)
    for number, score in enumerate([50, 20, 90, 10, 70, 30, 60]):
        gallery.offer(make_score(number, score), SMALL)
    assert [t.frame.score for t in gallery.frames] == [10, 20, 30]


def test_keeping_none_costs_nothing(monkeypatch):
    """With 0 no picture is ever reduced or encoded."""
    monkeypatch.setattr("dgiqa_stream.gallery._thumbnail", pytest.fail)
    gallery = WorstFrames(0)
    gallery.offer(make_score(0.0, 1), SMALL)
    assert gallery.frames == []


def test_better_frames_are_not_encoded(monkeypatch):
    """A frame better than all that is kept is never reduced: the usual frame costs nothing."""
    gallery = WorstFrames(1)
    gallery.offer(make_score(0.0, 10), SMALL)
    monkeypatch.setattr("dgiqa_stream.gallery._thumbnail", pytest.fail)
    for second in range(2, 9):
        gallery.offer(make_score(float(second), 10 + second), SMALL)


@pytest.mark.parametrize(
    ("size", "rotation", "expected"),
    [
        ((90, 160), 0, (160, 90)),
        ((720, 1280), 0, (320, 180)),
        ((1280, 720), 90, (320, 180)),
        ((9, 4000), 0, (320, 1)),
    ],
)
def test_a_thumbnail_is_an_upright_jpeg_of_320_pixels_at_most(size, rotation, expected):
    """The longer side is 320 pixels at most, never enlarged, upright, and its colour is kept."""
    rgb = np.empty((*size, 3), np.uint8)
    rgb[:] = (200, 60, 20)
    gallery = WorstFrames(1)
    gallery.offer(make_score(0.0, 1), Planes((rgb,), full_range=True, rotation=rotation))
    (thumbnail,) = gallery.frames
    assert (thumbnail.width, thumbnail.height) == expected
    assert max(expected) <= LONGEST_PX
    decoded = cv2.imdecode(np.frombuffer(thumbnail.jpeg, np.uint8), cv2.IMREAD_COLOR)
    assert decoded.shape[:2] == expected[::-1]
    assert decoded[..., ::-1].mean(axis=(0, 1)) == pytest.approx([200, 60, 20], abs=4)
