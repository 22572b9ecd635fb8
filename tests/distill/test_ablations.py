"""Ablations: what each compares, on what they are computed, and what they leave behind."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("safetensors")

from distill.ablations import features as frozen  # noqa: E402
from distill.ablations.features import (  # noqa: E402
    FrozenTaps,
    Seen,
    choose,
    depth_of_nothing,
    features,
)
from distill.ablations.nets import (  # noqa: E402
    DepthCar,
    Integration,
    Look,
    PlainHead,
    all_targets,
    crop_scores,
    fit,
)
from distill.ablations.running import ABLATIONS, run_ablation  # noqa: E402
from distill.ablations.settings import Settings  # noqa: E402
from distill.models.backbones import MobileNetPyramid, load_mobilenetv2_  # noqa: E402

VARIANTS = {
    "depth": {"depth", "constant depth", "picture asks itself", "plain pooled head"},
    "integration": {"progressive", "concatenated", "local maps alone"},
    "attention": {"MOS alone", "and the teacher's score", "and its attention and a gate"},
}


@pytest.fixture(scope="module")
def settings(packs, backbone, tmp_path_factory):
    """Sixteen training and four validation pictures, one epoch of each fit."""
    return Settings(
        packs / "rated", backbone, tmp_path_factory.mktemp("cache"),
        num_train=16, num_validation=4, num_seeds=2, num_epochs=1, batch=4,
    )  # fmt: skip


@pytest.fixture(scope="module")
def seen(settings):
    """Both parts, as the frozen backbone sees them."""
    return features(settings)


def random_maps(num, *, seed):
    """Maps of noise whose first channel's mean is quality."""
    generator = torch.Generator().manual_seed(seed)
    mos = torch.rand(num, generator=generator)
    stages = torch.randn(num, 2, 504, 7, 7, generator=generator)
    stages[:, :, 0] += 4 * mos[:, None, None, None]
    late = torch.randn(num, 2, 480, 7, 7, generator=generator)
    depth = torch.randn(num, 2, 504, 7, 7, generator=generator)
    return Seen(stages.half(), late.half(), depth.half(), mos)


def test_frozen_maps_are_the_pyramids(backbone):
    """What is kept of a crop is the averaged maps of the ImageNet pyramid, stage after stage, to
    what float16 keeps (11 bits): folding its BatchNorm changed nothing else.
    """
    crop = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    pyramid = MobileNetPyramid().eval()
    load_mobilenetv2_(pyramid, backbone)
    with torch.no_grad():
        maps = [torch.nn.functional.adaptive_avg_pool2d(m, 7)[0] for m in pyramid(crop)]
    stages, late = FrozenTaps(backbone, precision=torch.float32)(crop)
    assert late.shape == (1, 480, 7, 7)
    for mine, theirs in zip(stages[0].float().split([24, 64, 96, 320]), maps, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-3 * theirs.abs().max().item())


def test_features_are_computed_once(settings, seen, monkeypatch):
    """A second run takes the very same features from the cache without the backbone."""

    def must_not(*args):
        raise AssertionError("computed again")

    monkeypatch.setattr(frozen, "_compute", must_not)
    again = features(settings)
    for mine, theirs in zip(again, seen, strict=True):
        assert torch.equal(mine.stages, theirs.stages)
        assert torch.equal(mine.mos, theirs.mos)
    with pytest.raises(AssertionError, match="computed again"):
        features(replace(settings, num_train=11))


def test_parts_do_not_overlap(settings):
    """Training pictures are of the split train, judging ones of validation; too many is refused."""
    splits = ["validation", "train", "test"] * 20
    chosen = choose(splits, settings)
    assert {splits[i] for i in chosen[:16]} == {"train"}
    assert {splits[i] for i in chosen[16:]} == {"validation"}
    assert len(set(chosen)) == 20
    with pytest.raises(ValueError, match="20 pictures for train, not 21"):
        choose(splits, replace(settings, num_train=21))


@pytest.mark.parametrize(("depth", "is_read"), [("map", True), ("constant", False)])
def test_a_constant_map_shuts_depth_out(settings, depth, is_read):
    """Other depth maps change the pooled features with depth, and with a constant map do not."""
    torch.manual_seed(1)
    net = DepthCar(depth, depth_of_nothing(settings)).eval()
    one, other = random_maps(2, seed=1), random_maps(2, seed=2)
    other = replace(one, depth=other.depth)
    index = torch.arange(2)
    with torch.no_grad():
        first, second = (net.pooled(Look(s, index, torch.zeros_like(index))) for s in (one, other))
    assert torch.equal(first, second) != is_read


@pytest.mark.parametrize(
    ("kind", "is_read"), [("progressive", True), ("concatenated", True), ("local", False)]
)
def test_local_maps_alone_read_no_late_ones(kind, is_read):
    """Other late maps change both integrations, and do not change the control."""
    torch.manual_seed(1)
    net = Integration(kind).eval()
    one, other = random_maps(2, seed=1), random_maps(2, seed=2)
    other = replace(one, late=other.late)
    index = torch.arange(2)
    with torch.no_grad():
        first, second = (net.pooled(Look(s, index, torch.zeros_like(index))) for s in (one, other))
    assert torch.equal(first, second) != is_read


def test_a_fit_learns_what_is_there(settings):
    """A head fitted to sixty-four noisy maps follows the quality of others (PLCC above 0.8), and
    equal seeds give equal heads.
    """
    train, unseen = random_maps(64, seed=3), random_maps(64, seed=4)
    longer = replace(settings, num_epochs=30, batch=16, rate=2e-3)
    heads = [fit(PlainHead, train, all_targets(train), longer, seed=5) for _ in range(2)]
    scores = [crop_scores(h, unseen) for h in heads]
    assert torch.equal(*scores)
    assert torch.corrcoef(torch.stack([scores[0].mean(1), unseen.mos]))[0, 1] > 0.8


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(ABLATIONS))
def test_every_ablation_writes_what_it_found(settings, seen, name, tmp_path):
    """Each writes its variants with a figure for each of two seeds, the command and the machine."""
    run_ablation(name, settings, tmp_path / "out" / "a.json")
    told = json.loads((tmp_path / "out" / "a.json").read_text())
    assert told["ablation"] == name
    assert told["settings"]["num_train"] == 16
    assert "/" not in json.dumps(told["settings"])
    assert told["machine"]["torch"] == torch.__version__
    assert set(told["results"]) >= VARIANTS.get(name, set())
    told["results"].pop("labels of 8 neighbours themselves", None)  # of eight: all are one
    told["results"].pop("the teacher itself", None)  # one for all seeds
    for figures in told["results"].values():
        found = figures["srcc"]
        assert len(found["seeds"]) == 2
        assert found["mean"] == pytest.approx(sum(found["seeds"]) / 2, abs=1e-4)
