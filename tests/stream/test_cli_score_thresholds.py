"""The command line, score: --fail-under by pooled value, and JUnit XML."""

from __future__ import annotations

import csv
import io
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from xml.etree import ElementTree

import pytest

# Jenkins' xUnit schema: what each element must have, what it may have, and its children
_COUNTS = {"tests", "failures", "errors"}
SCHEMA = {
    "testsuites": (set(), {"name", "time", *_COUNTS}, {"testsuite"}),
    "testsuite": (
        {"name", *_COUNTS},
        {"time", "skipped", "timestamp", "hostname"},
        {"properties", "testcase"},
    ),
    "properties": (set(), set(), {"property"}),
    "property": ({"name", "value"}, set(), set()),
    "testcase": ({"name", "classname"}, {"time"}, {"failure", "error"}),
    "failure": (set(), {"type", "message"}, set()),
    "error": (set(), {"type", "message"}, set()),
}


def parsed(path):
    """The suite of a JUnit file that is as the schema says and counts its cases right."""
    root = ElementTree.parse(path).getroot()
    assert root.tag == "testsuites"
    for element in root.iter():
        needed, allowed, children = SCHEMA[element.tag]
        assert needed <= set(element.attrib) <= needed | allowed
        assert {child.tag for child in element} <= children
    (suite,) = root
    cases = suite.findall("testcase")
    for counted in (root, suite):
        assert int(counted.get("tests")) == len(cases)
        assert int(counted.get("failures")) == len(suite.findall("testcase/failure"))
        assert int(counted.get("errors")) == len(suite.findall("testcase/error"))
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d", suite.get("timestamp"))
    assert all(len(case) <= 1 for case in cases)
    assert sum(float(c.get("time")) for c in cases) <= float(suite.get("time")) + 0.001 * len(cases)
    return suite


def told(suite):
    """Name of each case and what became of it: failure, error or an empty text."""
    return [(c.get("name"), "".join(child.tag for child in c)) for c in suite.findall("testcase")]


@pytest.fixture(scope="module")
def pooled(run_cli, media):
    """Pooled values of a clip, as numbers by their name."""
    (row,) = csv.DictReader(io.StringIO(run_cli("score", media["vfr"], "-f", "pooled").out))
    return {k: float(v) for k, v in row.items() if k not in ("path", "headline")}


def test_each_pooled_value_has_its_threshold(run_cli, media, pooled):
    """With three thresholds and two inputs, each value that is too low has a line with input,
    pooled value, threshold and difference, the others have none, and the exit code is 1.
    """
    grey, video = media["grey"], media["vfr"]
    limits = {"p5": pooled["p5"] + 1.5, "max": pooled["max"] - 0.5, "mean": pooled["mean"] - 0.5}
    asked = [word for name, value in limits.items() for word in ("--fail-under", f"{name}={value}")]
    alone = run_cli("score", video, *asked, "-q")
    assert alone.code == 1
    (line,) = alone.err.splitlines()
    assert line.startswith(f"{video}: p5 {pooled['p5']:.2f} is below --fail-under p5=")
    assert line.endswith(" by 1.50")
    both = run_cli("score", video, grey, *asked, "-q")
    assert both.code == 1
    assert len(both.err.splitlines()) == 4  # the grey picture is below all three
    assert run_cli("score", video, *asked[2:], "-q").code == 0


def test_a_threshold_brings_its_pooled_value(run_cli, media):
    """A pooled value that --pool leaves out is there for the threshold that names it."""
    done = run_cli(
        "score", media["grey"], "--pool", "p5", "--fail-under", "p1=100", "-f", "pooled", "-q"
    )
    assert done.code == 1
    assert {"p5", "p1"} <= set(done.out.splitlines()[0].split(","))
    assert "p10" not in done.out.splitlines()[0].split(",")
    assert ": p1 " in done.err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--fail-under", "p4=3"], "--fail-under 'p4' is unknown; did you mean p5?"),
        (["--fail-under", "stdev=3"], "stdev says how much scores vary"),
        (["--fail-under", "mean"], "'mean' is no number, and not POOLER=VALUE"),
        (["--fail-under", "=5"], "--fail-under '' is unknown"),
        (["--fail-under", "p5=101"], "--fail-under p5=101 is not within 0..100"),
        (["--fail-under", "mean=nan"], "mean=nan is not within 0..100"),
        (["--junit", "{grey}"], "is the input"),
        (["--junit", "{kept}", "-o", "{kept}"], "would be the same file"),
        (["--junit", ""], "names nothing"),
        (["--junit", "-"], "is no file to write"),
        (["--junit", "{folder}"], "is no file to write"),
    ],
)
def test_what_cannot_be_meant_is_refused(run_cli, media, tmp_path, words, said):
    """A threshold or file that cannot be is one line and exit code 2, before anything is scored or
    written.
    """
    kept = tmp_path / "kept"
    kept.write_text("as it was")
    names = {"grey": media["grey"], "kept": kept, "folder": tmp_path}
    done = run_cli("score", media["grey"], *(word.format(**names) for word in words))
    assert (done.code, done.out) == (2, "")
    assert said in done.err
    assert len(done.err.splitlines()) == 1
    assert kept.read_text() == "as it was"


def test_junit_tells_of_each_input_and_threshold(run_cli, media, pooled, tmp_path):
    """A case per input and threshold: passed, failed with the difference, or an error with its
    reason; the file counts them, and names the model.
    """
    target = tmp_path / "junit.xml"
    limit = pooled["mean"] - 0.5
    done = run_cli(
        *("score", media["vfr"], media["grey"], media["text"], "--junit", target, "-q"),
        *("--fail-under", f"{limit:.6f}", "--fail-under", "p5=0", "-o", tmp_path / "out.csv"),
    )
    assert done.code == 4
    suite = parsed(target)
    mean = f"mean >= {limit:g}"
    assert told(suite) == [
        (f"{media['vfr']}: {mean}", ""),
        (f"{media['vfr']}: p5 >= 0", ""),
        (f"{media['grey']}: {mean}", "failure"),
        (f"{media['grey']}: p5 >= 0", ""),
        (f"{media['text']}: {mean}", "error"),
        (f"{media['text']}: p5 >= 0", "error"),
    ]
    failure, error = suite.find("testcase/failure"), suite.find("testcase/error")
    assert f"{media['grey']}: {failure.get('message')}" in done.err
    assert error.get("message") in done.err
    properties = {p.get("name"): p.get("value") for p in suite.iter("property")}
    assert len(properties["model.sha256"]) == 64
    assert sorted(p.name for p in tmp_path.iterdir()) == ["junit.xml", "out.csv"]


def test_junit_without_thresholds_is_of_the_inputs(run_cli, media, tmp_path):
    """Without --fail-under each input is one case, an error only where it was not scored; a name
    with characters that XML cannot hold is told all the same.
    """
    odd = tmp_path / os.fsdecode(b'<"\x01\xff">.png')
    shutil.copy(media["grey"], odd)
    target = tmp_path / "junit.xml"
    target.write_text("an older one")
    done = run_cli("score", odd, "missing.mp4", "--junit", target, "-q")
    assert done.code == 4
    assert told(parsed(target)) == [
        (f'{tmp_path}/<"\\x01\\xff">.png: is scored', ""),
        ("missing.mp4: is scored", "error"),
    ]


def test_junit_that_cannot_be_written_is_told_first(run_cli, media, tmp_path):
    """A folder that is not there is exit code 5 before anything is scored."""
    done = run_cli("score", media["grey"], "--junit", tmp_path / "no/junit.xml")
    assert (done.code, done.out) == (5, "")
    assert "no such folder" in done.err


def test_junit_after_an_interrupt_is_whole(plain_environment, tmp_path, media):
    """After Ctrl-C the file is there, with the input that was cut off as an error."""
    target = tmp_path / "junit.xml"
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(60)
        silent = f"tcp://127.0.0.1:{server.getsockname()[1]}"
        words = ["score", str(media["grey"]), silent, "--open-timeout", "60", "--junit", target]
        process = subprocess.Popen(
            [sys.executable, "-m", "dgiqa_stream", *words],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=plain_environment,
        )
        connection, _ = server.accept()  # it is in the second input
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
        connection.close()
    assert [kind for _, kind in told(parsed(target))] == ["", "error"]
