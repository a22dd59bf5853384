"""What the documents tell people to type does not make the library warn."""

import re
from pathlib import Path

import pytest

from lora_ggpo.perturbation import GGPOConfig
from lora_ggpo.recipe.recipe import parse_recipe

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def ggpo_settings(text):
    """The settings of GGPO in Python and YAML snippets."""
    for arguments in re.findall(r"GGPOConfig\(([^()]+)\)", text):
        yield eval(f"GGPOConfig({arguments})", {"GGPOConfig": GGPOConfig})
    for block in re.findall(r"^```yaml\n(model:.*?)^```", text, re.MULTILINE | re.DOTALL):
        yield parse_recipe(block, "docs").ggpo_config(0)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_snippets_choose_a_rule_whose_guidance_counts(page):
    """With the paper's rule and beta the gradient term is negligible, and the library says so after 20 steps."""
    for config in ggpo_settings(page.read_text(encoding="utf-8")):
        assert config.rule != "paper" or config.beta == 0, config


def test_snippets_are_found():
    found = {page.stem: len(list(ggpo_settings(page.read_text(encoding="utf-8")))) for page in PAGES}
    assert found["recipes"] == 2
    assert found["integration"] >= 4
