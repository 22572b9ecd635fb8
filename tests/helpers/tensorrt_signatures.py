"""What torch-tensorrt and TensorRT's bindings offer, read from their wheels without importing them.

    python tests/helpers/tensorrt_signatures.py WHEEL... > tests/golden/tensorrt_signatures.json

Neither can be imported without a GPU's libraries. Of torch-tensorrt the parameters' names are read
from its Python source; of the bindings, which are compiled, which names the binary holds. Names and
versions are all that is kept.
"""

from __future__ import annotations

import ast
import json
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import plugins
import quant

ENGINE = Path(quant.__file__).parent / "tensorrt" / "engine.py"
NETWORK = Path(plugins.__file__).parent / "torch_gpu" / "tensorrt" / "network.py"
CONVERT = "torch_tensorrt.dynamo.convert_exported_program_to_serialized_trt_engine"
INPUT = "torch_tensorrt.Input"
REMOVED_IN_11 = ("EXPLICIT_BATCH", "FP16", "int8_calibrator", "platform_has_fast_int8")
"""Names of TensorRT 10 that its migration guide says are gone: 10's wheel has them, 11's not."""
_BINDINGS = {
    ENGINE: frozenset({"builder", "network", "parser", "profile", "settings", "trt"}),
    NETWORK: frozenset({"context", "engine", "runtime", "trt"}),
}
"""What each module calls objects of TensorRT's bindings."""


def names_used() -> set[str]:
    """Every attribute and every argument's name of the bindings that a module uses."""
    return {name for module, objects in _BINDINGS.items() for name in _names_in(module, objects)}


def _names_in(module: Path, objects: frozenset[str]) -> set[str]:
    tree = ast.parse(module.read_text(encoding="utf-8"))
    found = {
        n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and _of_bindings(n, objects)
    }
    found |= {
        k.arg
        for n in ast.walk(tree)
        if isinstance(n, ast.Call) and _of_bindings(n.func, objects)
        for k in n.keywords
        if k.arg is not None
    }
    found |= {
        str(n.args[1].value)
        for n in ast.walk(tree)
        if isinstance(n, ast.Call)
        and isinstance(n.func, ast.Name)
        and n.func.id == "getattr"
        and isinstance(n.args[1], ast.Constant)
    }
    return found


def _of_bindings(node: ast.AST, objects: frozenset[str]) -> bool:
    while isinstance(node, ast.Attribute | ast.Call | ast.Subscript):
        node = node.func if isinstance(node, ast.Call) else node.value
    return isinstance(node, ast.Name) and node.id in objects


def calls_made() -> dict[str, tuple[int, set[str]]]:
    """Each function of torch-tensorrt that is called: positional arguments, keywords' names."""
    tree = ast.parse(ENGINE.read_text(encoding="utf-8"))
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in (CONVERT, INPUT):
            words = {k.arg for k in node.keywords if k.arg is not None}
            for spread in (k.value for k in node.keywords if k.arg is None):
                words |= set(_keys_of(tree, ast.unparse(spread)))
            found[ast.unparse(node.func)] = (len(node.args), words)
    return found


def _keys_of(tree: ast.AST, name: str) -> Iterator[str]:
    """The keys of the dictionaries that a name is assigned."""
    for node in ast.walk(tree):
        targets = node.targets if isinstance(node, ast.Assign) else []
        if any(isinstance(t, ast.Name) and t.id == name for t in targets):
            for inner in ast.walk(node.value):
                if isinstance(inner, ast.Dict):
                    yield from (str(k.value) for k in inner.keys if isinstance(k, ast.Constant))


def read_wheel(wheel: Path) -> dict[str, Any]:
    """Package, version, and what is in it of that which this project uses."""
    package, version = wheel.name.split("-")[:2]
    with zipfile.ZipFile(wheel) as archive:
        if package == "torch_tensorrt":
            functions = {CONVERT: _convert(archive), INPUT: _input(archive)}
            return {"package": package, "version": version, "functions": functions}
        return {"package": package, "version": version, "names": _names(archive)}


def _convert(archive: zipfile.ZipFile) -> dict[str, list[str]]:
    tree = ast.parse(archive.read("torch_tensorrt/dynamo/_compiler.py"))
    wanted = CONVERT.rpartition(".")[2]
    made = next(n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == wanted)
    return {
        "positional": [a.arg for a in (*made.args.posonlyargs, *made.args.args)],
        "keyword": [a.arg for a in made.args.kwonlyargs],
    }


def _input(archive: zipfile.ZipFile) -> dict[str, list[str]]:
    """The keywords that ``Input(*args, **kwargs)`` looks for."""
    tree = ast.parse(archive.read("torch_tensorrt/_Input.py"))
    made = next(n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "Input")
    words = set()
    for node in ast.walk(made):
        if isinstance(node, ast.Subscript) and ast.unparse(node.value) == "kwargs":
            words |= {node.slice.value} if isinstance(node.slice, ast.Constant) else set()
        if isinstance(node, ast.Compare) and ast.unparse(node.comparators[0]) == "kwargs":
            words |= {node.left.value} if isinstance(node.left, ast.Constant) else set()
    return {"positional": [], "keyword": sorted(w for w in words if isinstance(w, str))}


def _names(archive: zipfile.ZipFile) -> list[str]:
    """Those of the names in question that stand in the binary, each ended by a zero byte.

    A linker keeps one of two strings where one ends the other, so the byte before says nothing.
    """
    library = next(n for n in archive.namelist() if n.endswith("/tensorrt.so"))
    content = archive.read(library)
    asked = names_used() | set(REMOVED_IN_11)
    return sorted(name for name in asked if name.encode() + b"\0" in content)


if __name__ == "__main__":
    json.dump([read_wheel(Path(name)) for name in sys.argv[1:]], sys.stdout, indent=1)
    sys.stdout.write("\n")
