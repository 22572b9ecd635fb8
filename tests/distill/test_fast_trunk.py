"""The fast trunk: its front imitates MobileNetV2's first stages, its BatchNorms fold away."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

from dgiqa_stream.errors import ConfigError, ModelError  # noqa: E402
from distill import imitating, trainer  # noqa: E402
from distill.data.training_data import open_packs  # noqa: E402
from distill.imitating import train_front, train_trunk  # noqa: E402
from distill.models.student import (  # noqa: E402
    Deployed,
    Student,
    load_front_,
    load_student,
    normalised_view,
    quantised_points,
)
from distill.models.trunks import (  # noqa: E402
    FastTrunk,
    NormConv2d,
    PlainFront,
    Trunk,
    copy_late_stages_,
    fold_,
    load_imagenet_,
    still_statistics_,
)
from distill.optimising import make_optimiser  # noqa: E402
from distill.recipe import ImitationConfig, ModelConfig  # noqa: E402

ROUNDING = 2e-5  # float32 sums of up to 576 products in another order, relative to values of 1


def shaken_(module):
    """Give every BatchNorm statistics and factors that are not those of a new one."""
    generator = torch.Generator().manual_seed(3)

    def drawn(like, low, high):
        return torch.rand(like.shape, generator=generator) * (high - low) + low

    with torch.no_grad():
        for norm in (m for m in module.modules() if isinstance(m, nn.BatchNorm2d)):
            norm.weight.copy_(drawn(norm.weight, 0.5, 1.5))
            norm.bias.copy_(drawn(norm.bias, -0.3, 0.3))
            norm.running_mean.copy_(drawn(norm.running_mean, -0.3, 0.3))
            norm.running_var.copy_(drawn(norm.running_var, 0.5, 2.0))
    return module


@pytest.fixture
def views(make_picture):
    """Two frames: uint8 (2, 64, 64, 3) for each view."""
    whole = np.stack([make_picture(i, 64, 64) for i in range(2)])
    return torch.from_numpy(whole), torch.from_numpy(whole[:, ::-1].copy())


@pytest.fixture
def fast_recipe(recipe):
    """The tiny recipe with a fast trunk and an imitation of twelve steps."""
    return msgspec.structs.replace(
        recipe,
        model=ModelConfig(trunk="fast", front_width=8, front_depth=1, normalised=True),
        imitate=ImitationConfig(num_steps=12, rate=5e-3, warmup_steps=2, ema_decay=0.8),
    )


@pytest.fixture(scope="module")
def front(tmp_path_factory):
    """The weights of a front of 8 channels, as ``front`` would leave them."""
    torch.manual_seed(1)
    path = tmp_path_factory.mktemp("front") / "best.pt"
    torch.save(shaken_(PlainFront(width=8, depth=1, normalised=True)).state_dict(), path)
    return path


def test_batchnorms_stand_still_and_fold_without_a_change(views):
    """As BatchNorms in evaluation, as one convolution with still statistics, and folded: one
    function; and still statistics do not move in training.
    """
    torch.manual_seed(0)
    student = shaken_(Student(trunk=FastTrunk(width=8, depth=2, normalised=True)).eval())
    before = student.logits(*views)
    still_statistics_(student)
    mean = student.trunk.front.patches.norm.running_mean.clone()
    trained = student.train()
    assert (trained.logits(*views) - before).abs().max() < ROUNDING
    assert torch.equal(student.trunk.front.patches.norm.running_mean, mean)
    fold_(student)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in student.modules())
    assert (student.eval().logits(*views) - before).abs().max() < ROUNDING


def test_factors_of_still_batchnorms_learn(views):
    """With still statistics the gradient reaches convolution, factor and offset alike."""
    student = Student(trunk=FastTrunk(width=8, depth=1, normalised=True))
    still_statistics_(student)
    student.logits(*views).sum().backward()
    conv = student.trunk.front.patches
    for parameter in (conv.weight, conv.norm.weight, conv.norm.bias):
        assert parameter.grad.abs().sum() > 0


def test_the_late_stages_are_those_of_mobilenetv2(backbone, views):
    """A fast trunk behind MobileNetV2's own first stages has its map after bottleneck 12."""
    whole, fast = Trunk().eval(), FastTrunk(width=8, depth=1).eval()
    load_imagenet_(whole, backbone)
    load_imagenet_(fast, backbone)
    x = normalised_view(views[0])
    wanted, means = whole.shared(x)
    fast.early = whole.early
    seen, fast_means = fast.shared(x)
    assert torch.equal(seen, wanted)
    assert torch.equal(fast_means, means)


def test_a_saved_student_is_loaded_as_what_it_is(views, tmp_path):
    """Widths, depth and BatchNorms are read off the weights; folded, it says the same."""
    trunk = FastTrunk(width=12, depth=2, patch_width=20, normalised=True)
    student = shaken_(Student(trunk=trunk).eval())
    torch.save(student.state_dict(), tmp_path / "best.pt")
    kept = load_student(tmp_path / "best.pt", folded=False).eval()
    folded = load_student(tmp_path / "best.pt").eval()
    assert torch.equal(kept.logits(*views), student.logits(*views))
    assert (folded.logits(*views) - student.logits(*views)).abs().max() < ROUNDING
    assert isinstance(kept.trunk.front.patches, NormConv2d)
    assert not isinstance(folded.trunk.front.patches, NormConv2d)


def test_every_convolution_of_a_fast_trunk_is_rounded_once(views):
    """INT8's points are all of its convolutions, each once, and the sums of its shortcuts."""
    student = Student(trunk=FastTrunk(width=8, depth=2))
    points = quantised_points(student)
    convs = [m for m in student.trunk.modules() if isinstance(m, nn.Conv2d)]
    rounded = [id(m) for _, m, kind in points if kind != "add"]
    assert sorted(rounded) == sorted(map(id, convs))
    assert sum(kind == "add" for _, _, kind in points) == 9  # the one of bottleneck 2 is not there
    named = dict(student.named_modules())
    assert all(named[name] is module for name, module, _ in points)


def test_a_fast_student_is_deployed_as_it_is(views):
    """What is exported gives the trained student's quality."""
    student = Student(trunk=FastTrunk(width=8, depth=1)).eval()
    assert (Deployed(student).eval()(*views)[:, 0] - student(*views)).abs().max() < ROUNDING


def test_a_front_learns_what_it_imitates(fast_recipe, packs, backbone, tmp_path):
    """Forty steps explain some of the map's variance; the map comes out in its own units."""
    longer = msgspec.structs.replace(fast_recipe.imitate, num_steps=40, rate=3e-2)
    recipe = msgspec.structs.replace(fast_recipe, imitate=longer)
    left = train_front(recipe, open_packs(packs), tmp_path, backbone=backbone)
    assert left < 0.9  # 1.0: the mean of every channel
    kept = PlainFront(width=8, depth=1, normalised=True)
    kept.load_state_dict(torch.load(tmp_path / "best.pt", weights_only=True))
    assert 0 < kept.project.bias.abs().max() < 10


def test_an_interrupted_imitation_ends_like_another(
    fast_recipe, packs, backbone, tmp_path, monkeypatch
):
    """Stopped after a checkpoint and run again, the front is bit for bit the one left alone."""
    monkeypatch.setattr(imitating, "_CHECKPOINT_EVERY_STEPS", 5)
    data = open_packs(packs)
    train_front(fast_recipe, data, tmp_path / "whole", backbone=backbone)
    honest, calls = imitating.Averaged.update, []

    def update(*args):
        calls.append(1)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return honest(*args)

    with monkeypatch.context() as broken:
        broken.setattr(imitating.Averaged, "update", update)
        with pytest.raises(KeyboardInterrupt):
            train_front(fast_recipe, data, tmp_path / "cut", backbone=backbone)
    train_front(fast_recipe, data, tmp_path / "cut", backbone=backbone)
    whole, cut = (torch.load(tmp_path / n / "best.pt", weights_only=True) for n in ("whole", "cut"))
    assert all(torch.equal(whole[name], cut[name]) for name in whole)


def test_an_imitation_may_end_early_and_go_on(fast_recipe, packs, backbone, tmp_path):
    """Ended after five steps of twelve there is a front; gone on with, it is the one of twelve."""
    data = open_packs(packs)
    train_front(fast_recipe, data, tmp_path / "whole", backbone=backbone)
    train_front(fast_recipe, data, tmp_path / "cut", backbone=backbone, num_steps=5)
    assert torch.load(tmp_path / "cut" / "checkpoint.pt", weights_only=True)["step"] == 5
    early = torch.load(tmp_path / "cut" / "best.pt", weights_only=True)
    train_front(fast_recipe, data, tmp_path / "cut", backbone=backbone)
    whole, cut = (torch.load(tmp_path / n / "best.pt", weights_only=True) for n in ("whole", "cut"))
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    assert not torch.equal(early["patches.weight"], whole["patches.weight"])


def test_a_whole_trunk_makes_up_for_its_front(fast_recipe, packs, backbone, front, tmp_path):
    """Thirty steps from an untaught front explain more of all maps than one step; what is kept is
    a student whose bottlenecks moved, with a head fitted to the ratings.
    """

    def taught(name, num_steps):
        config = ImitationConfig(num_steps=num_steps, rate=1e-2, warmup_steps=1, ema_decay=0.5)
        recipe = msgspec.structs.replace(fast_recipe, imitate_trunk=config)
        data = open_packs(packs)
        return train_trunk(recipe, data, tmp_path / name, backbone=backbone, front=front)

    before, after = taught("short", 1), taught("long", 30)
    assert after < 0.97 * before
    student = load_student(tmp_path / "long" / "best.pt", folded=False)
    begun = FastTrunk(width=8, depth=1, normalised=True)
    load_imagenet_(begun, backbone)
    moved = student.trunk.blocks[3].project.weight - begun.blocks[3].project.weight
    assert moved.abs().max() > 0
    assert not torch.equal(student.feature_std, torch.ones_like(student.feature_std))


def test_late_stages_of_a_trained_student_are_taken_over(views):
    """Copied into a trunk with BatchNorms, they give the maps that the student's own give."""
    torch.manual_seed(2)
    teacher = Trunk().eval()
    for normalised in (True, False):
        pupil = FastTrunk(width=8, depth=1, normalised=normalised).eval()
        copy_late_stages_(pupil, teacher)
        pupil.early = teacher.early
        x = normalised_view(views[0])
        wanted, seen = teacher.shared(x)[0], pupil.shared(x)[0]
        assert (seen - wanted).abs().max() < ROUNDING * max(1, wanted.abs().max())


def test_a_student_can_be_the_teacher(fast_recipe, packs, backbone, front, tmp_path):
    """With a student's weights its trunk is imitated: what is left differs from ImageNet's."""
    torch.manual_seed(4)
    torch.save(Student().state_dict(), tmp_path / "best.pt")
    data = open_packs(packs)
    fit = {"backbone": backbone, "front": front, "num_steps": 1}
    of_imagenet = train_trunk(fast_recipe, data, tmp_path / "a", **fit)
    of_student = train_trunk(fast_recipe, data, tmp_path / "b", teacher=tmp_path / "best.pt", **fit)
    assert of_student != pytest.approx(of_imagenet)
    with pytest.raises(ModelError, match="no weights at"):
        train_trunk(fast_recipe, data, tmp_path / "c", teacher=tmp_path / "gone.pt", **fit)


def test_only_a_smaller_trunk_imitates(recipe, packs, backbone, front, tmp_path):
    """A recipe with MobileNetV2's own trunk is refused in one line that names the key."""
    with pytest.raises(ConfigError, match=r"trunk = \"slim\" or \"fast\""):
        train_trunk(recipe, open_packs(packs), tmp_path, backbone=backbone, front=front)


def test_training_goes_on_from_a_front(fast_recipe, packs, backbone, front, tmp_path):
    """A fast student trains with its BatchNorms; its front begins as taught, and then moves."""
    fit = {"backbone": backbone, "front": front, "num_steps": 2}
    trainer.train(fast_recipe, open_packs(packs), tmp_path, **fit)
    student = load_student(tmp_path / "best.pt", folded=False)
    taught = torch.load(front, weights_only=True)
    found = student.trunk.front.state_dict()
    assert found.keys() == taught.keys()
    assert torch.equal(found["patches.norm.running_mean"], taught["patches.norm.running_mean"])
    moved = (found["patches.weight"] - taught["patches.weight"]).abs().max()
    assert 0 < moved <= 2.5 * fast_recipe.train.trunk_rate  # AdamW moves by its rate a step


def test_a_trunk_with_batchnorms_has_one_rate(fast_recipe):
    """Its weights move by the recipe's own rate, and factors and offsets are not decayed."""
    student = Student(trunk=FastTrunk(width=8, depth=1, normalised=True))
    weights, others = make_optimiser(student, nn.Module(), fast_recipe.train).param_groups[:2]
    assert weights["lr"] == others["lr"] == fast_recipe.train.trunk_rate
    assert others["weight_decay"] == 0
    assert all(p.ndim == 1 for p in others["params"])


def test_a_fast_trunk_without_a_front_is_told(front, tmp_path):
    """No front, one that is not there, and one of another width: each one clear line."""
    with pytest.raises(ConfigError, match="--front"):
        load_front_(FastTrunk(width=8, depth=1), None)
    with pytest.raises(ModelError, match="no front at"):
        load_front_(FastTrunk(width=8, depth=1), tmp_path / "gone.pt")
    with pytest.raises(ModelError, match="recipe's front"):
        load_front_(FastTrunk(width=16, depth=1), front)
