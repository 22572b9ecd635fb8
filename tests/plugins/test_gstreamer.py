"""The GStreamer element, run by GStreamer's own programs and by an application."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys

import gst_runs
import media_servers as servers
import numpy as np
import pytest

pytestmark = [pytest.mark.servers, pytest.mark.slow]

INFERENCE = 1e-3
"""Points of 100 by which one score may differ between two runs of the same picture: both programs
print the same float32 prediction, one of them rounded to 1e-4."""
TEST_VIDEO = "videotestsrc num-buffers={number} ! video/x-raw,format={format},width=320,height=180"


@pytest.fixture(scope="module")
def gstreamer(tmp_path_factory):
    """The environment for GStreamer's programs, once it is there."""
    folder = tmp_path_factory.mktemp("gstreamer")

    def require(missing):
        return gst_runs.require_gstreamer(missing, folder)

    return require


@pytest.fixture
def environment(gstreamer, missing_server):
    """What a user sets, so that GStreamer finds the element."""
    servers.require_ffmpeg(missing_server)
    return gstreamer(missing_server)


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Three seconds of H.264 with B-frames whose quality differs from second to second, by name."""
    folder = tmp_path_factory.mktemp("clips")
    paths = {name: folder / f"{name}.mp4" for name in ("plain", "turned", "pq")}
    pattern = "testsrc2=size=426x240:rate=25:duration=3,gblur=sigma=4:enable='between(t,1,2)'"
    coded = ["-c:v", "libx264", "-preset", "fast", "-bf", "2", "-crf", "30"]
    servers.ffmpeg(
        "-f", "lavfi", "-i", f"{pattern},format=yuv420p", *coded, paths["plain"],
    )  # fmt: skip
    servers.ffmpeg(
        "-i", paths["plain"], "-c", "copy", "-metadata:s:v:0", "rotate=90", paths["turned"]
    )
    tags = ["-color_primaries", "bt2020", "-color_trc", "smpte2084", "-colorspace", "bt2020nc"]
    servers.ffmpeg("-f", "lavfi", "-i", f"{pattern},format=yuv420p10le", *coded, *tags, paths["pq"])
    return paths


def scores(messages):
    """Score by time, of the frames among messages."""
    return {
        round(fields["frame.pts_seconds"], 3): fields["quality.score"]
        for name, fields in messages
        if name == "dgiqa-frame"
    }


@pytest.mark.parametrize("name", ["plain", "turned", "pq"])
def test_a_file_scores_as_on_the_command_line(environment, clips, name):
    """A decoded H.264 file: the frames that are scored, and each score, are those of `score`.

    The same holds where a tag turns the picture, and for HDR.
    """
    clip = clips[name]
    ran = gst_runs.launch(
        environment,
        f"filesrc location={clip} ! qtdemux ! avdec_h264 ! dgiqaquality fps=4 overload=wait "
        "stream=cam1 ! fakesink",
    )
    assert ran.code == 0, ran.said
    done = subprocess.run(
        [sys.executable, "-m", "dgiqa_stream", "score", clip, "--fps", "4", "-f", "ndjson"],
        capture_output=True, text=True, check=True,
        env={**environment, "PYTHONUTF8": "1"},
    )  # fmt: skip
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    wanted = {round(row["pts_seconds"], 3): row["score"] for row in rows if "score" in row}
    found = scores(ran.messages)
    assert len(wanted) == 12
    assert found == pytest.approx(wanted, abs=INFERENCE)
    assert max(found.values()) - min(found.values()) > 1000 * INFERENCE
    assert {fields["stream"] for _, fields in ran.messages} == {"cam1"}
    frames = [fields for kind, fields in ran.messages if kind == "dgiqa-frame"]
    assert {f["frame.width"] for f in frames} == {240 if name == "turned" else 426}
    assert {f["frame.dynamic_range"] for f in frames} == {"pq" if name == "pq" else "sdr"}


def test_messages_are_those_of_the_wire(environment):
    """A test pattern gives frames, windows and one summary, with fields named as in the JSON."""
    ran = gst_runs.launch(
        environment,
        TEST_VIDEO.format(number=60, format="I420")
        + ",framerate=30/1 ! dgiqaquality fps=5 window=1 pool=p5 overload=wait ! fakesink",
    )
    assert ran.code == 0, ran.said
    frames = [fields for name, fields in ran.messages if name == "dgiqa-frame"]
    windows = [fields for name, fields in ran.messages if name == "dgiqa-window"]
    (final,) = [fields for name, fields in ran.messages if name == "dgiqa-final"]
    assert ran.messages[-1].name == "dgiqa-final"
    assert len(frames) == final["counts.scored"] == final["n"] == 10
    assert [f["seq"] for f in frames] == list(range(10))
    assert {f["frame.pix_fmt"] for f in frames} == {"yuv420p"}
    assert {f["window.len_s"] for f in windows} == {1.0}
    pools = {key for key in final if key.startswith("pool.")}
    assert pools == {"pool.mean", "pool.low5", "pool.ewma", "pool.hysteresis", "pool.p5"}
    mean = np.mean([f["quality.score"] for f in frames])
    assert final["pool.mean"] == pytest.approx(mean, abs=1.0)  # which weights by time
    assert (final["reason"], final["counts.decoded"]) == ("end_of_stream", 60)


def test_video_passes_untouched(environment, tmp_path):
    """What leaves the element is what entered it, byte by byte, however slow the model is."""
    digests = []
    for element in ("identity", "dgiqaquality fps=0"):
        path = tmp_path / "raw"
        source = TEST_VIDEO.format(number=90, format="NV12")
        ran = gst_runs.launch(environment, f"{source} ! {element} ! filesink location={path}")
        assert ran.code == 0, ran.said
        digests.append(hashlib.sha256(path.read_bytes()).hexdigest())
    assert digests[0] == digests[1]


def test_what_is_scored_is_not_what_is_drawn_on_it_later(environment):
    """An element that blackens the video downstream, in place, changes no score."""
    found = []
    for darker in ("0", "-1"):
        ran = gst_runs.launch(
            environment,
            TEST_VIDEO.format(number=8, format="I420") + " ! dgiqaquality fps=0 overload=wait ! "
            f"videobalance brightness={darker} ! fakesink",
        )
        found.append(scores(ran.messages))
    assert len(found[0]) == 8
    assert found[0] == pytest.approx(found[1], abs=INFERENCE)


@pytest.mark.parametrize(
    ("properties", "said"),
    [
        ("model=no-such-model", "no-such-model"),
        ("pool=men", ": pool = 'men' is unknown; did you mean mean?"),
        ("window=1,x", "window '1,x' is not a list of seconds"),
        ("overload=panic", "overload 'panic' is unknown"),
        ("stream=a/b", ": stream = a/b is refused"),
    ],
)
def test_a_wrong_property_is_one_error(environment, properties, said):
    """The pipeline does not start, and says which value was wrong."""
    ran = gst_runs.launch(
        environment, TEST_VIDEO.format(number=5, format="I420") + f" ! dgiqaquality {properties} ! "
        "fakesink",
    )  # fmt: skip
    assert ran.code != 0
    assert ran.messages == []
    assert said in ran.said


def test_every_format_is_read_right(environment):
    """Our planes turned to RGB are GStreamer's own conversion, for each format and an odd size.

    5 of 255 in 19 of 20 samples: an 8-bit videoconvert rounds its matrix to 8 bits, and at the
    edges of bars two programs place chroma differently.
    """
    from plugins.gstreamer.pictures import FORMATS

    rows = gst_runs.application(environment, "pictures", *FORMATS)
    assert [row["format"] for row in rows] == list(FORMATS)
    for row in rows:
        assert row["shape"] == [241, 427, 3]
        assert row["p95"] <= 5, row
        assert not row["copied"], row


def test_stops_and_starts_again(environment):
    """Each turn from PLAYING to READY gives one summary of what it scored, and nothing piles up.

    The first turns load libraries and fill caches: memory counts from the fourth. With one arena,
    because glibc gives each new thread one of several, and each fills up once.
    """
    rows = gst_runs.application({**environment, "MALLOC_ARENA_MAX": "1"}, "states", 12)
    assert [row["finals"] for row in rows] == list(range(1, 13))
    for row in rows:
        assert row["reason"] == "interrupted"
        assert row["scored"] == row["frames"] >= 2
    # GStreamer keeps a thread of its pool for a while; one of ours for each turn would be twelve.
    assert max(row["threads"] for row in rows) <= 5
    assert rows[-1]["files"] == rows[3]["files"]
    # A model of 3.5 MB that stayed with each turn would be 28 MB.
    assert rows[-1]["rss"] - rows[3]["rss"] < 10e6, [row["rss"] // 10**6 for row in rows]


def test_seeking_goes_on_in_one_session_until_the_end(environment, clips):
    """After a seek time goes on and one frame tells of the jump; after the end a session begins."""
    rows = gst_runs.application(environment, "seek", clips["plain"])
    assert [row["end"] for row in rows if "end" in row] == ["eos", "eos"]
    frames = [row for row in rows if row.get("name") == "dgiqa-frame"]
    finals = [row for row in rows if row.get("name") == "dgiqa-final"]
    sessions = list(dict.fromkeys(row["session"] for row in frames))
    assert [row["session"] for row in finals] == sessions
    assert [row["reason"] for row in finals] == ["end_of_stream", "end_of_stream"]
    first, second = ([row for row in frames if row["session"] == session] for session in sessions)
    times = [row["frame.pts_seconds"] for row in first]
    assert all(np.diff(times) > 0)
    assert [row["frame.discontinuity"] for row in first].count(True) == 1
    assert min(np.diff([row["frame.pts"] for row in first])) < 0
    assert finals[0]["n"] == len(first) > len(second)
    assert not any(row["frame.discontinuity"] for row in second)


def test_size_and_format_may_change(environment):
    """New caps in mid-stream: each frame tells its own size, in one session."""
    rows = gst_runs.application(environment, "caps")
    assert rows[0] == {"end": "eos", "warnings": []}
    shapes = {(r["frame.width"], r["frame.height"], r["frame.pix_fmt"]) for r in rows[1:-1]}
    assert shapes == {(320, 180, "yuv420p"), (426, 242, "nv12")}
    assert len({row["session"] for row in rows[1:-1]}) == 1
    assert rows[-1] == {"finals": 1}


def test_time_goes_beyond_32_bits(environment):
    """Stamps of a day, in nanoseconds, arrive whole."""
    end, *frames = gst_runs.application(environment, "long_clock")
    assert end == {"end": "eos", "warnings": []}
    assert [row["frame.pts"] for row in frames] == [n * 10**9 for n in range(100_000, 100_003)]
    assert [row["frame.pts_seconds"] for row in frames] == [100_000.0, 100_001.0, 100_002.0]


def test_a_slow_model_stalls_nothing_and_every_frame_is_accounted_for(environment):
    """At full speed most frames are dropped and counted, all pass, and memory does not grow.

    10 MB: a single buffer that is never given back would be 0.3 MB for each of 2400 frames.
    """
    early, late, end, counts = gst_runs.application(environment, "memory", 3000)
    assert end == {"end": "eos"}
    assert counts["passed"] == counts["counts.decoded"] == 3000
    assert counts["counts.dropped_queue"] > 2000
    assert counts["counts.scored"] >= 1
    lost = counts["counts.skipped"] + counts["counts.dropped_queue"] + counts["counts.failed"]
    assert counts["counts.scored"] + lost == 3000
    assert counts["num_scored"] == counts["counts.scored"]
    assert counts["num_dropped"] == counts["counts.dropped_queue"]
    assert late["rss"] - early["rss"] < 10e6


def test_the_printed_variables_are_what_gstreamer_needs(environment):
    """``python -m plugins.gstreamer`` prints all that a shell needs to find the element."""
    printed = subprocess.run(
        [sys.executable, "-m", "plugins.gstreamer"],
        capture_output=True, text=True, check=True,
        env={k: v for k, v in environment.items() if k != "GST_PLUGIN_PATH"},
    )  # fmt: skip
    bare = {k: v for k, v in environment.items() if k not in ("PYTHONPATH", "GST_PLUGIN_PATH")}
    inspected = subprocess.run(
        ["bash", "-c", f"{printed.stdout}\ngst-inspect-1.0 dgiqaquality"],
        capture_output=True, text=True, check=False, env=bare,
    )  # fmt: skip
    assert inspected.returncode == 0, inspected.stdout + inspected.stderr
    assert "No-reference video quality" in inspected.stdout
