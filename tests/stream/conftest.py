"""Shared by the tests of the runtime."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="session")
def peers() -> ModuleType:
    """``wire_peers.py``: values for messages, and the other end of a socket as a process."""
    path = Path(__file__).with_name("wire_peers.py")
    spec = importlib.util.spec_from_file_location("wire_peers", path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules.setdefault(spec.name, importlib.util.module_from_spec(spec))
    spec.loader.exec_module(module)
    return module
