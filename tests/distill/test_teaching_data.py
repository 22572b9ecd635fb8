"""Where a teacher's pictures and labels come from, and the commands that use them."""

from __future__ import annotations

import csv
import json
import math
import sys

import cv2
import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("safetensors")

from dgiqa_stream.errors import ConfigError, ModelError, SourceError  # noqa: E402
from distill import cli  # noqa: E402
from distill.data.depth import ClassicalDepth  # noqa: E402
from distill.data.packed import Record, as_planes_420, write_pack  # noqa: E402
from distill.data.shards import Manifest, ShardRecord, ShardWriter, write_json  # noqa: E402
from distill.models.official import open_teacher  # noqa: E402
from distill.models.teacher import Dgiqa, TeacherSpec  # noqa: E402
from distill.models.teacher_file import save_teacher  # noqa: E402
from distill.teacher_score import GridProtocol, score_picture  # noqa: E402
from distill.teachers import pictures as teachers_pictures  # noqa: E402
from distill.teachers.pictures import (  # noqa: E402
    CropLoader,
    JoinedPictures,
    LabelledFolder,
    LabelledShards,
    PackPictures,
    read_labels,
    read_rgb,
)
from distill.teachers.recipe import ExpansionConfig  # noqa: E402
from distill.teachers.unrated import label_by_content, label_by_teacher  # noqa: E402

RECIPE = """
name = "tiny"
version = "0.0.1"
[model]
architecture = "dgiqa"
backbone = "mobilenetv2"
bridge_channels = [4, 4, 4, 4]
num_heads = 2
pooled_channels = 8
[data]
num_validation = 4
seed = 3
[train]
seed = 3
num_epochs = 1
batch = 4
head_rate = 3e-3
pyramid_rate = 0.0
warmup_steps = 2
weight_decay = 0.02
ema_decay = 0.9
evaluation_crops = 1
[expansion]
num_crops = 4
temperature = 0.02
"""


def read_rows(path):
    """A CSV file as dicts."""
    with path.open(newline="") as rows:
        return list(csv.DictReader(rows))


def write_labels(path, *rows):
    """Labels with the header that is needed."""
    path.write_text("\n".join(["name,quality,weight", *rows]) + "\n")
    return path


@pytest.fixture
def call(monkeypatch, capsys):
    """``call(*words)``: exit code, output and error lines of ``dgiqa-distill``."""

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["dgiqa-distill", *map(str, words)])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        told = capsys.readouterr()
        return caught.value.code or 0, told.out, told.err.strip().splitlines()

    return call


@pytest.fixture(scope="module")
def unrated(make_picture, tmp_path_factory):
    """A folder of three pictures, one file that is none, and one that is no picture's name."""
    folder = tmp_path_factory.mktemp("unrated")
    for seed in (50, 51, 52):
        cv2.imwrite(str(folder / f"{seed}.png"), make_picture(seed)[..., ::-1])
    (folder / "broken.png").write_bytes(b"not a picture")
    (folder / "notes.txt").write_text("x")
    return folder


@pytest.fixture(scope="module")
def teacher_file(tmp_path_factory):
    """A random teacher on MobileNetV2 whose last layer is steep, so that crops differ."""
    torch.manual_seed(5)
    net = Dgiqa(TeacherSpec("mobilenetv2", (4, 4, 4, 4), 2, 8)).eval()
    with torch.no_grad():
        net.fc.weight.mul_(40)
    path = tmp_path_factory.mktemp("teacher") / "tiny.safetensors"
    save_teacher(net, path, version="0.0.1", depth=ClassicalDepth().identity)
    return path


def shards_of(folder, records, make_picture):
    """Shards with these records."""
    folder.mkdir()
    writer = ShardWriter(folder, "shard-0")
    for number, record in enumerate(records):
        writer.add(record, make_picture(number))
    writer.flush()
    splits = {r.split: 1 for r in records}
    write_json(folder / "manifest.json", Manifest("test", {}, [], {}, splits, writer.written, []))
    return folder


def test_shards_teach_by_people_and_by_measures(make_picture, tmp_path):
    """MOS counts 1 and a pseudo-MOS its confidence; test pictures and unlabelled ones are left out,
    and where people rated validation pictures, no pseudo-MOS chooses.
    """
    records = [
        ShardRecord("a", "a", "train", "x", mos=0.25),
        ShardRecord("b", "b", "train", "x", pseudo_mos=0.5, confidence=0.3),
        ShardRecord("c", "c", "train", "x"),
        ShardRecord("d", "d", "validation", "x", mos=0.0),
        ShardRecord("e", "e", "validation", "x", pseudo_mos=0.9, confidence=0.8),
        ShardRecord("f", "f", "test", "x", mos=0.9),
    ]
    found = LabelledShards(shards_of(tmp_path / "both", records, make_picture))
    told = [(p.name, p.split, p.quality, p.weight) for p in found.pictures]
    assert told == [
        ("a", "train", 0.25, 1.0),
        ("b", "train", 0.5, 0.3),
        ("d", "validation", 0.0, 1.0),
    ]
    np.testing.assert_array_equal(found.rgb(2), make_picture(3))
    unrated_only = [r for r in records if r.mos is None]
    alone = LabelledShards(shards_of(tmp_path / "pseudo", unrated_only, make_picture))
    assert [p.name for p in alone.pictures] == ["b", "e"]


def test_a_pack_gives_no_test_picture(make_picture, tmp_path):
    """Of train, validation, test and unrated pictures the first two are given, as RGB."""
    rgb = make_picture(1)
    records = [
        (Record("a", "a", "train", mos=0.2), as_planes_420(rgb)),
        (Record("b", "b", "test", mos=0.3), as_planes_420(rgb)),
        (Record("c", "c", "validation", mos=0.4), as_planes_420(rgb)),
        (Record("d", "d", "train"), as_planes_420(rgb)),
    ]
    write_pack(tmp_path / "pack", records, made_by="test", settings={})
    found = PackPictures(tmp_path / "pack")
    assert [(p.name, p.quality) for p in found.pictures] == [("a", 0.2), ("c", 0.4)]
    difference = np.abs(found.rgb(1).astype(int) - rgb)
    assert difference.mean() < 6  # 4:2:0 halves the colours' resolution


def test_joined_sets_keep_their_pictures(packs, unrated, tmp_path):
    """The pictures of a second set follow those of the first, each read from its own."""
    labels = write_labels(tmp_path / "l.csv", "51.png,0.5,0.25", "50.png,0.75,1")
    pack, folder = PackPictures(packs / "rated"), LabelledFolder(unrated, labels)
    joined = JoinedPictures(pack, folder)
    number = len(pack.pictures)
    assert joined.pictures[number:] == folder.pictures
    np.testing.assert_array_equal(joined.rgb(number), read_rgb(unrated / "51.png"))
    np.testing.assert_array_equal(joined.rgb(0), pack.rgb(0))


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        (["a.png,1.5,1"], "within 0..1, not those of a.png"),
        (["a.png,0.5,nan"], "within 0..1"),
        (["a.png,good,1"], "every row needs name, quality, weight"),
        ([], "there must be some"),
    ],
)
def test_labels_that_cannot_be_are_refused(tmp_path, rows, told):
    """A label outside 0..1, a word, or none at all is one error naming the file."""
    with pytest.raises(SourceError, match=rf"l\.csv.*{told}"):
        read_labels(write_labels(tmp_path / "l.csv", *rows))


def test_labels_of_absent_pictures_are_refused(unrated, tmp_path):
    """A label whose picture is not in the folder is told before training."""
    labels = write_labels(tmp_path / "l.csv", "gone.png,0.5,1")
    with pytest.raises(SourceError, match=r"1 pictures of .*first gone\.png"):
        LabelledFolder(unrated, labels)


def test_a_teachers_labels_are_its_mean_and_agreement(unrated, teacher_file, tmp_path, capsys):
    """Quality is the mean over four crops, weight exp(-variance / temperature); the broken file is
    told, and what is there is not made again.
    """
    config = ExpansionConfig(4, 0.02)
    output, depth = tmp_path / "labels.csv", ClassicalDepth()
    words = {"depth": depth, "config": config, "device": "cpu"}
    assert label_by_teacher(unrated, teacher_file, output, **words) == 3
    assert "broken.png" in capsys.readouterr().err
    rows = {row["name"]: row for row in read_rows(output)}
    model, rgb = open_teacher(teacher_file).model, read_rgb(unrated / "51.png")
    said = score_picture(model, rgb, depth(rgb), protocol=GridProtocol(2, 2))
    crops = np.array(said.crop_scores) / 100
    assert crops.std() > 0
    assert float(rows["51.png"]["quality"]) == pytest.approx(crops.mean(), abs=1e-5)
    expected = math.exp(-crops.var() / 0.02)
    assert float(rows["51.png"]["weight"]) == pytest.approx(expected, abs=1e-5)
    before = output.stat().st_mtime_ns
    assert label_by_teacher(unrated, teacher_file, output, **words) == 3
    assert output.stat().st_mtime_ns == before
    with pytest.raises(ConfigError, match="other settings"):
        label_by_teacher(
            unrated, teacher_file, output, depth=depth, config=ExpansionConfig(1), device="cpu"
        )


def test_transferred_labels_find_the_same_picture(packs, backbone, tmp_path):
    """A rated picture given as unrated gets its own MOS at similarity 1 and names itself."""
    rated = PackPictures(packs / "rated")
    folder = tmp_path / "new"
    folder.mkdir()
    for i in (2, 5):
        cv2.imwrite(str(folder / f"{i}.png"), rated.rgb(i)[..., ::-1])
    output = tmp_path / "labels.csv"
    number = label_by_content(
        folder, rated, output, extractor="mobilenetv2", weights=backbone, device="cpu"
    )
    assert number == 2
    for row, i in zip(read_rows(output), (2, 5), strict=True):
        assert row["reference"] == rated.pictures[i].name
        assert float(row["quality"]) == pytest.approx(rated.pictures[i].quality, abs=1e-6)
        assert float(row["weight"]) == pytest.approx(1, abs=1e-4)  # one PNG was 4:2:0 before
    read_labels(output)


@pytest.mark.slow
def test_the_whole_command(call, packs, unrated, backbone, teacher_file, tmp_path):
    """`teach` with another teacher's labels and with labels of a file ends with a teacher that
    `score --teacher` reads; `transfer-labels` writes what --labels takes.
    """
    recipe = tmp_path / "tiny.toml"
    recipe.write_text(RECIPE)
    labels, run = tmp_path / "labels.csv", tmp_path / "run"
    words = ["--packs", packs, "--backbone", backbone, "--device", "cpu", "--threads", 1]
    code, _, lines = call("transfer-labels", unrated, *words, "-o", labels)
    assert (code, lines[-1][:8]) == (0, "3 labels")
    more = ["--pictures", unrated, "--labels", labels, "--unrated", unrated]
    more += ["--labeller", teacher_file, "--depth", "classical", "--steps", 2, "--run", run]
    code, out, lines = call("teach", recipe, *words, *more)
    assert code == 0, lines
    assert json.loads(out)["path"] == "teacher.safetensors"
    assert len(read_rows(run / "pseudo-labels.csv")) == 3
    told = ["--teacher", run / "teacher.safetensors", "--depth", "classical", "--crops", 1]
    code, out, lines = call("score", unrated / "50.png", *told, "-f", "csv", "--threads", 1)
    assert code == 0, lines
    (row,) = csv.DictReader(out.splitlines())
    assert 0 <= float(row["score"]) <= 100


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--run", "r"], "give --shards, --biq2021 or --packs"),
        (["--run", "r", "--packs", "p", "--shards", "s"], "come from one place"),
        (["--run", "r", "--packs", "p", "--labels", "l"], "--pictures and --labels go together"),
        (["--run", "r", "--packs", "p", "--unrated", "u"], "--unrated and --labeller"),
    ],
)
def test_options_that_do_not_fit_are_usage_errors(call, tmp_path, words, told):
    """Two rated sets, none, or half of a pair ends with 2 and one line, and leaves no run."""
    recipe = tmp_path / "tiny.toml"
    recipe.write_text(RECIPE)
    code, _, lines = call("teach", recipe, *words)
    assert code == 2
    assert len(lines) == 1
    assert told in lines[0]


def test_absent_packs_are_one_line(call, tmp_path):
    """Packs that are not there end `teach` with 3 and one line that says what makes them."""
    recipe = tmp_path / "tiny.toml"
    recipe.write_text(RECIPE)
    code, _, lines = call("teach", recipe, "--packs", tmp_path, "--run", tmp_path / "run")
    assert code == 3
    assert len(lines) == 1
    assert "dgiqa-distill data" in lines[0]


def test_a_whole_timm_network_fills_a_pyramid(tmp_path):
    """timm's weights of a classifier, as safetensors and as .pth with older names, give a pyramid
    of the same features; those of another network are refused by name.
    """
    timm = pytest.importorskip("timm")
    from safetensors.torch import save_file

    from distill.models.backbones import make_pyramid
    from distill.teachers.training import load_pyramid_

    torch.manual_seed(1)
    net = timm.create_model("swin_tiny_patch4_window7_224").eval()
    save_file(net.state_dict(), tmp_path / "swin.safetensors")
    torch.save({"model": net.state_dict()}, tmp_path / "swin.pth")
    picture = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        expected = net.layers(net.patch_embed(picture))  # (1, 7, 7, 768) before the last norm
        for name in ("swin.safetensors", "swin.pth"):
            pyramid = make_pyramid("swin_tiny_patch4_window7_224").eval()
            load_pyramid_(pyramid, tmp_path / name)
            torch.testing.assert_close(pyramid(picture)[-1], expected)
    with pytest.raises(ModelError, match=r"swin\.pth does not fit"):
        load_pyramid_(make_pyramid("resnet10t"), tmp_path / "swin.pth")


class Breaking:
    """Pictures of which some cannot be read."""

    def __init__(self, pictures, broken):
        self._from, self._broken, self.pictures = pictures, broken, pictures.pictures

    def rgb(self, index):
        """Of the set, or the error of a broken one."""
        if self.pictures[index].name in self._broken:
            raise SourceError(f"{self.pictures[index].name} is broken")
        return self._from.rgb(index)


def test_an_unreadable_picture_is_left_out(packs, capsys):
    """Another picture with its own label stands in for one that cannot be read, which is told once;
    batches of the others stay what they were.
    """
    honest = PackPictures(packs / "rated")
    train = [p for p in honest.pictures if p.split == "train"]
    loaders = [
        CropLoader(pictures, None, batch=4, seed=3)
        for pictures in (honest, Breaking(honest, {train[2].name}))
    ]
    told = [[loader(number) for number in range(loader.batches_per_epoch)] for loader in loaders]
    assert loaders[1].left_out == {train[2].name: f"{train[2].name} is broken"}
    pairs = [
        (torch.equal(mine.picture[k], theirs.picture[k]), mine.quality[k], theirs.quality[k])
        for mine, theirs in zip(*told, strict=True)
        for k in range(4)
    ]
    (changed,) = [(before, after) for is_same, before, after in pairs if not is_same]
    assert torch.stack(changed).tolist() == pytest.approx([train[2].quality, train[3].quality])
    assert capsys.readouterr().err.count("left out") == 1


def test_too_many_unreadable_pictures_stop(packs, monkeypatch):
    """One more than may be left out is one line with both numbers and a reason."""
    monkeypatch.setattr(teachers_pictures, "MAX_LEFT_OUT", 1)
    honest = PackPictures(packs / "rated")
    broken = {p.name for p in honest.pictures if p.split == "train"}
    loader = CropLoader(Breaking(honest, broken), None, batch=4, seed=3)
    with pytest.raises(SourceError, match=r"2 pictures cannot be read and 1 may be left out.*brok"):
        loader(0)


def test_a_jpeg_that_is_cut_off_teaches_nothing(make_picture, tmp_path):
    """Half of a JPEG, which decoders fill with grey, is refused by name."""
    whole = cv2.imencode(".jpg", make_picture(1))[1].tobytes()
    (tmp_path / "half.jpg").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(SourceError, match=r"half\.jpg is no picture that can be read.*cut off"):
        read_rgb(tmp_path / "half.jpg")
