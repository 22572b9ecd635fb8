"""Shards: the same bytes from any number of processes, after any interruption, on any disk."""

from __future__ import annotations

import dataclasses
import os
import pickle
import re
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import cv2
import msgspec
import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from dgiqa_stream.errors import ConfigError, SinkError, SourceError
from distill.data import shards as shards_module
from distill.data.build_shards import build_shards, finished_job, plan_jobs
from distill.data.commands import shards as shards_command
from distill.data.datasets import RatedItem
from distill.data.degradations import DEGRADATIONS, ladder
from distill.data.shard_records import ShardSettings, random_chain, read_rgb
from distill.data.shards import (
    MANIFEST,
    ShardReader,
    ShardRecord,
    ShardWriter,
    decode_picture,
    encode_picture,
    read_manifest,
    sha256_of,
)

REPOSITORY = Path(__file__).parents[2]
SMALL = ShardSettings(
    degradations=("gaussian_noise", "mjpeg"),
    num_chains=2,
    pseudo_mos=False,
    max_shard_bytes=300_000,
)


def bytes_of(folder: Path) -> dict[str, str]:
    """SHA-256 of the manifest and of every shard."""
    return {p.name: sha256_of(p) for p in sorted(folder.iterdir()) if p.is_file()}


@pytest.fixture(scope="module")
def pristine(tmp_path_factory, make_picture, contents):
    """Clean pictures: three for training, one for validation, one that must not be seen."""
    folder = tmp_path_factory.mktemp("data") / "clean"
    folder.mkdir()
    names = [*contents("train", 3), *contents("validation", 1), "clic_0"]
    for seed, name in enumerate(names):
        bgr = cv2.cvtColor(make_picture(seed), cv2.COLOR_RGB2BGR)
        assert cv2.imwrite(str(folder / f"{name}.webp"), bgr, [cv2.IMWRITE_WEBP_QUALITY, 101])
    return folder


@pytest.fixture
def rated(tmp_path, make_picture):
    """Ten rated pictures of BIQ2021, one of them in its test part."""
    items = []
    for i in range(10):
        path = tmp_path / "rated" / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        assert cv2.imwrite(str(path), make_picture(i, 64, 64))
        part = "test" if i == 9 else "validation" if i == 8 else "train"
        items.append(RatedItem(f"Images/{i}.png", path, f"{i}.png", i / 10, 0.1, part))
    return items


@pytest.fixture(scope="module")
def built(pristine, tmp_path_factory):
    """The clean pictures' shards, made in one process without interruption."""
    folder = tmp_path_factory.mktemp("shards")
    build_shards(folder, plan_jobs(pristine, {}), settings=SMALL, made_by="test", workers=1)
    return folder


def test_pictures_come_back_bit_by_bit(built, pristine):
    """Clean pictures and whole ladders read from shards are the very pictures that were made."""
    reader = ShardReader(built, split="train")
    by_name = {record.name: record for record in reader.records}
    for content in sorted({r.content for r in reader.records}):
        bgr = cv2.imread(str(pristine / f"{content}.webp"))
        clean = cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB)
        stored = reader.picture(by_name[f"{content}/clean"])
        # the picture went through FFmpeg's WebP reader, which gives the same RGB or 4:2:0 planes
        assert np.abs(stored.astype(int) - clean).mean() < 3
        for name in SMALL.degradations:
            made = ladder(name, stored, seed=SMALL.seed, content=content)
            for level, wanted in enumerate(made, 1):
                record = by_name[f"{content}/{name}/{level}"]
                np.testing.assert_array_equal(reader.picture(record), wanted)
                assert (record.degradation, record.level) == (name, level)
                assert record.ladder == f"{content}/{name}"


def test_the_test_split_is_nowhere(built):
    """No picture kept for the final evaluation is in a shard; both other splits are."""
    splits = read_manifest(built).num_pictures
    levels = sum(DEGRADATIONS[name].num_levels for name in SMALL.degradations)
    each = 1 + levels + SMALL.num_chains
    assert splits == {"train": 3 * each, "validation": each}
    assert not any("clic_" in r.name for r in ShardReader(built).records)


def test_shards_are_small_and_several(built):
    """No shard is larger than the limit, and the limit is what cut a job into several."""
    sizes = [path.stat().st_size for path in built.glob("shard-*.zip")]
    assert max(sizes) <= SMALL.max_shard_bytes
    assert len(sizes) > len(list((built / "jobs").glob("0*.json")))


def test_the_manifest_tells_where_everything_is_from(built):
    """Settings, versions, licences and each shard's SHA-256 are in the manifest, and no folder."""
    manifest = read_manifest(built)
    assert manifest.settings["seed"] == 0
    assert {"av", "libavcodec", "numpy"} <= set(manifest.versions)
    assert sum(s["num_pictures"] for s in manifest.sources) == 4
    assert all(s["licence"] for s in manifest.sources)
    for shard in manifest.shards:
        assert sha256_of(built / shard.name) == shard.sha256
    assert str(built.parent) not in (built / MANIFEST).read_text()


def test_several_processes_make_the_same_bytes(built, pristine, tmp_path):
    """Two processes and one give equal shards and an equal manifest."""
    build_shards(tmp_path, plan_jobs(pristine, {}), settings=SMALL, made_by="test", workers=2)
    assert bytes_of(tmp_path) == bytes_of(built)


SCRIPT = """
import sys
from pathlib import Path
import msgspec
from distill.data.build_shards import build_shards, plan_jobs
from distill.data.shard_records import ShardSettings
if __name__ == "__main__":
    settings = msgspec.json.decode(sys.argv[3], type=ShardSettings)
    jobs = plan_jobs(Path(sys.argv[1]), {})
    workers = int(sys.argv[4])
    build_shards(Path(sys.argv[2]), jobs, settings=settings, made_by="test", workers=workers)
"""


@pytest.mark.parametrize("workers", [1, 2])
def test_killed_in_the_middle_it_goes_on_to_the_same_bytes(built, pristine, tmp_path, workers):
    """After SIGKILL no worker lives on, finished jobs stay untouched, and all bytes are equal."""
    psutil = pytest.importorskip("psutil")
    folder = tmp_path / "out"
    script = tmp_path / "make.py"
    script.write_text(SCRIPT)
    settings = msgspec.json.encode(SMALL).decode()
    command = [sys.executable, str(script), str(pristine), str(folder), settings, str(workers)]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    with subprocess.Popen(command, env=environment) as made:
        while not (folder / "jobs" / "00000.json").is_file():
            assert made.poll() is None
            time.sleep(0.002)
        children = psutil.Process(made.pid).children()
        made.send_signal(signal.SIGKILL)
    assert len(children) >= workers - 1
    assert psutil.wait_procs(children, timeout=20)[1] == []
    assert not (folder / MANIFEST).exists()
    with pytest.raises(SourceError, match="no whole set of shards"):
        ShardReader(folder)
    kept = {p: p.stat().st_mtime_ns for p in folder.glob("shard-00000-*.zip")}
    build_shards(folder, plan_jobs(pristine, {}), settings=SMALL, made_by="test", workers=1)
    assert bytes_of(folder) == bytes_of(built)
    assert kept == {p: p.stat().st_mtime_ns for p in kept}


def test_a_broken_shard_is_made_again_and_no_other(built, pristine, tmp_path):
    """One flipped byte, one missing file: only their jobs are done again, to the same bytes."""
    jobs = plan_jobs(pristine, {})
    build_shards(tmp_path, jobs, settings=SMALL, made_by="test", workers=1)
    victim = tmp_path / "shard-00001-00.zip"
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    missing = tmp_path / "shard-00002-00.zip"
    missing.unlink()
    (tmp_path / "shard-00003-00.zip.part").write_bytes(b"left by a crash")
    assert [finished_job(tmp_path, n) is None for n in range(4)] == [False, True, True, False]
    untouched = (tmp_path / "shard-00000-00.zip").stat().st_mtime_ns
    with pytest.raises(SourceError, match=r"shard-00001-00\.zip is not as it was written"):
        ShardReader(tmp_path, verify=True)
    build_shards(tmp_path, jobs, settings=SMALL, made_by="test", workers=1)
    assert bytes_of(tmp_path) == bytes_of(built)
    assert (tmp_path / "shard-00000-00.zip").stat().st_mtime_ns == untouched


def test_other_settings_need_another_folder(built, pristine):
    """A folder of other settings is not mixed into: one error, and nothing in it changes."""
    before = bytes_of(built)
    other = msgspec.structs.replace(SMALL, seed=1)
    with pytest.raises(ConfigError, match="other settings or pictures: give another folder"):
        build_shards(built, plan_jobs(pristine, {}), settings=other, made_by="test", workers=1)
    assert bytes_of(built) == before


def test_broken_pictures_are_named_and_left_out(rated, tmp_path, capsys):
    """Noise, an empty file and a cut-off JPEG are named and counted; the others are stored."""
    rated[1].path.write_bytes(np.random.default_rng(0).bytes(5000))
    rated[2].path.write_bytes(b"")
    whole = cv2.imencode(".jpg", cv2.imread(str(rated[3].path)))[1].tobytes()
    cut = rated[3].path.with_suffix(".jpg")
    cut.write_bytes(whole[: len(whole) // 2])
    items = [*rated[:3], dataclasses.replace(rated[3], path=cut), *rated[4:]]
    jobs = plan_jobs(None, {"biq2021": items})
    folder = tmp_path / "out"
    manifest = build_shards(folder, jobs, settings=SMALL, made_by="test", workers=1)
    names = [left.name for left in manifest.left_out]
    assert names == [f"biq2021/Images/{i}.png" for i in (1, 2, 3)]
    assert manifest.num_pictures == {"train": 5, "validation": 1}
    assert "3 pictures could not be read and are left out: biq2021/Images/1.png" in (
        capsys.readouterr().err
    )
    assert str(tmp_path) not in (folder / MANIFEST).read_text()


def test_a_jpeg_cut_after_its_thumbnail_is_cut_off(make_picture, tmp_path):
    """The thumbnail's end marker lies within the last 4,096 bytes and does not pass for the end."""
    big, small = (
        cv2.imencode(".jpg", make_picture(3, size, size))[1].tobytes() for size in (256, 32)
    )
    segment = b"Exif\0\0" + small
    header = b"\xff\xe1" + (len(segment) + 2).to_bytes(2, "big") + segment
    path = tmp_path / "cut.jpg"
    whole = big[:2] + header + big[2:]
    path.write_bytes(whole)
    assert read_rgb(path, longest_px=512).shape == (256, 256, 3)
    cut = whole[: len(header) + 2500]
    assert b"\xff\xd9" in cut[-4096:]
    path.write_bytes(cut)
    with pytest.raises(ValueError, match="cut off"):
        read_rgb(path, longest_px=512)


def test_more_broken_pictures_than_allowed_stop_the_run(rated, tmp_path):
    """Three broken where two may be: an error with the number and names; repaired, it goes on."""
    good = {i: rated[i].path.read_bytes() for i in (1, 2, 4)}
    for i in good:
        rated[i].path.write_bytes(b"no picture")
    jobs = plan_jobs(None, {"biq2021": rated})
    folder = tmp_path / "out"
    with pytest.raises(SourceError, match=r"3 pictures cannot be read and 2 may .*Images/1\.png"):
        build_shards(folder, jobs, settings=SMALL, made_by="t", workers=1, max_left_out=2)
    for i, content in good.items():
        rated[i].path.write_bytes(content)
    manifest = build_shards(folder, jobs, settings=SMALL, made_by="t", workers=1, max_left_out=2)
    assert manifest.num_pictures == {"train": 8, "validation": 1}
    assert manifest.left_out == []


def test_human_labels_are_kept_and_the_test_part_is_not(rated, tmp_path):
    """MOS, its spread and its split come back for nine pictures; the tenth is the test part's."""
    jobs = plan_jobs(None, {"biq2021": rated})
    build_shards(tmp_path / "out", jobs, settings=SMALL, made_by="test", workers=1)
    reader = ShardReader(tmp_path / "out")
    wanted = [(f"biq2021/{i.name}", i.mos, i.mos_std, i.split) for i in rated[:9]]
    assert [(r.name, r.mos, r.mos_std, r.split) for r in reader.records] == wanted
    assert all(r.pseudo_mos is None for r in reader.records)


FULL = """
import resource, sys
from pathlib import Path
resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, 150_000))
"""


def test_a_full_disk_is_one_error_and_can_be_gone_on_from(built, pristine, tmp_path):
    """Where a file cannot grow there is one error, no half shard, and later the same bytes."""
    folder = tmp_path / "out"
    script = tmp_path / "make.py"
    script.write_text(FULL + SCRIPT)
    settings = msgspec.json.encode(SMALL).decode()
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, str(script), str(pristine), str(folder), settings, "1"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert "SinkError: no room for shard-00000-00.zip" in run.stderr
    assert not list(folder.glob("*.part"))
    assert not list(folder.glob("shard-*.zip"))
    build_shards(folder, plan_jobs(pristine, {}), settings=SMALL, made_by="test", workers=1)
    assert bytes_of(folder) == bytes_of(built)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="mounting needs root")
def test_a_full_file_system_is_one_error(make_picture, tmp_path):
    """On a file system of 256 KiB the error names the shard, and nothing half-written is left."""
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(tmp_path)],
        capture_output=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip(f"no tmpfs here: {mounted.stderr.decode().strip()}")
    try:
        writer = ShardWriter(tmp_path, "shard-00000")
        for i in range(9):
            writer.add(ShardRecord(f"{i}", "c", "train", "s"), make_picture(i, 256, 256))
        with pytest.raises(SinkError, match=r"no room for shard-00000-00\.zip .*make room"):
            writer.flush()
        assert list(tmp_path.iterdir()) == []
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_pseudo_mos_is_stored_in_order_with_confidence(pristine, tmp_path):
    """Ladders fall, chains are rated too, the clean picture is 1; each measure is kept."""
    pytest.importorskip("piq")
    settings = ShardSettings(degradations=("gaussian_blur", "h264"), num_chains=2)
    jobs = plan_jobs(pristine, {})[:1]
    build_shards(tmp_path, jobs, settings=settings, made_by="test", workers=1)
    records = ShardReader(tmp_path).records
    clean = next(r for r in records if r.degradation == "clean")
    assert (clean.pseudo_mos, clean.confidence) == (1.0, 1.0)
    for name in settings.degradations:
        scores = [r.pseudo_mos for r in records if r.degradation == name]
        assert scores == sorted(scores, reverse=True)
        assert scores[-1] < scores[0] < 1
    chains = [r for r in records if "+" in r.degradation]
    assert len(chains) == 2
    assert all(set(r.impairments) == {"mdsi", "haarpsi", "vsi", "ms_gmsd"} for r in chains)
    assert all(0 <= r.confidence <= 1 for r in records)


def test_a_reader_goes_to_another_process(built):
    """Pickled after use, a reader reads the same pictures elsewhere, in any order."""
    reader = ShardReader(built, split="validation")
    first = [reader.picture(r) for r in reader.records]
    copy = pickle.loads(pickle.dumps(reader))
    assert len(copy) == len(first)
    for record, wanted in reversed(list(zip(copy.records, first, strict=True))):
        np.testing.assert_array_equal(copy.picture(record), wanted)
    reader.close()
    np.testing.assert_array_equal(next(iter(reader))[1], first[0])


def test_a_damaged_shard_is_named_when_read(built, pristine, tmp_path):
    """A shard that is no ZIP file any more, and a manifest that is none, are told by name."""
    build_shards(tmp_path, plan_jobs(pristine, {})[:1], settings=SMALL, made_by="t", workers=1)
    (tmp_path / "shard-00000-00.zip").write_bytes(b"PK nothing")
    with pytest.raises(SourceError, match=r"shard-00000-00\.zip cannot be read.*again"):
        ShardReader(tmp_path)
    (tmp_path / MANIFEST).write_text('{"schema": "dgiqa.shards/9"}')
    with pytest.raises(SourceError, match="is no manifest"):
        ShardReader(tmp_path)


def test_an_unknown_split_names_those_there_are(built):
    """A misspelt split is an error with the splits of the folder."""
    with pytest.raises(ConfigError, match="no split 'tarin'; its splits are train, validation"):
        ShardReader(built, split="tarin")


def test_a_shard_is_an_ordinary_zip_file(built):
    """Any ZIP reader finds its pictures stored (not compressed twice) and its list of records."""
    with zipfile.ZipFile(built / "shard-00000-00.zip") as archive:
        assert archive.testzip() is None
        assert {i.compress_type for i in archive.infolist()} == {zipfile.ZIP_STORED}
        listing = msgspec.json.decode(archive.read("records.json"), type=list[ShardRecord])
        assert decode_picture(archive.read(listing[0].member)).shape == (96, 128, 3)


def test_a_picture_larger_than_a_shard_is_refused(make_picture, tmp_path):
    """It could never travel: the error has both sizes and what to do."""
    writer = ShardWriter(tmp_path, "shard-00000", max_bytes=20_000)
    with pytest.raises(ConfigError, match="a shard at most 20000: reduce the longest side"):
        writer.add(ShardRecord("big", "c", "train", "s"), make_picture(0, 256, 256))


def test_pictures_are_coded_without_loss(make_picture):
    """Every byte of a picture, odd sizes and pure noise among them, survives the shard's coding."""
    noise = np.random.default_rng(0).integers(0, 256, (33, 47, 3), dtype=np.uint8)
    for picture in (make_picture(0, 95, 63), noise):
        np.testing.assert_array_equal(decode_picture(encode_picture(picture)), picture)
    with pytest.raises(ValueError, match="4 bytes are not a picture"):
        decode_picture(b"none")


def test_random_chains_end_in_the_stream(make_picture):
    """Of a scene's and a stream's degradation the stream's comes last, in every draw."""
    for seed in range(20):
        made = random_chain(np.random.default_rng(seed), ("h264", "haze"))
        assert [step.name for step, _ in made.steps] == ["haze", "h264"]


def test_nothing_to_do_is_said(tmp_path):
    """No source, an empty folder and a set of clips are told before anything is written."""
    with pytest.raises(ConfigError, match="nothing to put into shards"):
        plan_jobs(None, {})
    with pytest.raises(FileNotFoundError, match="no clean pictures in"):
        plan_jobs(tmp_path, {})
    with pytest.raises(ConfigError, match="lsvq is a set of clips"):
        plan_jobs(None, {"lsvq": []})


def test_the_command_goes_on_without_missing_pictures(make_picture, tmp_path):
    """Without one file of BIQ2021 the command stops and names the option, with which it makes
    shards of the others.
    """
    root = tmp_path / "biq"
    (root / "Images").mkdir(parents=True)
    names = [f"{i}.png" for i in range(12)]
    for split, part in (("Train", names[:10]), ("Test", names[10:])):
        rows = "".join(f"{name},0.5\n" for name in part)
        (root / f"{split} (Images and MOS).csv").write_text(f"Image Name,MOS\n{rows}")
    for i, name in enumerate(names):
        assert cv2.imwrite(str(root / "Images" / name), make_picture(i, 64, 64))
    (root / "Images/4.png").unlink()
    app = typer.Typer()
    app.command()(shards_command)
    app.command()(lambda: None)
    call = ["shards", str(tmp_path / "out"), "--rated", f"biq2021={root}", "--workers", "1"]
    refused = CliRunner().invoke(app, call)
    assert isinstance(refused.exception, FileNotFoundError)
    assert re.search(r"1 of 12 .*4\.png.*--missing leave-out", str(refused.exception))
    result = CliRunner().invoke(app, [*call, "--missing", "leave-out"], catch_exceptions=False)
    assert result.exit_code == 0
    stored = {Path(r.name).name for r in ShardReader(tmp_path / "out", verify=True).records}
    assert stored == set(names[:10]) - {"4.png"}


def test_the_command_makes_shards(pristine, tmp_path):
    """Registered with an app, ``shards`` writes a folder that its reader reads."""
    app = typer.Typer()
    app.command()(shards_command)
    app.command()(lambda: None)  # a second command, so that the first keeps its name
    options = ["--pristine", str(pristine), "--degradations", "banding", "--chains", "0"]
    call = ["shards", str(tmp_path), *options, "--no-pseudo-mos", "--workers", "1"]
    result = CliRunner().invoke(app, call)
    assert result.exit_code == 0, result.output
    records = ShardReader(tmp_path, verify=True).records
    assert {r.degradation for r in records} == {"clean", "banding"}
    assert shards_module.MAX_SHARD_BYTES == 14 * 1024 * 1024
