"""How many pictures of BIQ2021's official test part also stand in its training part.

``python benchmarks/shared_pictures.py BIQ2021`` compares thumbnails (``distill/data/twins.py``). No
rating is read. Prints one line.
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import cv2
import numpy as np

from distill.data.twins import Floats, thumbnail, twin_pairs


def names(table: Path) -> list[str]:
    """The pictures that a table lists."""
    with table.open(encoding="utf-8-sig", newline="") as rows:
        return [row[0] for row in list(csv.reader(rows))[1:]]


def read(folder: Path, name: str) -> Floats:
    """A picture's thumbnail; the file's suffix may be written otherwise."""
    path = folder / name
    if not path.is_file():
        path = path.with_suffix(path.suffix.swapcase())
    picture = cv2.imread(str(path), cv2.IMREAD_REDUCED_COLOR_4)
    if picture is None:
        sys.exit(f"{folder / name} cannot be read: give the data set's folder")
    return thumbnail(np.asarray(picture, np.uint8))


def main() -> None:
    """Count and print."""
    if len(sys.argv) != 2:
        sys.exit("usage: python benchmarks/shared_pictures.py BIQ2021")
    root = Path(sys.argv[1])
    train, test = (
        np.stack([read(root / "Images", n) for n in names(root / f"{part} (Images and MOS).csv")])
        for part in ("Train", "Test")
    )
    twins = {int(place) for place, _ in twin_pairs(test, train)}
    print(f"{len(twins)} of {len(test)} test pictures have a twin in training")


if __name__ == "__main__":
    main()
