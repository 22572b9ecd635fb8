"""What a teacher says: protocols, spreads, the runtime's interface, and the whole command."""

from __future__ import annotations

import csv
import io
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("timm")
pytest.importorskip("safetensors")

import distill  # noqa: E402
from dgiqa_stream.errors import BackendUnavailable, ConfigError, SourceUnsupported  # noqa: E402
from dgiqa_stream.types import Crop, Planes  # noqa: E402
from distill import cli  # noqa: E402
from distill.data.degrade import encode, pan  # noqa: E402
from distill.data.depth import ClassicalDepth, DepthFromFiles  # noqa: E402
from distill.models import official  # noqa: E402
from distill.models.official import open_teacher  # noqa: E402
from distill.models.teacher import Dgiqa, TeacherSpec  # noqa: E402
from distill.models.teacher_file import save_teacher  # noqa: E402
from distill.teacher_score import (  # noqa: E402
    GridProtocol,
    OfficialProtocol,
    make_protocol,
    normalised,
    score_picture,
    teacher_scorer,
    torch_device,
    with_smallest_side,
)

NUM_FRAMES = 6


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A tiny random teacher in its file; its last layer is steep, so that scores differ."""
    torch.manual_seed(5)
    spec = TeacherSpec("mobilenetv3_small_050", (8, 8, 8, 8), 2, 16)
    net = Dgiqa(spec).eval()
    with torch.no_grad():
        net.fc.weight.mul_(40)
    path = tmp_path_factory.mktemp("teacher") / "tiny.safetensors"
    save_teacher(net, path, version="0.0.1")
    return path


@pytest.fixture(scope="module")
def teacher(weights):
    """The tiny teacher, opened."""
    return open_teacher(weights)


@pytest.fixture
def picture(make_picture):
    """A picture whose crops differ."""
    return make_picture(3, 120, 200)


def test_the_official_crops_are_pythons_random_ones():
    """20 crops at seed 42 lie where the published loop puts them: left before top, from Python's
    generator; another seed or size moves them.
    """
    random.seed(42)
    wanted = [(random.randint(0, 640 - 224), random.randint(0, 384 - 224)) for _ in range(20)]
    protocol = OfficialProtocol()
    assert protocol.places(384, 640) == [(top, left) for left, top in wanted]
    assert protocol.places(384, 640) == OfficialProtocol(20, 42).places(384, 640)
    assert OfficialProtocol(seed=43).places(384, 640) != protocol.places(384, 640)


@pytest.mark.parametrize(("height", "width"), [(384, 384), (384, 683), (1000, 384)])
def test_a_grid_reaches_every_border(height, width):
    """Nine crops begin at the corners, the middle of the sides and the centre, to half a pixel."""
    places = GridProtocol().places(height, width)
    tops, lefts = sorted({t for t, _ in places}), sorted({left for _, left in places})
    assert len(places) == 9
    for begins, free in ((tops, height - 224), (lefts, width - 224)):
        assert begins[0] == 0
        assert begins[-1] == free
        assert abs(begins[1] - free / 2) <= 0.5
    assert GridProtocol(1, 1).places(height, width) == [((height - 224) // 2, (width - 224) // 2)]


@pytest.mark.parametrize(
    ("name", "num_crops", "wanted"),
    [
        ("grid", None, GridProtocol(3, 3)),
        ("grid", 16, GridProtocol(4, 4)),
        ("grid", 1, GridProtocol(1, 1)),
        ("official", None, OfficialProtocol(20, 7)),
        ("official", 5, OfficialProtocol(5, 7)),
    ],
)
def test_protocols_by_name(name, num_crops, wanted):
    """A protocol's name and number of crops give its value, which tells itself in results."""
    made = make_protocol(name, num_crops=num_crops, seed=7)
    assert made == wanted
    assert made.identity.startswith(name)


@pytest.mark.parametrize(("name", "num_crops"), [("grid", 10), ("grid", 0), ("grid", -4),
                                                 ("official", 0), ("official", -1)])  # fmt: skip
def test_crops_that_cannot_be_are_usage_errors(name, num_crops):
    """A grid that is no square, and no crops at all, raise ConfigError naming the number."""
    with pytest.raises(ConfigError, match=str(abs(num_crops))):
        make_protocol(name, num_crops=num_crops)


def test_the_picture_is_prepared_as_published():
    """Resizing is albumentations' SmallestMaxSize(384) to the last bit, odd sizes and enlargement
    included, and normalising its Normalize to 1e-6 (float32's rounding).
    """
    os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"
    albumentations = pytest.importorskip("albumentations")
    resize = albumentations.Compose([albumentations.SmallestMaxSize(384)])
    rng = np.random.default_rng(1)
    for height, width in [(384, 500), (720, 1280), (333, 1001), (97, 61), (1080, 607), (385, 384)]:
        made = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        wanted = resize(image=made)["image"]
        assert min(wanted.shape[:2]) == 384
        assert np.array_equal(with_smallest_side(made), wanted)
    normalise = albumentations.Normalize(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    wanted = normalise(image=made)["image"]
    assert np.abs(normalised(made).permute(1, 2, 0).numpy() - wanted).max() < 1e-6


def test_a_score_is_the_mean_of_its_crops(teacher, picture):
    """Each crop's score is the network's on that place of picture and depth alike, cut by hand;
    score and spread are their mean and standard deviation, in points.
    """
    depth = ClassicalDepth()(picture)
    protocol = GridProtocol(2, 3)
    found = score_picture(teacher.model, picture, depth, protocol=protocol)
    seen = normalised(with_smallest_side(picture))
    near = normalised(with_smallest_side(np.dstack([depth] * 3)))
    by_hand = []
    for top, left in protocol.places(*seen.shape[1:]):
        crops = (x[None, :, top : top + 224, left : left + 224] for x in (seen, near))
        with torch.no_grad():
            by_hand.append(100 * float(teacher.model(*crops)))
    assert np.allclose(found.crop_scores, by_hand, atol=1e-3)
    assert found.score == pytest.approx(np.mean(by_hand), abs=1e-3)
    assert found.spread == pytest.approx(np.std(by_hand), abs=1e-3)
    assert found.spread > 0.1


@pytest.mark.parametrize("protocol", [GridProtocol(), OfficialProtocol(10)])
def test_the_same_picture_has_the_same_score(teacher, picture, protocol):
    """Both protocols give every crop the same score again."""
    depth = ClassicalDepth()(picture)
    first, second = (
        score_picture(teacher.model, picture, depth, protocol=protocol) for _ in range(2)
    )
    assert first == second


def test_another_seed_moves_an_official_score(teacher, picture):
    """Three random crops elsewhere give another score: the seed is part of a result."""
    depth = ClassicalDepth()(picture)
    scores = {
        score_picture(teacher.model, picture, depth, protocol=OfficialProtocol(3, seed)).score
        for seed in (1, 2, 3)
    }
    assert len(scores) == 3


@pytest.mark.parametrize("protocol", [GridProtocol(), OfficialProtocol(5)])
def test_crops_of_a_flat_picture_agree(teacher, protocol):
    """One colour, and one depth, everywhere: the crops are equal, and the spread is 0 but for the
    rounding of a batch.
    """
    flat, depth = np.full((90, 130, 3), 117, np.uint8), np.zeros((90, 130), np.uint8)
    assert score_picture(teacher.model, flat, depth, protocol=protocol).spread < 1e-4


def test_depth_matters(teacher, picture):
    """The same picture over another depth map has another score: the map reaches the network."""
    near = ClassicalDepth()(picture)
    first, second = (
        score_picture(teacher.model, picture, depth, protocol=GridProtocol()).score
        for depth in (near, 255 - near)
    )
    assert abs(first - second) > 0.01


def test_a_scorer_of_the_runtimes_kind(teacher, weights, picture, make_picture):
    """As the runtime's scorer it scores arrays of several sizes and cropped planes, tells its
    model, device and spreads, and a crop is the picture that it leaves.
    """
    heard = []
    with teacher_scorer(
        teacher, ClassicalDepth(), path=weights, device="cpu", on_prediction=heard.append
    ) as scorer:
        together = scorer.score_batch([picture, make_picture(4, 90, 80)])
        assert together[0] == pytest.approx(scorer.score(picture), abs=1e-4)
        assert [h.score for h in heard] == pytest.approx([*together, together[0]], abs=1e-3)
        assert all(h.spread > 0 for h in heard)
        planes = Planes((picture,), full_range=True)
        (cropped,) = scorer.predict([planes], crop=Crop(20, 10, 100, 80))
        inside = np.ascontiguousarray(picture[10:90, 20:120])
        assert cropped.score == pytest.approx(scorer.score(inside), abs=1e-4)
        assert cropped.raw * 100 == pytest.approx(cropped.score)
        with pytest.raises(ValueError, match="leaves less"):
            scorer.cut([planes], crop=Crop(5000, 10, 100, 80))
        assert scorer.manifest.id == "dgiqa-teacher-mobilenetv3_small_050"
        assert scorer.manifest.sha256 == teacher.sha256
        assert scorer.status.active == "torch:cpu"


def test_a_path_is_known_only_while_it_is_read(teacher, weights, tmp_path, picture):
    """Depth from files finds the map of the input that is read, and none of another or of none."""
    np.save(tmp_path / "a.npy", np.arange(120 * 200).reshape(120, 200))
    scorer = teacher_scorer(teacher, DepthFromFiles(tmp_path), path=weights)
    with scorer.reading("pictures/a.png"):
        assert 0 <= scorer.score(picture) <= 100
    with scorer.reading("b.png"), pytest.raises(SourceUnsupported, match=r"b\.npy or b\.png"):
        scorer.score(picture)
    with pytest.raises(SourceUnsupported, match="without a name"):
        scorer.score(picture)


@pytest.mark.parametrize(("name", "error"), [("gpu", ConfigError), ("cuda:99", BackendUnavailable)])
def test_a_device_that_cannot_be_is_one_error(name, error):
    """A word that is no device, or a GPU that is not there, is told before any work."""
    with pytest.raises(error, match=name):
        torch_device(name)


@pytest.fixture
def call(monkeypatch, capsys):
    """``call(*words)``: exit code, output and error lines of ``dgiqa-distill``."""

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["dgiqa-distill", *map(str, words)])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        told = capsys.readouterr()
        return caught.value.code, told.out, told.err.strip().splitlines()

    return call


@pytest.fixture
def inputs(tmp_path, make_picture):
    """Two pictures, a clip of six frames, and a file that is none."""
    for name, seed in (("a.png", 1), ("b.jpg", 2)):
        assert cv2.imwrite(str(tmp_path / name), make_picture(seed, 90, 120))
    frames = list(pan(make_picture(5, 90, 110), num_frames=NUM_FRAMES))
    (tmp_path / "clip.mp4").write_bytes(encode(frames, "libx264", 18))
    (tmp_path / "words.mp4").write_text("no video")
    return tmp_path


def test_weights_that_overflow_name_teacher_and_picture(call, inputs, weights, tmp_path):
    """Finite weights whose product is none end in one line with both files, and exit code 5."""
    net = open_teacher(weights).model
    with torch.no_grad():
        for tensor in net.parameters():
            tensor.mul_(1e20)
    save_teacher(net, tmp_path / "steep.safetensors", version="0")
    code, _, err = call(
        "score", inputs / "a.png", "--teacher", tmp_path / "steep.safetensors",
        "--depth", "classical", "--device", "cpu", "--threads", 1, "--quiet",
    )  # fmt: skip
    assert code == 5
    assert "steep.safetensors gives no number for" in err[-1]
    assert "a.png" in err[-1]


def without(row, keys):
    """A row of CSV less what each model says of itself."""
    return {key: value for key, value in row.items() if key not in keys}


def test_pictures_and_a_clip_from_end_to_end(call, inputs, weights):
    """Two pictures, a clip sampled every third frame and a broken file give, in every column but
    the score, the rows that ``dgiqa-stream score`` gives; the broken one costs exit code 4, and
    standard error tells each input's mean and how far its crops differ.
    """
    paths = [inputs / name for name in ("a.png", "b.jpg", "clip.mp4", "words.mp4")]
    env = os.environ | {"PYTHONPATH": str(Path(distill.__file__).parents[1])}
    student = subprocess.run(
        [sys.executable, "-m", "dgiqa_stream", "score", *map(str, paths), "--every", "3"],
        env=env, capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    code, out, err = call(
        "score", *paths, "--every", 3, "--teacher", weights, "--depth", "classical",
        "--device", "cpu", "--threads", 1,
    )  # fmt: skip
    assert code == student.returncode == 4
    mine, theirs = (list(csv.DictReader(io.StringIO(text))) for text in (out, student.stdout))
    assert list(mine[0]) == list(theirs[0])
    assert len(mine) == 2 + NUM_FRAMES // 3 + 1
    scores = [row.pop("score") for row in mine]
    own = {"score", "in_domain", "interval_low", "interval_high", "out_of_domain"}
    assert [without(row, own) for row in mine] == [without(row, own) for row in theirs]
    assert scores[-1] == ""
    assert all(0 < float(s) < 100 for s in scores[:-1])
    assert len(set(scores)) == len(scores)
    assert sum("crops differ by" in line for line in err) == 3
    assert sum("stand-in" in line for line in err) == 1
    assert any(f"{paths[2]}: " in line and "(2 frames)" in line for line in err)
    again = call(
        "score", *paths, "--every", 3, "--teacher", weights, "--depth", "classical",
        "--device", "cpu", "--threads", 1, "--quiet",
    )  # fmt: skip
    assert again[1] == out
    assert len(again[2]) == 1


@pytest.mark.parametrize(
    ("learned", "is_told"), [("", 0), ("depth-anything/v2", 1), (ClassicalDepth().identity, 0)]
)
def test_other_depth_than_the_teachers_is_told(call, inputs, teacher, tmp_path, learned, is_told):
    """A teacher that learned with a network's maps and is asked with classical ones scores with one
    line that names both; its own maps, or a file that names none, say nothing.
    """
    path = tmp_path / "t.safetensors"
    save_teacher(teacher.model, path, version="0.0.1", depth=learned)
    asked = ("--teacher", path, "--depth", "classical", "--device", "cpu", "--threads", 1)
    code, _, err = call("score", inputs / "a.png", *asked)
    assert code == 0
    told = [line for line in err if "learned with" in line]
    assert len(told) == is_told
    assert all(learned in line and "classical/1" in line for line in told)


def test_json_says_how_it_was_made(call, inputs, weights):
    """The JSON document carries the teacher's id, version and checksum, the protocol with its seed
    and what made the depth; a score of it is that of the official crops.
    """
    target = inputs / "out.json"
    code, out, _ = call(
        "score", inputs / "a.png", "--teacher", weights, "--depth", "classical", "--protocol",
        "official", "--crops", 4, "--seed", 9, "--format", "json", "-o", target, "--threads", 1,
    )  # fmt: skip
    assert (code, out) == (0, "")
    told = json.loads(target.read_text())
    assert told["model"]["id"] == "dgiqa-teacher-mobilenetv3_small_050"
    assert told["model"]["version"] == "0.0.1"
    assert told["settings"]["protocol"] == "official: 4 random crops, seed 9"
    assert told["settings"]["depth"] == ClassicalDepth().identity
    rgb = cv2.cvtColor(cv2.imread(str(inputs / "a.png")), cv2.COLOR_BGR2RGB)
    wanted = score_picture(
        open_teacher(weights).model, rgb, ClassicalDepth()(rgb), protocol=OfficialProtocol(4, 9)
    )
    assert told["frames"][0]["metrics"]["dgiqa"] == pytest.approx(wanted.score, abs=1e-3)


def test_depth_from_files_on_the_command_line(call, inputs, weights, make_picture):
    """With a folder of maps, a picture that has one is scored, and one without and a clip are
    failed rows that say why.
    """
    folder = inputs / "maps"
    folder.mkdir()
    assert cv2.imwrite(str(folder / "a.png"), make_picture(6, 90, 120)[..., 0])
    paths = [inputs / name for name in ("a.png", "b.jpg", "clip.mp4")]
    code, out, _ = call(
        "score", *paths, "--teacher", weights, "--depth", folder, "-f", "ndjson", "--threads", 1
    )
    lines = [json.loads(line) for line in out.splitlines()]
    assert code == 4
    assert 0 < lines[0]["score"] < 100
    assert [line["score"] for line in lines[1:]] == [None, None]
    assert "no depth map b.npy or b.png" in lines[1]["error"]
    assert "for pictures" in lines[2]["error"]


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (["--fps", 1, "--every", 2], 2, "one of them"),
        (["--crops", 7], 2, "square"),
        (["--depth", "nowhere"], 2, "no folder of depth maps"),
        (["--device", "tpu9"], 2, "device"),
        (["--teacher", "absent.pth"], 5, "absent.pth"),
        (["--backbone", "resnet18"], 2, "not resnet18"),
    ],
)
def test_what_cannot_be_is_told_before_the_output_is_touched(
    call, inputs, weights, words, code, told
):
    """A wrong option is one line and its exit code, and an existing output keeps its content."""
    target = inputs / "kept.csv"
    target.write_text("kept")
    base = ["score", inputs / "a.png", "--teacher", weights, "--depth", "classical", "-q"]
    found, out, err = call(*base, "-o", target, *words, "--threads", 1)
    assert (found, out) == (code, "")
    assert len(err) == 1
    assert told in err[0]
    assert target.read_text() == "kept"


def test_without_a_choice_depth_is_the_published_networks(call, inputs, weights, monkeypatch):
    """No --depth asks for the network of the published scores and, out of reach, ends with 5 and
    one line that names it and the stand-in: nothing is scored on another depth unasked.
    """
    pytest.importorskip("transformers")
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(inputs / "no_hub"))
    code, out, err = call("score", inputs / "a.png", "--teacher", weights, "--threads", 1)
    assert (code, out) == (5, "")
    assert len(err) == 1
    assert "LiheYoung/depth-anything-large-hf" in err[0]
    assert "--depth classical" in err[0]


def test_an_input_is_no_output(call, inputs, weights):
    """Writing over an input is refused with 2, and the input stays."""
    before = (inputs / "a.png").read_bytes()
    code, _, err = call(
        "score", inputs / "a.png", "--teacher", weights, "--depth", "classical", "-o",
        inputs / "a.png", "--threads", 1,
    )  # fmt: skip
    assert code == 2
    assert "is the input" in err[0]
    assert (inputs / "a.png").read_bytes() == before


def test_convert_writes_what_score_opens(call, tmp_path, monkeypatch):
    """A .pth of a named backbone becomes a safetensors with the same tensors and the given version;
    a wrong one, an absent one and a wrong name of the output are one line each, nothing written.
    """
    torch.manual_seed(2)
    widths = {"bridge_channels": (8, 8, 8, 8), "num_heads": 2, "pooled_channels": 16}
    monkeypatch.setattr(official, "TeacherSpec", lambda name, *rest: TeacherSpec(name, **widths))
    made = Dgiqa(TeacherSpec("mobilenetv3_small_050", **widths)).eval()
    source, target = tmp_path / "o.pth", tmp_path / "made" / "t.safetensors"
    torch.save({"state_dict": made.state_dict()}, source)
    named = ["--backbone", "mobilenetv3_small_050", "--version", "1.2"]
    code, _, err = call("convert", source, "-o", target, *named)
    assert code == 0, err
    opened = open_teacher(target)
    assert opened.version == "1.2"
    mine = made.state_dict()
    assert all(torch.equal(tensor, mine[k]) for k, tensor in opened.model.state_dict().items())
    for words, wanted, told in (
        ([source, "-o", tmp_path / "x.safetensors", "--backbone", "resnet10t"], 5, "does not fit"),
        ([tmp_path / "absent.pth", "-o", tmp_path / "x.safetensors"], 5, "absent.pth"),
        ([source, "-o", tmp_path / "x.bin", *named], 2, ".safetensors"),
    ):
        code, _, err = call("convert", *words)
        assert code == wanted
        assert len(err) == 1
        assert told in err[0]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["made", "o.pth"]
