"""`lora-ggpo schema`."""

from __future__ import annotations


def command() -> None:
    """Print the JSON schema of recipes."""
    from lora_ggpo.workspace.cache import cached

    print(cached("schema.json", _make))


def _make() -> str:
    from lora_ggpo.recipe.recipe import json_schema

    return json_schema()
