"""Every system keeps the common face and stands in the table of docs/systems.md."""

import importlib
import pathlib

import pytest

from sparse_attn.systems.__main__ import find_recipes, make_page

ROOT = pathlib.Path(__file__).parents[2]
RECIPES = find_recipes()


def test_the_table_in_the_docs_is_printed_from_the_code():
    page = (ROOT / "docs" / "systems.md").read_text(encoding="utf-8")
    assert page == make_page(), "run: python -m sparse_attn.systems > docs/systems.md"


@pytest.mark.parametrize("name", RECIPES)
def test_a_system_has_the_common_face(name):
    module = importlib.import_module(f"sparse_attn.systems.{name}")
    assert callable(module.select)
    assert callable(module.attention)
    assert RECIPES[name].paper in module.__doc__


def test_a_file_without_a_recipe_is_none_of_the_systems():
    files = {path.stem for path in (ROOT / "sparse_attn" / "systems").glob("*.py")}
    assert files - set(RECIPES) == {"__init__", "__main__", "recipe"}
