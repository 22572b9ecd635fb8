"""Which version of this package runs."""

from __future__ import annotations

from functools import cache
from importlib import metadata


@cache
def package_version() -> str:
    """The installed version; ``unknown`` in a checkout that is not installed."""
    try:
        return metadata.version("dgiqa-stream")
    except metadata.PackageNotFoundError:
        return "unknown"
