"""A teacher's labels: what it said, where it said it, of these pictures and no others."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import msgspec
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from dgiqa_stream.errors import ConfigError, ModelError, SinkError, SourceError  # noqa: E402
from distill import labelling  # noqa: E402
from distill.data import labels as labels_module  # noqa: E402
from distill.data.depth import ClassicalDepth  # noqa: E402
from distill.data.labels import LabelReader, as_looked_at, overlap, read_label_manifest  # noqa: E402
from distill.data.loader import Draw, Look  # noqa: E402
from distill.data.shards import ShardReader, sha256_of, write_json  # noqa: E402
from distill.describing import describe_crops, over_picture  # noqa: E402
from distill.models.teacher import Dgiqa  # noqa: E402
from distill.models.teacher_file import LoadedTeacher  # noqa: E402
from distill.teacher_score import GridProtocol, score_picture  # noqa: E402

WHOLE = Look((0.0, 0.0, 1.0, 1.0), False, np.zeros((1, 1, 2)))
NUM_PICTURES = 37


@pytest.fixture
def reader(shards):
    """All shards."""
    return ShardReader(shards)


@pytest.fixture
def read(labels, reader):
    """The labels of all shards."""
    return LabelReader(labels, reader.manifest, reader.records)


def damaged_copy(shards, folder, member="000001.webp"):
    """The first shard with one bit of one picture flipped, where its ZIP still opens."""
    folder.mkdir(parents=True)
    for path in shards.iterdir():
        if path.is_file():
            (folder / path.name).write_bytes(path.read_bytes())
    path = sorted(folder.glob("shard-*.zip"))[0]
    with zipfile.ZipFile(path) as archive:
        offset = archive.getinfo(member).header_offset
    content = bytearray(path.read_bytes())
    content[offset + 400] ^= 1
    path.write_bytes(content)
    return folder


def test_a_label_is_what_the_teacher_says(read, reader, teacher):
    """Scores of every crop are those of ``score_picture``, to float32's rounding; the mean and the
    deviation over crops stand beside them, and every picture has a label.
    """
    assert len(read) == len(reader.records) == NUM_PICTURES
    for record in reader.records[::9]:
        rgb = reader.picture(record)
        wanted = score_picture(
            teacher.model, rgb, ClassicalDepth()(rgb), protocol=GridProtocol(1, 2)
        )
        row = read._row(record.name)
        np.testing.assert_allclose(100 * row["crop_scores"], wanted.crop_scores, atol=1e-3)
        assert 100 * row["score"] == pytest.approx(wanted.score, abs=1e-3)
        assert 100 * row["spread"] == pytest.approx(wanted.spread, abs=1e-3)


def test_features_of_a_label_are_the_teachers(read, reader, teacher):
    """With one crop's cells scattered by hand, fused map and pooled vector of a label are means of
    the teacher's own over the crops that see them, to float16's rounding.
    """
    record = reader.records[0]
    rgb = reader.picture(record)
    seen = list(_cut(reader, record))
    out = describe_crops(teacher.model, *seen[:2], at_once=9)
    row = read._row(record.name)
    np.testing.assert_allclose(row["pooled"], out.pooled.mean(0), rtol=2e-3, atol=1e-4)
    # by sampling: 70x70 points of the picture, each the mean of the crops' cells it lies in
    height, width = seen[3]
    total, count = np.zeros((out.fused.shape[1], 70, 70)), np.zeros((70, 70))
    ys, xs = ((np.arange(70) + 0.5) * n / 70 for n in (height, width))
    for crop, (top, left) in zip(out.fused, seen[2], strict=True):
        inside = np.ix_((ys >= top) & (ys < top + 224), (xs >= left) & (xs < left + 224))
        rows = ((ys - top) // 32).astype(int)[(ys >= top) & (ys < top + 224)]
        columns = ((xs - left) // 32).astype(int)[(xs >= left) & (xs < left + 224)]
        total[:, inside[0], inside[1]] += crop[:, rows[:, None], columns[None]]
        count[inside] += 1
    cells = [a.reshape(*a.shape[:-2], 7, 10, 7, 10).sum((-3, -1)) for a in (total, count)]
    is_seen = cells[1] > 30  # of 100 points, so that few decide nothing
    assert is_seen.sum() > 20
    wanted = cells[0][:, is_seen] / cells[1][is_seen]
    error, spread = np.abs(row["fused"][:, is_seen] - wanted), wanted.std()
    assert error.max() < 0.35 * spread  # a point stands for a tenth of a cell's side
    assert error.mean() < 0.03 * spread
    assert rgb.shape == (96, 128, 3)


def _cut(reader, record):
    """Crops, depth, places and size of one picture, as the labelling cuts it."""
    job = labelling._Labelling(None, ClassicalDepth(), GridProtocol(1, 2), reader, Path(), 9, 0)
    [seen] = job._seen([record], [])
    return seen.crops, seen.depth, seen.places, seen.size


def test_attention_is_a_distribution(read, reader):
    """Of every look at every picture the attention is not negative and sums to 1."""
    look = Look((0.05, 0.1, 0.85, 0.9), True, np.zeros((1, 1, 2)))
    targets = read.targets([Draw(r, look) for r in reader.records])
    assert targets.attention.min() >= 0
    np.testing.assert_allclose(targets.attention.sum((1, 2)), 1, atol=1e-5)


def test_four_crops_that_tile_a_picture_are_its_quarters():
    """Constant maps of the four quarters come back as four constant quarters; the row and column
    in the middle are the mean of both sides.
    """
    maps = np.arange(1.0, 5.0)[:, None, None] * np.ones((4, 7, 7))
    places = [(0, 0), (0, 224), (224, 0), (224, 224)]
    found = over_picture(maps, places, (448, 448))
    np.testing.assert_allclose(found[:3, :3], 1, rtol=1e-6)
    np.testing.assert_allclose(found[:3, 4:], 2, rtol=1e-6)
    np.testing.assert_allclose(found[4:, :3], 3, rtol=1e-6)
    np.testing.assert_allclose(found[4:, 4:], 4, rtol=1e-6)
    assert found[3, 3] == pytest.approx(2.5)


def test_what_no_crop_sees_is_the_mean_of_the_rest():
    """One crop in the corner of a wide picture fills the other cells with its own mean."""
    crop = np.arange(49.0).reshape(1, 7, 7)
    found = over_picture(crop, [(0, 0)], (224, 1568))
    np.testing.assert_allclose(found[:, 0], crop[0].mean(1), rtol=1e-6)
    np.testing.assert_allclose(found[:, 1:], crop.mean(), rtol=1e-6)


def test_overlap_shares_out_every_cell():
    """Rows sum to 1, and the whole onto itself is the identity."""
    share = overlap(0.13, 0.94, 7, 7)
    np.testing.assert_allclose(share.sum(1), 1, rtol=1e-6)
    np.testing.assert_allclose(overlap(0, 1, 7, 7), np.eye(7), atol=1e-6)


def test_a_map_is_mirrored_with_its_picture():
    """A mirrored look at the whole picture has the map's columns in reverse."""
    maps = np.random.default_rng(1).normal(size=(3, 7, 7)).astype(np.float32)
    mirrored = dataclasses.replace(WHOLE, mirrored=True)
    np.testing.assert_allclose(as_looked_at(maps, WHOLE), maps, atol=1e-6)
    np.testing.assert_allclose(as_looked_at(maps, mirrored), maps[..., ::-1], atol=1e-6)


def test_a_crop_of_a_ramp_is_the_ramp_there():
    """A map that rises linearly to the right, seen through a crop, gives the crop's own places."""
    ramp = np.tile((np.arange(7) + 0.5) / 7, (7, 1))
    look = dataclasses.replace(WHOLE, crop_share=(0.1, 0.15, 0.85, 0.8))
    found = as_looked_at(ramp, look)
    wanted = 0.15 + 0.8 * (np.arange(7) + 0.5) / 7
    # a cell's value stands for all of it: half a cell's rise, less what is shared
    np.testing.assert_allclose(found, np.tile(wanted, (7, 1)), atol=0.5 / 7)


def test_a_picture_without_a_label_has_none(read, reader):
    """A picture that was not labelled gets NaN, and the others theirs."""
    strange = msgspec.structs.replace(reader.records[0], name="new")
    targets = read.targets([Draw(strange, WHOLE), Draw(reader.records[1], WHOLE)])
    assert np.isnan(targets.crop_scores[0]).all()
    assert np.isnan(targets.fused[0]).all()
    assert np.isfinite(targets.crop_scores[1]).all()


KILLED = """
import os, signal, sys
from pathlib import Path
import torch
from distill import labelling
from distill.data.depth import ClassicalDepth
from distill.models.teacher_file import LoadedTeacher
from distill.models.teacher import Dgiqa, TeacherSpec
from distill.teacher_score import GridProtocol

shards, folder = map(Path, sys.argv[1:])
torch.set_num_threads(1)
torch.manual_seed(6)
model = Dgiqa(TeacherSpec("mobilenetv2", (8, 8, 16, 16), 4, 24)).eval()
honest, calls = labelling.describe_crops, []

def describe_crops(*args, **options):
    calls.append(1)
    if len(calls) == 6:
        os.kill(os.getpid(), signal.SIGKILL)
    return honest(*args, **options)

labelling.describe_crops = describe_crops
labelling.label_shards(LoadedTeacher(model, "0.0.1", "a" * 64, 1), ClassicalDepth(),
    GridProtocol(1, 2), shards, folder, teacher_name="t.safetensors", made_by="test")
"""


@pytest.mark.slow
def test_a_killed_labelling_ends_like_another(label, labels, shards, tmp_path):
    """Killed by SIGKILL in the middle of a shard and run again, every file and the manifest are
    byte for byte those of a run left alone, and what was finished was not made again.
    """
    env = dict(os.environ) | {"PYTHONPATH": str(Path(labels_module.__file__).parents[2])}
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, str(shards), str(tmp_path)],
        check=False, env=env, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    finished = {p.name: p.stat().st_mtime_ns for p in tmp_path.glob("*.npy")}
    assert finished
    assert not (tmp_path / "manifest.json").exists()
    label(shards, tmp_path)
    assert {n: (tmp_path / n).stat().st_mtime_ns for n in finished} == finished
    names = sorted(p.name for p in labels.iterdir() if p.is_file())
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_file()) == names
    assert [sha256_of(tmp_path / n) for n in names] == [sha256_of(labels / n) for n in names]


def test_labels_say_who_made_them(labels):
    """The manifest has the teacher's digest, version, protocol and depth, and what was labelled."""
    manifest = read_label_manifest(labels)
    assert manifest.teacher.sha256 == "a" * 64
    assert manifest.teacher.version == "0.0.1"
    assert manifest.teacher.protocol == "grid: 1x2 crops"
    assert manifest.teacher.depth.startswith("classical")
    assert manifest.num_pictures == NUM_PICTURES
    assert manifest.shapes.channels == 48
    assert manifest.shapes.has_attention


@pytest.mark.parametrize(
    ("change", "words"),
    [({"sha256": "b" * 64}, "of another teacher"), ({"version": "2"}, "another protocol")],
)
def test_a_folder_of_other_labels_is_refused(labels, label, teacher, shards, change, words):
    """Another teacher cannot go on in a folder of labels, and nothing in it is touched."""
    before = {p: sha256_of(p) for p in labels.rglob("*") if p.is_file()}
    with pytest.raises(ConfigError, match=words):
        label(shards, labels, by=dataclasses.replace(teacher, **change))
    assert {p: sha256_of(p) for p in labels.rglob("*") if p.is_file()} == before


def test_labels_of_other_shards_are_refused(labels, shards, write_shards, label, tmp_path, reader):
    """Labels are not read beside shards of other pictures, nor is their folder gone on with."""
    pictures = [(r, reader.picture(r)) for r in reader.records[:20]]
    other = ShardReader(write_shards(tmp_path / "other", pictures))
    with pytest.raises(ConfigError, match="are of other shards"):
        LabelReader(labels, other.manifest, other.records)
    with pytest.raises(ConfigError, match="holds labels of other shards"):
        label(tmp_path / "other", labels)


def test_a_label_without_a_picture_is_told(labels, reader):
    """Labels that name a picture which the shards lack are one line with that name."""
    lacking = [r for r in reader.records if r.name != "set/3.jpg"]
    with pytest.raises(SourceError, match=r"labels 1 pictures that the shards lack, set/3\.jpg"):
        LabelReader(labels, reader.manifest, lacking)


def test_a_corrupt_picture_is_left_out_and_named(shards, label, tmp_path):
    """One picture with a flipped bit costs its own label alone; the manifest names it."""
    folder = label(damaged_copy(shards, tmp_path / "s"), tmp_path / "labels")
    manifest = read_label_manifest(folder)
    assert [left.name for left in manifest.left_out] == ["set/1.jpg"]
    assert manifest.num_pictures == NUM_PICTURES - 1


def test_too_many_corrupt_pictures_stop(shards, label, tmp_path):
    """Where none may be left out, one corrupt picture is one line, and there is no manifest."""
    damaged = damaged_copy(shards, tmp_path / "s")
    with pytest.raises(
        SourceError, match="1 pictures cannot be read and 0 may be left out"
    ) as told:
        label(damaged, tmp_path / "labels", max_left_out=0)
    assert "\n" not in str(told.value)
    assert not (tmp_path / "labels" / "manifest.json").exists()


def test_a_teacher_that_says_nan_is_refused(shards, label, teacher, tmp_path):
    """Weights that are NaN end in one line naming the picture, and no label is left."""
    model = Dgiqa(teacher.model.spec).eval()
    with torch.no_grad():
        model.fc.weight.fill_(float("nan"))
    with pytest.raises(ModelError, match=r"output for set/0\.jpg is not finite"):
        label(shards, tmp_path, by=LoadedTeacher(model, "1", "c" * 64, 1))
    assert not list(tmp_path.glob("*.npy*"))


def test_a_damaged_file_of_labels_is_told(labels, reader, tmp_path):
    """A file that is shorter than its manifest says is one line with its name."""
    for path in labels.iterdir():
        if path.is_file():
            (tmp_path / path.name).write_bytes(path.read_bytes())
    broken = sorted(tmp_path.glob("*.npy"))[0]
    broken.write_bytes(broken.read_bytes()[:-8])
    with pytest.raises(SourceError, match=rf"{broken.name} is missing or not as it was written"):
        LabelReader(tmp_path, reader.manifest, reader.records)


def test_scores_off_the_scale_are_refused(labels, reader, tmp_path):
    """A label of 1.5 is an error when it is read, with the picture's name."""
    for path in labels.iterdir():
        if path.is_file():
            (tmp_path / path.name).write_bytes(path.read_bytes())
    path = sorted(tmp_path.glob("*.npy"))[0]
    rows = np.load(path)
    rows["crop_scores"][0] = 1.5
    np.save(path, rows)
    read = LabelReader(tmp_path, reader.manifest, reader.records)
    with pytest.raises(SourceError, match=r"no label of set/0\.jpg"):
        read.targets([Draw(reader.records[0], WHOLE)])


def test_a_full_disk_leaves_no_half_file(shards, label, tmp_path, monkeypatch):
    """Where the disk is full there is one line, no file without its name, and a second run ends
    as the first should have.
    """
    honest, calls = np.save, []

    def save(out, *args, **options):
        calls.append(1)
        if len(calls) == 2:
            out.write(b"half")
            raise OSError(28, os.strerror(28))
        return honest(out, *args, **options)

    monkeypatch.setattr(np, "save", save)
    with pytest.raises(SinkError, match="no room for"):
        label(shards, tmp_path)
    assert not list(tmp_path.rglob("*.part"))
    assert len(list(tmp_path.glob("*.npy"))) == 1
    label(shards, tmp_path)
    assert read_label_manifest(tmp_path).num_pictures == NUM_PICTURES


def test_a_manifest_that_is_none_is_told(tmp_path):
    """No manifest, or another file in its place, says which command makes it."""
    with pytest.raises(SourceError, match=r"no whole set of labels.*dgiqa-distill label"):
        read_label_manifest(tmp_path)
    write_json(tmp_path / "manifest.json", {"schema": "other"})
    with pytest.raises(SourceError, match="is no manifest of labels"):
        read_label_manifest(tmp_path)
