"""``label`` and ``train`` on the command line: exit codes, one line for an error, their files."""

from __future__ import annotations

import json
import sys

import msgspec
import pytest

pytest.importorskip("torch")

from distill import cli
from distill.models.teacher_file import save_teacher
from distill.recipe import ModelConfig


@pytest.fixture
def call(monkeypatch, capsys):
    """``call(*words)``: exit code, lines of standard error and text of standard output."""

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["dgiqa-distill", *map(str, words)])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        told = capsys.readouterr()
        return caught.value.code or 0, told.err.strip().splitlines(), told.out

    return call


@pytest.mark.parametrize(
    "some",
    [[], ["--packs", "p", "--shards", "s", "--labels", "l"], ["--packs", "p", "--labels", "l"]],
)
def test_training_takes_data_that_belongs_together(call, recipe_file, tmp_path, some):
    """No data, labels beside packs, or labels without their shards end with 2, and no run folder is
    made.
    """
    words = ["--backbone", tmp_path / "b.npz", "--run", tmp_path / "run", "--threads", 1]
    code, lines, _ = call("train", recipe_file, *words, *some)
    assert code == 2
    [line] = lines
    assert "--packs, from --shards with or without --labels" in line
    assert not (tmp_path / "run").exists()


def test_an_absent_device_is_told(call, recipe_file, tmp_path):
    """A CUDA device that is not there ends with 5 and names the device that is."""
    words = ["--backbone", tmp_path / "b.npz", "--run", tmp_path / "run", "--packs", tmp_path]
    code, lines, _ = call("train", recipe_file, *words, "--device", "cuda:63", "--threads", 1)
    assert code == 5
    [line] = lines
    assert "no device cuda:63" in line
    assert "--device cpu" in line


@pytest.mark.parametrize(
    ("teachers", "code", "told"),
    [
        (["--teacher", "gone.pt"], 5, "no weights at gone.pt"),
        ([], 2, "one of them"),
        (["--teacher", "a.pt", "--backbone", "b.npz"], 2, "one of them"),
    ],
)
def test_a_trunk_imitates_one_teacher(
    call, recipe, recipe_text, packs, tmp_path, teachers, code, told
):
    """Weights that are not there end with 5; none, or two teachers, are a matter of usage."""
    slim = msgspec.structs.replace(recipe, model=ModelConfig(trunk="slim", slim_widths=[16] * 18))
    (tmp_path / "slim.toml").write_text(recipe_text(slim))
    found, lines, _ = call(
        "imitate", tmp_path / "slim.toml", "--packs", packs, "--run", tmp_path / "run",
        "--device", "cpu", "--threads", 1, *teachers,
    )  # fmt: skip
    assert found == code
    assert told in lines[-1]


def test_an_absent_teacher_is_told(call, shards, tmp_path):
    """Labelling without a teacher's file ends with 5 and leaves no folder."""
    words = ["--shards", shards, "-o", tmp_path / "labels", "--depth", "classical"]
    code, lines, _ = call("label", "--teacher", tmp_path / "t.safetensors", *words)
    assert code == 5
    [line] = lines
    assert "no teacher at" in line
    assert not (tmp_path / "labels").exists()


def test_absent_shards_are_told(call, teacher, tmp_path):
    """Labelling a folder that holds no shards ends with 3 and one line."""
    pytest.importorskip("safetensors")
    save_teacher(teacher.model, tmp_path / "t.safetensors", version="1")
    words = ["--shards", tmp_path, "-o", tmp_path / "labels", "--depth", "classical"]
    code, lines, _ = call("label", "--teacher", tmp_path / "t.safetensors", *words)
    assert code == 3
    [line] = lines
    assert "no whole set of shards" in line


@pytest.mark.slow
def test_label_then_train(call, teacher, shards, taught_recipe, backbone, tmp_path, recipe_text):
    """The two commands, one after the other, leave labels that carry no folder of this machine and
    a student, whose figures are printed as JSON.
    """
    pytest.importorskip("safetensors")
    save_teacher(teacher.model, tmp_path / "t.safetensors", version="1")
    code, lines, _ = call(
        "label", "--teacher", tmp_path / "t.safetensors", "--shards", shards, "-o",
        tmp_path / "labels", "--depth", "classical", "--crops", 1, "--device", "cpu",
        "--threads", 1,
    )  # fmt: skip
    assert code == 0, lines
    assert str(tmp_path) not in (tmp_path / "labels" / "manifest.json").read_text()
    (tmp_path / "r.toml").write_text(recipe_text(taught_recipe))
    code, lines, printed = call(
        "train", tmp_path / "r.toml", "--shards", shards, "--labels", tmp_path / "labels",
        "--backbone", backbone, "--run", tmp_path / "run", "--steps", 2, "--device", "cpu",
        "--threads", 1,
    )  # fmt: skip
    assert code == 0, lines
    assert json.loads(printed)["step"] == 2
    assert (tmp_path / "run" / "best.pt").is_file()
