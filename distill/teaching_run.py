"""What a run leaves on disk while it goes on: checkpoints and curves that survive a kill."""

from __future__ import annotations

import csv
import hashlib
from pathlib import Path
from typing import Any

import msgspec
import torch

from distill.data.shards import whole_or_none


def save_state(state: dict[str, Any], path: Path) -> None:
    """Tensors and numbers, whole or not at all: a kill leaves the old file as it was.

    Raises :class:`SinkError` on a full disk.
    """
    with whole_or_none(path) as partial:
        torch.save(state, partial)


def log_row(path: Path, row: dict[str, float]) -> None:
    """One row of a curve; the first writes the header."""
    is_new = not path.exists()
    with path.open("a", newline="") as out:
        writer = csv.DictWriter(out, row.keys(), lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerow(row)


def forget_after(path: Path, step: int) -> None:
    """Drop what a killed run logged after its last checkpoint: those steps are made again."""
    if not path.is_file():
        return
    header, *rows = path.read_text().splitlines(keepends=True) or [""]
    kept = [r for r in rows if r.endswith("\n") and int(r.split(",")[0]) <= step]
    if kept:
        with whole_or_none(path) as partial:
            partial.write_text(header + "".join(kept))
    else:
        path.unlink()


def digest_of(about: object) -> str:
    """SHA-256 of plain values as JSON."""
    return hashlib.sha256(msgspec.json.encode(about)).hexdigest()
