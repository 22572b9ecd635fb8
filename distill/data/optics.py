"""What lens, sensor, weather and processing do to a picture, each a ladder of levels.

Each function takes uint8 RGB (H, W, 3), a level from 1 (slight) and a generator, and returns the
same shape. What it draws does not depend on the level: from equal generators, two levels show one
and the same grain, direction or depth, weaker and stronger. Blur, Gaussian noise, underexposure
and enlargement are those of :mod:`distill.data.degrade`.
"""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

from distill.data.codecs import Rgb

Float = NDArray[np.float32]

SENSOR_GAIN = (0.0006, 0.0015, 0.0035, 0.008, 0.018, 0.04)
"""Variance of shot noise at white, in linear light; read noise has a fifth of its deviation."""
LOW_LIGHT_GAIN = (0.5, 0.3, 0.18, 0.1, 0.06, 0.035)
HAZE_BETA = (0.25, 0.5, 0.85, 1.3, 1.9, 2.8)
FLARE_STRENGTH = (0.06, 0.12, 0.22, 0.38, 0.6, 0.95)
OVER_GAIN = (1.25, 1.6, 2.1, 2.8, 3.9, 5.5)
CAST_STRENGTH = (0.06, 0.12, 0.2, 0.32, 0.48, 0.7)
DESATURATION = (0.15, 0.3, 0.45, 0.62, 0.8, 1.0)
CHROMA_SHIFT_PX = (0.8, 1.6, 2.8, 4.5, 7.0, 11.0)
BANDING_STEPS = (40, 28, 19, 13, 9, 6)
RINGING_CUTOFF = (0.75, 0.58, 0.45, 0.34, 0.25, 0.18)
SHARPENING = (0.4, 0.8, 1.4, 2.3, 3.6, 5.5)
POSTER_STEPS = (12, 9, 7, 5, 4, 3, 2)
SATURATION = (1.25, 1.55, 1.95, 2.5, 3.3, 4.5)
CONTRAST_LEFT = (0.85, 0.7, 0.56, 0.43, 0.3, 0.18)
CONTRAST_GAIN = (1.25, 1.6, 2.1, 2.8, 3.9, 5.6)
IMPULSE_SHARE = (0.002, 0.006, 0.015, 0.035, 0.08, 0.17, 0.33)
CHROMA_SIGMA = (5.0, 9.0, 15.0, 24.0, 38.0, 58.0)
STRIPE_SIGMA = (2.0, 4.0, 7.0, 12.0, 20.0, 33.0)
BAR_DEPTH = (0.06, 0.12, 0.21, 0.34, 0.52, 0.78)

_RINGING_REACH_PX = 24


def to_linear(rgb: Rgb) -> Float:
    """sRGB bytes to linear light 0..1 (IEC 61966-2-1)."""
    coded = rgb.astype(np.float32) / np.float32(255)
    return np.where(coded <= 0.04045, coded / 12.92, ((coded + 0.055) / 1.055) ** 2.4).astype(
        np.float32
    )


def from_linear(light: NDArray[np.floating]) -> Rgb:
    """Linear light, cut to 0..1, to sRGB bytes."""
    light = np.clip(light, 0, 1)
    coded = np.where(light <= 0.0031308, light * 12.92, 1.055 * light ** (1 / 2.4) - 0.055)
    return to_bytes(coded * 255)


def to_bytes(values: NDArray[np.floating]) -> Rgb:
    """Rounded and cut to 0..255."""
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)


def _white_balance(rng: np.random.Generator) -> Float:
    """A camera's gains for red and blue, which amplify their noise."""
    red, blue = rng.uniform(1.6, 2.3), rng.uniform(1.4, 1.9)
    return np.array([red, 1.0, blue], np.float32)


def _shoot(light: Float, gain: float, balance: Float, grain: Float, read_grain: Float) -> Float:
    """What a sensor reads of linear light: shot and read noise before white balance.

    Poisson noise is taken as Gaussian with variance in proportion to the light (Foi et al. 2008,
    "Practical Poissonian-Gaussian noise modeling", section II), so that all levels share a grain.
    """
    raw = light / balance
    noisy = raw + grain * np.sqrt(np.float32(gain) * raw) + read_grain * np.float32(gain**0.5 / 5)
    return np.asarray(np.clip(noisy, 0, None) * balance, np.float32)


def sensor_noise(rgb: Rgb, level: int, rng: np.random.Generator) -> Rgb:
    """Noise of a sensor in linear light before white balance, more in shadows once displayed."""
    balance = _white_balance(rng)
    grain, read = (rng.standard_normal(rgb.shape, np.float32) for _ in range(2))
    return from_linear(_shoot(to_linear(rgb), SENSOR_GAIN[level - 1], balance, grain, read))


def low_light(rgb: Rgb, level: int, rng: np.random.Generator) -> Rgb:
    """A dark scene: little light, noise of a high gain, brightened half-way back (in stops)."""
    share = np.float32(LOW_LIGHT_GAIN[level - 1])
    balance = _white_balance(rng)
    grain, read = (rng.standard_normal(rgb.shape, np.float32) for _ in range(2))
    noisy = _shoot(to_linear(rgb) * share, 0.0006, balance, grain, read)
    return from_linear(noisy / np.sqrt(share))


def synthetic_depth(height: int, width: int, rng: np.random.Generator) -> Float:
    """A made-up depth 0..1 (H, W): farther towards the top, with a few hills."""
    ramp = np.linspace(1, 0, height, dtype=np.float32)[:, None] ** np.float32(rng.uniform(0.7, 1.5))
    hills = rng.standard_normal((4, 5)).astype(np.float32)
    hills = np.asarray(cv2.resize(hills, (width, height), interpolation=cv2.INTER_CUBIC))
    depth = ramp + np.float32(0.18) * hills
    return np.asarray((depth - depth.min()) / max(1e-6, float(np.ptp(depth))), np.float32)


def haze_through(rgb: Rgb, depth: Float, beta: float, airlight: float) -> Rgb:
    """Koschmieder's law: ``I t + A (1 - t)`` with ``t = exp(-beta depth)``, in linear light.

    Args:
        depth: (H, W), 0 near; its unit is one over that of ``beta``.
        beta: extinction.
        airlight: ``A``, 0..1.
    """
    if depth.shape != rgb.shape[:2]:
        raise ValueError(f"depth of shape {depth.shape} for a picture of {rgb.shape[:2]}")
    through = np.exp(-np.float32(beta) * depth)[..., None]
    return from_linear(to_linear(rgb) * through + np.float32(airlight) * (1 - through))


def haze(rgb: Rgb, level: int, rng: np.random.Generator) -> Rgb:
    """Haze that thickens with a synthetic depth."""
    height, width = rgb.shape[:2]
    depth = synthetic_depth(height, width, rng) + np.float32(0.15)
    return haze_through(rgb, depth, HAZE_BETA[level - 1], float(rng.uniform(0.65, 0.9)))


def flare(rgb: Rgb, level: int, rng: np.random.Generator) -> Rgb:
    """Veiling glare of a light near the edge, its star and three ghosts, added in linear light."""
    height, width = rgb.shape[:2]
    angle, colour = rng.uniform(0, 2 * np.pi), rng.uniform(0.75, 1.0, 3)
    light = 0.42 * np.array([np.sin(angle), np.cos(angle)])
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    y, x = y / height - np.float32(0.5), x / width - np.float32(0.5)
    far = np.hypot(y - light[0], x - light[1])
    around = np.arctan2(y - light[0], x - light[1])
    veil = np.exp(-far / 0.35) + 0.5 * np.exp(-far / 0.12) * np.cos(3 * around) ** 8
    for place, size in zip(rng.uniform(-1.6, -0.3, 3), rng.uniform(0.03, 0.09, 3), strict=True):
        ghost = np.hypot(y - place * light[0], x - place * light[1])
        veil += 0.25 / (1 + np.exp(np.clip((ghost - size) / 0.008, -50, 50)))
    added = veil[..., None] * colour * FLARE_STRENGTH[level - 1]
    return from_linear(to_linear(rgb) + added.astype(np.float32))


def overexposure(rgb: Rgb, level: int, rng: np.random.Generator) -> Rgb:
    """More light than the sensor can hold: highlights are cut."""
    return from_linear(to_linear(rgb) * np.float32(OVER_GAIN[level - 1]))


def colour_cast(rgb: Rgb, level: int, rng: np.random.Generator) -> Rgb:
    """A wrong white balance: gains along one random direction that keeps mean log light."""
    direction = rng.standard_normal(3)
    direction -= direction.mean()
    direction /= np.linalg.norm(direction)
    gains = np.exp(CAST_STRENGTH[level - 1] * direction).astype(np.float32)
    return from_linear(to_linear(rgb) * gains)


def desaturation(rgb: Rgb, level: int, rng: np.random.Generator) -> Rgb:
    """Colour faded towards the grey of the same luma."""
    grey = (rgb @ np.array([0.299, 0.587, 0.114]))[..., None]
    return to_bytes(rgb + DESATURATION[level - 1] * (grey - rgb))


def chroma_shift(rgb: Rgb, level: int, rng: np.random.Generator) -> Rgb:
    """Colour planes that lie beside the luma, in one direction."""
    height, width = rgb.shape[:2]
    angle = rng.uniform(0, 2 * np.pi)
    reach = CHROMA_SHIFT_PX[level - 1]
    move = np.array([[1, 0, reach * np.cos(angle)], [0, 1, reach * np.sin(angle)]])
    ycc = np.asarray(cv2.cvtColor(rgb, cv2.COLOR_RGB2YCrCb), np.uint8)
    moved = cv2.warpAffine(ycc, move, (width, height), borderMode=cv2.BORDER_REFLECT)
    ycc[..., 1:] = np.asarray(moved, np.uint8)[..., 1:]
    return np.asarray(cv2.cvtColor(ycc, cv2.COLOR_YCrCb2RGB), np.uint8)


def banding(rgb: Rgb, level: int, rng: np.random.Generator) -> Rgb:
    """Too few steps for a smooth ramp, without dither."""
    last = BANDING_STEPS[level - 1] - 1
    steps = np.rint(np.arange(256) / 255 * last) * 255 / last
    return np.asarray(np.rint(steps).astype(np.uint8)[rgb], np.uint8)


def ringing(rgb: Rgb, level: int, rng: np.random.Generator) -> Rgb:
    """Echoes of edges: a steep low-pass, as of a resizer or transform without a window."""
    cutoff = RINGING_CUTOFF[level - 1]
    places = np.arange(-_RINGING_REACH_PX, _RINGING_REACH_PX + 1)
    kernel = cutoff * np.sinc(cutoff * places)
    kernel /= kernel.sum()
    filtered = cv2.sepFilter2D(
        rgb.astype(np.float32), -1, kernel, kernel, borderType=cv2.BORDER_REFLECT
    )
    return to_bytes(np.asarray(filtered, np.float32))


def oversharpening(rgb: Rgb, level: int, rng: np.random.Generator) -> Rgb:
    """Unsharp masking with too much gain: halos."""
    picture = rgb.astype(np.float32)
    soft = np.asarray(cv2.GaussianBlur(picture, (0, 0), 1.6), np.float32)
    return to_bytes(picture + np.float32(SHARPENING[level - 1]) * (picture - soft))


def _weighed_luma(rgb: Rgb) -> Float:
    """BT.601 luma 0..255 as (H, W, 1)."""
    return np.asarray((rgb @ np.array([0.299, 0.587, 0.114], np.float32))[..., None], np.float32)


def posterising(rgb: Rgb, level: int, rng: np.random.Generator) -> Rgb:
    """So few colours that areas stand apart: palettes of screen sharing, keyers, capture cards.

    A ladder rounds red, green and blue alone, or the luma with the colour as it was.
    """
    last = POSTER_STEPS[level - 1] - 1
    if rng.integers(2):
        steps = np.rint(np.arange(256) / 255 * last) * 255 / last
        return np.asarray(np.rint(steps).astype(np.uint8)[rgb], np.uint8)
    luma = _weighed_luma(rgb)
    return to_bytes(rgb + np.rint(luma / 255 * last) * np.float32(255 / last) - luma)


def oversaturation(rgb: Rgb, level: int, rng: np.random.Generator) -> Rgb:
    """Colour amplified until it clips: a camera's vivid mode, or a wrong matrix twice over."""
    luma = _weighed_luma(rgb)
    return to_bytes(luma + np.float32(SATURATION[level - 1]) * (rgb - luma))


def contrast_loss(rgb: Rgb, level: int, rng: np.random.Generator) -> Rgb:
    """Values drawn towards one grey: raised blacks, veiling light, limited range taken as full."""
    grey = np.float32(rng.uniform(70, 190))
    return to_bytes(grey + np.float32(CONTRAST_LEFT[level - 1]) * (rgb - grey))


def contrast_excess(rgb: Rgb, level: int, rng: np.random.Generator) -> Rgb:
    """Values driven away from one grey until they clip: full range taken as limited, and worse."""
    grey = np.float32(rng.uniform(90, 165))
    return to_bytes(grey + np.float32(CONTRAST_GAIN[level - 1]) * (rgb - grey))


def impulse_noise(rgb: Rgb, level: int, rng: np.random.Generator) -> Rgb:
    """Single pixels black or white: bit errors of analogue and serial links, dead and hot pixels.

    A pixel that is lost at one level is lost, with the same value, at every higher one.
    """
    drawn = rng.random(rgb.shape[:2], np.float32)
    white = rng.random(rgb.shape[:2], np.float32) < 0.5
    lost = drawn < IMPULSE_SHARE[level - 1]
    values = np.where(white, 255, 0).astype(np.uint8)
    return np.where(lost[..., None], values[..., None], rgb)


def colour_noise(rgb: Rgb, level: int, rng: np.random.Generator) -> Rgb:
    """Coloured blotches of two pixels and more on an even luma.

    Noise reduction that smooths the luma alone leaves it, and weak composite or radio links.
    """
    grain = rng.standard_normal((*rgb.shape[:2], 2), np.float32)
    grain = np.asarray(cv2.GaussianBlur(grain, (0, 0), 1.2), np.float32)
    red, blue = np.moveaxis(grain / grain.std() * np.float32(CHROMA_SIGMA[level - 1]), -1, 0)
    green = -(0.299 * red + 0.114 * blue) / np.float32(0.587)  # so that the luma stays
    return to_bytes(rgb + np.stack([red, green, blue], -1))


def stripes(rgb: Rgb, level: int, rng: np.random.Generator) -> Rgb:
    """Columns or rows that read higher or lower than they should: a sensor's fixed pattern.

    In thermal and cheap CMOS cameras, most of all in poor light. It stands still in a clip.
    """
    axis = int(rng.integers(2))
    offsets = np.asarray(rng.standard_normal((rgb.shape[axis],)), np.float32)
    offsets = np.expand_dims(offsets * np.float32(STRIPE_SIGMA[level - 1]), 1 - axis)
    return to_bytes(rgb + offsets[..., None])


def rolling_bars(rgb: Rgb, level: int, rng: np.random.Generator) -> Rgb:
    """Dark bars across the picture: a rolling shutter under a lamp that flickers, or mains hum."""
    cycles, phase = rng.uniform(1.5, 6), rng.uniform(0, 2 * np.pi)
    place = np.linspace(0, 2 * np.pi * cycles, len(rgb), dtype=np.float32) + np.float32(phase)
    dimmed = np.float32(BAR_DEPTH[level - 1]) * (np.float32(0.5) + np.sin(place) / 2)
    return from_linear(to_linear(rgb) * (1 - dimmed)[:, None, None])
