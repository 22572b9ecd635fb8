"""``dgiqa-quant factorize`` from a trained student to an exported model that tells of it."""

from __future__ import annotations

import copy
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("safetensors")
pytest.importorskip("onnxscript")

from dgiqa_stream.errors import ModelError  # noqa: E402
from dgiqa_stream.manifest import load_model  # noqa: E402
from dgiqa_stream.preprocess import ViewSpec  # noqa: E402
from dgiqa_stream.scorer import load_scorer, planes_of_rgb  # noqa: E402
from distill.data.packed import Pack, Record, as_planes_420, write_pack  # noqa: E402
from quant.cli import main  # noqa: E402
from quant.low_rank.config import DataConfig, FineTuneConfig, LowRankConfig  # noqa: E402
from quant.low_rank.factorize import factorize_  # noqa: E402
from quant.low_rank.student import calibration_pairs, fine_tune_, open_student  # noqa: E402

RECIPES = Path(__file__).parents[2] / "configs" / "distill"
NUM_TRAINING = 12
SETTINGS = """
[calibration]
num_pictures = 8
batch = 4
[low_rank]
choice = "fixed"
rank = 32
include = ["trunk.blocks.1[0-6].*"]
[fine_tune]
num_steps = 3
batch = 4
rate = 1e-3
"""


def picture(seed: int) -> np.ndarray:
    """Smooth colours with some grain, uint8 (96, 128, 3)."""
    rng = np.random.default_rng(seed)
    coarse = rng.uniform(30, 220, (4, 4, 3)).repeat(24, 0).repeat(32, 1)
    return np.clip(coarse + rng.normal(0, 6, coarse.shape), 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def packs(tmp_path_factory):
    """Rated pictures for training and one for validation, and a ladder."""
    folder = tmp_path_factory.mktemp("packs")
    about = {"made_by": "test", "settings": {}}
    splits = ["train"] * NUM_TRAINING + ["validation"]
    rated = [
        (Record(f"{i}.jpg", f"{i}.jpg", s, mos=0.5), as_planes_420(picture(i)))
        for i, s in enumerate(splits)
    ]
    write_pack(folder / "rated", rated, **about)
    clean = Record("a/0", "a", "train", degradation="clean", level=0)
    write_pack(folder / "ladders", [(clean, as_planes_420(picture(99)))], **about)
    return folder


@pytest.fixture
def files(trained_student, tmp_path):
    """Weights, recipe and settings."""
    weights, recipe, settings = (tmp_path / n for n in ("best.pt", "recipe.toml", "light.toml"))
    torch.save(trained_student.state_dict(), weights)
    text = (RECIPES / "tiny.toml").read_text().partition("[losses]")[0]
    recipe.write_text(text.replace("112", "64"))
    settings.write_text(SETTINGS)
    return weights, recipe, settings


def call(monkeypatch, *words: object) -> int:
    """The command's exit code."""
    monkeypatch.setattr(sys, "argv", ["dgiqa-quant", *map(str, words)])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's exporter warns of torch's own deprecations
        with pytest.raises(SystemExit) as ended:
            main()
    return ended.value.code or 0


def test_a_factored_student_is_exported_with_its_history(
    files, packs, tmp_path, monkeypatch, trained_student
):
    """factorize, then export: the ONNX file says what the factored student says, has its
    parameters, and its manifest tells training, factorization with its settings and ranks,
    fine-tuning and export, in this order.
    """
    weights, recipe, settings = files
    light, model = tmp_path / "light.safetensors", tmp_path / "light.onnx"
    told = call(
        monkeypatch, "factorize", weights, "--recipe", recipe, "--config", settings,
        "--packs", packs, "-o", light,
    )  # fmt: skip
    assert told == 0
    student, steps = open_student(light)
    num_parameters = sum(p.numel() for p in student.parameters())
    assert num_parameters < 0.9 * sum(p.numel() for p in trained_student.parameters())
    assert [p.name for p in tmp_path.iterdir() if p.name.endswith(".part")] == []
    ranks = steps[0]["ranks"]
    assert ranks["trunk.blocks.15.expand"] == [32]
    assert not any("depthwise" in name or "blocks.9" in name for name in ranks)
    exported = call(
        monkeypatch, "export", light, "--recipe", recipe, "--version", "1", "-o", model
    )  # fmt: skip
    assert exported == 0
    manifest = load_model(model).manifest
    names = ["train", "low-rank", "fine-tune", "export"]
    assert [step["step"] for step in manifest.history] == names
    assert manifest.history[1]["settings"]["rank"] == 32
    assert manifest.history[2]["settings"]["num_steps"] == 3
    assert manifest.num_parameters == num_parameters
    planes = planes_of_rgb(picture(50))
    with load_scorer(model) as scorer:
        found = scorer.predict([planes])[0].raw
    want = served(student, planes, manifest.preprocess.views)
    assert abs(found - want) < 1e-4  # float32, another order of adding in ONNX Runtime


def served(student, planes, views) -> float:
    """A student's quality of one picture as it is served."""
    from dgiqa_stream.preprocess import cut_view

    cut = {v.name: torch.from_numpy(cut_view(planes, v)[None]) for v in views}
    with torch.no_grad():
        return float(student(cut["whole"], cut["fragments"]))


def test_fine_tuning_brings_back_what_factoring_took(student, trained_student, packs):
    """Distilled from itself as it was, a factored student's logits come nearer again, by a third or
    more on the pictures that it is tuned on, and the float student is not touched.
    """
    views = [
        ViewSpec("whole", "whole", 64, 64),
        ViewSpec("fragments", "fragments", 64, 64, rows=2, columns=2),
    ]
    pictures = Pack(packs / "rated")
    pairs = calibration_pairs(pictures, views, DataConfig(num_pictures=12, batch=12))
    assert [len(pair[0]) for pair in pairs] == [NUM_TRAINING]
    config = LowRankConfig(choice="fixed", rank=40, include=("trunk.blocks.1[3-6].*",))
    factorize_(student, config, pairs)
    wanted = trained_student.logits(*pairs[0]).detach()

    def distance() -> float:
        with torch.no_grad():
            return float((student.logits(*pairs[0]) - wanted).square().mean())

    before = distance()
    tuning = FineTuneConfig(num_steps=25, batch=6, rate=3e-3, smallest_crop=1.0)
    fine_tune_(student, copy.deepcopy(trained_student), pictures, views, tuning)
    assert distance() < 0.67 * before
    assert torch.equal(trained_student.logits(*pairs[0]), wanted)


@pytest.mark.parametrize(
    ("settings", "output", "message", "code"),
    [
        ("[low_rank]\nenergi = 0.9", "l.safetensors", "unknown field `energi`", 2),
        ("", "l.onnx", "must end in .safetensors", 2),
        (
            "[low_rank]\nchoice = 'sensitivity'\nmax_macs = 5\ninclude = ['trunk.blocks.16.*']",
            "l.safetensors",
            "max_macs 5 cannot be met",
            2,
        ),
        ("[low_rank]\ninclude = ['trunk.blcks.*']", "l.safetensors", "matches no module", 2),
    ],
)
def test_what_cannot_be_done_is_one_line(
    files, packs, tmp_path, monkeypatch, capsys, settings, output, message, code
):
    """Unknown keys, impossible budgets, names of nothing: one line, its exit code, and no file."""
    weights, recipe, path = files
    path.write_text(settings)
    told = call(
        monkeypatch, "factorize", weights, "--recipe", recipe, "--config", path,
        "--packs", packs, "-o", tmp_path / output,
    )  # fmt: skip
    error = capsys.readouterr().err
    assert told == code
    assert message in error
    assert "Traceback" not in error
    assert not (tmp_path / output).exists()


def test_another_file_is_no_factored_student(trained_student, tmp_path):
    """Safetensors without a description and no safetensors at all are clear errors."""
    from safetensors.torch import save_file

    plain, other = tmp_path / "plain.safetensors", tmp_path / "other.safetensors"
    save_file({"x": torch.zeros(1)}, plain)
    other.write_text("no tensors")
    for path, message in ((plain, "is not a dgiqa.low-rank/1 file"), (other, "cannot be read")):
        with pytest.raises(ModelError, match=message):
            open_student(path)
