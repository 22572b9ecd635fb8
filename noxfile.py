"""Sessions for contributors; ``nox -l`` lists them. ``make test`` needs only Python and make."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import nox

nox.needs_version = ">=2024.10.9"
nox.options.sessions = ["bare"]
nox.options.reuse_existing_virtualenvs = True

ROOT = Path(__file__).parent
PROJECT = nox.project.load_toml("pyproject.toml")
CONSTRAINTS = "--constraint=.ci/constraints.txt"
PYTHONS = ["3.11", "3.12", "3.13"]
READ_BY_TESTS = [
    "tests", "configs", "docs", "README.md", "CHANGELOG.md", "CONTRIBUTING.md", "pyproject.toml"
]  # fmt: skip
WITH_TORCH = "[report,prometheus,train,quant,teacher,shards]"
NEED_TORCH = ["--ignore=tests/distill", "--ignore=tests/quant"]


def group(name: str) -> list[str]:
    """The requirements of a dependency group in pyproject.toml."""
    return list(nox.project.dependency_groups(PROJECT, name))


def build_wheel(session: nox.Session) -> Path:
    """Build the wheel into the session's own folder and return its path."""
    session.install(*group("build"))
    folder = Path(session.create_tmp())
    for old in folder.glob("*.whl"):
        old.unlink()
    session.run("python", "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder), silent=True)
    (wheel,) = folder.glob("*.whl")
    return wheel


def run_suite(session: nox.Session, *arguments: str) -> None:
    """Run pytest where only tests, and what they read, can be seen beside the installed wheel."""
    with tempfile.TemporaryDirectory() as stage:
        for name in READ_BY_TESTS:
            source, target = ROOT / name, Path(stage) / name
            if source.is_dir():
                shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(source, target)
        env: dict[str, str | None] = {"DGIQA_CHECKOUT": str(ROOT), "PYTHONPATH": None}
        if session.name.startswith("tests"):
            env["FAIL_WITHOUT_PACKAGES"] = "1"
        if odd_media := os.environ.get("DGIQA_ODD_MEDIA"):
            env["DGIQA_ODD_MEDIA"] = str(Path(odd_media).resolve())
        session.chdir(stage)
        session.run("python", "-m", "pytest", *arguments, *session.posargs, env=env)
        session.chdir(ROOT)


@nox.session(python=PYTHONS)
def tests(session: nox.Session) -> None:
    """The whole suite, with torch and what teachers and shards need, against the wheel."""
    wheel = build_wheel(session)
    session.install(CONSTRAINTS, f"{wheel}{WITH_TORCH}", *group("test"), *group("test-torch"))
    session.install("--force-reinstall", "--no-deps", str(wheel))
    run_suite(session)


@nox.session
def bare(session: nox.Session) -> None:
    """The suite with no extra installed: what a user of the plain package has."""
    wheel = build_wheel(session)
    session.install(str(wheel), *group("test"))
    session.install("--force-reinstall", "--no-deps", str(wheel))
    run_suite(session, *NEED_TORCH)


@nox.session(python="3.11", venv_backend="uv")
def oldest(session: nox.Session) -> None:
    """The suite with the oldest dependencies that pyproject.toml allows."""
    wheel = build_wheel(session)
    session.install(
        "--resolution=lowest-direct", *PROJECT["project"]["dependencies"], *group("test")
    )
    session.install("--reinstall", "--no-deps", str(wheel))
    run_suite(session, *NEED_TORCH)


@nox.session
def lint(session: nox.Session) -> None:
    """Style, import contracts, spelling and the docstrings of tests."""
    session.install(*group("lint"))
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("lint-imports")
    session.run("codespell")
    session.run("interrogate", "--quiet", "tests")


@nox.session
def types(session: nox.Session) -> None:
    """Run mypy, strict on dgiqa_stream and plugins."""
    session.install(CONSTRAINTS, f".{WITH_TORCH}", *group("lint"))
    session.run("mypy")


@nox.session
def wheel(session: nox.Session) -> None:
    """Build wheel and sdist into dist/, install the wheel alone and ask it for its version."""
    session.install(*group("build"))
    shutil.rmtree(ROOT / "dist", ignore_errors=True)
    session.run("python", "-m", "hatchling", "build")
    (built,) = (ROOT / "dist").glob("*.whl")
    session.install("--force-reinstall", str(built))
    session.chdir(session.create_tmp())
    session.run("dgiqa-stream", "--version")
    session.chdir(ROOT)


@nox.session
def bench(session: nox.Session) -> None:
    """Measure what a user's machine can measure by itself; each script writes JSON."""
    session.install(CONSTRAINTS, f".{WITH_TORCH}", *group("test"))
    for name in ("score_every_frame", "start", "streams", "peers", "pooling"):
        session.run("python", str(ROOT / "benchmarks" / f"{name}.py"))
