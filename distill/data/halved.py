"""Rated pictures that become clean sources to degrade when they are halved.

A photograph that was saved as JPEG is no clean picture: its own blocks would be taken for the
scene's. Averaged to half of each side, most of them are gone.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import av
import numpy as np

from dgiqa_stream.errors import ConfigError
from distill.data.build import NOT_A_PICTURE
from distill.data.datasets import RatedItem

SHORTEST_HALVED_PX = 256
"""Of a side, once halved."""
LEAST_MOS = 0.6
"""What people rate lower is blurred, noisy or badly lit, halved or not."""


def clean_when_halved(
    items: Sequence[RatedItem],
    *,
    least_mos: float = LEAST_MOS,
    number: int | None = None,
    seed: int = 0,
) -> list[RatedItem]:
    """Training pictures that are clean sources at half their size, in the order of their names.

    Left out are versions that a set itself degraded, those rated below ``least_mos`` and those
    with a side of less than 512 px. A file that cannot be opened stays: whoever reads it names it.

    Args:
        number: at most so many, drawn with the seed; None takes all.

    Raises ``ConfigError`` where none is left, or for a number that is none.
    """
    if number is not None and number < 1:
        raise ConfigError(f"{number} halved pictures are none: give 1 or more, or leave them out")
    good = [i for i in items if i.split == "train" and not i.degradation and i.mos >= least_mos]
    good = list({item.content: item for item in sorted(good, key=_name, reverse=True)}.values())
    chosen: list[RatedItem] = []
    for place in np.random.default_rng([seed, 23]).permutation(len(good)):
        if number is not None and len(chosen) == number:
            break
        if _shortest_px(good[place].path) >= 2 * SHORTEST_HALVED_PX:
            chosen.append(good[place])
    if not chosen:
        raise ConfigError(
            f"no training picture of {2 * SHORTEST_HALVED_PX} px or more on a side has a MOS of "
            f"{least_mos:g} or more: ask for less"
        )
    return sorted(chosen, key=_name)


def _name(item: RatedItem) -> str:
    return item.name


def _shortest_px(path: Path) -> int:
    """The shorter side by the file's header; plenty where it has none that can be read."""
    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            return min(stream.width, stream.height)
    except (*NOT_A_PICTURE, IndexError):
        return 2 * SHORTEST_HALVED_PX
