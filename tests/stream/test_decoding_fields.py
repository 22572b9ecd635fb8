"""Interlaced frames as two pictures each, against FFmpeg's own ``bwdif`` and the stored lines."""

from __future__ import annotations

import contextlib
import itertools
import json
import resource
from pathlib import Path

import av
import media_servers as servers
import numpy as np
import pytest
from ffmpeg_clips import RAW, X264, make, make_one, packed, probed, read

from dgiqa_stream.config import SourceSettings, parse_config
from dgiqa_stream.errors import SourceUnavailable
from dgiqa_stream.pipeline import Monitor
from dgiqa_stream.sources import open_source
from dgiqa_stream.sources._bob import bobbed
from dgiqa_stream.telemetry import Count
from dgiqa_stream.types import FrameInfo, HdrTags

pytestmark = pytest.mark.servers

BOB = {"deinterlace": "bob"}
RATE = 50  # pictures a second of the pattern, which become 25 frames of two fields
FIELD_SECONDS = 1 / RATE
TOP_FIRST = "interlace=scan=tff,fieldorder=tff"
BOTTOM_FIRST = "interlace=scan=bff,fieldorder=bff"
INTERLACED_X264 = f"{X264} -x264-params interlaced=1"
CLIPS = {  # name: (encoding, suffix, size, filters)
    "h264-tff": (f"{INTERLACED_X264} -pix_fmt yuv420p", "ts", (320, 180), TOP_FIRST),
    "mpeg2-bff": (
        "-c:v mpeg2video -q:v 4 -flags +ilme+ildct -top 0 -pix_fmt yuv420p",
        *("ts", (320, 180), BOTTOM_FIRST),
    ),
    "h264-422-10": (f"{INTERLACED_X264} -pix_fmt yuv422p10le", "mp4", (162, 122), TOP_FIRST),
    "ffv1-444": ("-c:v ffv1 -pix_fmt yuv444p", "mkv", (161, 122), BOTTOM_FIRST),
}


@pytest.fixture(autouse=True)
def needs_ffmpeg(missing_server):
    """The reference of every test here."""
    servers.require_ffmpeg(missing_server)


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Interlaced clips of 10 frames, each field of another moment."""
    return make(tmp_path_factory.mktemp("fields"), CLIPS, rate=RATE)


@pytest.fixture(scope="module")
def progressive(tmp_path_factory):
    """The same pattern without interlacing."""
    folder = tmp_path_factory.mktemp("progressive")
    return make_one(folder / "plain.ts", f"{X264} -pix_fmt yuv420p", seconds=0.4)


def pictures(content, frame):
    """Packed frames of the shape of one of ours: int, one row per frame."""
    kind = np.uint8 if frame.planes.bit_depth == 8 else np.dtype("<u2")
    num_samples = sum(plane.size for plane in frame.planes.samples)
    return np.frombuffer(content, kind).reshape(-1, num_samples).astype(int)


def worst(ours, theirs):
    """Of each picture, how far its worst sample is off."""
    assert ours.shape == theirs.shape
    return np.abs(ours - theirs).max(axis=1)


def by_ffmpeg(path, pix_fmt, options="send_field"):
    """The clip bobbed by FFmpeg's own program."""
    return servers.ffmpeg("-i", path, "-vf", f"bwdif={options}", *RAW, pix_fmt, "-")


@pytest.mark.parametrize("name", CLIPS)
def test_fields_are_ffmpegs(clips, name):
    """Every picture is what FFmpeg's own program makes of the same field, to the sample.

    But the first and the last: FFmpeg 5 takes frames beyond the ends for equal to those at them,
    later versions make these two of their own field alone, so they differ between its lines.
    """
    info, stored = read(clips[name])
    bobbed_info, frames = read(clips[name], **BOB)
    assert len(frames) == 2 * len(stored) == 20
    assert (info.average_fps, bobbed_info.average_fps) == (25, 50)
    theirs = pictures(by_ffmpeg(clips[name], info.pix_fmt), frames[0])
    assert worst(pictures(packed(frames), frames[0]), theirs)[1:-1].max() == 0
    assert not any(f.info.interlaced for f in frames)
    assert {f.info.pix_fmt for f in frames} == {info.pix_fmt}


@pytest.mark.parametrize("name", CLIPS)
def test_lines_of_a_field_are_untouched(clips, name):
    """Each picture holds the stored lines of its field, the first field first: top or bottom as
    ffprobe tells; the ends are no exception.
    """
    tops = [bool(f["top_field_first"]) for f in probed(clips[name])]
    _, stored = read(clips[name])
    _, frames = read(clips[name], **BOB)
    assert set(tops) == {"tff" in CLIPS[name][3]}
    for number, frame in enumerate(frames):
        is_second = number % 2
        first_line = is_second if tops[number // 2] else 1 - is_second
        whole = stored[number // 2].planes.samples
        for ours, plane in zip(frame.planes.samples, whole, strict=True):
            np.testing.assert_array_equal(ours[first_line::2], plane[first_line::2])


@pytest.mark.parametrize("name", CLIPS)
def test_times_are_ffprobes(clips, name):
    """Fields are shown when the filter of FFmpeg's own program says, evenly; indices count them."""
    _, frames = read(clips[name], **BOB)
    theirs = probed(clips[name], filters="bwdif=send_field")
    stamps = np.array([float(f["best_effort_timestamp_time"]) for f in theirs])
    ours = np.array([f.info.pts_seconds for f in frames])
    assert ours - ours[0] == pytest.approx(stamps - stamps[0], abs=1e-3)
    assert np.diff(ours) == pytest.approx(FIELD_SECONDS, abs=1e-6)
    durations = np.array([f.info.duration_seconds for f in frames])
    assert durations == pytest.approx(FIELD_SECONDS, abs=1e-6)
    assert [f.info.index for f in frames] == list(range(20))
    _, stored = read(clips[name])
    assert [f.info.pts for f in frames[::2]] == [f.info.pts for f in stored]
    assert {f.info.pts for f in frames[1::2]} == {None}  # the container has no stamp of these
    assert [f.info.keyframe for f in frames[::2]] == [f.info.keyframe for f in stored]
    assert not any(f.info.keyframe for f in frames[1::2])


def test_only_flagged_frames_are_bobbed(tmp_path, clips, progressive):
    """In a stream of both kinds, flagged frames become two pictures, and the others are what was
    decoded, to the sample and at their time; the order of time is kept.
    """
    parts = [clips["h264-tff"], progressive, clips["h264-tff"]]
    path = tmp_path / "mixed.ts"
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    _, stored = read(path)
    _, frames = read(path, **BOB)
    kinds = [f.info.interlaced for f in stored]
    assert kinds == [True] * 10 + [False] * 10 + [True] * 10
    assert len(frames) == 20 + 10 + 20
    assert packed(frames[20:30]) == packed(stored[10:20])
    assert [f.info.pts_seconds for f in frames[20:30]] == [
        f.info.pts_seconds for f in stored[10:20]
    ]
    assert min(np.diff([f.info.pts_seconds for f in frames])) > 0
    theirs = pictures(by_ffmpeg(path, "yuv420p", "send_field:deint=interlaced"), frames[0])
    off = worst(pictures(packed(frames), frames[0]), theirs)
    assert off[1:-1].max() == 0


def test_a_change_of_size_begins_anew(tmp_path, clips, progressive):
    """Before and after a change of size and format, frames come to what each part comes to alone;
    the last field of the part before is not lost.
    """
    small = make_one(
        tmp_path / "small.ts",
        f"{INTERLACED_X264} -pix_fmt yuv422p10le",
        size=(162, 122),
        rate=RATE,
        filters=TOP_FIRST,
    )
    parts = [clips["h264-tff"], small, progressive]
    path = tmp_path / "joined.ts"
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    _, frames = read(path, **BOB)
    alone = [read(part, **BOB)[1] for part in parts]
    begin = 0
    for part in alone:
        assert packed(frames[begin : begin + len(part)]) == packed(part)
        begin += len(part)
    assert len(frames) == begin == 20 + 20 + 10
    assert min(np.diff([f.info.pts_seconds for f in frames])) > 0


def test_fields_keep_the_turn_and_the_tags(tmp_path):
    """Pictures of a turned, full-range HDR stream are as turned and as coloured as its frames."""
    tags = "-color_trc smpte2084 -color_primaries bt2020 -colorspace bt2020nc -color_range pc"
    encoding = f"{INTERLACED_X264} -pix_fmt yuv420p10le {tags}"
    plain = make_one(tmp_path / "plain.mp4", encoding, rate=RATE, filters=TOP_FIRST)
    path = tmp_path / "turned.mp4"
    with av.open(plain) as file, av.open(path, "w") as out:
        stream = out.add_stream_from_template(file.streams.video[0])
        stream.set_display_rotation(-90)
        for packet in file.demux(video=0):
            if packet.size:
                packet.stream = stream
                out.mux(packet)
    info, frames = read(path, **BOB)
    assert (info.width, info.height, len(frames)) == (180, 320, 20)
    assert packed(frames) == packed(read(plain, **BOB)[1])
    for frame in frames:
        planes = frame.planes
        assert (planes.rotation, planes.matrix, planes.full_range) == (90, "bt2020", True)
        assert planes.hdr == HdrTags("pq")
        assert frame.info.dynamic_range == "pq"


def decoded(path):
    """The pictures as decoded and our frames of them, as the filter takes them."""
    _, frames = read(path)
    with av.open(path) as container:
        return list(zip(container.decode(video=0), frames, strict=True))


def test_one_frame_is_two_pictures(clips):
    """A single interlaced frame, with none before or behind, has both its fields."""
    found = list(bobbed(iter(decoded(clips["ffv1-444"])[:1])))
    assert [f.info.pts_seconds for f in found] == pytest.approx([0, FIELD_SECONDS], abs=1e-3)
    assert [f.info.index for f in found] == [0, 1]


def test_a_fault_comes_after_the_last_field(clips):
    """When the source breaks off, the pictures of what it gave come first, then the fault."""

    def breaking():
        yield from decoded(clips["ffv1-444"])[:4]
        raise SourceUnavailable("gone")

    frames = bobbed(breaking())
    assert [frame.info.index for frame in itertools.islice(frames, 8)] == list(range(8))
    with pytest.raises(SourceUnavailable, match="gone"):
        next(frames)


def test_it_looks_one_frame_ahead(clips):
    """Both pictures of a frame come as soon as the frame behind it is there: no more is kept."""
    taken = 0

    def counted():
        nonlocal taken
        for pair in decoded(clips["ffv1-444"]):
            taken += 1
            yield pair

    ahead = [taken - frame.info.index // 2 for frame in bobbed(counted())]
    assert set(ahead[:-2]) == {2}
    assert set(ahead[-2:]) == {1}


def test_a_gap_does_not_stretch_a_field(clips):
    """Where frames are missing, the second field before the gap comes when it would have anyway;
    one before a jump of the clock, too.
    """
    pairs = [pair for number, pair in enumerate(decoded(clips["ffv1-444"])) if number not in (4, 5)]
    times = np.array([f.info.pts_seconds for f in bobbed(iter(pairs))])
    assert times[1::2] - times[::2] == pytest.approx(FIELD_SECONDS, abs=1e-3)
    steps = np.diff(times[::2])
    assert sorted(steps.round(2)) == [0.04] * 6 + [0.12]


@pytest.mark.parametrize(("duration", "wanted"), [(0.2, 10), (0.1, 5), (0.02, 1)])
def test_a_duration_counts_fields(clips, duration, wanted):
    """The chosen time holds as many pictures as its length times the doubled rate."""
    _, frames = read(clips["h264-tff"], **BOB, duration_seconds=duration)
    assert len(frames) == wanted


def test_progressive_streams_are_as_without(progressive):
    """Asked for where nothing is interlaced, it changes neither pictures nor times nor rate."""
    (info, frames), (bobbed_info, same) = read(progressive), read(progressive, **BOB)
    assert bobbed_info == info
    assert packed(same) == packed(frames)
    assert [timeless(f.info) for f in same] == [timeless(f.info) for f in frames]


def timeless(info):
    """What does not depend on when it was read."""
    return {key: getattr(info, key) for key in FrameInfo.__slots__ if "received" not in key}


def test_counts_are_of_pictures(clips, fake_scorer):
    """Two pictures of a frame count as two decoded, each of them then skipped or scored."""
    config = parse_config({"source": BOB, "sampler": {"mode": "every", "every": 3}})
    counts = Monitor(str(clips["h264-tff"]), config=config, scorer=fake_scorer).run().counts
    assert counts[Count.DECODED] == 20
    assert counts[Count.SCORED] == counts[Count.HANDED] == 7
    assert counts[Count.SKIPPED] == 13


def test_the_command_bobs_when_asked(clips, run_cli):
    """``--deinterlace bob`` scores both fields, without it frames as stored; else it is refused."""
    path = clips["h264-tff"]
    for options, number in (((), 10), (("--deinterlace", "bob"), 20)):
        done = run_cli("score", path, "-f", "ndjson", "-q", *options)
        assert done.code == 0, done
        shown = [json.loads(line) for line in done.out.splitlines()]
        assert [m["index"] for m in shown] == list(range(number))
    done = run_cli("score", path, "--deinterlace", "weave")
    assert (done.code, done.out) == (2, "")
    assert "--deinterlace" in done.err
    assert "give one of bob, none" in done.err


def resident_bytes():
    """Memory of this process that is in use now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def test_filters_leave_no_memory_behind(clips):
    """Thirty filters, opened and ended one after the other, leave less than one of them held."""

    def once():
        source = open_source(str(clips["h264-tff"]), SourceSettings(**BOB), stream="s")
        with contextlib.closing(source):
            return sum(1 for _ in source.frames())

    for _ in range(5):
        once()
    before = resident_bytes()
    for _ in range(30):
        assert once() == 20
    assert resident_bytes() - before < 2 << 20
