"""The values that flow from a source to the sinks: frozen, checked when built.

``url -> Frame -> FrameBatch -> FrameScore -> WindowScore``; ``StreamInfo`` once beside them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from fractions import Fraction
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Samples = NDArray[np.uint8] | NDArray[np.uint16]

DynamicRange = Literal["sdr", "pq", "hlg"]
OutOfDomain = Literal["hdr", "unfamiliar", "flat"]
"""Why a score is of a picture of a kind that the model was never tried on.

``hdr``: the stream says that it is PQ or HLG. ``unfamiliar``: the model says that it was trained on
nothing like it. ``flat``: the picture is of one colour, black above all; the score of nothing means
nothing.
"""
ROTATIONS = (0, 90, 180, 270)


class ColorMatrix(StrEnum):
    """Coefficients that take Y'CbCr to R'G'B' (ITU-T H.273, MatrixCoefficients)."""

    BT601 = "bt601"
    BT709 = "bt709"
    BT2020 = "bt2020"


class OverloadPolicy(StrEnum):
    """What the reader does when scoring is slower than decoding."""

    WAIT = "wait"
    """Decoding waits; nothing is lost. For files."""
    DROP_OLDEST = "drop_oldest"
    """The oldest waiting frame is dropped and counted. For live streams."""


@dataclass(frozen=True, slots=True)
class Crop:
    """A rectangle of the upright picture, in pixels; what is outside is not scored."""

    left: int
    top: int
    width: int
    height: int

    def __post_init__(self) -> None:
        """Refuse an empty rectangle or one that starts outside the picture."""
        if self.left < 0 or self.top < 0 or self.width < 1 or self.height < 1:
            raise ValueError(
                f"crop {self.left},{self.top},{self.width},{self.height} is not a rectangle: "
                "left and top must be 0 or more, width and height at least 1"
            )


@dataclass(frozen=True, slots=True)
class HdrTags:
    """How the samples of an HDR picture stand for light; see :mod:`dgiqa_stream.tone_mapping`."""

    transfer: Literal["pq", "hlg"]
    peak_cd_m2: float = 1000.0
    """The brightest light that a PQ picture holds; HLG is relative and has no use for it."""
    primaries: Literal["bt709", "p3", "bt2020"] = "bt2020"

    def __post_init__(self) -> None:
        """Refuse a peak that PQ cannot code."""
        if not 0 < self.peak_cd_m2 <= 10_000:
            raise ValueError(f"peak {self.peak_cd_m2} cd/m² is not above 0 and at most 10,000")


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Planes:
    """Decoded samples of one frame as stored, with the tags that give them colour.

    ``samples`` holds one of

    * ``(luma, cb, cr)``: arrays (H, W), (h, w), (h, w), chroma possibly subsampled,
    * ``(luma,)``: one array (H, W), grey,
    * ``(rgb,)``: one array (H, W, 3), full range.

    8-bit samples are uint8; deeper ones are uint16 with ``bit_depth`` significant low bits.
    Arrays may be strided views into the decoder's own (padded) memory and must not be written.
    """

    samples: tuple[Samples, ...]
    matrix: ColorMatrix = ColorMatrix.BT709
    full_range: bool = False
    bit_depth: int = 8
    rotation: int = 0
    """Clockwise turn, in degrees, that shows the picture upright."""
    hdr: HdrTags | None = None
    """Where a view is to be tone mapped; None takes the samples as SDR."""

    def __post_init__(self) -> None:
        """Refuse samples that do not form a picture."""
        if self.rotation not in ROTATIONS:
            raise ValueError(f"rotation {self.rotation} is not one of {ROTATIONS} degrees")
        if not 8 <= self.bit_depth <= 16:
            raise ValueError(f"bit depth {self.bit_depth} is not within 8..16")
        first = self.samples[0]
        shapes = [s.shape for s in self.samples]
        is_rgb = len(shapes) == 1 and first.ndim == 3 and first.shape[2] == 3
        is_luma = first.ndim == 2 and (
            len(shapes) == 1 or (len(shapes) == 3 and shapes[1] == shapes[2])
        )
        if not (is_rgb or is_luma) or 0 in first.shape:
            raise ValueError(f"planes of shapes {shapes} are neither RGB, grey nor Y'CbCr")
        wanted = "uint8" if self.bit_depth == 8 else "uint16"
        if any(s.dtype.name != wanted for s in self.samples):
            kinds = [s.dtype.name for s in self.samples]
            raise ValueError(f"{self.bit_depth}-bit samples must be {wanted}, not {kinds}")

    @property
    def is_rgb(self) -> bool:
        """Whether the samples are packed RGB rather than luma with or without chroma."""
        return self.samples[0].ndim == 3

    @property
    def size(self) -> tuple[int, int]:
        """Height and width as stored, before rotation."""
        height, width = self.samples[0].shape[:2]
        return height, width

    def __repr__(self) -> str:
        """Shapes and tags, not samples."""
        shapes = "+".join("x".join(map(str, s.shape)) for s in self.samples)
        span = "full" if self.full_range else "limited"
        light = f", {self.hdr.transfer}" if self.hdr else ""
        return (
            f"Planes({shapes}, {self.bit_depth} bit, {self.matrix}, {span}, "
            f"rot {self.rotation}{light})"
        )


@dataclass(frozen=True, slots=True)
class StreamInfo:
    """What is known of a stream when it has been opened."""

    width: int
    """Displayed width in pixels, rotation applied."""
    height: int
    codec: str
    """FFmpeg's decoder name, such as ``h264``."""
    pix_fmt: str
    average_fps: Fraction | None
    duration_seconds: float | None
    num_frames_from_header: int | None
    is_live: bool
    container: str
    """FFmpeg's demuxer name, such as ``mpegts``."""
    decoder: str = "software"
    """What decodes: ``software``, with the reason in brackets where a device was asked for, or the
    device, such as ``cuda:0``."""


@dataclass(frozen=True, slots=True)
class FrameInfo:
    """When a frame is shown and what is known of it, without its samples."""

    index: int
    """Decode order from 0, counted from where reading began: the first frame at or after
    ``start_seconds``, whose place in the file is not known without decoding all before it. Where
    interlaced frames are bobbed, each of their two pictures counts. A gap means frames were not
    handed on."""
    pts_seconds: float
    """Presentation time on the stream's own clock, made continuous across discontinuities."""
    duration_seconds: float
    """How long the frame is shown; 0 when the stream does not say."""
    pts: int | None
    """The container's own time stamp, in units of ``time_base``; None when it had none."""
    time_base: Fraction | None
    width: int
    """Displayed width in pixels, rotation applied."""
    height: int
    pix_fmt: str
    keyframe: bool = False
    corrupt: bool = False
    """The decoder concealed damage in this frame."""
    interlaced: bool = False
    """The picture holds two fields of different moments."""
    rotation: int = 0
    dynamic_range: DynamicRange = "sdr"
    discontinuity: bool = False
    """The stream's clock jumped just before this frame."""
    received_at_seconds: float = 0.0
    """Wall clock (Unix time) when the frame left the decoder."""

    def __post_init__(self) -> None:
        """Refuse times and sizes that cannot be."""
        if not math.isfinite(self.pts_seconds):
            raise ValueError(f"pts_seconds {self.pts_seconds} is not a time")
        if not (math.isfinite(self.duration_seconds) and self.duration_seconds >= 0):
            raise ValueError(f"duration_seconds {self.duration_seconds} is not 0 or more")
        if self.index < 0 or self.width < 1 or self.height < 1:
            raise ValueError(f"frame {self.index} of {self.width}x{self.height} pixels cannot be")


@dataclass(frozen=True, slots=True, eq=False)
class Frame:
    """One decoded picture and when it is shown."""

    planes: Planes
    info: FrameInfo
    stream: str
    """The id of the stream it belongs to."""


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class FrameBatch:
    """Model inputs cut from one or more frames.

    ``views`` maps a view's name to uint8 (N, height, width, 3), RGB.
    """

    views: Mapping[str, NDArray[np.uint8]]

    def __post_init__(self) -> None:
        """Refuse views of different lengths."""
        lengths = {len(v) for v in self.views.values()}
        if len(lengths) != 1 or 0 in lengths:
            raise ValueError(f"views hold different numbers of frames: {self!r}")

    def __len__(self) -> int:
        """The number of frames."""
        return len(next(iter(self.views.values())))

    def __repr__(self) -> str:
        """Shapes, not pixels."""
        shapes = ", ".join(f"{name} {v.shape}" for name, v in self.views.items())
        return f"FrameBatch({shapes})"


@dataclass(frozen=True, slots=True)
class FrameScore:
    """The predicted quality of one frame."""

    info: FrameInfo
    stream: str
    score: float
    """0 (worst) to 100 (best)."""
    raw: float
    """The network's own output, before the manifest's score mapping."""
    interval: tuple[float, float] | None = None
    """Low and high, 0..100: where the mean opinion of those who see the frame is likely to lie.
    None where the model does not say.
    """
    out_of_domain: tuple[OutOfDomain, ...] = ()
    """Why to read the score with care; empty where there is no known reason."""
    scored_at_seconds: float = 0.0
    """Wall clock (Unix time) when the score was known."""

    def __post_init__(self) -> None:
        """Refuse a score outside the scale."""
        if not 0.0 <= self.score <= 100.0:
            raise ValueError(f"score {self.score} is outside 0..100")
        if self.interval is not None and not 0.0 <= self.interval[0] <= self.interval[1] <= 100.0:
            raise ValueError(f"interval {self.interval} is not low and high within 0..100")

    @property
    def in_domain(self) -> bool:
        """False where the model was never tried, as far as is known."""
        return not self.out_of_domain


@dataclass(frozen=True, slots=True)
class WindowScore:
    """Frame scores of a stretch of time, pooled."""

    stream: str
    kind: Literal["sliding", "session"]
    length_seconds: float
    """Nominal length of the window; for a session, its length so far."""
    hop_seconds: float
    """Distance between two windows; 0 for a session."""
    begin_seconds: float
    end_seconds: float
    num_frames: int
    expected_frames: float | None
    """Frames a complete window would hold at the nominal sampling rate; None if unknown."""
    coverage: float
    """Share of the window, 0..1, that scored frames account for."""
    valid: bool
    """False when less than half of the window is covered."""
    pool: Mapping[str, float | None]
    """Pooled values by the pooler's name; None (never NaN) where there was nothing to pool."""
    headline: str
    """Name of the pooled value to look at first."""
    params: Mapping[str, float] = field(default_factory=dict)
    in_domain_share: float | None = None
    """Share of the scored time, 0..1, whose frames are in domain; None where nothing was scored.
    The others are pooled all the same.
    """

    @property
    def score(self) -> float | None:
        """The headline value."""
        return self.pool.get(self.headline)
