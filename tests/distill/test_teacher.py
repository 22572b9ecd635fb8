"""The teacher: the published numbers, its size, and the same bridges on other backbones."""

from __future__ import annotations

import importlib.util
import json
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
timm = pytest.importorskip("timm")

from dgiqa_stream.errors import ConfigError  # noqa: E402
from distill.models.backbones import (  # noqa: E402
    MobileNetPyramid,
    load_mobilenetv2_,
    make_pyramid,
    pyramid_channels,
    pyramid_maps,
)
from distill.models.teacher import Dgiqa, TeacherSpec, TransformerCnnBridge  # noqa: E402

TINY = {"bridge_channels": (16, 16, 16, 16), "num_heads": 4, "pooled_channels": 32}


@pytest.fixture(scope="module")
def golden():
    """``teacher_golden.py``, whose ``GOLDEN`` holds the published definition's answers."""
    path = Path(__file__).parents[1] / "golden" / "teacher_golden.py"
    spec = importlib.util.spec_from_file_location("teacher_golden", path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules.setdefault(spec.name, importlib.util.module_from_spec(spec))
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def expected(golden):
    """What the published definition gave."""
    return json.loads(golden.GOLDEN.read_text())


@pytest.fixture(scope="module")
def published(golden):
    """The teacher at its published size, with the golden file's weights."""
    net = Dgiqa().eval()
    golden.fill_(net)
    return net


def flat(value):
    """All numbers of a nested value."""
    if isinstance(value, dict):
        value = list(value.values())
    return np.array(value, np.float64).ravel()


def test_the_size_is_the_published_one(published, expected):
    """102,878,829 parameters (102.88 million) in 482 tensors, as published."""
    assert sum(p.numel() for p in published.parameters()) == expected["num_parameters"] == 102878829
    assert len(published.state_dict()) == expected["num_tensors"] == 482


def test_every_name_is_the_published_one(published, expected):
    """The sorted names of all tensors have the checksum of the published definition's."""
    names = "\n".join(sorted(published.state_dict()))
    assert zlib.crc32(names.encode()) == expected["names_crc32"]


def test_the_numbers_are_the_published_ones(published, golden, expected):
    """Scores, statistics of the fused map by stage, single values of it, and of the pooled vector
    agree with the published definition (run in float64) to 1e-5: float32's rounding through 12
    transformer blocks, nothing else. Measured: 8e-7.
    """
    with torch.no_grad():
        found = published.describe(*golden.pictures())
    assert tuple(found.fused.shape) == (2, 960, 7, 7)
    assert tuple(found.pooled.shape) == (2, 1024)
    got = golden.summary(found.score, found.fused, found.pooled)
    assert got.keys() == expected["expected"].keys()
    for name, wanted in expected["expected"].items():
        assert np.abs(flat(got[name]) - flat(wanted)).max() < 1e-5, name


def test_depth_asks_and_the_picture_answers(published, golden):
    """Exchanging the inputs moves the fused map's values by far more than the golden tolerance:
    the two streams have their own weights and roles.
    """
    picture, depth = golden.pictures()
    with torch.no_grad():
        right = published.describe(picture[:1], depth[:1]).fused
        wrong = published.describe(depth[:1], picture[:1]).fused
    assert (right - wrong).abs().mean() > 0.1


def test_forward_is_the_described_score():
    """Calling the teacher gives the score that ``describe`` gives, within 0..1."""
    torch.manual_seed(3)
    net = Dgiqa(TeacherSpec("mobilenetv3_small_050", **TINY)).eval()
    crops = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        score, told = net(crops, crops.flip(3)), net.describe(crops, crops.flip(3))
    assert torch.equal(score, told.score)
    assert 0 < score.min() <= score.max() < 1
    assert repr(told) == "TeacherOutput(score (2,), fused (2, 64, 2, 2), pooled (2, 32))"


def test_training_reaches_every_parameter():
    """A loss on the score and the fused map gives every parameter of both streams a gradient."""
    torch.manual_seed(3)
    net = Dgiqa(TeacherSpec("mobilenetv3_small_050", **TINY)).train()
    told = net.describe(torch.randn(2, 3, 64, 64), torch.randn(2, 3, 64, 64))
    (told.score.sum() + told.fused.square().sum() * 1e-3).backward()
    silent = [name for name, p in net.named_parameters() if p.grad is None]
    assert silent == []


@pytest.mark.parametrize("name", ["resnet10t", "mobilenetv3_small_050", "mobilenetv2"])
def test_bridges_on_other_backbones(name):
    """Any pyramid's four stages come through the bridges at the smallest stage's size and the
    widths asked for; strides 4, 8, 16 and 32 leave 2x3 positions of 64x96.
    """
    net = Dgiqa(TeacherSpec(name, **TINY)).eval()
    channels = pyramid_channels(net.backbone)
    with torch.no_grad():
        maps = pyramid_maps(net.backbone, torch.randn(1, 3, 64, 96))
        told = net.describe(torch.randn(1, 3, 64, 96), torch.randn(1, 3, 64, 96))
    assert [tuple(m.shape[1:]) for m in maps] == [
        (c, 64 // s, 96 // s) for c, s in zip(channels, (4, 8, 16, 32), strict=True)
    ]
    for number, (cin, cout) in enumerate(zip(channels, TINY["bridge_channels"], strict=True), 1):
        bridge = net.get_submodule(f"tcb{number}_depth")
        assert isinstance(bridge, TransformerCnnBridge)
        assert tuple(bridge.conv1.weight.shape) == (cout, cin, 1, 1)
    assert tuple(told.fused.shape) == (1, 64, 2, 3)


def test_a_layout_of_channels_last_is_turned(published):
    """Swin gives (B, H, W, C); its stages arrive as 96, 192, 384 and 768 channels at 56 to 7."""
    with torch.no_grad():
        maps = pyramid_maps(published.backbone, torch.zeros(1, 3, 224, 224))
    assert [tuple(m.shape[1:]) for m in maps] == [
        (96, 56, 56), (192, 28, 28), (384, 14, 14), (768, 7, 7)
    ]  # fmt: skip


def test_the_gate_looks_at_one_position():
    """Changing one position of a bridge's input changes its output there and around it (the 3x3
    convolution) and nowhere else: nothing is pooled over the map.
    """
    torch.manual_seed(0)
    bridge = TransformerCnnBridge(8, 32).eval()
    x = torch.randn(1, 8, 9, 9)
    moved = x.clone()
    moved[0, :, 4, 4] += 1
    with torch.no_grad():
        changed = (bridge(moved) - bridge(x)).abs().amax(1)[0] > 0
    assert changed.any()
    assert not changed[[0, 1, 2, 6, 7, 8]].any()
    assert not changed[:, [0, 1, 2, 6, 7, 8]].any()


def test_mobilenetv2_sees_imagenets_colours(backbone, reference, make_picture):
    """Of ImageNet-normalised input, three stages' means over space are those of a MobileNetV2
    written independently, given the same grey as padding, to 1e-4 of their size.
    """
    pyramid = make_pyramid("mobilenetv2").eval()
    assert isinstance(pyramid, MobileNetPyramid)
    load_mobilenetv2_(pyramid, backbone)
    net = reference.ReferenceMobileNet().eval()
    with np.load(backbone) as stored:
        net.take(dict(stored))
    mean, std = (torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406),
                                                          (0.229, 0.224, 0.225)))  # fmt: skip
    picture = torch.from_numpy(make_picture(4, 64, 64)).permute(2, 0, 1)[None]
    colours = (picture / 255 - mean) / std
    grey = (torch.full((1, 3, 66, 66), 116 / 255) - mean) / std  # the student's padding
    grey[:, :, 1:-1, 1:-1] = colours
    with torch.no_grad():
        maps = pyramid(colours)
        wanted = net(grey)
    # the reference gives means over space after bottlenecks 2, 5, 9, 12, ...: two are ours
    places = (slice(0, 24), slice(56, 120), slice(120, 216))
    for ours, place in zip(maps, places, strict=False):
        theirs = wanted[:, place]
        assert theirs.abs().max() > 0.01
        assert (ours.mean((2, 3)) - theirs).abs().max() < 1e-4 * theirs.abs().max()


def test_weights_of_mobilenetv2_fit_only_it(backbone):
    """Filling another backbone from the ``.npz`` raises ``ValueError`` naming both."""
    with pytest.raises(ValueError, match=r"mobilenetv2, not MobileNetV3Features"):
        load_mobilenetv2_(make_pyramid("mobilenetv3_small_050"), backbone)


@pytest.mark.parametrize(
    ("name", "word"),
    [("resnet10", "resnet10t"), ("no_such_net", "list_models"), ("vit_tiny_patch16_224", "3 feat")],
)
def test_a_backbone_that_cannot_be_is_one_error(name, word):
    """An unknown name, or a network without four maps, is a ConfigError with a hint."""
    with pytest.raises(ConfigError, match=word):
        make_pyramid(name)


@pytest.mark.parametrize(
    "wrong",
    [{"bridge_channels": (16, 16, 16)}, {"num_heads": 7}, {"num_heads": 0}, {"pooled_channels": 0}],
)
def test_widths_that_cannot_be_are_refused(wrong):
    """Three bridges, heads that do not share the width, or a zero raise ConfigError when built."""
    with pytest.raises(ConfigError):
        TeacherSpec(**wrong)
