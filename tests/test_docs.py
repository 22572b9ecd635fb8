"""README and docs: links resolve, Python compiles, what is marked runnable runs.

A block that opens with three backticks and ``python runnable`` is run in a fresh interpreter, in a
folder that holds ``clip.mp4`` (two seconds, 320x180, 25 frames a second).
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

import dgiqa_stream

HERE = Path(__file__).parents[1]
CHECKOUT = Path(os.environ.get("DGIQA_CHECKOUT", HERE))
TOP = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")
PAGES = [*(HERE / name for name in TOP), *sorted((HERE / "docs").rglob("*.md"))]
FENCE = re.compile(r"^( *)```([^\n`]*)\n(.*?)^\1```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)(?:\s+\"[^\"]*\")?\)")


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block of a page."""

    page: str
    line: int
    language: str
    marks: tuple[str, ...]
    code: str

    def __str__(self) -> str:
        """Where it stands, for the names of tests."""
        return f"{self.page}:{self.line}"


def blocks() -> list[Block]:
    """Every fenced block of every page."""
    found = []
    for page in PAGES:
        if not page.is_file():
            continue  # test_pages_exist tells
        text = page.read_text(encoding="utf-8")
        for match in FENCE.finditer(text):
            language, *marks = match[2].split() or [""]
            line = text.count("\n", 0, match.start()) + 1
            code = re.sub(rf"^{match[1]}", "", match[3], flags=re.MULTILINE)
            found.append(Block(page.name, line, language, tuple(marks), code))
    return found


def headings(text: str) -> set[str]:
    """The anchors that GitHub makes from a page's headings."""
    titles = re.findall(r"^#+ +(.+?) *#*$", FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


PYTHON_BLOCKS = [b for b in blocks() if b.language in ("python", "py")]
RUNNABLE = [b for b in PYTHON_BLOCKS if "runnable" in b.marks]


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory) -> Path:
    """A folder with ``clip.mp4``: a moving grey ramp."""
    import av

    folder = tmp_path_factory.mktemp("docs")
    with av.open(str(folder / "clip.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt = 320, 180, "yuv420p"
        stream.time_base = Fraction(1, 25)
        ramp = np.arange(320)[None, :] + np.arange(180)[:, None]
        for number in range(50):
            grey = ((ramp + 4 * number) % 256).astype(np.uint8)
            frame = av.VideoFrame.from_ndarray(np.repeat(grey[..., None], 3, 2), format="rgb24")
            frame.pts = number
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return folder


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_pages_exist(page):
    """The pages that every project should have are here and say something."""
    assert len(page.read_text(encoding="utf-8").split()) > 50


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_relative_links_resolve(page):
    """Each relative link leads to a file of the repository, and each anchor to a heading of it."""
    text = page.read_text(encoding="utf-8")
    broken = []
    for target in LINK.findall(FENCE.sub("", text)):
        if re.match(r"[a-z][a-z+.-]*:", target):
            continue  # the web: not ours to keep
        name, _, anchor = target.partition("#")
        path = CHECKOUT / page.relative_to(HERE).parent / name if name else page
        known = headings(path.read_text("utf-8")) if anchor and path.is_file() else {anchor}
        if not path.exists() or anchor not in known:
            broken.append(target)
    assert broken == []


@pytest.mark.parametrize("block", PYTHON_BLOCKS, ids=str)
def test_python_in_the_docs_compiles(block):
    """Each Python block of the docs is valid Python."""
    compile(block.code, str(block), "exec")


@pytest.mark.parametrize("block", RUNNABLE, ids=str)
def test_python_in_the_docs_runs(block, clip_folder):
    """Each Python block marked runnable runs to its end without a warning."""
    env = os.environ | {"PYTHONPATH": str(Path(dgiqa_stream.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", block.code],
        cwd=clip_folder, env=env, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "block", [b for b in blocks() if b.language in ("toml", "json")], ids=str
)  # fmt: skip
def test_data_in_the_docs_parses(block):
    """Each TOML or JSON block of the docs can be read by its parser."""
    import json
    import tomllib

    {"toml": tomllib.loads, "json": json.loads}[block.language](block.code)


def test_make_targets_in_the_docs_exist():
    """Whoever types a ``make`` command from the docs finds that target."""
    makefile = CHECKOUT / "Makefile"
    if not makefile.is_file():
        pytest.skip("needs the checkout; DGIQA_CHECKOUT names it")
    targets = set(re.findall(r"^([a-z-]+):", makefile.read_text(encoding="utf-8"), re.MULTILINE))
    used = {
        name
        for page in PAGES
        for name in re.findall(r"(?:^|`)make ([a-z-]+)", page.read_text("utf-8"), re.MULTILINE)
    }
    assert {"test", "demo"} <= used
    assert used <= targets


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_no_page_waits_for_a_number(page):
    """No spot that was left for a measured number is still empty."""
    assert re.findall(r"<!-- fill: .*?-->", page.read_text(encoding="utf-8")) == []
