"""Large clean pictures of small ones: which go in, how they lie, and that they are the same."""

from __future__ import annotations

import numpy as np
import pytest

from dgiqa_stream.errors import ConfigError
from distill.data.build import content_split
from distill.data.mosaics import LAYOUTS, layout_of, write_mosaics
from distill.data.shards import decode_picture, encode_picture


@pytest.fixture(scope="module")
def pristine(contents, tmp_path_factory):
    """Twelve grey pictures of each split, training ones below 100 and validation ones above."""
    folder = tmp_path_factory.mktemp("pristine")
    for split, least in (("train", 20), ("validation", 150)):
        for i, name in enumerate(contents(split, 12)):
            grey = np.full((512, 512, 3), least + 5 * i, np.uint8)
            (folder / f"{name}.webp").write_bytes(encode_picture(grey))
    (folder / "clic_1.webp").write_bytes(encode_picture(np.zeros((512, 512, 3), np.uint8)))
    return folder


def split_with(number, split):
    """The number of the first mosaic of a split."""
    return next(i for i in range(number) if content_split(f"mosaic_{i:03d}.webp") == split)


@pytest.mark.parametrize("split", ["train", "validation"])
def test_a_mosaic_is_of_different_pictures_of_its_split(pristine, tmp_path, split):
    """The layout's places show one picture each, none twice, none of the other split or of the test
    pictures, and nothing is left black.
    """
    (path,) = write_mosaics(tmp_path, pristine, number=1, first=split_with(200, split))
    rgb = decode_picture(path.read_bytes())
    (layout,) = [e for e in LAYOUTS if e[:2] == rgb.shape[:2]]
    strips = np.array_split(rgb, layout[2], axis=0)
    places = [place for strip in strips for place in np.array_split(strip, layout[3], axis=1)]
    greys = [np.unique(place).tolist() for place in places]
    assert all(len(found) == 1 for found in greys)
    levels = [found[0] for found in greys]
    assert len(set(levels)) == len(levels)
    assert all((level < 100) == (split == "train") and level for level in levels)


def test_equal_arguments_give_equal_files(pristine, tmp_path):
    """A second time, with or without others, a mosaic has the same bytes; another seed's differ."""
    first = write_mosaics(tmp_path / "a", pristine, number=3, seed=4)
    again = write_mosaics(tmp_path / "b", pristine, number=1, first=2, seed=4)
    other = write_mosaics(tmp_path / "c", pristine, number=1, first=2, seed=5)
    assert [path.name for path in first] == [
        "mosaic_000.webp",
        "mosaic_001.webp",
        "mosaic_002.webp",
    ]
    assert again[0].read_bytes() == first[2].read_bytes() != other[0].read_bytes()


def test_a_part_is_magnified_by_as_much_as_was_asked_for(tmp_path, contents):
    """A place shows its picture enlarged by 1 to 1.6 times: stripes of 8 px become 8 to 12.8 px."""
    name = contents("train", 1)[0]
    stripes = np.repeat(np.arange(64) % 2 * 200, 8).astype(np.uint8)
    rgb = np.broadcast_to(stripes[None, :, None], (512, 512, 3)).copy()
    (tmp_path / f"{name}.webp").write_bytes(encode_picture(rgb))
    widths = []
    for number in range(12):
        if content_split(f"mosaic_{number:03d}.webp") != "train":
            continue
        (path,) = write_mosaics(
            tmp_path / "out", tmp_path, number=1, first=number, layouts=[(256, 256, 1, 1)]
        )
        line = decode_picture(path.read_bytes())[128, :, 0].astype(int)
        edges = np.flatnonzero(np.diff(line > 100))
        widths.append(np.diff(edges).mean())
    assert min(widths) > 7.5
    assert max(widths) < 13.3
    assert max(widths) - min(widths) > 1


def test_a_small_picture_is_enlarged_as_far_as_is_allowed(tmp_path, contents):
    """128 px fill a place of 256 by 2 times or more; where 1.9 is the most, they do not."""
    name = contents("train", 1)[0]
    ramp = np.arange(128, dtype=np.uint8)[None, :, None]
    rgb = np.broadcast_to(ramp, (128, 128, 3)).copy()
    (tmp_path / f"{name}.webp").write_bytes(encode_picture(rgb))
    number = split_with(200, "train")
    asked = {"number": 1, "first": number, "layouts": [(256, 256, 1, 1)]}
    (path,) = write_mosaics(tmp_path / "out", tmp_path, largest_magnification=3.0, **asked)
    steps = np.diff(decode_picture(path.read_bytes())[128, 4:-4, 0].astype(float)).mean()
    assert 1 / 3.05 < steps < 1 / 1.95
    with pytest.raises(ConfigError, match=r"fill 256x256, magnified 1\.9 times"):
        write_mosaics(tmp_path / "out", tmp_path, largest_magnification=1.9, **asked)


def test_too_few_and_too_small_pictures_are_refused(tmp_path, contents):
    """No picture that fills a place, no picture at all, and a number that is none: each is told."""
    small = np.zeros((128, 128, 3), np.uint8)
    for split in ("train", "validation"):
        for name in contents(split, 3):
            (tmp_path / f"{name}.webp").write_bytes(encode_picture(small))
    with pytest.raises(ConfigError, match="too few clean pictures of"):
        write_mosaics(tmp_path / "out", tmp_path, number=1)
    assert not list((tmp_path / "out").iterdir())
    with pytest.raises(ConfigError, match="0 mosaics from 0 on"):
        write_mosaics(tmp_path / "out", tmp_path, number=0)
    with pytest.raises(FileNotFoundError, match="no clean pictures"):
        write_mosaics(tmp_path / "out", tmp_path / "out", number=1)
    with pytest.raises(ConfigError, match=r"magnified 0\.5 times: give 1 to 8"):
        write_mosaics(tmp_path / "out", tmp_path, number=1, largest_magnification=0.5)


@pytest.mark.parametrize("text", ["540x960", "540x960x2x0", "541x960x2x2", "540x960x9x2", "axbxc"])
def test_a_layout_that_is_none_is_refused(text):
    """What is not four numbers, or leaves a picture less than 64 px, is named with what to give."""
    assert layout_of("540x960x2x3") == (540, 960, 2, 3)
    with pytest.raises(ConfigError, match=f"'{text}'"):
        layout_of(text)
