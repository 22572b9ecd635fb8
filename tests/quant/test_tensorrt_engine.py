"""Engines: calls that the real packages know, one clear line without them, caches and profiles."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

onnx = pytest.importorskip("onnx")
pytest.importorskip("torch")

import tensorrt_signatures as signatures  # noqa: E402
from tiny_onnx import VIEWS, pictures, tiny_graph, write_tiny  # noqa: E402

from dgiqa_stream.errors import BackendUnavailable, ModelError  # noqa: E402
from quant.cli import main  # noqa: E402
from quant.tensorrt import engine as module  # noqa: E402
from quant.tensorrt.engine import EngineConfig, build_from_onnx  # noqa: E402

GOLDEN = Path(__file__).parents[1] / "golden" / "tensorrt_signatures.json"
KNOWN = {e["package"]: e for e in json.loads(GOLDEN.read_text(encoding="utf-8"))}
BINDINGS = [name for name in KNOWN if name != "torch_tensorrt"]
WHEELS = {  # what pip calls them
    "torch_tensorrt": "torch-tensorrt",
    "tensorrt_cu12_bindings": "tensorrt-cu12-bindings",
    "tensorrt_cu13_bindings": "tensorrt-cu13-bindings",
}


@pytest.mark.parametrize("function", [signatures.CONVERT, signatures.INPUT])
def test_torch_tensorrt_knows_every_argument(function):
    """Each argument given to torch-tensorrt is one that its own source declares by name, and not
    swallowed by its ``**kwargs``.
    """
    num_positional, words = signatures.calls_made()[function]
    declared = KNOWN["torch_tensorrt"]["functions"][function]
    assert num_positional <= len(declared["positional"])
    assert words
    assert words <= {*declared["positional"][num_positional:], *declared["keyword"]}


def test_caches_are_among_the_arguments():
    """Both of torch-tensorrt's caches are asked for: kernels' timings and whole engines."""
    _, words = signatures.calls_made()[signatures.CONVERT]
    assert {"timing_cache_path", "cache_built_engines", "reuse_cached_engines"} <= words


@pytest.mark.parametrize("package", BINDINGS)
def test_the_bindings_hold_every_name(package):
    """Each attribute of TensorRT that is used is in the binary of 10 and in that of 11."""
    used = signatures.names_used()
    assert len(used) > 20
    assert used <= set(KNOWN[package]["names"])


def test_nothing_that_11_removed_is_used():
    """The names that TensorRT 10 has and 11 lacks are told apart, and none of them is used."""
    ten, eleven = (set(KNOWN[p]["names"]) for p in BINDINGS)
    assert set(signatures.REMOVED_IN_11) <= ten - eleven
    assert not signatures.names_used() & set(signatures.REMOVED_IN_11)


@pytest.mark.slow
@pytest.mark.parametrize("package", WHEELS)
def test_the_signatures_are_those_of_the_wheel(package, tmp_path):
    """The stored signatures are what the published wheel of that version holds."""
    entry = KNOWN[package]
    assert signatures.read_wheel(_wheel(WHEELS[package], entry["version"], tmp_path)) == entry


def _wheel(name: str, version: str, folder: Path) -> Path:
    """From the folder that DGIQA_TENSORRT_WHEELS names, else from the package index."""
    given = os.environ.get("DGIQA_TENSORRT_WHEELS")
    if given:
        folder = Path(given)
    else:
        wanted = [f"{name}=={version}", "--no-deps", "--only-binary=:all:", "-d", str(folder)]
        tags = ["--python-version", "3.11", "--platform", "manylinux_2_28_x86_64"]
        command = [sys.executable, "-m", "pip", "download", "-q", *wanted, *tags]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        except subprocess.TimeoutExpired:
            pytest.skip(f"{name} {version}: the package index took over two minutes")
        if done.returncode:
            reason = done.stderr.strip().splitlines() or ["no pip here"]
            pytest.skip(f"{name} {version} cannot be downloaded: {reason[-1]}")
    found = sorted(folder.glob(f"{name.replace('-', '_')}-{version}-*.whl"))
    if not found:
        pytest.skip(f"{folder} holds no wheel of {name} {version}")
    return found[0]


class Recorded:
    """Remembers calls by name; an attribute that TensorRT lacks is an error here, too."""

    def __init__(self, made, path="trt", **answers):
        self._made, self._path, self._answers = made, path, answers

    def __getattr__(self, name):
        for package in BINDINGS:
            assert name in KNOWN[package]["names"], f"{package} has no {name}"
        return self._answers.get(
            name, Recorded(self._made, f"{self._path}.{name}", **self._answers)
        )

    def __call__(self, *args, **kwargs):
        self._made.append((self._path.rpartition(".")[2], args, kwargs))
        return Recorded(self._made, self._path, **self._answers)

    def __setattr__(self, name, value):
        if name.startswith("_"):
            object.__setattr__(self, name, value)
        else:
            getattr(self, name)
            self._made.append((name, value, None))


@pytest.fixture
def stand_in(monkeypatch):
    """``stand_in(**answers)``: calls made of a TensorRT that holds the real one's names alone."""

    def install(**answers):
        made = []
        settled = {
            "__version__": "11.4.0",
            "STRONGLY_TYPED": 0,
            "parse": lambda content: bool(content),
            "num_errors": 0,
            "set_timing_cache": lambda *_, **__: True,
            "create_timing_cache": lambda known: made.append(("create_timing_cache", known, None)),
            "serialize": lambda: b"timings",
            "build_serialized_network": lambda *_: made.append(("build", None, None)) or b"plan",
        }
        monkeypatch.setattr(module, "import_tensorrt", lambda: Recorded(made, **settled | answers))
        monkeypatch.setattr(module, "gpu_name", lambda: "a GPU")
        return made

    return install


def test_every_view_has_its_profile(stand_in):
    """Each view gets the smallest, best and largest batch of the settings, and no precision flag
    is set: types are those of the graph.
    """
    made = stand_in()
    engine = build_from_onnx(b"graph", VIEWS, EngineConfig(min_batch=1, best_batch=4, max_batch=9))
    shapes = {args[0]: args[1:] for name, args, _ in made if name == "set_shape"}
    assert shapes == {v.name: tuple((n, *v.shape) for n in (1, 4, 9)) for v in VIEWS}
    assert [args for name, args, _ in made if name == "create_network"] == [(1,)]
    assert not [name for name, *_ in made if name == "set_flag"]
    assert (engine.plan, engine.is_reused) == (b"plan", False)


def test_both_caches_are_kept(stand_in, tmp_path):
    """A second build of the same file reads the engine; another file is built with the timings of
    the first; and nothing half-written is left.
    """
    made = stand_in()
    first = build_from_onnx(b"graph", VIEWS, EngineConfig(), cache=tmp_path)
    again = build_from_onnx(b"graph", VIEWS, EngineConfig(), cache=tmp_path)
    other = build_from_onnx(b"graph", VIEWS, EngineConfig(max_batch=80), cache=tmp_path)
    assert [e.is_reused for e in (first, again, other)] == [False, True, False]
    assert again.plan == first.plan
    assert len([1 for name, *_ in made if name == "build"]) == 2
    assert [known for name, known, _ in made if name == "create_timing_cache"] == [b"", b"timings"]
    assert not list(tmp_path.rglob("*.part"))


def test_an_engine_of_an_unknown_gpu_is_not_reused(stand_in, tmp_path, monkeypatch):
    """Where the GPU has no name, engines are built each time: one of another GPU would not run."""
    stand_in()
    monkeypatch.setattr(module, "gpu_name", lambda: "")
    for _ in range(2):
        assert not build_from_onnx(b"graph", VIEWS, EngineConfig(), cache=tmp_path).is_reused


def test_the_parsers_reasons_are_told(stand_in):
    """What TensorRT's parser refuses is an error with its reasons."""

    class Reason:
        def desc(self):
            return "no importer for Hardmax"

    stand_in(parse=lambda _: False, num_errors=1, get_error=lambda _: Reason())
    with pytest.raises(ModelError, match="no importer for Hardmax"):
        build_from_onnx(b"graph", VIEWS, EngineConfig())


def test_no_engine_is_an_error(stand_in, tmp_path):
    """A builder that gives nothing is an error, and nothing is kept."""
    stand_in(build_serialized_network=lambda *_: None)
    with pytest.raises(ModelError, match="built no engine"):
        build_from_onnx(b"graph", VIEWS, EngineConfig(), cache=tmp_path)
    assert not list(tmp_path.rglob("*.*"))


def test_no_gpu_is_said(stand_in):
    """The bindings' way of saying that there is no GPU becomes words."""

    def builder(_logger):
        raise TypeError("factory function returned nullptr")

    stand_in(Builder=builder)
    with pytest.raises(BackendUnavailable, match="found no GPU"):
        build_from_onnx(b"graph", VIEWS, EngineConfig())


def test_batches_out_of_order_are_refused():
    """The best batch lies between the smallest and the largest, also in a file."""
    with pytest.raises(ValueError, match="must rise"):
        EngineConfig(best_batch=100)
    with pytest.raises(msgspec.ValidationError, match="must rise"):
        msgspec.convert({"min_batch": 17}, EngineConfig)


@pytest.fixture
def call(monkeypatch, capsys):
    """``call(*words)``: exit code and lines on standard error of ``dgiqa-quant``."""

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["dgiqa-quant", *map(str, words)])
        with pytest.raises(SystemExit) as caught:
            main()
        return caught.value.code or 0, capsys.readouterr().err.splitlines()

    return run


@pytest.fixture
def without(monkeypatch):
    """Neither package can be imported."""
    for name in ("tensorrt", "torch_tensorrt"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(module, "_is_absent", lambda _: True)


@pytest.mark.parametrize(("suffix", "package"), [("onnx", "tensorrt"), ("pt2", "torch_tensorrt")])
def test_without_tensorrt_it_is_one_line_and_5(call, without, tmp_path, suffix, package):
    """The package, what installs it and exit code 5; no engine is left."""
    write_tiny(tmp_path / f"a.{suffix}")
    code, err = call("engine", tmp_path / f"a.{suffix}", "-o", tmp_path / "a.engine")
    assert (code, len(err)) == (5, 1)
    assert err[0].startswith(f"error: {package} is not installed")
    assert "pip install 'dgiqa-stream[tensorrt]'" in err[0]
    assert not (tmp_path / "a.engine").exists()


def test_a_package_that_cannot_load_says_why(monkeypatch):
    """A missing CUDA library is told as such, not as a missing package."""

    def fail(_name):
        raise OSError("libcudart.so.13: cannot open shared object file")

    monkeypatch.setattr(module.importlib, "import_module", fail)
    monkeypatch.setattr(module, "_is_absent", lambda _: False)
    with pytest.raises(BackendUnavailable, match=r"cannot be loaded \(libcudart"):
        module.import_tensorrt()


def test_an_engine_has_its_manifest(call, stand_in, tmp_path):
    """The engine's manifest says its hash, target, precision and what built it of what."""
    stand_in()
    source = write_tiny(tmp_path / "a.onnx")
    assert (
        call("engine", tmp_path / "a.onnx", "-o", tmp_path / "a.engine", "--best-batch", 8)[0] == 0
    )
    from dgiqa_stream.manifest import load_model

    found = load_model(tmp_path / "a.engine").manifest
    step = found.history[-1]
    assert (found.target, found.precision) == ("tensorrt", "fp32")
    assert (step["from_sha256"], step["tensorrt"], step["gpu"]) == (
        source.sha256,
        "11.4.0",
        "a GPU",
    )
    assert step["settings"]["best_batch"] == 8


def test_int8_for_cpus_makes_no_engine(call, stand_in, tmp_path):
    """INT8 whose manifest says ONNX Runtime is refused, with what makes the other."""
    stand_in()
    write_tiny(tmp_path / "a.onnx", precision="int8")
    code, err = call("engine", tmp_path / "a.onnx", "-o", tmp_path / "a.engine")
    assert (code, len(err)) == (5, 1)
    assert "--target tensorrt" in err[0]


def test_another_models_manifest_is_refused(call, tmp_path):
    """A file with the manifest of another is one line and 5, for every command that reads it."""
    write_tiny(tmp_path / "a.onnx")
    with (tmp_path / "a.onnx").open("ab") as file:
        file.write(b"\0")
    for words in (
        ["check-tensorrt", tmp_path / "a.onnx"],
        ["engine", tmp_path / "a.onnx", "-o", tmp_path / "b.engine"],
        ["half", tmp_path / "a.onnx", "--kind", "fp16", "-o", tmp_path / "b.onnx"],
        ["program", tmp_path / "a.onnx", "-o", tmp_path / "b.pt2"],
    ):
        code, err = call(*words)
        assert (code, len(err)) == (5, 1)
        assert "sha256" in err[0]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.onnx", "a.onnx.json"]


@pytest.mark.parametrize("words", [["--best-batch", 80], ["--output", "a.onnx"]])
def test_wrong_settings_are_2(call, tmp_path, words):
    """Batches out of order and a file of another name are one line and 2."""
    write_tiny(tmp_path / "a.onnx")
    code, err = call("engine", tmp_path / "a.onnx", "-o", tmp_path / "a.engine", *words)
    assert (code, len(err)) == (2, 1)


def test_check_tensorrt_reports(call, tmp_path):
    """A sound file is 0; a float one with a named broken rule is 1, a line for each; the report
    names the file's hash, the rules that were asked and what breaks them.
    """
    from quant.export_onnx import write_successor
    from quant.ptq import Int8StaticConfig
    from quant.tensorrt.quantize import quantize_for_tensorrt

    source = write_tiny(tmp_path / "a.onnx")
    made = quantize_for_tensorrt(tiny_graph(), Int8StaticConfig(), pictures(4))
    good = write_successor(
        made, tmp_path / "q.onnx", source, step={"step": "int8"}, made_by="a test",
        precision="int8", target="tensorrt",
    )  # fmt: skip
    assert call("check-tensorrt", tmp_path / "q.onnx", "--report", tmp_path / "q.json")[0] == 0
    report = json.loads((tmp_path / "q.json").read_text())
    assert (report["sha256"], report["target"]) == (good.sha256, "tensorrt")
    assert report["num_int8_convolutions"] == report["num_convolutions"] == 8
    assert (len(report["rules"]), report["violations"]) == (16, [])
    code, err = call("check-tensorrt", tmp_path / "a.onnx", "--report", tmp_path / "a.json")
    report = json.loads((tmp_path / "a.json").read_text())
    assert code == 1
    assert len(err) == len(report["violations"]) == 10
    assert {v["rule"] for v in report["violations"]} == {"uint8 input", "kernel_shape"}
