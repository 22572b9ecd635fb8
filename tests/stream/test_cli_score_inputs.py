"""The command line, score: patterns, lists, and several inputs at once."""

from __future__ import annotations

import csv
import io
import json
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest

from dgiqa_stream.cli import _jobs
from dgiqa_stream.config import SourceSettings, StreamConfig


def paths_of(out):
    """The paths of CSV rows, each once, in order."""
    return list(dict.fromkeys(row["path"] for row in csv.DictReader(io.StringIO(out))))


@pytest.fixture(scope="module")
def tree(media, tmp_path_factory):
    """Pictures at three depths, one in a name with brackets, among other files."""
    root = tmp_path_factory.mktemp("tree")
    for name in ("a.png", "b[1].png", "b1.png", "one/c.png", "one/two/d.png", "one/e.dat"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(media["grey"], root / name)
    (root / "notes.txt").write_text("words")
    return root


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("*.png", ["a.png", "b1.png", "b[1].png"]),
        ("**/*.png", ["a.png", "b1.png", "b[1].png", "one/c.png", "one/two/d.png"]),
        ("one/**", ["one/c.png", "one/two/d.png"]),  # no text, no .dat, no folder
        ("*", ["a.png", "b1.png", "b[1].png"]),
        ("b[1].png", ["b[1].png"]),  # a file of that very name
        ("b[0-9].png", ["b1.png"]),
        ("one/*.dat", ["one/e.dat"]),  # a suffix that is asked for
    ],
)
def test_a_quoted_pattern_is_its_files(run_cli, tree, pattern, names):
    """A pattern gives the media it matches, sorted; ** any folders; a file of that name wins."""
    done = run_cli("score", tree / pattern, "-q")
    assert done.code == 0, done.err
    assert paths_of(done.out) == [str(tree / name) for name in names]


def test_a_pattern_without_a_file_fails_in_its_turn(run_cli, tree):
    """A pattern that matches nothing is one line and a row of its own, and the others go on."""
    done = run_cli("score", tree / "x*.png", tree / "a.png", "-q")
    assert done.code == 4
    assert paths_of(done.out) == [str(tree / "x*.png"), str(tree / "a.png")]
    assert "as a pattern it matches no picture or video" in done.err


@pytest.mark.parametrize("piped", [False, True])
def test_a_list_is_a_path_per_line(run_cli, tree, tmp_path, piped):
    """Files, folders and patterns of a list come in its order; comments and empty lines are left
    out, as are a byte order mark and Windows' line ends; ``@-`` reads it from standard input.
    """
    lines = ["# a comment", str(tree / "b1.png"), "", str(tree / "one"), str(tree / "a*.png")]
    content = b"\xef\xbb\xbf" + "\r\n".join(lines).encode()
    target = tmp_path / "list.txt"
    target.write_bytes(content)
    done = run_cli("score", "@-" if piped else f"@{target}", "-q", stdin=content if piped else b"")
    assert done.code == 0, done.err
    names = ("b1.png", "one/c.png", "one/two/d.png", "a.png")
    assert paths_of(done.out) == [str(tree / name) for name in names]


def test_a_list_that_is_none_is_refused(run_cli, tmp_path):
    """A missing or empty list, a folder, and an output that would write over the list are one line
    and exit code 2, and the list stays.
    """
    empty, full = tmp_path / "empty.txt", tmp_path / "full.txt"
    empty.write_text("# nothing\n\n")
    full.write_text("a.png\n")
    for words, said in (
        ([f"@{tmp_path}/absent"], "cannot read the list"),
        ([f"@{tmp_path}"], "cannot read the list"),
        ([f"@{empty}"], "lists no inputs"),
        ([f"@{full}", "-o", full], "is the input"),
    ):
        done = run_cli("score", *words)
        assert (done.code, done.out) == (2, "")
        assert said in done.err
        assert len(done.err.splitlines()) == 1
    assert full.read_text() == "a.png\n"


@pytest.mark.parametrize("format", ["csv", "ndjson", "json", "pooled"])
def test_jobs_change_nothing_but_the_time(run_cli, media, format):
    """With several at once every byte of the output is as with one, and so are errors and exit
    code: rows in the order of the inputs, a failed one in its place, long ones before short ones.
    """
    names = ("whole", "grey", "text", "vfr", "picture_png", "plain", "audio_only", "grey")
    words = ["score", *(media[name] for name in names), "-f", format, "--fail-under", "50"]
    one, many = run_cli(*words), run_cli(*words, "--jobs", "3")
    assert one.code == many.code == 4
    assert many.out == one.out
    assert many.err == one.err


def test_jobs_zero_is_all_cores_and_negative_is_refused(run_cli, media):
    """``--jobs 0`` scores, and ``-1`` is one line and exit code 2."""
    assert run_cli("score", media["grey"], media["vfr"], "--jobs", "0", "-q").code == 0
    refused = run_cli("score", media["grey"], "--jobs", "-1")
    assert refused.code == 2
    assert len(refused.err.splitlines()) == 1


@pytest.mark.parametrize(
    ("num_at_once", "given", "expected"), [(1, 0, 0), (2, 0, 1), (8, 0, 1), (8, 4, 4), (1, 1, 1)]
)
def test_as_many_as_the_cores_are_decoded_by_one_thread_each(
    monkeypatch, num_at_once, given, expected
):
    """On two cores, two inputs or more leave no core to a second thread; a number given counts."""
    monkeypatch.setattr(_jobs, "num_jobs_of", lambda asked: asked or 2)
    settings = StreamConfig(source=SourceSettings(decoder_threads=given))
    assert _jobs.for_several(settings, num_at_once).source.decoder_threads == expected


def test_jobs_really_are_at_once(plain_environment, media, tmp_path):
    """With two jobs, a second connection is made while the first is silent; Ctrl-C then ends both
    at once, what was scored is in a document that says so, and what never began is not in it.
    """
    target = tmp_path / "out.json"
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(60)
        silent = f"tcp://127.0.0.1:{server.getsockname()[1]}"
        words = ["score", media["grey"], silent, silent, *[media["grey"]] * 8]
        words += ["--jobs", "2", "-f", "json", "-o", target, "--open-timeout", "60"]
        process = subprocess.Popen(
            [sys.executable, "-m", "dgiqa_stream", *map(str, words)],
            stderr=subprocess.PIPE,
            env=plain_environment,
        )
        connections = [server.accept()[0] for _ in range(2)]
        process.send_signal(signal.SIGINT)
        begin = time.monotonic()
        _, err = process.communicate(timeout=50)
        took = time.monotonic() - begin
        for connection in connections:
            connection.close()
    assert process.returncode == 130
    assert took < 8.0  # a second, on an idle machine
    assert b"interrupted: what was scored so far is written" in err
    assert b"Traceback" not in err
    found = json.loads(target.read_text())
    assert found["complete"] is False
    assert [(i["num_frames"], i["error"]) for i in found["inputs"]] == [
        (1, None),
        (0, "interrupted"),
        (0, "interrupted"),
    ]
