"""Training from shards and labels: every loss, killed and resumed, in pieces, on a full disk."""

from __future__ import annotations

import dataclasses
import os
import pickle
import resource
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import msgspec
import pytest

torch = pytest.importorskip("torch")

from dgiqa_stream.errors import ConfigError, ModelError, SinkError, SourceError  # noqa: E402
from distill import trainer  # noqa: E402
from distill.compute import make_compute  # noqa: E402
from distill.curves import CURVES, draw_curves  # noqa: E402
from distill.data.batches import BatchMaker  # noqa: E402
from distill.data.shards import ShardReader  # noqa: E402
from distill.data.training_data import ShardPictures, open_packs, open_shards  # noqa: E402
from distill.models.student import Student, load_student  # noqa: E402
from distill.run_folder import LOG, VALIDATION, RunFolder, read_table  # noqa: E402

NUM_STEPS, EVERY, KILLED_AT = 8, 3, 8

TRAIN_THEN_DIE = """
import os, pickle, signal, sys
from pathlib import Path
import cv2, torch
from distill import trainer
from distill.data.training_data import open_shards

recipe, shards, labels, run, backbone, steps, every, fatal = sys.argv[1:]
cv2.setNumThreads(1)
torch.set_num_threads(1)
trainer._CHECKPOINT_EVERY_STEPS, trainer._LOG_EVERY_STEPS = int(every), 2
honest, calls = trainer.train_step, []

def train_step(*args):
    calls.append(1)
    if len(calls) == int(fatal):
        os.kill(os.getpid(), signal.SIGKILL)
    return honest(*args)

trainer.train_step = train_step
trainer.train(pickle.loads(Path(recipe).read_bytes()), open_shards(Path(shards), Path(labels)),
              Path(run), backbone=Path(backbone), num_steps=int(steps))
"""


@pytest.fixture(autouse=True)
def often(monkeypatch):
    """A checkpoint every third step, a line in the log every second."""
    monkeypatch.setattr(trainer, "_CHECKPOINT_EVERY_STEPS", EVERY)
    monkeypatch.setattr(trainer, "_LOG_EVERY_STEPS", 2)


@pytest.fixture(scope="module")
def fit(shards, labels, backbone, taught_recipe):
    """``fit(folder)``: eight steps with every loss; the result."""

    def train(folder, *, recipe=taught_recipe, num_steps=NUM_STEPS, data=None, **options):
        opened = data or open_shards(shards, labels)
        return trainer.train(
            recipe, opened, folder, backbone=backbone, num_steps=num_steps, **options
        )

    return train


@pytest.fixture(scope="module")
def trained(fit, tmp_path_factory):
    """The folder and the result of an uninterrupted run."""
    run = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "_CHECKPOINT_EVERY_STEPS", EVERY)
        patch.setattr(trainer, "_LOG_EVERY_STEPS", 2)
        return run, fit(run)


def state_of(folder):
    """The checkpoint of a run."""
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def flat(value, name=""):
    """Every tensor and number of nested dicts and lists, by its path."""
    if isinstance(value, dict | list):
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        for key, inner in pairs:
            yield from flat(inner, f"{name}/{key}")
    else:
        yield name, value


def assert_same(mine, theirs):
    """Two checkpoints are bit for bit one."""
    other = dict(flat(theirs))
    for name, value in flat(mine):
        same = torch.equal(value, other[name]) if isinstance(value, torch.Tensor) else (
            value == other[name]
        )  # fmt: skip
        assert same, name


@pytest.mark.slow
def test_a_killed_training_ends_like_another(
    trained, fit, taught_recipe, shards, labels, backbone, tmp_path
):
    """Killed by SIGKILL between checkpoints and run again: student, average, adapters, optimiser
    and both logs are bit for bit those of a run left alone.
    """
    run, best = trained
    recipe_file = tmp_path / "recipe.pickle"
    recipe_file.write_bytes(pickle.dumps(taught_recipe))
    folder = tmp_path / "run"
    words = [recipe_file, shards, labels, folder, backbone, NUM_STEPS, EVERY, KILLED_AT]
    env = dict(os.environ) | {"PYTHONPATH": str(Path(trainer.__file__).parents[1])}
    killed = subprocess.run(
        [sys.executable, "-c", TRAIN_THEN_DIE, *map(str, words)],
        check=False, env=env, capture_output=True, text=True, timeout=400,
    )  # fmt: skip
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert state_of(folder)["step"] == 6
    assert fit(folder) == best
    assert_same(state_of(folder), state_of(run))
    for name in (LOG, VALIDATION):
        assert (folder / name).read_bytes() == (run / name).read_bytes()


def test_the_log_has_every_loss(trained, taught_recipe):
    """Each loss of the recipe has its column, all rows are finite, and they add up to the loss."""
    run, best = trained
    table = read_table(run / LOG)
    weights = msgspec.to_builtins(taught_recipe.losses)
    asked = {n for n, v in weights.items() if isinstance(v, float) and "temper" not in n}
    assert set(table) == {"step", "loss", "score", "plcc", "ladder"} | asked
    for i, loss in enumerate(table["loss"]):
        parts = sum(table[name][i] for name in table if name not in ("step", "loss"))
        assert loss == pytest.approx(parts, rel=1e-4)
    figures = read_table(run / VALIDATION)
    assert {"srcc", "srcc_teacher", "srcc_teacher_rated", "srcc_pseudo_mos"} <= set(figures)
    assert best["srcc"] == pytest.approx(max(figures["srcc"]))


def test_the_student_carries_nothing_of_training(trained):
    """The checkpoint has adapters, best.pt has a student's tensors and no others."""
    run, _ = trained
    assert len(state_of(run)["objective"]) > 8
    load_student(run / "best.pt")
    best = torch.load(run / "best.pt", weights_only=True)
    assert best.keys() == Student().state_dict().keys()


def test_curves_are_drawn(trained):
    """curves.png is a picture of the run where matplotlib is there."""
    pytest.importorskip("matplotlib")
    run, _ = trained
    assert (run / CURVES).read_bytes().startswith(b"\x89PNG")


def test_no_curves_of_nothing(tmp_path):
    """A folder without tables gets no picture."""
    assert not draw_curves(tmp_path)
    assert not (tmp_path / CURVES).exists()


def test_every_adapter_moves(trained, fit, tmp_path):
    """After eight steps no training-only parameter is what it was after two."""
    run, _ = trained
    fit(tmp_path, num_steps=2)
    before, after = state_of(tmp_path)["objective"], state_of(run)["objective"]
    assert not [n for n, t in before.items() if torch.equal(t, after[n]) and t.abs().max() > 0]


def test_other_labels_do_not_go_on(trained, fit, label, shards, teacher, tmp_path):
    """A run that began with one teacher's labels refuses another's, and its files stay."""
    run, _ = trained
    other = label(shards, tmp_path, by=dataclasses.replace(teacher, sha256="f" * 64))
    before = (run / "checkpoint.pt").read_bytes()
    with pytest.raises(ConfigError, match="other data or a teacher's other labels"):
        fit(run, data=open_shards(shards, other), num_steps=NUM_STEPS + 2)
    assert (run / "checkpoint.pt").read_bytes() == before


def recipe_with(recipe, **changes):
    """The recipe with other values in its tables train and losses."""
    tables = {
        table: msgspec.structs.replace(getattr(recipe, table), **values)
        for table, values in changes.items()
    }
    return msgspec.structs.replace(recipe, **tables)


@pytest.mark.parametrize(
    ("changes", "num_steps", "told"),
    [
        ({"train": {"head_rate": 0.25}}, NUM_STEPS, r"train\.head_rate \S+, not 0\.25"),
        ({"losses": {"attention": 0.7}}, NUM_STEPS, r"losses\.attention \S+, not 0\.7"),
        ({}, NUM_STEPS + 2, f"steps {NUM_STEPS}, not {NUM_STEPS + 2}"),
    ],
)
def test_another_recipe_does_not_go_on(trained, fit, taught_recipe, changes, num_steps, told):
    """A run refuses another recipe or length in one line that names what differs, and both values;
    its checkpoint stays.
    """
    run, _ = trained
    before = (run / "checkpoint.pt").read_bytes()
    with pytest.raises(ConfigError, match=told) as refused:
        fit(run, recipe=recipe_with(taught_recipe, **changes), num_steps=num_steps)
    assert "\n" not in str(refused.value)
    assert (run / "checkpoint.pt").read_bytes() == before


def test_a_head_that_leaves_the_numbers_is_told(fit, taught_recipe, tmp_path):
    """A rate that makes the head's first fit NaN is named as such, not taken for pictures that
    cannot be read, and leaves no weights.
    """
    wild = recipe_with(taught_recipe, train={"head_rate": 1e30})
    with pytest.raises(FloatingPointError, match="lower trunk_rate or head_rate"):
        fit(tmp_path, recipe=wild)
    assert not list(tmp_path.glob("*.pt"))


def test_a_full_disk_at_a_checkpoint_loses_nothing(fit, trained, tmp_path, monkeypatch):
    """A file-size limit met in a checkpoint is one line; the checkpoint before it is whole, nothing
    is half-written, and the run goes on to the same end once there is room.
    """
    run, best = trained
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    honest = RunFolder.save
    saved = []

    def save(self, state, name):
        if name == "checkpoint.pt":
            saved.append(name)
        if len(saved) == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
        try:
            honest(self, state, name)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "save", save)
        with pytest.raises(SinkError, match=r"no room for checkpoint\.pt") as told:
            fit(tmp_path)
    assert "\n" not in str(told.value)
    assert not list(tmp_path.glob("*.part"))
    assert state_of(tmp_path)["step"] == EVERY
    assert fit(tmp_path) == best
    assert_same(state_of(tmp_path), state_of(run))


def test_a_damaged_checkpoint_is_told(fit, trained, tmp_path):
    """A checkpoint that is cut off is one line naming the file and the way out."""
    (tmp_path / "checkpoint.pt").write_bytes((trained[0] / "checkpoint.pt").read_bytes()[:5000])
    with pytest.raises(ModelError, match=r"checkpoint\.pt cannot be read: train in another"):
        fit(tmp_path)


def test_accumulating_is_the_mean_of_batches(taught_recipe, backbone, shards, labels, tmp_path):
    """Two batches make one step: losses and gradients are the means of both batches' own."""
    losses = msgspec.structs.replace(
        taught_recipe.losses, gated_score=0.0, insensitivity=0.0, contrast=0.0
    )  # these draw noise
    train = msgspec.structs.replace(taught_recipe.train, num_accumulated=2, dropout=0.0)
    recipe = msgspec.structs.replace(taught_recipe, train=train, losses=losses)
    data, compute = open_shards(shards, labels), make_compute("cpu", "fp32")
    run = trainer._Fit(recipe, data, RunFolder(tmp_path), compute, 4)
    run.begin(backbone, None)
    batches = list(compute.batches(run.make, 0, 2))
    parameters = [*run.model.parameters(), *run.objective.parameters()]
    each = []
    for batch in batches:
        run.optimiser.zero_grad()
        made = trainer.train_step(run.model, run.objective, batch, compute)
        made["loss"].backward()
        each.append((made["loss"].item(), [p.grad.clone() for p in parameters]))
    run._update = lambda step, loss: None
    together = run._step(0, iter(batches))
    assert together["loss"].item() == pytest.approx(sum(loss for loss, _ in each) / 2, rel=1e-5)
    for p, first, second in zip(parameters, each[0][1], each[1][1], strict=True):
        torch.testing.assert_close(p.grad, (first + second) / 2, rtol=1e-3, atol=1e-6)


def test_workers_make_the_same_batches(shards, labels, taught_recipe):
    """Two processes give, in order, bit for bit the batches of a thread."""
    make = BatchMaker(open_shards(shards, labels), taught_recipe)
    threads, processes = (
        list(make_compute("cpu", num_workers=n).batches(make, 2, 6)) for n in (0, 2)
    )
    assert len(threads) == len(processes) == 4
    for mine, theirs in zip(threads, processes, strict=True):
        for name, view in mine.views.items():
            assert torch.equal(view, theirs.views[name])
        assert torch.equal(mine.teacher.fused, theirs.teacher.fused)
        assert torch.equal(mine.levels, theirs.levels)


def test_a_workers_error_is_one_line(shards, labels, taught_recipe, tmp_path):
    """What goes wrong in another process comes out as it was, without its traceback."""
    make = BatchMaker(open_shards(shards, labels), taught_recipe)
    rows = make.data.labels._rows
    rows.update(dict.fromkeys(rows, rows["set/15.jpg"]))  # every picture's label is another's
    with pytest.raises(SourceError, match="has no label of") as told:
        list(make_compute("cpu", num_workers=1).batches(make, 0, 2))
    assert "\n" not in str(told.value)


def test_a_corrupt_picture_does_not_stop_training(fit, shards, labels, tmp_path, capsys):
    """One rated training picture whose bytes are damaged is named and left out; the run ends."""
    (tmp_path / "s").mkdir()
    for path in shards.iterdir():
        if path.is_file():
            (tmp_path / "s" / path.name).write_bytes(path.read_bytes())
    record = next(r for r in ShardReader(shards).records if r.mos is not None)
    path = tmp_path / "s" / record.shard
    with zipfile.ZipFile(path) as archive:
        offset = archive.getinfo(record.member).header_offset
    content = bytearray(path.read_bytes())
    content[offset + 400] ^= 1
    path.write_bytes(content)
    fit(tmp_path / "run", data=open_shards(tmp_path / "s", labels), num_steps=3)
    told = capsys.readouterr().err
    assert told.count("left out:") == 1
    assert state_of(tmp_path / "run")["step"] == 3


def test_too_many_corrupt_pictures_stop(fit, shards, labels, tmp_path, monkeypatch):
    """More than may be left out is one line with the number and the last one's reason."""

    honest = ShardPictures.planes

    def planes(self, record):
        if record.split == "train":
            raise SourceError(f"{record.name} is broken")
        return honest(self, record)

    data = open_shards(shards, labels)
    monkeypatch.setattr(trainer, "fit_head_", lambda *args, **options: None)
    monkeypatch.setattr(trainer, "MAX_LEFT_OUT", 5)
    monkeypatch.setattr(ShardPictures, "planes", planes)
    with pytest.raises(SourceError, match="pictures cannot be read and 5 may be left out"):
        fit(tmp_path, data=data)


def test_float16_trains_and_resumes(fit, tmp_path):
    """Under float16 the loss is scaled, and a run in two parts ends as one in one."""
    for name in ("once", "twice"):
        for steps in (3,) if name == "once" else (3, 3):
            fit(tmp_path / name, num_steps=steps, compute=make_compute("cpu", "fp16"))
    assert state_of(tmp_path / "once")["scaler"]["scale"] > 0
    assert_same(state_of(tmp_path / "once"), state_of(tmp_path / "twice"))


def test_unreadable_validation_pictures_are_told(fit, shards, labels, tmp_path, monkeypatch):
    """Where no validation picture can be read nothing could choose the best weights: one line."""
    data, honest = open_shards(shards, labels), ShardPictures.planes

    def planes(self, record):
        if record.split == "validation":
            raise SourceError(f"{record.name} is broken")
        return honest(self, record)

    monkeypatch.setattr(ShardPictures, "planes", planes)
    with pytest.raises(SourceError, match="0 of 4 pictures for validation"):
        fit(tmp_path, data=data)


@pytest.mark.gpu
def test_a_gpu_trains_what_a_cpu_does(fit, tmp_path):
    """On a CUDA device the same call trains, and its first losses are the CPU's within bfloat16."""
    if not torch.cuda.is_available():
        if os.environ.get("FAIL_WITHOUT_GPU"):
            pytest.fail("FAIL_WITHOUT_GPU is set and torch sees no CUDA device")
        pytest.skip("no CUDA device")
    fit(tmp_path / "cpu", num_steps=2)
    fit(tmp_path / "gpu", num_steps=2, compute=make_compute("cuda", num_workers=2))
    mine, theirs = (read_table(tmp_path / n / LOG) for n in ("gpu", "cpu"))
    assert mine["loss"] == pytest.approx(theirs["loss"], rel=0.1)


def test_packs_still_train_without_the_table(packs, recipe, fit, tmp_path):
    """Packs and a recipe without [losses] give the three losses that there always were."""
    fit(tmp_path, recipe=recipe, data=open_packs(packs), num_steps=2)
    assert set(read_table(tmp_path / LOG)) == {"step", "loss", "score", "plcc", "ladder"}
    assert state_of(tmp_path)["objective"] == {}
