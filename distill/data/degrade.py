"""Degradations of clean pictures, each a ladder of levels from slight (1) to severe.

Each function takes uint8 RGB (H, W, 3) and returns the same shape. Codec ladders encode a short
pan over the picture, so that motion compensation and rate control take part, and keep one
inter-coded frame of it.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from fractions import Fraction

import av
import cv2
import numpy as np
from numpy.typing import NDArray

from dgiqa_stream.sources._planes import planes_of
from dgiqa_stream.types import Planes
from distill.data.codecs import X264_PARAMS
from distill.data.packed import as_planes_420

Rgb = NDArray[np.uint8]


def _bytes(picture: object) -> Rgb:
    """OpenCV's results are typed as any array; ours are bytes."""
    return np.asarray(picture, np.uint8)


BLUR_SIGMA_PX = (0.6, 0.9, 1.3, 1.9, 2.8, 4.2)
DEFOCUS_RADIUS_PX = (1.0, 1.6, 2.4, 3.6, 5.4, 8.0)
MOTION_LENGTH_PX = (3, 5, 8, 12, 18, 27)
NOISE_SIGMA = (3.0, 6.0, 10.0, 16.0, 25.0, 40.0)
SHADOW_NOISE_GAIN = (0.01, 0.02, 0.04, 0.07, 0.12, 0.2)
JPEG_QUALITY = (75, 55, 38, 24, 14, 7)
RESCALE_FACTOR = (0.75, 0.55, 0.4, 0.3, 0.22, 0.16)
DIM_GAIN = (0.8, 0.6, 0.45, 0.32, 0.22, 0.14)
CRF_H264 = (19, 25, 31, 36, 41, 46, 50)
CRF_H265 = (21, 27, 33, 38, 43, 48)
PAN_FRAMES, PAN_STEP_PX, KEPT_FRAME = 12, 2, 8


def blur(rgb: Rgb, level: int, rng: np.random.Generator) -> Rgb:
    """Gaussian blur."""
    return _bytes(cv2.GaussianBlur(rgb, (0, 0), BLUR_SIGMA_PX[level - 1]))


def defocus(rgb: Rgb, level: int, rng: np.random.Generator) -> Rgb:
    """Blur by a disc, as a lens out of focus gives."""
    radius = DEFOCUS_RADIUS_PX[level - 1]
    reach = int(np.ceil(radius))
    y, x = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    disc = np.clip(radius + 0.5 - np.hypot(x, y), 0, 1)
    return _bytes(cv2.filter2D(rgb, -1, disc / disc.sum(), borderType=cv2.BORDER_REFLECT))


def motion_blur(rgb: Rgb, level: int, rng: np.random.Generator) -> Rgb:
    """Blur along a straight path of random direction."""
    length = MOTION_LENGTH_PX[level - 1]
    kernel = np.zeros((2 * length + 1,) * 2, np.float32)
    angle = rng.uniform(0, np.pi)
    reach = np.array([np.cos(angle), np.sin(angle)]) * length / 2
    ends = [tuple(round(16 * (length + sign * float(c))) for c in reach) for sign in (-1, 1)]
    cv2.line(kernel, ends[0], ends[1], 1.0, lineType=cv2.LINE_AA, shift=4)
    return _bytes(cv2.filter2D(rgb, -1, kernel / kernel.sum(), borderType=cv2.BORDER_REFLECT))


def noise(rgb: Rgb, level: int, rng: np.random.Generator) -> Rgb:
    """Independent Gaussian noise in each colour, in 8-bit steps."""
    grain = rng.standard_normal(rgb.shape, np.float32) * np.float32(NOISE_SIGMA[level - 1])
    return np.clip(np.rint(rgb + grain), 0, 255).astype(np.uint8)


def low_light_noise(rgb: Rgb, level: int, rng: np.random.Generator) -> Rgb:
    """A darker exposure brought half-way back, with signal-dependent noise."""
    gain = SHADOW_NOISE_GAIN[level - 1]
    light = (rgb / np.float32(255.0)) ** np.float32(2.2)
    noisy = light + rng.standard_normal(rgb.shape, np.float32) * np.sqrt(gain * light * 0.15)
    noisy += rng.standard_normal(rgb.shape, np.float32) * np.float32(gain * 0.25)
    dimmed = np.clip(noisy, 0, 1) ** np.float32(1 / 2.2) * np.float32(1 - 1.5 * gain)
    return np.clip(np.rint(dimmed * 255), 0, 255).astype(np.uint8)


def underexposure(rgb: Rgb, level: int, rng: np.random.Generator) -> Rgb:
    """Less light, in linear light."""
    gain = np.float32(DIM_GAIN[level - 1] ** 2.2)
    light = (rgb / np.float32(255.0)) ** np.float32(2.2) * gain
    return np.rint(light ** np.float32(1 / 2.2) * 255).astype(np.uint8)


def jpeg(rgb: Rgb, level: int, rng: np.random.Generator) -> Rgb:
    """Baseline JPEG, 4:2:0."""
    options = [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY[level - 1]]
    ok, coded = cv2.imencode(".jpg", cv2.cvtColor(rgb, cv2.COLOR_RGB2BGR), options)
    if not ok:
        raise RuntimeError(f"OpenCV did not encode a JPEG of shape {rgb.shape}")
    return _bytes(cv2.cvtColor(_bytes(cv2.imdecode(coded, cv2.IMREAD_COLOR)), cv2.COLOR_BGR2RGB))


def rescale(rgb: Rgb, level: int, rng: np.random.Generator) -> Rgb:
    """Reduced by area and enlarged again (bicubic, bilinear or Lanczos), as an upscaled stream."""
    height, width = rgb.shape[:2]
    factor = RESCALE_FACTOR[level - 1]
    small = max(8, round(width * factor)), max(8, round(height * factor))
    how = (cv2.INTER_CUBIC, cv2.INTER_LINEAR, cv2.INTER_LANCZOS4)[int(rng.integers(3))]
    reduced = cv2.resize(rgb, small, interpolation=cv2.INTER_AREA)
    return _bytes(cv2.resize(reduced, (width, height), interpolation=how))


PICTURE_LADDERS: dict[str, tuple[Callable[[Rgb, int, np.random.Generator], Rgb], int]] = {
    "blur": (blur, len(BLUR_SIGMA_PX)),
    "defocus": (defocus, len(DEFOCUS_RADIUS_PX)),
    "motion_blur": (motion_blur, len(MOTION_LENGTH_PX)),
    "noise": (noise, len(NOISE_SIGMA)),
    "low_light_noise": (low_light_noise, len(SHADOW_NOISE_GAIN)),
    "underexposure": (underexposure, len(DIM_GAIN)),
    "jpeg": (jpeg, len(JPEG_QUALITY)),
    "rescale": (rescale, len(RESCALE_FACTOR)),
}
CODEC_LADDERS: dict[str, tuple[str, tuple[int, ...]]] = {
    "h264": ("libx264", CRF_H264),
    "h265": ("libx265", CRF_H265),
}


def pan(rgb: Rgb, *, num_frames: int = PAN_FRAMES, step_px: int = PAN_STEP_PX) -> Iterator[Rgb]:
    """Windows of a picture moving ``step_px`` right and down a frame: a clip with real motion."""
    travel = step_px * (num_frames - 1)
    height, width = (rgb.shape[0] - travel) & ~1, (rgb.shape[1] - travel) & ~1
    for i in range(num_frames):
        at = i * step_px
        yield rgb[at : at + height, at : at + width]


def encode(
    frames: list[Rgb],
    codec: str,
    crf: int,
    *,
    preset: str = "medium",
    macroblock_tree: bool = False,
) -> bytes:
    """An MP4 in memory at a constant rate factor, 25 frames a second, 4:2:0 BT.709 limited.

    ``macroblock_tree`` is libx264's, on in its defaults: with it one input may give several streams
    (:data:`distill.data.codecs.X264_PARAMS`), so only what must repeat older figures asks for it.
    """
    out = io.BytesIO()
    height, width = frames[0].shape[:2]
    own = {"x265-params": "log-level=none"} if codec == "libx265" else {}
    if codec == "libx264" and not macroblock_tree:
        own = {"x264-params": X264_PARAMS}
    with av.open(out, "w", format="mp4") as container:
        stream = container.add_stream(
            codec, rate=25, options={"crf": str(crf), "preset": preset, **own}
        )
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.codec_context.colorspace = 1
        stream.codec_context.color_range = 1
        stream.codec_context.thread_count = 1
        stream.codec_context.time_base = Fraction(1, 25)
        for i, rgb in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(rgb), format="rgb24")
            frame = frame.reformat(format="yuv420p", dst_colorspace="ITU709")
            frame.pts = i
            container.mux(stream.encode(frame))  # type: ignore[arg-type]
        container.mux(stream.encode(None))
    return out.getvalue()


def coded_frame(rgb: Rgb, ladder: str, level: int) -> Planes:
    """One inter-coded frame of a pan over the picture, as decoded; level 0 is the frame uncoded."""
    frames = list(pan(rgb))
    if level == 0:
        return as_planes_420(frames[KEPT_FRAME])
    codec, rates = CODEC_LADDERS[ladder]
    coded = encode(frames, codec, rates[level - 1])
    with av.open(io.BytesIO(coded)) as container:
        for i, frame in enumerate(container.decode(video=0)):
            if i == KEPT_FRAME:
                return planes_of(frame)
    raise RuntimeError(f"{codec} gave fewer than {KEPT_FRAME + 1} frames")
