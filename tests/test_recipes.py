from pathlib import Path

import pytest

from lora_ggpo.recipe.recipe import load_recipe
from lora_ggpo.training.build import training_arguments

RECIPES = sorted((Path(__file__).parent.parent / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_recipes_in_the_repository_are_valid(path, tmp_path):
    recipe = load_recipe(path)
    assert recipe.resolved(0)["seeds"] == [0]
    training_arguments(recipe, tmp_path, 0)


def test_the_two_movie_review_recipes_differ_by_the_method_alone():
    names = ("movie-reviews-lora.yaml", "movie-reviews-ggpo.yaml")
    lora, ggpo = (load_recipe(RECIPES[0].parent / name).resolved(0) for name in names)
    assert {key for key in lora if lora[key] != ggpo[key]} == {"ggpo", "output"}
