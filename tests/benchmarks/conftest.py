"""The benchmarks are scripts beside the packages: they are imported from the checkout."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path

import pytest

CHECKOUT = Path(os.environ.get("DGIQA_CHECKOUT", Path(__file__).parents[2]))


@pytest.fixture
def checkout():
    """The folder that holds ``benchmarks`` and ``distill/results``."""
    return CHECKOUT


@pytest.fixture
def script(monkeypatch):
    """Imports a benchmark by its name; its neighbours are forgotten afterwards."""
    folder = CHECKOUT / "benchmarks"
    monkeypatch.syspath_prepend(str(folder))
    yield importlib.import_module
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", None) or "").startswith(str(folder)):
            del sys.modules[name]
