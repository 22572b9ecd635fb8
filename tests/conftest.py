"""Fixtures that several test folders share."""

from __future__ import annotations

import importlib.util
import os
import signal
from collections.abc import Callable, Generator
from pathlib import Path
from typing import TypeVar

import pytest
from hypothesis import HealthCheck, settings

_Report = TypeVar("_Report", pytest.CollectReport, pytest.TestReport)


# No clock decides whether a test passes. Where CI is set, examples are the same in every run: a
# find of chance belongs to whoever looks for one, not to a change that has nothing to do with it.
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("repeatable", settings.get_profile("patient"), derandomize=True)
settings.load_profile("repeatable" if os.environ.get("CI") else "patient")


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--update-golden`` writes the expected files anew, to be read before they are committed."""
    parser.addoption(
        "--update-golden", action="store_true", help="write golden files from what is now made"
    )


def pytest_configure() -> None:
    """Where a script runs the suite in the background, Ctrl-C is ignored; what the tests start
    would inherit that.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With ``--dist loadgroup`` each file stays in one process, and so does each folder whose
    files share models that take long to make.
    """
    if not config.pluginmanager.hasplugin("xdist"):
        return
    here = Path(__file__).parent
    for item in items:
        folder, *rest = item.path.relative_to(here).parts
        group = folder if folder in ("distill", "quant") else "/".join((folder, *rest))
        item.add_marker(pytest.mark.xdist_group(group))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """A test file that skips for want of a package; see :func:`_promised`."""
    return _promised((yield))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A test that skips for want of a package; see :func:`_promised`."""
    return _promised((yield))


def _promised(report: _Report) -> _Report:
    """Skips for a missing package fail where ``FAIL_WITHOUT_PACKAGES=1`` promises all of them."""
    if os.environ.get("FAIL_WITHOUT_PACKAGES") == "1" and report.skipped:
        *where, reason = report.longrepr if isinstance(report.longrepr, tuple) else ("",)
        if "could not import" in reason:
            report.outcome = "failed"
            place = ":".join(map(str, where))
            report.longrepr = f"{place}: {reason}; FAIL_WITHOUT_PACKAGES=1 promises all packages"
    return report


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
