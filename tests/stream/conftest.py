"""Shared by the tests of the runtime."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
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
        timeout_seconds: float = 60.0,
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
