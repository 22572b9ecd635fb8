"""The command line, score: WebVTT for players, O22 for ITU-T P.1203, the names of VMAF's JSON."""

from __future__ import annotations

import csv
import io
import json
import math
import re
import shutil
import subprocess

import pytest

CUE = re.compile(r"(\d+)\n(\d\d:\d\d:\d\d\.\d{3}) --> (\d\d:\d\d:\d\d\.\d{3})\n(\d+)\n")


def seconds_of(clock):
    """``HH:MM:SS.mmm`` in seconds."""
    hours, minutes, seconds = clock.split(":")
    return 3600 * int(hours) + 60 * int(minutes) + float(seconds)


@pytest.fixture(scope="module")
def means(run_cli, media):
    """Mean score of each second of the clip of 60 frames at 25 a second, from the CSV."""
    rows = list(csv.DictReader(io.StringIO(run_cli("score", media["whole"], "-q").out)))
    scores = [float(row["score"]) for row in rows]
    return [sum(part) / len(part) for part in (scores[:25], scores[25:50], scores[50:])]


def test_webvtt_has_a_cue_per_second(run_cli, media, means):
    """Each second's cue has the mean of its frames, whole; the last one ends with the video."""
    done = run_cli("score", media["whole"], "-f", "webvtt", "-q")
    assert done.code == 0
    head, *cues = done.out.split("\n\n")
    assert head == "WEBVTT"
    found = [CUE.fullmatch(cue.rstrip("\n") + "\n").groups() for cue in cues]
    assert [int(number) for number, *_ in found] == [1, 2, 3]
    times = [(seconds_of(begin), seconds_of(end)) for _, begin, end, _ in found]
    assert times == [(0, 1), (1, 2), (2, pytest.approx(2.4, abs=0.002))]
    assert [int(text) for *_, text in found] == [round(mean) for mean in means]


def test_webvtt_is_read_by_ffprobe_and_counts_from_the_beginning(run_cli, media, tmp_path):
    """An independent reader finds the cues; with --start they lie where the player is then, also
    for a stream whose clock starts late.
    """
    if shutil.which("ffprobe") is None:
        pytest.skip("needs ffprobe: apt install ffmpeg")
    target = tmp_path / "out.vtt"
    video = media["late_start"]  # 24 frames from 7.2 s on
    assert run_cli("score", video, "--start", "0.4", "-f", "webvtt", "-o", target).code == 0
    words = ["ffprobe", "-v", "error", "-show_entries", "packet=pts_time,duration_time"]
    probed = subprocess.run(
        [*words, "-of", "json", target], capture_output=True, check=True, text=True
    )
    (cue,) = json.loads(probed.stdout)["packets"]
    assert float(cue["pts_time"]) == pytest.approx(0.4, abs=0.002)
    assert float(cue["duration_time"]) == pytest.approx(24 / 25 - 0.4, abs=0.1)


def test_o22_is_a_mos_per_second(run_cli, media, means):
    """``O22`` has a number per second, 1 + score/25 of its mean, within 1..5, beside ``O21`` and
    the stalling that programs of P.1203 look for.
    """
    done = run_cli("score", media["whole"], "-f", "p1203", "-q")
    assert done.code == 0
    found = json.loads(done.out)
    assert found["O22"] == pytest.approx([1 + mean / 25 for mean in means], abs=2e-4)
    assert all(1 <= value <= 5 for value in found["O22"])
    assert found["O21"] == []
    assert found["I23"] == {"stalling": []}


def test_o22_has_no_gap(run_cli, media):
    """Where frames are scored less often than once a second, each second has the value before."""
    done = run_cli("score", media["whole"], "--every", "50", "-f", "p1203", "-q")
    values = json.loads(done.out)["O22"]
    assert len(values) == 3
    assert values[1] == values[0]
    assert not math.isclose(values[2], values[1], abs_tol=1e-6)


@pytest.mark.parametrize("format", ["webvtt", "p1203"])
def test_they_are_of_one_video(run_cli, media, format):
    """Several inputs are one line and exit code 2; one that fails is exit code 3, and what is
    written is still a document of that kind.
    """
    refused = run_cli("score", media["grey"], media["vfr"], "-f", format)
    assert (refused.code, refused.out) == (2, "")
    assert "is of one video, and these are 2" in refused.err
    failed = run_cli("score", media["text"], "-f", format)
    assert failed.code == 3
    if format == "p1203":
        assert json.loads(failed.out)["O22"] == []
    else:
        assert failed.out == "WEBVTT\n"


def test_json_has_the_names_that_readers_of_vmafs_use(run_cli, media):
    """What scripts do with libvmaf's log works: every frame's number and metric, and the four
    pooled values, are numbers under libvmaf's names; NaN and Infinity are nowhere.
    """

    def refuse(name):
        raise AssertionError(name)

    done = run_cli("score", media["vfr"], "-f", "json", "-q")
    log = json.loads(done.out, parse_constant=refuse)
    assert [frame["frameNum"] for frame in log["frames"]] == list(range(12))
    assert all(isinstance(frame["metrics"]["dgiqa"], float) for frame in log["frames"])
    pooled = log["pooled_metrics"]["dgiqa"]
    assert {"min", "max", "mean", "harmonic_mean"} <= set(pooled)
    assert pooled["min"] <= pooled["harmonic_mean"] <= pooled["mean"] <= pooled["max"]
    assert log["aggregate_metrics"] == {}
