"""Figures of a model: agreement with people and order on ladders, through the runtime's scorer."""

from __future__ import annotations

import json

import cv2
import numpy as np
import pytest

from dgiqa_stream.preprocess import reduced_rgb
from dgiqa_stream.scorer import Prediction
from distill.data.degrade import encode, pan
from distill.evaluate import (
    agreement,
    difference,
    evaluate_ladders,
    held_out_contents,
    provenance,
    score_rated,
)


class Sharpness:
    """A scorer that takes the detail of a picture for its quality."""

    def predict(self, pictures):
        """The mean absolute Laplacian of each picture's luma, at most 100."""
        grey = [cv2.cvtColor(reduced_rgb(p, longest_px=4096), cv2.COLOR_RGB2GRAY) for p in pictures]
        detail = [float(np.abs(cv2.Laplacian(g, cv2.CV_32F)).mean()) for g in grey]
        return [Prediction(min(d, 100.0), d / 100) for d in detail]


@pytest.fixture(scope="module")
def pristine(contents, make_picture, tmp_path_factory):
    """A clean picture of each split, as lossless WebP."""
    folder = tmp_path_factory.mktemp("pristine")
    for i, name in enumerate([*contents("train", 1), *contents("validation", 1), "clic_1"]):
        picture = cv2.cvtColor(make_picture(i, 120, 151), cv2.COLOR_RGB2BGR)
        assert cv2.imwrite(str(folder / f"{name}.webp"), picture, [cv2.IMWRITE_WEBP_QUALITY, 101])
    return folder


def write_clip(path, rgb, num_frames):
    """A pan over a picture as H.264."""
    path.write_bytes(encode(list(pan(rgb, num_frames=num_frames)), "libx264", 10))


@pytest.fixture(scope="module")
def clips(make_picture, tmp_path_factory):
    """One clip of 14 frames: too few for twelve from its middle on."""
    folder = tmp_path_factory.mktemp("clips")
    write_clip(folder / "street.mp4", make_picture(9, 120, 150), 14)
    return folder


def test_only_contents_that_took_no_part_are_held_out(pristine, clips):
    """Of the clean pictures the test split's alone is used, beside every clip; 12 frames each."""
    found = {c.name: c.frames for c in held_out_contents(pristine, clips)}
    assert set(found) == {"clic_1", "street"}
    for frames in found.values():
        assert len(frames) == 12
        assert all(f.shape == frames[0].shape for f in frames)
        assert not np.array_equal(frames[0], frames[-1])


def test_ladders_of_a_sharpness_measure(pristine, clips):
    """A measure of detail falls at every step of blur, and noise, which adds detail, fools it."""
    found = evaluate_ladders(Sharpness(), pristine, clips)
    assert found["ladders"]["blur"]["share_falling"] == 1.0
    assert found["ladders"]["blur"]["mean_drop_points"] > 1
    assert found["ladders"]["noise"]["share_falling"] < 0.5
    assert {name: r["num_contents"] for name, r in found["ladders"].items()} == {
        "h264": 2,
        "blur": 2,
        "noise": 2,
    }
    for name, levels in found["levels"].items():
        assert found["ladders"][name]["num_steps"] == 2 * (len(levels) - 1)
        assert all(len(scores[name]) == len(levels) for scores in found["scores"].values())
    json.dumps(found, allow_nan=False)


def test_without_held_out_contents_there_is_an_error(tmp_path):
    """Empty folders are an error that names both kinds of file."""
    with pytest.raises(FileNotFoundError, match=r"clic_\*\.webp.*\*\.mp4"):
        evaluate_ladders(Sharpness(), tmp_path, tmp_path)


def test_a_clip_that_is_too_short_is_named(make_picture, tmp_path):
    """A clip of five frames is refused by name with both counts."""
    write_clip(tmp_path / "short.mp4", make_picture(1, 100, 100), 5)
    with pytest.raises(ValueError, match=r"short\.mp4 has 5 frames.*12"):
        list(held_out_contents(tmp_path, tmp_path))


def test_perfect_agreement():
    """Scores equal to MOS have SRCC, PLCC and KRCC of 1, with an interval of nothing, RMSE 0."""
    mos = np.linspace(5, 95, 40)
    found = agreement(mos.copy(), mos)
    assert found == {
        "num_pictures": 40,
        "srcc": 1.0,
        "srcc_interval_95": [1.0, 1.0],
        "plcc": 1.0,
        "krcc": 1.0,
        "rmse_points": 0.0,
    }


def test_the_interval_holds_the_value_and_shrinks():
    """The bootstrap interval surrounds the SRCC, and 16 times the pictures make it about 4 times
    narrower (2 to 8).
    """
    rng = np.random.default_rng(1)

    def interval(number):
        mos = rng.uniform(0, 100, number)
        found = agreement(mos + rng.normal(0, 25, number), mos)
        low, high = found["srcc_interval_95"]
        assert low < found["srcc"] < high
        return high - low

    assert 2 < interval(60) / interval(960) < 8


def test_few_pictures_give_figures_not_nan():
    """With three pictures some draws hold one value alone; the interval is of the others."""
    found = agreement(np.array([1.0, 3.0, 2.0]), np.array([10.0, 20.0, 30.0]))
    json.dumps(found, allow_nan=False)


def test_differences_are_in_points():
    """A constant shift of two points is 2 in the mean and at most, and keeps the ranking."""
    scores = np.linspace(0, 98, 50)
    assert difference(scores + 2, scores) == {
        "mean_points": 2.0,
        "p99_points": 2.0,
        "max_points": 2.0,
        "srcc": 1.0,
    }


def test_an_unknown_split_is_refused(tmp_path, make_picture):
    """A split that no picture is in is an error with the known ones, not an empty result."""
    (tmp_path / "Images").mkdir()
    for i in range(3):
        assert cv2.imwrite(str(tmp_path / "Images" / f"{i}.jpg"), make_picture(i, 64, 64))
    for table, rows in (("Train", "0.jpg,0.5\n1.jpg,0.6\n"), ("Test", "2.jpg,0.7\n")):
        (tmp_path / f"{table} (Images and MOS).csv").write_text("Image Name,MOS\n" + rows)
    with pytest.raises(ValueError, match="'tset': train, validation or test"):
        score_rated({}, tmp_path, split="tset", num_validation=1, seed=1)


def test_a_result_says_what_made_it():
    """Command, interpreter and the versions of what decides the numbers are in every result."""
    found = provenance("dgiqa-distill evaluate student")
    assert found["command"] == "dgiqa-distill evaluate student"
    assert found["packages"]["numpy"] == np.__version__
    assert {"av", "onnxruntime", "opencv-python-headless"} < set(found["packages"])
