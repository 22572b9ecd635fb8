"""A student made anew from drawn pictures agrees with how they were damaged."""

from __future__ import annotations

import cv2
import msgspec
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from dgiqa_stream.correlation import srcc  # noqa: E402
from dgiqa_stream.errors import ModelError  # noqa: E402
from dgiqa_stream.manifest import load_model  # noqa: E402
from distill import trainer  # noqa: E402
from distill.data.loader import stack, views_of  # noqa: E402
from distill.data.packed import Pack, Record, as_planes_420, write_pack  # noqa: E402
from distill.models.student import load_student, load_trunk  # noqa: E402
from distill.models.trunks import SlimTrunk  # noqa: E402
from distill.recipe import ModelConfig  # noqa: E402

LEAST_SRCC = 0.9
"""Of 60 pictures that took no part; measured 0.93."""
NUM_TRAINING, NUM_HELD_BACK = 240, 60


def damaged(rgb, quality, kind, rng):
    """Blur, noise or both, the stronger the lower the quality on 0..1."""
    if kind != "noise":
        rgb = cv2.GaussianBlur(rgb, (0, 0), 0.2 + 2.5 * (1 - quality))
    if kind != "blur":
        rgb = rgb + rng.normal(0, 1 + 40 * (1 - quality), rgb.shape)
    return np.clip(rgb, 0, 255).astype(np.uint8)


def model_of(trunk):
    """The recipe's table for a trunk that is there."""
    if isinstance(trunk, SlimTrunk):
        return ModelConfig(trunk="slim", slim_widths=list(trunk.widths))
    return ModelConfig()


@pytest.fixture(scope="module")
def drawn(make_picture, packs, tmp_path_factory):
    """Packs whose rated pictures are drawn, their MOS how little they were damaged."""
    folder = tmp_path_factory.mktemp("drawn")
    rng = np.random.default_rng(5)
    rated = []
    for i in range(NUM_TRAINING + NUM_HELD_BACK):
        quality = float(rng.uniform())
        rgb = damaged(make_picture(1000 + i), quality, ("blur", "noise", "both")[i % 3], rng)
        split = "train" if i < NUM_TRAINING else "validation"
        rated.append((Record(f"{i}.png", f"{i}", split, mos=quality), as_planes_420(rgb)))
    write_pack(folder / "rated", rated, made_by="test", settings={})
    (folder / "ladders").symlink_to(packs / "ladders")
    return folder


@pytest.mark.slow
def test_a_student_made_anew_agrees(drawn, recipe, tmp_path):
    """From the shipped trunk and a new head to a stated SRCC on pictures held back."""
    shipped = load_model("student-fp32").path
    model = model_of(load_trunk(shipped))
    train = msgspec.structs.replace(
        recipe.train, num_epochs=2, rated_batch=16, head_epochs=40, trunk_rate=2e-4, head_rate=2e-3
    )
    recipe = msgspec.structs.replace(recipe, train=train, model=model)
    trainer.train(recipe, drawn, tmp_path, weights=shipped)
    student = load_student(tmp_path / "best.pt").eval()
    pack = Pack(drawn / "rated")
    records = [r for r in pack.records if r.split == "validation"]
    assert len(records) == NUM_HELD_BACK
    cut = stack([views_of(pack.planes(r), recipe.views, None) for r in records])
    with torch.inference_mode():
        found = student(*(torch.from_numpy(cut[v.name]) for v in recipe.views)).numpy()
    assert srcc(found, np.array([r.mos for r in records])) >= LEAST_SRCC


def test_training_from_an_exported_model_tells_what_does_not_fit(recipe, packs, tmp_path):
    """An INT8 file, one that is no ONNX, none at all, and another trunk: each one clear line."""
    (tmp_path / "text.onnx").write_text("not a model")
    with pytest.raises(ModelError, match="an INT8 file has none"):
        load_trunk(load_model("student").path)
    with pytest.raises(ModelError, match=r"text\.onnx is not an ONNX file"):
        load_trunk(tmp_path / "text.onnx")
    with pytest.raises(ModelError, match="no model at"):
        load_trunk(tmp_path / "gone.onnx")
    narrow = ModelConfig(trunk="slim", slim_widths=[8] * 18)
    other = msgspec.structs.replace(recipe, model=narrow)
    with pytest.raises(ModelError, match=r"another trunk than the recipe's \[model\]"):
        trainer.train(other, packs, tmp_path / "run", weights=load_model("student-fp32").path)
