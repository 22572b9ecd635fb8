"""Degradations of clean pictures and clips: a table of ladders, and chains of them.

:data:`DEGRADATIONS` names every ladder with its number of levels. Levels are our own, spaced so
that neighbours are just tellable apart, and grow from 1 (slight); level 0 is the clean input. A
degradation draws its random choices (grain, direction, place) independently of the level: from
generators in the same state, the levels of a ladder are one and the same damage growing.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, overload

import numpy as np

from dgiqa_stream.errors import ConfigError
from distill.data import blocks, damage, degrade, optics
from distill.data.codecs import CODECS, Clip, Rgb, transcode

Act = Callable[[Clip, int, np.random.Generator], Clip]
PictureAct = Callable[[Rgb, int, np.random.Generator], Rgb]

SHORTEST_PX = 64
"""Pictures smaller than this on a side have no room for blocks, slices and grain."""


@dataclass(frozen=True, slots=True)
class Degradation:
    """One ladder."""

    name: str
    num_levels: int
    act: Act
    kind: Literal["still", "codec", "moving", "timing"]
    """still: each frame alone. codec and moving: a picture becomes a short pan that ends on it.
    timing: only a clip can have it."""
    num_frames: int = 1
    """Length of the pan that a picture becomes."""
    step_px: int = 2

    @overload
    def apply(self, frames: Rgb, level: int, rng: np.random.Generator) -> Rgb: ...
    @overload
    def apply(self, frames: Clip, level: int, rng: np.random.Generator) -> Clip: ...
    def apply(self, frames: Rgb | Clip, level: int, rng: np.random.Generator) -> Rgb | Clip:
        """The degraded picture or clip, of the same shape; level 0 is a copy.

        Args:
            frames: uint8 RGB (H, W, 3), or a list of them for a clip.
            rng: is advanced; give generators in the same state for the levels of one ladder.

        Raises ``ConfigError`` for a level that does not exist or a picture where a clip is needed,
        ``ValueError`` for frames of another type or shape.
        """
        if not 0 <= level <= self.num_levels:
            raise ConfigError(f"{self.name} has levels 0 to {self.num_levels}, not {level}")
        clip = [frames] if isinstance(frames, np.ndarray) else list(frames)
        _check(clip)
        if level == 0:
            out = [frame.copy() for frame in clip]
        elif not isinstance(frames, np.ndarray):
            out = self._apply_to_clip(clip, level, rng)
        else:
            out = self._apply_to_picture(frames, level, rng)
        return out[-1] if isinstance(frames, np.ndarray) else out

    def _apply_to_picture(self, picture: Rgb, level: int, rng: np.random.Generator) -> Clip:
        if self.kind == "timing":
            raise ConfigError(f"{self.name} needs a clip: give a list of frames")
        pan = damage.moving(picture, num_frames=self.num_frames, step_px=self.step_px)
        return self.act(pan, level, rng)

    def _apply_to_clip(self, clip: Clip, level: int, rng: np.random.Generator) -> Clip:
        if self.kind == "timing" and len(clip) < 2:
            raise ConfigError(f"{self.name} needs a clip of 2 frames or more, not {len(clip)}")
        return self.act(clip, level, rng)


def _check(clip: Clip) -> None:
    if not clip:
        raise ValueError("a clip without frames cannot be degraded")
    for frame in clip:
        if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3:
            raise ValueError(f"frames are uint8 (H, W, 3), not {frame.dtype} {frame.shape}")
        if frame.shape != clip[0].shape:
            raise ValueError(f"frames of one clip have one size, not {clip[0].shape} and more")
    if min(clip[0].shape[:2]) < SHORTEST_PX:
        raise ValueError(f"frames are {SHORTEST_PX} px or more on a side, not {clip[0].shape[:2]}")


def _still(name: str, act: PictureAct, levels: tuple[object, ...], *, grain: bool) -> Degradation:
    """A ladder of single frames; ``grain`` is drawn anew for each frame, all else once a clip."""

    def each(frames: Clip, level: int, rng: np.random.Generator) -> Clip:
        seeds = rng.integers(2**63, size=len(frames))
        states = [np.random.default_rng(s if grain else seeds[0]) for s in seeds]
        return [act(frame, level, state) for frame, state in zip(frames, states, strict=True)]

    return Degradation(name, len(levels), each, "still")


def _coded(name: str, codec: str, *, scales: tuple[float, ...] = ()) -> Degradation:
    """A codec's ladder, at full size or (``scales``) ever smaller at middling quality."""
    points = CODECS[codec].points

    def code(frames: Clip, level: int, rng: np.random.Generator) -> Clip:
        if scales:
            return transcode(frames, codec, points[2], scale=scales[level - 1])
        return transcode(frames, codec, points[level - 1])

    num_levels = len(scales or points)
    return Degradation(name, num_levels, code, "codec", num_frames=5)


def _two_generations(name: str, first: str, second: str) -> Degradation:
    """Coded by one codec and then by another, as a stream that is transcoded on its way."""
    num_levels = min(len(CODECS[first].points), len(CODECS[second].points))

    def code(frames: Clip, level: int, rng: np.random.Generator) -> Clip:
        once = transcode(frames, first, CODECS[first].points[level - 1])
        return transcode(once, second, CODECS[second].points[level - 1])

    return Degradation(name, num_levels, code, "codec", num_frames=5)


def _clip(name: str, act: Act, levels: tuple[object, ...]) -> Degradation:
    return Degradation(name, len(levels), act, "timing")


_RESCALES = (0.75, 0.6, 0.48, 0.38, 0.3, 0.24)

_LADDERS = (
    _still("gaussian_blur", degrade.blur, degrade.BLUR_SIGMA_PX, grain=False),
    _still("defocus", degrade.defocus, degrade.DEFOCUS_RADIUS_PX, grain=False),
    _still("motion_blur", degrade.motion_blur, degrade.MOTION_LENGTH_PX, grain=False),
    _still("gaussian_noise", degrade.noise, degrade.NOISE_SIGMA, grain=True),
    _still("sensor_noise", optics.sensor_noise, optics.SENSOR_GAIN, grain=True),
    _still("low_light", optics.low_light, optics.LOW_LIGHT_GAIN, grain=True),
    _still("haze", optics.haze, optics.HAZE_BETA, grain=False),
    _still("flare", optics.flare, optics.FLARE_STRENGTH, grain=False),
    _still("underexposure", degrade.underexposure, degrade.DIM_GAIN, grain=False),
    _still("overexposure", optics.overexposure, optics.OVER_GAIN, grain=False),
    _still("colour_cast", optics.colour_cast, optics.CAST_STRENGTH, grain=False),
    _still("desaturation", optics.desaturation, optics.DESATURATION, grain=False),
    _still("chroma_shift", optics.chroma_shift, optics.CHROMA_SHIFT_PX, grain=False),
    _still("banding", optics.banding, optics.BANDING_STEPS, grain=False),
    _still("ringing", optics.ringing, optics.RINGING_CUTOFF, grain=False),
    _still("oversharpening", optics.oversharpening, optics.SHARPENING, grain=False),
    _still("upscaling", degrade.rescale, degrade.RESCALE_FACTOR, grain=False),
    _still("posterising", optics.posterising, optics.POSTER_STEPS, grain=False),
    _still("oversaturation", optics.oversaturation, optics.SATURATION, grain=False),
    _still("contrast_loss", optics.contrast_loss, optics.CONTRAST_LEFT, grain=False),
    _still("contrast_excess", optics.contrast_excess, optics.CONTRAST_GAIN, grain=False),
    _still("impulse_noise", optics.impulse_noise, optics.IMPULSE_SHARE, grain=True),
    _still("colour_noise", optics.colour_noise, optics.CHROMA_SIGMA, grain=True),
    _still("stripes", optics.stripes, optics.STRIPE_SIGMA, grain=False),
    _still("rolling_bars", optics.rolling_bars, optics.BAR_DEPTH, grain=False),
    _still("pixelation", blocks.pixelation, blocks.PIXEL_PX, grain=False),
    _still("lost_blocks", blocks.lost_blocks, blocks.LOST_BLOCK_SHARE, grain=False),
    _still("partial_frame", blocks.partial_frame, blocks.LOST_BELOW_SHARE, grain=False),
    _still("jpeg", blocks.jpeg, blocks.BASELINE_QUALITY, grain=False),
    _still("luma_blocks", blocks.luma_blocks, blocks.LUMA_STEP, grain=False),
    _still("chroma_subsampling", blocks.chroma_subsampling, blocks.CHROMA_CELL_PX, grain=False),
    *(_coded(name, name) for name in CODECS),
    _coded("h264_rescaled", "h264", scales=_RESCALES),
    _coded("av1_rescaled", "av1", scales=_RESCALES),
    _two_generations("h264_then_h265", "h264", "h265"),
    _two_generations("mpeg2_then_h264", "mpeg2", "h264"),
    Degradation("packet_loss", len(damage.LOST_SHARE), damage.packet_loss, "moving", num_frames=8),
    Degradation(
        "packet_corruption",
        len(damage.LOST_SHARE),
        damage.packet_corruption,
        "moving",
        num_frames=8,
    ),
    Degradation(
        "interlacing",
        len(damage.FIELD_DELAY_FRAMES),
        damage.interlacing,
        "moving",
        num_frames=max(damage.FIELD_DELAY_FRAMES) + 1,
        step_px=1,
    ),
    _clip("freeze", damage.freeze, damage.FROZEN_SHARE),
    _clip("dropped_frames", damage.dropped_frames, damage.DROPPED_SHARE),
)

DEGRADATIONS: Mapping[str, Degradation] = MappingProxyType({d.name: d for d in _LADDERS})

PICTURE_DEGRADATIONS = tuple(d.name for d in _LADDERS if d.kind != "timing")
"""Those that a single picture can have."""


def degradation(name: str) -> Degradation:
    """A ladder by name; raises ``ConfigError`` naming those there are."""
    if name not in DEGRADATIONS:
        raise ConfigError(f"no degradation {name!r}; known: {', '.join(DEGRADATIONS)}")
    return DEGRADATIONS[name]


def ladder_rng(seed: int, content: str, name: str) -> np.random.Generator:
    """A new generator of one ladder of one content: the same for each of its levels."""
    return np.random.default_rng([seed, zlib.crc32(content.encode()), zlib.crc32(name.encode())])


@overload
def ladder(name: str, frames: Rgb, *, seed: int, content: str = "") -> Iterator[Rgb]: ...
@overload
def ladder(name: str, frames: Clip, *, seed: int, content: str = "") -> Iterator[Clip]: ...
def ladder(
    name: str, frames: Rgb | Clip, *, seed: int, content: str = ""
) -> Iterator[Rgb] | Iterator[Clip]:
    """Levels 1 to the last of one degradation, with one set of random choices."""
    chosen = degradation(name)
    for level in range(1, chosen.num_levels + 1):
        yield chosen.apply(frames, level, ladder_rng(seed, content, name))  # type: ignore[misc]


@dataclass(frozen=True, slots=True)
class Chain:
    """Several degradations one after another, each at its level."""

    steps: tuple[tuple[Degradation, int], ...]

    @property
    def name(self) -> str:
        """As ``haze:3+h264:5``."""
        return "+".join(f"{step.name}:{level}" for step, level in self.steps)

    def _states(self, rng: np.random.Generator) -> list[np.random.Generator]:
        return [np.random.default_rng(s) for s in rng.integers(2**63, size=len(self.steps))]

    @overload
    def apply(self, frames: Rgb, rng: np.random.Generator) -> Rgb: ...
    @overload
    def apply(self, frames: Clip, rng: np.random.Generator) -> Clip: ...
    def apply(self, frames: Rgb | Clip, rng: np.random.Generator) -> Rgb | Clip:
        """All steps, each on the result of the one before."""
        out = frames
        for (step, level), state in zip(self.steps, self._states(rng), strict=True):
            out = step.apply(out, level, state)  # type: ignore[arg-type]
        return out

    @overload
    def components(self, frames: Rgb, rng: np.random.Generator) -> list[Rgb]: ...
    @overload
    def components(self, frames: Clip, rng: np.random.Generator) -> list[Clip]: ...
    def components(self, frames: Rgb | Clip, rng: np.random.Generator) -> list[Rgb] | list[Clip]:
        """Each step alone on the clean input, with the random choices it has in the chain."""
        states = zip(self.steps, self._states(rng), strict=True)
        return [step.apply(frames, level, state) for (step, level), state in states]  # type: ignore[misc,return-value,arg-type]


def chain(*steps: tuple[str, int]) -> Chain:
    """A chain of named degradations at their levels; raises ``ConfigError`` for unknown ones."""
    if not steps:
        raise ConfigError("a chain has one step or more")
    chosen = tuple((degradation(name), level) for name, level in steps)
    for step, level in chosen:
        if not 1 <= level <= step.num_levels:
            raise ConfigError(f"{step.name} has levels 1 to {step.num_levels}, not {level}")
    return Chain(chosen)
