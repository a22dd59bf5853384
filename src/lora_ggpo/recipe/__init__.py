"""Recipes: read, typed and checked before anything is loaded."""
