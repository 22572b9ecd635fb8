"""How many pictures of BIQ2021's official test part also stand in its training part.

``python benchmarks/shared_pictures.py BIQ2021`` compares 16x16 thumbnails: a twin correlates by
more than 0.99 and differs by less than 4 of 255 steps in the mean, which the same photograph saved
again does and another view of one scene hardly does. Flat pictures (a deviation below 10) are left
out. No rating is read. Prints one line.
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
LEAST_CORRELATION, MOST_DIFFERENCE, LEAST_DEVIATION = 0.99, 4.0, 10.0


def names(table: Path) -> list[str]:
    """The pictures that a table lists."""
    with table.open(encoding="utf-8-sig", newline="") as rows:
        return [row[0] for row in list(csv.reader(rows))[1:]]


def thumbnail(folder: Path, name: str) -> Floats:
    """16x16 means of the picture, flat; the file's suffix may be written otherwise."""
    path = folder / name
    if not path.is_file():
        path = path.with_suffix(path.suffix.swapcase())
    picture = cv2.imread(str(path), cv2.IMREAD_REDUCED_COLOR_4)
    if picture is None:
        sys.exit(f"{folder / name} cannot be read: give the data set's folder")
    small = cv2.resize(picture, (16, 16), interpolation=cv2.INTER_AREA)
    return np.asarray(small, np.float32).ravel()


def unit(rows: Floats) -> Floats:
    """Rows of mean 0 and length 1."""
    centred = rows - rows.mean(1, keepdims=True)
    return centred / np.maximum(np.linalg.norm(centred, axis=1, keepdims=True), 1e-6)


def main() -> None:
    """Count and print."""
    if len(sys.argv) != 2:
        sys.exit("usage: python benchmarks/shared_pictures.py BIQ2021")
    root = Path(sys.argv[1])
    train, test = (
        np.stack(
            [thumbnail(root / "Images", n) for n in names(root / f"{part} (Images and MOS).csv")]
        )
        for part in ("Train", "Test")
    )
    alike = unit(test) @ unit(train).T
    nearest = alike.argmax(1)
    difference = np.abs(test - train[nearest]).mean(1)
    twins = (alike.max(1) > LEAST_CORRELATION) & (difference < MOST_DIFFERENCE)
    twins &= test.std(1) > LEAST_DEVIATION
    print(f"{int(twins.sum())} of {len(test)} test pictures have a twin in training")


if __name__ == "__main__":
    main()
