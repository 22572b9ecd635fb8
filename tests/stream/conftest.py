"""Shared by the tests of the runtime."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import pty
import secrets
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest

from dgiqa_stream.backends.fake import FakeBackend
from dgiqa_stream.manifest import LoadedModel, manifest_path
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


def write_sure_model(path: Path, **fields: Any) -> Path:
    """A model of known numbers and its manifest, to which ``fields`` are added or changed.

    Of its one view, 32 pixels wide and high, the mean of blue over 255 is the quality, that of red
    the spread and that of green unfamiliar. Half an interval is 40 points times the spread, nine
    tenths of mean opinions lie inside, and what has more than half of all green is unfamiliar.
    """
    onnx = pytest.importorskip("onnx")
    made = onnx.helper
    nodes = [
        made.make_node("Cast", ["whole"], ["as_float"], to=onnx.TensorProto.FLOAT),
        made.make_node("ReduceMean", ["as_float", "height_and_width"], ["colour"], keepdims=0),
        made.make_node("Div", ["colour", "steps"], ["shares"]),
        made.make_node(
            "Split", ["shares"], ["spread", "unfamiliar", "quality"], axis=1, num_outputs=3
        ),
    ]
    constants = [
        made.make_tensor("height_and_width", onnx.TensorProto.INT64, [2], [1, 2]),
        made.make_tensor("steps", onnx.TensorProto.FLOAT, [], [255.0]),
    ]
    views = [("whole", onnx.TensorProto.UINT8, ["N", 32, 32, 3])]
    names = ("quality", "spread", "unfamiliar")
    graph = made.make_graph(
        nodes,
        "sure",
        [made.make_tensor_value_info(*view) for view in views],
        [made.make_tensor_value_info(n, onnx.TensorProto.FLOAT, ["N", 1]) for n in names],
        constants,
    )
    opset = made.make_opsetid("", 20)
    model = made.make_model(graph, opset_imports=[opset], ir_version=9)
    onnx.checker.check_model(model)
    content = model.SerializeToString()
    path.write_bytes(content)
    identity_scale = {"raw": [0.0, 1.0], "score": [0.0, 100.0]}
    manifest = {
        "schema": "dgiqa.manifest/2",
        "id": "sure",
        "version": "1.0.0",
        "precision": "fp32",
        "sha256": hashlib.sha256(content).hexdigest(),
        "size_bytes": len(content),
        "licence": "Apache-2.0",
        "num_parameters": 0,
        "preprocess": {
            "views": [{"name": "whole", "kind": "whole", "height": 32, "width": 32}],
            "reduction": "halved-bilinear",
        },
        "output": {"name": "quality", "mapping": identity_scale},
        "calibration": "example-1",
        "made_by": "tests/stream/conftest.py",
        "interval": {
            "output": "spread",
            "mapping": {"spread": [0.0, 1.0], "points": [0.0, 40.0]},
            "coverage": 0.9,
        },
        "domain": {"output": "unfamiliar", "threshold": 0.5},
    }
    kept = {name: value for name, value in {**manifest, **fields}.items() if value is not None}
    manifest_path(path).write_text(json.dumps(kept), encoding="utf-8")
    return path


@pytest.fixture
def sure_model(tmp_path: Path) -> Callable[..., Path]:
    """Writes a model that says how sure it is: see :func:`write_sure_model`."""
    return lambda **fields: write_sure_model(tmp_path / "sure.onnx", **fields)


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
