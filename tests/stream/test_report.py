from __future__ import annotations

import base64
import importlib.util
import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from dgiqa_stream import wire
from dgiqa_stream.config import PoolingSettings, SamplerSettings, StreamConfig
from dgiqa_stream.errors import SinkError
from dgiqa_stream.manifest import ModelManifest
from dgiqa_stream.pooling import TemporalPooling
from dgiqa_stream.recording import FrameRow, Recording, Track, read_recording
from dgiqa_stream.report import require_matplotlib, write_html, write_png
from dgiqa_stream.report._charts import clock
from dgiqa_stream.report._pictures import worst_rows
from dgiqa_stream.report._story import tell
from dgiqa_stream.telemetry import Count
from dgiqa_stream.types import FrameInfo, FrameScore, StreamInfo

cv2 = pytest.importorskip("cv2")
needs_matplotlib = pytest.mark.skipif(
    importlib.util.find_spec("matplotlib") is None, reason="could not import 'matplotlib'"
)

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


class Status:
    """What a backend says of itself."""

    requested, active, reason = "onnxruntime:auto", "onnxruntime:cpu", "no <CUDA> device"


class Page(HTMLParser):
    """What a page holds: its text, its tags, and whether they are closed in order."""

    VOID = ("meta", "img", "br", "link", "hr")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note the tag."""
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note the tag; it is closed at once."""
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        """The innermost open tag must be the one that ends."""
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        """Collect what is readable."""
        if not self._open or self._open[-1] != "style":
            self.text += " " + data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        """The attributes of every such tag."""
        return [attrs for name, attrs in self.tags if name == tag]


def jpeg() -> bytes:
    """A small picture."""
    return bytes(cv2.imencode(".jpg", np.full((18, 32, 3), 90, np.uint8))[1])


def frame_score(index: int, pts_seconds: float, score: float, **info: bool) -> FrameScore:
    """The score of a frame."""
    shown = FrameInfo(
        index=index,
        pts_seconds=pts_seconds,
        duration_seconds=0.04,
        pts=None,
        time_base=None,
        width=640,
        height=360,
        pix_fmt="yuv420p",
        **info,
    )
    return FrameScore(shown, "cam1", score, score / 100)


def messages(stream: str = "cam1", *, num_frames: int = 100) -> list[wire.Message]:
    """A session with a dip, a gap of 8 s from 10 s on, drops, a damaged frame and a thumbnail."""
    factory = wire.MessageFactory(stream, model=MANIFEST, sampler=SamplerSettings())
    info = StreamInfo(640, 360, "h264", "yuv420p", None, None, None, True, "rtsp")
    sent: list[wire.Message] = [
        factory.meta("rtsp://me:hush@cam/1", info, backend=Status(), config=StreamConfig()),
        factory.status("running"),
    ]
    pooling = TemporalPooling(PoolingSettings(), stream=stream, period_seconds=0.2)
    for n in range(num_frames):
        pts = n * 0.2 + (8.0 if n >= 50 else 0.0)
        score = frame_score(n, pts, 30.0 if 20 <= n < 25 else 80.0, corrupt=n == 22)
        counts = {Count.DROPPED_QUEUE: 4 if n > 70 else 0}
        sent.append(factory.frame(score, counts=counts))
        sent += [factory.window(w) for w in pooling.add(score)]
    *windows, session = pooling.finish()
    sent += [factory.window(w) for w in windows]
    sent.append(factory.thumbnail(frame_score(20, 4.0, 30.0), jpeg(), width=32, height=18))
    sent.append(factory.final(session, counts={}, duration_seconds=20.0, reason="end_of_stream"))
    return sent


def recorded(tmp_path: Path, sent: list[wire.Message]) -> Recording:
    """The messages, written and read back."""
    path = tmp_path / "recording.ndjson"
    path.write_bytes(b"".join(wire.encode(m) + b"\n" for m in sent))
    return read_recording(path)


def scored(tmp_path: Path, rows: list[dict[str, Any]]) -> Recording:
    """Rows of ``score``, written and read back."""
    path = tmp_path / "scores.ndjson"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return read_recording(path)


def page(recording: Recording, tmp_path: Path) -> tuple[Page, str]:
    """The report, parsed and as written."""
    out = tmp_path / "report.html"
    write_html(recording, out)
    text = out.read_text(encoding="utf-8")
    return Page(text), text


@needs_matplotlib
def test_the_page_shows_the_session_as_it_was_sent(tmp_path: Path):
    """Score, pooled values, model, settings and the way it ended are on the page."""
    sent = messages()
    shown, _ = page(recorded(tmp_path, sent), tmp_path)
    final = sent[-1]
    assert isinstance(final, wire.FinalMessage)
    assert f"{final.score:.1f}" in shown.text
    for name in ("mean", "low5", "harmonic_mean", "stdev"):
        assert f"{final.pool[name]:.1f}" in shown.text
    for told in ("dgiqa-s 1.2.0", "int8", "0f" * 32, "no <CUDA> device", "end_of_stream"):
        assert told in shown.text
    assert "sampler.frames_per_second" in shown.text
    assert "hush" not in shown.text


@needs_matplotlib
def test_the_page_needs_nothing_from_outside(tmp_path: Path):
    """No script, no link to load and no address but data: is in the page."""
    shown, text = page(recorded(tmp_path, messages()), tmp_path)
    assert not shown.all("script")
    assert not shown.all("link")
    assert all((a["src"] or "").startswith("data:image/jpeg;base64,") for a in shown.all("img"))
    loaded = re.findall(r"(?:src|href)=\"([^\"]*)\"|url\(([^)]*)\)|@import", text)
    assert loaded
    assert all(re.match(r"data:|#", a or b) for a, b in loaded)


@needs_matplotlib
def test_values_from_outside_cannot_become_markup(tmp_path: Path):
    """Paths, errors and file names with tags, quotes and dollars appear as text."""
    nasty = '<img src=x onerror="alert(1)">&$title ${style}'
    rows = [{"path": nasty, "index": n, "pts_seconds": n / 5, "score": 50} for n in range(9)]
    rows.append({"path": nasty + "2", "score": None, "error": nasty})
    shown, text = page(scored(tmp_path, rows), tmp_path)
    assert "<img src=x" not in text
    assert shown.text.count(nasty) >= 3


@needs_matplotlib
def test_ids_are_unique_and_references_lead_somewhere(tmp_path: Path):
    """Charts of several streams share no id, and every reference has its target."""
    both = messages("cam1") + messages("cam2")
    shown, text = page(recorded(tmp_path, both), tmp_path)
    ids = [attrs["id"] for _, attrs in shown.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    assert set(re.findall(r"(?:href=\"|url\()#([\w.-]+)", text)) <= set(ids)


@needs_matplotlib
def test_charts_follow_the_page_into_the_dark(tmp_path: Path):
    """No colour of the palette is left in a chart: all are variables, black nowhere."""
    _, text = page(recorded(tmp_path, messages()), tmp_path)
    for chart in re.findall(r"<svg.*?</svg>", text, re.DOTALL):
        assert "var(--accent)" in chart
        assert not re.findall(r"(?:fill|stroke): #[0-9a-f]{6}", chart)


def test_gaps_and_drops_are_where_they_were(tmp_path: Path):
    """A gap is shaded from the end of the last hold to the next frame, drops between two frames."""
    (track,) = recorded(tmp_path, messages()).tracks
    story = tell(track)
    assert np.allclose(story.gaps, [(9.8 + 2.0, 18.0)])
    assert np.allclose(story.drops, [(70 * 0.2 + 8, 71 * 0.2 + 8)])
    assert np.allclose(story.corrupt_seconds, [4.4])
    assert not story.was_pooled_here


def test_the_lowest_window_of_each_length_is_told(tmp_path: Path):
    """Per length, the valid window with the lowest headline is shown: here the dip at 4 s."""
    (track,) = recorded(tmp_path, messages()).tracks
    lowest = tell(track).lowest_windows
    assert [w.length_seconds for w in lowest] == [1.0, 10.0, 60.0][: len(lowest)]
    assert (lowest[0].begin_seconds, lowest[0].end_seconds) == pytest.approx((4.0, 5.0))
    assert lowest[0].score == pytest.approx(30.0)


@needs_matplotlib
def test_a_recording_without_its_end_is_pooled_from_its_frames(tmp_path: Path):
    """Without the final message the same values come from the frames, and the page says so."""
    sent = messages()
    whole, cut = tell(recorded(tmp_path, sent).tracks[0]), recorded(tmp_path, sent[:-1])
    story = tell(cut.tracks[0])
    assert story.was_pooled_here
    assert story.session.pool == pytest.approx(dict(whole.session.pool))
    shown, _ = page(cut, tmp_path)
    assert "ends without a summary" in shown.text


@needs_matplotlib
def test_scores_of_a_video_are_shown_with_its_frames(tmp_path: Path):
    """For rows of ``score``, the worst frames are read again from the file, with time codes."""
    video = tmp_path / "steps.avi"
    writer = cv2.VideoWriter(str(video), cv2.VideoWriter_fourcc(*"MJPG"), 10, (64, 48))
    for n in range(40):
        writer.write(np.full((48, 64, 3), 6 * n, np.uint8))
    writer.release()
    rows = [
        {"path": str(video), "index": n, "pts_seconds": n / 10, "score": 10.0 if n == 25 else 60.0}
        for n in range(40)
    ]
    shown, text = page(scored(tmp_path, rows), tmp_path)
    assert "00:00:02.500" in shown.text
    coded = re.findall(r"data:image/jpeg;base64,([^\"]+)", text)
    assert coded
    first = cv2.imdecode(np.frombuffer(base64.b64decode(coded[0]), np.uint8), cv2.IMREAD_COLOR)
    assert first.shape == (48, 64, 3)
    assert abs(float(first.mean()) - 6 * 25) < 4


@needs_matplotlib
def test_a_video_that_is_gone_is_said_to_be_gone(tmp_path: Path):
    """A missing file leaves the report whole, with a line in place of the pictures."""
    rows = [{"path": "gone.mp4", "index": n, "pts_seconds": n / 5, "score": 50} for n in range(9)]
    shown, _ = page(scored(tmp_path, rows), tmp_path)
    assert "no longer where it was" in shown.text
    assert not shown.all("img")


@needs_matplotlib
def test_stills_are_ranked_with_their_pictures(tmp_path: Path):
    """Pictures are listed lowest first, with their mean, and the worst are shown."""
    rows = []
    for name, score in (("good", 80.0), ("bad", 20.0)):
        path = tmp_path / f"{name}.png"
        cv2.imwrite(str(path), np.full((40, 60, 3), 128, np.uint8))
        rows.append({"path": str(path), "score": score})
    shown, _ = page(scored(tmp_path, rows), tmp_path)
    assert shown.text.index("bad.png") < shown.text.index("good.png")
    assert "mean 50.0" in shown.text
    assert len(shown.all("img")) == 2


@needs_matplotlib
def test_a_session_without_frames_makes_a_page(tmp_path: Path):
    """A stream that never ran is reported with its error, not with a crash."""
    factory = wire.MessageFactory("cam1", model=MANIFEST, sampler=SamplerSettings())
    error = SinkError("connection <refused>")
    sent: list[wire.Message] = [
        factory.status("connecting"),
        factory.status("failed", error=error),
        factory.final(None, counts={}, duration_seconds=0.0, reason="failed", error=error),
    ]
    shown, _ = page(recorded(tmp_path, sent), tmp_path)
    assert "No frame was scored" in shown.text
    assert "connection <refused>" in shown.text


@needs_matplotlib
def test_many_frames_make_a_page_of_bounded_size(tmp_path: Path):
    """Ten thousand frames a track do not make a page of megabytes."""
    rng = np.random.default_rng(1)
    frames = tuple(
        FrameRow(score=float(q), index=n, pts_seconds=n / 5)
        for n, q in enumerate(rng.uniform(0, 100, 10_000))
    )
    track = Track(name="long.mp4", path=tmp_path / "long.mp4", frames=frames)
    _, text = page(Recording(tmp_path / "r.ndjson", (track,), 10_000), tmp_path)
    assert len(text) < 700_000


@needs_matplotlib
def test_the_plot_is_a_picture_with_a_curve(tmp_path: Path):
    """The PNG is 1650 pixels wide, one panel per track, and not blank."""
    out = tmp_path / "curve.png"
    write_png(recorded(tmp_path, messages("cam1") + messages("cam2")), out)
    picture = cv2.imread(str(out))
    assert picture.shape[:2] == (960, 1650)
    for panel in (picture[:480], picture[480:]):
        assert len(np.unique(panel.reshape(-1, 3), axis=0)) > 50


@needs_matplotlib
def test_stills_alone_have_no_curve(tmp_path: Path):
    """Asking for a curve of pictures is one clear error."""
    with pytest.raises(SinkError, match="no curve to draw"):
        write_png(scored(tmp_path, [{"path": "a.png", "score": 5}]), tmp_path / "curve.png")


@needs_matplotlib
@pytest.mark.parametrize("write", [write_html, write_png])
def test_a_place_that_cannot_be_written_is_one_clear_error(tmp_path: Path, write):
    """A missing folder is named, and says to choose another place."""
    recording = recorded(tmp_path, messages())
    with pytest.raises(SinkError, match=r"nowhere.*No such file.*choose another"):
        write(recording, tmp_path / "nowhere" / "out")


@pytest.mark.parametrize("write", [write_html, write_png])
def test_without_matplotlib_it_says_what_to_install(tmp_path: Path, monkeypatch, write):
    """A missing matplotlib is one error with the install line, and nothing is written."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SinkError, match=r"pip install 'dgiqa-stream\[report\]'"):
        require_matplotlib()
    recording = recorded(tmp_path, messages())
    with pytest.raises(SinkError, match="matplotlib"):
        write(recording, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_worst_frames_are_spread_over_time():
    """No two of the chosen frames are within a second; the lowest comes first."""
    rows = tuple(
        FrameRow(score=50.0 + abs(n - 40), index=n, pts_seconds=n / 25) for n in range(250)
    )
    chosen = worst_rows(rows)
    times = sorted(row.pts_seconds or 0.0 for row in chosen)
    assert len(chosen) == 6
    assert chosen[0].index == 40
    assert min(np.diff(times)) >= 1.0 - 1e-9


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0, "0:00"), (59.96, "1:00"), (83.5, "1:23.5"), (3723, "1:02:03"), (-5, "-0:05")],
)
def test_times_read_as_clocks(seconds: float, shown: str):
    """Seconds show as hours, minutes, seconds and, where there is one, a tenth."""
    assert clock(seconds) == shown
