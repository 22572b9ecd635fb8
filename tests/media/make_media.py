"""Makes the tiny clips and pictures of the tests, nasty on purpose: ``make_media(folder)``.

``python tests/media/make_media.py FOLDER`` writes them for a look.
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Iterable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

NUM_FRAMES = 24
_PQ, _HLG, _BT709_TRC = 16, 18, 1
_BT601, _BT709, _BT2020 = 6, 1, 9
_LIMITED, _FULL = 1, 2


def make_media(folder: Path) -> dict[str, Path]:
    """Write everything into the folder; name (without suffix) to path."""
    _make_clips(folder)
    _make_transport_streams(folder)
    _make_pictures(folder)
    _make_hopeless(folder)
    return {p.stem: p for p in sorted(folder.iterdir())}


def _make_clips(folder: Path) -> None:
    encode(folder / "plain.mp4")
    encode(folder / "wide426.mp4", width=426, height=240)
    encode(folder / "odd427.mkv", width=427, height=241, codec="ffv1")
    encode(folder / "ntsc.mp4", fps=Fraction(30000, 1001))
    encode(folder / "vfr.mkv", stamps=[0, 1, 2, 5, 6, 10, 11, 12, 20, 21, 30, 31])
    encode(folder / "ten_bit.mkv", pix_fmt="yuv420p10le", codec="ffv1")
    encode(folder / "limited.mkv", codec="ffv1", range_=_LIMITED)
    encode(folder / "full.mkv", codec="ffv1", range_=_FULL)
    encode(folder / "rotated.mp4", rotation=-90)
    encode(folder / "interlaced.mkv", options={"x264-params": "interlaced=1:scenecut=0"})
    for name, transfer in (("pq", _PQ), ("hlg", _HLG)):
        encode(
            folder / f"{name}.mkv",
            codec="ffv1",
            pix_fmt="yuv420p10le",
            transfer=transfer,
            matrix=_BT2020,
        )
    encode(folder / "b_frames.avi", codec="mpeg4", options={"bf": "2"})
    content = (folder / "plain.mp4").read_bytes()
    encode(folder / "whole.mkv", num_frames=60)
    whole = (folder / "whole.mkv").read_bytes()
    (folder / "truncated.mkv").write_bytes(whole[: len(whole) // 2])
    (folder / "headless.mp4").write_bytes(content[: len(content) // 2])  # its index was at the end


def _make_transport_streams(folder: Path) -> None:
    encode(folder / "late_start.ts", begin_seconds=7.2)
    first, second = folder / "one.ts", folder / "two.ts"
    encode(first, options={}, muxer={"mpegts_service_id": "101", "mpegts_start_pid": "256"})
    encode(
        second,
        width=160,
        height=96,
        muxer={
            "mpegts_service_id": "202",
            "mpegts_start_pid": "512",
            "mpegts_pmt_start_pid": "5000",
        },
    )
    two_programmes = _merge(first.read_bytes(), second.read_bytes(), {101: 4096, 202: 5000})
    (folder / "two_programmes.ts").write_bytes(two_programmes)


def _make_pictures(folder: Path) -> None:
    rgb = picture(64, 48)
    for suffix, codec, pix_fmt in (
        ("png", "png", "rgb24"),
        ("jpg", "mjpeg", "yuvj420p"),
        ("bmp", "bmp", "bgr24"),
        ("tiff", "tiff", "rgb24"),
        ("webp", "libwebp", "yuv420p"),
        ("gif", "gif", "rgb8"),
    ):
        _write_picture(folder / f"picture_{suffix}.{suffix}", rgb, codec, pix_fmt)
    alpha = np.dstack([rgb, np.full(rgb.shape[:2], 128, np.uint8)])
    _write_picture(folder / "alpha.png", alpha, "png", "rgba", source="rgba")
    ramp = np.tile(np.arange(0, 256, 4, dtype=np.uint8), (48, 1))
    _write_picture(folder / "grey.png", ramp, "png", "gray", source="gray")
    jpeg = (folder / "picture_jpg.jpg").read_bytes()
    (folder / "exif_turned.jpg").write_bytes(jpeg[:2] + _exif_orientation(6) + jpeg[2:])


def _make_hopeless(folder: Path) -> None:
    (folder / "text.mp4").write_text("This is no video.\n" * 200)
    (folder / "words.txt").write_text("Neither is this.\n" * 200)
    (folder / "empty.mp4").write_bytes(b"")
    _write_audio(folder / "audio_only.m4a")
    _write_audio(folder / "cover_art.mp3", cover=(folder / "picture_jpg.jpg").read_bytes())


def picture(width: int, height: int, number: int = 0) -> np.ndarray[Any, Any]:
    """A moving ramp with a red box in the upper left corner: uint8 (height, width, 3), RGB."""
    y, x = np.mgrid[0:height, 0:width]
    rgb = np.stack([(x * 3 + number * 5) % 256, (y * 4) % 256, (x + y + number) % 256], axis=-1)
    rgb = rgb.astype(np.uint8)
    rgb[: height // 4, : width // 4] = (200, 30, 30)
    return rgb


def encode(
    path: Path,
    *,
    width: int = 320,
    height: int = 180,
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    fps: Fraction = Fraction(25),
    num_frames: int = NUM_FRAMES,
    begin_seconds: float = 0.0,
    stamps: Iterable[int] | None = None,
    rotation: int = 0,
    transfer: int = _BT709_TRC,
    matrix: int = _BT709,
    range_: int = _LIMITED,
    options: dict[str, str] | None = None,
    muxer: dict[str, str] | None = None,
) -> None:
    """Encode :func:`picture`; ``stamps`` are in frame periods and begin at ``begin_seconds``."""
    quick = {"preset": "ultrafast", "tune": "zerolatency"} if codec == "libx264" else {}
    with av.open(path, "w", options=muxer or {}) as out:
        stream = out.add_stream(codec, rate=fps, options={**quick, "g": "12", **(options or {})})
        stream.width, stream.height, stream.pix_fmt = width, height, pix_fmt
        context = stream.codec_context
        context.time_base = 1 / fps
        context.color_trc, context.colorspace, context.color_range = transfer, matrix, range_
        context.thread_count = 1
        if rotation:
            stream.set_display_rotation(rotation)
        shift = round(begin_seconds * fps)
        for number, stamp in enumerate(stamps or range(num_frames)):
            rgb = av.VideoFrame.from_ndarray(picture(width, height, number), format="rgb24")
            frame = rgb.reformat(format=pix_fmt, dst_colorspace=matrix, dst_color_range=range_)
            frame.color_trc, frame.colorspace, frame.color_range = transfer, matrix, range_
            frame.pts, frame.time_base = stamp + shift, 1 / fps
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))


def _write_picture(
    path: Path, samples: np.ndarray[Any, Any], codec: str, pix_fmt: str, source: str = "rgb24"
) -> None:
    muxer = "gif" if path.suffix == ".gif" else "image2"
    with av.open(path, "w", format=muxer, options={} if muxer == "gif" else {"update": "1"}) as out:
        stream = out.add_stream(codec, rate=1)
        stream.height, stream.width = samples.shape[:2]
        stream.pix_fmt = pix_fmt
        if codec == "mjpeg":
            stream.codec_context.color_range = _FULL
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(samples), format=source)
        frame.pts = 0
        out.mux(stream.encode(frame.reformat(format=pix_fmt)))
        out.mux(stream.encode(None))


def _write_audio(path: Path, *, cover: bytes = b"") -> None:
    codec = "mp3" if path.suffix == ".mp3" else "aac"
    with av.open(path, "w") as out:
        stream = out.add_stream(codec, rate=44_100)
        image = None
        if cover:
            image = out.add_stream("mjpeg", rate=1)
            image.width, image.height, image.pix_fmt = 64, 48, "yuvj420p"
            image.disposition = 1 << 10  # attached picture
        tone = (np.sin(np.arange(44_100) / 20) * 8000).astype(np.int16)[None]
        frame = av.AudioFrame.from_ndarray(tone, format="s16", layout="mono")
        frame.sample_rate = 44_100
        out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
        if image is not None:
            packet = av.Packet(cover)
            packet.stream, packet.pts, packet.dts = image, 0, 0
            out.mux(packet)


def _exif_orientation(value: int) -> bytes:
    """A JPEG APP1 segment that holds nothing but the orientation (6: turn 90 clockwise)."""
    tiff = b"II*\x00" + struct.pack("<IHHHIHHI", 8, 1, 0x0112, 3, 1, value, 0, 0)
    body = b"Exif\x00\x00" + tiff
    return b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body


def _merge(first: bytes, second: bytes, programmes: dict[int, int]) -> bytes:
    """Two MPEG-TS files as one multiplex: packets in turn, under one table of programmes."""
    table = _programme_table(programmes)
    merged = []
    for pair in zip(_packets(first), _packets(second), strict=False):
        for packet in pair:
            pid = (packet[1] & 0x1F) << 8 | packet[2]
            if pid == 0:
                merged.append(packet[:4] + b"\x00" + table + b"\xff" * (183 - len(table)))
            elif pid != 17:  # the service descriptions would contradict each other
                merged.append(packet)
    return b"".join(merged)


def _packets(stream: bytes) -> Iterator[bytes]:
    return (stream[i : i + 188] for i in range(0, len(stream), 188))


def _programme_table(programmes: dict[int, int]) -> bytes:
    """A programme association section (ISO/IEC 13818-1, 2.4.4.3)."""
    entries = b"".join(struct.pack(">HH", n, 0xE000 | pid) for n, pid in programmes.items())
    head = struct.pack(">BHHBBB", 0, 0xB000 | (len(entries) + 9), 1, 0xC1, 0, 0)
    return head + entries + struct.pack(">I", _crc32_mpeg(head + entries))


def _crc32_mpeg(data: bytes) -> int:
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte << 24
        for _ in range(8):
            crc = (crc << 1 ^ (0x04C11DB7 if crc & 0x80000000 else 0)) & 0xFFFFFFFF
    return crc


if __name__ == "__main__":
    target = Path(sys.argv[1])
    target.mkdir(parents=True, exist_ok=True)
    make_media(target)
