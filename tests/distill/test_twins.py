"""Twins: found whatever their name and coding, and never on both sides of a validation split."""

from __future__ import annotations

import csv

import cv2
import numpy as np
import pytest

from distill.data.biq2021 import TABLES, load_biq2021
from distill.data.datasets import RatedItem
from distill.data.loader import PictureSet
from distill.data.packed import Pack, Record, as_planes_420, write_pack
from distill.data.training_data import TrainingData
from distill.data.twins import (
    draw_by_group,
    regrouped,
    thumbnail,
    thumbnail_of,
    twin_groups,
    twin_pairs,
    without_twins,
)

NUM_SCENES = 24


def saved_again(rgb, quality: int):
    """Through JPEG and back."""
    _, coded = cv2.imencode(".jpg", rgb, [cv2.IMWRITE_JPEG_QUALITY, quality])
    return cv2.imdecode(coded, cv2.IMREAD_COLOR)


@pytest.fixture(scope="module")
def scenes(make_picture):
    """Different pictures, soft as photographs of this size are: no colour fills one pixel."""
    sharp = (make_picture(100 + i, 96, 96) for i in range(NUM_SCENES))
    return [np.asarray(cv2.GaussianBlur(s, (0, 0), 2.0), np.uint8) for s in sharp]


@pytest.fixture
def root(tmp_path, scenes):
    """BIQ2021 in small: 24 scenes; each of the first 8 stands there again under another name."""
    (tmp_path / "Images").mkdir()
    names = []
    for i, scene in enumerate([*scenes, *(saved_again(s, 60) for s in scenes[:8])]):
        names.append(f"{i}.png")
        assert cv2.imwrite(str(tmp_path / "Images" / names[-1]), scene)
    for split, part in (("train", names), ("test", ["0.png"])):
        with (tmp_path / TABLES[split]).open("w", newline="") as out:
            rows = [(n if split == "train" else "t.png", 0.5) for n in part]
            csv.writer(out).writerows([("Image Name", "MOS"), *rows])
    assert cv2.imwrite(str(tmp_path / "Images" / "t.png"), scenes[-1][::-1].copy())
    return tmp_path


def test_the_same_picture_saved_again_is_a_twin(scenes):
    """Coded at quality 60, halved or 2 steps lighter, each scene is a twin of itself alone."""
    ours = np.stack([thumbnail(s) for s in scenes])
    half = [cv2.resize(s, (48, 48), interpolation=cv2.INTER_AREA) for s in scenes]
    lighter = [np.clip(s.astype(int) + 2, 0, 255).astype(np.uint8) for s in scenes]
    for others in ([saved_again(s, 60) for s in scenes], half, lighter):
        pairs = twin_pairs(np.stack([thumbnail(s) for s in others]), ours)
        np.testing.assert_array_equal(pairs, [[i, i] for i in range(NUM_SCENES)])


def test_what_differs_is_no_twin(scenes):
    """A mirrored scene, the next one, one 20 steps lighter, and flat greys have no twin."""
    ours = np.stack([thumbnail(s) for s in scenes])
    lighter = np.clip(scenes[0].astype(int) + 20, 0, 255).astype(np.uint8)
    flat = np.full((96, 96, 3), 120, np.uint8)
    for other in (scenes[0][:, ::-1].copy(), lighter, flat):
        assert len(twin_pairs(thumbnail(other)[None], ours)) == 0
    grey = np.stack([thumbnail(flat)] * 2)
    assert len(twin_pairs(grey, grey)) == 0


def test_planes_and_pixels_have_one_thumbnail(scenes):
    """A stored 4:2:0 picture and its RGB differ by 1.5 steps in the mean at most.

    Of the 4 steps that make twins; colour is halved, and two conversions round.
    """
    for scene in scenes[:4]:
        assert np.abs(thumbnail_of(as_planes_420(scene)) - thumbnail(scene)).mean() < 1.5


def test_twins_of_twins_are_one_group():
    """A and B, B and C are twins; A and C alone are not: one group of three, others alone."""
    rng = np.random.default_rng(0)
    first = rng.uniform(40, 200, 768).astype(np.float32)
    between, last = first + np.float32(3), first + np.float32(6)
    other = rng.uniform(40, 200, 768).astype(np.float32)
    rows = np.stack([first, other, between, last])
    pairs = twin_pairs(rows, rows)
    assert [0, 3] not in pairs.tolist()
    groups = twin_groups(rows)
    assert groups[0] == groups[2] == groups[3] != groups[1]


def test_whole_groups_are_drawn():
    """The number is met where singles allow it, no group is cut, and the seed alone decides."""
    groups = [0, 0, 0, 1, 2, 2, *range(3, 20)]
    for seed in range(20):
        chosen = draw_by_group(groups, 6, seed=seed)
        assert len(chosen) == 6
        held = {groups[i] for i in chosen}
        assert {i for i, group in enumerate(groups) if group in held} == chosen
        renamed = [50 - group for group in groups]
        assert draw_by_group(renamed, 6, seed=seed) == chosen
    assert len({frozenset(draw_by_group(groups, 6, seed=s)) for s in range(20)}) > 10


def test_twins_together_leave_no_twin_in_training(root):
    """As many validation pictures as asked for, and every pair of twins is on one side."""
    for seed in range(4):
        rated = load_biq2021(root, num_validation=10, seed=seed, twins_together=True)
        part = {r.path.name: r.split for r in rated}
        assert sum(split == "validation" for split in part.values()) == 10
        assert all(part[f"{i}.png"] == part[f"{NUM_SCENES + i}.png"] for i in range(8))


def test_the_default_split_does_not_know_twins(root):
    """Without the option the validation part is the draw of names it always was."""
    rated = load_biq2021(root, num_validation=10, seed=1)
    wanted = np.random.default_rng(1).choice(range(NUM_SCENES + 8), 10, replace=False)
    found = {r.path.name for r in rated if r.split == "validation"}
    assert found == {f"{i}.png" for i in wanted}


def test_loaded_pictures_are_regrouped(root):
    """As many validation pictures as before, no twins apart, the test part untouched."""
    items = [
        RatedItem(r.path.name, r.path, r.path.name, r.mos, None, r.split)
        for r in load_biq2021(root, num_validation=9, seed=3)
    ]
    made = {item.name: item.split for item in regrouped(items, seed=3)}
    assert sum(split == "validation" for split in made.values()) == 9
    assert all(made[f"{i}.png"] == made[f"{NUM_SCENES + i}.png"] for i in range(8))
    assert made["t.png"] == "test"


def packs_with_twins(folder, scenes) -> TrainingData:
    """Twelve rated scenes, of which the last four are for validation; two stand in training too."""
    rows = [(i, "train" if i < 8 else "validation", scenes[i]) for i in range(12)]
    rows += [(20 + i, "train", saved_again(scenes[8 + i], 50)) for i in range(2)]
    pictures = [
        (Record(f"{i}.png", f"{i}.png", part, mos=0.5), as_planes_420(rgb)) for i, part, rgb in rows
    ]
    write_pack(folder / "rated", pictures, made_by="t", settings={})
    ladder = [
        (Record(f"{c}/{n}", c, "train", degradation="x", level=n), as_planes_420(scenes[n]))
        for c in ("20.png", "0.png")
        for n in range(2)
    ]
    write_pack(folder / "ladders", ladder, made_by="t", settings={})
    rated: PictureSet = Pack(folder / "rated")
    return TrainingData(rated, Pack(folder / "ladders"))


def test_training_twins_of_validation_pictures_are_left_out(tmp_path, scenes, capsys):
    """Two of ten go, with their ladders; the validation part stays; the number is said."""
    data = packs_with_twins(tmp_path, scenes)
    kept = without_twins(data)
    assert "2 of 10 rated training pictures have a twin among 4" in capsys.readouterr().err
    names = {r.name for r in kept.rated.records}
    assert {r.name for r in data.rated.records} - names == {"20.png", "21.png"}
    assert {r.content for r in kept.ladders.records} == {"0.png"}
    assert kept.identity != data.identity
    record = kept.rated.records[0]
    np.testing.assert_array_equal(
        kept.rated.planes(record).samples[0], data.rated.planes(record).samples[0]
    )


def test_nothing_to_compare_drops_nothing(tmp_path, scenes):
    """Without validation pictures the data come back as they are."""
    record = Record("a", "a", "train", mos=0.5)
    for name in ("rated", "ladders"):
        write_pack(tmp_path / name, [(record, as_planes_420(scenes[0]))], made_by="t", settings={})
    data = TrainingData(Pack(tmp_path / "rated"), Pack(tmp_path / "ladders"))
    assert without_twins(data) is data
