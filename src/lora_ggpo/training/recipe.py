"""Kept for scripts written for 0.1.0, which import from here; `lora_ggpo.recipe` is where it lives."""

from lora_ggpo.recipe.recipe import Recipe, load_recipe

__all__ = ["Recipe", "load_recipe"]
