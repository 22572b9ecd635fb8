"""versions: what is said of a package that is not installed."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from dgiqa_stream.versions import _version_of_checkout

ROOT = Path(__file__).parents[2]


def test_a_checkout_tells_its_version():
    """A checkout that is not installed has the version of its project file, and says what it is."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert _version_of_checkout(ROOT) == f"{project['version']}+checkout"


@pytest.mark.parametrize(
    "content", [None, "", "not = [toml", '[project]\nname = "another"\nversion = "7"\n']
)
def test_no_other_project_gives_its_version(tmp_path, content):
    """A folder without a project file, or with one that cannot be ours, gives no version."""
    if content is not None:
        (tmp_path / "pyproject.toml").write_text(content)
    assert _version_of_checkout(tmp_path) == "unknown"
