"""The public names: complete, sorted, few, documented, and loaded on demand."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path
from types import ModuleType

import pytest

import dgiqa_stream
from dgiqa_stream import errors

MOST_NAMES = 27
ERRORS = {
    name for name, value in vars(errors).items()
    if inspect.isclass(value) and issubclass(value, errors.DgiqaError)
}  # fmt: skip
PROMISED = ERRORS | {
    "Crop", "Frame", "FrameInfo", "FrameScore", "ModelManifest", "Monitor", "POOLERS", "Planes",
    "Scorer", "StreamConfig", "StreamInfo", "Subscriber", "Telemetry", "WindowScore",
    "load_config", "load_scorer", "open_source",
}  # fmt: skip


def in_order(name: str) -> tuple[int, str]:
    """Constants, then classes, then functions, each by name: as ruff's RUF022 sorts."""
    return (0 if name.isupper() else 1 if name[0].isupper() else 2), name


def test_all_is_sorted_and_short():
    """``__all__`` lists each name once, in order, and no more than a page holds."""
    assert list(dgiqa_stream.__all__) == sorted(set(dgiqa_stream.__all__), key=in_order)
    assert len(dgiqa_stream.__all__) <= MOST_NAMES


def test_all_names_what_is_promised():
    """Every promised name, each error of the tree among them, is public."""
    assert set(dgiqa_stream.__all__) >= PROMISED


def test_nothing_leaks_in():
    """After every public name has been loaded, no other public name has appeared."""
    for name in dgiqa_stream.__all__:
        getattr(dgiqa_stream, name)
    submodules = {n for n, v in vars(dgiqa_stream).items() if isinstance(v, ModuleType)}
    here = {n for n in vars(dgiqa_stream) if not n.startswith("_")}
    assert here - submodules - {"annotations", "TYPE_CHECKING"} <= set(dgiqa_stream.__all__)


def test_dir_lists_the_public_names():
    """``dir()`` and so tab completion shows names that have not been loaded yet."""
    assert set(dgiqa_stream.__all__) <= set(dir(dgiqa_stream))


def test_type_checkers_see_every_name():
    """What ``__getattr__`` loads on demand is also imported by name for type checkers."""
    tree = ast.parse(Path(dgiqa_stream.__file__).read_text(encoding="utf-8"))
    imported = {
        alias.asname or alias.name
        for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }  # fmt: skip
    assert set(dgiqa_stream.__all__) <= imported


def test_unknown_name_is_an_attribute_error():
    """A misspelt name fails as on any module, naming module and attribute."""
    with pytest.raises(AttributeError, match=r"dgiqa_stream.*load_scorre"):
        _ = dgiqa_stream.load_scorre


def public_classes_and_functions() -> dict[str, object]:
    """The public names that can carry a docstring; tables are documented where they stand."""
    values = {name: getattr(dgiqa_stream, name) for name in dgiqa_stream.__all__}
    return {n: v for n, v in values.items() if inspect.isclass(v) or inspect.isroutine(v)}


def test_public_names_are_documented():
    """Each public class and function has a docstring of its own, not a generated signature."""
    docstrings = {n: v.__doc__ or "" for n, v in public_classes_and_functions().items()}
    assert len(docstrings) >= len(PROMISED) - 2
    bare = [n for n, doc in docstrings.items() if not doc.strip() or doc.startswith(f"{n}(")]
    assert bare == []


def test_public_methods_are_documented():
    """Each public method and property of a public class has a docstring."""
    bare = [
        f"{class_name}.{name}"
        for class_name, value in public_classes_and_functions().items() if inspect.isclass(value)
        for name, member in vars(value).items()
        if not name.startswith("_")
        and (inspect.isroutine(member) or isinstance(member, property | classmethod))
        and not inspect.getdoc(member)
    ]  # fmt: skip
    assert bare == []


def test_public_functions_are_annotated():
    """Each parameter and result of a public function has a type."""
    for name, value in public_classes_and_functions().items():
        if inspect.isclass(value):
            continue
        signature = inspect.signature(value)
        kinds = [p.annotation for p in signature.parameters.values()]
        assert inspect.Signature.empty not in [*kinds, signature.return_annotation], name
