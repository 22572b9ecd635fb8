"""tables: README says exactly what was measured, of the model that is shipped."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from dgiqa_stream.manifest import load_model

README = Path(__file__).parents[2] / "README.md"


@pytest.fixture
def tables(script):
    """The module."""
    return script("tables")


@pytest.fixture
def copied(checkout, tmp_path):
    """A folder with copies of all results, to be changed."""
    for folder in ("benchmarks/results", "distill/results"):
        shutil.copytree(checkout / folder, tmp_path / folder)
    return tmp_path


def change(path, **changes):
    """Rewrite a JSON file with some of its keys changed."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def evaluation(folder):
    """The file of the shipped model's evaluation."""
    return folder / f"distill/results/student-{load_model('student').manifest.version}.json"


def test_readme_says_what_was_measured(tables, checkout):
    """Every table of the README is, to the letter, what the committed results give."""
    page = README.read_text(encoding="utf-8")
    assert tables.with_tables(page, tables.Results(checkout)) == page


def test_readme_has_every_table(tables):
    """The README has a place for each table that can be made."""
    page = README.read_text(encoding="utf-8")
    assert all(f"<!-- figures of {name} -->" in page for name in tables.TABLES)


def test_another_result_is_another_page(tables, copied):
    """A changed SRCC and a changed number of frames a second stand in the page that is made."""
    found = json.loads(evaluation(copied).read_text())["biq2021_test"]
    found["student.onnx"]["srcc"] = 0.6543
    change(evaluation(copied), biq2021_test=found)
    speed = copied / "benchmarks/results/score_every_frame.json"
    change(speed, frames_per_second_decode=4321.0)
    page = tables.with_tables(README.read_text(encoding="utf-8"), tables.Results(copied))
    assert "| 0.654 (95 % interval" in page
    assert "| 4321 frames a second |" in page


def test_figures_of_another_file_are_refused(tables, copied):
    """An evaluation of other weights than those that ship is no figure of the shipped model."""
    change(evaluation(copied), models={"student.onnx": {"sha256": "0" * 64}})
    with pytest.raises(ValueError, match=r"is of 000000000000…, and \w{12}… is shipped"):
        tables.model_table(tables.Results(copied))


def test_a_version_without_evaluation_is_named(tables, copied):
    """Without an evaluation of the shipped version there is no table, and the message names it."""
    evaluation(copied).unlink()
    version = load_model("student").manifest.version
    with pytest.raises(ValueError, match=f"evaluate student {version} first"):
        tables.model_table(tables.Results(copied))


def test_speed_of_an_older_model_is_told(tables, copied):
    """Where a benchmark ran with another version than the shipped one, the table names it."""
    speed = copied / "benchmarks/results/score_every_frame.json"
    change(speed, model={"version": "0.0.9"})
    assert "`student` 0.0.9" in tables.cost_table(tables.Results(copied)).splitlines()[0]


@pytest.mark.parametrize(("load", "is_told"), [(0.4, False), (7.5, True)])
def test_a_busy_machine_is_told(tables, copied, load, is_told):
    """What ran while more was to be done than two cores can do says so in its row."""
    speed = copied / "benchmarks/results/score_every_frame.json"
    machine = json.loads(speed.read_text())["machine"] | {"load_average_at_start": load, "cores": 2}
    change(speed, machine=machine)
    rows = tables.cost_table(tables.Results(copied)).splitlines()
    (row,) = (row for row in rows if row.startswith("| every frame of a file of 2.5 Mbit/s, CPU"))
    assert ("(on a busy machine)" in row) == is_told


def test_what_was_not_measured_has_no_row(tables, copied, tmp_path_factory):
    """Without results there is no table, and without those of memory no row about it."""
    empty = tables.Results(tmp_path_factory.mktemp("empty"))
    assert tables.peers_table(empty) == tables.cost_table(empty) == ""
    (copied / "benchmarks/results/memory.json").unlink(missing_ok=True)
    assert "growth" not in tables.cost_table(tables.Results(copied))


def test_a_page_without_a_place_is_refused(tables, copied):
    """A page that has no mark is an error, not a page that silently stays as it is."""
    with pytest.raises(ValueError, match="figures of NAME"):
        tables.with_tables("# A page\n", tables.Results(copied))
