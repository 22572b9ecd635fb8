"""Damage that needs a clip: lost packets, combs, freezes and dropped frames.

Each takes frames, a level from 1 and a generator, and returns as many frames. What is lost at one
level is lost at every higher level of a generator in the same state.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import av
import numpy as np

from distill.data.codecs import FRAMES_PER_SECOND, X264_PARAMS, Clip, Rgb, to_frame, to_rgb

LOST_SHARE = (0.03, 0.07, 0.13, 0.22, 0.35, 0.55)
"""Part of the coded slices after the first frame."""
FIELD_DELAY_FRAMES = (1, 2, 3, 5, 8)
FROZEN_SHARE = (0.1, 0.2, 0.35, 0.5, 0.7, 0.9)
DROPPED_SHARE = (0.1, 0.2, 0.33, 0.5, 0.67, 0.85)

_SLICES_CRF = 24  # good before the loss, so that the loss is what is seen
_SLICE_TYPES = (1, 5)  # H.264 Table 7-1: a coded slice of a picture
_CORRUPT_BYTES = 4


def moving(picture: Rgb, *, num_frames: int, step_px: int) -> Clip:
    """A clip that pans over a picture (mirrored beyond its edges) and ends exactly on it."""
    height, width = picture.shape[:2]
    travel = step_px * (num_frames - 1)
    around = np.pad(picture, ((travel, 0), (travel, 0), (0, 0)), mode="symmetric")
    places = (i * step_px for i in range(num_frames))
    return [np.ascontiguousarray(around[p : p + height, p : p + width]) for p in places]


def packet_loss(frames: Clip, level: int, rng: np.random.Generator) -> Clip:
    """Slices of an H.264 stream that never arrive; the decoder conceals them as it can."""
    return _transmit(frames, level, rng, corrupt=False)


def packet_corruption(frames: Clip, level: int, rng: np.random.Generator) -> Clip:
    """Slices of an H.264 stream that arrive with wrong bytes in them."""
    return _transmit(frames, level, rng, corrupt=True)


def _transmit(frames: Clip, level: int, rng: np.random.Generator, *, corrupt: bool) -> Clip:
    height, width = frames[0].shape[:2]
    even = [np.pad(f, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge") for f in frames]
    packets = [_nal_units(packet) for packet in _slices(even)]
    sent = [(i, k) for i, units in enumerate(packets) for k, u in enumerate(units) if _lossy(i, u)]
    order, places = rng.permutation(len(sent)), rng.uniform(0.2, 0.9, len(sent))
    for j in order[: max(1, round(LOST_SHARE[level - 1] * len(sent)))] if sent else ():
        i, k = sent[j]
        packets[i][k] = _corrupted(packets[i][k], places[j]) if corrupt else b""
    received = _decode([b"".join(units) for units in packets], frames=even)
    return [np.ascontiguousarray(f[:height, :width]) for f in received]


def _lossy(frame_index: int, unit: bytes) -> bool:
    """Slices after the first frame; without headers or a first frame there is nothing to see."""
    return frame_index > 0 and unit[4] & 31 in _SLICE_TYPES


def _corrupted(unit: bytes, place: float) -> bytes:
    """The unit with some bytes inverted, after its header."""
    wrong = bytearray(unit)
    begin = 5 + int(place * max(0, len(unit) - 5 - _CORRUPT_BYTES))
    for i in range(begin, min(len(unit), begin + _CORRUPT_BYTES)):
        wrong[i] ^= 0xFF
    return bytes(wrong)


def _slices(frames: Sequence[Rgb]) -> list[bytes]:
    """An H.264 byte stream, a packet for each frame, in slices of a few rows of macroblocks."""
    encoder = av.CodecContext.create("libx264", "w")
    encoder.height, encoder.width = frames[0].shape[:2]
    encoder.pix_fmt = "yuv420p"
    encoder.time_base = Fraction(1, FRAMES_PER_SECOND)
    encoder.framerate = Fraction(FRAMES_PER_SECOND)
    encoder.thread_count = 1
    encoder.options = {
        "crf": str(_SLICES_CRF),
        "bf": "0",
        "g": "250",
        "slices": str(max(1, min(8, encoder.height // 32))),
        "x264-params": f"annexb=1:repeat-headers=1:scenecut=0:{X264_PARAMS}",
    }
    packets: list[bytes] = []
    for i, rgb in enumerate(frames):
        packets += [bytes(p) for p in encoder.encode(to_frame(rgb, i, "yuv420p"))]
    return packets + [bytes(p) for p in encoder.encode(None)]


def _nal_units(packet: bytes) -> list[bytes]:
    """The units of a byte stream, each with a four-byte start code (H.264 Annex B)."""
    parts = packet.split(b"\x00\x00\x01")[1:]
    return [b"\x00\x00\x00\x01" + part.rstrip(b"\x00") for part in parts]


def _decode(packets: Sequence[bytes], *, frames: Sequence[Rgb]) -> Clip:
    """What a player shows: a frame that cannot be decoded is the one before it again."""
    decoder = av.CodecContext.create("h264", "r")
    decoder.thread_count = 1
    decoder.options = {"flags": "+output_corrupt", "flags2": "+showall"}
    shown: dict[int, Rgb] = {}
    for i, data in enumerate([*packets, None]):
        packet = None if data is None else av.Packet(data)
        if packet is not None and not packet.size:
            continue
        if packet is not None:
            packet.pts = i
        try:
            decoded = decoder.decode(packet)
        except av.InvalidDataError:
            continue  # the damage is what this is for
        shown.update({int(f.pts): to_rgb(f) for f in decoded if f.pts is not None})
    out: Clip = []
    for i, frame in enumerate(frames):
        out.append(shown.get(i, out[-1] if out else frame))
    return out


def interlacing(frames: Clip, level: int, rng: np.random.Generator) -> Clip:
    """Two fields of different times woven into one frame: combs where something moves.

    A longer time between the fields stands for faster motion. Which field is late is drawn once.
    """
    late = int(rng.integers(2))
    out: Clip = []
    for i, frame in enumerate(frames):
        woven = frame.copy()
        woven[late::2] = frames[max(0, i - FIELD_DELAY_FRAMES[level - 1])][late::2]
        out.append(woven)
    return out


def freeze(frames: Clip, level: int, rng: np.random.Generator) -> Clip:
    """One frame that stands still for part of the clip; then the clip goes on where it would be."""
    length = max(2, round(FROZEN_SHARE[level - 1] * len(frames)))
    begin = int(rng.uniform() * (len(frames) - length))
    held = range(begin, begin + length)
    return [frames[begin if i in held else i].copy() for i in range(len(frames))]


def dropped_frames(frames: Clip, level: int, rng: np.random.Generator) -> Clip:
    """Single frames that are missing; the one before is shown again."""
    order = rng.permutation(np.arange(1, len(frames)))
    lost = set(order[: max(1, round(DROPPED_SHARE[level - 1] * len(order)))].tolist())
    out: Clip = []
    for i, frame in enumerate(frames):
        out.append(out[-1].copy() if i in lost else frame.copy())
    return out
