"""sources: every file of the tests' media, by what is known of it."""

from __future__ import annotations

import gc
import itertools
import os
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path

import av
import numpy as np
import pytest

from dgiqa_stream.config import ReconnectSettings, SourceSettings
from dgiqa_stream.errors import SourceUnavailable, SourceUnsupported
from dgiqa_stream.preprocess import reduced_rgb
from dgiqa_stream.sources import is_still, open_source
from dgiqa_stream.sources._describe import num_threads_for
from dgiqa_stream.sources._track_decoder import TrackDecoder
from dgiqa_stream.supervisor import ReconnectingSource

STILLS = ["png", "jpg", "bmp", "tiff", "webp", "gif"]


def read(url, *, limit=None, **settings):
    """The stream's info and its frames."""
    source = open_source(str(url), SourceSettings(**settings), stream="s")
    try:
        return source.info, list(itertools.islice(source.frames(), limit))
    finally:
        source.close()


def times(frames):
    """When the frames are shown."""
    return [f.info.pts_seconds for f in frames]


def test_a_clip_gives_all_its_frames(media):
    """Every frame comes once, in order, numbered from 0, with the size and rate of the clip."""
    info, frames = read(media["plain"])
    assert (info.width, info.height, info.codec, info.pix_fmt) == (320, 180, "h264", "yuv420p")
    assert (info.average_fps, info.num_frames_from_header) == (25, 24)
    assert info.duration_seconds == pytest.approx(0.96)
    assert not info.is_live
    assert [f.info.index for f in frames] == list(range(24))
    assert times(frames) == pytest.approx([i / 25 for i in range(24)])
    assert [f.info.index for f in frames if f.info.keyframe] == [0, 12]
    assert {f.stream for f in frames} == {"s"}


@pytest.mark.parametrize(("name", "size"), [("wide426", (426, 240)), ("odd427", (427, 241))])
def test_padded_and_odd_sizes(media, name, size):
    """Widths that need row padding and odd sizes keep every column and row."""
    info, frames = read(media[name])
    assert (info.width, info.height) == size
    height, width = frames[0].planes.size
    assert (width, height) == size


def test_a_late_start_is_kept(media):
    """A stream that begins at 7.2 s is told as beginning there."""
    _, frames = read(media["late_start"])
    assert times(frames) == pytest.approx([7.2 + i / 25 for i in range(24)], abs=1e-4)


def test_no_frame_is_kept_while_the_next_is_decoded(media, monkeypatch):
    """What was given out and dropped leaves nothing behind in a source, nor in the one around it
    that opens it again, when the decoder gets its next packet.
    """
    kept = []

    def decode(decoder, packet):
        kept.append(sum(type(o) is av.VideoFrame and o.width > 0 for o in gc.get_objects()))
        return plain_decode(decoder, packet)

    plain_decode = TrackDecoder.decode
    monkeypatch.setattr(TrackDecoder, "decode", decode)
    settings = SourceSettings(decoder_threads=1)
    source = open_source(str(media["plain"]), settings, stream="s")
    again = ReconnectingSource(source, lambda _: source, ReconnectSettings(), stream="s")
    frames = again.frames()
    for _ in range(12):
        next(frames)
    again.close()
    assert len(kept) >= 12
    assert set(kept) == {0}


@pytest.mark.parametrize(
    ("encoder", "size", "rate", "realtime", "expected"),
    [
        pytest.param("libx264", (1920, 1080), 30, True, 1, id="live H.264"),
        pytest.param("mpeg2video", (720, 576), 25, True, 1, id="live MPEG-2"),
        pytest.param("libx264", (1920, 1080), 60, True, 2, id="twice as many pictures"),
        pytest.param("libx264", (2560, 1440), 30, True, 2, id="larger pictures"),
        pytest.param("libx265", (640, 360), 25, True, 2, id="another codec"),
        pytest.param("libx264", (1920, 1080), 30, False, 2, id="a file, as quickly as it goes"),
    ],
)
def test_threads_that_decode(tmp_path, encoder, size, rate, realtime, expected):
    """One holds a live stream's frames back by none; two where one might not keep pace."""
    path = tmp_path / "clip.ts"
    with av.open(str(path), "w") as container:
        stream = container.add_stream(encoder, rate=rate, options={"preset": "ultrafast"})
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        grey = np.full((size[1] * 3 // 2, size[0]), 128, np.uint8)
        for _ in range(8):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(grey, format="yuv420p")))
        container.mux(stream.encode(None))
    with av.open(str(path)) as container:
        track = container.streams.video[0]
        found = num_threads_for(container, track, url=str(path), realtime=realtime)
    assert found == expected


CLOSED_EARLY = """
import logging, sys, av
from dgiqa_stream.config import SourceSettings
from dgiqa_stream.sources import open_source
av.logging.set_level(av.logging.DEBUG)
logging.disable(logging.CRITICAL)
for _ in range(100):
    source = open_source(sys.argv[1], SourceSettings(), stream="s")
    source.close()
    del source
"""


def test_a_source_that_is_closed_early_does_not_stand_still(tmp_path):
    """Closed while FFmpeg's threads decode ahead and log, which needs Python's lock: a hundred
    times in a row the decoder is freed, and nobody waits for anybody for ever.
    """
    path, rng = tmp_path / "noise.mp4", np.random.default_rng(0)  # which takes time to decode
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 320, 180, "yuv420p"
        for _ in range(12):
            noise = rng.integers(0, 256, (180, 320, 3), dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(noise, "rgb24")))
        container.mux(stream.encode())
    command = [sys.executable, "-c", CLOSED_EARLY, str(path)]
    assert subprocess.run(command, timeout=60, check=False).returncode == 0


def test_variable_rate_keeps_its_times(media):
    """Frames of a variable rate are shown when the container says."""
    _, frames = read(media["vfr"])
    stamps = [0, 1, 2, 5, 6, 10, 11, 12, 20, 21, 30, 31]
    assert times(frames) == pytest.approx([s / 25 for s in stamps], abs=1e-3)


def test_ntsc_keeps_its_rate(media):
    """29.97 is 30000/1001, not 30, and each frame lasts that long."""
    info, frames = read(media["ntsc"])
    assert info.average_fps is not None
    assert info.average_fps.as_integer_ratio() == (30000, 1001)
    assert times(frames)[-1] == pytest.approx(23 * 1001 / 30000, abs=1e-4)
    assert frames[0].info.duration_seconds == pytest.approx(1001 / 30000, abs=1e-4)


def test_b_frames_without_stamps_are_evenly_placed(media):
    """AVI has no presentation stamps; its reordered frames still come at an even distance."""
    _, frames = read(media["b_frames"])
    assert len(frames) == 24
    assert np.diff(times(frames)) == pytest.approx(0.04, abs=1e-6)


def test_ten_bit_is_kept(media):
    """10-bit samples come as 16-bit integers of 10 bits, with values beyond 8 bits."""
    _, frames = read(media["ten_bit"])
    planes = frames[0].planes
    assert planes.bit_depth == 10
    assert 255 < planes.samples[0].max() < 1024


def test_limited_and_full_range_show_the_same(media):
    """One picture coded in both ranges gives the same colours, within 8-bit coding."""
    limited, full = (
        reduced_rgb(read(media[n])[1][0].planes, longest_px=320) for n in ("limited", "full")
    )
    box = np.s_[10:30, 10:60]
    for rgb in (limited, full):
        assert np.abs(rgb[box].astype(int) - (200, 30, 30)).max() <= 4


def test_a_turned_clip_is_upright(media):
    """A clip tagged to be turned clockwise shows its upper left corner at the upper right."""
    info, frames = read(media["rotated"])
    assert (info.width, info.height) == (180, 320)
    assert (frames[0].info.width, frames[0].info.height) == (180, 320)
    rgb = reduced_rgb(frames[0].planes, longest_px=320).astype(int)
    assert np.abs(rgb[5:70, 145:175] - (200, 30, 30)).mean() < 12
    assert np.abs(rgb[5:70, 5:35] - (200, 30, 30)).mean() > 40


def test_an_exif_turned_photo_is_upright(media):
    """EXIF orientation 6 (turn 90 clockwise) is followed, as cameras mean it."""
    info, frames = read(media["exif_turned"])
    assert (info.width, info.height) == (48, 64)
    rgb = reduced_rgb(frames[0].planes, longest_px=64).astype(int)
    assert np.abs(rgb[2:14, 38:46] - (200, 30, 30)).mean() < 25


def test_tags_are_told(media):
    """Interlacing, PQ and HLG are known frame by frame; a plain clip has none of them."""
    assert all(f.info.interlaced for f in read(media["interlaced"])[1])
    assert {f.info.dynamic_range for f in read(media["pq"])[1]} == {"pq"}
    assert {f.info.dynamic_range for f in read(media["hlg"])[1]} == {"hlg"}
    plain = read(media["plain"])[1]
    assert not any(f.info.interlaced or f.info.corrupt for f in plain)
    assert {f.info.dynamic_range for f in plain} == {"sdr"}


@pytest.mark.parametrize("suffix", STILLS)
def test_a_picture_is_one_frame_at_zero(media, suffix):
    """A still picture gives exactly one frame, at time 0, and is known as a still."""
    info, frames = read(media[f"picture_{suffix}"])
    assert is_still(info)
    assert (info.width, info.height, info.average_fps, info.duration_seconds) == (
        64,
        48,
        None,
        None,
    )
    assert [(f.info.pts_seconds, f.info.duration_seconds) for f in frames] == [(0.0, 0.0)]
    rgb = reduced_rgb(frames[0].planes, longest_px=64).astype(int)
    assert np.abs(rgb[2:10, 2:14] - (200, 30, 30)).mean() < 25


def test_grey_and_transparent_pictures(media):
    """A grey PNG keeps its full range; transparency is left out."""
    grey = reduced_rgb(read(media["grey"])[1][0].planes, longest_px=64)
    np.testing.assert_array_equal(grey[0, :, 0], np.arange(0, 256, 4))
    assert read(media["alpha"])[1][0].planes.samples[0].shape == (48, 64, 3)


def test_a_video_is_no_still(media):
    """A clip of one or more frames in a video container is not a still."""
    assert not is_still(read(media["plain"], limit=1)[0])


def test_a_truncated_file_gives_what_it_has(media):
    """Half a Matroska file gives about half its frames and then ends without an error."""
    assert 20 <= len(read(media["truncated"])[1]) <= 40


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("text", "is no video or picture"),
        ("words", "text file"),
        ("empty", "empty file"),
        ("headless", "is no video or picture"),
        ("audio_only", "no video track, only audio"),
        ("cover_art", "no video track"),
    ],
)
def test_hopeless_files_say_why(media, name, words):
    """What is no video is refused in one line that names the file and the reason."""
    with pytest.raises(SourceUnsupported, match=words) as caught:
        read(media[name])
    assert media[name].name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_folder_and_forbidden(tmp_path):
    """A missing file may come later; a folder is never a video."""
    with pytest.raises(SourceUnavailable, match=r"nothing\.mp4: does not exist"):
        read(tmp_path / "nothing.mp4")
    with pytest.raises(SourceUnsupported, match="is a folder"):
        read(tmp_path)
    with pytest.raises(SourceUnsupported, match=r"unknown scheme 'gopher'.*rtsp"):
        read("gopher://host/1")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read all")
def test_a_forbidden_file_says_so(tmp_path):
    """A file without permission is told as such."""
    path = tmp_path / "mine.mp4"
    path.write_bytes(b"x")
    path.chmod(0)
    with pytest.raises(SourceUnavailable, match="may not be read"):
        read(path)


@pytest.mark.parametrize("name", ["a:b.mp4", "100%d.mp4", "what?.mp4", "ünï cöde.mp4", "a'b.mp4"])
def test_odd_names_are_just_names(media, tmp_path, name):
    """Colons, patterns, spaces and quotes in a file's name mean nothing."""
    path = tmp_path / name
    path.write_bytes(media["plain"].read_bytes())
    assert len(read(path, limit=2)[1]) == 2
    assert len(read(path.as_uri(), limit=2)[1]) == 2


@pytest.mark.parametrize("name", ["plain", "late_start", "vfr", "b_frames", "ten_bit"])
def test_start_and_duration_are_exact(media, name):
    """A stretch of a file holds just the frames of that time, seeking or not."""
    everything = read(media[name])[1]
    begin = times(everything)[0]
    _, frames = read(media[name], start_seconds=0.3, duration_seconds=0.4)
    wanted = [t for t in times(everything) if t - begin >= 0.3 - 1e-4]
    wanted = [t for t in wanted if t < wanted[0] + 0.4 - 1e-4]
    assert times(frames) == pytest.approx(wanted)
    assert frames[0].info.index == 0
    assert not frames[0].info.discontinuity
    same = next(f for f in everything if f.info.pts_seconds == pytest.approx(wanted[0]))
    np.testing.assert_array_equal(frames[0].planes.samples[0], same.planes.samples[0])


def test_a_start_past_the_end_gives_nothing(media):
    """Starting after the last frame is an empty stretch, not an error."""
    assert read(media["plain"], start_seconds=60.0)[1] == []


def test_realtime_keeps_the_pace(media):
    """Played as live, 0.4 s of frames take 0.4 s, and the stream says it is live."""
    begin = time.monotonic()
    info, frames = read(media["plain"], realtime=True, duration_seconds=0.4)
    assert info.is_live
    assert len(frames) == 10
    assert 0.3 < time.monotonic() - begin < 4.0  # ten times slower is no pace on any machine


@pytest.mark.parametrize("kind", ["clip", "pattern"])
def test_what_a_paced_frame_waits_is_no_lag(media, kind):
    """A frame that is held back until it is due is received then, as from a live source: not when
    it was decoded, which is a frame earlier.
    """
    url = media["plain"] if kind == "clip" else "pattern:clean?size=64x64&fps=10&seconds=0.5"
    _, frames = read(url, realtime=True, duration_seconds=0.4)
    received = [f.info.received_at_seconds for f in frames]
    due = [received[0] + f.info.pts_seconds - frames[0].info.pts_seconds for f in frames]
    assert all(at >= wanted - 0.01 for at, wanted in zip(received, due, strict=True))


def test_close_ends_a_paced_source(media):
    """Closing from another thread ends a source that waits for its next frame."""
    source = open_source(str(media["whole"]), SourceSettings(realtime=True), stream="s")
    frames = source.frames()
    next(frames)
    threading.Timer(0.1, source.close).start()
    assert len(list(frames)) < 58  # of 60, in 2.4 s
    source.close()


def test_tracks_and_programmes(media):
    """A programme is found by its number; a wrong number names those there are."""
    path = media["two_programmes"]
    assert read(path, programme=101, limit=1)[0].width == 320
    assert read(path, programme=202, limit=1)[0].width == 160
    assert read(path, track=1, limit=1)[0] != read(path, track=0, limit=1)[0]
    with pytest.raises(SourceUnsupported, match=r"no programme 7 .*; there is 101, 202"):
        read(path, programme=7)
    with pytest.raises(SourceUnsupported, match=r"no video track 5 \(source\.track\); there are 2"):
        read(path, track=5)


def test_a_track_that_appears_later_does_no_harm(media, tmp_path):
    """When another programme begins in mid-file, the first one's frames still all come."""
    path = tmp_path / "joined.ts"
    parts = [media["one"].read_bytes() * 8, media["two"].read_bytes()]
    path.write_bytes(b"".join(parts))
    _, frames = read(path, options={"probesize": "5000", "analyzeduration": "0"})
    assert len(frames) == 8 * 24
    assert sum(f.info.discontinuity for f in frames) == 7
    steps = np.diff(times(frames))
    assert steps.min() > 0
    assert steps.max() < 0.041


def test_frames_stay_valid_after_close(media):
    """Frames that were handed out keep their samples when the source is closed and gone."""
    _, frames = read(media["wide426"])
    _, again = read(media["wide426"])
    for a, b in zip(frames, again, strict=True):
        np.testing.assert_array_equal(a.planes.samples[0], b.planes.samples[0])


def test_damage_is_counted_and_skipped(media, tmp_path):
    """Overwritten packets in mid-file are counted; frames before and after still come."""
    content = bytearray(media["whole"].read_bytes())
    for at in range(len(content) // 3, len(content) // 2, 50):
        content[at] ^= 0xFF
    path = tmp_path / "damaged.mkv"
    path.write_bytes(content)
    source = open_source(str(path), SourceSettings(), stream="s")
    frames = list(source.frames())
    assert source.num_decode_errors + source.num_corrupt > 0
    assert frames[0].info.pts_seconds < 0.5
    assert frames[-1].info.pts_seconds > 2.0
    assert source.num_corrupt == sum(f.info.corrupt for f in frames)
    source.close()


@pytest.mark.parametrize("scheme", ["", "camera:"])
def test_a_closed_source_is_freed_at_once(media, scheme):
    """After close() nothing holds the decoder's memory until the garbage collector comes."""
    gc.disable()
    try:
        source = open_source(f"{scheme}{media['plain']}", SourceSettings(), stream="s")
        frames = source.frames()
        next(frames)
        source.close()
        gone = weakref.ref(source)
        del source, frames
        assert gone() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("name", ["plain", "rotated", "ten_bit"])
def test_frames_are_freed_at_once(media, name):
    """A frame that was let go is freed without the garbage collector: at 4K, 700 are 9 GB."""
    gc.collect()
    gc.disable()
    try:
        source = open_source(str(media[name]), SourceSettings(), stream="s")
        frames = source.frames()
        for _ in itertools.islice(frames, 20):
            pass
        assert sum(type(thing) is av.VideoFrame for thing in gc.get_objects()) <= 4
        source.close()
    finally:
        gc.enable()


def test_no_memory_grows(media):
    """Opening and reading a clip again and again keeps memory level."""
    psutil = pytest.importorskip("psutil")
    process = psutil.Process()
    for _ in range(5):
        read(media["wide426"])
    before = process.memory_info().rss
    for _ in range(40):
        read(media["wide426"])
    assert process.memory_info().rss - before < 30e6


def test_standard_input(media):
    """A stream piped into another process is read from -, and so is a seekable file."""
    code = (
        "from dgiqa_stream.sources import open_source\n"
        "from dgiqa_stream.config import SourceSettings\n"
        "s = open_source('-', SourceSettings(), stream='s')\n"
        "print(sum(1 for _ in s.frames()), s.info.is_live)\n"
    )
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", code]
    piped = subprocess.run(
        command, input=media["late_start"].read_bytes(), capture_output=True, check=True, cwd=root
    )
    assert piped.stdout.split() == [b"24", b"False"]
    with media["plain"].open("rb") as file:
        redirected = subprocess.run(command, stdin=file, capture_output=True, check=True, cwd=root)
    assert redirected.stdout.split()[0] == b"24"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_a_silent_named_pipe_meets_the_deadline(tmp_path):
    """A FIFO that nobody writes to ends opening in time."""
    path = tmp_path / "pipe.ts"
    os.mkfifo(path)
    begin = time.monotonic()
    with pytest.raises(SourceUnavailable, match=r"no data within 0\.5 s"):
        read(path, open_timeout_seconds=0.5)
    assert time.monotonic() - begin < 8.0  # the default is 10
