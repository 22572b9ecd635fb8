"""Real video and picture codecs, in memory: a clip in, what a viewer would see out.

Every encoder runs with one thread, so that one input gives one output; libx264 also without its
macroblock tree, see :data:`X264_PARAMS`. Quality points are each codec's own (constant rate factor,
quantiser or compression ratio), from slight to severe.
"""

from __future__ import annotations

import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from types import MappingProxyType

import av
import cv2
import numpy as np
from numpy.typing import NDArray

from distill.process import ordinary_scheduling

Rgb = NDArray[np.uint8]
"""uint8 (H, W, 3)."""
Clip = list[Rgb]
"""Frames of one size."""

FRAMES_PER_SECOND = 25
X264_PARAMS = "no-mbtree=1"
"""For libx264, so that one input gives one stream.

With its macroblock tree (on by default) one thread gave several streams for one input at some
sizes, such as squares of 240, 300, 320, 480 and 576 pixels: up to 164 grey levels apart, by what
lay in memory before. Without it every try gave the same bytes.
"""
_BT709, _LIMITED, _FULL = 1, 1, 2  # as FFmpeg numbers them


@dataclass(frozen=True, slots=True)
class Codec:
    """An encoder, which of its options set the quality, and a ladder of values for them."""

    encoder: str
    quality_options: tuple[str, ...]
    points: tuple[int, ...]
    """From slight to severe: a larger number is a worse picture for each of these codecs."""
    options: Mapping[str, str] = field(default_factory=dict)
    pix_fmt: str = "yuv420p"


CODECS: Mapping[str, Codec] = MappingProxyType(
    {
        "h264": Codec(
            "libx264", ("crf",), (21, 26, 31, 35, 39, 43, 47, 51), {"x264-params": X264_PARAMS}
        ),
        "h265": Codec(
            "libx265",
            ("crf",),
            (22, 27, 32, 36, 40, 44, 48, 51),
            {"preset": "fast", "x265-params": "log-level=none:pools=none:frame-threads=1"},
        ),
        "av1": Codec(
            "libsvtav1",
            ("crf",),
            (24, 33, 41, 48, 54, 59, 63),
            {"preset": "8", "svtav1-params": "lp=1"},
        ),
        "vp9": Codec(
            "libvpx-vp9",
            ("crf",),
            (24, 33, 41, 48, 54, 59, 63),
            {"b": "0", "deadline": "good", "cpu-used": "4", "row-mt": "0"},
        ),
        "mpeg2": Codec("mpeg2video", ("qmin", "qmax"), (3, 5, 8, 12, 18, 27)),
        "mjpeg": Codec("mjpeg", ("qmin", "qmax"), (3, 6, 10, 15, 22, 31), pix_fmt="yuvj420p"),
        "jpeg2000": Codec("jpeg2000", ("layer_rates",), (20, 40, 70, 110, 170, 260)),
    }
)


def transcode(frames: Sequence[Rgb], codec: str, point: int, *, scale: float = 1.0) -> Clip:
    """The frames as decoded after one generation of a codec.

    Args:
        codec: a name of :data:`CODECS`.
        point: the codec's quality value.
        scale: coded at this part of width and height, and enlarged again (bicubic) afterwards.
    """
    height, width = frames[0].shape[:2]
    coded_size = (_even(width * scale), _even(height * scale))
    if scale < 1.0:
        ready = [_bytes(cv2.resize(f, coded_size, interpolation=cv2.INTER_AREA)) for f in frames]
    else:
        tall, wide = coded_size[1] - height, coded_size[0] - width
        ready = [np.pad(f, ((0, tall), (0, wide), (0, 0)), mode="edge") for f in frames]
    decoded = decode(encode(ready, codec, point))
    if len(decoded) != len(frames):
        raise RuntimeError(f"{codec} gave {len(decoded)} frames for {len(frames)}")
    if scale < 1.0:
        size = (width, height)
        return [_bytes(cv2.resize(f, size, interpolation=cv2.INTER_CUBIC)) for f in decoded]
    return [np.ascontiguousarray(f[:height, :width]) for f in decoded]


def _even(length: float) -> int:
    return max(16, 2 * int(np.ceil(round(length, 6) / 2)))


def _bytes(picture: object) -> Rgb:
    return np.asarray(picture, np.uint8)


def to_frame(rgb: Rgb, index: int, pix_fmt: str) -> av.VideoFrame:
    """A BT.709 frame for an encoder."""
    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(rgb), format="rgb24")
    frame = frame.reformat(format=pix_fmt, dst_colorspace="ITU709")
    frame.pts, frame.time_base = index, Fraction(1, FRAMES_PER_SECOND)
    return frame


def to_rgb(frame: av.VideoFrame) -> Rgb:
    """A decoded BT.709 frame as RGB."""
    picture = frame.reformat(format="rgb24", src_colorspace="ITU709")
    return np.ascontiguousarray(picture.to_ndarray())


def encode(
    frames: Sequence[Rgb], codec: str, point: int, *, keyframe_frames: int | None = None
) -> bytes:
    """A Matroska file in memory; frames are of even size.

    ``keyframe_frames`` is the longest way from one keyframe to the next, the encoder's own unless
    given.
    """
    settings = CODECS[codec]
    if codec == "av1":
        os.environ.setdefault("SVT_LOG", "1")  # else it writes its banner to standard error
    options = dict(settings.options) | {name: str(point) for name in settings.quality_options}
    if keyframe_frames is not None:
        options["g"] = str(keyframe_frames)
    out = io.BytesIO()
    with av.open(out, "w", format="matroska") as container:
        stream = container.add_stream(settings.encoder, rate=FRAMES_PER_SECOND, options=options)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = settings.pix_fmt
        stream.codec_context.colorspace = _BT709
        full = settings.pix_fmt.startswith("yuvj")
        stream.codec_context.color_range = _FULL if full else _LIMITED
        stream.codec_context.thread_count = 1
        with ordinary_scheduling():
            container.start_encoding()
        for i, rgb in enumerate(frames):
            container.mux(stream.encode(to_frame(rgb, i, settings.pix_fmt)))  # type: ignore[arg-type]
        container.mux(stream.encode(None))
    return out.getvalue()


def decode(coded: bytes) -> Clip:
    """Every frame of a file in memory."""
    with av.open(io.BytesIO(coded)) as container:
        container.streams.video[0].codec_context.thread_count = 1
        return [to_rgb(frame) for frame in container.decode(video=0)]


def library_versions() -> dict[str, str]:
    """PyAV and the FFmpeg libraries it carries; the encoders' versions follow from its wheel."""
    libraries = {name: ".".join(map(str, version)) for name, version in av.library_versions.items()}
    return {"av": av.__version__, **libraries}
