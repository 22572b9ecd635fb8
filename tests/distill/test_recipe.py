"""Recipes: strict, and the published one loads."""

from __future__ import annotations

from pathlib import Path

import pytest

from dgiqa_stream.errors import ConfigError
from distill.recipe import load_recipe

STUDENT = Path(__file__).parents[2] / "configs" / "distill" / "student.toml"


def changed(text, old, new):
    """The text with one change that must take effect."""
    assert old in text
    return text.replace(old, new, 1)


def test_the_published_recipe_loads():
    """configs/distill/student.toml is a whole recipe of two views of 208 pixels."""
    recipe = load_recipe(STUDENT)
    assert [(v.name, v.shape) for v in recipe.views] == [
        ("whole", (208, 208, 3)),
        ("fragments", (208, 208, 3)),
    ]
    assert recipe.data.num_validation == 1000


def test_a_written_recipe_is_the_one_read(recipe, recipe_file):
    """Every value of a recipe survives its TOML file."""
    assert load_recipe(recipe_file) == recipe


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ("plcc_weight", "plcc_wieght", "plcc_wieght"),
        ("dropout = 0.3\n", "", "dropout"),
        ("rated_batch = 4", "rated_batch = 0", "rated_batch"),
        ("smallest_crop = 0.85", "smallest_crop = 1.85", "smallest_crop"),
        ("head_rate = 0.001", "head_rate = 1e38", "<= 1.0 .*head_rate"),
        ("trunk_rate = 0.001", "trunk_rate = 1.5", "<= 1.0 .*trunk_rate"),
        ("name = 'fragments'", "name = 'pieces'", "pieces"),
        ("[train]", "[training]", "training"),
        ("[data]", "[data", "line"),
    ],
)
def test_a_wrong_recipe_names_file_and_reason(recipe_file, tmp_path, old, new, named):
    """An unknown, missing or impossible value is one line with the file and the value's name."""
    path = tmp_path / "wrong.toml"
    path.write_text(changed(recipe_file.read_text(), old, new))
    with pytest.raises(ConfigError, match=named) as caught:
        load_recipe(path)
    assert "wrong.toml" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_views_in_the_wrong_order_are_refused(recipe_file, tmp_path):
    """Exchanged views would be fed to the student the wrong way round: they are an error."""
    before, whole, rest = recipe_file.read_text().split("[[views]]")
    fragments, table, after = rest.partition("[data]")
    path = tmp_path / "exchanged.toml"
    path.write_text("[[views]]".join([before, fragments, whole]) + table + after)
    with pytest.raises(ConfigError, match="'fragments', 'whole'"):
        load_recipe(path)


def test_an_absent_recipe_says_where_recipes_are(tmp_path):
    """A path without a file is answered with the folder of the published recipes."""
    with pytest.raises(ConfigError, match="configs/distill"):
        load_recipe(tmp_path / "absent.toml")
