"""How sure a score is, from a model of three outputs to whoever is told: one run, every way out."""

from __future__ import annotations

import contextlib
import csv
import importlib.util
import io
import json
import re
import threading
import time
from fractions import Fraction

import cv2
import numpy as np
import pytest
from rich.console import Console

from dgiqa_stream.cli._table import LiveTable
from dgiqa_stream.config import PublishSettings, parse_config
from dgiqa_stream.pipeline import Monitor
from dgiqa_stream.recording import read_recording
from dgiqa_stream.report import write_html, write_png
from dgiqa_stream.scorer import load_scorer
from dgiqa_stream.sinks.csvfile import CsvSink
from dgiqa_stream.sinks.memory import MemorySink
from dgiqa_stream.sinks.ndjson import NdjsonSink
from dgiqa_stream.sinks.zeromq import ZeromqSink
from dgiqa_stream.subscriber import Subscriber
from dgiqa_stream.types import Frame, FrameInfo, Planes, StreamInfo
from dgiqa_stream.wire import FinalMessage, FrameMessage, WindowMessage, encode

KNOWN, ODD, BLACK = (51, 102, 204), (51, 204, 204), (0, 0, 0)
SCRIPT = [KNOWN] * 6 + [ODD] * 3 + [BLACK] * 3
SETTINGS = {"sampler": {"mode": "every"}, "pooling": {"windows_seconds": [1.0]}}
EXPECTED = {  # by colour: score, interval and reasons; shares of 255 in float32, so to 1e-4
    KNOWN: (80.0, (72.0, 88.0), []),
    ODD: (80.0, (72.0, 88.0), ["unfamiliar"]),
    BLACK: (0.0, (0.0, 0.0), ["flat"]),
}


def picture(colour):
    """32x32 pixels with exactly this mean; all but black vary around it."""
    signs = np.random.default_rng(0).permutation(np.repeat([-1, 1], 512)).reshape(32, 32, 1)
    return (np.array(colour) + signs * (40 if any(colour) else 0)).astype(np.uint8)


class ColourSource:
    """Pictures of given colours, ten to the second."""

    num_corrupt = 0
    num_decode_errors = 0
    info = StreamInfo(32, 32, "colour", "rgb24", Fraction(10), None, None, False, "colour")

    def frames(self):
        """As the script says."""
        for index, colour in enumerate(SCRIPT):
            info = FrameInfo(
                index=index,
                pts_seconds=index / 10,
                duration_seconds=0.1,
                pts=index,
                time_base=Fraction(1, 10),
                width=32,
                height=32,
                pix_fmt="rgb24",
                received_at_seconds=time.time(),
            )
            yield Frame(Planes((picture(colour),), full_range=True), info, "cam1")

    def close(self):
        """Nothing to release."""


def watch(model, *sinks):
    """One run through the real engine; what was sent."""
    memory = MemorySink()
    with load_scorer(model) as scorer:
        monitor = Monitor(
            ColourSource,
            stream="cam1",
            config=parse_config(SETTINGS),
            scorer=scorer,
            sinks=[memory, *sinks],
        )
        assert monitor.run().error is None
    return memory


def check_frames(frames):
    """Frame messages say what the colours of the script must come to."""
    assert len(frames) == len(SCRIPT)
    for message, colour in zip(frames, SCRIPT, strict=True):
        score, interval, reasons = EXPECTED[colour]
        quality = message.quality
        assert quality.score == pytest.approx(score, abs=1e-4)
        assert quality.interval == pytest.approx(interval, abs=1e-4)
        assert (quality.interval_coverage, quality.out_of_domain) == (0.9, reasons)
        assert quality.in_domain == (not reasons)


def test_messages_say_it(sure_model):
    """Frames carry interval, coverage and reasons; windows and the summary the share in domain,
    and all frames are pooled.
    """
    memory = watch(sure_model())
    check_frames(memory.of(FrameMessage))
    (first, *_), (final,) = memory.of(WindowMessage), memory.of(FinalMessage)
    assert first.in_domain_share == pytest.approx(0.6)
    assert final.in_domain_share == pytest.approx(0.5)
    assert final.pool["mean"] == pytest.approx(80.0 * 9 / 12, abs=1e-4)


def test_a_model_of_one_output_says_nothing(sure_model):
    """Without interval and domain, all of it is null or empty and the whole session in domain."""
    memory = watch(sure_model(interval=None, domain=None))
    for message in memory.of(FrameMessage):
        quality = json.loads(encode(message))["quality"]
        assert (quality["interval"], quality["interval_coverage"]) == (None, None)
        assert (quality["out_of_domain"], quality["in_domain"]) == ([], True)
    assert memory.of(FinalMessage)[0].in_domain_share == 1.0


@pytest.mark.parametrize("encoding", ["json", "msgpack"])
def test_a_subscriber_hears_it(sure_model, peers, encoding):
    """Over ZeroMQ, in both encodings, arrives what was sent."""
    heard, is_there = [], threading.Event()
    settings = PublishSettings(endpoint="tcp://127.0.0.1:*", encoding=encoding)
    with contextlib.closing(ZeromqSink(settings)) as sink:

        def listen():
            with Subscriber(sink.endpoint, timeout_seconds=60) as messages:
                for message in messages:
                    is_there.set()
                    if message.stream == "cam1":
                        heard.append(message)
                    if message.kind == "final":
                        return

        thread = threading.Thread(target=listen)
        thread.start()
        sink.send(peers.make_factory("hello").status("running"))  # a newcomer is told of it
        while not is_there.wait(0.01):
            sink.tick()
        watch(sure_model(), sink)
        thread.join(60)
    check_frames([m for m in heard if m.kind == "frame"])
    assert heard[-1].kind == "final"
    assert heard[-1].in_domain_share == pytest.approx(0.5)


def test_csv_and_recording_hold_it(sure_model, tmp_path):
    """The CSV's last columns and the recording's rows are what the messages say."""
    table, record = tmp_path / "a.csv", tmp_path / "a.ndjson"
    with contextlib.closing(CsvSink(table)) as one, contextlib.closing(NdjsonSink(record)) as two:
        sent = watch(sure_model(), one, two).of(FrameMessage)
    rows = list(csv.DictReader(io.StringIO(table.read_text())))
    (track,) = read_recording(record).tracks
    for message, row, frame in zip(sent, rows, track.frames, strict=True):
        quality = message.quality
        assert (float(row["interval_low"]), float(row["interval_high"])) == quality.interval
        assert row["out_of_domain"].split() == quality.out_of_domain
        assert (frame.interval, frame.interval_coverage) == (quality.interval, 0.9)
        assert list(frame.out_of_domain) == quality.out_of_domain
    assert track.final is not None
    assert track.windows[0].in_domain_share == pytest.approx(0.6)


@pytest.mark.skipif(
    importlib.util.find_spec("matplotlib") is None, reason="could not import 'matplotlib'"
)
def test_the_report_shades_it(sure_model, tmp_path):
    """The page names the share out of domain by reason and shades the band; without a domain and
    an interval it says nothing of either.
    """
    pages = []
    for name, fields in (("a", {}), ("b", {"interval": None, "domain": None})):
        record, page = tmp_path / f"{name}.ndjson", tmp_path / f"{name}.html"
        with contextlib.closing(NdjsonSink(record)) as sink:
            watch(sure_model(**fields), sink)
        write_html(read_recording(record), page)
        write_png(read_recording(record), tmp_path / f"{name}.png")
        pages.append(page.read_text(encoding="utf-8"))
    sure, plain = pages
    assert "50 % of the scored time is of a kind" in sure
    assert "(unfamiliar 25 %, flat 25 %)" in sure
    assert '<li class="sure">90 % interval</li>' in sure
    assert len(re.findall(r"fill: var\(--sure\)", sure)) == 2  # the wide chart and the narrow one
    assert "interval</li>" not in plain
    assert "of the scored time" not in plain
    assert "fill: var(--sure)" not in plain


def test_score_shows_it(sure_model, run_cli, tmp_path):
    """A picture's line and row have its interval and its reasons, in each format."""
    paths = []
    for name, colour in (("known", KNOWN), ("odd", ODD), ("black", BLACK)):
        paths.append(str(tmp_path / f"{name}.png"))
        assert cv2.imwrite(paths[-1], picture(colour)[..., ::-1])
    model = ("--model", sure_model())
    done = run_cli("score", *paths, *model)
    assert done.code == 0
    assert [
        (r["interval_low"], r["interval_high"], r["out_of_domain"]) for r in csv_of(done.out)
    ] == [
        ("72.0", "88.0", ""),
        ("72.0", "88.0", "unfamiliar"),
        ("0.0", "0.0", "flat"),
    ]
    assert [line.split(": ", 1)[1] for line in done.err.splitlines()] == [
        "80.0 [72-88]  (1 frame)",
        "80.0 [72-88]  (1 frame, out of domain: unfamiliar)",
        "0.0 [0-0]  (1 frame, out of domain: flat)",
    ]
    document = json.loads(run_cli("score", *paths, *model, "-q", "--format", "json").out)
    assert document["model"]["interval_coverage"] == 0.9
    assert [f["out_of_domain"] for f in document["frames"]] == [[], ["unfamiliar"], ["flat"]]
    assert [i["in_domain_share"] for i in document["inputs"]] == [1.0, 0.0, 0.0]


def csv_of(out):
    """The rows of a CSV, as dicts."""
    return list(csv.DictReader(io.StringIO(out)))


def test_the_table_shows_it(peers):
    """A line, and a row on a terminal, have the interval, and the reasons in the word's place."""
    factory = peers.make_factory(model=peers.SURE_MANIFEST)
    known = peers.make_score(interval=(64.2, 78.4))
    odd = peers.make_score(interval=(64.2, 78.4), out_of_domain=("hdr", "flat"))
    told = []
    for score in (known, odd, peers.make_score()):
        lines, terminal = io.StringIO(), io.StringIO()
        with LiveTable(lines) as table:
            table.send(factory.frame(score))
            Console(file=terminal, width=120).print(table._table())
        told.append((lines.getvalue(), terminal.getvalue()))
    assert "score 71.2 [64-78] (good), " in told[0][0]
    assert "71.2 [64-78] good " in told[0][1]
    assert "score 71.2 [64-78] (out of domain: hdr flat), " in told[1][0]
    assert "71.2 [64-78] ! hdr flat " in told[1][1]
    assert "score 71.2 (good), " in told[2][0]
