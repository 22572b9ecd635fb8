"""GStreamer's own programs with our element, each in a process; on pytest's path."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from media_servers import DEBIAN_PYTHON

import plugins

PACKAGES = (
    "gstreamer1.0-tools gstreamer1.0-plugins-base gstreamer1.0-plugins-good gstreamer1.0-libav "
    "gstreamer1.0-python3-plugin-loader python3-gst-1.0 gir1.2-gst-plugins-base-1.0"
)
PLUGIN_PATH = Path(plugins.__file__).parent / "gstreamer"
APPLICATION = Path(__file__).with_name("gst_application.py")
_ELEMENTS = ("videotestsrc", "videoconvert", "qtdemux", "avdec_h264", "videobalance", "appsink")
_PROBE = f"""
import sys, gi
for name in ("Gst", "GstBase", "GstVideo"):
    gi.require_version(name, "1.0")
from gi.repository import Gst, GstBase, GstVideo
from gi.overrides import _gi_gst
Gst.init(None)
assert all(map(Gst.ElementFactory.find, {_ELEMENTS!r}))
assert Gst.Registry.get().find_plugin("python")
print(*sys.version_info[:2])
"""
_FIELD = re.compile(r'([\w.-]+)=\((\w+)\)("(?:[^"\\]|\\.)*"|[^,;]+)')
_READ: dict[str, Callable[[str], Any]] = {
    "gint64": int,
    "double": float,
    "boolean": lambda text: text == "true",
}


class Posted(NamedTuple):
    """An element message."""

    name: str
    fields: dict[str, Any]


class Launched(NamedTuple):
    """What ``gst-launch-1.0 -m`` came to."""

    code: int
    messages: list[Posted]
    """Those of our element, in order."""
    said: str


def require_gstreamer(missing: Callable[[str, str], None], folder: Path) -> dict[str, str]:
    """The environment in which GStreamer finds the element; skips or fails without GStreamer.

    GStreamer embeds the system's Python, which can only use packages made for its own version.
    """
    if not Path(DEBIAN_PYTHON).exists():
        missing("GStreamer for Python", PACKAGES)
    asked = subprocess.run(
        [DEBIAN_PYTHON, "-c", _PROBE], capture_output=True, text=True, check=False,
        env={**os.environ, "PATH": _system_path(), "GST_REGISTRY": str(folder / "probe.bin")},
    )  # fmt: skip
    if asked.returncode:
        missing("GStreamer with Python", PACKAGES)
    version = tuple(map(int, asked.stdout.split()[-2:]))
    if version != sys.version_info[:2]:
        pytest.skip(f"GStreamer embeds Python {version}, these packages are for another one")
    needed = ("plugins", "dgiqa_stream", "numpy", "cv2", "onnxruntime", "msgspec")
    origins = [importlib.util.find_spec(name).origin for name in needed]
    homes = dict.fromkeys(str(Path(origin).parents[1]) for origin in origins)
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("DGIQA", "GST"))}
    return {
        **kept,
        "PATH": _system_path(),
        "PYTHONPATH": os.pathsep.join(homes),
        "GST_PLUGIN_PATH": str(PLUGIN_PATH),
        "GST_REGISTRY": str(folder / "registry.bin"),  # nobody's own is touched
        "OMP_NUM_THREADS": "1",
    }


def _system_path() -> str:
    """Without this Python's own folder: GStreamer's would take a virtual environment for its."""
    own = Path(sys.executable).parent
    folders = os.environ["PATH"].split(os.pathsep)
    return os.pathsep.join(folder for folder in folders if Path(folder) != own)


def launch(
    environment: dict[str, str], pipeline: str, *, timeout_seconds: float = 180.0
) -> Launched:
    """Run a pipeline to its end."""
    done = subprocess.run(
        ["gst-launch-1.0", "-m", *pipeline.split()],
        capture_output=True, text=True, env=environment, timeout=timeout_seconds, check=False,
    )  # fmt: skip
    said = done.stdout + done.stderr
    assert "Traceback" not in said, said
    return Launched(done.returncode, posted(done.stdout), said)


def posted(text: str) -> list[Posted]:
    """The messages of our element in what ``gst-launch-1.0 -m`` prints."""
    found = []
    for match in re.finditer(r"\(element\): (dgiqa-\w+), (.*)", text):
        fields = {
            name: _READ.get(kind, lambda text: text.strip('"'))(value)
            for name, kind, value in _FIELD.findall(match[2])
        }
        found.append(Posted(match[1], fields))
    return found


def application(
    environment: dict[str, str], scene: str, *arguments: object, timeout_seconds: float = 240.0
) -> list[dict[str, Any]]:
    """What a scene of ``gst_application.py`` reports, line by line."""
    done = subprocess.run(
        [DEBIAN_PYTHON, str(APPLICATION), scene, *map(str, arguments)],
        capture_output=True, text=True, env=environment, timeout=timeout_seconds, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]
