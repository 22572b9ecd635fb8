"""The slim trunk: MobileNetV2 with the channels left out that the others can speak for."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

torch = pytest.importorskip("torch")

import torch.nn.functional as F  # noqa: E402
from torch import nn  # noqa: E402

from dgiqa_stream.errors import ConfigError  # noqa: E402
from dgiqa_stream.manifest import load_model  # noqa: E402
from distill import imitating, trainer  # noqa: E402
from distill.data.training_data import open_packs  # noqa: E402
from distill.imitating import imitate  # noqa: E402
from distill.models.student import (  # noqa: E402
    Student,
    load_student,
    load_trunk,
    quantised_points,
)
from distill.models.trunks import WIDTHS, SlimTrunk, Trunk, load_imagenet_  # noqa: E402
from distill.recipe import ImitationConfig, ModelConfig  # noqa: E402
from distill.slimming import _Moments, slim_  # noqa: E402

HALF = (16, 32, *(w // 2 for w in WIDTHS[2:]))
ROUNDING = 1e-3  # float32 maps, and a least-squares solution with a ridge of 1e-6


@pytest.fixture
def batches():
    """Two normalised batches of random pictures for each view: (3, 3, 64, 64), RMS about 1."""
    generator = torch.Generator().manual_seed(1)

    def made():
        # smooth pictures: neighbouring pixels resemble each other, as those of photographs do
        return F.interpolate(torch.randn(3, 3, 16, 16, generator=generator), 64, mode="bilinear")

    return [made(), made()], [made(), made()]


def redundant_trunk(kept):
    """A trunk whose bottlenecks' channels beyond the first ``kept[j]`` repeat those."""
    torch.manual_seed(3)
    trunk = Trunk().eval()
    with torch.no_grad():
        for j, block in enumerate(trunk.blocks):
            num = block.depthwise.out_channels
            copies = torch.arange(num) % kept[j + 1]
            for conv in (block.expand, block.depthwise):
                conv.weight.copy_(conv.weight[copies])
                conv.bias.copy_(conv.bias[copies])
    return trunk


def test_channels_that_repeat_others_leave_without_a_trace(batches):
    """Where half of the channels are copies, a trunk of half the width gives the same features."""
    widths = (32, 16, *(w // 2 for w in WIDTHS[2:]))
    teacher, pupil = redundant_trunk(widths), SlimTrunk(widths).eval()
    lost = slim_(pupil, teacher, *batches)
    assert max(found.unexplained for found in lost) < ROUNDING
    x = batches[0][0]
    for mine, theirs in zip(pupil.shared(x), teacher.shared(x), strict=True):
        assert (mine - theirs).norm() < 0.03 * theirs.norm()  # the root of 1e-3


def test_a_trunk_as_wide_as_its_teacher_is_the_teacher(batches):
    """With MobileNetV2's own widths nothing is lost: the solution is the projection itself."""
    torch.manual_seed(3)
    teacher, pupil = Trunk().eval(), SlimTrunk(WIDTHS).eval()
    lost = slim_(pupil, teacher, *batches)
    assert [found.num_kept for found in lost] == [found.num_channels for found in lost]
    assert max(found.unexplained for found in lost) < ROUNDING


def test_the_fit_is_the_least_squares_solution():
    """Weights, bias and error of the kept channels are numpy's least squares."""
    rng = np.random.default_rng(2)
    y = rng.normal(size=(2, 6, 5, 5)) + 0.5
    wanted = rng.normal(size=(2, 3, 5, 5)) + y[:, :3]
    moments = _Moments()
    moments.add(torch.from_numpy(y), torch.from_numpy(wanted), torch.Generator())
    kept, weight, bias = moments.fitted(4)
    rows = np.concatenate([y.transpose(0, 2, 3, 1).reshape(50, 6)[:, kept], np.ones((50, 1))], 1)
    aims = wanted.transpose(0, 2, 3, 1).reshape(50, 3)
    solution, *_ = np.linalg.lstsq(rows, aims, rcond=None)
    # float32 results and a ridge of 1e-6
    np.testing.assert_allclose(weight.numpy(), solution[:-1].T, atol=1e-4)
    np.testing.assert_allclose(bias.numpy(), solution[-1], atol=1e-4)


def test_the_channels_that_matter_are_kept():
    """Of ten channels the two that make the output are chosen, however loud the others are."""
    rng = np.random.default_rng(2)
    y = rng.normal(size=(4, 10, 8, 8)) * 100
    y[:, [3, 7]] /= 100
    wanted = np.stack([y[:, 3] - y[:, 7], 2 * y[:, 7]], 1)
    moments = _Moments()
    moments.add(torch.from_numpy(y), torch.from_numpy(wanted), torch.Generator())
    assert moments.fitted(2)[0] == [3, 7]


def test_a_slim_trunk_cannot_be_wider_than_its_teacher(batches):
    """It is told how many channels there are; so is a list of widths of the wrong length."""
    with pytest.raises(ValueError, match="40 channels wanted and the trunk to slim has 32"):
        slim_(SlimTrunk((40, *WIDTHS[1:])), Trunk(), *batches)
    with pytest.raises(ValueError, match="3 widths, and a slim trunk has 18"):
        SlimTrunk((16, 16, 48))


def test_a_saved_slim_student_is_loaded_as_what_it_is(tmp_path):
    """The widths are read off the weights, and every convolution is a point that INT8 rounds."""
    student = Student(trunk=SlimTrunk(HALF)).eval()
    torch.save(student.state_dict(), tmp_path / "best.pt")
    loaded = load_student(tmp_path / "best.pt").eval()
    assert loaded.trunk.widths == HALF
    view = torch.randint(0, 256, (2, 64, 64, 3), dtype=torch.uint8)
    assert torch.equal(loaded(view, view), student(view, view))
    convs = {id(m) for m in loaded.trunk.modules() if isinstance(m, nn.Conv2d)}
    assert {id(m) for _, m, kind in quantised_points(loaded) if kind != "add"} == convs


@pytest.fixture
def slim_recipe(recipe):
    """The tiny recipe with a slim trunk and an imitation of twelve steps."""
    return msgspec.structs.replace(
        recipe,
        model=ModelConfig(trunk="slim", slim_widths=list(HALF)),
        imitate=ImitationConfig(num_steps=12, rate=3e-3, warmup_steps=2, ema_decay=0.5),
    )


def test_imitation_recovers_what_slimming_lost(slim_recipe, packs, backbone, tmp_path):
    """Twelve steps leave less unexplained than one; the student goes on to be trained."""
    data = open_packs(packs)

    def left_after(num_steps):
        run = tmp_path / str(num_steps)
        return imitate(slim_recipe, data, run, backbone=backbone, num_steps=num_steps)

    assert left_after(12) < 0.97 * left_after(1)
    imitated = tmp_path / "12" / "best.pt"
    before = load_student(imitated)
    assert not torch.equal(before.feature_std, torch.ones_like(before.feature_std))  # has a head
    trainer.train(slim_recipe, data, tmp_path / "run", weights=imitated, num_steps=2)
    after = load_student(tmp_path / "run" / "best.pt")
    moved = after.trunk.blocks[5].expand.weight - before.trunk.blocks[5].expand.weight
    assert 0 < moved.abs().max() < 0.1 * before.trunk.blocks[5].expand.weight.abs().max()


def test_an_interrupted_imitation_ends_like_another(
    slim_recipe, packs, backbone, tmp_path, monkeypatch
):
    """Stopped after a checkpoint, ended early on purpose, and run again, the student is bit for bit
    the one left alone.
    """
    monkeypatch.setattr(imitating, "_CHECKPOINT_EVERY_STEPS", 2)
    config = msgspec.structs.replace(slim_recipe.imitate, num_steps=6)
    recipe, data = msgspec.structs.replace(slim_recipe, imitate=config), open_packs(packs)
    imitate(recipe, data, tmp_path / "whole", backbone=backbone)
    honest, calls = imitating.Averaged.update, []

    def update(*args):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return honest(*args)

    with monkeypatch.context() as broken:
        broken.setattr(imitating.Averaged, "update", update)
        with pytest.raises(KeyboardInterrupt):
            imitate(recipe, data, tmp_path / "cut", backbone=backbone)
    imitate(recipe, data, tmp_path / "cut", backbone=backbone, num_steps=5)
    early = torch.load(tmp_path / "cut" / "best.pt", weights_only=True)
    imitate(recipe, data, tmp_path / "cut", backbone=backbone)
    whole, cut = (torch.load(tmp_path / n / "best.pt", weights_only=True) for n in ("whole", "cut"))
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    assert not torch.equal(early["trunk.stem.weight"], whole["trunk.stem.weight"])


def test_a_trained_student_can_be_the_teacher(slim_recipe, packs, backbone, tmp_path):
    """With a student's weights its trunk is imitated: what is left differs from ImageNet's."""
    torch.manual_seed(4)
    torch.save(Student().state_dict(), tmp_path / "best.pt")
    data = open_packs(packs)
    of_imagenet = imitate(slim_recipe, data, tmp_path / "a", backbone=backbone, num_steps=1)
    teacher = tmp_path / "best.pt"
    of_student = imitate(slim_recipe, data, tmp_path / "b", teacher=teacher, num_steps=1)
    assert of_student != pytest.approx(of_imagenet)


def test_the_shipped_student_can_be_imitated(slim_recipe, packs, tmp_path):
    """Its float file is a teacher like any ``best.pt``: a trunk of its widths has its weights."""
    shipped = load_model("student-fp32").path
    recipe = msgspec.structs.replace(
        slim_recipe, model=ModelConfig(trunk="slim"), imitate=ImitationConfig(num_steps=0)
    )
    imitate(recipe, open_packs(packs), tmp_path / "run", teacher=shipped)
    taken = load_student(tmp_path / "run" / "best.pt").trunk.state_dict()
    for name, weight in load_trunk(shipped).state_dict().items():
        assert torch.equal(taken[name], weight)


def test_a_trunk_that_leaves_nothing_out_takes_its_teacher_over(
    slim_recipe, packs, backbone, tmp_path
):
    """As wide as its teacher and with no step to take it has the teacher's very weights but for the
    last convolution, nothing left unexplained, and a head of its own.
    """
    torch.manual_seed(4)
    teacher = Student()
    torch.save(teacher.state_dict(), tmp_path / "best.pt")
    recipe = msgspec.structs.replace(
        slim_recipe, model=ModelConfig(trunk="slim"), imitate=ImitationConfig(num_steps=0)
    )
    left = imitate(recipe, open_packs(packs), tmp_path / "run", teacher=tmp_path / "best.pt")
    taken = load_student(tmp_path / "run" / "best.pt")
    assert isinstance(taken.trunk, SlimTrunk)
    for name, weight in taken.trunk.state_dict().items():
        assert torch.equal(weight, teacher.trunk.state_dict()[name])
    assert left < 1e-9
    assert taken.quality.weight.abs().max() > 0


def test_what_cannot_begin_is_told(recipe, packs, backbone, tmp_path):
    """ImageNet's weights do not fit a slim trunk, and the message names the command that makes
    some; a recipe with MobileNetV2's own trunk imitates nothing.
    """
    with pytest.raises(ConfigError, match="`imitate`, then --weights"):
        load_imagenet_(SlimTrunk(HALF), backbone)
    with pytest.raises(ConfigError, match=r"trunk = \"slim\""):
        imitate(recipe, open_packs(packs), tmp_path, backbone=backbone)


def test_a_run_goes_on_with_what_it_was_begun_with(slim_recipe, packs, backbone, tmp_path):
    """Another teacher, another rate and a folder of ``train`` are refused by name; what was there
    stays.
    """
    data = open_packs(packs)
    imitate(slim_recipe, data, tmp_path / "run", backbone=backbone, num_steps=1)
    before = (tmp_path / "run" / "checkpoint.pt").read_bytes()
    torch.save(Student().state_dict(), tmp_path / "other.pt")
    with pytest.raises(ConfigError, match="something else as the teacher"):
        imitate(slim_recipe, data, tmp_path / "run", teacher=tmp_path / "other.pt")
    faster = msgspec.structs.replace(slim_recipe.imitate, rate=5e-3)
    other = msgspec.structs.replace(slim_recipe, imitate=faster)
    with pytest.raises(ConfigError, match=r"something else as \[imitate\]"):
        imitate(other, data, tmp_path / "run", backbone=backbone)
    assert (tmp_path / "run" / "checkpoint.pt").read_bytes() == before
    torch.save({"model": {}, "step": 1}, tmp_path / "run" / "checkpoint.pt")
    with pytest.raises(ConfigError, match="of another command"):
        imitate(slim_recipe, data, tmp_path / "run", backbone=backbone)


def test_a_loss_that_is_no_number_ends_the_run(slim_recipe, packs, backbone, tmp_path, monkeypatch):
    """No step is made with it, and no student is left."""
    honest = imitating._Imitation._losses

    def broken(self, pupil, views):
        loss, left = honest(self, pupil, views)
        return loss * float("nan"), left

    monkeypatch.setattr(imitating._Imitation, "_losses", broken)
    with pytest.raises(FloatingPointError, match="at step 0: lower the rate"):
        imitate(slim_recipe, open_packs(packs), tmp_path, backbone=backbone)
    assert not (tmp_path / "best.pt").exists()
