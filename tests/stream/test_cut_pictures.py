"""Pictures that end too early: told, or refused, never scored as if they were whole."""

from __future__ import annotations

import json

import av
import cv2
import numpy as np
import pytest

from dgiqa_stream.config import SourceSettings
from dgiqa_stream.errors import SourceError
from dgiqa_stream.sources import open_source
from dgiqa_stream.sources._jpeg import is_cut_short

ROW, COLUMN = np.mgrid[0:240, 0:320]
PICTURE = (128 + 100 * np.sin(ROW / 7) * np.cos(COLUMN / 11)).astype(np.uint8)
PICTURE = np.dstack([PICTURE, PICTURE[:, ::-1], PICTURE[::-1]])


def encoded(suffix, *options):
    """The picture in a format that OpenCV writes."""
    done, data = cv2.imencode(suffix, PICTURE, options)
    assert done
    return data.tobytes()


def with_thumbnail(data):
    """The JPEG with a smaller, whole JPEG in its header, as cameras have it in Exif."""
    _, small = cv2.imencode(".jpg", PICTURE[::8, ::8])
    segment = b"Exif\0\0" + small.tobytes()
    return data[:2] + b"\xff\xe1" + (len(segment) + 2).to_bytes(2, "big") + segment + data[2:]


def is_corrupt(path):
    """The flag of the picture's only frame."""
    source = open_source(str(path), SourceSettings(), stream="s")
    try:
        (frame,) = source.frames()
        assert source.num_corrupt == frame.info.corrupt
        return frame.info.corrupt
    finally:
        source.close()


JPEGS = {
    "plain": encoded(".jpg"),
    "progressive": encoded(".jpg", cv2.IMWRITE_JPEG_PROGRESSIVE, 1),
    "restarts": encoded(".jpg", cv2.IMWRITE_JPEG_RST_INTERVAL, 2),
    "thumbnail": with_thumbnail(encoded(".jpg")),
}


@pytest.mark.parametrize("kind", JPEGS)
def test_a_whole_jpeg_is_not_corrupt(tmp_path, kind):
    """Not with bytes behind its end either, as of a second picture or of a sloppy copy."""
    path = tmp_path / "whole.jpg"
    for tail in (b"", b"\0" * 100, encoded(".jpg")[:200]):
        path.write_bytes(JPEGS[kind] + tail)
        assert not is_corrupt(path)


@pytest.mark.parametrize("share", [0.35, 0.6, 0.95])
@pytest.mark.parametrize("kind", JPEGS)
def test_a_jpeg_that_is_cut_off_is_corrupt(tmp_path, kind, share):
    """Wherever its scans are cut, and whatever its thumbnail's end marker says."""
    path = tmp_path / "cut.jpg"
    begin = JPEGS[kind].rfind(b"\xff\xda") if kind != "progressive" else 1000
    path.write_bytes(JPEGS[kind][: begin + round((len(JPEGS[kind]) - begin) * share)])
    assert is_corrupt(path)


@pytest.mark.parametrize("suffix", [".png", ".webp", ".bmp", ".tiff"])
def test_other_pictures_that_are_cut_off(tmp_path, suffix):
    """With 65 % missing they cannot be read, or say that they are corrupt."""
    path, data = tmp_path / f"cut{suffix}", encoded(suffix)
    path.write_bytes(data[: round(len(data) * 0.35)])
    try:
        told = is_corrupt(path)
    except SourceError:
        told = True
    assert told


def test_score_says_so(run_cli, tmp_path):
    """``score`` has ``corrupt`` in NDJSON and in the line for people; of a pipe, too."""
    path = tmp_path / "cut.jpg"
    path.write_bytes(JPEGS["plain"][: len(JPEGS["plain"]) // 2])
    for words, stdin in (([path], b""), (["-"], path.read_bytes())):
        done = run_cli("score", *words, "-f", "ndjson", stdin=stdin)
        assert json.loads(done.out)["corrupt"] is True
        assert "(1 frame, 1 corrupt" in done.err


def test_motion_jpeg_in_a_container_is_left_alone(tmp_path):
    """A camera's pictures without end markers are no damage: they are whole."""
    path = tmp_path / "camera.mkv"
    with av.open(str(path), "w") as out:
        stream = out.add_stream("mjpeg", rate=5)
        stream.width, stream.height, stream.pix_fmt = 320, 240, "yuvj420p"
        for number in range(3):
            packet = av.Packet(JPEGS["plain"].removesuffix(b"\xff\xd9"))
            packet.stream, packet.time_base = stream, stream.time_base or 1
            packet.pts = packet.dts = number
            out.mux(packet)
    source = open_source(str(path), SourceSettings(), stream="s")
    assert [frame.info.corrupt for frame in source.frames()] == [False] * 3
    source.close()


def test_only_a_jpeg_is_judged():
    """What begins otherwise, or never reaches its scans, is for the decoder to refuse."""
    assert not is_cut_short(b"")
    assert not is_cut_short(encoded(".png"))
    assert not is_cut_short(JPEGS["plain"][:20])
