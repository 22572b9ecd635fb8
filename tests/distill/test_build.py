"""The ladders' pack: every degradation of every clean picture, in its content's split."""

from __future__ import annotations

import json
from collections import defaultdict

import cv2
import numpy as np
import pytest

from distill.data.build import build_ladders, clean_pictures, content_split
from distill.data.degrade import CODEC_LADDERS, PICTURE_LADDERS
from distill.data.loader import ladders_of
from distill.data.packed import Pack

LEVELS = {name: set(range(1, n + 1)) for name, (_, n) in PICTURE_LADDERS.items()}
LEVELS |= {name: set(range(len(rates) + 1)) for name, (_, rates) in CODEC_LADDERS.items()}
LEVELS |= {"clean": {0}}


@pytest.fixture(scope="module")
def pristine(contents, make_picture, tmp_path_factory):
    """One clean picture for each split, as lossless WebP."""
    folder = tmp_path_factory.mktemp("pristine")
    names = [*contents("train", 1), *contents("validation", 1), "clic_1"]
    for i, name in enumerate(names):
        picture = cv2.cvtColor(make_picture(i, 100, 121), cv2.COLOR_RGB2BGR)
        assert cv2.imwrite(str(folder / f"{name}.webp"), picture, [cv2.IMWRITE_WEBP_QUALITY, 101])
    return folder


@pytest.fixture(scope="module")
def pack(pristine, tmp_path_factory):
    """The ladders of both pictures that are not for testing."""
    folder = tmp_path_factory.mktemp("pack")
    build_ladders(pristine, folder, seed=1, made_by="test", workers=1)
    return Pack(folder)


def test_every_level_is_there_once(pack):
    """Each content has its clean picture and every level of every degradation, once."""
    found = defaultdict(list)
    for record in pack.records:
        found[record.content, record.degradation].append(record.level)
    assert len({content for content, _ in found}) == 2
    for (_, degradation), levels in found.items():
        assert sorted(levels) == sorted(LEVELS[degradation])
    assert len(found) == 2 * len(LEVELS)


def test_no_content_is_in_two_splits(pack):
    """All pictures of a content lie in the split that its name alone decides."""
    splits = {(r.content, r.split) for r in pack.records}
    assert len(splits) == 2
    assert {split for _, split in splits} == {"train", "validation"}
    assert all(content_split(f"{content}.webp") == split for content, split in splits)


def test_test_contents_are_never_packed(pack):
    """A picture kept for the final evaluation is in no pack, under whatever seed or share."""
    assert not [r for r in pack.records if r.content.startswith("clic_")]
    assert {content_split(f"clic_{i}.webp", validation_share=1.0) for i in range(99)} == {"test"}


def test_about_the_share_is_for_validation():
    """Of 2,000 names 8 % (within 2 %) are for validation: the checksum spreads evenly."""
    splits = [content_split(f"picture-{i}.webp") for i in range(2000)]
    assert splits.count("validation") / 2000 == pytest.approx(0.08, abs=0.02)
    assert set(splits) == {"train", "validation"}


def test_a_build_repeats(pack, pristine, tmp_path):
    """The same pictures and seed give the same bytes, whatever the number of processes."""
    build_ladders(pristine, tmp_path, seed=1, made_by="test", workers=2)
    again = Pack(tmp_path)
    assert again.records == pack.records
    first, second = ((p.folder / "planes.u8").read_bytes() for p in (pack, again))
    assert first == second


def test_the_index_is_plain_json(pack):
    """Any JSON reader finds what made the pack and with which settings."""
    index = json.loads((pack.folder / "index.json").read_text())
    assert (index["made_by"], index["schema"]) == ("test", "dgiqa.pack/1")
    assert index["settings"] == {"seed": 1, "longest_px": 1088}


def test_ladders_begin_with_a_clean_picture(pack):
    """Every ladder has all its levels in rising order, from a level 0 of its own picture size."""
    for split in ("train", "validation"):
        [by_name] = ladders_of(pack.records, split).values()
        assert set(by_name) == set(LEVELS) - {"clean"}
        for name, ladder in by_name.items():
            assert [r.level for r in ladder] == sorted(LEVELS[name] | {0})
            assert len({pack.planes(r).size for r in ladder}) == 1


def test_a_degraded_picture_differs_from_its_clean_one(pack):
    """No degraded picture was packed as the clean one by mistake, and blur lies near it."""
    by_name = ladders_of(pack.records, "train").popitem()[1]
    for ladder in by_name.values():
        clean = pack.planes(ladder[0]).samples[0].astype(int)
        errors = [np.abs(clean - pack.planes(r).samples[0]).mean() for r in ladder[1:]]
        assert min(errors) > 0
    clean, first, *_ = (pack.planes(r).samples[0].astype(int) for r in by_name["blur"])
    assert np.abs(clean - first).mean() < 8


@pytest.mark.parametrize("names", [[], ["clic_1.webp"], ["a.png"]])
def test_a_folder_without_clean_pictures_is_refused(tmp_path, names):
    """Nothing to degrade is an error that says which files are meant, not an empty pack."""
    for name in names:
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=r"\*\.webp"):
        clean_pictures(tmp_path)
