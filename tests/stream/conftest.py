"""Shared by the tests of the runtime."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import pty
import secrets
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest

from dgiqa_stream.backends.fake import FakeBackend
from dgiqa_stream.manifest import LoadedModel
from dgiqa_stream.scorer import Scorer


@pytest.fixture(scope="session")
def peers() -> ModuleType:
    """``wire_peers.py``: values for messages, and the other end of a socket as a process."""
    path = Path(__file__).with_name("wire_peers.py")
    spec = importlib.util.spec_from_file_location("wire_peers", path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules.setdefault(spec.name, importlib.util.module_from_spec(spec))
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def fake_scorer(peers: ModuleType) -> Scorer:
    """Mean brightness as the score, 0 to 100; needs no model file."""
    return Scorer(LoadedModel(Path("fake.onnx"), peers.MANIFEST), FakeBackend())


class CommandLine(NamedTuple):
    """What one call of the command line came to."""

    code: int
    out: str
    err: str


@pytest.fixture(scope="session")
def plain_environment() -> dict[str, str]:
    """The environment without settings of this package, and in UTF-8."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("DGIQA_")}
    return {**kept, "PYTHONUTF8": "1"}


@pytest.fixture(scope="session")
def run_cli(plain_environment: dict[str, str]) -> Callable[..., CommandLine]:
    """Run ``python -m dgiqa_stream`` to its end; a hang or a traceback is a failure."""

    def run(
        *arguments: str | Path,
        stdin: bytes = b"",
        timeout_seconds: float = 120.0,
        environment: dict[str, str] | None = None,
        command: Sequence[str] = (sys.executable, "-m", "dgiqa_stream"),
    ) -> CommandLine:
        done = subprocess.run(
            [*command, *map(str, arguments)],
            input=stdin,
            capture_output=True,
            timeout=timeout_seconds,
            check=False,
            env={**plain_environment, **(environment or {})},
        )
        found = CommandLine(done.returncode, done.stdout.decode(), done.stderr.decode())
        assert "Traceback" not in found.err, found.err
        return found

    return run


@pytest.fixture(scope="session")
def run_on_terminal(plain_environment: dict[str, str]) -> Callable[..., CommandLine]:
    """Run ``python -m dgiqa_stream`` with standard error on a terminal of 100 columns."""

    def run(*arguments: str | Path) -> CommandLine:
        here, there = pty.openpty()
        process = subprocess.Popen(
            [sys.executable, "-m", "dgiqa_stream", *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=there,
            env={**plain_environment, "TERM": "xterm", "COLUMNS": "100"},
        )
        os.close(there)
        shown = b""
        with contextlib.suppress(OSError):  # the terminal's other end is closed
            while part := os.read(here, 1 << 16):
                shown += part
        os.close(here)
        out, _ = process.communicate(timeout=60)
        assert b"Traceback" not in shown, shown
        return CommandLine(process.returncode, out.decode(), shown.decode())

    return run


def _first_outgoing_port() -> int:
    """From here on the system gives ports to connections that ask for none."""
    try:
        return int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    except OSError:
        return 32768


@pytest.fixture(scope="session")
def free_port() -> Callable[..., int]:
    """Finds a port that nobody uses, below those that the system may give to anybody meanwhile.

    A connection that is tried again and again on one of those can even meet itself. For RTP, which
    takes two, the lower one of an even pair.
    """

    def find(kind: socket.SocketKind = socket.SOCK_STREAM) -> int:
        end = max(12_000, _first_outgoing_port() - 1)
        while True:
            port = 10_000 + 2 * secrets.randbelow((end - 10_000) // 2)
            with (
                contextlib.suppress(OSError),
                socket.socket(type=kind) as one,
                socket.socket(type=kind) as two,
            ):
                one.bind(("127.0.0.1", port))
                two.bind(("127.0.0.1", port + 1))
                return port

    return find


@pytest.fixture(scope="session")
def refused() -> Iterator[int]:
    """A local port that refuses connections: it is taken, and nobody listens there."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        yield held.getsockname()[1]
