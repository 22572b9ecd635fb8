"""Any of the command lines: what an exception, a wrong word and Ctrl-C come to."""

from __future__ import annotations

import os
import re
import sys
import tomllib
from pathlib import Path

import pytest
import typer

from dgiqa_stream.cli.running import EXTRAS_WITH, run
from dgiqa_stream.errors import ConfigError

PROGRAM = "dgiqa-example"


@pytest.fixture
def call(monkeypatch, capsys):
    """``call(*words, fault=...)``: exit code and error lines of a program of two commands."""

    def call(*words, fault=None, judge=lambda exc: None, extra=""):
        app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode=None)

        @app.command()
        def work(crop: tuple[int, int] = (0, 0), code: int = 0):
            if fault is not None:
                raise fault
            raise typer.Exit(code)

        @app.command()
        def rest():
            """Nothing to do."""

        monkeypatch.setattr(sys, "argv", [PROGRAM, *words])
        code = run(
            app,
            program=PROGRAM,
            prefix="EXAMPLE",
            judge=judge,
            interrupted="come again",
            extra=extra,
        )
        return code, capsys.readouterr().err.splitlines()

    return call


def test_an_exit_code_is_handed_on(call, monkeypatch):
    """A command's own code is the program's, also where a variable of the prefix gave it."""
    assert call("work", "--code", "7") == (7, [])
    assert call("rest") == (0, [])
    monkeypatch.setenv("EXAMPLE_WORK_CODE", "9")
    assert call("work") == (9, [])


def test_an_exception_is_what_it_is_judged_to_be(call):
    """One that is judged is a line with that code, secrets aside; another is raised on."""
    assert call("work", fault=ConfigError("no\nsuch"), judge=lambda exc: (2, f"{exc}!")) == (
        2,
        ["error: no such!"],
    )
    with pytest.raises(ZeroDivisionError):
        call("work", fault=ZeroDivisionError())


@pytest.mark.parametrize(
    ("module", "extra", "told"),
    [
        ("torch", "quant", "'dgiqa-stream[quant]'"),
        ("torch", "report", "'dgiqa-stream[train]'"),
        ("timm.models", "train", "'dgiqa-stream[teacher]'"),
        ("openpyxl", "", "'dgiqa-stream[shards]'"),
        ("somebody_elses", "train", "somebody_elses"),
    ],
)
def test_a_missing_package_is_the_command_that_installs_it(call, module, extra, told):
    """By the extra that the program asks for where it has the package, else one that does; 5."""
    fault = ModuleNotFoundError(f"No module named {module!r}", name=module)
    name = module.partition(".")[0]
    assert call("work", fault=fault, extra=extra) == (
        5,
        [f"error: this needs {name}, which is not installed: pip install {told}"],
    )


def test_the_extras_are_those_of_the_project():
    """Every optional package is known with the extras that pyproject.toml lists it in."""
    pyproject = Path(os.environ.get("DGIQA_CHECKOUT", Path(__file__).parents[2])) / "pyproject.toml"
    project = tomllib.loads(pyproject.read_text())["project"]

    def module_of(line):
        return re.split(r"[^\w-]", line)[0].replace("-", "_")

    always = {"dgiqa_stream"} | {module_of(line) for line in project["dependencies"]}
    found = {}
    for extra, lines in project["optional-dependencies"].items():
        for package in {module_of(line) for line in lines} - always:
            if extra != "dev":
                found.setdefault(package, []).append(extra)
    assert found == {package: list(extras) for package, extras in EXTRAS_WITH.items()}


def test_a_module_of_ours_that_is_missing_is_a_fault(call):
    """No install mends that: it is raised on."""
    with pytest.raises(ModuleNotFoundError):
        call("work", fault=ModuleNotFoundError("none", name="dgiqa_stream.absent"))


@pytest.mark.parametrize(
    ("program", "words"),
    [
        ("distill", ("score", "x.png", "--teacher", "absent.pt", "--depth", "classical")),
        ("quant", ("export", "a.pt", "--recipe", "x.toml", "-o", "o.onnx", "--version", "1")),
    ],
)
def test_training_programs_without_torch_say_what_to_install(run_cli, program, words):
    """Where torch cannot be imported, a command that needs it is one line and 5."""
    without = "import sys; sys.modules['torch'] = None; sys.argv[0] = 'dgiqa'\n"
    start = f"{without}from {program}.cli import main\nmain()"
    done = run_cli(*words, command=(sys.executable, "-c", start))
    assert (done.code, done.out) == (5, "")
    (line,) = done.err.splitlines()
    assert "this needs torch, which is not installed: pip install " in line


def test_ctrl_c_is_told_once_with_130(call):
    """An interrupt has the program's word and 130; a command that told it itself is left alone."""
    assert call("work", fault=KeyboardInterrupt()) == (130, ["error: come again"])
    assert call("work", "--code", "130") == (130, [])


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        (("work", "--crop", "1"), f"{PROGRAM} work"),
        (("work", "--none"), " work"),
        (("none",), ""),
    ],
    ids=" ".join,
)
def test_a_wrong_word_leads_to_the_help_of_its_command(call, words, shown):
    """It is 2 and one line that ends in the command whose help lists the right ones."""
    code, lines = call(*words)
    assert code == 2
    assert len(lines) == 1
    assert lines[0].endswith(f"{shown} --help`")


def test_a_wrong_value_of_a_variable_names_the_variable(call, monkeypatch):
    """Nobody finds it by the option's name alone; where the option itself was given, it is not
    blamed.
    """
    monkeypatch.setenv("EXAMPLE_WORK_CODE", "abc")
    code, (line,) = call("work")
    assert code == 2
    assert "'--code'" in line
    assert "(from EXAMPLE_WORK_CODE); see " in line
    _, (line,) = call("work", "--code", "xyz")
    assert "EXAMPLE" not in line


def test_no_word_shows_the_help(call):
    """Alone, the program lists its commands, with 2."""
    code, lines = call()
    assert code == 2
    assert any("work" in line for line in lines)
