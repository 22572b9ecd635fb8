"""What is installed: the version of this package, and what others bring for it.

``importlib.metadata`` is imported where it is needed: it takes 2 MB, which scoring can do without.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

_NAME = "dgiqa-stream"


@cache
def package_version() -> str:
    """The installed version; that of a checkout that is not installed ends in ``+checkout``."""
    from importlib import metadata

    try:
        return metadata.version(_NAME)
    except metadata.PackageNotFoundError:
        return _version_of_checkout(Path(__file__).parents[1])


def _version_of_checkout(folder: Path) -> str:
    """What its ``pyproject.toml`` says; ``unknown`` where that is absent or another project's."""
    import tomllib

    try:
        project = tomllib.loads((folder / "pyproject.toml").read_text("utf-8"))["project"]
    except (OSError, ValueError, KeyError):
        return "unknown"
    return f"{project['version']}+checkout" if project.get("name") == _NAME else "unknown"


def entry_points_for(group: str, name: str) -> list[EntryPoint]:
    """The entry points of that name which other packages have in a group."""
    from importlib import metadata

    return list(metadata.entry_points(group=group, name=name))
