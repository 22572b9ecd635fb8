"""Turned, mirrored, odd-shaped, changing and lone pictures, against FFmpeg's own program."""

from __future__ import annotations

import json
import struct

import av
import media_servers as servers
import numpy as np
import pytest
from ffmpeg_clips import X264, difference, make, make_one, packed, probed, raw, read

from dgiqa_stream.preprocess import reduced_rgb
from dgiqa_stream.sources import is_still

pytestmark = pytest.mark.servers


@pytest.fixture(autouse=True)
def needs_ffmpeg(missing_server):
    """The reference of every test here."""
    servers.require_ffmpeg(missing_server)


def turned(path, target, degrees):
    """The same packets with a display matrix, counter-clockwise."""
    with av.open(path) as file, av.open(target, "w") as out:
        stream = out.add_stream_from_template(file.streams.video[0])
        stream.set_display_rotation(degrees)
        for packet in file.demux(video=0):
            if packet.size:
                packet.stream = stream
                out.mux(packet)
    return target


@pytest.mark.parametrize("degrees", [0, 90, 180, 270, -90])
def test_turned_clips_are_upright(tmp_path, degrees):
    """A display matrix is followed as FFmpeg's program follows it, to the sample."""
    path = make_one(tmp_path / "clip.mp4", f"{X264} -qp 0 -pix_fmt yuv444p", seconds=0.12)
    path = turned(path, tmp_path / "turned.mp4", degrees)
    info, frames = read(path)
    size = (320, 180) if degrees in (0, 180) else (180, 320)
    assert (info.width, info.height) == size
    theirs = np.frombuffer(raw(path, "yuv444p"), np.uint8).reshape(3, 3, size[1], size[0])
    for frame, wanted in zip(frames, theirs, strict=True):
        turns = -frame.planes.rotation // 90
        for ours, plane in zip(frame.planes.samples, wanted, strict=True):
            np.testing.assert_array_equal(np.rot90(ours, turns), plane)


MATRICES_OF_DISPLAY = {  # rows of (a, b), (c, d), as ISO/IEC 14496-12, 8.3.2 stores them
    "mirrored": (-1, 0, 0, 1),
    "upside down": (1, 0, 0, -1),
    "transposed": (0, 1, 1, 0),
    "transposed the other way": (0, -1, -1, 0),
}


@pytest.mark.parametrize("name", MATRICES_OF_DISPLAY)
def test_mirrored_clips_are_unmirrored(tmp_path, name):
    """A display matrix that mirrors is followed as FFmpeg's program follows it, to the sample."""
    path = make_one(tmp_path / "clip.mp4", f"{X264} -qp 0 -pix_fmt yuv444p", seconds=0.12)
    content = bytearray(path.read_bytes())
    a, b, c, d = (value << 16 for value in MATRICES_OF_DISPLAY[name])
    at = content.index(b"tkhd") + 4 + 40  # its matrix, after flags, times, ids and volume
    content[at : at + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(content)
    info, frames = read(path)
    theirs = np.frombuffer(raw(path, "yuv444p"), np.uint8).reshape(3, 3, info.height, info.width)
    for frame, wanted in zip(frames, theirs, strict=True):
        turns = -frame.planes.rotation // 90
        for ours, plane in zip(frame.planes.samples, wanted, strict=True):
            np.testing.assert_array_equal(np.rot90(ours, turns), plane)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_photos_are_upright(tmp_path, orientation):
    """Each EXIF orientation, mirrored ones too, is shown as FFmpeg's program shows it."""
    path = make_one(tmp_path / "plain.jpg", "-c:v mjpeg -frames:v 1 -f image2 -q:v 2")
    jpeg = path.read_bytes()
    tiff = b"II*\0" + struct.pack("<IHHHIHHI", 8, 1, 0x0112, 3, 1, orientation, 0, 0)
    body = b"Exif\0\0" + tiff
    segment = b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body
    path = tmp_path / "turned.jpg"
    path.write_bytes(jpeg[:2] + segment + jpeg[2:])
    info, frames = read(path)
    assert (info.width, info.height) == ((320, 180) if orientation < 5 else (180, 320))
    ours = reduced_rgb(frames[0].planes, longest_px=320).astype(int)
    theirs = np.frombuffer(raw(path, "rgb24"), np.uint8).reshape(info.height, info.width, 3)
    # chroma is upsampled in two ways; another orientation is off by 60 and more on average
    assert np.abs(ours - theirs).mean() < 6


@pytest.mark.parametrize("shape", ["64/45", "8/9", "2"])
def test_pixels_that_are_not_square_are_kept(tmp_path, shape):
    """A sample aspect ratio changes neither size nor samples: what was coded is scored."""
    path = make_one(tmp_path / "clip.mp4", f"{X264} -pix_fmt yuv420p", filters=f"setsar={shape}")
    assert probed(path)[0]["sample_aspect_ratio"] != "1:1"
    info, frames = read(path)
    assert (info.width, info.height) == (320, 180)
    assert packed(frames) == raw(path, "yuv420p")


def test_a_size_that_changes_in_mid_stream(tmp_path, run_cli):
    """Frames before and after a change of size and depth are each their own, and all are scored."""
    made = make(
        tmp_path,
        {
            "a": (f"{X264} -pix_fmt yuv420p", "ts", (320, 180), "null"),
            "b": (f"{X264} -pix_fmt yuv420p", "ts", (162, 122), "null"),
            "c": (f"{X264} -pix_fmt yuv422p10le", "ts", (426, 240), "null"),
        },
    )
    parts = list(made.values())
    path = tmp_path / "joined.ts"
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    _, frames = read(path)
    sizes = [(f.info.width, f.info.height) for f in frames]
    assert sizes == [(320, 180)] * 10 + [(162, 122)] * 10 + [(426, 240)] * 10
    for begin, part in zip((0, 10, 20), parts, strict=True):
        pix_fmt = frames[begin].info.pix_fmt
        assert packed(frames[begin : begin + 10]) == raw(part, pix_fmt)
    done = run_cli("score", path, "--every", "5", "-f", "ndjson", "-q")
    assert done.code == 0, done
    shown = [json.loads(line) for line in done.out.splitlines()]
    assert [m["width"] for m in shown] == [320, 320, 162, 162, 426, 426]


@pytest.mark.parametrize("codec", ["png", "mjpeg"])
def test_pictures_one_after_the_other_are_a_video(tmp_path, codec):
    """What ``-f image2pipe`` writes is all its pictures in turn, not the first alone."""
    pix_fmt = {"png": "rgb24", "mjpeg": "yuvj420p"}[codec]
    encoding = f"-c:v {codec} -pix_fmt {pix_fmt} -f image2pipe"
    path = make_one(tmp_path / "pictures.bin", encoding, size=(64, 48))
    info, frames = read(path)
    assert not is_still(info)
    assert len(frames) == 10
    assert difference(packed(frames), raw(path, pix_fmt), 8).max() <= (codec == "mjpeg")


def test_a_photo_with_a_picture_behind_it_is_one_picture(tmp_path):
    """Photos hold previews and gain maps after their end; they stay one frame, by name or size."""
    made = make(
        tmp_path,
        {
            "photo": ("-c:v mjpeg -q:v 3 -frames:v 1 -f image2", "jpg", (320, 240), "null"),
            "extra": ("-c:v mjpeg -q:v 3 -frames:v 1 -f image2", "jpg", (80, 60), "null"),
        },
    )
    photo, extra = (path.read_bytes() for path in made.values())
    (tmp_path / "same.jpg").write_bytes(photo + photo)
    (tmp_path / "other.bin").write_bytes(photo + extra)
    for name in ("same.jpg", "other.bin"):
        info, frames = read(tmp_path / name)
        assert is_still(info)
        assert (len(frames), info.width) == (1, 320)
