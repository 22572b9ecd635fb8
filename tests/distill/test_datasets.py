"""Rated picture sets in their official layouts, with empty files for pictures."""

from __future__ import annotations

import csv
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dgiqa_stream.errors import ConfigError
from distill.data.biq2021 import load_biq2021
from distill.data.datasets import load_dataset
from distill.data.picture_datasets import (
    KADID_DEGRADATIONS,
    LIVE_FOLDERS,
    TID_DEGRADATIONS,
)
from distill.data.rated_sets import DATASETS, describe
from distill.data.splits import draw_splits
from made_sets import table, touch

scipy_io = pytest.importorskip("scipy.io")


def make_biq2021(root: Path) -> dict[str, float]:
    """20 rows for training and 5 for the test."""
    for part, begin, end in (("Train", 0, 20), ("Test", 20, 25)):
        rows = [(f"a ({i}).jpg", i / 25, "", "") for i in range(begin, end)]
        table(root / f"{part} (Images and MOS).csv", "Image Name,MOS,,", rows)
    touch(root, *(f"Images/a ({i}).jpg" for i in range(24)), "Images/a (24).JPG")
    return {"Images/a (0).jpg": 0.0, "Images/a (24).jpg": 24 / 25}


def make_koniq10k(root: Path) -> dict[str, float]:
    """One picture for each official part; MOS on 1..100."""
    rows = [
        ("1.jpg", 0, 0, 0, 0, 1, 100, 100, 0.5, "training"),
        ("2.jpg", 0, 0, 1, 0, 0, 100, 50.5, 0.5, "validation"),
        ("3.jpg", 1, 0, 0, 0, 0, 100, 1, 0.5, "test"),
    ]
    head = "image_name,c1,c2,c3,c4,c5,c_total,MOS,SD,set"
    table(root / "koniq10k_distributions_sets.csv", head, rows)
    touch(root, *(f"1024x768/{i}.jpg" for i in (1, 2, 3)))
    return {"1024x768/1.jpg": 1.0, "1024x768/2.jpg": 0.5, "1024x768/3.jpg": 0.0}


def make_kadid10k(root: Path) -> dict[str, float]:
    """Twelve references at two levels of JPEG (type 10); 5 is best."""
    names = [
        (f"I{r:02d}_10_{level:02d}.png", f"I{r:02d}.png") for r in range(1, 13) for level in (1, 5)
    ]
    rows = [(name, ref, 4 if name.endswith("_01.png") else 1, 0.25) for name, ref in names]
    table(root / "dmos.csv", "dist_img,ref_img,dmos,var", rows)
    touch(root, *(f"images/{name}" for name, _ in names), *(f"images/{ref}" for _, ref in names))
    return {"images/I01_10_01.png": 0.75, "images/I01_10_05.png": 0.0}


def make_tid2013(root: Path) -> dict[str, float]:
    """Three references whose names differ in case, as in the release; MOS on 0..9."""
    rows = [("4.5", "I01_01_1.bmp"), ("9.0", "i02_24_5.bmp"), ("0.9", "I03_08_3.BMP")]
    root.mkdir(exist_ok=True)
    (root / "mos_with_names.txt").write_text("".join(f"{v} {name}\n" for v, name in rows))
    (root / "mos_std.txt").write_text("0.9\n0.45\n0.1\n")
    touch(root, "distorted_images/i01_01_1.bmp", *(f"distorted_images/{n}" for _, n in rows[1:]))
    return {"distorted_images/I01_01_1.bmp": 0.5, "distorted_images/i02_24_5.bmp": 1.0}


def make_live(root: Path) -> dict[str, float]:
    """All 982 entries; the first of each folder is a hidden reference."""
    names = [f"{kind}/img{i}.bmp" for kind, n in LIVE_FOLDERS.items() for i in range(1, n + 1)]
    touch(root, *names)
    originals = np.array([[float(name.endswith("/img1.bmp")) for name in names]])
    dmos = np.where(originals > 0, 0.0, np.linspace(-2.6, 111.8, len(names))[None])
    spread = np.full((1, len(names)), 5.0)
    values = {"dmos_new": dmos, "orgs": originals, "dmos_std": spread}
    scipy_io.savemat(root / "dmos_realigned.mat", values)
    refs = np.array([[f"ref{i % 29}.bmp" for i in range(len(names))]], dtype=object)
    scipy_io.savemat(root / "refnames_all.mat", {"refnames_all": refs})
    return {"jp2k/img2.bmp": 1.0, "fastfading/img174.bmp": 0.0}


def make_csiq(root: Path) -> dict[str, float]:
    """The export of sheet all_by_image, with its empty first columns left out."""
    kinds = [
        ("noise", "awgn", "AWGN"),
        ("jpeg 2000", "jpeg2000", "jpeg2000"),
        ("blur", "blur", "BLUR"),
    ]
    rows, files = [], []
    for content in ("1600", "swarm", "geckos"):
        for kind, folder, word in kinds:
            rows += [(content, 1, kind, level, 0.05, level / 5) for level in (1, 5)]
            files += [f"dst_imgs/{folder}/{content}.{word}.{level}.png" for level in (1, 5)]
    table(root / "csiq.DMOS.csv", "image,dst_idx,dst_type,dst_lev,dmos_std,dmos", rows)
    touch(root, *files, "src_imgs/1600.png")
    return {"dst_imgs/awgn/1600.AWGN.1.png": 0.8, "dst_imgs/blur/1600.BLUR.5.png": 0.0}


def make_live_challenge(root: Path) -> dict[str, float]:
    """Seven pictures the raters were trained on, then twelve of the set."""
    names = [f"t{i}.bmp" for i in range(1, 8)] + [f"{i}.bmp" for i in range(3, 15)]
    (root / "Data").mkdir(parents=True)
    cells = np.array([[name] for name in names], dtype=object)
    scipy_io.savemat(root / "Data/AllImages_release.mat", {"AllImages_release": cells})
    mos = np.linspace(0, 90, len(names))[None]
    scipy_io.savemat(root / "Data/AllMOS_release.mat", {"AllMOS_release": mos})
    scipy_io.savemat(root / "Data/AllStdDev_release.mat", {"AllStdDev_release": mos * 0 + 20})
    touch(
        root,
        *(f"Images/trainingImages/{n}" for n in names[:7]),
        *(f"Images/{n}" for n in names[7:]),
    )
    return {"Images/3.bmp": 0.35, "Images/14.bmp": 0.9}


def make_spaq(root: Path) -> dict[str, float]:
    """The export of the first sheet; its columns go on with attributes."""
    path = root / "Annotations/MOS and Image attribute scores.csv"
    table(path, "Image name,MOS,Brightness", [(f"{i:05d}.jpg", 10 * i, 50) for i in range(1, 11)])
    touch(root, *(f"TestImage/{i:05d}.jpg" for i in range(1, 11)))
    return {"TestImage/00001.jpg": 0.1, "TestImage/00010.jpg": 1.0}


def make_flive(root: Path) -> dict[str, float]:
    """A training picture, one of the padded validation part, one larger than 640 px."""
    names = ["AVA__1.jpg", "VOC2012/2.jpg", "blur_dataset/3.jpg"]
    table(root / "labels_image.csv", "name,mos", [(n, 20 * (i + 1)) for i, n in enumerate(names)])
    padded = [(names[0], "False"), (names[1], "True")]
    table(root / "labels=640_padded.csv", "name_image,is_valid", padded)
    table(root / "labels>640.csv", "name_image,mos_image", [(names[2], 60)])
    touch(root, *(f"database/{n}" for n in names))
    return {"database/AVA__1.jpg": 0.2, "database/blur_dataset/3.jpg": 0.6}


def make_uhd_iqa(root: Path) -> dict[str, float]:
    """One picture for each official part."""
    rows = [("1.jpg", 0.25, "training"), ("2.jpg", 0.5, "validation"), ("3.jpg", 0.75, "test")]
    table(root / "uhd-iqa-metadata.csv", "image_name,quality_mos,set", rows)
    touch(root, *(f"{part}/{name}" for name, _, part in rows))
    return {"training/1.jpg": 0.25, "test/3.jpg": 0.75}


MAKERS = {
    name: globals()[f"make_{name}"]
    for name, dataset in DATASETS.items()
    if dataset.kind == "picture"
}


@pytest.mark.parametrize("name", MAKERS)
def test_mos_is_on_0_to_1_with_1_best(name, tmp_path):
    """Labels worked out by hand come back, so scale and direction of the set are right."""
    wanted = MAKERS[name](tmp_path)
    by_name = {item.name: item for item in load_dataset(name, tmp_path)}
    for path, mos in wanted.items():
        assert by_name[path].mos == pytest.approx(mos, abs=1e-9)
        assert by_name[path].path.is_file()
    assert all(0 <= item.mos <= 1 for item in by_name.values())


@pytest.mark.parametrize("name", MAKERS)
def test_no_content_is_in_two_parts(name, tmp_path):
    """Whatever the seed, all pictures of one content lie in one part."""
    MAKERS[name](tmp_path)
    for seed in range(4):
        parts = {}
        for item in load_dataset(name, tmp_path, seed=seed):
            assert parts.setdefault(item.content, item.split) == item.split


@given(st.lists(st.sampled_from("abcdefghijklmnop"), min_size=3), st.integers(0, 2**32 - 1))
def test_drawn_parts_know_only_contents_and_seed(contents, seed):
    """The order and number of a content's pictures change no part, and every content has one."""
    drawn = draw_splits(contents, seed=seed)
    assert drawn == draw_splits(sorted(set(contents)), seed=seed)
    assert set(drawn) == set(contents)
    if len(drawn) > 2:
        assert set(drawn.values()) == {"train", "validation", "test"}


def test_drawn_parts_are_8_1_1(tmp_path):
    """A hundred contents give 80, 10 and 10, and another seed gives others."""
    names = [f"c{i}" for i in range(100)]
    drawn = draw_splits(names, seed=1)
    assert Counter(drawn.values()) == {"train": 80, "validation": 10, "test": 10}
    assert drawn != draw_splits(names, seed=2)


@pytest.mark.parametrize("name", ["koniq10k", "flive", "uhd_iqa"])
def test_official_parts_do_not_depend_on_the_seed(name, tmp_path):
    """The official column alone decides, and each of the three parts has its picture."""
    MAKERS[name](tmp_path)
    parts = [{i.name: i.split for i in load_dataset(name, tmp_path, seed=s)} for s in (0, 5)]
    assert parts[0] == parts[1]
    assert sorted(parts[0].values()) == ["test", "train", "validation"]


def test_biq2021_is_split_as_for_the_packs(tmp_path):
    """The validation part is the one that `load_biq2021` draws, so no picture changes sides."""
    make_biq2021(tmp_path)
    packed = load_biq2021(tmp_path, num_validation=2, seed=9)
    ours = load_dataset("biq2021", tmp_path, seed=9)
    assert {(i.path, i.mos, i.split) for i in ours} == {(r.path, r.mos, r.split) for r in packed}


def test_one_part_can_be_asked_for(tmp_path):
    """``split`` gives that part and nothing else; a part the set has not is an error."""
    make_koniq10k(tmp_path)
    assert [i.name for i in load_dataset("koniq10k", tmp_path, split="test")] == ["1024x768/3.jpg"]
    with pytest.raises(ConfigError, match="no part 'tset'; its parts are test, train, validation"):
        load_dataset("koniq10k", tmp_path, split="tset")


def test_the_half_size_pictures_serve_where_the_large_ones_are_not(tmp_path):
    """KonIQ-10k unpacked at 512x384 loads from that folder."""
    make_koniq10k(tmp_path)
    (tmp_path / "1024x768").rename(tmp_path / "512x384")
    assert load_dataset("koniq10k", tmp_path)[0].path.parent.name == "512x384"


def test_degradation_and_level_come_from_the_name(tmp_path):
    """Names tell type and level in KADID-10k and TID2013, the folder in LIVE, columns in CSIQ."""
    told = {}
    for name in ("kadid10k", "tid2013", "live", "csiq"):
        MAKERS[name](tmp_path / name)
        told[name] = {
            i.name: (i.degradation, i.level, i.content) for i in load_dataset(name, tmp_path / name)
        }
    assert told["kadid10k"]["images/I01_10_05.png"] == ("jpeg", 5, "i01")
    assert told["tid2013"]["distorted_images/i02_24_5.bmp"] == ("sparse_sampling", 5, "i02")
    assert told["live"]["gblur/img2.bmp"][:2] == ("gblur", None)
    assert told["csiq"]["dst_imgs/awgn/1600.AWGN.1.png"] == ("awgn", 1, "1600")
    assert (len(KADID_DEGRADATIONS), len(TID_DEGRADATIONS)) == (25, 24)


def test_the_spread_of_ratings_is_on_the_same_scale(tmp_path):
    """KADID's variance becomes a deviation; each is divided by the length of its scale."""
    stds = {}
    for name in ("kadid10k", "tid2013", "live", "koniq10k", "live_challenge"):
        MAKERS[name](tmp_path / name)
        stds[name] = load_dataset(name, tmp_path / name)[0].mos_std
    wanted = {
        "kadid10k": 0.5 / 4,
        "tid2013": 0.1,
        "live": 0.05,
        "koniq10k": 0.125,
        "live_challenge": 0.2,
    }
    assert stds == pytest.approx(wanted)


def test_hidden_references_and_training_pictures_are_left_out(tmp_path):
    """LIVE gives 977 of 982 (one reference in each folder here), the Challenge 12 of 19."""
    make_live(tmp_path / "live")
    make_live_challenge(tmp_path / "challenge")
    assert len(load_dataset("live", tmp_path / "live")) == 982 - len(LIVE_FOLDERS)
    assert len(load_dataset("live_challenge", tmp_path / "challenge")) == 12


def test_missing_files_are_counted_and_the_first_named(tmp_path, capsys):
    """Five missing pictures: three names and the number of the others; or left out, and said."""
    make_spaq(tmp_path)
    for i in range(1, 6):
        (tmp_path / f"TestImage/{i:05d}.jpg").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"5 of 10 files .*00001.*00003\.jpg and 2 more\. .*leave-out"
    ):
        load_dataset("spaq", tmp_path)
    assert len(load_dataset("spaq", tmp_path, missing="leave-out")) == 5
    assert "5 labels have no file and are left out" in capsys.readouterr().err


def test_missing_files_move_nothing_to_another_part(tmp_path):
    """A set with gaps has every remaining picture in the part it has without gaps."""
    make_spaq(tmp_path)
    whole = {i.name: i.split for i in load_dataset("spaq", tmp_path, seed=3)}
    (tmp_path / "TestImage/00004.jpg").unlink()
    for item in load_dataset("spaq", tmp_path, seed=3, missing="leave-out"):
        assert item.split == whole[item.name]


def test_a_picture_without_a_label_is_said_and_left_out(tmp_path, capsys):
    """A file that the table does not name is counted on standard error and not loaded."""
    make_spaq(tmp_path)
    touch(tmp_path, "TestImage/99999.jpg")
    assert len(load_dataset("spaq", tmp_path)) == 10
    assert "1 files have no label and are left out: testimage/99999.jpg" in capsys.readouterr().err


@pytest.mark.parametrize(("value", "told"), [("101", "101"), ("-0.5", "-0.5"), ("nan", "nan")])
def test_a_label_outside_the_scale_names_row_and_value(tmp_path, value, told):
    """An impossible MOS is one error with row, value, picture and the scale."""
    make_spaq(tmp_path)
    path = tmp_path / "Annotations/MOS and Image attribute scores.csv"
    path.write_text(path.read_text().replace("00004.jpg,40,", f"00004.jpg,{value},"))
    with pytest.raises(
        ValueError, match=rf"row 5: {told} of TestImage/00004.jpg is outside 0..100"
    ):
        load_dataset("spaq", tmp_path)


def test_a_label_that_is_no_number_names_its_row(tmp_path):
    """Text where a MOS should be is told with its row."""
    make_uhd_iqa(tmp_path)
    path = tmp_path / "uhd-iqa-metadata.csv"
    path.write_text(path.read_text().replace("0.5", "good"))
    with pytest.raises(ValueError, match="row 3: 'good' is not a number"):
        load_dataset("uhd_iqa", tmp_path)


def test_a_picture_rated_twice_is_refused(tmp_path):
    """Two rows of one picture are an error: which is right cannot be known."""
    make_spaq(tmp_path)
    path = tmp_path / "Annotations/MOS and Image attribute scores.csv"
    path.write_text(path.read_text() + "00004.jpg,12,3\n")
    with pytest.raises(ValueError, match=r"00004\.jpg is rated 2 times"):
        load_dataset("spaq", tmp_path)


def test_a_table_of_other_columns_is_refused(tmp_path):
    """A missing column is named with those that are there."""
    make_uhd_iqa(tmp_path)
    table(tmp_path / "uhd-iqa-metadata.csv", "image_name,mos,set", [("1.jpg", 0.2, "training")])
    with pytest.raises(ValueError, match="no column 'quality_mos'; its columns are"):
        load_dataset("uhd_iqa", tmp_path)


@pytest.mark.parametrize("name", MAKERS)
def test_an_empty_folder_is_one_clear_error(name, tmp_path):
    """A folder that is not the set's names the label file that is missed."""
    with pytest.raises(FileNotFoundError, match="give the set's folder"):
        load_dataset(name, tmp_path)


def test_an_unknown_set_names_the_known_ones(tmp_path):
    """A misspelt name is a configuration error that lists what there is."""
    with pytest.raises(ConfigError, match=r"no rated set 'koniq'; known: biq2021, koniq10k"):
        load_dataset("koniq", tmp_path)


@pytest.mark.parametrize("name", DATASETS)
def test_every_set_says_what_it_is(name):
    """Licence, label file, scale, content and split rule are told of every set."""
    text = describe(name)
    for word in ("licence", "label_file", "worst", "best", "content", "split_rule"):
        line = next(line for line in text.splitlines() if line.startswith(word))
        assert line.removeprefix(word).strip()


def test_excel_and_its_export_are_the_same(tmp_path):
    """CSIQ's workbook, with its empty corner and number names, loads as its CSV export does."""
    openpyxl = pytest.importorskip("openpyxl")
    make_csiq(tmp_path)
    from_csv = load_dataset("csiq", tmp_path)
    export = tmp_path / "csiq.DMOS.csv"
    with export.open(newline="") as lines:
        rows = list(csv.reader(lines))
    book = openpyxl.Workbook()
    sheet = book.create_sheet("all_by_image")
    sheet.append([])
    for row in rows:
        numbers = [
            float(c) if i != 2 and c.replace(".", "").isdigit() else c for i, c in enumerate(row)
        ]
        sheet.append(["", "", *numbers])
    book.save(tmp_path / "csiq.DMOS.xlsx")
    export.unlink()
    assert load_dataset("csiq", tmp_path) == from_csv


def test_excel_without_its_reader_says_what_to_do(tmp_path, monkeypatch):
    """Without openpyxl the error names the package and the export that also serves."""
    make_csiq(tmp_path)
    (tmp_path / "csiq.DMOS.csv").rename(tmp_path / "csiq.DMOS.xlsx")
    monkeypatch.setitem(__import__("sys").modules, "openpyxl", None)
    with pytest.raises(ConfigError, match=r"pip install openpyxl, or export .*csiq\.DMOS\.csv"):
        load_dataset("csiq", tmp_path)
