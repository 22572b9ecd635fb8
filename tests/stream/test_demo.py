"""The demo's own part: how it ends the watcher that it started."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

DEMO = Path(os.environ.get("DGIQA_CHECKOUT", Path(__file__).parents[2])) / "demo" / "demo.py"
SLOW_TO_END = """
import signal, sys, time
num_signals = 0
def note(number, frame):
    global num_signals
    num_signals += 1
signal.signal(signal.SIGINT, note)
print("ready", flush=True)
while not num_signals:
    time.sleep(0.01)
print("summary", flush=True)
for _ in range(150):  # the report; a signal does not shorten it
    time.sleep(0.01)
sys.exit(130 if num_signals > 1 else 0)
"""
HANGS = SLOW_TO_END.replace("while not num_signals", "while num_signals < 2")


@pytest.fixture
def demo():
    """The script as a module."""
    if not DEMO.is_file():
        pytest.skip("needs the checkout's demo; DGIQA_CHECKOUT names the checkout")
    spec = importlib.util.spec_from_file_location("demo_of_the_checkout", DEMO)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def started():
    """Starts a program that listens for Ctrl-C; it is ended with the test."""
    running = []

    def start(code):
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
        running.append(process)
        assert process.stdout.readline() == b"ready\n"
        return process

    yield start
    for process in running:
        process.kill()
        process.wait()
        process.stdout.close()


def test_a_watcher_that_is_ending_is_not_interrupted_again(demo, started):
    """One that still writes its report after the summary gets no second Ctrl-C, and ends well."""
    watcher = started(SLOW_TO_END)
    watcher.send_signal(signal.SIGINT)
    assert watcher.stdout.readline() == b"summary\n"
    assert demo.ended(watcher) == 0


def test_a_watcher_that_hangs_is_interrupted_again(demo, started, monkeypatch):
    """One that does not end in the time it is given gets another Ctrl-C."""
    watcher = started(HANGS)
    watcher.send_signal(signal.SIGINT)
    monkeypatch.setattr(demo, "LONGEST_TO_END", 3.0)
    assert demo.ended(watcher) == 130
