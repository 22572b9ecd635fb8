from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest

from dgiqa_stream import wire
from dgiqa_stream.config import PoolingSettings, SamplerSettings
from dgiqa_stream.errors import SourceError
from dgiqa_stream.manifest import ModelManifest
from dgiqa_stream.pooling import TemporalPooling
from dgiqa_stream.recording import read_recording
from dgiqa_stream.telemetry import Count
from dgiqa_stream.types import FrameInfo, FrameScore

GOLDEN = Path(__file__).parents[1] / "golden" / "recordings"
MANIFEST = msgspec.convert(
    {
        "schema": "dgiqa.manifest/2",
        "id": "dgiqa-s",
        "version": "1.2.0",
        "precision": "int8",
        "sha256": "0f" * 32,
        "size_bytes": 1,
        "licence": "Apache-2.0",
        "num_parameters": 1,
        "preprocess": {
            "views": [{"name": "whole", "kind": "whole", "height": 64, "width": 64}],
            "reduction": "halved-bilinear",
        },
        "output": {"name": "raw", "mapping": {"raw": [0.0, 1.0], "score": [0.0, 100.0]}},
        "calibration": "test-1",
        "made_by": "this test",
    },
    ModelManifest,
)


def frame_score(index: int, score: float, **info: bool) -> FrameScore:
    """The score of a frame, five a second."""
    shown = FrameInfo(
        index=index,
        pts_seconds=7.2 + index * 0.2,
        duration_seconds=0.04,
        pts=None,
        time_base=None,
        width=640,
        height=360,
        pix_fmt="yuv420p",
        **info,
    )
    return FrameScore(shown, "cam1", score, score / 100)


def session(factory: wire.MessageFactory, *, num_frames: int = 20) -> list[wire.Message]:
    """What one session of a stream writes: status, frames, windows, a thumbnail, final."""
    pooling = TemporalPooling(PoolingSettings(), stream="cam1", period_seconds=0.2)
    messages: list[wire.Message] = [factory.status("connecting"), factory.status("running")]
    for n in range(num_frames):
        score = frame_score(n, 20.0 + n, corrupt=n == 3, discontinuity=n == 5)
        counts = {Count.DROPPED_QUEUE: n // 4, Count.DROPPED_STALE: n // 8, Count.SKIPPED: 99}
        messages.append(factory.frame(score, counts=counts))
        messages += [factory.window(w) for w in pooling.add(score)]
        messages.append(factory.status("running"))
    *windows, whole = pooling.finish()
    messages += [factory.window(w) for w in windows]
    for score in (frame_score(9, 29.0), frame_score(0, 20.0)):
        messages.append(factory.thumbnail(score, b"\xff\xd8jpeg", width=32, height=18))
    messages.append(factory.status("ended"))
    messages.append(factory.final(whole, counts={}, duration_seconds=4.0, reason="end_of_stream"))
    return messages


def factory(stream: str = "cam1") -> wire.MessageFactory:
    """Makes the messages of a stream."""
    return wire.MessageFactory(stream, model=MANIFEST, sampler=SamplerSettings())


def lines(messages: list[wire.Message]) -> bytes:
    """NDJSON."""
    return b"".join(wire.encode(m) + b"\n" for m in messages)


def write(tmp_path: Path, content: bytes) -> Path:
    """A recording with this content."""
    path = tmp_path / "recording.ndjson"
    path.write_bytes(content)
    return path


def test_what_was_sent_is_read_back(tmp_path: Path):
    """Frames, windows, thumbnails and the summary come back with the values that were sent."""
    sent = session(factory())
    recording = read_recording(write(tmp_path, lines(sent)))
    (track,) = recording.tracks
    assert (track.name, track.path, track.period_seconds) == ("cam1", None, 0.2)
    assert [f.score for f in track.frames] == [20.0 + n for n in range(20)]
    assert [f.pts_seconds for f in track.frames] == pytest.approx(
        [7.2 + 0.2 * n for n in range(20)]
    )
    assert [f.index for f in track.frames if f.corrupt] == [3]
    assert [f.index for f in track.frames if f.discontinuity] == [5]
    assert [f.num_dropped for f in track.frames[7:9]] == [1, 3]
    sent_windows = [m for m in sent if isinstance(m, wire.WindowMessage)]
    assert [w.score for w in track.windows] == [m.score for m in sent_windows]
    assert [w.length_seconds for w in track.windows] == [m.window.len_s for m in sent_windows]
    assert track.final == sent[-1]
    assert [t.score for t in track.thumbnails] == [20.0, 29.0]
    assert track.thumbnails[0].jpeg == b"\xff\xd8jpeg"
    assert (recording.num_lines, recording.num_cut_short) == (len(sent), 0)


def test_statuses_are_kept_where_they_say_something_new(tmp_path: Path):
    """Of many equal states one is kept, and every change and the last."""
    (track,) = read_recording(write(tmp_path, lines(session(factory())))).tracks
    assert [s.state for s in track.statuses] == ["connecting", "running", "ended"]


def test_streams_and_sessions_are_told_apart(tmp_path: Path):
    """Interleaved streams, and two sessions of one, are separate tracks in order of appearance."""
    one, two = factory("cam1"), factory("cam10")
    mixed = [m for pair in zip(session(one), session(two), strict=True) for m in pair]
    one.new_session()
    mixed += session(one, num_frames=3)
    tracks = read_recording(write(tmp_path, lines(mixed))).tracks
    assert [t.name for t in tracks] == ["cam1", "cam10", "cam1"]
    assert [len(t.frames) for t in tracks] == [20, 20, 3]
    assert tracks[0].session != tracks[2].session


@pytest.mark.parametrize("kept", [0.1, 0.5, 0.99])
def test_a_last_line_cut_short_is_left_out_and_counted(tmp_path: Path, kept: float):
    """A recording that ends within a line gives everything before it."""
    whole = session(factory())
    last = wire.encode(whole[-1])
    cut = last[: int(len(last) * kept)]
    recording = read_recording(write(tmp_path, lines(whole[:-1]) + cut))
    assert recording.num_cut_short == 1
    assert recording.tracks[0].final is None
    assert len(recording.tracks[0].frames) == 20


def test_a_line_cut_short_by_a_kill_is_left_out_wherever_it_is_cut(tmp_path: Path):
    """A service that was killed and started again goes on below the line it was writing."""
    whole = session(factory())
    at = next(i for i, message in enumerate(whole) if isinstance(message, wire.FrameMessage))
    before, torn, after = lines(whole[:at]), wire.encode(whole[at]), lines(whole[at + 1 :])
    for num_bytes in range(1, len(torn)):
        content = before + torn[:num_bytes] + b"\n" + after
        recording = read_recording(write(tmp_path, content))
        assert recording.num_cut_short == 1, torn[:num_bytes]
        assert recording.tracks[0].final is not None
        assert len(recording.tracks[0].frames) == 19


def test_a_recording_may_begin_with_a_line_cut_short(tmp_path: Path):
    """One that was cut while it was begun."""
    whole = lines(session(factory()))
    recording = read_recording(write(tmp_path, whole[:30] + b"\n" + whole))
    assert recording.num_cut_short == 1
    assert len(recording.tracks[0].frames) == 20


def test_a_recording_without_intervals_is_read():
    """What the release before intervals wrote is read: no interval, no share, and a frame that it
    called out of domain is HDR, the only reason it knew.
    """
    (track,) = read_recording(GOLDEN / "without-intervals.ndjson").tracks
    assert [(f.score, f.interval) for f in track.frames] == [(71.25, None), (40.5, None)]
    assert [f.out_of_domain for f in track.frames] == [(), ("hdr",)]
    assert [w.in_domain_share for w in track.windows] == [None]
    assert track.final is not None
    assert (track.final.n, track.final.in_domain_share) == (48, None)


def test_rows_say_how_sure_they_are(tmp_path: Path):
    """Interval and reasons of ``score``'s rows are read; bounds off the scale are an error."""
    row = {"path": "a.png", "score": 50, "interval_low": 41.5, "interval_high": 58.5}
    row["out_of_domain"] = ["unfamiliar", "flat"]
    (track,) = read_recording(write(tmp_path, json.dumps(row).encode())).tracks
    assert track.frames[0].interval == (41.5, 58.5)
    assert track.frames[0].out_of_domain == ("unfamiliar", "flat")
    row["interval_high"] = 40.0
    with pytest.raises(SourceError, match=r"interval 41\.5 to 40\.0"):
        read_recording(write(tmp_path, json.dumps(row).encode() + b"\n"))


def test_scores_of_files_are_grouped_by_path(tmp_path: Path):
    """Rows of ``score`` become one track per path; a still has no time, and keys may be added."""
    rows = [
        {"path": "a.mp4", "index": 0, "pts_seconds": 0.0, "score": 50.5, "raw": 0.5, "new": [1]},
        {"path": "b.png", "score": 80},
        {"path": "a.mp4", "index": 5, "pts_seconds": 0.2, "score": 49.5, "in_domain": False},
        {"path": "c.png", "error": "c.png is not a picture"},
    ]
    content = "\n".join(json.dumps(row) for row in rows).encode()
    video, still, failed = read_recording(write(tmp_path, content)).tracks
    assert (video.name, video.path, video.is_still) == ("a.mp4", Path("a.mp4"), False)
    assert [(f.index, f.pts_seconds, f.score) for f in video.frames] == [
        (0, 0.0, 50.5),
        (5, 0.2, 49.5),
    ]
    assert [f.out_of_domain for f in video.frames] == [(), ("hdr",)]
    assert still.is_still
    assert still.frames[0].score == 80.0
    assert failed.frames == ()
    assert failed.error == "c.png is not a picture"


def test_messages_of_later_kinds_are_left_out(tmp_path: Path):
    """A kind that a later minor version adds is counted and does not stop the reading."""
    later = b'{"schema":"dgiqa.event/1","stream":"cam1"}\n'
    recording = read_recording(write(tmp_path, later + lines(session(factory()))))
    assert recording.num_unknown == 1
    assert len(recording.tracks[0].frames) == 20


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (b"time,score\n1,2\n", 1),
        (b"\x00\x00\x00\x18ftypmp42" + bytes(range(256)), 1),
        (b'{"path":"a.mp4","score":50}\n{"path":"a.mp4"}\n', 2),
        (b'{"path":"a.mp4","score":50}\n{"path":"a.mp4","score":150}\n', 2),
        (b'{"path":"a.mp4","score":50}\n\n[1,2]\n{"path":"a.mp4","score":50}\n', 3),
        (b'{"schema":"dgiqa.frame/2","stream":"cam1"}\n', 1),
        (b'{"schema":"dgiqa.frame/1","stream":"cam1"}\n', 1),
        (b'{\n  "path": "a.mp4",\n  "score": 50\n}\n', 2),
    ],
    ids=[
        *("csv", "mp4", "no score", "off the scale", "not an object", "major 2", "half a message"),
        "over several lines",
    ],
)
def test_a_file_that_is_no_recording_is_one_clear_error(tmp_path: Path, content: bytes, line: int):
    """Anything else is one error with the file, the line and the commands that write recordings."""
    with pytest.raises(SourceError, match=f"recording.ndjson line {line} .*dgiqa-stream watch"):
        read_recording(write(tmp_path, content))


@pytest.mark.parametrize("content", [b"", b"\n \n"])
def test_an_empty_file_is_an_error(tmp_path: Path, content: bytes):
    """A recording without any line says so."""
    with pytest.raises(SourceError, match="holds no scores"):
        read_recording(write(tmp_path, content))


def test_a_missing_file_is_an_error(tmp_path: Path):
    """A path that is not there is named, with the system's reason."""
    with pytest.raises(SourceError, match=r"nothing.ndjson: No such file"):
        read_recording(tmp_path / "nothing.ndjson")
