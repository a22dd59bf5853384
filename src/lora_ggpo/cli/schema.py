"""`lora-ggpo schema`."""

from __future__ import annotations


def command() -> None:
    """Print the JSON schema of recipes."""
    from lora_ggpo.recipe.recipe import json_schema

    print(json_schema())
