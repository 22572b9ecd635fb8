"""sampler: laws of how many frames are taken, and which."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dgiqa_stream.config import SamplerSettings
from dgiqa_stream.sampler import make_sampler
from dgiqa_stream.types import FrameInfo

RATES = [24, 25, 30000 / 1001, 50, 60]


def infos(stamps, duration_seconds=0.0):
    """Frame infos at the given times."""
    return [
        FrameInfo(
            index=i,
            pts_seconds=float(t),
            duration_seconds=duration_seconds,
            pts=None,
            time_base=None,
            width=16,
            height=16,
            pix_fmt="gray",
            keyframe=i % 12 == 0,
        )
        for i, t in enumerate(stamps)
    ]


def constant_rate(rate, begin, seconds):
    """Times at a constant rate, in milliseconds as many containers round them."""
    count = int(np.ceil(seconds * rate - 1e-9))
    return [round(begin + i / rate, 3) for i in range(count)]


def taken(frames, **settings):
    """Times of the frames that the sampler wants."""
    sampler = make_sampler(SamplerSettings(**settings))
    return [f.pts_seconds for f in frames if sampler.wants(f)]


@pytest.mark.parametrize("says_duration", [True, False])
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("jitter", [True, False])
@pytest.mark.parametrize("begin", [0.0, 7.2])
@pytest.mark.parametrize("rate", RATES)
def test_one_frame_per_period(rate, begin, jitter, seed, says_duration):
    """Ten seconds sampled at 2/s give twenty frames, one in each half second."""
    duration_seconds = 1 / rate if says_duration else 0.0
    frames = infos(constant_rate(rate, begin, 10.0), duration_seconds)
    times = taken(frames, frames_per_second=2.0, jitter=jitter, seed=seed)
    periods = [int((t - begin) / 0.5 + 1e-6) for t in times]
    assert periods == list(range(20))


@given(
    st.lists(st.floats(0.001, 0.4), min_size=1, max_size=200),
    st.integers(0, 1000),
)
def test_variable_rate_loses_at_most_the_last_period(steps, seed):
    """With a frame in every period, any frame rate gives one frame per period, the end aside."""
    stamps = list(itertools.accumulate(steps, initial=3.0))
    times = taken(infos(stamps), frames_per_second=2.0, seed=seed)
    periods = int((stamps[-1] - 3.0) / 0.5) + 1
    assert periods - 1 <= len(times) <= periods


@given(
    st.lists(st.floats(0.001, 3.0), min_size=1, max_size=100),
    st.integers(0, 1000),
)
def test_never_faster_than_asked(steps, seed):
    """At no moment have more frames been taken than periods have begun, gaps or not."""
    stamps = list(itertools.accumulate(steps, initial=0.0))
    frames = [infos([t], step)[0] for t, step in zip(stamps, [*steps, 0.04], strict=True)]
    times = taken(frames, frames_per_second=2.0, seed=seed)
    assert all(count <= int(t / 0.5 + 1e-6) for count, t in enumerate(times))
    assert len(times) >= len({int(t / 0.5 + 1e-6) for t in stamps}) - 1


@pytest.mark.parametrize("rate", [0.1, 1, 1.9, 4.9])
@pytest.mark.parametrize("jitter", [True, False])
def test_scarce_frames_are_all_taken_once(rate, jitter):
    """A stream with fewer frames than periods has every frame scored, none twice."""
    frames = infos([i / rate for i in range(50)])
    assert len(taken(frames, frames_per_second=5.0, jitter=jitter)) == 50


def test_a_single_frame_is_taken():
    """A still picture is scored whatever the seed."""
    for seed in range(50):
        assert len(taken(infos([0.0]), frames_per_second=5.0, seed=seed)) == 1


def test_jitter_reaches_every_place_of_a_period():
    """Over many periods each of the five frames of a period is taken about equally often."""
    frames = infos(constant_rate(25, 0.0, 400.0), 0.04)
    times = taken(frames, frames_per_second=5.0)
    places = np.bincount([round(t / 0.04) % 5 for t in times], minlength=5) / len(times)
    assert len(times) == 2000
    assert places.min() > 0.12
    assert places.max() < 0.30


def test_a_seed_repeats_itself():
    """The same seed takes the same frames, another seed others."""
    frames = infos(constant_rate(50, 0.0, 10.0), 0.02)
    assert taken(frames, seed=3) == taken(frames, seed=3)
    assert taken(frames, seed=3) != taken(frames, seed=4)


def test_a_gap_is_not_made_up_for():
    """After a gap of thirty seconds sampling goes on at its rate, without a burst."""
    stamps = [*constant_rate(25, 0.0, 2.0), *constant_rate(25, 32.0, 2.0)]
    times = taken(infos(stamps, 0.04), frames_per_second=2.0)
    assert 8 <= len(times) <= 9


def test_time_that_begins_again_is_sampled_again():
    """A clock that starts anew, as after a reconnect, is sampled from its start."""
    frames = infos([*constant_rate(25, 100.0, 2.0), *constant_rate(25, 0.0, 2.0)], 0.04)
    assert len(taken(frames, frames_per_second=2.0)) == 8


@pytest.mark.parametrize("every", [1, 2, 3, 8])
def test_every_takes_each_nth(every):
    """A stride of N takes frames 0, N, 2N; even strides are labelled biased."""
    sampler = make_sampler(SamplerSettings(mode="every", every=every))
    frames = infos(constant_rate(25, 0.0, 2.0))
    assert [f.index for f in frames if sampler.wants(f)] == list(range(0, 50, every))
    assert sampler.biased == (every in (2, 8))
    assert sampler.period_seconds is None


def test_keyframes_are_biased():
    """Key frames only: each of them, and labelled as not standing for the rest."""
    sampler = make_sampler(SamplerSettings(mode="keyframes"))
    frames = infos(constant_rate(25, 0.0, 2.0))
    assert [f.index for f in frames if sampler.wants(f)] == [0, 12, 24, 36, 48]
    assert sampler.biased
    assert not make_sampler(SamplerSettings()).biased
