"""Recordings of ``watch`` while logrotate moves them away, by the file that is shipped for it."""

from __future__ import annotations

import csv
import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dgiqa_stream.recording import read_recording

CHECKOUT = Path(os.environ.get("DGIQA_CHECKOUT", Path(__file__).parents[2]))
CONFIG = CHECKOUT / "deploy" / "logrotate" / "dgiqa-stream"
WRITTEN_WITHIN_SECONDS = 60.0


@pytest.fixture
def logrotate(missing_server, tmp_path):
    """Runs the real one over what is in a folder, as the shipped file has it."""
    program = shutil.which("logrotate") or shutil.which("/usr/sbin/logrotate")
    if program is None:
        missing_server("logrotate", "logrotate")
    text = CONFIG.read_text(encoding="utf-8")
    assert text.count("/var/lib/dgiqa-stream/*/") == 2
    config, state = tmp_path / "logrotate.conf", tmp_path / "logrotate.state"
    config.write_text(text.replace("/var/lib/dgiqa-stream/*/", f"{tmp_path}/"))
    config.chmod(0o600)

    def run():
        done = subprocess.run(
            [program, "--force", "--state", str(state), str(config)],
            capture_output=True,
            text=True,
            check=False,
        )
        assert (done.returncode, done.stderr) == (0, "")

    return run


def wait_for(path, number):
    """Until the file has so many lines of frames."""
    end = time.monotonic() + WRITTEN_WITHIN_SECONDS
    while not path.exists() or path.read_bytes().count(b'"dgiqa.frame/1"') < number:
        assert time.monotonic() < end, "nothing more was written"
        time.sleep(0.05)


def test_logrotate_loses_nothing(tmp_path, logrotate, plain_environment):
    """Twice moved away, three files hold every frame once and can each be read, the CSV files too;
    the report says that it is of the last one.
    """
    record, rows = tmp_path / "r.ndjson", tmp_path / "r.csv"
    page = tmp_path / "r.html"
    outputs = ["--ndjson", record, "--csv", rows, "--report", page, "--publish", ""]
    source = ["pattern:clean?size=64x48&fps=25", "--realtime", "--id", "cam", "--every", "1"]
    process = subprocess.Popen(
        [sys.executable, "-m", "dgiqa_stream", "watch", *map(str, [*source, *outputs])],
        stderr=subprocess.PIPE,
        text=True,
        env=plain_environment,
    )
    try:
        for _ in range(2):
            wait_for(record, 10)
            logrotate()
        wait_for(record, 10)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0, err
    assert f"{record} was moved away or emptied on the way" in err
    assert page.exists()
    oldest = tmp_path / "r.ndjson.2"
    oldest.write_bytes(gzip.decompress((tmp_path / "r.ndjson.2.gz").read_bytes()))
    parts = [oldest, tmp_path / "r.ndjson.1", record]
    tracks = [track for part in parts for track in read_recording(part).tracks]
    assert [track.name for track in tracks] == ["cam"] * 3
    assert all(track.meta == tracks[0].meta for track in tracks)
    found = [row.index for track in tracks for row in track.frames]
    assert found == list(range(len(found)))
    assert [track.final is not None for track in tracks] == [False, False, True]
    assert json.loads(record.read_text().splitlines()[0])["schema"] == "dgiqa.meta/1"
    with gzip.open(tmp_path / "r.csv.2.gz", "rt", encoding="utf-8") as first:
        csv_rows = list(csv.DictReader(first))
    for path in (tmp_path / "r.csv.1", rows):
        with path.open(encoding="utf-8") as file:
            csv_rows += csv.DictReader(file)
    assert [int(row["index"]) for row in csv_rows] == found
