"""manifest: the contract beside the weights, checked before any engine sees them."""

from __future__ import annotations

import hashlib
import json
import shutil
from itertools import pairwise

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dgiqa_stream.errors import ModelError
from dgiqa_stream.manifest import (
    DEFAULT_MODEL,
    HalfWidthMapping,
    ScoreMapping,
    load_model,
    manifest_path,
    read_manifest,
    shipped_models,
)


@pytest.fixture
def model(tmp_path):
    """A copy of the default model and its manifest, to be damaged."""
    shipped = load_model().path
    copy = tmp_path / "mine.onnx"
    shutil.copy(shipped, copy)
    shutil.copy(manifest_path(shipped), manifest_path(copy))
    return copy


def change(model, **fields):
    """Write other fields into a model's manifest."""
    path = manifest_path(model)
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def test_each_shipped_model_is_what_its_manifest_says():
    """Every model of the package passes its own check, and the default one is among them."""
    shipped = shipped_models()
    assert DEFAULT_MODEL in shipped
    for name, path in shipped.items():
        manifest = load_model(name).manifest
        content = path.read_bytes()
        assert manifest.sha256 == hashlib.sha256(content).hexdigest()
        assert manifest.size_bytes == len(content)


def test_a_model_may_be_named_or_given_as_a_file(model):
    """The shipped name and a copy's path load the same contract."""
    assert load_model(model).manifest == load_model(DEFAULT_MODEL).manifest
    assert load_model(str(model)).path == model


def test_another_file_under_the_same_manifest_is_refused(model):
    """One changed byte is a ModelError that names both digests."""
    content = bytearray(model.read_bytes())
    content[len(content) // 2] ^= 1
    model.write_bytes(content)
    said = load_model(DEFAULT_MODEL).manifest.sha256[:12]
    found = hashlib.sha256(content).hexdigest()[:12]
    with pytest.raises(ModelError, match=f"{found}.*{said}"):
        load_model(model)


def test_a_model_without_a_manifest_is_refused(model):
    """The message names the file that should lie beside the model."""
    manifest_path(model).unlink()
    with pytest.raises(ModelError, match=r"mine\.onnx has no manifest mine\.onnx\.json"):
        load_model(model)


@pytest.mark.parametrize("name", ["absent", "absent/x.onnx", "", ".", "a" * 5000])
def test_what_is_no_model_is_named(name):
    """A missing file, a folder, nothing and an impossible name are ModelErrors with the name."""
    with pytest.raises(ModelError, match=f"'{name[:20]}"):
        load_model(name)


def test_a_missing_model_tells_what_there_is():
    """The message lists the shipped models."""
    with pytest.raises(ModelError, match=DEFAULT_MODEL):
        load_model("studnet")


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "mine"),
        (b"{", "mine"),
        (b"\xff\xfe{}", "mine"),
        (b"[]", "object"),
        (b"{}", "schema"),
        (b" " * ((1 << 20) + 1), "1048576 bytes"),
    ],
    ids=["empty", "cut", "not UTF-8", "a list", "no fields", "too large"],
)
def test_a_manifest_that_is_none_says_why(model, content, told):
    """Whatever lies in the manifest's place is a ModelError with the reason, never a traceback."""
    manifest_path(model).write_bytes(content)
    with pytest.raises(ModelError, match=told):
        load_model(model)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"schema": "dgiqa.manifest/1"}, "schema"),
        ({"colour": "rgb"}, "colour"),
        ({"sha256": "9F" * 32}, "sha256"),
        ({"precision": "int4"}, "precision"),
        (
            {"preprocess": {"views": [{"name": "a", "kind": "whole", "height": 7, "width": 8}]}},
            "height",
        ),
        ({"preprocess": {"views": 3}}, "views"),
        ({"preprocess": {"views": []}}, "reduction"),
        (
            {
                "preprocess": {
                    "views": [{"name": "a", "kind": "whole", "height": 8, "width": 8}],
                    "reduction": "halved-smoothed",
                }
            },
            "'a' is halved-bilinear, but reduction is halved-smoothed",
        ),
        ({"output": {"name": "q", "mapping": {"raw": [0, 1], "score": [0, 101]}}}, "0..100"),
        ({"output": {"name": "q", "mapping": {"raw": [0, 0], "score": [0, 1]}}}, "rising"),
        ({"output": {"name": "q", "mapping": {"raw": [0, 1e-300], "score": [0, 1]}}}, "rising"),
    ],
)
def test_a_field_that_cannot_be_is_named(model, fields, told):
    """Another major, an unknown key, a missing one and a value out of range are refused by name."""
    change(model, **fields)
    with pytest.raises(ModelError, match=told):
        load_model(model)


def test_a_manifest_survives_writing_and_reading(model, tmp_path):
    """Encoding a manifest and reading it again gives an equal one."""
    manifest = load_model(model).manifest
    again = tmp_path / "again.json"
    again.write_bytes(msgspec.json.encode(manifest))
    assert read_manifest(again) == manifest


def rising(low, high, size):
    """Lists of so many rising numbers, a thousandth or more apart."""
    steps = st.integers(1000 * low, 1000 * high)
    lists = st.lists(steps, min_size=size[0], max_size=size[1], unique=True)
    return lists.map(lambda values: [v / 1000 for v in sorted(values)])


knots = rising(-10, 10, size=(2, 6))


@given(raw=knots, scores=st.data(), asked=st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=20))
def test_a_mapping_rises_and_stays_on_the_scale(raw, scores, asked):
    """A better output never has a lower score, and no output leaves the ends of the mapping."""
    steps = scores.draw(rising(0, 100, size=(len(raw), len(raw))))
    mapping = ScoreMapping(raw=raw, score=steps)
    found = [mapping(value) for value in sorted(asked)]
    assert all(b >= a - 1e-9 for a, b in pairwise(found))
    assert steps[0] <= min(found)
    assert max(found) <= steps[-1]
    assert [mapping(value) for value in raw] == pytest.approx(steps)


@given(
    points=st.lists(st.tuples(st.floats(0, 1), st.floats(0, 100)), min_size=2, max_size=9),
    places=st.lists(st.floats(-1, 2), min_size=1),
)
def test_mappings_are_numpys_straight_lines(points, places):
    """Scores and half-widths are those of ``numpy.interp``, at the points and beyond the ends, too;
    what is not a number stays so.
    """
    raw, score = (np.cumsum(np.array(v) / 10 + 1e-5).tolist() for v in zip(*points, strict=True))
    score = [s / max(1.0, score[-1] / 100) for s in score]
    mapping = ScoreMapping(raw, score) if min(np.diff(score)) >= 1e-6 else ScoreMapping(raw, raw)
    for place in [*places, *raw]:
        wanted = np.interp(place, mapping.raw, mapping.score)
        assert mapping(place) == pytest.approx(wanted, rel=1e-14, abs=1e-13)  # a rounding apart
        assert HalfWidthMapping(mapping.raw, mapping.score)(place) == mapping(place)
    assert np.isnan(mapping(float("nan")))
