"""``dgiqa-quant compress``: the chain of a recipe, skipped where done, whole or absent."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
onnx = pytest.importorskip("onnx")

from small_models import SPECS, small_graph, write_packs, write_small  # noqa: E402

from dgiqa_stream.manifest import load_model  # noqa: E402
from dgiqa_stream.scorer import load_scorer  # noqa: E402
from quant.cli import main  # noqa: E402
from quant.proof.chain import Step, run_chain  # noqa: E402
from quant.proof.commands.steps import STEPS, ChainRequest  # noqa: E402

CALIBRATION = """
[calibration]
num_rated = 8
num_degraded = 6
num_letterboxed = 2
"""
QUANTIZE = CALIBRATION + "[quantize]\n"
HEAD = """
[head]
num_looks = 2
num_ladders = 2
num_heads = 1
width = 8
batch = 16
num_steps = {steps}
"""
PATIENCE_SECONDS = 300
CONFIGS = Path(__file__).parents[2] / "configs"


def writes(name: str, calls: list[str], *, text: str = "made", **options) -> Step:
    """A step that notes its call and writes one file."""

    def run(_files, folder):
        calls.append(name)
        (folder / "out").write_text(text)
        return {name: folder / "out"}

    return Step(name, options.pop("settings", {}), options.pop("reads", ()), run, **options)


def test_a_finished_step_is_not_run_again(tmp_path):
    """A second run runs nothing and gives the same files."""
    calls = []
    steps = [writes("a", calls), writes("b", calls, reads=("a",))]
    first, _ = run_chain(steps, {}, tmp_path, lambda _: None)
    second, told = run_chain(steps, {}, tmp_path, lambda _: None)
    assert calls == ["a", "b"]
    assert first == second == {"a": tmp_path / "1-a" / "out", "b": tmp_path / "2-b" / "out"}
    assert [line["is_new"] for line in told] == [False, False]


@pytest.mark.parametrize(
    ("change", "again"),
    [
        ("settings of b", ["b"]),
        ("settings of a", ["a"]),
        ("what a writes", ["a", "b"]),
        ("output of a", ["a"]),
        ("output of b", ["b"]),
        ("done of b", ["b"]),
    ],
)
def test_what_changed_is_made_again(tmp_path, change, again):
    """Other settings, a changed or damaged output, and files of other content make a step run
    again, and those after it where what they read is another.
    """
    calls = []
    steps = [writes("a", calls), writes("b", calls, reads=("a",))]
    run_chain(steps, {}, tmp_path, lambda _: None)
    calls.clear()
    if change == "settings of b":
        steps[1] = writes("b", calls, reads=("a",), settings={"x": 1})
    elif change == "settings of a":
        steps[0] = writes("a", calls, settings={"x": 1})
    elif change == "what a writes":
        steps[0] = writes("a", calls, settings={"x": 1}, text="other")
    elif change == "done of b":
        (tmp_path / "2-b" / "done.json").write_text("{")
    else:
        place = {"output of a": "1-a", "output of b": "2-b"}[change]
        (tmp_path / place / "out").write_text("touched")
    run_chain(steps, {}, tmp_path, lambda _: None)
    assert calls == again


@pytest.mark.parametrize("resumes", [False, True])
def test_an_interrupted_step_is_absent(tmp_path, resumes):
    """Ctrl-C in a step leaves those before it, and of its own only what it goes on with itself."""
    calls = []

    def run(_files, folder):
        calls.append("b")
        if len(calls) == 2:
            (folder / "half").write_text("")
            raise KeyboardInterrupt
        assert (folder / "half").exists() is resumes
        (folder / "out").write_text("b")
        return {"b": folder / "out"}

    steps = [writes("a", calls), Step("b", {}, (), run, resumes)]
    with pytest.raises(KeyboardInterrupt):
        run_chain(steps, {}, tmp_path, lambda _: None)
    left = ["1-a", "2-b.part"] if resumes else ["1-a"]
    assert sorted(p.name for p in tmp_path.iterdir()) == left
    run_chain(steps, {}, tmp_path, lambda _: None)
    assert calls == ["a", "b", "b"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1-a", "2-b"]


def test_what_a_kill_left_of_other_settings_is_not_gone_on_with(tmp_path):
    """A step that resumes begins anew where its half-made folder is of other settings."""
    (tmp_path / "1-a.part").mkdir()
    (tmp_path / "1-a.part" / "half").write_text("")
    (tmp_path / "1-a.part" / "key.json").write_text('{"key": "other"}')
    run_chain([writes("a", [], resumes=True)], {}, tmp_path, lambda _: None)
    assert not (tmp_path / "1-a" / "half").exists()


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A float model, and packs rated by it."""
    folder = tmp_path_factory.mktemp("project")
    model = write_small(small_graph(), folder / "f.onnx")
    with load_scorer(model, device="cpu") as scorer:
        write_packs(folder / "packs", lambda p: scorer.predict([p])[0].score)
    return folder


@pytest.fixture
def run(project, monkeypatch, capsys):
    """``run(recipe, ...)`` of ``compress f.onnx``: exit code, output, errors."""

    def call(recipe, *words, model="f.onnx"):
        given = ["compress", project / model, "--recipe", recipe, "--packs", project / "packs"]
        monkeypatch.setattr(sys, "argv", ["dgiqa-quant", *map(str, [*given, *words])])
        with pytest.raises(SystemExit) as ended:
            main()
        said = capsys.readouterr()
        return ended.value.code, said.out, said.err

    return call


def test_a_recipe_becomes_two_models(run, project, tmp_path):
    """int8 and refit give a float and an INT8 file with one head, whose history tells every step,
    the chain and the recipe; chain.json has their agreement. The same command again does nothing.
    """
    recipe, out = tmp_path / "r.toml", tmp_path / "out"
    recipe.write_text(QUANTIZE + HEAD.format(steps=30))
    code, said, _ = run(recipe, "-o", out)
    assert code == 0
    assert "small-fp32.onnx, small.onnx" in said
    for name, precision in (("small-fp32.onnx", "fp32"), ("small.onnx", "int8")):
        manifest = load_model(out / name).manifest
        middle = ["int8"] if precision == "int8" else []
        steps = [step["step"] for step in manifest.history]
        assert steps == ["train", *middle, "refit", "compress"]
        assert manifest.precision == precision
        assert manifest.history[-1]["chain"] == ["int8", "refit"]
        assert manifest.history[-1]["recipe"]["head"]["num_steps"] == 30
    told = json.loads((out / "chain.json").read_text())
    assert [line["is_new"] for line in told["steps"]] == [True, True]
    (proof,) = told["proof"]
    assert (proof["a"], proof["b"]) == ("onnx fp32", "onnx int8")
    assert 0 < proof["agreement"]["mean_points"] < 20
    before = {p.name: p.read_bytes() for p in out.glob("*.onnx")}
    code, _, err = run(recipe, "-o", out)
    assert (code, err.count("is done")) == (0, 2)
    assert {p.name: p.read_bytes() for p in out.glob("*.onnx")} == before


def test_ctrl_c_leaves_whole_steps_alone(project, tmp_path):
    """SIGINT while the head is fitted ends with code 130 and no part of it; the finished INT8 step
    stays and is skipped when the command goes on, with a shorter fit.
    """
    recipe, out = tmp_path / "r.toml", tmp_path / "out"
    recipe.write_text(QUANTIZE + HEAD.format(steps=10_000_000))
    # a shell that starts tests in the background has SIGINT ignored, and children inherit that
    listens = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    program = f"{listens}; from quant.cli import main; main()"
    command = [sys.executable, "-c", program, "compress"]
    command += [project / "f.onnx", "--recipe", recipe, "--packs", project / "packs", "-o", out]
    root = str(Path(__file__).parents[2])
    places = os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen(
        list(map(str, command)),
        env={**os.environ, "PYTHONPATH": places},
        stderr=subprocess.PIPE,
        text=True,
    )
    limit = time.monotonic() + PATIENCE_SECONDS
    while not (out / "2-refit.part").exists() and process.poll() is None:
        assert time.monotonic() < limit, "the second step did not begin"
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 130, err
    assert sorted(p.name for p in out.iterdir()) == ["1-int8"]
    assert sorted(p.suffix for p in (out / "1-int8").iterdir()) == [
        ".json", ".json", ".json", ".onnx"
    ]  # fmt: skip
    made = (out / "1-int8" / "int8.onnx").stat().st_mtime_ns
    recipe.write_text(QUANTIZE + HEAD.format(steps=5))
    done = subprocess.run(
        list(map(str, command)), env={**os.environ, "PYTHONPATH": places}, check=False
    )
    assert done.returncode == 0
    assert (out / "1-int8" / "int8.onnx").stat().st_mtime_ns == made
    assert load_model(out / "small.onnx").manifest.history[-1]["chain"] == ["int8", "refit"]


def test_a_checkpoint_is_exported_first(run, project, tmp_path, trained_student):
    """Of a .pt the chain begins with its export, which agrees with torch within 0.1 points."""
    pytest.importorskip("onnxscript")
    torch.save(trained_student.state_dict(), project / "best.pt")
    views = "".join(
        f'[[views]]\nname = "{v.name}"\nkind = "{v.kind}"\nheight = {v.height}\n'
        f"width = {v.width}\nrows = {v.rows}\ncolumns = {v.columns}\n"
        for v in SPECS
    )
    training = tmp_path / "training.toml"
    published = (CONFIGS / "distill" / "student-qat.toml").read_text()
    training.write_text(f'name = "made"\n{views}' + published[published.index("[data]") :])
    recipe = tmp_path / "r.toml"
    recipe.write_text(QUANTIZE)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's exporter warns of torch's own deprecations
        code, _, err = run(
            recipe, "--trained-by", training, "-o", tmp_path / "out", model="best.pt"
        )
    assert code == 0, err
    told = json.loads((tmp_path / "out" / "chain.json").read_text())
    assert [line["step"] for line in told["steps"]] == ["export", "int8"]
    exported = told["proof"][0]
    assert (exported["a"], exported["b"]) == ("torch", "onnx fp32")
    assert exported["agreement"]["max_points"] < 0.1
    assert sorted(told["models"]) == ["made-fp32.onnx", "made.onnx"]


def test_the_recipes_tables_choose_the_steps(tmp_path):
    """What a recipe has a table for is done, in the chain's order, unless it is skipped; an ONNX
    file is neither fine-tuned nor exported.
    """
    recipe = tmp_path / "r.toml"
    recipe.write_text("[sure]\n[head]\n[quantize]\n[qat]\n")

    def chosen(model, **options):
        return ChainRequest(Path(model), recipe, Path("packs"), **options).chosen()

    assert chosen("best.pt") == ["qat", "export", "int8", "refit", "sure"]
    assert chosen("best.pt", low_rank=recipe, skip=("qat", "sure")) == [
        "factorize", "export", "int8", "refit"
    ]  # fmt: skip
    assert chosen("f.onnx") == ["int8", "refit", "sure"]
    assert set(chosen("best.pt", low_rank=recipe)) == set(STEPS)


@pytest.mark.parametrize(
    ("text", "words", "model", "code", "told"),
    [
        ("[quantise]\n", (), "f.onnx", 2, "quantise"),
        ("[quantize]\nper_cent = 1\n", (), "f.onnx", 2, "per_cent"),
        ("[quantize]\ncalibration = 'guess'\n", (), "f.onnx", 2, "guess"),
        ("[quantize]\npercentile = 0.1\n", (), "f.onnx", 2, "percentile"),
        (QUANTIZE, ("--skip", "sleep"), "f.onnx", 2, "sleep"),
        (CALIBRATION, (), "f.onnx", 2, "no step"),
        ("[head]\n", (), "f.onnx", 2, "INT8"),
        (QUANTIZE, (), "best.pt", 2, "--trained-by"),
        ("[qat]\n", ("--trained-by", "{training}"), "best.pt", 2, "--fine-tuning"),
        (QUANTIZE, (), "absent.pt", 5, "no weights"),
        (QUANTIZE, (), "absent.onnx", 5, "no model"),
        (QUANTIZE, (), "stray.onnx", 5, "sha256"),
        (QUANTIZE, (), "q.onnx", 5, "int8"),
    ],
)
def test_bad_input_is_one_line_and_no_folder(
    run, project, tmp_path, text, words, model, code, told
):
    """A recipe with an unknown key or value, a missing option and a model that does not match its
    manifest are one line each, before any work.
    """
    stray = write_small(small_graph(), project / "stray.onnx")
    stray.write_bytes(stray.read_bytes() + b"\0")
    write_small(small_graph(), project / "q.onnx", "int8")
    (project / "best.pt").write_bytes(b"weights")
    (tmp_path / "training.toml").write_text('name = "made"\n')
    recipe = tmp_path / "r.toml"
    recipe.write_text(text)
    given = [word.format(training=tmp_path / "training.toml") for word in words]
    found, out, err = run(recipe, *given, "-o", tmp_path / "out", model=model)
    assert (found, out) == (code, "")
    assert told in err
    assert len(err.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_packs_must_be_there(run, project, tmp_path, monkeypatch):
    """Packs that are missing are told before the first step."""
    recipe = tmp_path / "r.toml"
    recipe.write_text(QUANTIZE)
    shutil.rmtree(tmp_path / "none", ignore_errors=True)
    code, _, err = run(recipe, "-o", tmp_path / "out", "--packs", tmp_path / "none")
    assert code == 5
    assert "no whole pack" in err
    assert not (tmp_path / "out").exists()
