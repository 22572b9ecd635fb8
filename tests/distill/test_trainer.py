"""Training: killed and resumed as if never killed; a NaN stops it and spoils nothing."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys

import msgspec
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from dgiqa_stream.correlation import srcc  # noqa: E402
from distill import objective, trainer, validating  # noqa: E402
from distill.data.loader import views_of  # noqa: E402
from distill.data.packed import Pack, write_pack  # noqa: E402
from distill.data.training_data import open_packs  # noqa: E402
from distill.head_fit import fit_head_  # noqa: E402
from distill.losses import score_loss  # noqa: E402
from distill.models.student import Student  # noqa: E402
from distill.models.trunks import load_imagenet_  # noqa: E402
from distill.optimising import Averaged, learning_rate_share, relative_rates  # noqa: E402
from distill.validating import ladder_order, predict, tensors  # noqa: E402

NUM_STEPS, CHECKPOINT_EVERY, KILLED_AT = 12, 4, 11

TRAIN_THEN_DIE = """
import os, signal, sys
from pathlib import Path
import cv2, torch
from distill import trainer
from distill.recipe import load_recipe

recipe, packs, run, backbone, steps, every, fatal = sys.argv[1:]
cv2.setNumThreads(1)
torch.set_num_threads(1)
trainer._CHECKPOINT_EVERY_STEPS = int(every)
honest, calls = trainer.train_step, []

def train_step(*args):
    calls.append(1)
    if len(calls) == int(fatal):
        os.kill(os.getpid(), signal.SIGKILL)
    return honest(*args)

trainer.train_step = train_step
trainer.train(load_recipe(Path(recipe)), Path(packs), Path(run), backbone=Path(backbone),
              num_steps=int(steps))
"""


def table(path):
    """A CSV file as rows of numbers by column."""
    with path.open(newline="") as rows:
        return [{k: float(v) for k, v in row.items()} for row in csv.DictReader(rows)]


@pytest.fixture
def every_few_steps(monkeypatch):
    """A checkpoint every four steps."""
    monkeypatch.setattr(trainer, "_CHECKPOINT_EVERY_STEPS", CHECKPOINT_EVERY)


@pytest.fixture(scope="module")
def trained(recipe, packs, backbone, tmp_path_factory):
    """The folder and the result of twelve steps without an interruption."""
    run = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "_CHECKPOINT_EVERY_STEPS", CHECKPOINT_EVERY)
        best = trainer.train(recipe, packs, run, backbone=backbone, num_steps=NUM_STEPS)
    return run, best


@pytest.mark.slow
def test_a_killed_training_ends_like_another(
    trained, recipe, recipe_file, packs, backbone, tmp_path, every_few_steps
):
    """Killed by SIGKILL after a log line and between checkpoints, then run again: weights,
    averages, optimiser, best epoch and both logs are bit for bit those of a run left alone.
    """
    run, best = trained
    words = [recipe_file, packs, tmp_path, backbone, NUM_STEPS, CHECKPOINT_EVERY, KILLED_AT]
    killed = subprocess.run(
        [sys.executable, "-c", TRAIN_THEN_DIE, *map(str, words)],
        check=False, env=dict(os.environ), capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert len(table(tmp_path / "log.csv")) == 1  # step 10, which the resumed run makes again
    resumed = trainer.train(recipe, packs, tmp_path, backbone=backbone, num_steps=NUM_STEPS)
    assert resumed == best
    mine, theirs = (
        torch.load(folder / "checkpoint.pt", weights_only=True) for folder in (tmp_path, run)
    )
    for part in ("model", "averaged"):
        assert mine[part].keys() == theirs[part].keys()
        for name, tensor in mine[part].items():
            assert torch.equal(tensor, theirs[part][name]), name
    for number, state in mine["optimiser"]["state"].items():
        for name, tensor in state.items():
            assert torch.equal(tensor, theirs["optimiser"]["state"][number][name]), name
    for name in ("log.csv", "validation.csv"):
        assert (tmp_path / name).read_bytes() == (run / name).read_bytes()


def test_training_moves_every_tensor(trained, backbone):
    """After twelve steps no parameter of trunk or head is where it began."""
    run, _ = trained
    student = Student()
    load_imagenet_(student.trunk, backbone)
    before = dict(student.trunk.named_parameters())
    after = torch.load(run / "checkpoint.pt", weights_only=True)["model"]
    assert not [n for n, p in before.items() if torch.equal(p, after[f"trunk.{n}"])]


def test_the_logs_tell_steps_losses_and_figures(trained):
    """log.csv has every tenth step with its losses' sum, validation.csv every epoch's figures."""
    run, best = trained
    (row,) = table(run / "log.csv")
    assert row["step"] == 10
    assert row["loss"] == pytest.approx(row["score"] + row["plcc"] + row["ladder"], rel=1e-4)
    epochs = table(run / "validation.csv")
    assert [e["step"] for e in epochs] == [4, 8, 12]
    assert all(set(e) == {"step", "srcc", "blur", "noise"} for e in epochs)
    assert best["srcc"] == pytest.approx(max(e["srcc"] for e in epochs))


def test_the_best_weights_are_plain_tensors(trained, recipe, packs):
    """best.pt loads without code from the file, fits a student, and gives the best epoch's SRCC."""
    run, best = trained
    student = Student()
    student.load_state_dict(torch.load(run / "best.pt", weights_only=True))
    pack = Pack(packs / "rated")
    records = [r for r in pack.records if r.split == "validation"]
    scores = predict(student, pack, records, recipe.views)
    mos = [r.mos for r in records]
    assert srcc(scores, mos) == pytest.approx(best["srcc"])


def test_a_finished_run_is_not_trained_again(trained, recipe, packs, backbone):
    """Running a finished training again returns its result and writes no weights."""
    run, best = trained
    before = (run / "best.pt").stat().st_mtime_ns
    assert trainer.train(recipe, packs, run, backbone=backbone, num_steps=NUM_STEPS) == best
    assert (run / "best.pt").stat().st_mtime_ns == before


def not_a_loss(logits, mos):
    """A loss that is NaN."""
    return logits.sum() * float("nan")


def not_a_gradient(logits, mos):
    """A finite loss whose gradient is NaN."""
    return (logits.sum() * 0).sqrt()


@pytest.mark.parametrize("broken", [not_a_loss, not_a_gradient])
def test_a_nan_stops_and_spoils_nothing(
    recipe, packs, backbone, tmp_path, monkeypatch, every_few_steps, broken
):
    """A loss or gradient that is NaN at step 5 is one error with the step and what to change, and
    the checkpoint of step 4 stays, all of it finite.
    """
    calls = []

    def loss(logits, mos):
        calls.append(1)
        return (broken if len(calls) > 5 else score_loss)(logits, mos)

    monkeypatch.setattr(trainer, "fit_head_", lambda *args, **options: None)
    monkeypatch.setattr(objective, "score_loss", loss)
    with pytest.raises(FloatingPointError, match=r"nan at step 5: lower trunk_rate") as caught:
        trainer.train(recipe, packs, tmp_path, backbone=backbone, num_steps=NUM_STEPS)
    assert "\n" not in str(caught.value)
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert state["step"] == 4
    for part in ("model", "averaged"):
        assert all(torch.isfinite(tensor).all() for tensor in state[part].values())


def test_a_pack_without_validation_is_refused(recipe, packs, backbone, tmp_path):
    """Nothing to choose the best epoch on is an error before the first step."""
    rated = Pack(packs / "rated")
    kept = [(r, rated.planes(r)) for r in rated.records if r.split == "train"]
    write_pack(tmp_path / "rated", kept, made_by="test", settings={})
    (tmp_path / "ladders").symlink_to(packs / "ladders")
    with pytest.raises(ValueError, match=r"0 pictures for validation.*num_validation"):
        trainer.train(recipe, tmp_path, tmp_path / "run", backbone=backbone, num_steps=1)


def test_ladders_without_validation_contents_are_not_judged(packs, recipe, tmp_path):
    """Where no content fell into validation there are no shares, and no error."""
    ladders = Pack(packs / "ladders")
    kept = [(r, ladders.planes(r)) for r in ladders.records if r.split == "train"]
    write_pack(tmp_path, kept, made_by="test", settings={})
    assert ladder_order(Student(), Pack(tmp_path), recipe.views) == {}


def test_ladder_order_is_the_share_of_falls(packs, recipe, monkeypatch):
    """Scores that rise at one of six steps of blur and at none of noise give 5/6 and 1."""
    pack = Pack(packs / "ladders")

    def made_up(model, pack, records, views, **options):
        swapped = {"blur": {2: 0.9}, "noise": {}}
        return np.array([swapped.get(r.degradation, {}).get(r.level, 0.8) for r in records])

    monkeypatch.setattr(validating, "predict", made_up)
    order = ladder_order(Student(), pack, recipe.views)
    assert order == pytest.approx({"blur": 5 / 6, "noise": 1.0})


def test_predictions_are_those_of_serving(packs, recipe, backbone):
    """Predicting in batches under bfloat16 gives each picture's quality within 0.02."""
    torch.manual_seed(2)
    student = Student().eval()
    load_imagenet_(student.trunk, backbone)
    pack = Pack(packs / "rated")
    found = predict(student, pack, pack.records[:5], recipe.views)
    with torch.no_grad():
        wanted = [
            student(*(v[None] for v in tensors(views))).item()
            for views in (views_of(pack.planes(r), recipe.views, None) for r in pack.records[:5])
        ]
    student.eval()
    np.testing.assert_allclose(found, wanted, atol=0.02)


def test_fitting_the_head_lowers_the_loss(packs, recipe, backbone):
    """On frozen features the head's fit beats both the unfitted head and the best constant."""
    torch.manual_seed(1)
    student = Student()
    load_imagenet_(student.trunk, backbone)
    pack = Pack(packs / "rated")
    records = [r for r in pack.records if r.split == "train"]
    mos = torch.tensor([r.mos for r in records])
    config = msgspec.structs.replace(recipe.train, head_epochs=60, dropout=0.0)

    def loss():
        quality = torch.from_numpy(predict(student, pack, records, recipe.views))
        return score_loss(torch.logit(quality.clamp(1e-4, 1 - 1e-4)).float(), mos).item()

    before = loss()
    fit_head_(student, open_packs(packs), msgspec.structs.replace(recipe, train=config))
    constant = score_loss(torch.logit(mos.mean()).expand(len(mos)), mos).item()
    assert loss() < min(before, constant)


def test_relative_rates_give_each_tensor_its_share():
    """Each tensor is a group of its own whose rate is the share times its RMS, 1e-3 at least."""
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    values = [0.5, 0.0, 30.0, 0.01]
    with torch.no_grad():
        for parameter, value in zip(module.parameters(), values, strict=True):
            parameter.fill_(value)
    groups = relative_rates(module, 0.1)
    assert [g["params"][0] for g in groups] == list(module.parameters())
    assert [g["lr"] for g in groups] == pytest.approx([0.05, 1e-4, 3.0, 1e-3])


def test_the_rate_rises_then_falls_to_zero():
    """Warm-up is linear up to 1, then half a cosine: one half in the middle, zero at the end."""
    shares = [learning_rate_share(step, 110, 10) for step in range(111)]
    np.testing.assert_allclose(shares[:10], np.arange(1, 11) / 10)
    assert shares[10] == 1
    assert shares[60] == pytest.approx(0.5)
    assert shares[110] == pytest.approx(0, abs=1e-12)


def test_the_average_follows_slowly():
    """Late in training the average moves by 1 - decay of the way, at first by nine tenths."""
    model = Student()
    averaged = Averaged(model, 0.99)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        before = averaged.model.quality.weight.clone()
        averaged.update(model, 100_000)
        assert torch.allclose(averaged.model.quality.weight, 0.99 * before)
        before = averaged.model.quality.weight.clone()
        averaged.update(model, 0)
        assert torch.allclose(averaged.model.quality.weight, 0.1 * before)
