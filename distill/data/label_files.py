"""Reading what rated sets ship as labels: CSV, Excel, MATLAB and plain text.

An Excel table is read from a CSV export of its sheet beside it where there is one (same name,
``.csv``), else through openpyxl, which is optional.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from dgiqa_stream.errors import ConfigError

MEDIA_SUFFIXES = frozenset(
    [
        ".avi",
        ".bmp",
        ".jpeg",
        ".jpg",
        ".m4v",
        ".mkv",
        ".mov",
        ".mp4",
        ".png",
        ".tif",
        ".tiff",
        ".webm",
        ".webp",
        ".yuv",
        ".y4m",
    ]
)


Missing = Literal["refuse", "leave-out"]
"""What to do where a label has no file."""
HOW_TO_GO_ON = (
    "Complete the set, or go on without them: `--missing leave-out` of `shards`, `teach` or `judge`"
)


@dataclass(frozen=True, slots=True)
class Label:
    """One row of a label file, before its scale is brought to 0..1."""

    path: str
    """Relative to the folder of the set; upper and lower case are the same."""
    content: str
    """The scene: the reference picture where there is one, else the picture itself."""
    value: float
    """MOS or DMOS as the file states it."""
    where: str
    """The row, in words for an error."""
    std: float | None = None
    """Standard deviation of the ratings, in the unit of ``value``."""
    split: str | None = None
    """The official part, where the set has them."""
    degradation: str = ""
    level: int | None = None


def find_file(root: Path, *names: str) -> Path:
    """The first of several names a release has used; raises ``FileNotFoundError`` naming all."""
    for name in names:
        if (root / name).is_file():
            return root / name
    raise FileNotFoundError(f"no {' or '.join(map(repr, names))} in {root}: give the set's folder")


def read_csv(path: Path, *columns: str) -> list[tuple[str, dict[str, str]]]:
    """Where each row is, and its cells by column name in lower case.

    Raises ``ValueError`` where one of ``columns`` is not in the table.
    """
    with path.open(newline="", encoding="utf-8-sig") as lines:
        rows = [row for row in csv.reader(lines) if any(cell.strip() for cell in row)]
    return _named_rows(path, rows, columns)


def _named_rows(
    path: Path, rows: Sequence[Sequence[str]], columns: Sequence[str]
) -> list[tuple[str, dict[str, str]]]:
    head = [cell.strip().lower() for cell in rows[0]] if rows else []
    absent = [c for c in columns if c.lower() not in head]
    if absent:
        raise ValueError(f"{path.name} has no column {absent[0]!r}; its columns are {head}")
    return [
        (f"{path.name}, row {number}", dict(zip(head, map(str.strip, row), strict=False)))
        for number, row in enumerate(rows[1:], 2)
    ]


def read_sheet(path: Path, sheet: str | None, *columns: str) -> list[tuple[str, dict[str, str]]]:
    """Rows of one sheet of an Excel file (None: the first), as :func:`read_csv` gives them.

    The header is the first row with all of ``columns``. Raises :class:`ConfigError` where there is
    neither a CSV export nor openpyxl.
    """
    exported = path.with_suffix(".csv")
    if exported.is_file():
        return read_csv(exported, *columns)
    if not path.is_file():
        raise FileNotFoundError(
            f"neither {path.name!r} nor {exported.name!r} in {path.parent}: give the set's folder"
        )
    try:
        import openpyxl  # type: ignore[import-untyped]
    except ImportError as exc:
        raise ConfigError(
            f"{path.name} needs openpyxl: pip install openpyxl, or export the sheet "
            f"{sheet or '(the first)'} to {exported.name} beside it"
        ) from exc
    book = openpyxl.load_workbook(path, read_only=True, data_only=True)
    try:
        cells = (book[sheet] if sheet else book.worksheets[0]).iter_rows(values_only=True)
        rows = [["" if c is None else str(c) for c in row] for row in cells]
    finally:
        book.close()
    wanted = {c.lower() for c in columns}
    begin = next((i for i, row in enumerate(rows) if wanted <= {c.strip().lower() for c in row}), 0)
    kept = [row for row in rows[begin:] if any(cell.strip() for cell in row)]
    return _named_rows(path, kept, columns)


def read_mat(path: Path) -> Mapping[str, Any]:
    """The variables of a MATLAB file; raises ``FileNotFoundError`` or ``ValueError``."""
    import scipy.io

    if not path.is_file():
        raise FileNotFoundError(f"no {path.name!r} in {path.parent}: give the set's folder")
    try:
        variables: Mapping[str, Any] = scipy.io.loadmat(path)
    except (ValueError, TypeError, NotImplementedError, scipy.io.matlab.MatReadError) as exc:
        raise ValueError(f"{path.name} is not a MATLAB file of version 7 or before: {exc}") from exc
    return variables


def mat_numbers(path: Path, variable: str) -> NDArray[np.float64]:
    """One numeric variable of a MATLAB file as (N,)."""
    return np.asarray(_variable(path, variable), np.float64).reshape(-1)


def mat_texts(path: Path, variable: str) -> list[str]:
    """One cell array of texts of a MATLAB file."""
    cells = np.asarray(_variable(path, variable)).reshape(-1)
    return [str(np.asarray(cell).reshape(-1)[0]) for cell in cells]


def _variable(path: Path, variable: str) -> Any:
    variables = read_mat(path)
    if variable not in variables:
        known = sorted(name for name in variables if not name.startswith("_"))
        raise ValueError(f"{path.name} has no variable {variable!r}; it has {known}")
    return variables[variable]


def number(text: str, where: str) -> float:
    """A cell as a number; raises ``ValueError`` naming row and text."""
    try:
        return float(text)
    except ValueError as exc:
        raise ValueError(f"{where}: {text!r} is not a number") from exc


def media_index(root: Path, folders: Sequence[str]) -> dict[str, Path]:
    """Every picture or clip below some folders of a set, by its relative path in lower case."""
    found: dict[str, Path] = {}
    for folder in folders:
        for path in sorted((root / folder).rglob("*")):
            if path.suffix.lower() in MEDIA_SUFFIXES:
                found[path.relative_to(root).as_posix().lower()] = path
    return found
