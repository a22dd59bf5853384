"""Recipes: read, typed and checked before anything is loaded."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lora_ggpo.recipe.recipe import Recipe, load_recipe

__all__ = ["Recipe", "load_recipe"]


def __getattr__(name: str) -> Any:
    """Load the recipe's model, and the libraries that it mirrors, when it is first asked for."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from lora_ggpo.recipe import recipe

    return getattr(recipe, name)
