from __future__ import annotations

import importlib.util
import json
import os
import re
from fractions import Fraction
from pathlib import Path

import msgspec
import numpy as np
import pytest

from dgiqa_stream.comparison import compare_curves, curve_of
from dgiqa_stream.report import write_comparison

av = pytest.importorskip("av")
pytest.importorskip("onnxruntime")
needs_matplotlib = pytest.mark.skipif(
    importlib.util.find_spec("matplotlib") is None, reason="could not import 'matplotlib'"
)
ROOM = Path(os.environ.get("DGIQA_CHECKOUT", Path(__file__).parents[2])) / "demo" / "room.mp4"


def encode(out: Path, *, crf: int, num_frames: int = 75) -> Path:
    """The first seconds of the demo's clip, encoded again at 320x180."""
    with av.open(str(ROOM)) as source, av.open(str(out), "w") as sink:
        stream = sink.add_stream(
            "libx264", rate=25, options={"crf": f"{crf}", "preset": "ultrafast"}
        )
        stream.width, stream.height, stream.pix_fmt = 320, 180, "yuv420p"
        for index, frame in enumerate(source.decode(video=0)):
            if index == num_frames:
                break
            small = frame.reformat(320, 180, "yuv420p")
            small.pts, small.time_base = index, Fraction(1, 25)
            sink.mux(stream.encode(small))
        sink.mux(stream.encode(None))
    return out


@pytest.fixture(scope="module")
def encodes(tmp_path_factory) -> tuple[Path, Path]:
    """The clip encoded well, and so coarsely that everybody sees it."""
    if not ROOM.is_file():
        pytest.skip("needs the checkout's demo clip; DGIQA_CHECKOUT names the checkout")
    folder = tmp_path_factory.mktemp("encodes")
    return encode(folder / "good.mp4", crf=20), encode(folder / "coarse.mp4", crf=48)


def test_a_coarser_encode_is_worse(run_cli, encodes, tmp_path):
    """Two real encodes, scored on the fly: the coarse one is worse beyond the interval, the JSON
    holds what the table says, and --fail-under-difference ends with 1.
    """
    good, coarse = encodes
    done = run_cli("compare", good, coarse, "--fps", "12.5", "-f", "json", "--quiet")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    headline = found["differences"][found["headline"]]
    assert headline["high"] < 0
    assert headline["difference"] == pytest.approx(headline["b"] - headline["a"], abs=2e-4)
    assert headline["low"] < headline["difference"] < headline["high"]
    assert found["overlap"]["scored_seconds"] == pytest.approx(3.0, abs=0.1)
    assert found["alignment"]["offset_seconds"] == pytest.approx(0.0, abs=0.1)
    assert found["model"]["id"]
    assert found["schema"] == "dgiqa.comparison/1"
    told = run_cli(
        "compare", good, coarse, "--fps", "12.5", "--offset", "0", "--fail-under-difference", "-1"
    )
    assert told.code == 1
    assert f"B is worse by {-headline['difference']:.1f} points (95 % interval" in told.out
    assert "is below --fail-under-difference -1" in told.err
    allowed = run_cli(
        "compare", good, coarse, "--fps", "12.5", "-q", "--fail-under-difference", "-100"
    )
    assert allowed.code == 0


def test_an_encode_does_not_differ_from_itself(run_cli, encodes):
    """The same file twice: no difference can be told, at any offset of its own."""
    good, _ = encodes
    done = run_cli("compare", good, good, "--fps", "12.5", "-f", "json", "-q")
    found = json.loads(done.out)
    assert found["differences"]["mean"]["difference"] == 0.0
    assert found["verdict"].startswith("no difference can be told")
    assert found["worse"] == []


def test_videos_are_scored_where_they_are_to_be(run_cli, encodes):
    """``--device``, ``--hardware`` and ``--strict`` are those of ``score``: a device that is not
    there is 5, a video that it cannot decode is 3, and without ``--strict`` software decodes it.
    """
    absent = run_cli("compare", *encodes, "--device", "cuda:77")
    assert (absent.code, absent.out) == (5, "")
    assert "cuda:77" in absent.err
    there = ("compare", *encodes, "--device", "cpu", "--fps", "12.5", "--hardware", "qsv")
    refused = run_cli(*there, "--strict")
    if refused.code == 0:
        pytest.skip("this machine decodes by Quick Sync")
    assert (refused.code, refused.out) == (3, "")
    assert "is not decoded on qsv" in refused.err
    fallen = run_cli(*there)
    assert fallen.code == 0
    assert "software decodes it" in fallen.err


@needs_matplotlib
def test_recordings_compare_as_their_files_do(run_cli, encodes, tmp_path):
    """NDJSON of ``watch`` gives what scoring the files gives, and the page loads nothing."""
    recordings = []
    for path in encodes:
        recordings.append(tmp_path / f"{path.stem}.ndjson")
        watched = run_cli(
            *("watch", path, "--fps", "12.5", "--ndjson", recordings[-1], "--publish", "", "-q")
        )
        assert watched.code == 0, watched.err
    page = tmp_path / "page.html"
    done = run_cli("compare", *recordings, "-f", "json", "--offset", "0", "--report", page)
    assert done.code == 0, done.err
    files = run_cli("compare", *encodes, "-f", "json", "--offset", "0", "--fps", "12.5", "-q")
    of_recordings, of_files = (json.loads(d.out)["differences"] for d in (done, files))
    assert of_recordings["mean"]["a"] == pytest.approx(of_files["mean"]["a"], abs=1.0)
    assert of_recordings["mean"]["b"] == pytest.approx(of_files["mean"]["b"], abs=1.0)
    text = page.read_text()
    assert "B is worse by" in text
    assert not re.findall(r'(?:src|href)="(?!#|data:)[^"]*"', text)
    assert text.count("<svg") == 2
    assert not list(tmp_path.glob("*.part"))


def test_recordings_of_other_models_are_refused(run_cli, encodes, tmp_path):
    """Scores of two model versions are never subtracted: exit code 2, and both are named."""
    path = encodes[0]
    first, second = tmp_path / "one.ndjson", tmp_path / "two.ndjson"
    watched = run_cli("watch", path, "--fps", "12.5", "--ndjson", first, "--publish", "", "-q")
    assert watched.code == 0, watched.err
    lines = []
    for line in first.read_text().splitlines():
        message = json.loads(line)
        if "model" in message:
            message["model"]["version"] = "9.9.9"
        lines.append(json.dumps(message))
    second.write_text("\n".join(lines) + "\n")
    done = run_cli("compare", first, second)
    assert done.code == 2
    assert "come of different models (version" in done.err
    assert "9.9.9" in done.err
    assert done.out == ""


def rows(path: Path, scores: np.ndarray, *, name: str = "clip.mp4", begin: float = 0.0) -> str:
    """NDJSON as ``score`` writes it."""
    made = [
        {"path": name, "index": n, "pts_seconds": begin + n / 10, "score": float(score)}
        for n, score in enumerate(scores)
    ]
    text = b"".join(msgspec.json.encode(row) + b"\n" for row in made)
    with path.open("ab") as file:
        file.write(text)
    return str(path)


def test_rows_of_score_are_recordings(run_cli, tmp_path):
    """They do not tell a model: they are compared, and a note says so."""
    scores = np.clip(60 + np.cumsum(np.random.default_rng(1).normal(size=300)), 0, 90)
    a = rows(tmp_path / "a.ndjson", scores)
    b = rows(tmp_path / "b.ndjson", scores[40:] + 4, begin=7.0)
    done = run_cli("compare", a, b)
    assert done.code == 0, done.err
    assert "B is better by 4.0 points (95 % interval 4.0 to 4.0)." in done.out
    assert "B's clock is +3.00 s from A's (found from the curves" in done.out
    assert "does not tell its model" in done.out


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (["--offset", "500"], 3, "do not overlap at offset 500 s"),
        (["--hardware", "gpu"], 2, "--hardware gpu is refused"),
        (["--fail-under-difference", "nan"], 2, "--fail-under-difference nan is not within"),
        (["--stream", "other"], 2, "--stream 'other' is not in"),
        ([], 2, "choose one with --stream"),
        (["--stream", "x", "--report", "a.ndjson"], 2, "a.ndjson"),
    ],
)
def test_what_cannot_be_meant_is_one_line(run_cli, tmp_path, options, code, said):
    """Each error is one line with its exit code, no output, and nothing overwritten."""
    rng = np.random.default_rng(1)
    a, b = tmp_path / "a.ndjson", tmp_path / "b.ndjson"
    for path in (a, b):
        rows(path, 60 + rng.normal(size=100), name="x")
        if "500" not in options:
            rows(path, 60 + rng.normal(size=100), name="y")
    before = a.read_bytes()
    options = [str(a) if option == "a.ndjson" else option for option in options]
    done = run_cli("compare", a, b, *options)
    assert (done.code, done.out) == (code, "")
    assert said in done.err
    assert len(done.err.splitlines()) == 1
    assert a.read_bytes() == before


@needs_matplotlib
def test_the_page_shows_no_markup_of_names(tmp_path):
    """Names of files are escaped, gaps are drawn as gaps, and a long recording stays small."""
    rng = np.random.default_rng(1)
    times = np.arange(40_000) / 5
    kept = (times < 1000) | (times > 1500)
    a, b = (
        curve_of(
            f"<b>{name}</b>",
            times[kept].tolist(),
            np.clip(60 + 5 * np.sin(times / 60) + rng.normal(size=len(times)), 0, 100)[
                kept
            ].tolist(),
            max_hold_seconds=2.0,
        )
        for name in "ab"
    )
    page = tmp_path / "page.html"
    found = compare_curves(a, b, offset_seconds=0.0, num_resamples=200)
    write_comparison(found, page, notes=["<i>note</i>"], details={"Model": {"id": "<x>"}})
    text = page.read_text()
    assert "<b>a" not in text
    assert "<i>note" not in text
    assert "<x>" not in text
    assert np.isnan(found.second_difference).sum() >= 490
    assert len(text) < 2_000_000
