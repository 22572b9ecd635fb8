"""docs/edge.md: each command that can run here runs; the others name options that exist."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("onnx")
pytest.importorskip("torch")

import dgiqa_stream

PAGE = Path(os.environ.get("DGIQA_CHECKOUT", Path(__file__).parents[2])) / "docs" / "edge.md"
PROGRAMS = {"dgiqa-stream": "dgiqa_stream", "dgiqa-quant": "quant.cli"}
BASH = shutil.which("bash")

pytestmark = pytest.mark.skipif(
    not PAGE.is_file(), reason="needs the checkout; DGIQA_CHECKOUT names it"
)


def commands(*, runnable: bool) -> list[list[str]]:
    """The commands of each console block that is marked so, or is not, lines joined."""
    text = PAGE.read_text(encoding="utf-8") if PAGE.is_file() else ""
    found = []
    for marks, code in re.findall(r"^```console([^\n]*)\n(.*?)^```", text, re.M | re.S):
        if ("runnable" in marks) == runnable:
            lines = code.replace("\\\n", " ").splitlines()
            found.append([line[2:] for line in lines if line.startswith("$ ")])
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with ``clip.mp4`` and programs of this environment, of whatever is under test."""
    made = tmp_path_factory.mktemp("edge")
    (made / "bin").mkdir()
    for name, module in PROGRAMS.items():
        program = made / "bin" / name
        program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m {module} "$@"\n')
        program.chmod(0o755)
    (made / "bin" / "python3").symlink_to(sys.executable)
    _write_clip(made / "clip.mp4")
    return made


def _write_clip(path: Path) -> None:
    """Half a second of a moving ramp."""
    import av
    import numpy as np

    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt = 320, 180, "yuv420p"
        ramp = np.arange(320)[None, :] + np.arange(180)[:, None]
        for number in range(12):
            grey = ((ramp + 4 * number) % 256).astype(np.uint8)
            frame = av.VideoFrame.from_ndarray(np.repeat(grey[..., None], 3, 2), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


@pytest.mark.slow
@pytest.mark.skipif(BASH is None, reason="needs bash")
@pytest.mark.parametrize("block", commands(runnable=True), ids=lambda b: b[0].split()[0])
def test_the_commands_of_the_page_run(folder, block):
    """Each line of a block marked runnable ends with exit code 0, in their order."""
    packages = str(Path(dgiqa_stream.__file__).parents[1])
    paths = os.pathsep.join([packages, os.environ.get("PYTHONPATH", "")])
    env = os.environ | {
        "PATH": f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": paths,
    }
    for line in block:
        done = subprocess.run(
            [BASH, "-c", line], cwd=folder, env=env, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, f"{line}\n{done.stderr}"


def options_of(words: list[str]) -> set[str]:
    """The options that a command of this project has."""
    from typer.main import get_command

    if words[0] == "dgiqa-stream":
        from dgiqa_stream.cli._app import app
    else:
        from quant.cli import app
    command = get_command(app).commands[words[1]]
    return {name for p in command.params for name in (*p.opts, *p.secondary_opts)}


OURS = [
    shlex.split(line[line.index("dgiqa-") :], comments=True)
    for runnable in (True, False)
    for block in commands(runnable=runnable)
    for line in block
    if re.search(r"(^|/|\s)dgiqa-(stream|quant) ", line)
]


@pytest.mark.parametrize("words", OURS, ids=lambda w: " ".join(w[:3]))
def test_the_page_names_options_that_exist(words):
    """Each command of this project on the page, run here or not, has the options it is given."""
    given = {word.partition("=")[0] for word in words if re.match(r"--?[a-z]", word)}
    assert given <= options_of(words)


def test_the_profiles_are_the_students():
    """The shapes given to trtexec are the shipped student's views."""
    from dgiqa_stream.manifest import load_model

    views = load_model("student-fp32").manifest.preprocess.views
    wanted = {f"{v.name}:{'x'.join(map(str, v.shape))}" for v in views}
    found = set(re.findall(r"(whole|fragments):\d+x([\dx]+)", PAGE.read_text(encoding="utf-8")))
    assert {f"{name}:{shape}" for name, shape in found} == wanted


def test_the_page_is_run_and_tells_what_is_not():
    """The page has blocks that run and blocks that need a board."""
    assert len(commands(runnable=True)) >= 4
    assert any("trtexec" in line for block in commands(runnable=False) for line in block)
