"""The process that a command runs in: how urgent its threads are, how it was called."""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("av")

from distill.data.codecs import encode
from distill.process import ordinary_scheduling

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Linux's scheduling")


def policies():
    """Of this process's threads."""
    return {os.sched_getscheduler(int(e.name)) for e in Path("/proc/self/task").iterdir()}


def test_av1_leaves_no_real_time_thread():
    """SVT-AV1 makes the thread that opens it a real-time one where it may; not this one."""
    rng = np.random.default_rng(0)
    clip = [rng.integers(0, 256, (64, 64, 3), dtype=np.uint8) for _ in range(3)]
    found = []
    thread = threading.Thread(target=lambda: found.append((encode(clip, "av1", 40), policies())))
    thread.start()
    thread.join()
    ((coded, seen),) = found
    assert len(coded) > 100
    assert seen == {os.SCHED_OTHER}


def test_what_was_urgent_stays_so():
    """A thread that had a real-time policy before keeps it; one that gets it inside loses it."""
    if os.geteuid():
        pytest.skip("only root may make a thread a real-time one")
    before = os.sched_getscheduler(0)
    found = []

    def work():
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
        with ordinary_scheduling():
            os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
        found.append(os.sched_getscheduler(0))

    def becomes():
        with ordinary_scheduling():
            os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
        found.append(os.sched_getscheduler(0))

    for target in (work, becomes):
        thread = threading.Thread(target=target)
        thread.start()
        thread.join()
    assert found == [os.SCHED_RR, os.SCHED_OTHER]
    assert os.sched_getscheduler(0) == before
