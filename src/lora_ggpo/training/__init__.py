"""From a recipe to a run folder, and back to a model."""
