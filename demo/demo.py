"""Watches a real clip that is played as a live stream and damaged on the way.

Three processes on this machine, as an operator would have them on three: a sender (MPEG-TS over
UDP), ``dgiqa-stream watch`` publishing over ZeroMQ, and this subscriber, which prints what arrives.
"""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

from dgiqa_stream.subscriber import Subscriber
from dgiqa_stream.wire import FinalMessage, FrameMessage, StatusMessage, WindowMessage

HERE = Path(__file__).parent
OUTPUT = Path("demo-output")
LONGEST_SECONDS = 100.0
LONGEST_TO_END = 30.0
BAR = 24


def free_port(kind: socket.SocketKind) -> int:
    """A port nobody listens on now."""
    with socket.socket(socket.AF_INET, kind) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Sender:
    """The broadcast as a child process, and what it says it is doing to the picture."""

    def __init__(self, url: str) -> None:
        """Start sending."""
        command = [sys.executable, str(HERE / "sender.py"), url]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self._changes: list[tuple[float, str]] = []
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()

    def _listen(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            told = json.loads(line)
            self._changes.append((told["seconds"], told["damage"]))

    def damage_at(self, seconds: float) -> str:
        """What was done to the picture at a time of the broadcast."""
        return next((d for at, d in reversed(self._changes) if at <= seconds), "none")


def row(message: WindowMessage, frame: FrameMessage | None, damage: str) -> str:
    """One second of the stream as a line of the table."""
    mean = message.pool.get("mean")
    low = message.pool.get("min")
    if mean is None or low is None:
        return f"{message.window.t1:7.1f} s   -"
    filled = round(mean / 100 * BAR)
    latency = frame.time.latency_ms if frame else None
    shown = "" if latency is None else f"{latency:6.0f} ms"
    note = "" if damage == "none" else f"  <- {damage}"
    return (
        f"{message.window.t1:7.1f} s  {'█' * filled}{'░' * (BAR - filled)} {mean:5.1f}  "
        f"{low:5.1f} {message.n:4d} {shown}{note}"
    )


def follow(
    subscriber: Subscriber, sender: Sender, watcher: subprocess.Popen[bytes]
) -> FinalMessage | None:
    """Print each second as it arrives, until the session's summary."""
    frame: FrameMessage | None = None
    deadline = time.monotonic() + LONGEST_SECONDS
    asked_to_end, state = False, ""
    while time.monotonic() < deadline:
        message = subscriber.receive(0.25)
        if isinstance(message, FinalMessage):
            return message
        if isinstance(message, FrameMessage):
            frame = message
        elif isinstance(message, WindowMessage) and message.window.len_s == 1.0:
            damage = sender.damage_at((message.window.t0 + message.window.t1) / 2)
            print(row(message, frame, damage), flush=True)
        elif isinstance(message, StatusMessage) and message.state != state:
            state = message.state
            print(f"          stream is {state}", flush=True)
        if sender.process.poll() is not None and not asked_to_end:
            time.sleep(0.5)
            watcher.send_signal(signal.SIGINT)  # what Ctrl-C does: it ends with a summary
            asked_to_end = True
        if watcher.poll() is not None and message is None:
            return None
    return None


def ended(watcher: subprocess.Popen[bytes]) -> int:
    """Its exit code, once it has written its report.

    A second Ctrl-C would leave at once, with what it writes unfinished: it is for one that hangs.
    """
    try:
        return watcher.wait(timeout=LONGEST_TO_END)
    except subprocess.TimeoutExpired:
        watcher.send_signal(signal.SIGINT)
        return watcher.wait(timeout=LONGEST_TO_END)


def main() -> int:
    """Run the three processes; 0 when scores arrived and the report was written."""
    OUTPUT.mkdir(exist_ok=True)
    report, recording = OUTPUT / "demo.html", OUTPUT / "demo.ndjson"
    recording.unlink(missing_ok=True)
    url = f"udp://127.0.0.1:{free_port(socket.SOCK_DGRAM)}"
    endpoint = f"tcp://127.0.0.1:{free_port(socket.SOCK_STREAM)}"
    command = [sys.executable, "-m", "dgiqa_stream", "watch", url, "--id", "demo", "--quiet"]
    command += ["--publish", endpoint, "--ndjson", str(recording), "--report", str(report)]
    print(f"$ {' '.join(['dgiqa-stream', *command[3:]])}\n")
    print("  pts       mean of one second            mean    min    n  latency   damage on the way")
    with Subscriber(endpoint, streams=("demo",)) as subscriber:
        watcher = subprocess.Popen(command)
        sender = Sender(url)
        try:
            final = follow(subscriber, sender, watcher)
        finally:
            sender.process.terminate()
            code = ended(watcher)
    if final is None or not final.n:
        print("no summary arrived: see the messages above", file=sys.stderr)
        return 1
    pool = {name: value for name, value in final.pool.items() if value is not None}
    print(f"\nsession: {final.n} frames scored by {final.model.id} {final.model.version}", end=" ")
    print(f"({final.model.precision})")
    for name in ("hysteresis", "mean", "low5", "min", "max"):
        if name in pool:
            print(f"  {name:<11}{pool[name]:6.1f}{'  <- headline' * (name == final.headline)}")
    worst = ", ".join(f"{w.score:.0f} at {w.pts_seconds:.1f} s" for w in final.worst[:3])
    print(f"  worst      {worst}\n\nreport: {report}   recording: {recording}")
    return code


if __name__ == "__main__":
    sys.exit(main())
