"""Unusual and broken files end in scores or in one clear error, as docs/odd-media.md says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import odd_media
import pytest

PAGE = Path(__file__).parents[2] / "docs" / "odd-media.md"
ROWS = {row.file: row for row in odd_media.rows_of(PAGE)}
FOLDER = Path(os.environ.get("DGIQA_ODD_MEDIA") or "nowhere")
MOST_SECONDS = 20.0
MOST_MIB = 768
PATIENCE_SECONDS = 420.0
"""For all of them together: 10 s on an idle machine."""

pytestmark = pytest.mark.skipif(
    not FOLDER.is_dir(), reason="DGIQA_ODD_MEDIA names no folder of odd files"
)


@pytest.fixture(scope="module")
def told():
    """What one process tells of all files: file to row and seconds, and the peak of its memory."""
    done = subprocess.run(
        [sys.executable, odd_media.__file__, str(FOLDER)],
        capture_output=True,
        check=False,
        timeout=PATIENCE_SECONDS,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr.decode()
    *files, process = (json.loads(line) for line in done.stdout.splitlines())
    seconds = {found["file"]: found.pop("seconds") for found in files}
    return {f["file"]: odd_media.Row(**f) for f in files}, seconds, process["peak_mib"]


def test_the_page_has_every_file():
    """No file is left out of the table, and none is told that is not there."""
    assert list(ROWS) == [path.name for path in odd_media.files_of(FOLDER)]


@pytest.mark.parametrize("name", ROWS)
def test_odd_media_ends_as_told(told, name):
    """The file's first seconds come to what the table says, in bounded time."""
    rows, seconds, _ = told
    assert rows[name] == ROWS[name]
    assert seconds[name] < MOST_SECONDS


def test_odd_media_in_bounded_memory(told):
    """All of them, 4K AV1 included, one after the other in one process: 330 MiB on two cores."""
    assert told[2] < MOST_MIB
