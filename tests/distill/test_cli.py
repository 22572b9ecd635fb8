"""The commands: exit codes, one line for an error, and the whole way from pictures to a model."""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

import distill
from distill import cli
from distill.data.biq2021 import TABLES
from distill.data.degrade import encode, pan
from distill.process import command_line

NUM_RATED, NUM_TEST = 20, 5


def run(module, *words, cwd):
    """A command in its own process."""
    env = os.environ | {"PYTHONPATH": str(Path(distill.__file__).parents[1])}
    return subprocess.run(
        [sys.executable, "-m", module, *map(str, words)],
        cwd=cwd, env=env, check=False, capture_output=True, text=True, timeout=120,
    )  # fmt: skip


@pytest.fixture
def call(monkeypatch, capsys):
    """``call(*words)``: the exit code and the error lines of ``dgiqa-distill``, in this process."""

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["dgiqa-distill", *map(str, words)])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        return caught.value.code, capsys.readouterr().err.strip().splitlines()

    return call


def test_help_names_the_commands(tmp_path):
    """``python -m distill.cli --help`` ends well and lists data, train and evaluate."""
    done = run("distill.cli", "--help", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert {"data", "train", "evaluate"} <= set(done.stdout.split())


def test_an_absent_recipe_is_a_usage_error(call, tmp_path):
    """Training by a recipe that is not there ends with 2 and one line naming it."""
    pytest.importorskip("torch")
    words = ["--packs", tmp_path, "--backbone", tmp_path / "b.npz", "--run", tmp_path / "run"]
    code, lines = call("train", tmp_path / "absent.toml", *words)
    assert code == 2
    assert len(lines) == 1
    assert "absent.toml" in lines[0]


def test_an_unknown_key_is_a_usage_error(call, recipe_file, tmp_path):
    """A misspelt key ends with 2 and one line naming file and key."""
    wrong = tmp_path / "wrong.toml"
    wrong.write_text(recipe_file.read_text().replace("ema_decay", "ema_deacy"))
    folders = ["--biq2021", tmp_path, "--pristine", tmp_path, "--packs", tmp_path]
    code, lines = call("data", wrong, *folders)
    assert code == 2
    assert len(lines) == 1
    assert re.search(r"wrong\.toml.*ema_deacy", lines[0])


def test_absent_pictures_are_told_before_any_work(call, recipe_file, tmp_path):
    """Without clean pictures `data` ends with 3 and one line, and nothing has been written."""
    folders = ["--biq2021", tmp_path, "--pristine", tmp_path, "--packs", tmp_path / "packs"]
    code, lines = call("data", recipe_file, *folders)
    assert code == 3
    assert len(lines) == 1
    assert "*.webp" in lines[0]
    assert not (tmp_path / "packs").exists()


def test_absent_packs_say_which_command_makes_them(call, recipe_file, tmp_path):
    """Training without packs ends with 3 and one line that names `dgiqa-distill data`."""
    pytest.importorskip("torch")
    words = ["--packs", tmp_path, "--backbone", tmp_path / "b.npz", "--run", tmp_path / "run"]
    code, lines = call("train", recipe_file, *words, "--threads", 1)
    assert code == 3
    assert len(lines) == 1
    assert "dgiqa-distill data" in lines[0]


def test_another_backbone_is_one_line(call, recipe_file, packs, tmp_path):
    """Weights of another network end training with 3 and one line naming the file."""
    pytest.importorskip("torch")
    np.savez(tmp_path / "other.npz", conv0_weight=np.zeros(3))
    words = ["--packs", packs, "--backbone", tmp_path / "other.npz", "--run", tmp_path / "run"]
    code, lines = call("train", recipe_file, *words, "--threads", 1)
    assert code == 3
    assert len(lines) == 1
    assert "other.npz does not hold MobileNetV2" in lines[0]


@pytest.mark.parametrize("some", [[], ["--pristine", "x"], ["--clips", "x"]])
def test_nothing_to_evaluate_on_is_a_usage_error(call, recipe_file, tmp_path, some):
    """Half of the folders for ladders, or none at all, ends with 2 rather than an empty result."""
    code, lines = call("evaluate", "student", "-o", tmp_path / "o", "--recipe", recipe_file, *some)
    assert code == 2
    assert len(lines) == 1
    assert "--pristine and --clips" in lines[0]
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("word", ["/a/b/packs", "/a/b/packs/", "--packs=/a/b/packs", "../x/packs"])
def test_a_noted_command_holds_no_folders(monkeypatch, word):
    """However a folder is given, only its own name is noted."""
    monkeypatch.setattr(sys, "argv", ["/usr/bin/dgiqa-distill", "train", word, "--steps", "7"])
    noted = command_line()
    assert "/" not in noted
    assert noted.startswith("dgiqa-distill train ")
    assert noted.endswith("packs --steps 7")


@pytest.fixture
def raw(tmp_path, make_picture, contents):
    """BIQ2021's layout, clean pictures of every split and a clip, all tiny."""
    images = tmp_path / "biq" / "Images"
    images.mkdir(parents=True)
    rows = []
    for i in range(NUM_RATED + NUM_TEST):
        mos = (i * 7 % 25) / 25
        picture = cv2.GaussianBlur(make_picture(i, 80, 100), (0, 0), 0.3 + 3 * (1 - mos))
        assert cv2.imwrite(str(images / f"p{i}.jpg"), picture)
        rows.append([f"p{i}.jpg", mos])
    for split, part in (("train", rows[:NUM_RATED]), ("test", rows[NUM_RATED:])):
        with (tmp_path / "biq" / TABLES[split]).open("w", newline="") as out:
            csv.writer(out).writerows([["Image Name", "MOS"], *part])
    (tmp_path / "pristine").mkdir()
    for i, name in enumerate([*contents("train", 1), *contents("validation", 1), "clic_1"]):
        assert cv2.imwrite(str(tmp_path / "pristine" / f"{name}.webp"), make_picture(i, 90, 110))
    (tmp_path / "clips").mkdir()
    frames = list(pan(make_picture(50, 90, 110), num_frames=12))
    (tmp_path / "clips" / "street.mp4").write_bytes(encode(frames, "libx264", 18))
    return tmp_path


INT8 = """
[calibration]
num_rated = 6
num_degraded = 6
num_letterboxed = 1
"""


@pytest.mark.slow
def test_from_pictures_to_an_int8_model(raw, recipe_file, backbone):
    """data, train, export, int8 and evaluate, each in its own process: the result is JSON with an
    SRCC and ladders for both models, the runtime scores with the INT8 one, no file carries a folder
    of this machine, and no command spoke of an error.
    """
    for needed in ("torch", "onnx", "onnxscript"):
        pytest.importorskip(needed)
    from dgiqa_stream.scorer import load_scorer

    (raw / "int8.toml").write_text(INT8)
    float_model, int8_model = raw / "out" / "tiny-fp32.onnx", raw / "out" / "tiny.onnx"
    packs, result = raw / "packs", raw / "out" / "result.json"
    biq, pristine, clips = raw / "biq", raw / "pristine", raw / "clips"
    steps = [
        ["distill.cli", "data", recipe_file, "--biq2021", biq, "--pristine", pristine,
         f"--packs={packs}", "--workers", 1],
        ["distill.cli", "train", recipe_file, "--packs", packs, "--backbone", backbone,
         "--run", raw / "run", "--steps", 5, "--threads", 1],
        ["quant.cli", "export", raw / "run" / "best.pt", "--recipe", recipe_file,
         "-o", float_model, "--version", "0.0.1"],
        ["quant.cli", "int8", float_model, "--config", raw / "int8.toml", "--packs", packs,
         "-o", int8_model],
        ["distill.cli", "evaluate", int8_model, float_model, "-o", result,
         "--recipe", recipe_file, "--biq2021", biq, "--pristine", pristine, "--clips", clips],
    ]  # fmt: skip
    for words in steps:
        done = run(*words, cwd=raw)
        assert done.returncode == 0, done.stderr
        assert "Traceback" not in done.stderr
        assert "error" not in done.stderr
    found = json.loads(result.read_text(), parse_constant=pytest.fail)
    assert set(found["models"]) == {"tiny.onnx", "tiny-fp32.onnx"}
    for name in found["models"]:
        assert -1 <= found["biq2021_validation"][name]["srcc"] <= 1
        assert found["biq2021_validation"][name]["num_pictures"] == 4
    assert "tiny.onnx - tiny-fp32.onnx" in found["biq2021_validation"]["differences"]
    assert found["ladders"]["ladders"]["h264"]["num_contents"] == 2
    with load_scorer(int8_model) as scorer:
        assert scorer.manifest.precision == "int8"
        assert [step["step"] for step in scorer.manifest.history] == ["train", "export", "int8"]
        assert 0 <= scorer.score(np.full((80, 90, 3), 99, np.uint8)) <= 100
    assert int8_model.stat().st_size < 0.45 * float_model.stat().st_size
    for path in [*(raw / "out").glob("*.json"), *packs.glob("*/index.json")]:
        assert str(raw) not in path.read_text()
