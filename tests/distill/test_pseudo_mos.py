"""Pseudo-MOS: 1 for the clean picture, in the order of levels, unsure where measures disagree."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from dgiqa_stream.errors import ConfigError
from distill.data.degradations import chain, ladder
from distill.data.pseudo_mos import (
    CODEC_ENSEMBLE,
    ENSEMBLE,
    MAPS,
    PseudoMos,
    distance,
    fit_maps,
    measure,
    order_ladder,
    pool,
    pseudo_mos,
)

piq = pytest.importorskip("piq")
torch = pytest.importorskip("torch")


@pytest.fixture(scope="module")
def clean(make_picture):
    """A generated picture of 160x192."""
    return make_picture(4, 160, 192)


@pytest.fixture(scope="module")
def blurred(clean):
    """It, blurred by 2 pixels."""
    return cv2.GaussianBlur(clean, (0, 0), 2)


def test_the_clean_picture_has_1(make_picture):
    """Compared with itself a picture is 1 with confidence 1, by every measure, at any content."""
    for seed in range(3):
        picture = make_picture(seed, 120, 160)
        made = pseudo_mos(picture, picture.copy())
        assert (made.score, made.confidence) == (1.0, 1.0)
        assert set(made.impairments.values()) == {0.0}


@pytest.mark.parametrize("name", ENSEMBLE)
def test_measures_are_called_with_their_range(name, clean, blurred):
    """A value is piq's own for pictures on 0..1 with data_range 1: float32 rounding, no more."""
    function = {"ms_gmsd": piq.multi_scale_gmsd}.get(name) or getattr(piq, name)

    def tensor(picture):
        return torch.from_numpy(picture / np.float32(255)).permute(2, 0, 1)[None]

    wanted = float(function(tensor(blurred), tensor(clean), data_range=1.0))
    assert measure(clean, blurred)[name] == pytest.approx(wanted, rel=2e-4)


@pytest.mark.parametrize("name", ["gaussian_blur", "gaussian_noise", "haze", "h264", "mjpeg"])
def test_scores_fall_along_a_ladder(name, make_picture):
    """On two contents every level has a lower score than the one before, before any ordering."""
    for seed in (1, 2):
        picture = make_picture(seed, 160, 192)
        scores = [pseudo_mos(picture, p).score for p in ladder(name, picture, seed=0)]
        assert np.all(np.diff([1.0, *scores]) < 0), scores
        assert scores[-1] < 0.5


def test_disagreeing_measures_are_trusted_less(clean, blurred):
    """Blur, on which all agree, has a higher confidence than lost colour, which two cannot see."""
    grey = clean @ np.array([0.299, 0.587, 0.114])
    faded = np.repeat(grey[..., None], 3, 2).astype(np.uint8)
    sure, unsure = pseudo_mos(clean, blurred), pseudo_mos(clean, faded)
    assert sure.confidence > 0.8
    assert unsure.confidence < sure.confidence - 0.15


def test_confidence_is_1_minus_twice_the_spread():
    """Two measures that say clean and two that say ruined: confidence 0, score one half."""
    ruined = {"mdsi": 5.0, "haarpsi": 1.0, "vsi": 1.0, "ms_gmsd": 9.0}
    made = pool(ruined)
    assert made.score == pytest.approx(0.5, abs=1e-6)
    assert made.confidence == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("name", MAPS)
def test_maps_rise_from_0_to_1(name):
    """Impairment is 0 at no distance, 1 - 1/e at the map's scale, and only ever rises."""
    values = [MAPS[name](d) for d in np.linspace(0, 5 * MAPS[name].scale, 200)]
    assert values[0] == 0.0
    assert np.all(np.diff(values) >= 0)
    assert values[-1] > 0.9
    assert MAPS[name](MAPS[name].scale) == pytest.approx(1 - np.exp(-1))


def test_the_fit_finds_maps_it_was_made_from():
    """Distances made from a known scale by inverse maps give those maps back within 1 %."""
    common = (np.arange(400) + 0.5) / 400
    made = {
        name: MAPS[name].scale * (-np.log1p(-common)) ** (1 / MAPS[name].power) for name in MAPS
    }
    made["ssimulacra2"][::3] = np.nan  # not measured on every picture
    for name, fitted in fit_maps(made).items():
        assert fitted.scale == pytest.approx(MAPS[name].scale, rel=0.01)
        assert fitted.power == pytest.approx(MAPS[name].power, rel=0.01)


def test_a_chain_is_never_better_than_its_worst_component(clean):
    """Noise after blur can look better to a measure; the pseudo-MOS is at most the lower one's."""
    made = chain(("gaussian_blur", 5), ("oversharpening", 4))
    out = made.apply(clean, np.random.default_rng(0))
    parts = made.components(clean, np.random.default_rng(0))
    worst = min(pseudo_mos(clean, part).score for part in parts)
    free = pseudo_mos(clean, out).score
    assert free > worst  # else this pair proves nothing
    assert pseudo_mos(clean, out, components=parts).score == worst


def rated(*pairs: tuple[float, float]) -> list[PseudoMos]:
    """Made-up results of given scores and confidences."""
    return [PseudoMos(score, confidence, {}, {}) for score, confidence in pairs]


def test_a_ladder_that_rises_is_levelled():
    """0.5 then 0.7 become their mean, weighted by confidence; what falls already stays."""
    out = order_ladder(rated((0.9, 1.0), (0.5, 0.75), (0.7, 0.25), (0.2, 1.0)))
    assert [made.score for made in out] == pytest.approx([0.9, 0.55, 0.55, 0.2])
    assert [made.confidence for made in out] == [1.0, 0.75, 0.25, 1.0]
    assert order_ladder([]) == []


def test_pictures_that_do_not_fit_are_refused(clean):
    """Another shape or type, and pictures too small to measure, are told with their sizes."""
    with pytest.raises(ValueError, match="uint8 of one shape"):
        measure(clean, clean[:100])
    with pytest.raises(ValueError, match="uint8 of one shape"):
        measure(clean, clean.astype(np.float32))
    with pytest.raises(ValueError, match="96 px or more on a side"):
        measure(clean[:90], clean[:90])
    with pytest.raises(ConfigError, match="no measure 'psnr'; known: mdsi"):
        measure(clean, clean, measures=["psnr"])


def test_the_smallest_size_is_large_enough(make_picture):
    """Every measure works at 96 px a side."""
    picture = make_picture(1, 96, 96)
    values = measure(picture, 255 - picture)
    assert all(np.isfinite(value) for value in values.values())


def test_a_missing_package_says_what_to_install(clean, monkeypatch):
    """Without SSIMULACRA2's package the error names it; the others do not need it."""
    monkeypatch.setitem(__import__("sys").modules, "ssimulacra2", None)
    measure(clean, clean)
    with pytest.raises(ConfigError, match="pip install ssimulacra2"):
        measure(clean, clean, measures=CODEC_ENSEMBLE)


def test_ssimulacra2_joins_for_codecs(clean):
    """It gives 100 to the clean picture and less to every worse H.264 point."""
    pytest.importorskip("ssimulacra2")
    assert measure(clean, clean, measures=["ssimulacra2"])["ssimulacra2"] == pytest.approx(100)
    values = [
        measure(clean, p, measures=["ssimulacra2"])["ssimulacra2"]
        for p in ladder("h264", clean, seed=0)
    ]
    assert np.all(np.diff([100.0, *values]) < 0)
    assert set(pseudo_mos(clean, clean, measures=CODEC_ENSEMBLE).values) == set(CODEC_ENSEMBLE)


def test_rounding_is_not_an_impairment():
    """HaarPSI's 1.000006 of a picture with itself counts as no distance at all."""
    assert distance("haarpsi", 1.000006) == 0.0
    assert distance("vsi", 0.99999) == 0.0
    assert distance("mdsi", 0.25) == 0.25
    assert distance("ssimulacra2", 40.0) == pytest.approx(0.6)
