"""What each of the odd and broken files comes to: ``docs/odd-media.md``, and the test of it.

``python tests/helpers/odd_media.py FOLDER docs/odd-media.md`` writes the table anew;
``python tests/helpers/odd_media.py FOLDER`` tells it on standard output: a line of JSON per file,
and one of the process at the end.
"""

from __future__ import annotations

import json
import logging
import math
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from dgiqa_stream.config import SourceSettings
from dgiqa_stream.errors import SourceError
from dgiqa_stream.scorer import Scorer, load_scorer
from dgiqa_stream.sources import open_source
from dgiqa_stream.types import Frame, FrameInfo

SECONDS = 2.0
"""Of stream time that are read of each file."""
EVERY = 30
"""Frames of which one is scored."""
PAGE = """# Odd media

What the first {seconds:g} seconds of each of {count} unusual and broken files come to. They are the
test data of [androidx/media](https://github.com/androidx/media) (`libraries/test_data`, Apache-2.0)
and not part of this repository. {scored} end in scores, {refused} in one clear error, none in a
traceback or a hang.

`tests/stream/test_odd_media.py` compares every row where `DGIQA_ODD_MEDIA` names their folder. This
page is written by `python tests/helpers/odd_media.py FOLDER docs/odd-media.md`.

Time is that of the first and the last frame, in seconds. The last two columns were measured when
the page was written, each file in a process of its own that also opens the model: seconds, and the
peak of its memory in MiB.

| file | video | frames | time | remarks | s | MiB |
|---|---|---:|---|---|---:|---:|
"""


@dataclass(frozen=True, slots=True)
class Row:
    """What one file comes to."""

    file: str
    video: str
    """Size, codec and pixel format; empty where there is no frame."""
    num_frames: int
    time: str
    remarks: str
    """What its frames are marked with, or the error, without the file's name."""


def row_of(path: Path, scorer: Scorer) -> Row:
    """Read and score the file's first seconds.

    Raises what is neither frames with scores nor one of our errors of one line.
    """
    try:
        source = open_source(str(path), SourceSettings(duration_seconds=SECONDS), stream="s")
    except SourceError as exc:
        told = str(exc).replace(str(path), "").lstrip(": ")
        assert told, "an error without a reason"
        assert "\n" not in told, told
        return Row(path.name, "", 0, "", told)
    try:
        infos = list(_scored(source.frames(), scorer))
    finally:
        source.close()
    kinds = dict.fromkeys(f"{i.width}x{i.height} {i.pix_fmt}" for i in infos)
    marks = _marks(infos)
    if source.num_decode_errors:
        marks.append("packets that cannot be decoded")
    return Row(
        file=path.name,
        video=f"{source.info.codec} {', '.join(kinds)}",
        num_frames=len(infos),
        time=f"{infos[0].pts_seconds:.2f} to {infos[-1].pts_seconds:.2f}",
        remarks=", ".join(marks),
    )


def _scored(frames: Iterator[Frame], scorer: Scorer) -> Iterator[FrameInfo]:
    """All frames' infos; some frames are scored on the way, the first among them."""
    last = -math.inf
    for number, frame in enumerate(frames):
        if number % EVERY == 0:
            [found] = scorer.predict([frame.planes])
            assert 0 <= found.score <= 100, found
        assert frame.info.pts_seconds > last
        last = frame.info.pts_seconds
        yield frame.info
    assert last > -math.inf, "opened, but without a frame"


def _marks(infos: list[FrameInfo]) -> list[str]:
    turns = {i.rotation for i in infos} - {0}
    found = [f"turned by {turn}" for turn in sorted(turns)]
    found += sorted({i.dynamic_range for i in infos} - {"sdr"})
    return found + [
        mark
        for mark in ("interlaced", "corrupt", "discontinuity")
        if any(getattr(i, mark) for i in infos)
    ]


# Commands -----------------------------------------------------------------------------------


def tell(paths: list[Path]) -> None:
    """A line of JSON per file, then one of the whole process."""
    logging.disable(logging.CRITICAL)  # decode errors are in the rows
    scorer = load_scorer("student", device="cpu")
    for path in paths:
        begin = time.monotonic()
        row = asdict(row_of(path, scorer))
        _say({**row, "seconds": time.monotonic() - begin})
    _say({"peak_mib": _peak_mib()})


def _peak_mib() -> float:
    """The most memory that this program has held.

    Not getrusage's: Linux counts in it what the process that started this one had before.
    """
    status = Path("/proc/self/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) / 1024


def _say(values: dict[str, object]) -> None:
    sys.stdout.write(json.dumps(values) + "\n")
    sys.stdout.flush()


def write_page(folder: Path, page: Path) -> None:
    """Run each file in a process of its own and write the table of all."""
    told = [_alone(path) for path in files_of(folder)]
    scored = sum(bool(row.num_frames) for row, _, _ in told)
    counts = {"count": len(told), "scored": scored, "refused": len(told) - scored}
    lines = [
        f"| `{row.file}` | {row.video} | {row.num_frames or ''} | {row.time} | {row.remarks} "
        f"| {seconds:.1f} | {mib:.0f} |\n"
        for row, seconds, mib in told
    ]
    page.write_text(PAGE.format(seconds=SECONDS, **counts) + "".join(lines))


def _alone(path: Path) -> tuple[Row, float, float]:
    begin = time.monotonic()
    command = [sys.executable, __file__, str(path)]
    done = subprocess.run(command, capture_output=True, check=True)
    found, process = (json.loads(line) for line in done.stdout.splitlines())
    found.pop("seconds")
    return Row(**found), time.monotonic() - begin, process["peak_mib"]


def files_of(folder: Path) -> list[Path]:
    """The files, in the order of the table; of a file, itself."""
    return sorted(p for p in folder.iterdir() if p.is_file()) if folder.is_dir() else [folder]


def rows_of(page: Path) -> list[Row]:
    """What the page says."""
    rows = []
    for line in page.read_text().splitlines():
        if line.startswith("| `"):
            file, video, num_frames, shown, remarks, *_ = (
                cell.strip() for cell in line.strip("|").split("|")
            )
            rows.append(Row(file.strip("`"), video, int(num_frames or 0), shown, remarks))
    return rows


if __name__ == "__main__":
    where = Path(sys.argv[1])
    if len(sys.argv) > 2:
        write_page(where, Path(sys.argv[2]))
    else:
        tell(files_of(where))
