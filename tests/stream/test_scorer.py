"""scorer: arrays in, scores out; one scorer may serve many threads."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from dgiqa_stream.config import ModelSettings
from dgiqa_stream.errors import ConfigError, ModelError
from dgiqa_stream.scorer import load_scorer, planes_of_rgb, scorer_of
from dgiqa_stream.sources.pattern import PatternSource, PatternSpec
from dgiqa_stream.types import Crop

SIZES = [(1, 1), (1, 50), (7, 5), (48, 64), (241, 427), (1500, 9)]


@pytest.fixture(scope="module")
def exact():
    """The shipped model in single precision, on the CPU."""
    with load_scorer("student-fp32", device="cpu") as scorer:
        yield scorer


def noise(height, width, seed=0):
    """A picture of noise."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("model", ["student", "student-fp32"])
def test_every_size_has_a_score(model):
    """From one pixel to a tall strip, a picture's score is a float within 0 to 100."""
    with load_scorer(model) as scorer:
        for height, width in SIZES:
            for value in (
                scorer.score(noise(height, width)),
                scorer.score(np.zeros((4, 4, 3), "B")),
            ):
                assert isinstance(value, float)
                assert 0.0 <= value <= 100.0


@pytest.mark.parametrize("defect", ["blurred", "noisy", "blocky"])
def test_a_defect_lowers_the_score(exact, defect):
    """The same scene scores lower blurred, noisy or blocky than clean, by five points at least."""
    scenes = {
        name: [f.planes for f in PatternSource(PatternSpec(name, fps=5, seconds=0.6)).frames()]
        for name in ("clean", defect)
    }
    clean, worse = (np.mean([p.score for p in exact.predict(s)]) for s in scenes.values())
    assert worse < clean - 5


def test_a_batch_is_its_pictures(exact):
    """Eleven pictures of mixed sizes, more than fit one inference, score as they do alone, in
    order; float32 sums may be grouped otherwise, which moves a score of 0..100 by less than 1e-3.
    """
    pictures = [noise(20 + 13 * n, 90 - 7 * n, seed=n) for n in range(11)]
    together = exact.score_batch(pictures)
    assert together == pytest.approx([exact.score(p) for p in pictures], abs=1e-3)
    assert len(set(together)) == 11
    assert exact.score_batch([]) == []


def test_only_the_samples_matter(exact):
    """A mirrored view, a column-major copy and a read-only one score as their plain copies do."""
    picture = noise(60, 80)
    mirrored = picture[:, ::-1]
    bgr = picture[..., ::-1]
    frozen = picture.copy()
    frozen.flags.writeable = False
    assert exact.score(mirrored) == exact.score(np.ascontiguousarray(mirrored))
    assert exact.score(bgr) == exact.score(np.ascontiguousarray(bgr))
    assert exact.score(np.asfortranarray(picture)) == exact.score(picture) == exact.score(frozen)


def test_a_picture_scores_the_same_again(exact):
    """Two calls with one picture give one number, and leave the picture as it was."""
    picture = noise(50, 70)
    before = picture.copy()
    assert exact.score(picture) == exact.score(picture)
    assert np.array_equal(picture, before)


@pytest.mark.parametrize(
    "picture",
    [
        np.zeros((8, 8), np.uint8),
        np.zeros((8, 8, 4), np.uint8),
        np.zeros((8, 8, 1), np.uint8),
        np.zeros((2, 8, 8, 3), np.uint8),
        np.zeros((8, 8, 3), np.float32),
        np.zeros((8, 8, 3), np.uint16),
        np.zeros((8, 8, 3), np.int8),
        np.zeros((8, 8, 3), bool),
        np.zeros((0, 8, 3), np.uint8),
        [[[0, 0, 0]]],
        "picture.png",
        None,
    ],
    ids=lambda p: f"{getattr(p, 'dtype', p)}{getattr(p, 'shape', '')}",
)
def test_what_is_no_picture_is_refused(exact, picture):
    """Anything but uint8 (H, W, 3) is a ValueError that says what it is and what it should be."""
    with pytest.raises(ValueError, match=r"must be uint8 \(H, W, 3\) RGB, not "):
        exact.score(picture)


def test_a_bad_picture_in_a_batch_is_refused(exact):
    """One picture of the wrong kind is a ValueError for the whole batch."""
    with pytest.raises(ValueError, match="must be uint8"):
        exact.score_batch([noise(8, 8), noise(8, 8).astype(float)])


def test_a_crop_is_the_picture_that_was_cut(exact):
    """Scoring a rectangle equals scoring the array sliced to it."""
    picture = noise(120, 160)
    cropped = exact.predict([planes_of_rgb(picture)], crop=Crop(20, 10, 100, 80))
    assert cropped == exact.predict([planes_of_rgb(picture[10:90, 20:120])])


def test_a_crop_outside_is_refused(exact):
    """A rectangle beyond the picture is a ValueError with both sizes."""
    with pytest.raises(ValueError, match=r"crop 500,0,40,40 .* 160x120"):
        exact.predict([planes_of_rgb(noise(120, 160))], crop=Crop(500, 0, 40, 40))


def test_threads_share_a_scorer(exact):
    """Four threads on one scorer get exactly what one thread gets."""
    pictures = [noise(40, 60, seed) for seed in range(12)]
    alone = [exact.score(p) for p in pictures]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(exact.score, pictures)) == alone


def test_the_raw_output_maps_to_the_score(exact):
    """A prediction's score is the manifest's mapping of its raw output."""
    (found,) = exact.predict([planes_of_rgb(noise(30, 30))])
    assert found.score == exact.manifest.output.mapping(found.raw)


def test_settings_choose_model_and_backend():
    """The configuration's model, backend and device are those that run."""
    with scorer_of(ModelSettings(name="student-fp32", backend="fake")) as scorer:
        assert scorer.manifest.precision == "fp32"
        assert scorer.status.active == "fake:cpu"
    with pytest.raises(ConfigError, match="'tpu'"):
        scorer_of(ModelSettings(device="tpu"))
    with pytest.raises(ModelError, match="'absent'"):
        load_scorer("absent")
    with pytest.raises(ConfigError, match="'absent'"):
        load_scorer(backend="absent")


def test_a_closed_scorer_says_so():
    """Scoring after the block is a ModelError, not a crash of the engine."""
    with load_scorer() as scorer:
        scorer.score(noise(8, 8))
    with pytest.raises(ModelError, match="closed"):
        scorer.score(noise(8, 8))


def test_the_first_score_comes_soon(plain_environment):
    """A fresh process imports, loads the model and scores a small picture in five seconds of CPU:
    unlike the clock's, they are as many on a busy machine.
    """
    code = (
        "import time, numpy, dgiqa_stream\n"
        "scorer = dgiqa_stream.load_scorer()\n"
        "print(scorer.score(numpy.zeros((90, 160, 3), numpy.uint8)), time.process_time())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, check=True, env=plain_environment
    )
    score, seconds = map(float, done.stdout.split())
    assert 0.0 <= score <= 100.0
    assert seconds < 5.0
