"""The table of floors: what it says of known results, and that pages say what the results say."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from typer.testing import CliRunner

pytest.importorskip("torch")

import distill
from dgiqa_stream.errors import ConfigError
from distill.evaluation import commands
from distill.evaluation.floors import (
    FLOORS,
    Floor,
    figure,
    floors_table,
    with_left_out,
    with_tables,
)
from distill.evaluation.tables import markdown, read_result

HERE = Path(__file__).parents[2]
CHECKOUT = Path(os.environ.get("DGIQA_CHECKOUT", HERE))
RESULTS = Path(distill.__file__).parent / "results"
PAGES = [CHECKOUT / "README.md", *sorted((CHECKOUT / "docs").glob("*.md"))]


def share(value):
    """As JSON has it."""
    return {"num_true": 1, "num": 2, "value": value, "low": value - 0.01, "high": value + 0.01}


def result_of(version="1.2.3", **sections):
    """A result of few sections."""
    model = {"id": "tiny", "version": version, "precision": "fp32", "sha256": "0" * 64}
    return {
        "kind": "robustness", "model": model, "sections": sections, "command": "judge it",
        "left_out": {"rated": "no --biq2021"},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("floor", "met", "not_met", "bounds"),
    [
        (Floor("a", "x", "share", 0.97), 0.97, 0.9699, "≥ 97 %"),
        (Floor("a", "x", "points", at_most=2.0), 2.0, 2.001, "≤ 2 points"),
        (Floor("a", "x", "share", 0.87, 0.93), 0.93, 0.931, "87 to 93 %"),
        (Floor("a", "x", "share", 0.87, 0.93), 0.87, 0.869, "87 to 93 %"),
    ],
)
def test_bounds_include_their_ends(floor, met, not_met, bounds):
    """A figure on the bound keeps it, one just beyond does not."""
    assert floor.is_met(met)
    assert not floor.is_met(not_met)
    assert floor.bounds() == bounds


def test_the_table_says_what_is_met():
    """A share above its floor is met, below it bold and not; a figure without an interval has none;
    what only the other result measured is so called, and what neither measured has no row.
    """
    one = result_of(
        codecs={"all": {"share_falling": share(0.98)}}, static={"largest_stdev_points": 2.5}
    )
    two = result_of("2.0.0", codecs={"all": {"share_falling": share(0.9)}})
    lines = floors_table([one, two]).splitlines()
    assert lines[0] == "|  | floor | `tiny` 1.2.3 | `tiny` 2.0.0 |"
    assert lines[2:] == [
        "| all four codecs, steps falling | ≥ 97 % | 98.0 % (97.0 to 99.0), met "
        "| **90.0 % (89.0 to 91.0), not met** |",
        "| static scenes, largest standard deviation over frames | ≤ 2 points "
        "| **2.5, not met** | not measured |",
    ]


def test_a_flag_that_a_model_lacks_is_not_measured():
    """A model without a flag has None there, which is no figure."""
    found = result_of(
        familiarity={"groups": {"black": {"flagged": None}}}, rated={"intervals": None}
    )
    assert figure(found, "familiarity.groups.black.flagged") is None
    assert figure(found, "rated.intervals.all.share_inside") is None


def test_floors_are_of_figures_that_there_are():
    """Every floor's path leads to a figure of the released result, which leaves no section out. Its
    head was taught all damage, so the unseen kinds are those of a head before.
    """
    result, former = (read_result(RESULTS / f"robustness-0.{n}.0.json") for n in (6, 5))
    [whole] = with_left_out([result, read_result(RESULTS / "leave-out-0.6.0.json")])
    lacking = [floor.path for floor in FLOORS if figure(whole, floor.path) is None]
    assert lacking == ["degradations.unseen.share_falling"]
    assert figure(former, lacking[0]) is not None
    assert whole["left_out"] == {}


def test_the_printed_result_has_ladders_and_gaps(tmp_path):
    """A result in markdown has a row for each ladder and says what was not measured, and why."""
    row = {
        "in_training": False, "num_contents": 7, "share_falling": share(0.5),
        "drop_points": {"value": 12.34, "low": 10.0, "high": 14.0},
    }  # fmt: skip
    path = tmp_path / "r.json"
    path.write_text(json.dumps(result_of(degradations={"by_kind": {"haze": row}})))
    text = markdown(read_result(path))
    assert "| haze | no | 7 | 50.0 % [49.0, 51.0] | 12.3 |" in text
    assert "Not measured: rated: no --biq2021." in text


def test_a_page_is_made_anew_between_its_marks():
    """What stands between the marks is replaced by the table, the rest stays, and a second time
    nothing changes; a page without marks is refused.
    """
    result = result_of(codecs={"all": {"share_falling": share(0.98)}})
    page = "# A\n\n<!-- floors of r.json -->\nold\n<!-- end -->\n\nB\n"
    made = with_tables(page, {"r.json": result}.__getitem__)
    assert made.startswith("# A\n\n<!-- floors of r.json -->\n\n|  | floor | `tiny` 1.2.3 |\n")
    assert made.endswith(", met |\n\n<!-- end -->\n\nB\n")
    assert "old" not in made
    assert with_tables(made, {"r.json": result}.__getitem__) == made
    with pytest.raises(Exception, match="floors of"):
        with_tables("# A\n", {}.__getitem__)


def test_what_a_head_was_not_taught_stands_beside_what_it_was():
    """A result of leave-out goes into the column of the model it is of; one of another model, or
    a result that has no floors, is refused.
    """
    robust = result_of(codecs={"all": {"share_falling": share(0.98)}})
    robust["model"]["sha256"] = "ab" * 32
    left_out = {
        "kind": "leave_out",
        "model": {"id": "tiny", "sha256": "ab" * 32},
        "unseen": {"share_falling": share(0.8)},
    }
    table = floors_table(with_left_out([robust, left_out]))
    assert "≥ 85 % | **80.0 % (79.0 to 81.0), not met** |" in table
    assert table.count("| floor |") == 1
    with pytest.raises(ConfigError, match="of tiny cdcdcdcdcdcd, of which no"):
        with_left_out([robust, {**left_out, "model": {"id": "tiny", "sha256": "cd" * 32}}])
    with pytest.raises(ConfigError, match="judge pictures"):
        with_left_out([robust, {"kind": "pictures"}])


def test_the_command_writes_a_page(tmp_path):
    """``table --into`` fills a page from the files it is given; a result that the page names and
    that is not given is an error that names it, and the page stays.
    """
    result, page = tmp_path / "r.json", tmp_path / "page.md"
    result.write_text(json.dumps(result_of(codecs={"all": {"share_falling": share(0.98)}})))
    page.write_text("<!-- floors of r.json -->\n<!-- end -->\n")
    done = CliRunner().invoke(commands.app, ["table", str(result), "--into", str(page)])
    assert done.exit_code == 0, done.output
    assert "98.0 % (97.0 to 99.0), met" in page.read_text()
    page.write_text("<!-- floors of other.json -->\n<!-- end -->\n")
    before = page.read_text()
    done = CliRunner().invoke(commands.app, ["table", str(result), "--into", str(page)])
    assert "other.json" in str(done.exception)
    assert page.read_text() == before


def test_pages_say_what_the_results_say():
    """Every table of floors in README and docs is the one that its JSON gives; the model card has
    one.
    """
    marked = [page for page in PAGES if "<!-- floors of " in page.read_text(encoding="utf-8")]
    assert "model-card-student.md" in {page.name for page in marked}
    for page in marked:
        text = page.read_text(encoding="utf-8")
        made = with_tables(text, lambda name: read_result(RESULTS / name))
        assert made == text, f"make {page.name} anew with `dgiqa-distill judge table --into`"
