"""Files of made-up data sets, for tests of their loaders; on pytest's path."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path


def table(path: Path, head: str, rows: Iterable[Sequence[object]]) -> None:
    """A CSV file with its head as ``a,b,c``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as out:
        writer = csv.writer(out)
        writer.writerow(head.split(","))
        writer.writerows(rows)


def touch(root: Path, *names: str) -> None:
    """Empty files: loaders name pictures and clips, they do not open them."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
