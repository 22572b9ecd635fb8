"""BIQ2021 in its official layout, in a few pixels."""

from __future__ import annotations

import csv
from collections import Counter

import cv2
import pytest

from distill.data.biq2021 import TABLES, load_biq2021
from distill.data.build import build_rated
from distill.data.packed import Pack

NUM_TRAIN, NUM_TEST = 20, 6


def write_table(root, split, rows):
    """One official table; the published ones have two empty columns at the end."""
    with (root / TABLES[split]).open("w", newline="") as out:
        writer = csv.writer(out)
        writer.writerow(["Image Name", "MOS", "", ""])
        writer.writerows([name, mos, "", ""] for name, mos in rows)


@pytest.fixture
def root(tmp_path, make_picture):
    """20 training and 6 test pictures; the table says ``a (3).jpg``, the file is ``A (3).JPG``."""
    (tmp_path / "Images").mkdir()
    names = [f"a ({i}).jpg" for i in range(NUM_TRAIN + NUM_TEST)]
    for i, name in enumerate(names):
        stored = name.replace("a (3).jpg", "A (3).JPG")
        assert cv2.imwrite(str(tmp_path / "Images" / stored), make_picture(i, 64, 80))
    rows = [(name, f"{i / 30:.4f}") for i, name in enumerate(names)]
    write_table(tmp_path, "train", rows[:NUM_TRAIN])
    write_table(tmp_path, "test", rows[NUM_TRAIN:])
    return tmp_path


def test_every_picture_is_in_one_split(root):
    """All pictures are found, each once, and the splits have the sizes that were asked for."""
    rated = load_biq2021(root, num_validation=5, seed=1)
    assert Counter(r.split for r in rated) == {"train": 15, "validation": 5, "test": NUM_TEST}
    assert len({r.path for r in rated}) == NUM_TRAIN + NUM_TEST


def test_a_suffix_in_capitals_is_found(root):
    """The picture whose file name is in capitals keeps the MOS of its row."""
    by_name = {r.path.name: r.mos for r in load_biq2021(root, num_validation=5, seed=1)}
    assert by_name["A (3).JPG"] == pytest.approx(3 / 30, abs=1e-4)


def test_the_test_part_is_the_official_one(root):
    """No draw moves a picture into or out of the official test part."""
    for seed in range(5):
        rated = load_biq2021(root, num_validation=10, seed=seed)
        tests = {r.path.name for r in rated if r.split == "test"}
        assert tests == {f"a ({i}).jpg" for i in range(NUM_TRAIN, NUM_TRAIN + NUM_TEST)}


def test_validation_is_drawn_by_the_seed_alone(root):
    """One seed gives one validation part, another seed another."""

    def drawn(seed):
        rated = load_biq2021(root, num_validation=5, seed=seed)
        return {r.path.name for r in rated if r.split == "validation"}

    assert drawn(1) == drawn(1)
    assert len({frozenset(drawn(seed)) for seed in range(6)}) > 1


def test_missing_pictures_are_counted_and_named(root):
    """Two missing files are reported as two, with the first one's name."""
    for i in (7, 9):
        (root / "Images" / f"a ({i}).jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"2 pictures .*'a \(7\)\.jpg'"):
        load_biq2021(root, num_validation=5, seed=1)


def test_missing_pictures_can_be_left_out_and_move_no_other(root, capsys):
    """Without two files the other 24 keep the splits they have with them, and it is said."""
    whole = {r.path.name: r.split for r in load_biq2021(root, num_validation=5, seed=1)}
    for name in ("a (7).jpg", "a (21).jpg"):
        (root / "Images" / name).unlink()
        del whole[name]
    rated = load_biq2021(root, num_validation=5, seed=1, missing="leave-out")
    assert {r.path.name: r.split for r in rated} == whole
    assert "2 pictures of BIQ2021 have no file and are left out" in capsys.readouterr().err
    with pytest.raises(FileNotFoundError, match=r"2 pictures .*--missing leave-out"):
        load_biq2021(root, num_validation=5, seed=1)
    for path in (root / "Images").iterdir():
        path.unlink()
    with pytest.raises(FileNotFoundError, match="26 pictures"):
        load_biq2021(root, num_validation=5, seed=1, missing="leave-out")


@pytest.mark.parametrize("mos", ["1.2", "-0.1", "nan"])
def test_a_mos_outside_the_scale_is_refused(root, mos):
    """A rating outside 0..1 stops the load with its value and its picture."""
    write_table(root, "test", [("a (20).jpg", mos)])
    with pytest.raises(ValueError, match=rf"{mos} of a \(20\)\.jpg is outside 0\.\.1"):
        load_biq2021(root, num_validation=5, seed=1)


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_missing_table_is_named(root, split):
    """Without one of the tables the error says which."""
    (root / TABLES[split]).unlink()
    with pytest.raises(FileNotFoundError, match=TABLES[split].split()[0]):
        load_biq2021(root, num_validation=5, seed=1)


@pytest.mark.parametrize("text", ["name,score\na (1).jpg,0.5\n", "Image Name,MOS\na (1).jpg,?\n"])
def test_another_table_is_refused(root, text):
    """A table of other columns, or with a rating that is no number, names its line."""
    (root / TABLES["test"]).write_text(text)
    with pytest.raises(ValueError, match=r"Test .*line 2"):
        load_biq2021(root, num_validation=5, seed=1)


def test_a_picture_in_two_parts_is_refused(root):
    """A picture that both tables name would be trained on and tested on: it is an error."""
    write_table(root, "test", [("a (20).jpg", "0.5"), ("a (4).jpg", "0.5")])
    with pytest.raises(ValueError, match=r"a \(4\)\.jpg 2 times"):
        load_biq2021(root, num_validation=5, seed=1)


def test_validation_cannot_take_everything(root):
    """Holding back every training picture is refused with both numbers."""
    with pytest.raises(ValueError, match="20 leaves nothing of 20"):
        load_biq2021(root, num_validation=20, seed=1)


def test_the_pack_holds_no_test_picture(root, tmp_path):
    """What is packed for training is the training and validation parts with their MOS, no more."""
    number = build_rated(root, tmp_path / "pack", num_validation=5, seed=1, made_by="test")
    records = Pack(tmp_path / "pack").records
    wanted = load_biq2021(root, num_validation=5, seed=1)
    assert number == NUM_TRAIN
    assert {(r.name, r.split, r.mos) for r in records} == {
        (r.path.name, r.split, r.mos) for r in wanted if r.split != "test"
    }
