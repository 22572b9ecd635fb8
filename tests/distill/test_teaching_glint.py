"""A GlintIQA taught as DGIQA is: its file, its frozen CNN, and what it does not need."""

from __future__ import annotations

import re

import msgspec
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("safetensors")
pytest.importorskip("timm")

from dgiqa_stream.errors import ConfigError  # noqa: E402
from distill.models.glint import GlintIQA  # noqa: E402
from distill.models.official import open_teacher  # noqa: E402
from distill.models.teacher_file import read_about  # noqa: E402
from distill.teacher_score import manifest_of  # noqa: E402
from distill.teachers.pictures import PackPictures  # noqa: E402
from distill.teachers.recipe import TeacherRecipe  # noqa: E402
from distill.teachers.teaching import teach  # noqa: E402
from distill.teachers.training import make_teacher  # noqa: E402

RECIPE = {
    "name": "tiny",
    "version": "0.0.2",
    "model": {
        "architecture": "glint",
        "vit": "vit_tiny_patch16_224",
        "cnn": "mobilenetv2",
        "vit_options": {"depth": 4, "embed_dim": 12, "num_heads": 3},
    },
    "data": {"num_validation": 4, "seed": 3},
    "train": {
        "seed": 3,
        "num_epochs": 1,
        "batch": 4,
        "head_rate": 3e-3,
        "pyramid_rate": 1e-4,
        "warmup_steps": 1,
        "weight_decay": 0.02,
        "ema_decay": 0.9,
        "evaluation_crops": 1,
    },
    "qfm": {"weight": 0.5, "tolerance": 0.6},
}


@pytest.fixture(scope="module")
def taught(packs, backbone, tmp_path_factory):
    """Two steps of a ViT of four narrow blocks beside MobileNetV2, without depth."""
    run = tmp_path_factory.mktemp("glint")
    recipe = msgspec.convert(RECIPE, TeacherRecipe)
    pictures = PackPictures(packs / "rated")
    return teach(recipe, pictures, run, depth=None, backbone=backbone, device="cpu", num_steps=2)


def test_the_file_holds_a_glint(taught):
    """The file says which ViT and CNN it holds, opens as that network, and has a name for users."""
    about = read_about(taught.path)
    assert about.backbone == "vit_tiny_patch16_224+mobilenetv2"
    assert about.depth == ""
    opened = open_teacher(taught.path)
    assert isinstance(opened.model, GlintIQA)
    assert not opened.model.training
    assert manifest_of(opened).id == "dgiqa-teacher-vit_tiny_patch16_224+mobilenetv2"
    crop = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert ((opened.model(crop) > 0) & (opened.model(crop) < 1)).all()


def test_both_extractors_moved(taught, backbone):
    """With a pyramid_rate the ViT and the CNN learn, too: all but the CNN's last bottlenecks, whose
    maps are of stride 32 and not read.
    """
    torch.manual_seed(3)
    model = make_teacher(msgspec.convert(RECIPE, TeacherRecipe), backbone=backbone)
    after = torch.load(taught.path.with_name("checkpoint.pt"), weights_only=True)["model"]
    stayed = {n for n, p in model.named_parameters() if torch.equal(p, after[n])}
    not_read = {n for n, _ in model.named_parameters() if re.search(r"cnn\.blocks\.1[3-6]", n)}
    assert stayed == not_read


def test_a_frozen_glint_needs_both_weights(packs, backbone, tmp_path):
    """Frozen extractors of which one would stay random are refused, naming both options."""
    train = {**RECIPE["train"], "pyramid_rate": 0.0}
    recipe = msgspec.convert({**RECIPE, "train": train}, TeacherRecipe)
    with pytest.raises(ConfigError, match="--backbone and --vit"):
        teach(
            recipe, PackPictures(packs / "rated"), tmp_path,
            depth=None, backbone=backbone, device="cpu",
        )  # fmt: skip
