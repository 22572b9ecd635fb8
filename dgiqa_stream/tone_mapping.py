"""PQ and HLG pictures as a standard display would show them, so that a model of SDR can look.

The chain, on R'G'B' samples of a small view:

1. to light on a display: PQ by its EOTF (SMPTE ST 2084, ITU-R BT.2100-2 table 4); HLG by the
   inverse OETF and the OOTF of a display of 1,000 cd/m² (BT.2100-2 table 5, system gamma 1.2);
2. tone mapping by the EETF of ITU-R BT.2390-10, section 5.4.1, on R, G and B each, from the
   brightest light that the stream tells of (else 1,000 cd/m²) down to 203 cd/m², the reference
   white of ITU-R BT.2408, which becomes white. Both blacks are 0, so nothing is lifted;
3. to the primaries of BT.709 in linear light; what is outside of them is clipped;
4. to R'G'B' by the inverse of ITU-R BT.1886 (power 1 / 2.4), as SDR video is graded for.

Everything is computed in float32 without tables: nothing to warm up, any peak, any bit depth.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from dgiqa_stream.types import HdrTags

if TYPE_CHECKING:
    from numpy.typing import NDArray

WHITE_CD_M2 = 203.0
"""HDR Reference White (ITU-R BT.2408-7, section 2.2): what becomes white of the SDR picture."""
HLG_PEAK_CD_M2 = 1000.0
"""Of the display that HLG is shown on; its system gamma is then 1.2 (BT.2100-2, note 5f)."""

_PQ_CD_M2 = 10_000.0
_M1, _M2 = 2610 / 16384, 2523 / 4096 * 128  # ST 2084, equations 1 to 5
_C1, _C2, _C3 = 3424 / 4096, 2413 / 4096 * 32, 2392 / 4096 * 32
_HLG_A = 0.17883277  # BT.2100-2, table 5
_HLG_B = 1 - 4 * _HLG_A
_HLG_C = 0.5 - _HLG_A * math.log(4 * _HLG_A)
_HLG_GAMMA = 1.2
_DISPLAY_GAMMA = 2.4
_LUMINANCE_2020 = (0.2627, 0.6780, 0.0593)
_D65 = (0.3127, 0.3290)
_CHROMATICITIES = {  # x, y of red, green and blue
    "bt709": ((0.640, 0.330), (0.300, 0.600), (0.150, 0.060)),
    "p3": ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060)),
    "bt2020": ((0.708, 0.292), (0.170, 0.797), (0.131, 0.046)),
}


def to_sdr(rgb: NDArray[np.float32], hdr: HdrTags) -> NDArray[np.float32]:
    """R'G'B' of an HDR picture as R'G'B' of the SDR picture that stands for it.

    Both are float32 (H, W, 3), 0..255, where 0 is black and 255 the nominal peak of the code; what
    is outside counts as the nearer end.
    """
    from dgiqa_stream.opencv import cv2

    signal = np.clip(rgb * np.float32(1 / 255), 0, 1)
    peak_cd_m2 = max(WHITE_CD_M2, hdr.peak_cd_m2)
    if hdr.transfer == "hlg":
        signal = pq_signal(hlg_light(signal))
        peak_cd_m2 = HLG_PEAK_CD_M2
    light = pq_light(compressed(signal, peak_cd_m2=peak_cd_m2)) * np.float32(1 / WHITE_CD_M2)
    light = np.clip(cv2.transform(light, _to_bt709(hdr.primaries)), 0, 1)
    return _power(light, 1 / _DISPLAY_GAMMA) * np.float32(255)


def pq_light(signal: NDArray[np.float32]) -> NDArray[np.float32]:
    """The PQ EOTF: signal, 0..1, to light in cd/m²."""
    root = _power(signal, 1 / _M2)
    ratio = (root - np.float32(_C1)) / (np.float32(_C2) - np.float32(_C3) * root)
    return _power(ratio, 1 / _M1, least=1e-5) * np.float32(_PQ_CD_M2)  # least: 1e-28 cd/m²


def pq_signal(light: NDArray[np.float32]) -> NDArray[np.float32]:
    """The inverse of :func:`pq_light`: light in cd/m², at least 0, to signal."""
    root = _power(light * np.float32(1 / _PQ_CD_M2), _M1)
    ratio = (np.float32(_C1) + np.float32(_C2) * root) / (1 + np.float32(_C3) * root)
    return _power(ratio, _M2)


def hlg_light(signal: NDArray[np.float32]) -> NDArray[np.float32]:
    """HLG R'G'B' (H, W, 3), 0..1, to light in cd/m² on the nominal display."""
    from dgiqa_stream.opencv import cv2

    bright = (cv2.exp((signal - np.float32(_HLG_C)) / np.float32(_HLG_A)) + np.float32(_HLG_B)) / 12
    scene = np.where(signal <= 0.5, signal * signal / 3, bright)
    luminance = np.asarray(cv2.transform(scene, np.array([_LUMINANCE_2020])), np.float32)
    gain = _power(luminance, _HLG_GAMMA - 1) * np.float32(HLG_PEAK_CD_M2)
    return np.asarray(scene * gain.reshape(*scene.shape[:2], 1), np.float32)


def compressed(signal: NDArray[np.float32], *, peak_cd_m2: float) -> NDArray[np.float32]:
    """BT.2390's EETF on PQ signals, from a black of 0 and ``peak_cd_m2`` to 0 and 203 cd/m²."""
    top, white = (float(pq_signal(_one(value))[0, 0]) for value in (peak_cd_m2, WHITE_CD_M2))
    if top <= white:
        return np.minimum(signal, np.float32(white))
    most = white / top  # maxLum
    knee = 1.5 * most - 0.5  # KS
    source = signal * np.float32(1 / top)  # E1
    t = np.clip((source - np.float32(knee)) * np.float32(1 / (1 - knee)), 0, 1)
    # P[B], the Hermite spline, in powers of T: it leaves (KS, KS) at slope 1 and ends at slope 0
    slope, rise = 1 - knee, most - knee
    square, cube = 3 * rise - 2 * slope, slope - 2 * rise
    spline = t * (np.float32(slope) + t * (np.float32(square) + t * np.float32(cube)))
    return np.asarray((np.minimum(source, np.float32(knee)) + spline) * top, np.float32)


@lru_cache(maxsize=8)
def _to_bt709(primaries: str) -> NDArray[np.float64]:
    """Linear RGB of these primaries to that of BT.709, both with the white D65 (BT.2087-0)."""
    matrix = np.asarray(np.linalg.solve(_to_xyz("bt709"), _to_xyz(primaries)), np.float64)
    matrix.flags.writeable = False
    return matrix


def _to_xyz(primaries: str) -> NDArray[np.float64]:
    """Linear RGB to CIE XYZ, where white has Y = 1 (SMPTE RP 177, section 3.3)."""
    columns = np.array([(x / y, 1, (1 - x - y) / y) for x, y in _CHROMATICITIES[primaries]]).T
    x, y = _D65
    return np.asarray(columns * np.linalg.solve(columns, [x / y, 1, (1 - x - y) / y]), np.float64)


def _power(
    values: NDArray[np.float32], exponent: float, *, least: float = 1e-12
) -> NDArray[np.float32]:
    """Of values, or ``least`` where they are lower: a denormal result takes a hundred times longer.

    OpenCV's is quicker than NumPy's where that has no SIMD for it.
    """
    from dgiqa_stream.opencv import cv2

    return np.asarray(cv2.pow(np.maximum(values, np.float32(least)), exponent), np.float32)


def _one(value: float) -> NDArray[np.float32]:
    return np.full((1, 1), value, np.float32)
