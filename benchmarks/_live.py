"""Live streams of the clip on this machine, and programs that watch or only decode them."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import _bench as bench
import numpy as np

_PATIENCE_SECONDS = 60.0

DECODE_LIVE = """
import json, sys, threading, time
from dgiqa_stream.cli._jobs import for_several
from dgiqa_stream.config import StreamConfig
from dgiqa_stream.sources import open_source
settings = for_several(StreamConfig(), len(sys.argv) - 2).source
out = open(sys.argv[1], "w", buffering=1)
def decode(url, stream):
    for frame in open_source(url, settings, stream=stream).frames():
        info = frame.info
        out.write(json.dumps([stream, info.pts_seconds, info.received_at_seconds]) + "\\n")
for number, url in enumerate(sys.argv[2:]):
    threading.Thread(target=decode, args=(url, f"s{number}")).start()
"""


class Heard(NamedTuple):
    """A frame of a stream that was decoded, or scored."""

    stream: str
    pts_seconds: float
    at_seconds: float
    """Unix time."""


@dataclass(frozen=True, slots=True)
class Follower:
    """A program that follows streams and writes a line for each frame."""

    process: subprocess.Popen[bytes]
    log: Path

    def heard(self) -> list[Heard]:
        """What it has told so far, whole lines only."""
        lines = self.log.read_bytes().split(b"\n")[:-1] if self.log.exists() else []
        return [found for line in lines if (found := _heard(json.loads(line)))]

    def counts(self) -> dict[str, int]:
        """Frames by what became of them, of all streams; of a watching that has ended."""
        total: dict[str, int] = {}
        for line in self.log.read_bytes().splitlines():
            message = json.loads(line)
            if isinstance(message, dict) and message["schema"] == "dgiqa.final/1":
                for name, number in message["counts"].items():
                    total[name] = total.get(name, 0) + number
        return total

    def wait_for(self, num_streams: int) -> None:
        """Until a frame of every stream has come; raises ``TimeoutError`` after a minute."""
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while len({h.stream for h in self.heard()}) < num_streams:
            if self.process.poll() is not None:
                raise RuntimeError(f"{self.process.args} ended with {self.process.returncode}")
            if time.monotonic() > deadline:
                raise TimeoutError(f"not every stream came: {self.process.args}")
            time.sleep(0.1)


def _heard(told: Any) -> Heard | None:
    if isinstance(told, list):
        return Heard(*told)
    if told["schema"] != "dgiqa.frame/1":
        return None
    at_seconds = told["time"]["wall_ns"] / 1e9 + told["time"]["latency_ms"] / 1e3
    return Heard(told["stream"], told["frame"]["pts_seconds"], at_seconds)


class Broadcast(NamedTuple):
    """Streams that play."""

    urls: Sequence[str]
    begins: Sequence[float]
    """Unix time at which each stream's clock stood at 0."""

    def lags_of(self, heard: Sequence[Heard]) -> list[float]:
        """Seconds from when each frame was to be shown, on the sender's clock, to its line.

        So the decoder's own delay is in it, and that of the network.
        """
        return [h.at_seconds - self.begins[int(h.stream[1:])] - h.pts_seconds for h in heard]


@contextmanager
def broadcast(clip: Path, num_streams: int) -> Iterator[Broadcast]:
    """Play so many streams for the length of the block."""
    urls = [f"udp://127.0.0.1:{port}" for port in _free_ports(num_streams)]
    command = [sys.executable, str(bench.HERE / "_sender.py"), str(clip), *urls]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as sender:
        try:
            assert sender.stdout is not None
            yield Broadcast(urls, json.loads(sender.stdout.readline())["begins"])
        finally:
            sender.kill()


@contextmanager
def decoding(urls: Sequence[str], folder: Path) -> Iterator[Follower]:
    """A process that decodes streams, a thread for each, and does nothing else."""
    log = folder / "decoded.ndjson"
    with _running([sys.executable, "-c", DECODE_LIVE, str(log), *urls], log) as follower:
        yield follower


@contextmanager
def watching(
    urls: Sequence[str], folder: Path, *, frames_per_second: float, first: int = 0
) -> Iterator[Follower]:
    """``dgiqa-stream watch`` as an operator runs it; streams are named from ``s<first>`` on."""
    log = folder / f"watched-{first}.ndjson"
    ids = [word for n in range(len(urls)) for word in ("--id", f"s{first + n}")]
    options = ["--fps", str(frames_per_second), "--ndjson", str(log), "--quiet"]
    options += ["--publish", "tcp://127.0.0.1:*", *ids]
    command = [sys.executable, "-m", "dgiqa_stream", "watch", *urls, *options]
    with _running(command, log) as follower:
        yield follower


@contextmanager
def _running(command: list[str], log: Path) -> Iterator[Follower]:
    log.unlink(missing_ok=True)
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            yield Follower(process, log)
        finally:
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(5)
            process.kill()


def p95_ms(seconds: Sequence[float]) -> float:
    """The 95th percentile, in milliseconds."""
    return round(1e3 * float(np.percentile(seconds, 95)), 1)


def _free_ports(num: int) -> list[int]:
    sockets = [socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(num)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()
