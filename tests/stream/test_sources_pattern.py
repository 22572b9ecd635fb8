"""sources.pattern and the helpers that sources share."""

from __future__ import annotations

import itertools
import logging
import threading
import time
from fractions import Fraction

import numpy as np
import pytest

from dgiqa_stream.config import SourceSettings
from dgiqa_stream.errors import SourceUnsupported
from dgiqa_stream.sources import open_source
from dgiqa_stream.sources._faults import ErrorFlood
from dgiqa_stream.sources.pattern import PatternSource, PatternSpec


def frames_of(url, **settings):
    """All frames of a pattern."""
    return list(open_source(url, SourceSettings(**settings), stream="p").frames())


def test_url_says_it_all():
    """Size, rate, length and start come from the URL."""
    frames = frames_of("pattern:clean?size=322x181&fps=30000/1001&seconds=1&begin=7.2")
    assert len(frames) == 30
    assert {f.planes.size for f in frames} == {(181, 322)}
    assert frames[0].info.pts_seconds == pytest.approx(7.2)
    steps = np.diff([f.info.pts_seconds for f in frames])
    assert steps == pytest.approx(1001 / 30000, abs=2e-5)


@pytest.mark.parametrize("defect", ["clean", "blurred", "noisy", "blocky"])
def test_the_same_url_gives_the_same_samples(defect):
    """A pattern repeats itself sample for sample, and moves."""
    url = f"pattern:{defect}?size=160x96&seconds=0.4"
    first, second = frames_of(url), frames_of(url)
    for a, b in zip(first, second, strict=True):
        for x, y in zip(a.planes.samples, b.planes.samples, strict=True):
            np.testing.assert_array_equal(x, y)
    assert (first[0].planes.samples[0] != first[-1].planes.samples[0]).any()


def test_defects_are_what_they_are_called():
    """Blur removes fine detail, noise adds it, blocking puts steps on the 8-pixel grid."""
    luma = {
        d: frames_of(f"pattern:{d}?seconds=0.04")[0].planes.samples[0].astype(float)
        for d in ("clean", "blurred", "noisy", "blocky")
    }
    detail = {d: np.abs(np.diff(x, 2, axis=1)).mean() for d, x in luma.items()}
    assert detail["blurred"] < 0.5 * detail["clean"]
    assert detail["noisy"] > 2 * detail["clean"]
    steps = np.abs(np.diff(luma["blocky"], axis=1)).mean(axis=0)
    assert steps[7::8].mean() > 2 * np.delete(steps, np.s_[7::8]).mean()


def test_variable_rate_leaves_frames_out():
    """With vfr=1 about a third of the frames are missing and times stay on the grid."""
    frames = frames_of("pattern:clean?size=64x64&seconds=8&vfr=1")
    stamps = [f.info.pts_seconds * 25 for f in frames]
    assert 110 < len(frames) < 160
    assert stamps == pytest.approx(np.round(stamps), abs=1e-3)
    assert all(b > a for a, b in itertools.pairwise(stamps))


def test_settings_apply():
    """Start and length cut a stretch out; realtime paces it and makes it live."""
    frames = frames_of("pattern:clean?size=64x64", start_seconds=0.4, duration_seconds=0.2)
    assert [f.info.pts_seconds for f in frames] == pytest.approx([0.4, 0.44, 0.48, 0.52, 0.56])
    assert [f.info.index for f in frames] == [0, 1, 2, 3, 4]
    begin = time.monotonic()
    frames_of("pattern:clean?size=64x64&seconds=0.3", realtime=True)
    assert 0.2 < time.monotonic() - begin < 3.0
    assert open_source("pattern:clean", SourceSettings(realtime=True), stream="p").info.is_live


def test_close_ends_it():
    """A closed pattern gives no more frames, even while it waits for the next one's time."""
    source = PatternSource(PatternSpec(fps=Fraction(1, 60), seconds=600.0), realtime=True)
    frames = source.frames()
    next(frames)
    threading.Timer(0.1, source.close).start()
    begin = time.monotonic()
    assert len(list(frames)) <= 1
    assert time.monotonic() - begin < 30.0  # the next frame is due after 60


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("pattern:wavy", "'wavy' is not one of clean, blurred"),
        ("pattern:clean?colour=red", "unknown key 'colour'; known here: size"),
        ("pattern:clean?size=8x8", "16..8192"),
        ("pattern:clean?size=8", "size=8"),
        ("pattern:clean?fps=0", "cannot be"),
        ("pattern:clean?fps=1/0", "fps=1/0"),
    ],
)
def test_wrong_patterns_say_why(url, words):
    """A wrong defect, key or value is named."""
    with pytest.raises(SourceUnsupported) as caught:
        frames_of(url)
    assert words in str(caught.value)


def test_a_flood_is_one_line_a_second(caplog):
    """Thousands of errors in three seconds give a handful of lines that count them all."""
    now = [100.0]
    flood = ErrorFlood(logging.getLogger("test.flood"), "decode", clock=lambda: now[0])
    with caplog.at_level(logging.WARNING, "test.flood"):
        for _ in range(3000):
            now[0] += 0.001
            flood.add("invalid NAL in rtsp://admin:hunter2@cam/live")
        flood.flush()
    assert len(caplog.records) <= 5
    assert sum(int(r.getMessage().split()[1]) for r in caplog.records) == 3000
    assert "hunter2" not in caplog.text
