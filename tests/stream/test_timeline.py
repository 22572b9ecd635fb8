"""Timeline: the law of increasing time, and each repair."""

from __future__ import annotations

import itertools
import math
import sys

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from dgiqa_stream.sources._timeline import MPEG_WRAP_SECONDS, Timeline

STAMPS = st.one_of(st.none(), st.floats(), st.floats(-100, 100), st.sampled_from([0.0, 0.04]))


def placed(stamps, **settings):
    """Times of stamps, and whether each jumped."""
    timeline = Timeline(frame_seconds=0.04, **settings)
    pairs = [timeline.place(s) for s in stamps]
    return [t for t, _ in pairs], [j for _, j in pairs]


@given(
    st.lists(st.tuples(STAMPS, STAMPS), min_size=1),
    st.one_of(st.none(), st.floats()),
    st.sampled_from([None, MPEG_WRAP_SECONDS]),
)
@example([(None, None)] * 3, sys.float_info.max / 2, None)
@example([(sys.float_info.max, None), (None, None)], None, None)
@example([(sys.float_info.max, None), (-sys.float_info.max, None)], None, MPEG_WRAP_SECONDS)
def test_time_always_increases(stamps, frame_seconds, wrap_seconds):
    """Whatever the stamps say, times are finite and each is later than the one before."""
    timeline = Timeline(frame_seconds=frame_seconds, wrap_seconds=wrap_seconds)
    times = [timeline.place(pts, dts_seconds=dts)[0] for pts, dts in stamps]
    assert all(math.isfinite(t) for t in times)
    assert all(b > a for a, b in itertools.pairwise(times))


@given(st.floats(-1e4, 1e6), st.lists(st.floats(0.002, 9.0), max_size=50))
def test_good_stamps_are_kept(begin, steps):
    """Increasing stamps without large gaps come out as they went in, start included."""
    stamps = list(itertools.accumulate(steps, initial=begin))
    times, jumps = placed(stamps)
    assert times == stamps
    assert not any(jumps)


def test_missing_stamps_are_extrapolated():
    """Frames without a stamp follow at the nominal distance; known stamps then count again."""
    times, jumps = placed([5.0, None, None, 5.12])
    assert times == pytest.approx([5.0, 5.04, 5.08, 5.12])
    assert not any(jumps)


def test_the_first_stamp_is_no_jump():
    """Where the first frames have no stamp, the first one only says where the clock is."""
    times, jumps = placed([None, None, 3600.0, 3600.04, 7200.0])
    assert times == pytest.approx([0.0, 0.04, 0.08, 0.12, 0.16])
    assert jumps == [False] * 4 + [True]


def test_decoding_stamps_stand_in():
    """A stream that has decoding stamps only is placed by them."""
    timeline = Timeline(frame_seconds=0.04)
    times = [timeline.place(None, dts_seconds=s)[0] for s in (3.0, 3.5, 4.0)]
    assert times == [3.0, 3.5, 4.0]


def test_decoding_stamps_do_not_mix():
    """Once a presentation stamp was seen, a missing one is extrapolated."""
    timeline = Timeline(frame_seconds=0.04)
    timeline.place(3.0, dts_seconds=2.9)
    assert timeline.place(None, dts_seconds=2.94)[0] == pytest.approx(3.04)


def test_stamps_out_of_order_give_way_to_decoding_stamps():
    """Where made-up presentation stamps step back and decoding stamps do not, time is even again
    from there on, without a jump; H.264 in AVI comes so.
    """
    pts = [2, 3, 5, 4, 6, 9, 8, 10, 7, 13, 12, 14]
    timeline = Timeline(frame_seconds=0.04)
    placed = [timeline.place(p * 0.04, dts_seconds=(3 + i) * 0.04) for i, p in enumerate(pts)]
    assert not any(jumped for _, jumped in placed)
    expected = [2, 3, 5, *range(6, 15)]
    assert [time for time, _ in placed] == pytest.approx([n * 0.04 for n in expected])


def test_both_stamps_jumping_is_no_disorder():
    """A clock that starts again takes both kinds with it: presentation stamps still count."""
    timeline = Timeline(frame_seconds=0.04)
    stamps = [100.0, 100.04, 100.08, 0.0, 0.04, 0.10, 0.12]
    placed = [timeline.place(s, dts_seconds=s - 0.08) for s in stamps]
    assert [jumped for _, jumped in placed] == [False] * 3 + [True] + [False] * 3
    steps = [b - a for (a, _), (b, _) in itertools.pairwise(placed)]
    assert steps == pytest.approx([0.04, 0.04, 0.04, 0.04, 0.06, 0.02])


@pytest.mark.parametrize("jump", [-3600.0, -0.5, 10.5, 1e6])
def test_a_jump_is_made_continuous_and_flagged(jump):
    """After a jump time goes on one frame later, and then at the stream's own pace."""
    stamps = [1.0, 1.04, 1.04 + jump, 1.08 + jump, 1.16 + jump]
    times, jumps = placed(stamps)
    assert times == pytest.approx([1.0, 1.04, 1.08, 1.12, 1.20])
    assert jumps == [False, False, True, False, False]


def test_jitter_of_reordered_frames_is_no_jump():
    """A duplicate and a step back of some frames change the order of time by next to nothing."""
    times, jumps = placed([0.0, 0.04, 0.04, 0.02, 0.08, 0.12])
    assert not any(jumps)
    assert times[4:] == [0.08, 0.12]
    assert times[2] == pytest.approx(0.04, abs=0.003)


def test_a_clock_that_stands_still_is_no_clock():
    """When every stamp is the same, frames end up at the nominal distance."""
    times, _ = placed([0.0] * 100)
    assert times[-1] - times[-11] == pytest.approx(0.4)


def test_the_mpeg_clock_wraps_without_a_jump():
    """After 26.5 hours the 33-bit clock starts again; time goes on, reordered frames included."""
    stamps = [
        MPEG_WRAP_SECONDS - 0.08,
        MPEG_WRAP_SECONDS - 0.04,
        0.0,
        MPEG_WRAP_SECONDS - 0.01,
        0.04,
    ]
    times, jumps = placed(stamps, wrap_seconds=MPEG_WRAP_SECONDS)
    assert not any(jumps)
    assert times[0] == pytest.approx(MPEG_WRAP_SECONDS - 0.08)
    assert times[-1] - times[0] == pytest.approx(0.12)


def test_slow_slides_are_no_jumps():
    """A picture each 15 seconds, as the header says, is not a discontinuity."""
    timeline = Timeline(frame_seconds=15.0)
    assert [timeline.place(t) for t in (0.0, 15.0, 30.0)] == [
        (0.0, False),
        (15.0, False),
        (30.0, False),
    ]
