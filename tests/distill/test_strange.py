"""Pictures of kinds that nobody rated: each from its seed, and unlike the others."""

from __future__ import annotations

import numpy as np
import pytest

from distill.data.strange import KINDS, strange_picture

SIDE = 128


def draw(kind: str, number: int) -> np.ndarray:
    """A picture of a kind."""
    return strange_picture(kind, seed=(3, number), side_px=SIDE)


@pytest.fixture(autouse=True)
def pillow():
    """Half of the writing is Pillow's."""
    pytest.importorskip("PIL")


@pytest.mark.parametrize("kind", KINDS)
def test_a_seed_gives_one_picture_and_another_seed_another(kind):
    """Whatever its coding, a picture is its seed's, bit by bit, uint8 (side, side, 3); of four
    seeds no two give the same.
    """
    pictures = [draw(kind, number) for number in range(4)]
    assert {(p.shape, str(p.dtype)) for p in pictures} == {((SIDE, SIDE, 3), "uint8")}
    for number, picture in enumerate(pictures):
        np.testing.assert_array_equal(picture, draw(kind, number))
    assert len({p.tobytes() for p in pictures}) == len(pictures)


@pytest.mark.parametrize("kind", sorted(set(KINDS) - {"flats", "ramps", "grain"}))
def test_something_is_drawn(kind):
    """But for those that may be plain, three pictures of four have two places whose channels are
    60 steps apart.
    """
    apart = [np.ptp(draw(kind, n).reshape(-1, 3).astype(int), axis=0).max() for n in range(4)]
    assert sum(int(steps) >= 60 for steps in apart) >= 3


def test_an_unknown_kind_is_named():
    """The error names the kind and those that there are."""
    with pytest.raises(ValueError, match=r"'cats'.*pages"):
        draw("cats", 0)
