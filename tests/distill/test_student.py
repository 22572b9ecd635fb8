"""The student against a MobileNetV2 written independently, with its BatchNorms."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from distill.models.student import Deployed, Student  # noqa: E402
from distill.models.trunks import (  # noqa: E402
    INPUT_MEAN,
    INPUT_STD,
    TAPPED,
    Trunk,
    load_imagenet_,
)

MEAN = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
STD = torch.tensor([0.229, 0.224, 0.225])[:, None, None]


@pytest.fixture(scope="module")
def trunk(backbone):
    """The trunk with its BatchNorms folded in."""
    made = Trunk().eval()
    load_imagenet_(made, backbone)
    return made


@pytest.fixture
def pictures(make_picture):
    """Three pictures of 64x96 as uint8 (3, 64, 96, 3)."""
    return torch.from_numpy(np.stack([make_picture(i, 64, 96) for i in range(3)]))


@pytest.fixture
def student(backbone):
    """A student on the loaded trunk, with a drawn head and standardisation."""
    torch.manual_seed(1)
    made = Student(dropout=0.3).eval()
    load_imagenet_(made.trunk, backbone)
    made.feature_mean.normal_(0, 0.5)
    made.feature_std.uniform_(0.3, 2.0)
    return made


def test_the_folded_trunk_is_mobilenetv2(trunk, reference, backbone, pictures):
    """Every mean that the head reads equals the unfolded network's to 1e-4 of its layer's size.

    The student pads with grey (its zero), the original with ImageNet's mean colour: the reference
    is given the student's padding, and every pixel of both is then the same.
    """
    net = reference.ReferenceMobileNet().eval()
    with np.load(backbone) as stored:
        net.take(dict(stored))
    nchw = pictures.permute(0, 3, 1, 2).float()
    padded = torch.nn.functional.pad(nchw, (1, 1, 1, 1), value=INPUT_MEAN)
    with torch.no_grad():
        maps, early = trunk.shared((nchw - INPUT_MEAN) / INPUT_STD)
        ours = torch.cat([early, trunk.late(maps)], 1)
        theirs = net((padded / 255 - MEAN) / STD)
    widths = [trunk.blocks[j].project.out_channels for j in TAPPED] + [1280]
    for mine, wanted in zip(ours.split(widths, 1), theirs.split(widths, 1), strict=True):
        assert wanted.abs().max() > 0.01
        assert (mine - wanted).abs().max() < 1e-4 * wanted.abs().max()


def test_loading_fills_every_tensor(trunk, backbone):
    """Two trunks with different random weights are equal once loaded: no tensor is left out."""
    other = Trunk()
    load_imagenet_(other, backbone)
    for mine, theirs in zip(trunk.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_the_size_is_mobilenets_and_a_small_head():
    """2.33 million parameters, of which the trunk has 2.21 million."""
    student = Student()
    counts = [sum(p.numel() for p in m.parameters()) for m in (student, student.trunk)]
    assert [round(n / 1e6, 2) for n in counts] == [2.33, 2.21]


@pytest.mark.parametrize("size", [(32, 32), (64, 96), (128, 32)])
def test_views_of_any_size_divisible_by_32(student, size):
    """One finite logit comes for every picture, whatever the view's size."""
    views = torch.randint(0, 256, (2, *size, 3), dtype=torch.uint8)
    logits = student.logits(views, views.flip(1))
    assert logits.shape == (2,)
    assert torch.isfinite(logits).all()


def test_a_picture_does_not_depend_on_its_batch(student, pictures):
    """The quality of each picture is that of a batch of one, to float32's rounding."""
    together = student(pictures, pictures.flip(2))
    alone = torch.cat([student(p[None], p[None].flip(2)) for p in pictures])
    assert torch.allclose(together, alone, atol=1e-5)
    assert together.std() > 1e-3


def test_the_views_are_told_apart(student, pictures):
    """Exchanging the two views changes the quality."""
    other = pictures.flip(0)
    assert (student(pictures, other) - student(other, pictures)).abs().max() > 1e-3


def test_quality_is_the_sigmoid_of_the_logit(student, pictures):
    """What the student returns lies within 0..1 and is sigmoid of ``logits``."""
    quality = student(pictures, pictures)
    assert torch.equal(quality, torch.sigmoid(student.logits(pictures, pictures)))
    assert 0 < quality.min() < quality.max() < 1


def test_what_is_deployed_is_the_student(student, pictures):
    """Folding the features' standardisation into the head moves no quality by more than 1e-5."""
    deployed = Deployed(student).eval()
    with torch.no_grad():
        wanted = student(pictures, pictures.flip(1))
        found = deployed(pictures, pictures.flip(1))
    assert found.shape == (3, 1)
    assert (found[:, 0] - wanted).abs().max() < 1e-5


def test_a_trunk_that_keeps_its_batchnorms_gives_the_same(trunk, backbone, pictures):
    """With its BatchNorms and ImageNet's statistics the trunk's means are the folded one's."""
    kept = Trunk(normalised=True).eval()
    load_imagenet_(kept, backbone)
    x = (pictures.permute(0, 3, 1, 2).float() - INPUT_MEAN) / INPUT_STD
    with torch.no_grad():
        maps, means = kept.shared(x)
        wanted_maps, wanted = trunk.shared(x)
        assert torch.allclose(means, wanted, rtol=1e-4, atol=1e-4)
        assert torch.allclose(kept.late(maps), trunk.late(wanted_maps), rtol=1e-4, atol=1e-4)


def test_the_fragments_leave_before_the_last_stages(student, pictures):
    """The last stages get as many maps as there are pictures: those of the whole view."""
    seen = []
    handle = student.trunk.last.register_forward_hook(lambda m, i, o: seen.append(len(o)))
    student(pictures, pictures.flip(1))
    handle.remove()
    assert seen == [len(pictures)]
