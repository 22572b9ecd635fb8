"""The whole chain, from pictures to an INT8 model, in a few seconds of computing."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

for needed in ("torch", "timm", "safetensors", "piq", "onnx", "onnxscript"):
    pytest.importorskip(needed)

import distill  # noqa: E402
from distill.chain import evenly  # noqa: E402
from distill.data.biq2021 import TABLES  # noqa: E402
from distill.data.shards import sha256_of  # noqa: E402
from distill.recipe import load_recipe  # noqa: E402

ROOT = Path(distill.__file__).parents[1]
RECIPES = Path(__file__).parents[2] / "configs" / "distill"
SMALLER = {
    "height = 112": "height = 64",
    "width = 112": "width = 64",
    "num_steps = 30": "num_steps = 3",
    "num_steps = 16": "num_steps = 2",
    "num_rated = 64": "num_rated = 16",
    "num_clean = 6": "num_clean = 3",
    '["gaussian_blur", "gaussian_noise", "mjpeg"]': '["gaussian_blur"]',
    "head_epochs = 30": "head_epochs = 2",
}
INT8 = "[calibration]\nnum_rated = 6\nnum_degraded = 6\nnum_letterboxed = 1\n"


@pytest.fixture
def pictures(tmp_path, make_picture, contents):
    """BIQ2021's layout and three clean pictures, all small; a recipe smaller than tiny.toml."""
    images = tmp_path / "biq" / "Images"
    images.mkdir(parents=True)
    rows = []
    for i in range(44):
        mos = (i * 7 % 44) / 44
        picture = cv2.GaussianBlur(make_picture(i, 80, 100), (0, 0), 0.3 + 3 * (1 - mos))
        assert cv2.imwrite(str(images / f"p{i}.jpg"), picture)
        rows.append([f"p{i}.jpg", mos])
    for split, part in (("train", rows[:40]), ("test", rows[40:])):
        with (tmp_path / "biq" / TABLES[split]).open("w", newline="") as out:
            csv.writer(out).writerows([["Image Name", "MOS"], *part])
    (tmp_path / "pristine").mkdir()
    for i, name in enumerate([*contents("train", 2), *contents("validation", 1)]):
        assert cv2.imwrite(str(tmp_path / "pristine" / f"{name}.webp"), make_picture(i, 100, 120))
    text = (RECIPES / "tiny.toml").read_text()
    for old, new in SMALLER.items():
        assert old in text
        text = text.replace(old, new)
    (tmp_path / "smaller.toml").write_text(text)
    (tmp_path / "int8.toml").write_text(INT8)
    return tmp_path


def chain(folder, backbone, *more):
    """The command in a process of its own."""
    words = [
        "chain", "smaller.toml", "--pristine", "pristine", "--rated", "biq2021=biq",
        "--backbone", str(backbone), "--int8", "int8.toml", "-o", "out", "--device", "cpu",
        "--threads", "1", "--workers", "1", *more,
    ]  # fmt: skip
    return subprocess.run(
        [sys.executable, "-m", "distill.cli", *words],
        cwd=folder, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=False, capture_output=True,
        text=True, timeout=900,
    )  # fmt: skip


@pytest.mark.slow
def test_from_pictures_to_int8_in_one_command(pictures, backbone):
    """One command leaves shards, a teacher, labels, a student, both models and one result; the
    runtime scores with the INT8 model; run again it changes neither weights nor labels, and no
    file that travels has a folder of this machine.
    """
    from dgiqa_stream.scorer import load_scorer

    done = chain(pictures, backbone)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    out = pictures / "out"
    result = json.loads((out / "chain.json").read_text(), parse_constant=pytest.fail)
    assert list(result["seconds"]) == ["shards", "teacher", "labels", "student", "onnx"]
    assert -1 <= result["student"]["srcc"] <= 1
    for name, digest in result["sha256"].items():
        [path] = out.rglob(name)
        assert sha256_of(path) == digest
    labels = json.loads((out / "labels" / "manifest.json").read_text())
    assert labels["teacher"]["sha256"] == result["sha256"]["teacher.safetensors"]
    with load_scorer(out / "tiny.onnx") as scorer:
        assert scorer.manifest.precision == "int8"
        assert 0 <= scorer.score(np.full((80, 90, 3), 99, np.uint8)) <= 100
    kept = [*out.glob("labels/*.npy"), out / "run" / "best.pt", *out.glob("shards/*.zip")]
    before = {path: sha256_of(path) for path in kept}
    again = chain(pictures, backbone)
    assert again.returncode == 0, again.stderr
    assert {path: sha256_of(path) for path in kept} == before
    for path in [*out.glob("*.json"), *out.glob("*/*.json")]:
        assert str(pictures) not in path.read_text()


def test_a_chain_without_a_teacher_is_told(pictures, backbone):
    """A recipe that teaches none, without --teacher, ends with 2 and one line, nothing written."""
    text = (pictures / "smaller.toml").read_text()
    (pictures / "smaller.toml").write_text(text[: text.index("[chain.teacher]")])
    done = chain(pictures, backbone)
    assert done.returncode == 2
    [line] = done.stderr.strip().splitlines()
    assert "give --teacher" in line
    assert not (pictures / "out").exists()


@pytest.mark.parametrize("name", ["tiny.toml", "dgiqa.toml"])
def test_the_recipes_of_chains_load(name):
    """Both recipes are whole, ask for the teacher's losses, and say what comes before."""
    recipe = load_recipe(RECIPES / name)
    assert recipe.chain is not None
    assert recipe.losses.needing_teacher()


def test_evenly_takes_from_everywhere():
    """Four of ten are spread from the first on; all where more are asked for than there are."""
    assert evenly(range(10), 4) == [0, 2, 5, 7]
    assert evenly(range(3), 4) == [0, 1, 2]
