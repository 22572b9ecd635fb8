"""Fences: who may import whom, what an import costs, what the wheel and the repository hold."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import dgiqa_stream
import plugins

CHECKOUT = Path(os.environ.get("DGIQA_CHECKOUT", Path(__file__).parents[1]))
INSTALLED = Path(dgiqa_stream.__file__).parents[1]
PACKAGES = ("dgiqa_stream", "distill", "quant", "plugins")
TORCH_FAMILY = ("torch", "torchvision", "timm", "onnx", "onnxscript", "tensorrt")
HEAVY = ("av", "cv2", "onnxruntime", "zmq", "matplotlib", "scipy", "prometheus_client", "gi")
TERMINAL = ("typer", "click", "rich")

IMPORT_ALL = """
import importlib, pkgutil, sys
heavy, wanted = sys.argv[1].split(","), sys.argv[2]
for name in heavy:
    sys.modules[name] = None
import dgiqa_stream
names = [m.name for m in pkgutil.walk_packages(dgiqa_stream.__path__, "dgiqa_stream.")]
command_line = ("dgiqa_stream.cli", "dgiqa_stream.__main__")
chosen = [n for n in names if n.startswith(command_line) == (wanted == "cli")]
for name in chosen:
    importlib.import_module(name)
print(len(chosen))
"""


def python(code: str, *arguments: str) -> str:
    """Run code in a fresh interpreter that sees what this one sees, and return what it prints."""
    env = os.environ | {"PYTHONPATH": str(INSTALLED)}
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True, text=True, env=env, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def tracked_files(*folders: str) -> list[str]:
    """What git tracks in the checkout; skips where there is no checkout."""
    if not (CHECKOUT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("needs the git checkout; DGIQA_CHECKOUT names it")
    listed = subprocess.run(
        ["git", "-C", str(CHECKOUT), "ls-files", "-z", "--", *folders],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return [name for name in listed.stdout.split("\0") if (CHECKOUT / name).is_file()]


def test_runtime_modules_import_without_any_heavy_package():
    """Every module of the runtime but the command line imports with numpy and msgspec alone."""
    blocked = ",".join((*HEAVY, *TORCH_FAMILY, *TERMINAL))
    assert int(python(IMPORT_ALL, blocked, "runtime")) >= 15


def test_command_line_imports_without_any_heavy_package():
    """The command line needs typer to start, and decodes, infers or publishes nothing yet."""
    assert int(python(IMPORT_ALL, ",".join((*HEAVY, *TORCH_FAMILY)), "cli")) >= 2


def test_importing_the_package_loads_nothing_heavy():
    """``import dgiqa_stream`` loads no engine, decoder, socket or plotting library."""
    code = "import sys, dgiqa_stream; print(*set(sys.modules) & set(sys.argv[1].split(',')))"
    assert python(code, ",".join((*HEAVY, *TORCH_FAMILY, *TERMINAL))) == ""


@pytest.mark.parametrize("name", PACKAGES)
def test_packages_lie_beside_each_other(name):
    """The generic names distill, quant and plugins are ours, not a stranger's of the same name."""
    assert Path(importlib.import_module(name).__file__).parents[1] == INSTALLED


def test_plugins_is_a_package_with_a_file():
    """``plugins`` is a real package, so no namespace package elsewhere can add to it."""
    assert Path(plugins.__file__).name == "__init__.py"


def test_the_plain_install_asks_for_no_torch():
    """Installing without extras brings neither torch nor onnx nor matplotlib."""
    try:
        required = importlib.metadata.requires("dgiqa-stream") or []
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("dgiqa-stream is not installed: it runs from the checkout")
    plain = {re.match(r"[\w.-]+", r)[0].lower() for r in required if "extra ==" not in r}
    assert {"av", "numpy", "onnxruntime", "pyzmq"} <= plain
    assert not plain & {*TORCH_FAMILY, "scipy", "matplotlib"}


@pytest.mark.parametrize(
    ("command", "needs"),
    [
        ("dgiqa-stream", "numpy"),
        ("dgiqa-stream-prometheus", "prometheus_client"),
        ("dgiqa-distill", "torch"),
        ("dgiqa-quant", "torch"),
    ],
)
def test_commands_lead_to_a_function(command, needs):
    """Each installed command's entry point exists and can be called."""
    pytest.importorskip(needs)
    found = importlib.metadata.entry_points(group="console_scripts", name=command)
    if not found:
        pytest.skip("dgiqa-stream is not installed: it runs from the checkout")
    (entry,) = found
    assert callable(entry.load())


def test_the_wheel_holds_every_file_of_the_packages():
    """Nothing that git tracks in the packages is missing where they are installed."""
    if CHECKOUT.resolve() == INSTALLED:
        pytest.skip("runs from the checkout, not from a wheel")
    missing = [f for f in tracked_files(*PACKAGES) if not (INSTALLED / f).is_file()]
    assert missing == []


def test_import_contracts_hold():
    """Layers, stages and packages import each other only as pyproject.toml allows."""
    pytest.importorskip("importlinter", reason="import-linter is not installed")
    if not (CHECKOUT / "dgiqa_stream").is_dir() or not (CHECKOUT / "pyproject.toml").is_file():
        pytest.skip("needs the checkout; DGIQA_CHECKOUT names it")
    done = subprocess.run(
        [sys.executable, "-c", "from importlinter.cli import lint_imports_command as c; c()",
         "--no-cache"],
        cwd=CHECKOUT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


def test_no_file_names_a_folder_of_somebodys_machine():
    """No tracked file, models included, holds a home folder or workspace path of its maker."""
    private = re.compile(rb"(?<![\w.~/-])/(?:root|work|Users|home/[a-z][\w-]*)/[\w.-]+")
    found = {
        name: match[0]
        for name in tracked_files()
        if (match := private.search((CHECKOUT / name).read_bytes()))
    }
    assert found == {}
