"""Which windows come when, and what they say of time that no frame covers."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dgiqa_stream.config import PoolingSettings
from dgiqa_stream.pooling import TemporalPooling
from dgiqa_stream.types import FrameInfo, FrameScore, WindowScore

lawful = settings(deadline=None, max_examples=50)
LENGTHS = (1.0, 10.0)
SETTINGS = PoolingSettings(windows_seconds=LENGTHS, hop_seconds=1.0, max_hold_seconds=2.0)


def frame_score(pts_seconds: float, score: float = 50.0, *, jump: bool = False) -> FrameScore:
    """A scored frame that lasts half a second."""
    info = FrameInfo(
        index=0,
        pts_seconds=pts_seconds,
        duration_seconds=0.5,
        pts=None,
        time_base=None,
        width=64,
        height=48,
        pix_fmt="yuv420p",
        discontinuity=jump,
    )
    return FrameScore(info, "cam1", score, score / 100)


def test_the_share_in_domain_is_of_the_scored_time():
    """Of the time that scores are held, not of frames nor of the window's length, that of frames in
    domain counts; where nothing is scored there is no share, and odd frames are pooled like others.
    """
    pool = pooling()
    frames = [frame_score(0.0), frame_score(1.0, 20.0), frame_score(2.5), frame_score(10.0)]
    frames[1] = dataclasses.replace(frames[1], out_of_domain=("flat",))
    windows = [w for frame in frames for w in pool.add(frame)]
    short = [w.in_domain_share for w in windows if w.length_seconds == 1.0]
    (long,) = (w for w in windows if w.length_seconds == 10.0 and w.end_seconds == 10.0)
    (*_, session) = pool.finish()
    # held: 0 to 1, then odd to 2.5, then for the longest time to 4.5, and the last for its period
    assert short[:6] == [1.0, 0.0, 0.5, 1.0, 1.0, None]
    assert long.in_domain_share == pytest.approx(3.0 / 4.5)
    assert long.pool["mean"] == pytest.approx((1.0 * 50 + 1.5 * 20 + 2.0 * 50) / 4.5)
    assert session.in_domain_share == pytest.approx(3.25 / 4.75)
    assert pooling().finish()[-1].in_domain_share is None


def pooling(period_seconds: float | None = 0.25) -> TemporalPooling:
    """A new object under test."""
    return TemporalPooling(SETTINGS, stream="cam1", period_seconds=period_seconds)


def every(period: float, begin: float, end: float, score: float = 50.0) -> list[FrameScore]:
    """Frames of one score, one per period."""
    count = round((end - begin) / period)
    return [frame_score(begin + n * period, score) for n in range(count)]


def spans(windows: Sequence[WindowScore]) -> list[tuple[float, float, float]]:
    """Length, begin and end of each window."""
    return [(w.length_seconds, w.begin_seconds, w.end_seconds) for w in windows]


@pytest.mark.parametrize("begin", [0.0, 7.2, 86400.1])
@pytest.mark.parametrize("rate", [3, 5, 25, 30000 / 1001])
def test_windows_end_at_each_hop_after_the_first_frame(begin: float, rate: float):
    """Each hop closes one window per length, whatever the rate or where time starts."""
    pool = pooling(1 / rate)
    windows = [
        w for n in range(round(12 * rate) + 1) for w in pool.add(frame_score(begin + n / rate))
    ]
    ends = [w.end_seconds - begin for w in windows]
    assert ends == pytest.approx([float(hop) for hop in range(1, 13) for _ in LENGTHS])
    assert [w.length_seconds for w in windows[:4]] == [1.0, 10.0, 1.0, 10.0]


@lawful
@given(st.lists(st.floats(0.01, 30.0), min_size=1, max_size=30))
def test_windows_come_in_time_order_and_each_once(gaps: list[float]):
    """Over the whole session, ends never go back and no window is given twice."""
    pool, pts, windows = pooling(), 0.0, []
    for gap in gaps:
        windows += pool.add(frame_score(pts))
        pts += gap
    windows += pool.finish()[:-1]
    keys = [(w.end_seconds, w.length_seconds) for w in windows]
    assert keys == sorted(set(keys))


@lawful
@given(st.lists(st.tuples(st.floats(0.01, 30.0), st.floats(0, 100)), min_size=1, max_size=30))
def test_one_second_windows_share_out_the_frames(frames: list[tuple[float, float]]):
    """Windows as long as the hop hold every frame once, and a session holds them all."""
    pool, pts, windows = pooling(), 0.0, []
    for gap, score in frames:
        windows += pool.add(frame_score(pts, score))
        pts += gap
    windows += pool.finish()
    counted = [w.num_frames for w in windows if w.length_seconds == 1.0 and w.kind == "sliding"]
    assert sum(counted) == windows[-1].num_frames == len(frames)


def test_a_long_gap_gives_one_empty_window_per_length():
    """An hour without frames gives the windows that still hold scores, then one empty each."""
    pool = pooling()
    for frame in every(0.25, 0.0, 4.0):
        pool.add(frame)
    windows = pool.add(frame_score(3600.0))
    empty = [w for w in windows if w.coverage == 0]
    assert spans(empty) == [(1.0, 6.0, 7.0), (10.0, 6.0, 16.0)]
    assert all(w.score is None and not w.valid and w.num_frames == 0 for w in empty)
    assert all(v is None for w in empty for v in w.pool.values())
    assert len(windows) < 20


def test_windows_go_on_after_a_gap_on_the_same_grid():
    """After a gap the next window ends on the next whole hop since the session began."""
    pool = pooling()
    pool.add(frame_score(0.5))
    pool.add(frame_score(3600.0))
    windows = pool.add(frame_score(3600.6))
    assert spans(windows) == [(1.0, 3599.5, 3600.5), (10.0, 3590.5, 3600.5)]
    assert [w.coverage for w in windows] == pytest.approx([0.5, 0.05])


def test_a_score_stands_at_most_so_long():
    """A frame followed by nothing for 5 s covers 2 s."""
    pool = pooling()
    pool.add(frame_score(0.0, 10.0))
    windows = pool.add(frame_score(5.0, 90.0))
    assert [w.coverage for w in windows if w.length_seconds == 1.0] == [1.0, 1.0, 0.0]


def test_the_first_windows_are_shorter_than_they_are_called():
    """A 10 s window after 3 s starts with the session, covers 30 % and is not valid."""
    pool = pooling()
    windows = [w for f in every(0.25, 100.0, 103.25) for w in pool.add(f)]
    long = windows[-1]
    assert (long.begin_seconds, long.end_seconds, long.length_seconds) == (100.0, 103.0, 10.0)
    assert long.coverage == pytest.approx(0.3)
    assert not long.valid
    assert long.expected_frames == 40.0
    assert long.num_frames == 12
    assert long.pool["mean"] == pytest.approx(50.0)


def test_finish_gives_the_windows_that_the_end_cut_short():
    """A session of 2.5 s ends with windows up to 2.5 s and one session."""
    pool = pooling()
    for frame in every(0.25, 0.0, 2.5):
        pool.add(frame)
    *partial, session = pool.finish()
    assert spans(partial) == [(1.0, 2.0, 2.5), (10.0, 0.0, 2.5)]
    assert partial[0].coverage == pytest.approx(0.5)
    assert (session.kind, session.length_seconds, session.hop_seconds) == ("session", 2.5, 0.0)
    assert session.coverage == pytest.approx(1.0)


def test_a_session_that_ends_on_a_hop_has_no_partial_window():
    """Three whole seconds give the windows of the third hop, once."""
    pool = pooling()
    for frame in every(0.25, 0.0, 3.0):
        pool.add(frame)
    assert spans(pool.finish()[:-1]) == [(1.0, 2.0, 3.0), (10.0, 0.0, 3.0)]


@pytest.mark.parametrize(("period", "expected"), [(0.25, 0.25), (None, 0.5), (9.0, 2.0)])
def test_the_last_frame_stands_for_a_period(period: float | None, expected: float):
    """One frame lasts for the sampling period, else its own duration, and no longer than a hold."""
    pool = pooling(period)
    pool.add(frame_score(1.0, 33.0))
    session = pool.finish()[-1]
    assert session.length_seconds == pytest.approx(expected)
    assert session.score == pytest.approx(33.0)


def test_a_session_without_frames_pools_to_nothing():
    """No frame gives one session with None for every value, never NaN and never an error."""
    pool = pooling()
    (session,) = pool.finish()
    assert session.score is None
    assert set(session.pool.values()) == {None}
    assert not session.valid


def test_a_frame_that_is_not_later_is_left_out():
    """A second frame at the same time neither counts nor moves a window."""
    pool = pooling()
    pool.add(frame_score(0.0, 20.0))
    assert pool.add(frame_score(0.0, 90.0)) == []
    session = pool.finish()[-1]
    assert (session.num_frames, session.score) == (1, pytest.approx(20.0))


def test_headlines_differ_for_alerts_and_for_the_session():
    """Sliding windows lead with the moving average, the session with hysteresis."""
    pool = pooling()
    windows = [w for f in every(0.25, 0.0, 2.0, 64.0) for w in pool.add(f)] + pool.finish()
    assert {w.headline for w in windows[:-1]} == {"ewma"}
    assert windows[-1].headline == "hysteresis"
    assert all(w.score == pytest.approx(64.0) for w in windows)


def test_a_jump_of_the_clock_clears_what_was_remembered():
    """After a jump the average and the hysteresis start anew: bad times before do not colour it."""
    frames = [*every(0.25, 0.0, 5.0, 10.0), frame_score(5.0, 90.0, jump=True)]
    frames += every(0.25, 5.25, 10.25, 90.0)
    pool = pooling()
    for frame in frames:
        pool.add(frame)
    session = pool.finish()[-1]
    assert session.pool["ewma"] == pytest.approx(90.0)
    assert session.pool["hysteresis"] == pytest.approx((5 * 10 + 5.25 * 90) / 10.25)


def test_memory_is_bounded_by_the_longest_window():
    """After 2000 s at 10 frames a second, about one longest window of holds is kept."""
    pool = pooling(0.1)
    for frame in every(0.1, 0.0, 2000.0):
        pool.add(frame)
    assert len(pool._recent) <= (max(LENGTHS) + SETTINGS.hop_seconds) * 10 + 1


def test_no_windows_asked_for_gives_the_session_alone():
    """With no window lengths, only ``finish`` returns something."""
    settings = PoolingSettings(windows_seconds=())
    pool = TemporalPooling(settings, stream="cam1", period_seconds=0.25)
    assert [w for f in every(0.25, 0.0, 4.0) for w in pool.add(f)] == []
    assert [w.kind for w in pool.finish()] == ["session"]
