"""What goes into shards: drawn ladders, several folders, rated pictures halved; no half told."""

from __future__ import annotations

import csv
from collections import Counter
from pathlib import Path

import cv2
import msgspec
import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from dgiqa_stream.errors import ConfigError
from distill.data.biq2021 import TABLES
from distill.data.build_shards import build_shards, plan_jobs
from distill.data.commands import shards as shards_command
from distill.data.datasets import RatedItem
from distill.data.degradations import DEGRADATIONS
from distill.data.halved import clean_when_halved
from distill.data.shard_records import ShardSettings, drawn_ladders, read_rgb
from distill.data.shards import ShardReader, read_manifest, sha256_of

FEW = ShardSettings(
    degradations=("banding", "haze", "pixelation", "stripes", "lost_blocks"),
    ladders_per_picture=2,
    num_chains=1,
    pseudo_mos=False,
)


def write(path: Path, rgb, *options: int) -> Path:
    """A picture as its suffix says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), rgb[..., ::-1], options)
    return path


@pytest.fixture
def folders(tmp_path, make_picture, contents):
    """Two folders with two clean training pictures each."""
    names = contents("train", 4)
    for i, name in enumerate(names):
        write(tmp_path / ("first", "second")[i // 2] / f"{name}.png", make_picture(i))
    return [tmp_path / "first", tmp_path / "second"]


@pytest.fixture
def rated(tmp_path, make_picture):
    """Training pictures of 520x600 (the last: 500x600) with MOS 0.1 to 0.9, and a test one."""
    items = []
    for i in range(6):
        height = 500 if i == 4 else 520
        path = write(tmp_path / "rated" / f"{i}.jpg", make_picture(i, height, 600))
        part = "test" if i == 5 else "train"
        items.append(RatedItem(f"Images/{i}.jpg", path, f"{i}.jpg", 0.1 + 0.2 * i, None, part))
    return items


def test_each_picture_gets_its_own_few_ladders(folders, tmp_path):
    """Of five ladders each content has two, whole, and not all contents have the same two."""
    out = tmp_path / "out"
    jobs = plan_jobs(folders, {})
    build_shards(out, jobs, settings=FEW, made_by="test", workers=1)
    by_content: dict[str, Counter[str]] = {}
    for record in ShardReader(out, verify=True).records:
        if record.ladder:
            by_content.setdefault(record.content, Counter())[record.degradation] += 1
    assert len(by_content) == 4
    for content, found in by_content.items():
        assert set(found) == set(drawn_ladders(FEW, content))
        assert len(found) == 2
        assert all(DEGRADATIONS[name].num_levels == number for name, number in found.items())
    assert len({tuple(found) for found in by_content.values()}) > 1


def test_ladders_are_drawn_evenly_by_name_and_seed():
    """Over 500 names each of 5 ladders is drawn for 2/5 of them, and a seed changes the draw."""
    names = [f"picture{i}" for i in range(500)]
    drawn = Counter(ladder for name in names for ladder in drawn_ladders(FEW, name))
    for number in drawn.values():
        assert number == pytest.approx(200, abs=44)  # four standard deviations of a binomial
    other = msgspec.structs.replace(FEW, seed=1)
    assert [drawn_ladders(FEW, n) for n in names] != [drawn_ladders(other, n) for n in names]
    everything = msgspec.structs.replace(FEW, ladders_per_picture=None)
    assert drawn_ladders(everything, "a") == FEW.degradations
    more = msgspec.structs.replace(FEW, ladders_per_picture=9)
    assert drawn_ladders(more, "a") == FEW.degradations


def test_a_drawn_ladder_is_the_one_of_all_ladders(folders, tmp_path):
    """A ladder has the same pictures whether it was drawn or all were made."""
    few, everything = tmp_path / "few", tmp_path / "all"
    jobs = plan_jobs(folders[:1], {})[:1]
    build_shards(few, jobs, settings=FEW, made_by="t", workers=1)
    whole = msgspec.structs.replace(FEW, ladders_per_picture=None)
    build_shards(everything, jobs, settings=whole, made_by="t", workers=1)
    wanted = {r.name: rgb for r, rgb in ShardReader(everything)}
    for record, rgb in ShardReader(few):
        if record.ladder:
            np.testing.assert_array_equal(rgb, wanted[record.name])


def test_an_interrupted_folder_of_few_ladders_goes_on(folders, tmp_path):
    """With one job's files gone the same call makes the same bytes; other settings are refused."""
    out = tmp_path / "out"
    jobs = plan_jobs(folders, {})
    build_shards(out, jobs, settings=FEW, made_by="t", workers=1)
    before = {p.name: sha256_of(p) for p in out.glob("shard-*.zip")}
    (out / "shard-00001-00.zip").unlink()
    build_shards(out, jobs, settings=FEW, made_by="t", workers=1)
    assert {p.name: sha256_of(p) for p in out.glob("shard-*.zip")} == before
    other = msgspec.structs.replace(FEW, ladders_per_picture=3)
    with pytest.raises(ConfigError, match="other settings"):
        build_shards(out, jobs, settings=other, made_by="t", workers=1)


def test_a_folder_begun_before_ladders_were_drawn_goes_on(folders, tmp_path):
    """A plan without the setting means all ladders, as it did when it was written."""
    out = tmp_path / "out"
    jobs = plan_jobs(folders[:1], {})
    settings = msgspec.structs.replace(FEW, ladders_per_picture=None, degradations=("haze",))
    build_shards(out, jobs, settings=settings, made_by="t", workers=1)
    plan = out / "jobs" / "plan.json"
    told = msgspec.json.decode(plan.read_bytes())
    del told["settings"]["ladders_per_picture"]
    plan.write_bytes(msgspec.json.encode(told))
    build_shards(out, jobs, settings=settings, made_by="t", workers=1)


def test_several_folders_are_told_apart(folders, tmp_path):
    """Each folder is a source with its own number of pictures."""
    out = tmp_path / "out"
    one = msgspec.structs.replace(FEW, ladders_per_picture=1, num_chains=0)
    build_shards(out, plan_jobs(folders, {}), settings=one, made_by="t", workers=1)
    sources = {s["name"]: s["num_pictures"] for s in read_manifest(out).sources}
    assert sources == {"first": 2, "second": 2}


def test_one_name_in_two_folders_is_refused(folders, make_picture):
    """Two contents of one name would be mixed up: both files are named."""
    double = next(folders[0].glob("*.png")).stem
    write(folders[1] / f"{double}.webp", make_picture(9))
    with pytest.raises(ConfigError, match=rf"first/{double}\.png and .*second/{double}\.webp"):
        plan_jobs(folders, {})


def test_less_than_one_ladder_is_refused(folders, tmp_path):
    """A picture without a ladder teaches no order: 0 is told, before anything is written."""
    none = msgspec.structs.replace(FEW, ladders_per_picture=0)
    with pytest.raises(ConfigError, match="1 ladder or more, not 0"):
        build_shards(tmp_path / "o", plan_jobs(folders, {}), settings=none, made_by="t")
    assert not (tmp_path / "o").exists()


def test_only_good_large_training_pictures_are_halved(rated):
    """Of MOS 0.1 to 1.1 those of 0.5 and more stay, without the small one and the test one."""
    chosen = clean_when_halved(rated, least_mos=0.5)
    assert [item.name for item in chosen] == ["Images/2.jpg", "Images/3.jpg"]
    assert len(clean_when_halved(rated, least_mos=0.0, number=2)) == 2
    with pytest.raises(ConfigError, match=r"MOS of 0\.95 or more: ask for less"):
        clean_when_halved(rated, least_mos=0.95)
    with pytest.raises(ConfigError, match="0 halved pictures"):
        clean_when_halved(rated, number=0)


def test_halved_pictures_are_area_averages(rated):
    """Halved, a picture is 260x300 and its means are those of 2x2 squares."""
    whole = read_rgb(rated[0].path, longest_px=1088)
    half = read_rgb(rated[0].path, longest_px=1088, halved=True)
    assert half.shape == (260, 300, 3)
    wanted = whole.reshape(260, 2, 300, 2, 3).mean((1, 3))
    assert np.abs(half - wanted).mean() < 1.5  # chroma was stored halved already
    assert max(read_rgb(rated[0].path, longest_px=128, halved=True).shape) == 128


def test_halved_pictures_say_so(rated, tmp_path):
    """Record and manifest name the set and the halving; content and part are the rated one's."""
    out = tmp_path / "out"
    clean = clean_when_halved(rated, least_mos=0.6)
    jobs = plan_jobs(None, {"biq2021": rated}, halved={"biq2021": clean})
    build_shards(out, jobs, settings=FEW, made_by="t", workers=1)
    records = ShardReader(out).records
    halved = [r for r in records if r.source == "biq2021-halved"]
    assert {(r.content, r.split, r.mos) for r in halved} == {("biq2021/3.jpg", "train", None)}
    assert {(r.height, r.width) for r in halved} == {(260, 300)}
    assert len({r.name for r in records}) == len(records)
    assert {r.content for r in records if r.mos is not None} >= {"biq2021/3.jpg"}
    rows = {s["name"]: s for s in read_manifest(out).sources}
    assert rows["biq2021-halved"]["halved"] is True
    assert rows["biq2021-halved"]["num_pictures"] == 1
    assert rows["biq2021-halved"]["licence"] == rows["biq2021"]["licence"]
    assert "halved" not in rows["biq2021"]


def test_the_command_takes_all_of_it(folders, tmp_path, make_picture):
    """Two folders, two ladders each and a halved set come out of one command."""
    root = tmp_path / "biq"
    root.mkdir()
    for part, table in TABLES.items():
        rows = [(f"{part}{i}.jpg", 0.8) for i in range(12)]
        with (root / table).open("w", newline="") as out:
            csv.writer(out).writerows([("Image Name", "MOS"), *rows])
        for name, _ in rows:
            write(root / "Images" / name, make_picture(len(name), 512, 512))
    app = typer.Typer()
    app.command()(shards_command)
    app.command()(lambda: None)
    call = ["shards", str(tmp_path / "out"), "--pristine", str(folders[0]), "--pristine"]
    call += [str(folders[1]), "--halved", f"biq2021={root}", "--num-halved", "1", "--workers", "1"]
    call += ["--ladders-per-picture", "1", "--degradations", "haze,stripes", "--chains", "0"]
    result = CliRunner().invoke(app, [*call, "--no-pseudo-mos"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    manifest = read_manifest(tmp_path / "out")
    assert {s["name"]: s["num_pictures"] for s in manifest.sources} == {
        "first": 2,
        "second": 2,
        "biq2021-halved": 1,
    }
    assert manifest.settings["ladders_per_picture"] == 1
    records = ShardReader(tmp_path / "out", verify=True).records
    assert Counter(r.degradation == "clean" for r in records) == {True: 5, False: 30}
    assert not any(r.mos is not None for r in records)
