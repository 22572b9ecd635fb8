"""The shipped models' scores of small drawn pictures are those that were released."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest

from dgiqa_stream.manifest import load_model
from dgiqa_stream.scorer import load_scorer

GOLDEN = Path(__file__).parents[1] / "golden" / "pictures"
TOLERANCE = {
    "student": 1.0,  # CPUs without VNNI saturate pairs of 8-bit products, others do not
    "student-fp32": 0.05,  # float32 sums in another order
    "student-xs": 1.0,
    "student-xs-fp32": 0.05,
}


def read(path):
    """A picture's pixels, uint8 RGB."""
    return np.ascontiguousarray(cv2.imread(str(path))[..., ::-1])


@pytest.fixture(scope="module")
def golden():
    """What was written when the models were released."""
    return json.loads((GOLDEN / "scores.json").read_text())["models"]


@pytest.mark.parametrize("name", TOLERANCE)
def test_scores_are_those_of_the_release(golden, name):
    """Each picture scores what it did, and the scores are of the version that ships."""
    assert load_model(name).manifest.version == golden[name]["version"]
    pictures = sorted(GOLDEN.glob("*.png"))
    assert {p.stem for p in pictures} == set(golden[name]["scores"])
    with load_scorer(name, device="cpu") as scorer:
        found = {p.stem: scorer.score(read(p)) for p in pictures}
    assert found == pytest.approx(golden[name]["scores"], abs=TOLERANCE[name])


def test_the_golden_scores_differ(golden):
    """They span the scale: a model that says one number would not pass."""
    scores = golden["student"]["scores"]
    assert scores["scene-1"] - scores["scene-1-noise"] > 10
    assert max(scores.values()) - min(scores.values()) > 30
