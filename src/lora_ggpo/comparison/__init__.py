"""Several methods on the same data, steps and evaluation, each with the same tuning budget."""
