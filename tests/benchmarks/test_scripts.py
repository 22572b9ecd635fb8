"""The benchmarks' own arithmetic: what they call growth, lag and a stream."""

from __future__ import annotations

import itertools
import json

import pytest


def readings_of(memory, rss_mb):
    """A reading every second."""
    return [memory.Reading(float(at), mb) for at, mb in enumerate(rss_mb)]


def test_growth_is_what_comes_after_the_first_minutes(script):
    """100 MB that fill in five minutes and then 7 MB more are a growth of 7 MB."""
    memory = script("memory")
    filling = [100.0 + at / 10 for at in range(301)]  # 130 MB after 300 s
    growing = [130.0 + 7 * at / 1500 for at in range(1, 1501)]
    found = memory.judge(readings_of(memory, filling + growing))
    assert found["first_seconds"] == 300
    assert found["growth_mb"] == pytest.approx(7.0)
    assert found["slope_mb_per_hour"] == pytest.approx(7 * 3600 / 1500)
    assert len(found["rss_mb_each_minute"]) == 31


def test_a_saw_tooth_is_no_growth(script):
    """Memory that goes up and down within what it reached in the first minutes has grown by 0."""
    memory = script("memory")
    found = memory.judge(readings_of(memory, [100.0 + at % 60 for at in range(1800)]))
    assert found["growth_mb"] == 0


def test_lag_is_told_from_the_senders_clock(script):
    """A frame of stream 1, to be shown at 1000.5 + 2 s and scored at 1002.6 s, lags by 0.1 s."""
    live = script("_live")
    told = {
        "schema": "dgiqa.frame/1",
        "stream": "s1",
        "frame": {"pts_seconds": 2.0},
        "time": {"wall_ns": 1_002_575_000_000, "latency_ms": 25.0},
    }
    heard = live._heard(json.loads(json.dumps(told)))
    played = live.Broadcast(["udp://a", "udp://b"], [0.0, 1000.5])
    assert played.lags_of([heard]) == pytest.approx([0.1])


def test_a_stream_goes_on_where_the_clip_begins_again(script):
    """Three laps of four pictures at 10 a second are 12 pictures, 0.1 s apart by their stamps."""
    sender = script("_sender")
    order = [(0.0, -0.1), (0.2, 0.0), (0.1, 0.1), (0.3, 0.2)]  # with a B-frame
    clip = [sender.Coded(b"", pts, dts, pts == 0) for pts, dts in order]
    sent = list(itertools.islice(sender.schedule(clip, 5, 100.0), 12))
    assert {due.stream for due in sent} == {5}
    assert [due.at_seconds for due in sent] == pytest.approx([100.9 + n / 10 for n in range(12)])
    shown = sorted(due.lap_seconds + due.coded.pts_seconds for due in sent)
    assert shown == pytest.approx([1.0 + n / 10 for n in range(12)])


def test_cpu_and_memory_are_those_of_the_program(script):
    """A program that computes for half a second with 200 MB is told to have done so."""
    import os
    import subprocess
    import sys

    bench = script("_bench")
    code = (
        "import time\nheld = bytearray(200_000_000)\n"
        "while time.process_time() < 0.5: pass\nprint(time.process_time(), flush=True)\ninput()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        spent = float(child.stdout.readline())  # a virtual machine's pause counts as its time
        cpu, (now_mb, peak_mb) = bench.cpu_seconds_of(child.pid), bench.memory_of(child.pid)
        child.kill()
    # user and system are cut to ticks, and the tick that is under way is not in them yet
    assert cpu == pytest.approx(spent, abs=5 / os.sysconf("SC_CLK_TCK"))
    assert spent >= 0.5
    assert 200 < now_mb <= peak_mb < 240


def test_what_is_neither_is_taken_round_by_round(script):
    """A round in which all three programs are slowed leaves the share of the rest as it is."""
    rounds = [(12.0, 4.0, 7.0), (24.0, 8.0, 14.0), (12.4, 4.0, 7.0)]
    both, decode, inference = (list(column) for column in zip(*rounds, strict=True))
    found = script("score_every_frame")._of_model(both, decode, inference, [1.0])
    assert found["neither_over_decode"] == 0.25
    assert found["cpu_ms_per_frame_neither"] == pytest.approx(1.4)
    assert found["scoring_over_decode_p10_p90"] == [2.0, 2.08]
    assert found["cpu_ms_per_frame_inference"] == 7.0
