"""Prints what a shell must set so that GStreamer finds the element: ``eval "$(...)"``."""

from __future__ import annotations

import importlib.util
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

_NEEDED = ("dgiqa_stream", "plugins", "numpy", "msgspec", "cv2", "onnxruntime")


def variables() -> dict[str, str]:
    """``GST_PLUGIN_PATH`` and ``PYTHONPATH``, each before what is already there."""
    here = Path(__file__).resolve().parent
    return {
        "GST_PLUGIN_PATH": _before("GST_PLUGIN_PATH", [str(here)]),
        "PYTHONPATH": _before("PYTHONPATH", _homes()),
    }


def _homes() -> list[str]:
    """The folders that hold this package and what it needs, each once."""
    found = []
    for name in _NEEDED:
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:
            sys.exit(f"error: {name} is not installed for {sys.executable}")
        found.append(str(Path(spec.origin).parents[1]))
    return list(dict.fromkeys(found))


def _before(variable: str, folders: Sequence[str]) -> str:
    present = [part for part in os.environ.get(variable, "").split(os.pathsep) if part]
    return os.pathsep.join(dict.fromkeys([*folders, *present]))


def main() -> None:
    """Print ``export`` lines, and on standard error for which Python they are."""
    for name, value in variables().items():
        sys.stdout.write(f"export {name}={shlex.quote(value)}\n")
    version = ".".join(map(str, sys.version_info[:2]))
    sys.stderr.write(f"for a GStreamer that embeds Python {version}\n")
    if "VIRTUAL_ENV" in os.environ:
        sys.stderr.write(
            "deactivate your virtual environment: GStreamer would take it for its own\n"
        )


if __name__ == "__main__":
    main()
