from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import pytest

from dgiqa_stream.errors import SinkError
from dgiqa_stream.sinks.csvfile import COLUMNS, CsvSink
from dgiqa_stream.sinks.memory import MemorySink
from dgiqa_stream.sinks.ndjson import NdjsonSink
from dgiqa_stream.wire import FrameMessage, StatusMessage, decode

FILE_SINKS = [NdjsonSink, CsvSink]
FULL_DISK = Path("/dev/full")
needs_full_disk = pytest.mark.skipif(not FULL_DISK.exists(), reason="no /dev/full here")


def test_a_recording_reads_back_as_it_was_sent(peers: ModuleType, tmp_path: Path) -> None:
    """Each message is one line, complete on the disk before the sink is closed."""
    path, factory = tmp_path / "a.ndjson", peers.make_factory()
    sent = [
        peers.make_meta(factory),
        factory.frame(peers.make_score()),
        factory.window(peers.make_window()),
        factory.thumbnail(peers.make_score(), b"\xff\xd8\n", width=2, height=2),
    ]
    sink = NdjsonSink(path)
    for message in sent:
        sink.send(message)
        sink.tick()
    assert [decode(line) for line in path.read_bytes().splitlines()] == sent
    sink.close()
    sink.close()


def test_csv_holds_frames_alone(peers: ModuleType, tmp_path: Path) -> None:
    """A CSV file has the promised columns and one line per frame, with numbers that read back."""
    path, factory = tmp_path / "a.csv", peers.make_factory("cam-1")
    known = {"interval": (20.5, 46.25), "out_of_domain": ("hdr", "flat")}
    frame = factory.frame(peers.make_score(7, 100 / 3, **known))
    sink = CsvSink(path)
    for message in (factory.status("running"), frame, factory.window(peers.make_window())):
        sink.send(message)
    [row] = csv.DictReader(io.StringIO(path.read_text(encoding="utf-8")))
    sink.close()
    assert COLUMNS[:7] == ("stream", "index", "pts_seconds", "score", "raw", "in_domain", "wall")
    assert COLUMNS[7:] == ("interval_low", "interval_high", "out_of_domain")
    assert (row["stream"], row["index"], row["in_domain"]) == ("cam-1", "7", "false")
    assert (float(row["score"]), float(row["pts_seconds"])) == (100 / 3, 0.28)
    assert row["wall"] == frame.wall
    assert (float(row["interval_low"]), float(row["interval_high"])) == (20.5, 46.25)
    assert row["out_of_domain"] == "hdr flat"


def test_a_missing_raw_is_an_empty_field(peers: ModuleType, tmp_path: Path) -> None:
    """A value that is not finite leaves its CSV field empty rather than saying nan."""
    sink = CsvSink(tmp_path / "a.csv")
    sink.send(peers.make_factory().frame(peers.make_score(raw=float("nan"))))
    sink.close()
    assert (tmp_path / "a.csv").read_text().splitlines()[1].split(",")[4] == ""


@pytest.mark.parametrize("kind", FILE_SINKS)
def test_a_second_run_appends(peers: ModuleType, tmp_path: Path, kind: type) -> None:
    """A restarted program keeps what was recorded before, and CSV keeps one header."""
    path = tmp_path / "a"
    for index in range(3):
        sink = kind(path)
        sink.send(peers.make_factory().frame(peers.make_score(index)))
        sink.close()
    assert len(path.read_text().splitlines()) == 3 + (kind is CsvSink)
    kind(path, append=False).close()
    assert len(path.read_text().splitlines()) == (kind is CsvSink)


@pytest.mark.parametrize("kind", FILE_SINKS)
def test_a_torn_line_does_not_swallow_the_next(
    peers: ModuleType, tmp_path: Path, kind: type
) -> None:
    """After a kill in the middle of a line, appending starts on a line of its own."""
    path, factory = tmp_path / "a", peers.make_factory()
    sink = kind(path)
    sink.send(factory.frame(peers.make_score(1)))
    sink.close()
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    sink = kind(path)
    sink.send(factory.frame(peers.make_score(2)))
    sink.close()
    lines = path.read_bytes().splitlines()
    assert whole.startswith(b"\n".join(lines[:-1]))
    if kind is NdjsonSink:
        assert decode(lines[-1]).frame.index == 2


@pytest.mark.parametrize("kind", FILE_SINKS)
@contextmanager
def room_for(num_bytes: int) -> Iterator[None]:
    """No file grows beyond this, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)


@pytest.mark.parametrize("kind", FILE_SINKS)
def test_a_disk_that_fills_up_leaves_no_half_line(
    peers: ModuleType, tmp_path: Path, kind: type
) -> None:
    """What a full disk took of a line is taken back; the next one that fits is whole."""
    path, factory = tmp_path / "a", peers.make_factory()
    sink = kind(path)
    sink.send(factory.frame(peers.make_score(0)))
    whole = path.read_bytes()
    with room_for(len(whole) + 10), pytest.raises(SinkError, match="File too large"):
        sink.send(factory.frame(peers.make_score(1)))
    assert path.read_bytes() == whole
    second = factory.frame(peers.make_score(2))
    sink.send(second)
    sink.close()
    assert path.read_bytes().startswith(whole)
    *_, last = path.read_text(encoding="utf-8").splitlines()
    assert len(path.read_text(encoding="utf-8").splitlines()) == len(whole.splitlines()) + 1
    assert second.wall in last


@pytest.mark.parametrize("kind", FILE_SINKS)
def test_a_disk_that_fills_up_while_a_file_is_begun_anew(
    peers: ModuleType, tmp_path: Path, kind: type
) -> None:
    """First lines that did not fit are written again, before the next line that fits."""
    path, factory = tmp_path / "a", peers.make_factory()
    sink = kind(path)
    sink.send(peers.make_meta(factory))
    sink.send(factory.frame(peers.make_score(1)))
    first_line = path.read_bytes().splitlines()[0]
    path.rename(tmp_path / "b")
    with room_for(len(first_line) // 2), pytest.raises(SinkError, match="File too large"):
        sink.send(factory.frame(peers.make_score(2)))
    assert path.read_bytes() == b""
    sink.send(factory.frame(peers.make_score(3)))
    sink.close()
    lines = path.read_bytes().splitlines()
    assert len(lines) == 2
    assert lines[0] == first_line


def test_a_disk_that_fills_up_leaves_alone_what_others_wrote(
    peers: ModuleType, tmp_path: Path
) -> None:
    """Where two write one file, the half line stays, and the next one begins a line of its own."""
    path, factory = tmp_path / "a", peers.make_factory()
    sink = NdjsonSink(path)
    with path.open("ab") as other:
        other.write(b'{"other": 1}\n')
    with room_for(path.stat().st_size + 10), pytest.raises(SinkError, match="File too large"):
        sink.send(factory.frame(peers.make_score(1)))
    sink.send(factory.frame(peers.make_score(2)))
    sink.close()
    others, torn, whole = path.read_bytes().splitlines()
    assert others == b'{"other": 1}'
    assert len(torn) == 10
    assert decode(whole).frame.index == 2


LEFT = [
    pytest.param(lambda path: path.rename(path.with_name("b")), id="moved"),
    pytest.param(Path.unlink, id="removed"),
    pytest.param(lambda path: os.truncate(path, 0), id="emptied"),
]


@pytest.mark.parametrize("leave", LEFT)
@pytest.mark.parametrize("kind", FILE_SINKS)
def test_a_file_that_is_moved_away_is_begun_anew(
    peers: ModuleType, tmp_path: Path, kind: type, leave: Callable[[Path], object]
) -> None:
    """What comes after is under the old name, with all that a file of its own needs: CSV's header,
    and of a recording what is watched by streams that have not ended.
    """
    path = tmp_path / "a"
    ended, watched = peers.make_factory("ended"), peers.make_factory("watched")
    sink = kind(path)
    for factory in (ended, watched):
        sink.send(peers.make_meta(factory))
        sink.send(factory.frame(peers.make_score(1)))
    sink.send(ended.final(None, counts={}, duration_seconds=1.0, reason="end_of_stream"))
    before = path.read_bytes()
    leave(path)
    sink.send(watched.frame(peers.make_score(2)))
    sink.close()
    first, *others = path.read_bytes().splitlines()
    if kind is NdjsonSink:
        assert sink.was_moved
        assert first in before.splitlines()
        assert (decode(first).kind, decode(first).stream) == ("meta", "watched")
        assert [decode(line).frame.index for line in others] == [2]
    else:
        assert first.decode() == ",".join(COLUMNS)
        assert [line.split(b",")[1] for line in others] == [b"2"]
    if (tmp_path / "b").exists():
        assert (tmp_path / "b").read_bytes() == before


@pytest.mark.parametrize("kind", FILE_SINKS)
def test_a_file_that_cannot_be_begun_anew_goes_on_where_it_is(
    peers: ModuleType, tmp_path: Path, kind: type
) -> None:
    """Its folder gone, lines are added to the file that was moved, until there is a place again."""
    folder, moved, factory = tmp_path / "f", tmp_path / "moved", peers.make_factory()
    folder.mkdir()
    sink = kind(folder / "a")
    (folder / "a").rename(moved)
    folder.rmdir()
    sink.send(factory.frame(peers.make_score(1)))
    num_lines = 1 + (kind is CsvSink)
    assert len(moved.read_text().splitlines()) == num_lines
    folder.mkdir()
    sink.send(factory.frame(peers.make_score(2)))
    sink.close()
    assert len(moved.read_text().splitlines()) == num_lines
    assert len((folder / "a").read_text().splitlines()) == num_lines


@pytest.mark.parametrize("kind", FILE_SINKS)
def test_a_file_that_is_nowhere_is_told(peers: ModuleType, tmp_path: Path, kind: type) -> None:
    """Deleted with its folder, there is nothing left to write to."""
    folder = tmp_path / "f"
    folder.mkdir()
    with contextlib.closing(kind(folder / "a")) as sink:
        (folder / "a").unlink()
        folder.rmdir()
        with pytest.raises(SinkError, match="make its folder first"):
            sink.send(peers.make_factory().frame(peers.make_score()))


@pytest.mark.parametrize("kind", FILE_SINKS)
def test_a_pipe_under_its_name_is_not_waited_for(
    peers: ModuleType, tmp_path: Path, kind: type
) -> None:
    """A pipe that nobody reads holds nothing up; lines go on to the file that was moved."""
    sink = kind(tmp_path / "a")
    (tmp_path / "a").rename(tmp_path / "b")
    os.mkfifo(tmp_path / "a")
    sink.send(peers.make_factory().frame(peers.make_score()))
    sink.close()
    assert len((tmp_path / "b").read_text().splitlines()) == 1 + (kind is CsvSink)


@pytest.mark.parametrize("kind", FILE_SINKS)
def test_several_threads_write_whole_lines(peers: ModuleType, tmp_path: Path, kind: type) -> None:
    """Lines of several threads never mix and none is lost."""
    path, factory = tmp_path / "a", peers.make_factory()
    sink = kind(path)

    def work(first: int) -> None:
        for index in range(first, first + 200):
            sink.send(factory.frame(peers.make_score(index)))

    threads = [threading.Thread(target=work, args=(n * 200,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    sink.close()
    if kind is NdjsonSink:
        found = [decode(line).frame.index for line in path.read_bytes().splitlines()]
    else:
        rows = csv.DictReader(io.StringIO(path.read_text(encoding="utf-8")))
        found = [int(row["index"]) for row in rows]
    assert sorted(found) == list(range(800))


def test_kill_9_loses_at_most_the_last_line(peers: ModuleType, tmp_path: Path) -> None:
    """Every line that a killed recorder had finished is on the disk and can be read."""
    path = tmp_path / "a.ndjson"
    command = [sys.executable, str(peers.__file__), "record", str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as recorder:
        assert recorder.stdout is not None
        told = 0
        while told < 200:
            told = int(recorder.stdout.readline())
        recorder.kill()
        told = max([told, *map(int, recorder.stdout.read().split()[:-1])])
    lines = path.read_bytes().split(b"\n")
    complete = [decode(line).frame.index for line in lines[:-1]]
    assert complete == list(range(len(complete)))
    assert len(complete) >= told


@needs_full_disk
@pytest.mark.parametrize("kind", FILE_SINKS)
def test_a_full_disk_is_told(peers: ModuleType, kind: type) -> None:
    """A full disk raises SinkError naming the file, the reason and the next step."""
    with (
        pytest.raises(SinkError, match=r"/dev/full: No space left on device; free some space"),
        contextlib.closing(kind(FULL_DISK)) as sink,
    ):
        sink.send(peers.make_factory().frame(peers.make_score()))


@pytest.mark.parametrize("kind", FILE_SINKS)
@pytest.mark.parametrize(
    ("place", "advice"),
    [("missing/a", "make its folder first"), ("", "name a file, not a folder")],
)
def test_a_path_that_cannot_be_written_is_told(
    tmp_path: Path, kind: type, place: str, advice: str
) -> None:
    """An impossible path fails when the sink is made, not at the first message."""
    with pytest.raises(SinkError, match=advice) as caught:
        kind(tmp_path / place)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
@pytest.mark.parametrize("kind", FILE_SINKS)
def test_a_file_without_permission_is_told(tmp_path: Path, kind: type) -> None:
    """A file that may not be written says so and names the next step."""
    path = tmp_path / "a"
    path.touch(mode=0o400)
    with pytest.raises(SinkError, match="Permission denied; choose another path or change"):
        kind(path)


def test_a_file_of_other_columns_is_not_spoilt(tmp_path: Path) -> None:
    """A CSV file with other columns is refused and left as it was."""
    path = tmp_path / "a.csv"
    path.write_text("frame,vmaf\n0,93.1\n")
    with pytest.raises(SinkError, match="columns differ"):
        CsvSink(path)
    assert path.read_text() == "frame,vmaf\n0,93.1\n"


@pytest.mark.parametrize("kind", FILE_SINKS)
def test_a_closed_sink_takes_nothing(peers: ModuleType, tmp_path: Path, kind: type) -> None:
    """Sending to a closed file raises SinkError, not an error of the system."""
    sink = kind(tmp_path / "a")
    sink.close()
    with pytest.raises(SinkError, match="closed"):
        sink.send(peers.make_factory().frame(peers.make_score()))


def test_a_reader_that_leaves_is_a_sink_error(peers: ModuleType) -> None:
    """Writing to ``head -1`` ends with a SinkError after a whole line, with no traceback."""
    command = [sys.executable, str(peers.__file__), "record", "-"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe) as recorder:
        assert recorder.stdout is not None
        assert recorder.stderr is not None
        first = recorder.stdout.readline()
        recorder.stdout.close()
        assert recorder.wait(timeout=60) == 1
        assert recorder.stderr.read() == b""
    assert json.loads(first)["schema"] == "dgiqa.frame/1"


def test_memory_keeps_what_was_sent(peers: ModuleType) -> None:
    """The memory sink gives messages back in order, by type, until closed."""
    sink, factory = MemorySink(), peers.make_factory()
    sent = [factory.status("running"), factory.frame(peers.make_score())]
    for message in sent:
        sink.send(message)
    sink.tick()
    sink.close()
    assert sink.messages == sent
    assert (sink.of(FrameMessage), sink.of(StatusMessage)) == (sent[1:], sent[:1])
    assert (sink.num_ticks, sink.closed) == (1, True)
    with pytest.raises(SinkError, match="closed"):
        sink.send(sent[0])


def test_memory_can_be_bounded(peers: ModuleType) -> None:
    """A bounded memory sink keeps the newest messages."""
    sink, factory = MemorySink(max_messages=2), peers.make_factory()
    for _ in range(5):
        sink.send(factory.status("running"))
    assert [message.seq for message in sink.messages] == [3, 4]
