"""Fixtures that several test folders share."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--update-golden`` writes the expected files anew, to be read before they are committed."""
    parser.addoption(
        "--update-golden", action="store_true", help="write golden files from what is now made"
    )


@pytest.fixture(scope="session")
def update_golden(request: pytest.FixtureRequest) -> bool:
    """Whether golden files are to be written rather than compared."""
    return bool(request.config.getoption("--update-golden"))


@pytest.fixture(scope="session")
def media(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny clips and pictures by name; see ``tests/media/make_media.py``."""
    script = Path(__file__).parent / "media" / "make_media.py"
    spec = importlib.util.spec_from_file_location("make_media", script)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    made: dict[str, Path] = module.make_media(tmp_path_factory.mktemp("media"))
    return made


@pytest.fixture
def missing_server() -> Callable[[str, str], None]:
    """Skips with the install command, or fails where ``FAIL_WITHOUT_SERVERS=1`` promises them."""

    def missing(program: str, package: str) -> None:
        reason = f"{program} is not installed: apt-get install {package}"
        if os.environ.get("FAIL_WITHOUT_SERVERS") == "1":
            pytest.fail(reason)
        pytest.skip(reason)

    return missing
