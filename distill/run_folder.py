"""The files of a training run: written whole or not at all, and taken up again after a kill."""

from __future__ import annotations

import csv
import io
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from dgiqa_stream.errors import ModelError, SinkError
from distill.data.shards import whole_or_none

CHECKPOINT, BEST = "checkpoint.pt", "best.pt"
LOG, VALIDATION = "log.csv", "validation.csv"


class RunFolder:
    """``checkpoint.pt``, ``best.pt``, ``log.csv`` and ``validation.csv`` of one run.

    Raises :class:`SinkError` where something cannot be written; what was there stays.
    """

    def __init__(self, folder: Path) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as exc:
            raise SinkError(f"no run can be kept in {folder}: {exc.strerror}") from exc
        self.folder = folder

    def has_checkpoint(self) -> bool:
        """Whether there is something to go on with."""
        return (self.folder / CHECKPOINT).is_file()

    def load_checkpoint(self) -> dict[str, Any]:
        """The last checkpoint; raises :class:`ModelError` where it cannot be read."""
        path = self.folder / CHECKPOINT
        try:
            state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        except (RuntimeError, pickle.UnpicklingError, EOFError, OSError) as exc:
            raise ModelError(
                f"{path} cannot be read: train in another --run folder, or delete it to begin again"
            ) from exc
        return state

    def save(self, state: Mapping[str, Any], name: str) -> None:
        """Tensors under a name of this module's."""
        made = io.BytesIO()
        torch.save(dict(state), made)  # torch's own writer would hide why a disk refused
        path = self.folder / name
        try:
            with whole_or_none(path) as partial:
                partial.write_bytes(made.getbuffer())
        except OSError as exc:
            raise SinkError(f"{path} cannot be written: {exc.strerror}") from exc

    def log(self, name: str, row: Mapping[str, Any]) -> None:
        """Append a row to a table, its header before the first."""
        path = self.folder / name
        try:
            is_new = not path.exists()
            with path.open("a", newline="") as out:
                writer = csv.DictWriter(out, row.keys(), lineterminator="\n")
                if is_new:
                    writer.writeheader()
                writer.writerow(row)
        except OSError as exc:
            raise SinkError(
                f"{path} cannot be written: {exc.strerror}; make room and run the same command"
            ) from exc

    def forget_after(self, step: int) -> None:
        """Drop what a killed run logged after its last checkpoint: those steps are made again."""
        for name in (LOG, VALIDATION):
            _forget_after(self.folder / name, step)


def _forget_after(path: Path, step: int) -> None:
    if not path.is_file():
        return
    header, *rows = path.read_text().splitlines(keepends=True) or [""]
    kept = [r for r in rows if r.endswith("\n") and int(r.split(",")[0]) <= step]
    if kept:
        with whole_or_none(path) as partial:
            partial.write_text(header + "".join(kept))
    else:
        path.unlink()


def read_table(path: Path) -> dict[str, list[float]]:
    """A table of a run by column; empty where there is none."""
    if not path.is_file():
        return {}
    with path.open(newline="") as rows:
        read = list(csv.DictReader(rows))
    return {name: [float(row[name]) for row in read] for name in (read[0] if read else ())}
