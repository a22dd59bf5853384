"""Predictions under noise: of a run, the mean over draws of its weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from datasets import Dataset

from lora_ggpo.errors import UserError
from lora_ggpo.perturbation import GGPOConfig
from lora_ggpo.perturbation.predict import noisy_evaluation
from lora_ggpo.recipe.recipe import Recipe
from lora_ggpo.statistics.metrics import METRICS
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
        tolerance: Instead, the largest size at which neither the loss nor the first metric of the validation set is
            worse by more than this share of it (training-free Bayesianisation, arXiv 2412.05723). The loss alone would
            not do: where a run over-fits, noise that leaves nothing of the model lowers it.
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
        raise UserError("The run was trained without noise; give --noise a size, or --tolerate a share.")
    config = GGPOConfig(sigma=1.0, noise=own.noise if own else "factored", seed=recipe.seeds[0])
    with ExitStack() as stack:
        try:
            draw = stack.enter_context(noisy_evaluation(model, config))
        except ValueError as error:
            raise UserError(f"No noise can be put on this run: {error}.") from error
        stack.callback(setattr, score, "draws", None)
        if draws.tolerance is not None:
            sigma = _tolerated(draws, score, draw, task, score.encode(validation, "validation"))
        score.draws = [partial(draw, number, sigma) for number in range(draws.count)]
        yield sigma


def _tolerated(draws: Draws, score: Scorer, draw: Callable[[int, float], None], task: Task, rows: Dataset) -> float:
    def scores(sigma: float) -> dict[str, float]:
        score.draws = [partial(draw, number, sigma) for number in range(draws.count if sigma else 1)]
        return score.quick(rows)

    assert draws.tolerance is not None
    plain = scores(0.0)
    return largest_within(lambda sigma: worsening(plain, scores(sigma), {task.loss, task.metrics[0]}), draws.tolerance)


def worsening(plain: Mapping[str, float], noisy: Mapping[str, float], metrics: Iterable[str]) -> float:
    """By how much the worst of these metrics is worse, as a share of its plain value; negative if all are better."""
    return max(_worsening(plain[name], noisy[name], METRICS[name].higher_is_better) for name in metrics)


def _worsening(plain: float, noisy: float, higher_is_better: bool) -> float:
    change = plain - noisy if higher_is_better else noisy - plain
    if math.isnan(change):  # a correlation with predictions that are all the same
        return math.inf
    return change / abs(plain) if plain else math.copysign(math.inf, change) if change else 0.0


def largest_within(worse: Callable[[float], float], bound: float) -> float:
    """The largest sigma between `LOWEST` and `HIGHEST` at which something is within a bound, by bisection.

    The draws are the same at every sigma, so a loss is smooth in it, and grows where noise does harm.

    Raises:
        UserError: even the smallest is not.
    """
    if worse(HIGHEST) <= bound:
        return HIGHEST
    low, high = math.log(LOWEST), math.log(HIGHEST)
    if worse(LOWEST) > bound:
        raise UserError(f"Noise of sigma {LOWEST:g} makes the validation scores worse by more already; tolerate more.")
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if worse(math.exp(middle)) <= bound else (low, middle)
    return math.exp(low)
