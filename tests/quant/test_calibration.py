"""The calibration set: real, dark, bright, noisy and letterboxed pictures."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest

from dgiqa_stream.types import Planes
from quant.calibration import CalibrationConfig, calibration_set, letterboxed, synthetic

CONFIG = CalibrationConfig(num_rated=4, num_degraded=3, num_noise=2, num_letterboxed=1, seed=1)


def grey(level: int) -> Planes:
    """A 4:2:0 picture of one level of luma."""
    shapes = (96, 128), (48, 64), (48, 64)
    values = level, 128, 128
    samples = tuple(np.full(s, v, np.uint8) for s, v in zip(shapes, values, strict=True))
    return Planes(samples, full_range=True)


RATED, DEGRADED = [grey(20 + i) for i in range(10)], [grey(120 + i) for i in range(10)]


def test_it_has_what_was_asked_for(specs):
    """4 rated, 3 degraded, 1 letterboxed, black, white and 2 of noise make 12 batches of one."""
    batches = calibration_set(CONFIG, specs, rated=RATED, degraded=DEGRADED)
    assert len(batches) == 12
    for batch in batches:
        assert {n: (v.shape, v.dtype) for n, v in batch.items()} == {
            v.name: ((1, *v.shape), np.uint8) for v in specs
        }
    levels = [int(b["whole"][0, 32, 32, 1]) for b in batches[:7]]
    assert all(20 <= level < 30 for level in levels[:4])
    assert all(120 <= level < 130 for level in levels[4:])
    assert len(set(levels)) == 7  # no picture twice


def test_a_seed_repeats_the_draw(specs):
    """One seed draws one set, another seed another."""

    def drawn(seed):
        config = CalibrationConfig(num_rated=3, num_degraded=3, seed=seed)
        found = calibration_set(config, specs, rated=RATED, degraded=DEGRADED)
        return np.concatenate([b["whole"] for b in found])

    np.testing.assert_array_equal(drawn(1), drawn(1))
    assert not np.array_equal(drawn(1), drawn(2))


def test_black_and_white_are_the_ends_of_the_range(specs):
    """The first two synthetic batches are all 0 and all 255; noise has both in every view."""
    black, white, *noise = synthetic(CONFIG, specs)
    for view in specs:
        assert black[view.name].max() == 0
        assert white[view.name].min() == 255
    assert [b["fragments"].min() for b in noise] == [0, 0]
    assert [b["fragments"].max() for b in noise] == [255, 255]


def test_bars_are_black_and_the_middle_stays():
    """Letterboxing blackens the upper and lower eighth of a copy."""
    picture = grey(99)
    boxed = letterboxed(picture)
    luma, cb, _ = boxed.samples
    assert not luma[:12].any()
    assert not luma[-12:].any()
    assert (luma[12:-12] == 99).all()
    assert (cb == 128).all()
    assert (picture.samples[0] == 99).all()


@pytest.mark.parametrize(("rated", "degraded"), [([], DEGRADED), (RATED, []), ([], [])])
def test_a_set_without_real_pictures_is_refused(specs, rated, degraded):
    """Ranges of synthetic pictures alone would be wrong: the error says what is missing."""
    with pytest.raises(ValueError, match=f"got {len(rated)} rated, {len(degraded)} degraded"):
        calibration_set(CONFIG, specs, rated=rated, degraded=degraded)


def test_compressing_tells_nobody():
    """Importing the package switches ONNX Runtime's telemetry off, unless the user switched it."""
    words = [sys.executable, "-c", "import os, quant; print(os.environ['ORT_DISABLE_TELEMETRY'])"]
    kept = {k: v for k, v in os.environ.items() if k != "ORT_DISABLE_TELEMETRY"}
    for environment, told in ((kept, "1"), (kept | {"ORT_DISABLE_TELEMETRY": "0"}, "0")):
        done = subprocess.run(words, env=environment, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == told
