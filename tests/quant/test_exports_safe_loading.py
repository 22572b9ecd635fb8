"""No file from outside is unpickled: every loader in the source says so."""

from __future__ import annotations

import ast
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

import dgiqa_stream

INSTALLED = Path(dgiqa_stream.__file__).parents[1]
CHECKOUT = Path(os.environ.get("DGIQA_CHECKOUT", Path(__file__).parents[2]))
FOLDERS = [
    *(INSTALLED / name for name in ("dgiqa_stream", "distill", "quant", "plugins")),
    CHECKOUT / "benchmarks",
]
UNSAFE = {
    "pickle": {"load", "loads", "Unpickler"},
    "dill": {"load", "loads"},
    "joblib": {"load"},
    "marshal": {"load", "loads"},
    "shelve": {"open"},
    "pandas": {"read_pickle"},
    "torch.jit": {"load"},
    "yaml": {"load", "unsafe_load"},
}
TORCH_EXPORT = "quant/export_program.py"
"""The one place that may ask torch for a program: it looks for pickles first."""


def unsafe_calls(source: str) -> Iterator[str]:
    """Each call that could unpickle what a file holds, as it is written."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        module, name = ast.unparse(node.func.value), node.func.attr
        words = {k.arg: ast.unparse(k.value) for k in node.keywords}
        if (module, name) == ("torch", "load") and words.get("weights_only") != "True":
            yield ast.unparse(node)
        if name == "load" and module in ("np", "numpy") and words.get("allow_pickle") == "True":
            yield ast.unparse(node)
        if (module, name) == ("torch.export", "load") or name in UNSAFE.get(module, ()):
            yield ast.unparse(node)


def files() -> dict[str, Path]:
    """Every module of the packages, as they are installed, by its place in the checkout."""
    return {
        str(path.relative_to(folder.parent)): path
        for folder in FOLDERS
        for path in sorted(folder.rglob("*.py"))
    }


def test_nothing_is_unpickled():
    """In all packages every torch.load has ``weights_only=True``, no array may hold objects, and
    no module that unpickles is asked, but where a program is read after a look for pickles.
    """
    found = {
        name: calls
        for name, path in files().items()
        if (calls := list(unsafe_calls(path.read_text(encoding="utf-8"))))
    }
    assert found.pop(TORCH_EXPORT) == ["torch.export.load(path)"]
    assert found == {}


def test_loaders_are_there_to_be_looked_at():
    """The search sees files: at least three of them load checkpoints."""
    loading = [p for p in files().values() if "torch.load(" in p.read_text(encoding="utf-8")]
    assert len(loading) >= 3


@pytest.mark.parametrize(
    "line",
    [
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "torch.load(path, weights_only=flag)",
        "pickle.loads(content)",
        "np.load(path, allow_pickle=True)",
        "torch.jit.load(path)",
        "torch.export.load(path)",
    ],
)
def test_an_unsafe_call_is_found(line):
    """The search finds each way to unpickle."""
    assert list(unsafe_calls(f"def f(path):\n    return {line}")) == [line]


@pytest.mark.parametrize(
    "line", ["torch.load(path, weights_only=True)", "np.load(path)", "json.load(file)"]
)
def test_a_safe_call_is_let_through(line):
    """The search leaves safe loaders alone."""
    assert list(unsafe_calls(line)) == []
