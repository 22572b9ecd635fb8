"""The command line, score: settings from the file that ``watch`` has."""

from __future__ import annotations

import json

import pytest

FILE = """
[source]
realtime = true
start_seconds = 0.4
[sampler]
mode = "time"
frames_per_second = 1.0
[picture]
crop = [16, 16, 160, 96]
letterbox = false
[model]
name = "student-xs"
[pooling]
poolers = ["p5", "hysteresis"]
hysteresis_seconds = 4.0
[publish]
endpoint = "tcp://127.0.0.1:1"
[output]
ndjson = "never.ndjson"
[[stream]]
url = "rtsp://camera.example/live"
"""


@pytest.fixture
def config(tmp_path):
    """A file with something in every table that matters here."""
    path = tmp_path / "stream.toml"
    path.write_text(FILE)
    return path


def document_of(done):
    """What ``--format json`` wrote."""
    assert done.code == 0, done.err
    return json.loads(done.out)


def test_scores_are_those_that_watch_would_give(run_cli, media, config, tmp_path):
    """Opening, picture, model and pooling are the file's; frames are all, at once, and nothing is
    published or recorded.
    """
    found = document_of(run_cli("score", media["plain"], "-c", config, "-f", "json"))
    options = ["--start", "0.4", "--crop", "16", "16", "160", "96", "--no-letterbox"]
    options += ["--model", "student-xs"]
    same = document_of(run_cli("score", media["plain"], *options, "-f", "json"))
    assert found["model"]["id"] == "student-xs"
    assert found["settings"]["pooling"]["hysteresis_seconds"] == 4.0
    assert found["settings"]["source"]["realtime"] is False
    assert found["settings"]["sampler"] == same["settings"]["sampler"]
    [one], [other] = found["inputs"], same["inputs"]
    assert found["frames"] == same["frames"]
    assert set(one["pooled"]) == {"mean", "low5", "ewma", "hysteresis", "p5"}
    assert one["pooled"]["p5"] == other["pooled"]["p5"]
    assert not (tmp_path / "never.ndjson").exists()


def test_options_go_over_the_file(run_cli, media, config):
    """An option wins; a threshold's pooler is added to those of the file."""
    options = ["--model", "student", "--start", "0", "--every", "8", "--fail-under", "p10=0"]
    done = run_cli("score", media["plain"], "--config", config, *options, "-f", "json")
    found = document_of(done)
    assert found["model"]["id"] == "student"
    assert [frame["frameNum"] for frame in found["frames"]] == [0, 8, 16]
    assert found["settings"]["pooling"]["poolers"] == ["p5", "hysteresis", "p10"]


@pytest.mark.parametrize(
    ("text", "code", "words"),
    [
        ("[picture]\ncrop = [0, 0, 9]\n", 2, "stream.toml: picture.crop"),
        ("[smapler]\n", 2, "stream.toml: unknown setting smapler; did you mean sampler?"),
        ('[model]\nname = "studnet"\n', 5, "studnet"),
        (b"\xff", 2, "stream.toml: it is no UTF-8; give a TOML file as `dgiqa-stream config`"),
        (None, 2, "stream.toml: No such file or directory; give a TOML file"),
    ],
)
def test_a_file_that_cannot_be_meant(run_cli, media, tmp_path, text, code, words):
    """One line names the file or key, before anything is scored."""
    path = tmp_path / "stream.toml"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    done = run_cli("score", media["plain"], "-c", path)
    assert done.code == code
    assert words in done.err
    assert len(done.err.splitlines()) == 1
    assert done.out == ""


@pytest.mark.parametrize("command", ["score", "watch"])
def test_a_file_without_a_name_is_no_folder(run_cli, media, command):
    """An empty name, as of a variable that is not set, is told as that and not as ``.``."""
    done = run_cli(command, media["plain"], "-c", "")
    assert (done.code, done.out) == (2, "")
    assert "names nothing" in done.err
