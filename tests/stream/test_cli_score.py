"""The command line, score: what is scored, how it is written, and the exit code."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import av
import pytest

VIDEO_HEADER = [
    *("path", "index", "pts_seconds", "score", "in_domain"),
    *("dynamic_range", "key", "corrupt", "width", "height"),
    *("interval_low", "interval_high", "out_of_domain"),
]


def rows_of(out):
    """The rows of a CSV, as dicts."""
    return list(csv.DictReader(io.StringIO(out)))


def num_frames(path):
    """How many frames a plain decoding loop finds."""
    with av.open(str(path)) as container:
        return sum(1 for _ in container.decode(video=0))


@pytest.fixture(scope="module")
def folder(media, tmp_path_factory):
    """Two pictures and two clips, one of each below another folder, and a text."""
    root = tmp_path_factory.mktemp("inputs")
    (root / "sub").mkdir()
    for name, target in (
        ("picture_png", "b.png"),
        ("grey", "sub/A.PNG"),
        ("plain", "c.mp4"),
        ("vfr", "sub/d.mkv"),
        ("words", "notes.txt"),
    ):
        shutil.copy(media[name], root / target)
    return root


def test_every_frame_is_scored_in_order(run_cli, media):
    """The rows of each video are as many as a decoding loop finds frames, numbered from 0, with
    rising times and scores from 0 to 100; standard error has a line for each video.
    """
    videos = [
        media[name] for name in ("plain", "vfr", "late_start", "b_frames", "odd427", "rotated")
    ]
    done = run_cli("score", *videos)
    assert done.code == 0
    rows = rows_of(done.out)
    assert list(rows[0]) == VIDEO_HEADER
    assert [r["path"] for r in rows] == [str(v) for v in videos for _ in range(num_frames(v))]
    for video in videos:
        mine = [r for r in rows if r["path"] == str(video)]
        assert [int(r["index"]) for r in mine] == list(range(len(mine)))
        times = [float(r["pts_seconds"]) for r in mine]
        assert times == sorted(set(times))
        assert all(0 <= float(r["score"]) <= 100 for r in mine)
        assert f"{video}: " in done.err
        assert f"({len(mine)} frames, " in done.err
    assert len(done.err.splitlines()) == len(videos)
    assert {(r["width"], r["height"]) for r in rows if "rotated" in r["path"]} == {("180", "320")}


def test_pictures_alone_have_a_row_each(run_cli, media):
    """Stills of every kind give path, score and how sure it is, in the order given, one row each;
    the score lies in its interval, and drawn patterns are nothing that the model knows.
    """
    kinds = ("webp", "png", "jpg", "bmp", "tiff", "png")
    pictures = [str(media[f"picture_{kind}"]) for kind in kinds]
    done = run_cli("score", *pictures)
    rows = list(csv.reader(io.StringIO(done.out)))
    assert done.code == 0
    assert rows[0] == ["path", "score", "interval_low", "interval_high", "out_of_domain"]
    assert all(float(low) <= float(score) <= float(high) for _, score, low, high, _ in rows[1:])
    assert {r[4] for r in rows[1:]} == {"unfamiliar"}
    assert [r[0] for r in rows[1:]] == pictures
    assert rows[2] == rows[6]
    assert done.err.count("(1 frame, out of domain: unfamiliar)\n") == len(pictures)


def test_a_folder_is_walked_and_a_video_brings_its_header(run_cli, folder):
    """Media below the folder come sorted by path, the text is left out, and with a video among
    them all rows have the video header.
    """
    done = run_cli("score", folder, "--every", "24")
    rows = rows_of(done.out)
    assert done.code == 0
    assert list(rows[0]) == VIDEO_HEADER
    assert [r["path"] for r in rows] == [
        str(folder / name) for name in ("b.png", "c.mp4", "sub/A.PNG", "sub/d.mkv")
    ]


def test_standard_input_is_scored(run_cli, media):
    """``-`` reads a video from a pipe: the same scores as from the file, under the name ``-``."""
    piped = run_cli("score", "-", stdin=media["late_start"].read_bytes())
    read = run_cli("score", media["late_start"])
    assert piped.code == read.code == 0
    assert {r["path"] for r in rows_of(piped.out)} == {"-"}
    assert [r["score"] for r in rows_of(piped.out)] == [r["score"] for r in rows_of(read.out)]


def test_ndjson_is_csv_line_by_line(run_cli, media):
    """Each NDJSON line holds what the CSV row does, and -o holds what standard output would."""
    video = media["vfr"]
    as_csv, as_ndjson = run_cli("score", video), run_cli("score", video, "-f", "ndjson")
    lines = [json.loads(line) for line in as_ndjson.out.splitlines()]
    for line, row in zip(lines, rows_of(as_csv.out), strict=True):
        assert list(line) == VIDEO_HEADER
        assert line["path"] == row["path"]
        assert line["score"] == float(row["score"])
        assert line["pts_seconds"] == float(row["pts_seconds"])
        assert line["key"] is bool(int(row["key"]))


def test_json_is_shaped_like_vmafs(run_cli, media, tmp_path):
    """``frames[].metrics``, ``pooled_metrics`` and ``version`` are where VMAF has them; the pools
    are those of the frames, and the model and the settings say how it was made.
    """
    target = tmp_path / "out.json"
    done = run_cli(
        "score", media["vfr"], media["picture_png"], "--format", "json", "-o", target, "-q"
    )
    assert (done.code, done.out, done.err) == (0, "", "")
    found = json.loads(target.read_text())
    assert {"version", "frames", "pooled_metrics", "aggregate_metrics"} <= set(found)
    assert [f["frameNum"] for f in found["frames"]] == [*range(12), 0]
    scores = [f["metrics"]["dgiqa"] for f in found["frames"]]
    pooled = found["pooled_metrics"]["dgiqa"]
    assert pooled["min"] == pytest.approx(min(scores), abs=1e-4)
    assert pooled["max"] == pytest.approx(max(scores), abs=1e-4)
    assert pooled["mean"] == pytest.approx(sum(scores) / len(scores), abs=1e-3)
    harmonic = len(scores) / sum(1 / (s + 1) for s in scores) - 1
    assert pooled["harmonic_mean"] == pytest.approx(harmonic, abs=1e-3)
    assert [(i["path"], i["num_frames"], i["error"]) for i in found["inputs"]] == [
        (str(media["vfr"]), 12, None),
        (str(media["picture_png"]), 1, None),
    ]
    assert len(found["model"]["sha256"]) == 64
    assert found["settings"]["sampler"]["every"] == 1
    assert (found["complete"], found["stopped_by"]) == (True, None)


def test_frames_are_chosen_as_asked(run_cli, media):
    """--every, --fps, --start and --duration choose by number, rate and time; a clip that starts
    late counts from its first frame, and ``index`` from the first one that --start lets through.
    """
    whole, late = media["whole"], media["late_start"]  # 60 frames at 25/s; 24 from 7.2 s on

    def chosen(*arguments):
        done = run_cli("score", *arguments, "-q")
        assert done.code == 0, done.err
        return rows_of(done.out)

    assert [int(r["index"]) for r in chosen(whole, "--every", "7")] == list(range(0, 60, 7))
    assert len(chosen(whole, "--fps", "5")) == 12
    part = [float(r["pts_seconds"]) for r in chosen(whole, "--start", "1", "--duration", "0.4")]
    assert part == pytest.approx([1 + n / 25 for n in range(10)], abs=0.002)
    (first, *_) = chosen(late, "--start", "0.4")
    assert float(first["pts_seconds"]) == pytest.approx(7.6, abs=0.002)
    assert first["index"] == "0"


def test_fail_under_looks_at_each_mean(run_cli, media):
    """The exit code is 1 where any mean is below the limit, and the input is named; 0 where none
    is.
    """
    pictures = media["picture_png"], media["grey"]
    scores = [float(r["score"]) for r in rows_of(run_cli("score", *pictures).out)]
    low, high = sorted(scores)
    assert high - low > 1
    between = run_cli("score", *pictures, "--fail-under", str((low + high) / 2), "-q")
    assert between.code == 1
    worse = pictures[scores.index(low)]
    assert between.err.startswith(f"{worse}: mean {low:.2f} is below --fail-under")
    assert len(between.err.splitlines()) == 1
    assert run_cli("score", *pictures, "--fail-under", str(low - 0.5)).code == 0


def test_a_failed_input_keeps_its_row(run_cli, media):
    """Among good inputs, each bad one has a row with an empty score in its place and one line on
    standard error; the exit code is 4, before that of --fail-under.
    """
    inputs = [media["grey"], media["text"], "missing.png", media["picture_png"]]
    done = run_cli("score", *inputs, "--fail-under", "100", "-q")
    assert done.code == 4
    rows = rows_of(done.out)
    assert [(r["path"], bool(r["score"])) for r in rows] == [
        (str(path), good) for path, good in zip(inputs, (True, False, False, True), strict=True)
    ]
    errors = [line for line in done.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 2
    assert str(media["text"]) in errors[0]
    assert "missing.png" in errors[1]
    as_ndjson = run_cli("score", *inputs, "-f", "ndjson", "-q")
    lines = [json.loads(line) for line in as_ndjson.out.splitlines()]
    assert [bool(line.get("error")) for line in lines] == [False, True, True, False]
    assert [line["score"] is None for line in lines] == [False, True, True, False]


def test_nothing_scored_is_3_and_still_a_document(run_cli, media):
    """With no good input the exit code is 3, and the JSON document is complete, without numbers."""
    done = run_cli("score", media["text"], media["audio_only"], "-f", "json")
    found = json.loads(done.out)
    assert done.code == 3
    assert found["frames"] == []
    assert found["pooled_metrics"]["dgiqa"]["mean"] is None
    assert all(i["error"] for i in found["inputs"])


def test_a_truncated_video_keeps_what_was_scored(run_cli, media):
    """A file that was cut off gives as many rows as frames can be decoded of it."""
    done = run_cli("score", media["truncated"], "-q")
    assert len(rows_of(done.out)) == num_frames(media["truncated"])
    assert done.code in (0, 4)
    assert (done.code == 4) == ("error: " in done.err)


def test_settings_come_from_the_environment(run_cli, media):
    """DGIQA_* variables set options, and the command line wins over them."""
    environment = {"DGIQA_QUIET": "1", "DGIQA_MODEL": "absent", "DGIQA_SCORE_FORMAT": "ndjson"}
    refused = run_cli("score", media["grey"], environment=environment)
    assert refused.code == 5
    assert "'absent'" in refused.err
    done = run_cli("score", media["grey"], "-m", "student", environment=environment)
    assert (done.code, done.err) == (0, "")
    assert json.loads(done.out)["path"] == str(media["grey"])
    version = {"DGIQA_VERSION": "0.1.0"}  # as images have; no option of ours
    assert run_cli("score", media["grey"], environment=version).code == 0


def test_the_crop_is_in_upright_pixels(run_cli, media):
    """Of a picture that is turned by its EXIF tag, a crop of its upright size is the whole."""
    turned = media["exif_turned"]  # 48 wide and 64 high, upright
    whole = run_cli("score", turned, "--no-letterbox").out
    assert run_cli("score", turned, "--crop", "0", "0", "48", "64").out == whole
    assert run_cli("score", turned, "--crop", "0", "0", "24", "64").out != whole


def test_names_of_files_survive(run_cli, media, tmp_path):
    """A name with comma, quote, line break or bytes that are no UTF-8 is one row, and in JSON the
    very name.
    """
    names = ['a,"b".png', "line\nbreak.png", os.fsdecode(b"bad\xff.png"), "%03d.png", "a:b.png"]
    for name in names:
        shutil.copy(media["grey"], tmp_path / name)
    done = run_cli("score", tmp_path, "-f", "ndjson", "-q")
    assert done.code == 0, done.err
    found = [json.loads(line)["path"] for line in done.out.splitlines()]
    assert found == sorted(str(tmp_path / name) for name in names)
    assert len(rows_of(run_cli("score", tmp_path, "-q").out)) == len(names)


def test_a_reader_that_goes_away_is_no_error(media, plain_environment):
    """With standard output closed early, as by ``head``, it ends quietly with 0."""
    process = subprocess.Popen(
        [sys.executable, "-m", "dgiqa_stream", "score", str(media["whole"]), "-q"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=plain_environment,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(60) == 0
    process.stderr.close()


@pytest.mark.parametrize(
    ("format", "number"),
    [
        ("csv", signal.SIGINT),
        ("ndjson", signal.SIGTERM),
        ("json", signal.SIGINT),
        ("json", signal.SIGTERM),
    ],
)
def test_an_interrupt_is_130_and_keeps_what_was_scored(
    plain_environment, tmp_path, media, format, number
):
    """Ctrl-C or SIGTERM in a read that blocks for a minute ends it at once with 130; what was
    scored so far is on disk. A JSON document, and only that, has room to say that it is not
    complete. A signal that comes twice, as from ``timeout``, is one.
    """
    target, score = tmp_path / "out", [sys.executable, "-m", "dgiqa_stream", "score"]
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(60)
        silent = f"tcp://127.0.0.1:{server.getsockname()[1]}"
        options = ["-f", format, "-o", str(target), "--open-timeout", "60"]
        process = subprocess.Popen(
            [*score, str(media["grey"]), silent, "missing.mp4", *options],
            stderr=subprocess.PIPE,
            env=plain_environment,
        )
        connection, _ = server.accept()  # it is in the second input
        process.send_signal(number)
        process.send_signal(number)
        begin = time.monotonic()
        _, err = process.communicate(timeout=50)
        took = time.monotonic() - begin
        connection.close()
    assert process.returncode == 130
    assert took < 8.0  # a second, on an idle machine
    assert b"interrupted: what was scored so far is written" in err
    assert b"Traceback" not in err
    text = target.read_text()
    if format == "json":
        found = json.loads(text)
        assert (found["complete"], found["stopped_by"]) == (False, "interrupt")
        assert [(i["num_frames"], i["error"]) for i in found["inputs"]] == [
            (1, None),
            (0, "interrupted"),
        ]
    else:
        rows = rows_of(text) if format == "csv" else list(map(json.loads, text.splitlines()))
        assert [bool(r["score"]) for r in rows] == [True]


SIGNALLED_AT_AN_IMPORT = """
import os, signal, sys
number, module, *sys.argv[1:] = sys.argv[1:]
def hook(event, arguments):
    if event == "import" and arguments[0].partition(".")[0] == module:
        os.kill(os.getpid(), int(number))
sys.addaudithook(hook)
from dgiqa_stream.cli import main
main()
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("command", ["score", "watch"])
@pytest.mark.parametrize("module", ["typer", "numpy", "onnxruntime"])
def test_an_interrupt_while_it_starts_is_one_line(
    run_cli, media, tmp_path, module, command, number
):
    """A signal during an import, of the command line as of the model's engine, ends either command
    with 130 and one line, and an output that was there is as it was.
    """
    target = tmp_path / "out.csv"
    target.write_text("kept")
    option = ["-o", target] if command == "score" else ["--publish="]
    words = [str(int(number)), module, command, media["plain"], *option]
    done = run_cli(*words, command=(sys.executable, "-c", SIGNALLED_AT_AN_IMPORT))
    assert (done.code, done.err) == (130, "error: interrupted\n")
    assert target.read_text() == "kept"


def test_a_terminal_sees_progress_and_the_data_stay_clean(media, run_on_terminal):
    """With standard error on a terminal a bar is drawn there; standard output is the same rows."""
    done = run_on_terminal("score", media["plain"])
    assert done.code == 0
    assert len(rows_of(done.out)) == 24
    assert "\x1b[" in done.err
    assert "(24 frames, " in done.err


def test_help_names_every_option(run_cli):
    """--help of the program lists the commands, that of ``score`` its options; both exit with 0."""
    root, score = run_cli("--help"), run_cli("score", "--help")
    assert root.code == score.code == 0
    for command in ("score", "watch", "sub", "report", "models", "config", "doctor", "keys"):
        assert f"\n  {command} " in root.out
    for option in ("--format", "--output", "--fps", "--every", "--fail-under", "--crop", "--quiet"):
        assert option in score.out
