"""PQ and HLG to SDR, against the Recommendations' numbers and formulae written out again."""

from __future__ import annotations

import os
from pathlib import Path

import cv2
import hdr_reference as reference
import numpy as np
import pytest

from dgiqa_stream import tone_mapping
from dgiqa_stream.preprocess import Planes, ViewSpec, cut_view, reduced_rgb
from dgiqa_stream.scorer import load_scorer, planes_of_rgb
from dgiqa_stream.types import HdrTags

CLIP = Path(os.environ.get("DGIQA_CHECKOUT", Path(__file__).parents[2])) / "demo" / "room.mp4"
VIEWS = [
    ViewSpec("whole", "whole", 224, 224),
    ViewSpec("fragments", "fragments", 160, 160, rows=4, columns=4),
]
KINDS = [("pq", 203.0), ("pq", 600.0), ("pq", 1000.0), ("pq", 4000.0), ("hlg", 1000.0)]


def image(*colours):
    """Colours, each a number or three, as one row of float32 (1, N, 3)."""
    return np.array([[np.broadcast_to(c, 3) for c in colours]], np.float32)


# The curves -----------------------------------------------------------------------------------

PQ_CODES = {0: 0, 100: 520, 203: 594, 1000: 769, 4000: 923, 10_000: 1023}
"""cd/m² to the 10-bit full-range code of ST 2084, as its tables round them."""


def test_pq_code_points():
    """The codes of the known lights come out, and back within half a step of the code."""
    lights = image(*PQ_CODES)
    codes = tone_mapping.pq_signal(lights)[0, :, 0] * 1023
    assert np.rint(codes).tolist() == list(PQ_CODES.values())
    back = tone_mapping.pq_light(image(*(code / 1023 for code in PQ_CODES.values())))[0, :, 0]
    assert back == pytest.approx(list(PQ_CODES), rel=0.006, abs=1e-6)  # a step is 1.2 % of light


@pytest.mark.parametrize(("percent", "light"), [(0, 0), (38, 26), (75, 203), (100, 1000)])
def test_hlg_code_points(percent, light):
    """Grey card, reference white and peak are the lights of ITU-R BT.2408-7, table 1, which rounds
    signals to per cents and lights to candelas.
    """
    found = tone_mapping.hlg_light(image(percent / 100))[0, 0]
    assert found == pytest.approx([light] * 3, rel=0.015, abs=1e-6)


@pytest.mark.parametrize("peak", [300.0, 1000.0, 4000.0, 10_000.0])
def test_the_eetf_is_that_of_bt2390(peak):
    """Over the whole range the lights are those of the formula, within a hundredth of a per cent;
    the peak becomes 203 cd/m².
    """
    lights = np.geomspace(0.01, peak, 400)
    found = tone_mapping.pq_light(
        tone_mapping.compressed(image(*reference.pq_of(lights)), peak_cd_m2=peak)
    )
    wanted = [reference.eetf(light, peak) for light in lights]
    np.testing.assert_allclose(found[0, :, 0], wanted, rtol=2e-4)  # float32, twice to a power of 79
    assert found[0, -1, 0] == pytest.approx(203, rel=2e-4)


# The chain ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("transfer", "peak"), KINDS)
def test_the_chain_is_the_recommendations(transfer, peak):
    """Any colour comes to the linear light that the formulae give, one by one in float64.

    BT.2087's matrix has four digits: five parts in 100,000 of the largest component, times six.
    """
    colours = np.random.default_rng(0).random((300, 3))
    found = tone_mapping.to_sdr(image(*colours * 255), HdrTags(transfer, peak))[0]
    wanted = [reference.sdr_of(colour, transfer=transfer, peak=peak) for colour in colours]
    np.testing.assert_allclose((found / 255) ** 2.4, wanted, atol=3e-4)
    assert np.ptp(wanted, axis=0).min() > 0.99  # from black to white, what is outside clipped


@pytest.mark.parametrize(("transfer", "peak"), KINDS)
def test_greys_stay_grey_and_in_order(transfer, peak):
    """Greys stay grey, brighter ones come out no darker, black is black and the peak is white."""
    greys = np.linspace(0, 255, 1024)
    found = tone_mapping.to_sdr(image(*greys), HdrTags(transfer, peak))[0]
    assert np.ptp(found, axis=1).max() < 0.02
    assert np.diff(found[:, 1]).min() > -1e-3
    assert found[0, 1] < 0.02
    top = 1.0 if transfer == "hlg" else float(reference.pq_of(peak))
    at_peak = tone_mapping.to_sdr(image(top * 255), HdrTags(transfer, peak))
    assert at_peak.min() == pytest.approx(255, abs=0.01)


def test_below_the_knee_nothing_is_compressed():
    """Light that is well below white is shown as it is: 203 cd/m² would be white (BT.1886)."""
    lights = np.array([0.5, 5, 26, 50, 80])
    for peak in (203.0, 1000.0):
        found = tone_mapping.to_sdr(image(*reference.pq_of(lights) * 255), HdrTags("pq", peak))
        np.testing.assert_allclose(found[0, :, 1], 255 * (lights / 203) ** (1 / 2.4), atol=0.02)


@pytest.mark.parametrize("primaries", ["bt709", "p3", "bt2020"])
def test_pure_colours_of_bt709_survive(primaries):
    """A colour at BT.709's own edge, coded in wider primaries, comes back: CIE xy, in XYZ."""
    edges = {"bt709": ((0.64, 0.33), (0.30, 0.60), (0.15, 0.06))}
    edges["p3"] = (0.68, 0.32), (0.265, 0.69), (0.15, 0.06)
    edges["bt2020"] = (0.708, 0.292), (0.17, 0.797), (0.131, 0.046)

    def to_xyz(name):
        columns = np.array([[x / y, 1, (1 - x - y) / y] for x, y in edges[name]]).T
        return columns * np.linalg.solve(columns, [0.3127 / 0.3290, 1, 0.3583 / 0.3290])

    for wanted in ([1, 0.2, 0.2], [0.2, 1, 0.2], [0.2, 0.2, 1], [0.9, 0.6, 0.1]):
        light = np.linalg.inv(to_xyz(primaries)) @ to_xyz("bt709") @ (np.array(wanted) ** 2.4)
        signal = reference.pq_of(203 * np.maximum(light, 0))
        found = tone_mapping.to_sdr(image(signal * 255), HdrTags("pq", 203.0, primaries))
        np.testing.assert_allclose(found[0, 0] / 255, wanted, atol=2e-3)


@pytest.mark.parametrize("peak", [0.0, -1.0, 10_001.0, float("nan")])
def test_a_peak_that_cannot_be_is_refused(peak):
    """No tag with a peak that PQ cannot code is built."""
    with pytest.raises(ValueError, match="peak"):
        HdrTags("pq", peak)


# Pictures -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scene():
    """A frame of the demo's clip, uint8 RGB (H, W, 3)."""
    if not CLIP.is_file():
        pytest.skip("needs the checkout's demo clip; DGIQA_CHECKOUT names the checkout")
    clip = cv2.VideoCapture(str(CLIP))
    found, bgr = clip.read()
    clip.release()
    assert found
    return cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB)


@pytest.mark.parametrize("bits", [10, 12])
@pytest.mark.parametrize(("transfer", "peak"), KINDS)
def test_an_sdr_picture_comes_back_from_hdr(scene, transfer, peak, bits):
    """A picture that was made HDR by the inverse chain looks as before, and scores within half a
    point (in single precision: INT8 rounds what differs by a step here and there by up to a point).

    At 10 bits half a step of each component is up to 0.7 of 255 in the middle of the range, and
    more where highlights were spread over few codes, or where a colour at the edge of BT.709 is
    the difference of large numbers: on average less than one step, and one in a hundred up to 8.
    """
    signal = reference.hdr_of(scene, transfer=transfer, peak=peak)
    hdr = reference.planes_of_signal(signal, transfer=transfer, peak=peak, bits=bits)
    off = np.abs(reduced_rgb(hdr, longest_px=9999).astype(int) - scene)
    assert off.mean() < (1.0 if bits == 10 else 0.5)
    assert np.percentile(off, 99) <= 8
    with load_scorer("student-fp32") as scorer:
        ours, wanted = (scorer.predict([p])[0].score for p in (hdr, planes_of_rgb(scene)))
    assert ours == pytest.approx(wanted, abs=0.5)


def test_without_tags_samples_are_taken_for_sdr(scene):
    """The same samples without the tags are paler by far: it is the tags that count."""
    signal = reference.hdr_of(scene)
    pale = reduced_rgb(reference.planes_of_signal(signal, hdr=False), longest_px=9999)
    assert np.abs(pale.astype(int) - scene).mean() > 10
    assert pale.std() < 0.7 * scene.std()


@pytest.mark.parametrize(("transfer", "peak"), [("pq", 1000.0), ("pq", 4000.0), ("hlg", 1000.0)])
@pytest.mark.parametrize("view", VIEWS, ids=["whole", "fragments"])
def test_reducing_first_changes_little(scene, view, transfer, peak):
    """Reducing the coded samples and tone mapping what is left is tone mapping all of the picture
    and reducing that: fragments within rounding, the whole view within half a step on average.

    Where highlights meet shadows, a mean of codes is not the code of a mean: 1 in 100 is up to 6
    off.
    """
    signal = reference.hdr_of(scene, transfer=transfer, peak=peak)
    hdr = reference.planes_of_signal(signal, transfer=transfer, peak=peak)
    mapped_first = Planes((reduced_rgb(hdr, longest_px=9999),), full_range=True)
    off = np.abs(cut_view(hdr, view).astype(int) - cut_view(mapped_first, view))
    if view.kind == "fragments":
        assert off.max() <= 1
    else:
        assert off.mean() < 0.75
        assert np.percentile(off, 99) <= 6


@pytest.mark.parametrize("rotation", [0, 90])
def test_8_bit_and_rgb_hdr_are_tone_mapped(rotation):
    """Few bits, or R'G'B' samples (a still picture's), take the same way, upright."""
    code = float(reference.pq_of(50))
    wanted = 255 * (50 / 203) ** (1 / 2.4)
    grey = np.full((64, 96, 3), round(code * 255), np.uint8)
    planes = Planes((grey,), full_range=True, rotation=rotation, hdr=HdrTags("pq"))
    coded = np.full((64, 96, 3), code)
    for picture in (planes, reference.planes_of_signal(coded, bits=8)):
        assert np.abs(cut_view(picture, VIEWS[0]) - wanted).max() < 2  # 1.4 a step of the code
