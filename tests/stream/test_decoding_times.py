"""When decoded frames are shown, against ffprobe and FFmpeg's own program."""

from __future__ import annotations

import av
import media_servers as servers
import numpy as np
import pytest
from ffmpeg_clips import X264, X265, difference, make, make_one, packed, probed, raw, raw_all, read

pytestmark = pytest.mark.servers


@pytest.fixture(autouse=True)
def needs_ffmpeg(missing_server):
    """The reference of every test here."""
    servers.require_ffmpeg(missing_server)


GOP = "-g 12 -bf 3 -b_strategy 0 -x264-params b-pyramid=normal:scenecut=0"
B_FRAMES = f"{X264} -pix_fmt yuv420p {GOP}"
NEGATIVE = "-output_ts_offset -0.5 -avoid_negative_ts disabled"
SOME = "select='lt(mod(n\\,7)\\,3)'"
TIMED = {  # name: (encoding, suffix, filters)
    "b-frames": (B_FRAMES, "mp4", "null"),
    "b-frames-ts": (B_FRAMES, "ts", "null"),
    "b-frames-fragmented": (f"{B_FRAMES} -movflags frag_keyframe+empty_moov", "mp4", "null"),
    "vfr": (f"{B_FRAMES} -fps_mode vfr", "mkv", SOME),
    "vfr-mp4": (f"{B_FRAMES} -fps_mode vfr", "mp4", SOME),
    "late": (f"{B_FRAMES} -output_ts_offset 3600", "mkv", "null"),
    # where FFmpeg's own reader tells times before 0; other containers shift them or have none
    "negative": (f"{B_FRAMES} {NEGATIVE} -movflags frag_keyframe+delay_moov", "mp4", "null"),
    "slow": (f"{X264} -pix_fmt yuv420p -fps_mode vfr", "mp4", "select='not(mod(n\\,12))'"),
}


def check_times(path, *, tolerance=1e-4):
    """Number, times, key frames and fields of all frames are ffprobe's."""
    _, frames = read(path)
    theirs = probed(path)
    assert len(frames) == len(theirs)
    stamps = [float(f["best_effort_timestamp_time"]) for f in theirs]
    assert [f.info.pts_seconds for f in frames] == pytest.approx(stamps, abs=tolerance)
    assert [f.info.keyframe for f in frames] == [bool(f["key_frame"]) for f in theirs]
    assert [f.info.interlaced for f in frames] == [bool(f["interlaced_frame"]) for f in theirs]
    assert not any(f.info.discontinuity for f in frames)
    return frames


@pytest.fixture(scope="module")
def timed(tmp_path_factory):
    """Name to clip."""
    clips = {name: (*clip[:2], (320, 180), clip[2]) for name, clip in TIMED.items()}
    return make(tmp_path_factory.mktemp("timed"), clips, seconds=1.6)


@pytest.mark.parametrize("name", TIMED)
def test_times_are_ffprobes(timed, name):
    """Reordered, variable, negative, late and slow: frames are shown when ffprobe says."""
    frames = check_times(timed[name])
    assert len(frames) > 3
    assert (frames[0].info.pts_seconds < 0) == (name == "negative")


def test_an_edit_list_hides_its_frames(tmp_path):
    """A cut without re-coding, which an edit list begins in mid-GOP, shows what ffprobe shows."""
    whole = make_one(tmp_path / "whole.mp4", B_FRAMES, seconds=3)
    path = tmp_path / "cut.mp4"
    servers.ffmpeg("-ss", "1.28", "-i", whole, "-t", "1", "-c", "copy", path)
    frames = check_times(path)
    with av.open(path) as file:
        stored = sum(1 for p in file.demux(video=0) if p.size)
    assert len(frames) < stored  # some are decoded but never shown
    assert packed(frames) == raw(path, "yuv420p")


UNSTAMPED = {  # name: (encoding, pixel format, suffix, whether its transform is exactly defined)
    "h264": (f"{X264} {GOP}", "yuv420p", "h264", True),
    "hevc": (f"{X265} -g 12", "yuv420p", "hevc", True),
    "h264-avi": (f"{X264} {GOP}", "yuv420p", "avi", True),
    "avi": ("-c:v mpeg4 -bf 2 -g 12 -q:v 4", "yuv420p", "avi", False),
    "m4v": ("-c:v mpeg4 -g 12 -q:v 4", "yuv420p", "m4v", False),
    "mjpeg": ("-c:v mjpeg -q:v 3", "yuvj420p", "mjpeg", False),
    # FFmpeg reads no time before 0 from Matroska: only later frames have one
    "negative": (f"{X264} {GOP} {NEGATIVE}", "yuv420p", "mkv", True),
}


@pytest.fixture(scope="module")
def unstamped(tmp_path_factory):
    """Name to the clip and its frames as FFmpeg's program decodes them."""
    folder = tmp_path_factory.mktemp("unstamped")
    clips = {
        name: (f"{encoding} -pix_fmt {pix_fmt}", suffix, (160, 96), "null")
        for name, (encoding, pix_fmt, suffix, _) in UNSTAMPED.items()
    }
    paths = make(folder, clips, seconds=1.6)
    theirs = raw_all(folder, {paths[name]: UNSTAMPED[name][1] for name in UNSTAMPED})
    return {name: (path, theirs[path]) for name, path in paths.items()}


@pytest.mark.parametrize("name", UNSTAMPED)
def test_missing_stamps_are_made_up(unstamped, name):
    """Where a format stores no times of presentation, frames come in order, evenly, all of them."""
    path, theirs = unstamped[name]
    _, frames = read(path)
    assert len(frames) == 40
    off = difference(packed(frames), theirs, 8)
    assert off.max() == 0 if UNSTAMPED[name][3] else off.mean() < 0.5  # noise differs by 8
    steps = np.diff([f.info.pts_seconds for f in frames])
    assert steps == pytest.approx(1 / 25, abs=1e-6)
    assert not any(f.info.discontinuity for f in frames)


def test_the_transport_clock_wraps(tmp_path):
    """A stream whose 33-bit clock starts again in mid-file goes on evenly, without a jump."""
    wrap = 2**33 / 90_000
    late = f"{B_FRAMES} -output_ts_offset {wrap - 2.4}"  # the muxer adds 1.4 s
    path = make_one(tmp_path / "clip.ts", late, seconds=3)
    _, frames = read(path)
    assert len(frames) == 75
    assert not any(f.info.discontinuity for f in frames)
    assert np.diff([f.info.pts_seconds for f in frames]) == pytest.approx(1 / 25, abs=1e-4)
    assert frames[0].info.pts_seconds % wrap > wrap - 1.5  # FFmpeg tells it as -1 s
    assert 1 < frames[-1].info.pts_seconds % wrap < 3


@pytest.mark.parametrize(
    "encoding",
    [
        f"{X264} -x264-params interlaced=1 -pix_fmt yuv420p",
        "-c:v mpeg2video -q:v 4 -flags +ilme+ildct -pix_fmt yuv420p",
        f"{X264} -pix_fmt yuv420p",
    ],
    ids=["h264", "mpeg2", "progressive"],
)
def test_interlacing_is_ffprobes(tmp_path, encoding):
    """Frames of fields are flagged where ffprobe flags them, and nowhere else."""
    is_progressive = encoding.endswith("ultrafast -pix_fmt yuv420p")
    filters = "null" if is_progressive else "interlace,fieldorder=tff"
    path = make_one(tmp_path / "clip.ts", encoding, seconds=0.8, filters=filters)
    frames = check_times(path)
    assert {f.info.interlaced for f in frames} == {filters != "null"}
