"""Predictions under noise: of a run, the mean over draws of its weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from datasets import Dataset

from lora_ggpo.errors import UserError
from lora_ggpo.perturbation import GGPOConfig
from lora_ggpo.perturbation.predict import noisy_evaluation
from lora_ggpo.recipe.recipe import Recipe
from lora_ggpo.tasks import Task
from lora_ggpo.training.scorer import Scorer

LOWEST, HIGHEST, HALVINGS = 1e-3, 1.0, 12
"""Sigmas between which the tolerated one is looked for, and how often their ratio is halved, as a logarithm."""


@dataclass(frozen=True)
class Draws:
    """How to predict under noise.

    Attributes:
        count: Draws that are averaged.
        sigma: Size of the noise; None is that of the run's training.
        tolerance: Instead, the largest size at which the loss on the validation set rises by at most this share of it
            (training-free Bayesianisation, arXiv 2412.05723).
    """

    count: int
    sigma: float | None = None
    tolerance: float | None = None


@contextmanager
def predicting(
    draws: Draws, score: Scorer, model: Any, recipe: Recipe, task: Task, validation: Dataset
) -> Iterator[float]:
    """Have `score` average over draws; gives sigma.

    Args:
        validation: Rows that were not trained on, for a tolerance.

    Raises:
        UserError: the run has no noise of its own, no validation set, or a task of whose scores no mean can be taken.
    """
    if not task.averages:
        raise UserError(f"Predictions of task {recipe.task.kind} cannot be averaged; leave out --draws.")
    own = recipe.ggpo_config(recipe.seeds[0])
    sigma = draws.sigma or (own.sigma if own else 0.0)
    if draws.tolerance is not None and not len(validation):
        raise UserError(
            "A tolerated noise is found on the validation set, and the run has none; give --noise a number."
        )
    if draws.tolerance is None and not sigma:
        raise UserError("The run was trained without noise; give --noise a size, or --tolerate the rise of the loss.")
    config = GGPOConfig(sigma=1.0, noise=own.noise if own else "factored", seed=recipe.seeds[0])
    with ExitStack() as stack:
        try:
            draw = stack.enter_context(noisy_evaluation(model, config))
        except ValueError as error:
            raise UserError(f"No noise can be put on this run: {error}.") from error
        stack.callback(setattr, score, "draws", None)
        if draws.tolerance is not None:
            sigma = _tolerated(draws, score, draw, task.loss, score.encode(validation, "validation"))
        score.draws = [partial(draw, number, sigma) for number in range(draws.count)]
        yield sigma


def _tolerated(draws: Draws, score: Scorer, draw: Callable[[int, float], None], metric: str, rows: Dataset) -> float:
    def loss(sigma: float) -> float:
        score.draws = [partial(draw, number, sigma) for number in range(draws.count if sigma else 1)]
        return score.quick(rows)[metric]

    assert draws.tolerance is not None
    return largest_within(loss, loss(0.0) * (1 + draws.tolerance))


def largest_within(loss: Callable[[float], float], bound: float) -> float:
    """The largest sigma between `LOWEST` and `HIGHEST` whose loss is within a bound, by bisection.

    The draws are the same at every sigma, so the loss is smooth in it, and grows where noise does harm.

    Raises:
        UserError: even the smallest is not.
    """
    if loss(HIGHEST) <= bound:
        return HIGHEST
    low, high = math.log(LOWEST), math.log(HIGHEST)
    if loss(LOWEST) > bound:
        raise UserError(f"Noise of sigma {LOWEST:g} raises the validation loss by more already; tolerate more of it.")
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if loss(math.exp(middle)) <= bound else (low, middle)
    return math.exp(low)
