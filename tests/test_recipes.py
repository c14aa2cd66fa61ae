"""The generated recipes are what their script writes, and name files that exist."""

import importlib.util

import pytest
from conftest import ROOT

from mgd.recipe import load


def _generator():
    spec = importlib.util.spec_from_file_location("generate", ROOT / "recipes" / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_generated_recipes_are_up_to_date():
    for name, text in _generator().camvid().items():
        assert (ROOT / "recipes" / name).read_text() == text, f"{name}: run python recipes/generate.py"


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.toml")), ids=lambda path: path.name)
def test_named_recipes_exist_and_see_the_same_labels(path):
    recipe = load(path)
    for other in [*(t.recipe for t in recipe.teachers.values() if t.recipe), *recipe.eval.baselines]:
        named = load(ROOT / other)
        assert (named.partition.labeled, named.data) == (recipe.partition.labeled, recipe.data)
