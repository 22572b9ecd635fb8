"""Results that appear whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """``write`` is given a file beside ``path``, which then takes its name, or is deleted."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        write(part)
        part.replace(path)
    except BaseException:  # an interrupt too leaves nothing half-written
        part.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """UTF-8."""
    write_whole(path, lambda part: part.write_text(text, encoding="utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Indented; raises ``ValueError`` for NaN and infinities."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")
