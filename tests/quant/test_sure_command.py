"""``dgiqa-quant sure`` from two files and packs to files that tell how sure they are."""

from __future__ import annotations

import itertools
import json
import sys

import numpy as np
import pytest

torch = pytest.importorskip("torch")
onnx = pytest.importorskip("onnx")
pytest.importorskip("PIL")

from onnx import helper, numpy_helper  # noqa: E402
from PIL import Image  # noqa: E402

import dgiqa_stream.scorer  # noqa: E402
import quant.folds  # noqa: E402
from dgiqa_stream.errors import ConfigError  # noqa: E402
from dgiqa_stream.manifest import load_model  # noqa: E402
from dgiqa_stream.scorer import load_scorer, planes_of_rgb  # noqa: E402
from distill.data.packed import Record, as_planes_420, write_pack  # noqa: E402
from distill.data.shards import Manifest, ShardRecord, ShardWriter, write_json  # noqa: E402
from distill.data.training_data import open_packs  # noqa: E402
from quant.cli import main  # noqa: E402
from quant.export_onnx import write_model  # noqa: E402
from quant.folds import Lore  # noqa: E402
from quant.head import Features, HeadConfig, head_size  # noqa: E402
from quant.looks import logits_on_ladders, looks_at  # noqa: E402
from quant.refit_command import refit  # noqa: E402
from quant.sure_command import sure  # noqa: E402

SIDE = 64
SETTINGS = """
[head]
num_looks = 2
num_ladders = 3
[sure]
coverage = 0.8
share_flagged = 0.1
num_strange = 11
num_judged = 1
width = 8
num_steps = 60
batch = 16
rate = 1e-2
"""
NUM_VALIDATION = 20


def small_graph(*, gain: float, last: str = "Sigmoid"):
    """A graph with a student's inputs and head, whose features are means of coarse cells."""
    rng = np.random.default_rng(0)
    num_features = 2 * 3 * 16
    constants = {
        "gain": np.full(1, gain / 255),
        "w": rng.standard_normal((8, num_features)) / 4,
        "b": rng.standard_normal(8) / 4,
        "v": rng.standard_normal((1, 8)) / 2,
        "c": np.zeros(1),
    }
    nodes, parts = [], []
    for view in ("whole", "fragments"):
        names = [f"{view}_{n}" for n in range(5)]
        nodes += [
            helper.make_node("Cast", [view], names[:1], to=onnx.TensorProto.FLOAT),
            helper.make_node("Mul", [names[0], "gain"], names[1:2]),
            helper.make_node("Transpose", [names[1]], names[2:3], perm=[0, 3, 1, 2]),
            helper.make_node(
                "AveragePool", [names[2]], names[3:4], kernel_shape=[16, 16], strides=[16, 16]
            ),
            helper.make_node("Flatten", [names[3]], names[4:], axis=1),
        ]
        parts.append(names[4])
    nodes += [
        helper.make_node("Concat", parts, ["features"], axis=1),
        helper.make_node("Gemm", ["features", "w", "b"], ["hidden"], transB=1),
        helper.make_node("Relu", ["hidden"], ["shown"]),
        helper.make_node("Gemm", ["shown", "v", "c"], ["logit"], transB=1),
        helper.make_node(last, ["logit"], ["quality"]),
    ]
    inputs = [
        helper.make_tensor_value_info(n, onnx.TensorProto.UINT8, ["batch", SIDE, SIDE, 3])
        for n in ("whole", "fragments")
    ]
    quality = helper.make_tensor_value_info("quality", onnx.TensorProto.FLOAT, ["batch", 1])
    stored = [numpy_helper.from_array(v.astype(np.float32), n) for n, v in constants.items()]
    inner = helper.make_graph(nodes, "small", inputs, [quality], stored)
    return helper.make_model(inner, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


def picture(seed: int) -> np.ndarray:
    """Smooth colours with some grain, uint8 (96, 128, 3)."""
    rng = np.random.default_rng(seed)
    coarse = rng.uniform(30, 220, (4, 4, 3)).repeat(24, 0).repeat(32, 1)
    return np.clip(coarse + rng.normal(0, 6, coarse.shape), 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def packs(tmp_path_factory):
    """Rated pictures for training and validation, and ladders of which one shows a screen."""
    folder = tmp_path_factory.mktemp("packs")
    rng = np.random.default_rng(9)
    about = {"made_by": "test", "settings": {}}
    splits = ["train"] * 24 + ["validation"] * NUM_VALIDATION
    rated = [
        (Record(f"{i}.jpg", f"{i}.jpg", s, mos=float(rng.uniform())), as_planes_420(picture(i)))
        for i, s in enumerate(splits)
    ]
    write_pack(folder / "rated", rated, **about)
    ladders = []
    for i, content in enumerate(("a", "b", "gb82_gui")):
        for level in range(4):
            name = "darker" if level else "clean"
            record = Record(f"{content}/{level}", content, "train", degradation=name, level=level)
            ladders.append((record, as_planes_420(picture(100 + i) // (1 + level))))
    write_pack(folder / "ladders", ladders, **about)
    return folder


@pytest.fixture
def write(specs, tmp_path):
    """``write(name, precision, gain=...)``: a small model's file."""

    def make(name: str, precision: str, **options):
        path = tmp_path / name
        about = {"name": "small", "version": "1", "views": specs, "normalisation": (0.0, 1.0)}
        history = [{"step": "train"}]
        graph = small_graph(**options)
        write_model(
            graph,
            path,
            precision=precision,
            num_parameters=9,
            made_by="x",
            history=history,
            **about,
        )
        return path

    return make


@pytest.fixture
def files(write, tmp_path):
    """The float file, the INT8 file (whose features are off by a tenth) and the settings."""
    config = tmp_path / "int8.toml"
    config.write_text(SETTINGS)
    return write("f.onnx", "fp32", gain=1.0), write("q.onnx", "int8", gain=0.9), config


def predictions(path):
    """What a file says of ten pictures."""
    with load_scorer(path) as scorer:
        return scorer.predict([planes_of_rgb(picture(200 + i)) for i in range(10)])


def test_both_files_say_how_sure_they_are(files, packs, tmp_path):
    """Afterwards each file gives intervals around the same scores as before, bit by bit, its own
    coverage and flags are in its manifest beside the step, and a second run, with the features of
    the first, gives the same bytes. The version is the one that was given, then as it was.
    """
    *models, config = files
    before = [[p.raw for p in predictions(path)] for path in models]
    told = [load_model(path).manifest.num_parameters for path in models]
    sure(*models, config=config, packs=packs, cache=tmp_path / "features.npz", version="9.9.1")
    for path, raw, num_parameters in zip(models, before, told, strict=True):
        found, manifest = predictions(path), load_model(path).manifest
        assert [p.raw for p in found] == raw
        assert all(p.interval[0] <= p.score <= p.interval[1] for p in found)
        assert len({p.spread for p in found}) == len(found)
        assert [step["step"] for step in manifest.history] == ["train", "sure"]
        assert manifest.history[-1]["settings"]["num_strange"] == 11
        assert manifest.version == "9.9.1"
        assert (manifest.interval.coverage, manifest.interval.output) == (0.8, "spread")
        figures = manifest.metrics["sure"]
        assert figures["num_validation"] == NUM_VALIDATION
        assert len(figures["coverage_by_width"]) == 4
        assert figures["flagged"]["validation"] <= 0.1
        assert set(figures["flagged"]["held_out_kinds"]) == {
            "codes",
            "credits",
            "plates",
            "streaks",
        }
        assert manifest.num_parameters == num_parameters + 8 * (96 + 1) + 2 * (8 + 1)
    scales = [load_model(p).manifest.metrics["sure"]["points_per_spread"] for p in models]
    assert scales[0] != scales[1]
    first = [path.read_bytes() for path in models]
    sure(*models, config=config, packs=packs, cache=tmp_path / "features.npz")
    assert [path.read_bytes() for path in models] == first
    for path, num_parameters in zip(models, told, strict=True):
        manifest = load_model(path).manifest
        assert [step["step"] for step in manifest.history] == ["train", "sure"]
        assert manifest.num_parameters == num_parameters + 8 * (96 + 1) + 2 * (8 + 1)


def test_the_served_interval_is_the_conformal_one(files, packs, tmp_path):
    """Of the validation pictures themselves at least the promised share lies inside."""
    *models, config = files
    sure(*models, config=config, packs=packs)
    from distill.data.packed import Pack

    pack = Pack(packs / "rated")
    records = [r for r in pack.records if r.split == "validation"]
    with load_scorer(models[1]) as scorer:
        found = scorer.predict([pack.planes(r) for r in records])
        threshold = scorer.manifest.domain.threshold
    inside = [
        p.interval[0] <= 100 * r.mos <= p.interval[1] for p, r in zip(found, records, strict=True)
    ]
    assert 0.8 <= np.mean(inside) < 1
    assert sum(p.unfamiliar > threshold for p in found) == 2  # a tenth of twenty


def test_features_of_other_pictures_are_refused(files, packs, tmp_path):
    """A cache made with other settings is named, and no file is changed."""
    *models, config = files
    cache = tmp_path / "features.npz"
    sure(*models, config=config, packs=packs, cache=cache)
    before = [path.read_bytes() for path in models]
    config.write_text(SETTINGS.replace("num_ladders = 3", "num_ladders = 2"))
    with pytest.raises(ConfigError, match=r"features\.npz"):
        sure(*models, config=config, packs=packs, cache=cache)
    assert [path.read_bytes() for path in models] == before


def test_ladders_that_are_left_out_are_not_looked_at(packs, specs):
    """A kind to leave out takes its ladders along, and one that no picture has is refused."""
    data = open_packs(packs)
    assert (looks_at(data, specs, HeadConfig(num_looks=1)).labels.ladder >= 0).sum() == 12
    without = looks_at(data, specs, HeadConfig(num_looks=1, leave_out=["darker"]))
    assert (without.labels.level == 0).all()
    with pytest.raises(ConfigError, match="leave_out names hase"):
        looks_at(data, specs, HeadConfig(leave_out=["hase"]))


def test_only_large_pictures_fall_by_their_pseudo_mos(packs, specs, tmp_path):
    """``pseudo_mos_from_px``: from that longer side on pseudo-MOS says all of a fall; below it
    ``pseudo_mos_share`` of it, and nothing unless that is given.
    """
    writer, sides = ShardWriter(tmp_path, "shard-00000"), (64, 128)
    for side in sides:
        for level in range(3):
            record = ShardRecord(
                f"c{side}/{level}",
                f"c{side}",
                "train",
                "pristine",
                pseudo_mos=1 - level / 4,
                degradation="h264" if level else "clean",
                level=level,
            )
            writer.add(record, np.full((64, side, 3), 10 * level, np.uint8))
    writer.flush()
    about = {"made_by": "test", "settings": {}, "sources": [], "versions": {}}
    made = Manifest(num_pictures={"train": 6}, shards=writer.written, left_out=[], **about)
    write_json(tmp_path / "manifest.json", made)
    data = open_packs(packs, tmp_path)
    for from_px, known in ((0, 6), (65, 3), (128, 3), (129, 0)):
        settings = HeadConfig(num_looks=1, pseudo_mos_from_px=from_px)
        looks = looks_at(data, specs, settings)
        seen = looks.labels.pseudo_mos[looks.labels.ladder >= 0]
        assert np.isfinite(seen).sum() == known
        assert looks.labels.share.sum() == known
        settings = HeadConfig(num_looks=1, pseudo_mos_from_px=from_px, pseudo_mos_share=0.25)
        shares = looks_at(data, specs, settings).labels.share
        assert shares.sum() == known + 0.25 * (6 - known)


def test_falls_are_those_of_another_student(files, write, packs, specs, tmp_path):
    """A head refitted with the falls of another student falls as far as that one, to a tenth of the
    largest fall, from which it was half of that away, and the file's history names it.
    """
    *models, config = files
    other = write("other.onnx", "fp32", gain=6.0)
    config.write_text(
        "[head]\nnum_looks = 1\nnum_ladders = 3\nladder_weight = 0.0\nfall_weight = 8.0\n"
        "num_heads = 1\nnum_steps = 600\nbatch = 8\nladders_at_once = 3\ndropout = 0.0\n"
    )
    looks = looks_at(open_packs(packs), specs, HeadConfig(num_looks=1, num_ladders=3))
    on_ladder = looks.labels.ladder >= 0

    def falls(path):
        said = logits_on_ladders(load_model(path), looks)
        assert np.isnan(said[~on_ladder]).all()
        by_ladder = said[on_ladder].reshape(3, 4)  # clean first, then three levels
        return by_ladder[:, :1] - by_ladder[:, 1:]

    wanted, before = falls(other), falls(models[0])
    largest = np.abs(wanted).max()
    assert np.abs(wanted - before).max() > 0.5 * largest
    refit(*models, config=config, packs=packs, falls_of=str(other))
    for path in models:
        assert np.abs(falls(path) - wanted).max() < 0.1 * largest
        step = load_model(path).manifest.history[-1]
        assert step["falls_of"] == load_model(other).manifest.sha256


def test_a_sure_student_is_refitted_to_another_reduction(files, packs, capsys):
    """A file with an interval gets a new head for whole views made small another way: the interval
    and its parameters are gone, which is said, the views are those told, the trunk's parameters are
    counted as before, and `sure` takes the files again.
    """
    *models, config = files
    plain = [load_model(path).manifest.num_parameters for path in models]
    heads = [head_size(onnx.load(path)) for path in models]
    sure(*models, config=config, packs=packs)
    lines = "\nwidth = 4\nnum_heads = 1\nnum_steps = 5\nreduction = 'halved-smoothed'\n"
    other = config.with_name("head.toml")
    other.write_text("[head]\nnum_looks = 1\nnum_ladders = 3\nladders_at_once = 3\n" + lines)
    capsys.readouterr()
    refit(*models, config=other, packs=packs)
    told = capsys.readouterr()
    assert "has lost its interval and flag" in told.err + told.out
    for path, before, head in zip(models, plain, heads, strict=True):
        manifest = load_model(path).manifest
        assert (manifest.interval, manifest.domain) == (None, None)
        whole, fragments = manifest.preprocess.views
        assert (whole.reduction, fragments.reduction) == ("halved-smoothed", "halved-bilinear")
        assert manifest.preprocess.reduction == "halved-smoothed"
        assert [step["step"] for step in manifest.history] == ["train", "sure", "refit"]
        assert manifest.num_parameters == before + head_size(onnx.load(path)) - head
        assert all(p.interval is None for p in predictions(path))
    with pytest.raises(ConfigError, match="reduction is halved-bilinear"):
        sure(*models, config=with_reduction(config, "halved-bilinear"), packs=packs)
    sure(*models, config=with_reduction(config, "halved-smoothed"), packs=packs)
    assert load_model(models[1]).manifest.interval


def with_reduction(config, reduction):
    """The same settings with a reduction named."""
    text = config.read_text()
    assert "[head]" in text
    other = config.with_name(f"{reduction}.toml")
    other.write_text(text.replace("[head]", f"[head]\nreduction = '{reduction}'"))
    return other


def test_heads_are_judged_by_what_they_were_not_taught(files, packs, tmp_path, monkeypatch, capsys):
    """Each fold fits as many heads as it is told, on all rated looks and the ladders of the other
    kinds alone, and its own graph is judged: of two kinds, one known to the trunk, the other's
    steps alone count as unseen. Both files stay as they were.
    """
    *models, config = files
    config.write_text("[head]\nnum_looks = 1\nnum_heads = 1\nnum_steps = 20\nwidth = 4\n")
    kinds, writer = ("gaussian_blur", "jpeg"), ShardWriter(tmp_path, "shard-00000")
    for content, kind in itertools.product(("a", "b"), kinds):
        for level in range(3):
            name = kind if level else "clean"
            if not level and kind == "jpeg":
                continue
            record = ShardRecord(
                f"{content}/{name}/{level}",
                content,
                "train",
                "pristine",
                pseudo_mos=1 - level / 4,
                degradation=name,
                level=level,
            )
            writer.add(record, picture(ord(content)) // (1 + level * (1 + kinds.index(kind))))
    writer.flush()
    about = {"made_by": "test", "settings": {}, "sources": [], "versions": {}}
    made = Manifest(num_pictures={"train": 10}, shards=writer.written, left_out=[], **about)
    write_json(tmp_path / "manifest.json", made)
    looks = looks_at(open_packs(packs, tmp_path), load_model(models[0]).manifest.preprocess.views,
                     HeadConfig(num_looks=1))  # fmt: skip
    nothing = np.zeros((len(looks.drawn), 1), np.float32)
    for kind in kinds:
        kept = Lore(looks, Features(nothing, nothing, looks.labels), None).without([kind])
        drawn = [record for _, record, _ in kept.looks.drawn]
        shown = {record.degradation for record in drawn if record.content in ("a", "b")}
        assert shown == {"clean", *kinds} - {kind}
    clean = tmp_path / "clean"
    clean.mkdir()
    for name in ("clic_1", "clic_2"):
        Image.fromarray(picture(len(name)).repeat(4, 0).repeat(4, 1)).save(clean / f"{name}.png")
    before = [path.read_bytes() for path in models]
    fits, judged = [], []
    fit, load = quant.folds.refit_, dgiqa_stream.scorer.load_scorer

    def fitted(reference, small, features, settings, **more):
        fits.append((features.labels, settings.num_heads))
        return fit(reference, small, features, settings, **more)

    def loaded(path, **more):
        judged.append(load_model(path).manifest)
        return load(path, **more)

    monkeypatch.setattr(quant.folds, "refit_", fitted)
    monkeypatch.setattr(dgiqa_stream.scorer, "load_scorer", loaded)
    words = ["leave-out", *models, "--config", config, "--packs", packs, "--shards", tmp_path]
    words += ["--pristine", clean, "--folds", 2, "-o", tmp_path / "r.json", "--kind", "jpeg"]
    words += ["--heads", 2, "--known-to-trunk", "jpeg"]
    config.write_text(config.read_text() + "reduction = 'halved-smoothed'\n")
    assert ended(monkeypatch, [*words, "--kind", kinds[0]]) == 0
    found = json.loads((tmp_path / "r.json").read_text())
    assert found["settings"]["folds"] == [["gaussian_blur"], ["jpeg"]]
    steps = {name: row["num_steps"] for name, row in found["by_kind"].items()}
    assert set(steps) == set(kinds)
    assert found["unseen"]["num_steps"] == steps["gaussian_blur"] < found["all"]["num_steps"]
    assert [path.read_bytes() for path in models] == before
    num_rated = int((looks.labels.ladder < 0).sum())
    for labels, num_heads in fits:
        assert num_heads == 2
        assert np.bincount(labels.ladder + 1).tolist() == [num_rated, 3, 3]  # of a and of b
    assert len(fits) == len({manifest.sha256 for manifest in judged}) == 2
    for manifest in judged:
        assert manifest.preprocess.reduction == "halved-smoothed"
        assert manifest.metrics == {}


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--kind", "jpeg"], "--folds 2 is more than the 1 kinds"),
        (["--kind", "jpeg", "--kind", "haze", "--known-to-trunk", "jpeg",
          "--known-to-trunk", "haze"], "none is unseen"),
        (["--kind", "fog"], "fog"),
        (["--output", "{folder}"], "cannot be written"),
        (["--output", "{folder}/nowhere/r.json"], "cannot be written"),
        (["--swapped"], "q.onnx and f.onnx are int8 and fp32"),
    ],
)  # fmt: skip
def test_what_cannot_be_judged_is_one_line(
    files, packs, tmp_path, monkeypatch, capsys, words, told
):
    """Kinds, folds and files that cannot be right are refused by one line before any work."""
    *models, config = files
    if words == ["--swapped"]:
        words, models = [], models[::-1]
    given = ["--config", config, "--packs", packs, "--shards", packs, "--pristine", tmp_path]
    given += ["--folds", 2, "-o", tmp_path / "r.json"]
    more = [word.format(folder=tmp_path) for word in words]
    assert ended(monkeypatch, ["leave-out", *models, *given, *more]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert told in lines[0]


@pytest.mark.parametrize(
    ("change", "told", "code"),
    [
        (("coverage = 0.8", "coverage = 0.99"), "20 rated validation pictures", 2),
        (("coverage = 0.8", 'held_out = ["cats"]'), "cats", 2),
        (("coverage = 0.8", "coverage = 1.5"), "sure.coverage", 2),
    ],
)
def test_settings_that_cannot_be_are_one_line(
    files, packs, monkeypatch, capsys, change, told, code
):
    """The command ends with its code and one line that names the setting."""
    *models, config = files
    config.write_text(SETTINGS.replace(*change))
    assert call(monkeypatch, *models, config, packs) == code
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert told in lines[0]


def test_a_model_without_the_quality_head_is_one_line(write, files, packs, monkeypatch, capsys):
    """A model that ends otherwise ends the command with 5 and one line, and is left as it was."""
    other = write("other.onnx", "int8", gain=0.9, last="Tanh")
    before = other.read_bytes()
    assert call(monkeypatch, files[0], other, files[2], packs) == 5
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert "two and a Sigmoid are known" in lines[0]
    assert other.read_bytes() == before


def call(monkeypatch, model, quantised, config, packs) -> int:
    """The exit code of the command line."""
    return ended(monkeypatch, ["sure", model, quantised, "--config", config, "--packs", packs])


def ended(monkeypatch, words) -> int:
    """The exit code of `dgiqa-quant`."""
    monkeypatch.setattr(sys, "argv", ["dgiqa-quant", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


def test_settings_without_their_table_are_refused(files, packs):
    """Of a file without [sure] defaults would be taken unseen; both models stay as they were."""
    *models, config = files
    before = [path.read_bytes() for path in models]
    text = config.read_text()
    config.write_text(text[: text.index("[sure]")])
    with pytest.raises(ConfigError, match=r"has no \[sure\]"):
        sure(*models, config=config, packs=packs)
    assert [path.read_bytes() for path in models] == before
