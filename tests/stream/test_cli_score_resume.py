"""The command line, score: --resume goes on where an earlier run ended."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time

import pytest


@pytest.fixture
def folder(media, tmp_path):
    """A folder of two pictures and a clip."""
    root = tmp_path / "in"
    root.mkdir()
    for name, target in (("grey", "a.png"), ("vfr", "b.mkv"), ("picture_png", "d.png")):
        shutil.copy(media[name], root / target)
    return root


@pytest.mark.parametrize(
    ("format", "jobs"), [("csv", "1"), ("ndjson", "2"), ("pooled", "1"), ("csv", "2")]
)
def test_a_killed_run_resumes_to_the_same_result(
    run_cli, plain_environment, media, folder, tmp_path, format, jobs
):
    """A run that is killed in its third input, with half a line in its journal, comes to the very
    bytes and exit code of one that was never stopped, and does not score the first two again.
    """
    blocking = folder / "c.mkv"  # the third by name
    os.mkfifo(blocking)
    target, journal = tmp_path / "out", tmp_path / "out.resume"
    inputs = [folder / name for name in ("a.png", "b.mkv", "c.mkv", "d.png")]
    words = [*map(str, inputs), "-f", format, "-o", str(target), "--resume", "-j", jobs]
    process = subprocess.Popen(
        [sys.executable, "-m", "dgiqa_stream", "score", *words],
        stderr=subprocess.DEVNULL,
        env=plain_environment,
    )
    end = time.monotonic() + 60
    while not (journal.exists() and journal.read_bytes().count(b"\n") == 3):
        assert time.monotonic() < end
        time.sleep(0.05)
    process.kill()
    process.wait(60)
    with journal.open("ab") as file:
        file.write(b'{"path": "half a li')
    blocking.unlink()
    shutil.copy(media["plain"], blocking)

    done = run_cli("score", *words, "--fail-under", "p5=100")
    fresh = run_cli("score", *inputs, "-f", format, "-o", tmp_path / "fresh", "--fail-under=p5=100")
    assert done.code == fresh.code == 1
    assert "resumed: of 4 inputs, 2 had been scored before\n" in done.err
    assert target.read_bytes() == (tmp_path / "fresh").read_bytes()
    again = run_cli("score", *words)
    assert "of 4 inputs, 4 had been scored before" in again.err
    assert target.read_bytes() == (tmp_path / "fresh").read_bytes()


def test_what_is_complete_is_not_scored_again(run_cli, folder, tmp_path):
    """Rows of a complete input come from the journal, as a changed one there shows; a file that
    changed or is new is scored, one that is gone has no rows any more.
    """
    target, journal = tmp_path / "out.ndjson", tmp_path / "out.ndjson.resume"
    shutil.copy(folder / "a.png", folder / "z.png")
    words = ["score", folder, "-f", "ndjson", "-o", target, "--resume", "-q"]
    assert run_cli(*words).code == 0
    before = [json.loads(line) for line in target.read_text().splitlines()]
    lines = [json.loads(line) for line in journal.read_text().splitlines()]
    for line in lines[1:]:
        line["rows"] = line["rows"].replace('"score": ', '"score": 1')
    journal.write_text("".join(json.dumps(line) + "\n" for line in lines))
    shutil.copy(folder / "a.png", folder / "aa.png")
    os.utime(folder / "d.png", (1, 1))
    (folder / "z.png").unlink()
    assert run_cli(*words).code == 0
    after = [json.loads(line) for line in target.read_text().splitlines()]
    (a,) = (row["score"] for row in before if row["path"].endswith("/a.png"))
    (d,) = (row["score"] for row in before if row["path"].endswith("/d.png"))
    scores = {row["path"]: row["score"] for row in after if row["path"].endswith("png")}
    assert list(scores) == [str(folder / name) for name in ("a.png", "aa.png", "d.png")]
    assert list(scores.values()) == [float(f"1{a}"), a, d]


def test_a_failed_input_is_tried_again(run_cli, media, folder, tmp_path):
    """An input that could not be scored is not taken for complete."""
    bad, target = folder / "c.mp4", tmp_path / "out.csv"
    shutil.copy(media["text"], bad)
    words = ["score", folder, "-o", target, "--resume", "-q"]
    assert run_cli(*words).code == 4
    shutil.copy(media["plain"], bad)
    assert run_cli(*words).code == 0
    assert target.read_text().count(str(bad)) == 24


def test_other_settings_are_refused(run_cli, folder, tmp_path):
    """Other settings, another format, or videos where there were pictures alone are one line that
    names what differs, exit code 2, and output and journal as they were.
    """
    target, journal = tmp_path / "out.csv", tmp_path / "out.csv.resume"
    base = ["-o", target, "--resume", "-q"]
    assert run_cli("score", folder / "a.png", *base).code == 0
    before = target.read_bytes(), journal.read_bytes()
    for words, names in (
        ([folder / "a.png", "--every", "2"], "settings differ"),
        ([folder / "a.png", "-f", "pooled"], "format differ"),
        ([folder / "b.mkv"], "columns differ"),
    ):
        done = run_cli("score", *words, *base)
        assert done.code == 2
        assert names in done.err
        assert len(done.err.splitlines()) == 1
        assert (target.read_bytes(), journal.read_bytes()) == before


def test_what_cannot_be_resumed_is_refused(run_cli, folder, tmp_path):
    """Standard output, a document, a pipe as input and a file that was not begun with --resume are
    one line and exit code 2, and the file is as it was.
    """
    target = tmp_path / "kept.csv"
    target.write_text("path,score\n")
    picture = folder / "a.png"
    for words, said in (
        ([picture], "name it with -o"),
        ([picture, "-o", tmp_path / "x.json", "-f", "json"], "--format json"),
        (["-", "-o", tmp_path / "x.csv"], "- is none"),
        ([picture, "-o", target], "was not written with --resume"),
    ):
        done = run_cli("score", *words, "--resume")
        assert (done.code, done.out) == (2, "")
        assert said in done.err
        assert len(done.err.splitlines()) == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "kept.csv"]
    assert target.read_text() == "path,score\n"


def test_two_runs_cannot_write_one_journal(run_cli, plain_environment, media, folder, tmp_path):
    """While a run has the journal, a second one is refused and changes neither journal nor output;
    once the first is killed, the lock is gone with it.
    """
    blocking = folder / "c.mkv"
    os.mkfifo(blocking)
    target, journal = tmp_path / "out.csv", tmp_path / "out.csv.resume"
    words = ["score", folder / "a.png", blocking, "-o", target, "--resume"]
    first = subprocess.Popen(
        [sys.executable, "-m", "dgiqa_stream", *map(str, words)],
        stderr=subprocess.DEVNULL,
        env=plain_environment,
    )
    try:
        end = time.monotonic() + 60
        while not (journal.exists() and journal.read_bytes().count(b"\n") == 2):
            assert time.monotonic() < end
            time.sleep(0.05)
        before = journal.read_bytes(), target.read_bytes() if target.exists() else None
        second = run_cli(*words)
        assert second.code == 2
        assert f"cannot resume {target}: another run writes it now" in second.err
        assert (journal.read_bytes(), target.read_bytes() if target.exists() else None) == before
    finally:
        first.kill()
        first.wait(60)
    blocking.unlink()
    shutil.copy(media["plain"], blocking)
    assert run_cli(*words).code == 0
