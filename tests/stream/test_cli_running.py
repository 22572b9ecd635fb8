"""Any of the command lines: what an exception, a wrong word and Ctrl-C come to."""

from __future__ import annotations

import sys

import pytest
import typer

from dgiqa_stream.cli.running import run
from dgiqa_stream.errors import ConfigError

PROGRAM = "dgiqa-example"


@pytest.fixture
def call(monkeypatch, capsys):
    """``call(*words, fault=...)``: exit code and error lines of a program of two commands."""

    def call(*words, fault=None, judge=lambda exc: None):
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
        code = run(app, program=PROGRAM, prefix="EXAMPLE", judge=judge, interrupted="come again")
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


def test_no_word_shows_the_help(call):
    """Alone, the program lists its commands, with 2."""
    code, lines = call()
    assert code == 2
    assert any("work" in line for line in lines)
