"""Variables of the environment that are misspelt are named, and no other."""

from __future__ import annotations

import pytest

from dgiqa_stream.cli._app import app
from dgiqa_stream.cli._environment import SISTER_PREFIXES, warn_of_unknown_variables


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("DGIQA_MODLE", "DGIQA_MODEL"),
        ("DGIQA_SCORE_FSP", "DGIQA_SCORE_FPS"),
        ("DGIQA_FPS", "DGIQA_WATCH_FPS"),
        ("DGIQA_WATCH_LOGLEVEL", "DGIQA_WATCH_LOG_LEVEL"),
    ],
)
def test_a_misspelt_variable_is_named(capsys, name, meant):
    """One line names the variable and the one that was probably meant, here of ``watch``."""
    warn_of_unknown_variables(app, [name], command="watch")
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"warning: {name} is no setting and is ignored; did you mean {meant}?"


@pytest.mark.parametrize("name", ["DGIQA_FOO", "DGIQA_HOME", "DGIQA_SCORE_COLOUR"])
def test_no_meaning_is_made_up(capsys, name):
    """A variable that resembles none is pointed to the help, not to a setting of another word."""
    warn_of_unknown_variables(app, [name], command="watch")
    assert capsys.readouterr().err.endswith("; see `dgiqa-stream COMMAND --help`\n")


@pytest.mark.parametrize(
    "name",
    [
        *("DGIQA_MODEL", "DGIQA_SCORE_FPS", "DGIQA_WATCH_MODEL", "DGIQA_CONFIG", "PATH"),
        "DGIQA_ENGINE_CACHE",
        *(
            "DGIQA_DISTILL_TRAIN_PACKS",
            "DGIQA_QUANT_INT8_OUTPUT",
            "DGIQA_VERSION",
            "DGIQA_CHECKOUT",
        ),
        *("DGIQA_SERVICE_HOST", "DGIQA_STREAM_PORT_5556_TCP_ADDR", "DGIQA_STREAM_SERVICE_PORT"),
    ],
)
def test_a_variable_of_something_else_is_not(capsys, name):
    """Settings, sister commands, tests and what Kubernetes sets for a service pass in silence."""
    warn_of_unknown_variables(app, [name], command="score")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("module", ["distill.cli", "quant.cli"])
def test_the_sisters_prefixes_are_known(module, monkeypatch):
    """The options of ``dgiqa-distill`` and ``dgiqa-quant`` have the prefixes that are let alone."""
    sister, seen = pytest.importorskip(module), {}
    monkeypatch.setattr(sister, "run", lambda app, **given: seen.update(given))
    with pytest.raises(SystemExit):
        sister.main()
    assert seen["prefix"] in SISTER_PREFIXES


def test_it_is_said_before_the_command_runs(run_cli):
    """The warning goes to standard error and changes neither output nor exit code."""
    done = run_cli("config", environment={"DGIQA_SCORE_FSP": "2"})
    assert done.code == 0
    assert done.err.startswith("warning: DGIQA_SCORE_FSP ")
    assert done.out == run_cli("config").out


@pytest.mark.parametrize(
    ("command", "variable", "value", "said"),
    [
        ("score", "DGIQA_SCORE_FPS", "-1", "error: DGIQA_SCORE_FPS -1 is refused: "),
        ("watch", "DGIQA_WATCH_PUBLISH", "bad", "error: DGIQA_WATCH_PUBLISH 'bad' is not "),
    ],
)
def test_a_refused_variable_is_named(run_cli, media, command, variable, value, said):
    """An error of a value names the variable that gave it, and not an option nobody wrote."""
    done = run_cli(command, media["plain"], environment={variable: value})
    assert done.code == 2
    assert done.err.startswith(said)
    assert "--fps" not in done.err
    assert "--publish" not in done.err


@pytest.mark.parametrize(
    "variable", ["DGIQA_THREADS", "DGIQA_SCORE_THREADS", "DGIQA_SCORE_FPS", "DGIQA_MAX_GPU_MB"]
)
def test_a_variable_that_is_no_number_is_named(run_cli, media, variable):
    """Also where an option has two variables: the one that was set is said, and not the other."""
    done = run_cli("score", media["plain"], environment={variable: "abc"})
    assert done.code == 2
    assert f" (from {variable}); see `" in done.err


def test_an_option_comes_before_its_variable(run_cli, media):
    """Where both are given the option counts, and an error names the option."""
    environment = {"DGIQA_SCORE_FPS": "2"}
    done = run_cli("score", media["plain"], "--fps", "-3", environment=environment)
    assert done.err.startswith("error: --fps -3 is refused: ")
