"""A finished run of a tiny Llama, made once, and copies of it for those who change it."""

import shutil

import pytest

from tests.recipes import GUIDED, recipe_text, write_pairs
from tests.training.runs import trained, unfinish


@pytest.fixture(scope="session")
def whole(tiny_llama, tmp_path_factory):
    """(recipe file, folder) of a finished run of 4 steps, with every source of chance in use."""
    folder = tmp_path_factory.mktemp("whole")
    data = write_pairs(folder / "data.jsonl")
    text = recipe_text(
        tiny_llama, data, folder / "runs", adapter={"lora_dropout": 0.1}, ggpo=GUIDED, training={"save_steps": 1}
    )
    (folder / "recipe.yaml").write_text(text)
    return folder / "recipe.yaml", trained(folder / "recipe.yaml")


@pytest.fixture
def copy(whole, tmp_path):
    """A copy of that run."""
    return shutil.copytree(whole[1], tmp_path / "runs" / "seed-0")


@pytest.fixture
def unfinished(copy):
    """A copy of that run as if it had been killed behind its last checkpoint."""
    unfinish(copy)
    return copy
