"""Teaching: resumed as if never killed, what moves and what stays, the file it leaves."""

from __future__ import annotations

import csv
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import msgspec
import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("safetensors")

from dgiqa_stream.correlation import srcc  # noqa: E402
from dgiqa_stream.errors import ConfigError, ModelError  # noqa: E402
from distill.data.depth import ClassicalDepth  # noqa: E402
from distill.models.backbones import MobileNetPyramid, load_mobilenetv2_  # noqa: E402
from distill.models.official import open_teacher  # noqa: E402
from distill.models.teacher_file import read_about  # noqa: E402
from distill.optimising import Averaged  # noqa: E402
from distill.teacher_score import GridProtocol, score_picture  # noqa: E402
from distill.teachers.pictures import CropLoader, Crops, Labelled, PackPictures  # noqa: E402
from distill.teachers.recipe import TeacherRecipe, load_teacher_recipe  # noqa: E402
from distill.teachers.teaching import teach  # noqa: E402
from distill.teachers.training import (  # noqa: E402
    Semantics,
    losses_of,
    make_regulariser,
    make_teacher,
    set_training_,
    weighted_plcc_loss,
)

CONFIGS = Path(__file__).parents[2] / "configs" / "distill"
NUM_STEPS, CHECKPOINT_EVERY, KILLED_AT = 6, 2, 6
RECIPE = {
    "name": "tiny",
    "version": "0.0.1",
    "model": {
        "architecture": "dgiqa",
        "backbone": "mobilenetv2",
        "bridge_channels": [4, 4, 4, 4],
        "num_heads": 2,
        "pooled_channels": 8,
    },
    "data": {"num_validation": 4, "seed": 3},
    "train": {
        "seed": 3,
        "num_epochs": 2,
        "batch": 4,
        "head_rate": 3e-3,
        "pyramid_rate": 0.0,
        "warmup_steps": 2,
        "weight_decay": 0.02,
        "ema_decay": 0.9,
        "plcc_weight": 0.3,
        "validate_every": 3,
        "checkpoint_every": CHECKPOINT_EVERY,
        "evaluation_crops": 1,
    },
    "qfm": {"weight": 0.5, "contrast_weight": 0.1, "tolerance": 0.6},
}
TEACH_THEN_DIE = """
import json, os, signal, sys
from pathlib import Path
import cv2, msgspec, torch
from distill.teachers import teaching
from distill.data.depth import ClassicalDepth
from distill.teachers.pictures import PackPictures
from distill.teachers.recipe import TeacherRecipe

recipe, packs, run, backbone, steps, fatal = sys.argv[1:]
cv2.setNumThreads(1)
torch.set_num_threads(1)
honest, calls = teaching.losses_of, []

def losses_of(*args):
    calls.append(1)
    if len(calls) == int(fatal):
        os.kill(os.getpid(), signal.SIGKILL)
    return honest(*args)

teaching.losses_of = losses_of
teaching.teach(msgspec.convert(json.loads(recipe), TeacherRecipe), PackPictures(Path(packs)),
               Path(run), depth=ClassicalDepth(), backbone=Path(backbone), device="cpu",
               num_steps=int(steps))
"""


def made(**changes):
    """The tiny recipe with a table's settings changed, as ``train={...}``."""
    tables = {name: {**RECIPE[name], **new} for name, new in changes.items()}
    return msgspec.convert({**RECIPE, **tables}, TeacherRecipe)


def table(path):
    """A CSV file as rows of numbers by column."""
    with path.open(newline="") as rows:
        return [{k: float(v) for k, v in row.items()} for row in csv.DictReader(rows)]


def scored(model, pictures, index):
    """What a teacher says of the middle of one picture."""
    rgb = pictures.rgb(index)
    return score_picture(model, rgb, ClassicalDepth()(rgb), protocol=GridProtocol(1, 1)).score


@pytest.fixture(scope="module")
def pictures(packs):
    """Sixteen training and four validation pictures, blurred the more the lower their MOS."""
    return PackPictures(packs / "rated")


@pytest.fixture(scope="module")
def teach_tiny(pictures, backbone):
    """``teach_tiny(run, recipe, **options)`` on the CPU."""

    def call(run, recipe, **options):
        given = {"depth": ClassicalDepth(), "backbone": backbone, "num_steps": NUM_STEPS}
        return teach(recipe, pictures, run, device="cpu", **{**given, **options})

    return call


@pytest.fixture(scope="module")
def taught(teach_tiny, tmp_path_factory):
    """The folder and the result of six steps without an interruption."""
    run = tmp_path_factory.mktemp("run")
    return run, teach_tiny(run, made())


@pytest.mark.slow
def test_a_killed_teaching_ends_like_another(taught, teach_tiny, packs, backbone, tmp_path):
    """Killed by SIGKILL between checkpoints, then run again: weights, averages, optimiser, the
    teacher's file and both curves are bit for bit those of a run left alone.
    """
    run, best = taught
    words = [json.dumps(RECIPE), packs / "rated", tmp_path, backbone, NUM_STEPS, KILLED_AT]
    killed = subprocess.run(
        [sys.executable, "-c", TEACH_THEN_DIE, *map(str, words)],
        check=False, env=dict(os.environ), capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert len(table(tmp_path / "validation.csv")) == 1
    resumed = teach_tiny(tmp_path, made())
    assert (resumed.srcc, resumed.step) == (best.srcc, best.step)
    mine, theirs = (
        torch.load(folder / "checkpoint.pt", weights_only=True) for folder in (tmp_path, run)
    )
    for part in ("model", "averaged"):
        assert all(torch.equal(t, theirs[part][name]) for name, t in mine[part].items()), part
    for number, state in mine["optimiser"]["state"].items():
        others = theirs["optimiser"]["state"][number]
        assert all(torch.equal(t, others[name]) for name, t in state.items()), number
    for name in ("log.csv", "validation.csv", "teacher.json", "teacher.safetensors"):
        assert (tmp_path / name).read_bytes() == (run / name).read_bytes(), name


def test_the_file_is_the_best_teacher(taught, pictures):
    """The safetensors names backbone, version and depth, and scores the validation pictures with
    exactly the SRCC that chose it.
    """
    run, best = taught
    about = read_about(best.path)
    assert (about.backbone, about.version) == ("mobilenetv2", "0.0.1")
    assert about.depth == ClassicalDepth().identity
    model = open_teacher(best.path).model
    judged = [i for i, p in enumerate(pictures.pictures) if p.split == "validation"]
    scores = [scored(model, pictures, i) for i in judged]
    mos = [pictures.pictures[i].quality for i in judged]
    assert srcc(scores, mos) == pytest.approx(best.srcc)
    assert best.srcc == pytest.approx(max(r["srcc"] for r in table(run / "validation.csv")))


def test_the_curves_hold_the_losses(taught):
    """The last step is logged, and its loss is the sum of its parts, QFM's two among them."""
    run, _ = taught
    (row,) = table(run / "log.csv")
    assert row.pop("step") == NUM_STEPS
    assert set(row) == {"loss", "score", "plcc", "insensitivity", "contrast"}
    assert row.pop("loss") == pytest.approx(sum(row.values()), rel=1e-5)
    assert [r["step"] for r in table(run / "validation.csv")] == [3, 6]


def test_frozen_pyramids_stay_and_all_else_moves(taught, backbone):
    """With pyramid_rate 0 no weight and no statistic of a pyramid changes; everything else does."""
    run, _ = taught
    after = torch.load(run / "checkpoint.pt", weights_only=True)["model"]
    pyramid = MobileNetPyramid()
    load_mobilenetv2_(pyramid, backbone)
    for prefix in ("backbone.", "depth_backbone."):
        for name, tensor in pyramid.state_dict().items():
            assert torch.equal(after[prefix + name], tensor), name
    torch.manual_seed(3)
    before = make_teacher(made(), backbone=backbone)
    moving = [n for n, _ in before.named_parameters() if "backbone." not in n]
    state = before.state_dict()
    assert not [n for n in moving if torch.equal(state[n], after[n])]


def test_moving_pyramids_keep_their_statistics(teach_tiny, backbone, tmp_path):
    """With a pyramid_rate the pyramids' weights move, ImageNet's running means do not."""
    teach_tiny(tmp_path, made(train={"pyramid_rate": 1e-3}), num_steps=2)
    after = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["model"]
    pyramid = MobileNetPyramid()
    load_mobilenetv2_(pyramid, backbone)
    before = {f"backbone.{n}": t for n, t in pyramid.state_dict().items()}
    for name, tensor in before.items():
        is_statistic = "running" in name or "num_batches" in name
        assert torch.equal(after[name], tensor) == is_statistic, name


@pytest.mark.slow
def test_teaching_learns(teach_tiny, pictures, tmp_path):
    """After thirty steps the scores of twenty pictures follow their blur: SRCC above 0.8, where
    the network as it began has less than 0.6.
    """
    recipe = made(
        train={"validate_every": 30, "warmup_steps": 4, "batch": 8},
        qfm={"weight": 0.0, "contrast_weight": 0.0},
    )
    found = []
    for num_steps in (1, 30):
        best = teach_tiny(tmp_path / str(num_steps), recipe, num_steps=num_steps)
        model = open_teacher(best.path).model
        scores = [scored(model, pictures, i) for i in range(len(pictures.pictures))]
        found.append(srcc(scores, [p.quality for p in pictures.pictures]))
    assert found[1] > 0.8
    assert abs(found[0]) < 0.6
    assert "insensitivity" not in table(tmp_path / "30" / "log.csv")[0]


def test_accumulated_batches_are_one_step(teach_tiny, pictures, backbone, tmp_path):
    """With accumulate 2 the first step's loss is the mean of the losses of batches 0 and 1."""
    recipe = made(train={"accumulate": 2}, qfm={"weight": 0.0, "contrast_weight": 0.0})
    teach_tiny(tmp_path, recipe, num_steps=1)
    (row,) = table(tmp_path / "log.csv")
    seed = recipe.train.seed
    torch.manual_seed(seed)
    teacher = make_teacher(recipe, backbone=backbone)
    set_training_(teacher, frozen=True)
    loader = CropLoader(pictures, ClassicalDepth(), batch=4, seed=seed)
    torch.manual_seed(seed + 1)
    losses = [losses_of(teacher, loader(number), recipe)["loss"].item() for number in (0, 1)]
    loader.close()
    assert row["loss"] == pytest.approx(np.mean(losses), rel=1e-6)


def test_crops_depend_on_seed_and_number_alone(pictures):
    """Four threads cut the same crops as one, in any order of calls; an epoch takes each once."""
    one = CropLoader(pictures, ClassicalDepth(), batch=8, seed=5)
    four = CropLoader(pictures, ClassicalDepth(), batch=8, seed=5, workers=4)
    second = four(1)
    first = four(0)
    for mine, theirs in ((one(0), first), (one(1), second)):
        assert torch.equal(mine.picture, theirs.picture)
        assert torch.equal(mine.depth, theirs.depth)
        assert torch.equal(mine.quality, theirs.quality)
    seen = torch.cat([first.quality, second.quality]).sort().values
    mos = sorted(p.quality for p in pictures.pictures if p.split == "train")
    torch.testing.assert_close(seen, torch.tensor(mos))
    assert not torch.equal(first.picture, CropLoader(pictures, None, batch=8, seed=6)(0).picture)


def crops_of(quality, weight):
    """A batch of noise with these labels."""
    generator = torch.Generator().manual_seed(1)
    picture, depth = torch.randn(2, len(quality), 3, 224, 224, generator=generator)
    return Crops(picture, depth, torch.tensor(quality), torch.tensor(weight))


def test_a_picture_of_weight_zero_teaches_nothing(backbone):
    """Whatever label a picture of weight 0 has, the loss is the same."""
    recipe = made()
    torch.manual_seed(1)
    teacher = make_teacher(recipe, backbone=backbone).eval()
    found = [
        losses_of(teacher, crops_of([0.2, 0.7, label], [1.0, 0.5, 0.0]), recipe)["loss"].item()
        for label in (0.0, 1.0)
    ]
    assert found[0] == pytest.approx(found[1], rel=1e-6)


def test_weighted_plcc_of_known_vectors():
    """On one rising line the loss is 0, on a falling one 1; a weight of 0 takes an outlier out."""
    y = torch.tensor([0.1, 0.4, 0.9])
    ones = torch.ones(3)
    assert weighted_plcc_loss(2 * y + 1, y, ones).item() == pytest.approx(0, abs=1e-6)
    assert weighted_plcc_loss(-y, y, ones).item() == pytest.approx(1, abs=1e-6)
    outlier = torch.tensor([0.1, 0.4, -5.0])
    kept = torch.tensor([1.0, 1.0, 0.0])
    assert weighted_plcc_loss(outlier, y, kept).item() == pytest.approx(0, abs=1e-6)
    expected = (1 - np.corrcoef(outlier, y)[0, 1]) / 2
    assert weighted_plcc_loss(outlier, y, ones).item() == pytest.approx(expected, abs=1e-6)


def test_semantics_are_the_last_map_of_the_picture(backbone):
    """Pictures are matched by the picture's pyramid, not by the depth's."""
    recipe = made()
    teacher = make_teacher(recipe, backbone=backbone).eval()
    semantics, crops = Semantics(teacher), crops_of([0.2, 0.7], [1.0, 1.0])
    with torch.no_grad():
        teacher.describe(crops.picture, crops.depth)
        expected = teacher.backbone(crops.picture)[-1].mean((2, 3))
    torch.testing.assert_close(semantics.take(), expected)
    assert sum(p.numel() for p in make_regulariser(teacher, recipe.qfm).parameters()) == 0


def test_averages_follow_parameters_and_statistics(backbone):
    """At decay 0.9, far from the start, an average moves a tenth of the way to the teacher."""
    torch.manual_seed(1)
    teacher = make_teacher(made(), backbone=backbone)
    set_training_(teacher, frozen=True)
    averaged = Averaged(teacher, 0.9)
    with torch.no_grad():
        teacher.fc.bias.add_(1.0)
        teacher.tcb1.norm.running_mean.add_(2.0)
    averaged.update(teacher, 1000)
    moved = averaged.model.fc.bias - (teacher.fc.bias - 1)
    torch.testing.assert_close(moved, torch.tensor([0.1]))
    assert averaged.model.tcb1.norm.running_mean.mean().item() == pytest.approx(0.2)


class NotANumber:
    """Pictures whose labels are no numbers."""

    def __init__(self, honest):
        self._honest = honest
        self.pictures = [
            Labelled(p.name, p.split, math.nan if p.split == "train" else p.quality)
            for p in honest.pictures
        ]

    def rgb(self, index):
        """As the honest set has it."""
        return self._honest.rgb(index)


def test_a_loss_that_is_no_number_ends_in_one_error(pictures, backbone, tmp_path):
    """A NaN is told with its step and what to change, and nothing is written."""
    with pytest.raises(FloatingPointError, match=r"at step 0: lower head_rate"):
        teach(
            made(), NotANumber(pictures), tmp_path,
            depth=ClassicalDepth(), backbone=backbone, device="cpu", num_steps=2,
        )  # fmt: skip
    assert list(tmp_path.iterdir()) == []


def test_a_run_goes_on_only_as_it_began(taught, teach_tiny):
    """Another recipe in the same folder is refused, and a finished run is not taught again."""
    run, best = taught
    before = best.path.stat().st_mtime_ns
    with pytest.raises(ConfigError, match="another recipe"):
        teach_tiny(run, made(train={"head_rate": 1e-3}))
    assert teach_tiny(run, made()) == best
    assert best.path.stat().st_mtime_ns == before


def test_random_weights_are_not_frozen(tmp_path, pictures):
    """Frozen pyramids without weights are refused: they would stay random."""
    with pytest.raises(ConfigError, match="freeze random weights"):
        teach(made(), pictures, tmp_path, depth=ClassicalDepth(), device="cpu")


def test_weights_of_something_else_are_refused(tmp_path, pictures):
    """An .npz that is no MobileNetV2 is one error that names it."""
    np.savez(tmp_path / "other.npz", conv0_weight=np.zeros(3))
    with pytest.raises(ModelError, match=r"other\.npz does not hold MobileNetV2"):
        teach(made(), pictures, tmp_path / "run", depth=ClassicalDepth(),
              backbone=tmp_path / "other.npz", device="cpu")  # fmt: skip


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("teacher-*.toml")), ids=lambda p: p.stem)
def test_shipped_recipes_are_valid(path):
    """Every shipped recipe loads under its own name."""
    assert load_teacher_recipe(path).name == path.stem


def test_the_published_shape_is_shipped():
    """teacher-swin.toml is DGIQA as published: its spec has the published defaults."""
    from distill.models.teacher import TeacherSpec

    assert load_teacher_recipe(CONFIGS / "teacher-swin.toml").model.spec == TeacherSpec()


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("head_rate", "head_rte", "head_rte"),
        ("head_rate = 5e-4", "head_rate = 1e38", "head_rate"),
        ("num_heads = 16", "num_heads = 7", "heads"),
        ('architecture = "dgiqa"', 'architecture = "other"', "other"),
        ("evaluation_crops = 1", "evaluation_crops = 3", "evaluation_crops"),
    ],
)
def test_a_recipe_that_cannot_be_is_refused(tmp_path, old, new, told):
    """A misspelt key, a rate above 1, heads that do not share the width, an unknown network, no
    square grid.
    """
    text = (CONFIGS / "teacher-mobilenetv2.toml").read_text()
    assert old in text
    (tmp_path / "wrong.toml").write_text(text.replace(old, new, 1))
    with pytest.raises(ConfigError, match=rf"wrong\.toml.*{told}"):
        load_teacher_recipe(tmp_path / "wrong.toml")
