"""How sure a score is and whether the model knows such pictures: manifest, backend and scorer.

The model of these tests (``sure_model``) reads its outputs off a picture's colours, so that what
must come out is known without it.
"""

from __future__ import annotations

import dataclasses

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dgiqa_stream.backends import open_backend
from dgiqa_stream.backends._onnxruntime import OnnxRuntimeBackend
from dgiqa_stream.errors import ModelError
from dgiqa_stream.manifest import HalfWidthMapping, IntervalSpec, load_model
from dgiqa_stream.scorer import FLAT_STEPS, Scorer, is_flat, load_scorer, planes_of_rgb
from dgiqa_stream.types import FrameBatch, FrameInfo, FrameScore

INTERVAL = {
    "output": "spread",
    "mapping": {"spread": [0.0, 1.0], "points": [0.0, 40.0]},
    "coverage": 0.9,
}


def picture(red, green, blue, *, contrast=40, seed=0):
    """32x32 pixels whose colours have exactly these means, and vary around them."""
    rng = np.random.default_rng(seed)
    signs = rng.permutation(np.repeat([-1, 1], 512)).reshape(32, 32, 1)
    return np.clip(np.array([red, green, blue]) + contrast * signs, 0, 255).astype(np.uint8)


def predict(scorer, *pictures):
    """Predictions of arrays."""
    return scorer.predict([planes_of_rgb(rgb) for rgb in pictures])


def test_a_model_of_three_outputs_says_how_sure_it_is(sure_model):
    """A score, its interval and its mark come of the three outputs of one picture; float32 keeps
    shares of 255 to far better than 1e-4.
    """
    with load_scorer(sure_model()) as scorer:
        (found,) = predict(scorer, picture(51, 102, 204))
    assert found.raw == pytest.approx(0.8, abs=1e-6)
    assert found.score == pytest.approx(80.0, abs=1e-4)
    assert (found.spread, found.unfamiliar) == pytest.approx((0.2, 0.4), abs=1e-6)
    assert found.interval == pytest.approx((72.0, 88.0), abs=1e-4)
    assert found.out_of_domain == ()
    assert found.in_domain


def test_an_interval_ends_where_the_scale_does(sure_model):
    """Intervals of scores near 0 and 100 are cut there, on that side only."""
    with load_scorer(sure_model()) as scorer:
        low, high = predict(
            scorer, picture(153, 60, 41, contrast=40), picture(153, 60, 214, contrast=40)
        )
    assert low.interval == pytest.approx((0.0, 100 * 41 / 255 + 24), abs=1e-4)
    assert high.interval == pytest.approx((100 * 214 / 255 - 24, 100.0), abs=1e-4)


def test_what_is_above_the_threshold_is_unfamiliar(sure_model):
    """At the threshold a picture is in domain, a step of one channel above it is not."""
    path = sure_model(domain={"output": "unfamiliar", "threshold": 0.4})
    with load_scorer(path) as scorer:
        below, above = predict(scorer, picture(90, 101, 90), picture(90, 103, 90))
    assert (below.out_of_domain, above.out_of_domain) == ((), ("unfamiliar",))
    assert not above.in_domain


@pytest.mark.parametrize("colour", [(0, 0, 0), (255, 255, 255), (16, 120, 240), (128, 128, 128)])
def test_a_picture_of_one_colour_is_flat(sure_model, colour):
    """Black, white, grey and blue fields are flat, also with the noise of a coder of one step, and
    a field that is unfamiliar, too, says both.
    """
    plain = np.full((90, 160, 3), colour, np.uint8)
    noise = np.random.default_rng(1).integers(-1, 2, plain.shape)
    coded = np.clip(plain.astype(int) + noise, 0, 255).astype(np.uint8)
    reasons = ("unfamiliar", "flat") if colour[1] > 127 else ("flat",)
    with load_scorer(sure_model()) as scorer:
        assert [p.out_of_domain for p in predict(scorer, plain, coded)] == [reasons, reasons]


def test_a_picture_with_anything_in_it_is_not_flat():
    """A faint gradient, a small logo on black, one that only blue or one view shows, and fine
    lines are something to see.
    """
    black = np.zeros((224, 224, 3), np.uint8)
    gradient = black + np.linspace(100, 120, 224).astype(np.uint8)[:, None, None]
    logo, blue, lines = black.copy(), black.copy(), black.copy()
    logo[8:30, 180:215] = 200
    blue[:, 112:, 2] = 60
    lines[1::8] = 255  # none of them among the few samples that are looked at first
    for seen in (gradient, logo, blue, lines):
        assert not is_flat([seen])
        assert not is_flat([black, seen])
    assert is_flat([black, black + np.uint8(7)])


@given(steps=st.floats(0.2, 6.0), level=st.integers(40, 200))
def test_flat_is_a_deviation_of_two_steps(steps, level):
    """Noise makes a plain picture more than flat at the documented deviation, to within a tenth."""
    noise = np.random.default_rng(3).standard_normal((160, 160, 3)) * steps
    view = np.rint(level + noise).astype(np.uint8)
    deviation = float(view.astype(np.float64).reshape(-1, 3).std(axis=0).max())
    if abs(deviation - FLAT_STEPS) > 0.1 * FLAT_STEPS:
        assert is_flat([view]) == (deviation < FLAT_STEPS)


def test_a_model_without_either_says_nothing_of_it(sure_model):
    """A model with neither an interval nor a domain has no interval and marks no picture, not even
    black.
    """
    with load_scorer(sure_model(interval=None, domain=None)) as scorer:
        manifest = scorer.manifest
        (found,) = predict(scorer, np.zeros((64, 64, 3), np.uint8))
    assert (manifest.interval, manifest.domain) == (None, None)
    assert found[2:] == (None, (), None, None)


@pytest.mark.parametrize("name", ["student", "student-fp32"])
def test_the_shipped_students_say_both(name):
    """Nine tenths are promised, the score lies within, and black is marked as flat and unknown."""
    with load_scorer(name) as scorer:
        manifest = scorer.manifest
        (found,) = predict(scorer, np.zeros((360, 640, 3), np.uint8))
    assert manifest.interval.coverage == 0.9
    low, high = found.interval
    assert 0 <= low < found.score < high <= 100
    assert found.out_of_domain == ("unfamiliar", "flat")


@pytest.mark.parametrize(
    ("without", "left"),
    [("interval", (None, ("unfamiliar",))), ("domain", ((44.0, 76.0), ()))],
)
def test_either_may_be_had_alone(sure_model, without, left):
    """A model with an interval and no domain marks nothing; one with a domain only, no interval."""
    with load_scorer(sure_model(**{without: None})) as scorer:
        (found,) = predict(scorer, picture(102, 204, 153))
    interval, reasons = left
    assert found.out_of_domain == reasons
    assert found.interval == (None if interval is None else pytest.approx(interval, abs=1e-4))


def test_a_batch_is_its_pictures(sure_model):
    """Eleven pictures, more than one inference takes, keep their own intervals and marks."""
    pictures = [picture(20 * n, 255 - 20 * n, 128, contrast=0) for n in range(11)]
    for n, rgb in enumerate(pictures):
        rgb[: 3 * n] = rgb[0, 0] // 2
    with load_scorer(sure_model()) as scorer:
        together = predict(scorer, *pictures)
        alone = [predict(scorer, rgb)[0] for rgb in pictures]
    assert together == alone
    assert len({p.interval for p in together}) == 11
    assert len({p.out_of_domain for p in together}) == 3


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"interval": {**INTERVAL, "output": "width"}}, "'width'"),
        ({"domain": {"output": "odd", "threshold": 0.5}}, "'odd'"),
        ({"interval": {**INTERVAL, "coverage": 1.0}}, r"interval\.coverage"),
        ({"interval": {**INTERVAL, "coverage": 0}}, r"interval\.coverage"),
        ({"interval": {**INTERVAL, "coverage": 90}}, r"interval\.coverage"),
        ({"interval": {**INTERVAL, "mapping": {"spread": [0, 1], "points": [9, 9]}}}, "rising"),
        ({"interval": {**INTERVAL, "mapping": {"spread": [1, 0], "points": [0, 9]}}}, "rising"),
        ({"interval": {**INTERVAL, "mapping": {"spread": [0, 1], "points": [1]}}}, "points"),
        ({"interval": {**INTERVAL, "mapping": {"spread": [0, 1], "points": [-1, 9]}}}, "0..100"),
        ({"interval": {**INTERVAL, "mapping": {"spread": [0, 1], "points": [0, 101]}}}, "0..100"),
        ({"interval": {"mapping": INTERVAL["mapping"]}}, "output"),
        ({"domain": {"output": "unfamiliar", "threshold": 1.5}}, r"domain\.threshold"),
        ({"domain": {"output": "unfamiliar", "threshold": -0.1}}, r"domain\.threshold"),
        ({"domain": {"output": "unfamiliar"}}, "threshold"),
        ({"domain": {"output": "spread", "threshold": 0.5}}, "each needs one of its own"),
        ({"interval": {**INTERVAL, "output": "quality"}}, "each needs one of its own"),
    ],
)
def test_nonsense_in_a_manifest_is_refused(sure_model, fields, told):
    """Outputs the graph lacks, one output for two meanings, a coverage or threshold outside 0 to 1
    and a mapping that does not rise or leaves the scale are one line that names the field.
    """
    with pytest.raises(ModelError, match=told) as caught:
        load_scorer(sure_model(**fields))
    assert "\n" not in str(caught.value)


def test_what_a_model_does_not_have_is_not_written(sure_model):
    """A manifest without interval and domain has no key of theirs, so that older readers, which
    refuse keys they do not know, take it; with them it survives writing and reading.
    """
    manifest = load_model(sure_model()).manifest
    assert msgspec.convert(msgspec.to_builtins(manifest), type(manifest)) == manifest
    plain = msgspec.structs.replace(manifest, interval=None, domain=None)
    assert not {"interval", "domain"} & set(msgspec.to_builtins(plain))


@pytest.mark.parametrize("name", ["spread", "unfamiliar"])
def test_an_output_that_is_no_number_is_named(sure_model, name):
    """NaN in any of the outputs ends in ModelError with the output's name."""
    model = load_model(sure_model())
    opened = open_backend(model, device="cpu")

    class Failing:
        """The real session, one of whose outputs is lost."""

        def run(self, names, inputs):
            found = opened._session.run(names, inputs)
            return [o * np.nan if n == name else o for n, o in zip(names, found, strict=True)]

    batch = FrameBatch({"whole": picture(9, 9, 9)[None]})
    with pytest.raises(ModelError, match=f"nan.*'{name}': not a number"):
        OnnxRuntimeBackend(Failing(), model, opened.status).infer(batch)


def test_the_network_runs_once(sure_model):
    """All three outputs come from one run; without interval and domain only quality is asked."""
    asked = []
    for fields in ({}, {"interval": None, "domain": None}):
        model = load_model(sure_model(**fields))
        opened = open_backend(model, device="cpu")

        class Counting:
            """The real session, which writes down what it is asked."""

            def __init__(self, session):
                self.session = session

            def run(self, names, inputs):
                asked.append(list(names))
                return self.session.run(names, inputs)

        backend = OnnxRuntimeBackend(Counting(opened._session), model, opened.status)
        Scorer(model, backend).predict([planes_of_rgb(picture(9, 9, 9))])
    assert asked == [["quality", "spread", "unfamiliar"], ["quality"]]


def test_the_fake_has_the_outputs_of_the_manifest(sure_model):
    """With an interval and a domain the fake gives contrast and clipped samples beside brightness,
    and nothing without.
    """
    views = np.stack([picture(100, 100, 100, contrast=51), np.full((32, 32, 3), 255, np.uint8)])
    batch = FrameBatch({"whole": views})
    found = open_backend(load_model(sure_model()), backend="fake").infer(batch)
    assert found.quality == pytest.approx([100 / 255, 1.0])
    assert found.spread == pytest.approx([51 / 127.5, 0.0])
    assert found.unfamiliar == pytest.approx([0.0, 1.0])
    plain = load_model(sure_model(interval=None, domain=None))
    found = open_backend(plain, backend="fake").infer(batch)
    assert (found.spread, found.unfamiliar) == (None, None)


@given(
    score=st.floats(0, 100),
    spread=st.floats(-1, 2),
    half=st.tuples(st.floats(0, 50), st.floats(51, 100)),
)
def test_an_interval_holds_its_score(score, spread, half):
    """Whatever the network says, low is at most the score, high at least, and both on the scale."""
    mapping = HalfWidthMapping(spread=[0.0, 1.0], points=list(half))
    low, high = IntervalSpec("spread", mapping).around(score, spread)
    assert 0.0 <= low <= score <= high <= 100.0
    assert high - low <= 2 * half[1] + 1e-9


@pytest.mark.parametrize("interval", [(60.0, 50.0), (-1.0, 50.0), (50.0, 100.5), (np.nan, 50.0)])
def test_an_impossible_interval_is_refused(interval):
    """A frame score whose interval is turned round, off the scale or no number is a ValueError."""
    info = FrameInfo(0, 0.0, 0.04, None, None, 16, 16, "rgb24")
    score = FrameScore(info, "cam1", 55.0, 0.55, (50.0, 60.0))
    with pytest.raises(ValueError, match="interval"):
        dataclasses.replace(score, interval=interval)
