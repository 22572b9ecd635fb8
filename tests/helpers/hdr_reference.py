"""HDR by the Recommendations' own formulae, in float64 and apart from the code under test.

``sdr_of`` is the chain one colour at a time; ``hdr_of`` its inverse for pictures.
"""

from __future__ import annotations

import math

import numpy as np

from dgiqa_stream.types import ColorMatrix, HdrTags, Planes

WHITE = 203.0
TO_2020 = np.array(  # ITU-R BT.2087-0, section 2, to four digits
    [[0.6274, 0.3293, 0.0433], [0.0691, 0.9195, 0.0114], [0.0164, 0.0880, 0.8956]]
)
TO_709 = np.linalg.inv(TO_2020)
LUMINANCE = np.array([0.2627, 0.6780, 0.0593])


def pq_of(light):
    """SMPTE ST 2084's inverse EOTF, cd/m² to 0..1."""
    m1, m2, c1, c2, c3 = 0.1593017578125, 78.84375, 0.8359375, 18.8515625, 18.6875
    y = (np.asarray(light, np.float64) / 10_000) ** m1
    return ((c1 + c2 * y) / (1 + c3 * y)) ** m2


def light_of_pq(signal):
    """SMPTE ST 2084's EOTF, 0..1 to cd/m²."""
    m1, m2, c1, c2, c3 = 0.1593017578125, 78.84375, 0.8359375, 18.8515625, 18.6875
    y = np.asarray(signal, np.float64) ** (1 / m2)
    return 10_000 * (np.maximum(y - c1, 0) / (c2 - c3 * y)) ** (1 / m1)


def light_of_hlg(rgb):
    """BT.2100's HLG EOTF on a display of 1,000 cd/m² with a black of 0: three numbers."""
    a, b, c = 0.17883277, 0.28466892, 0.55991073
    scene = [e * e / 3 if e <= 0.5 else (math.exp((e - c) / a) + b) / 12 for e in rgb]
    luminance = sum(k * e for k, e in zip(LUMINANCE, scene, strict=True))
    return [1000 * luminance**0.2 * e for e in scene] if luminance else [0.0] * 3


def eetf(light, peak):
    """BT.2390's section 5.4.1, steps 1 to 4, of one light, to 203 cd/m²; both blacks are 0."""
    e1 = float(pq_of(light) / pq_of(peak))
    max_lum = float(pq_of(WHITE) / pq_of(peak))
    ks = 1.5 * max_lum - 0.5
    if e1 < ks:
        e2 = e1
    else:
        t = (e1 - ks) / (1 - ks)
        e2 = (
            (2 * t**3 - 3 * t**2 + 1) * ks
            + (t**3 - 2 * t**2 + t) * (1 - ks)
            + (-2 * t**3 + 3 * t**2) * max_lum
        )
    return float(light_of_pq(e2 * pq_of(peak)))


def sdr_of(rgb, *, transfer, peak):
    """One HDR colour, 0..1, as that of the SDR picture: linear light of BT.709, clipped."""
    peak = 1000.0 if transfer == "hlg" else peak
    light = light_of_hlg(rgb) if transfer == "hlg" else [float(light_of_pq(e)) for e in rgb]
    light = [eetf(min(value, peak), peak) if peak > WHITE else min(value, WHITE) for value in light]
    return np.clip(TO_709 @ light / WHITE, 0, 1)


def hdr_of(rgb, *, transfer="pq", peak=1000.0):
    """A uint8 SDR picture as R'G'B' signals, 0..1, that the chain takes back to it."""
    light = (rgb / 255) ** 2.4 @ TO_2020.T
    if peak > WHITE:  # the inverse of the EETF, from its own values
        lights = light_of_pq(np.linspace(0, pq_of(peak), 4097))
        light = np.interp(light * WHITE, [eetf(v, peak) for v in lights], lights)
    else:
        light = light * WHITE
    return pq_of(light) if transfer == "pq" else hlg_of(light)


def hlg_of(light):
    """The inverse of ``light_of_hlg``, of a picture."""
    a, b, c = 0.17883277, 0.28466892, 0.55991073
    luminance = (light @ LUMINANCE)[..., None]
    scene = light / 1000 / np.maximum((luminance / 1000) ** (1 - 1 / 1.2), 1e-12)
    bright = a * np.log(np.maximum(12 * scene - b, 1e-12)) + c
    return np.where(scene <= 1 / 12, np.sqrt(3 * scene), bright)


def planes_of_signal(signal, *, transfer="pq", peak=1000.0, bits=10, hdr=True):
    """R'G'B' signals, 0..1, as limited-range 4:4:4 Y'CbCr of BT.2020."""
    kr, _, kb = LUMINANCE
    luma = signal @ LUMINANCE
    cb, cr = (signal[..., 2] - luma) / (2 - 2 * kb), (signal[..., 0] - luma) / (2 - 2 * kr)
    scale = 2 ** (bits - 8)
    coded = (219 * luma + 16, 224 * cb + 128, 224 * cr + 128)
    kind = np.uint8 if bits == 8 else np.uint16
    samples = tuple(np.rint(plane * scale).astype(kind) for plane in coded)
    tags = HdrTags(transfer, peak) if hdr else None
    return Planes(samples, matrix=ColorMatrix.BT2020, bit_depth=bits, hdr=tags)
