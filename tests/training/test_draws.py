"""Predictions that are averaged over draws of noise."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest

from lora_ggpo.errors import UserError
from lora_ggpo.perturbation import GGPOConfig
from lora_ggpo.perturbation.predict import noisy_evaluation
from lora_ggpo.training.draws import HIGHEST, LOWEST, Draws, largest_within, worsening
from lora_ggpo.training.reuse import evaluate_run, load_trained
from lora_ggpo.workspace.progress import Reporter
from tests.training.runs import invoke, refused

QUIET = Reporter(quiet=True)


def quadratic(sigma):
    return 0.4 * (1 + 3 * sigma**2)


@pytest.mark.parametrize("share", [0.003, 0.05, 0.5])
def test_bisection_finds_what_a_grid_finds(share):
    bound = 0.4 * (1 + share)
    grid = np.geomspace(LOWEST, HIGHEST, 20_000)
    expected = grid[[quadratic(sigma) <= bound for sigma in grid]][-1]
    assert largest_within(quadratic, bound) == pytest.approx(expected, rel=3e-3)
    assert largest_within(quadratic, bound) == pytest.approx(math.sqrt(share / 3), rel=3e-3)


def test_bisection_at_its_ends():
    assert largest_within(lambda sigma: 0.4, 0.5) == HIGHEST
    with pytest.raises(UserError, match="tolerate more"):
        largest_within(lambda sigma: 0.6, 0.5)


def test_a_lower_loss_does_not_pay_for_a_lower_score():
    """Of a run that over-fits: certain and half of it wrong, or, with the noise, without any opinion."""
    over_fitted, guessing = {"accuracy": 0.6, "log_loss": 1.8}, {"accuracy": 0.5, "log_loss": 0.69}
    assert worsening(over_fitted, guessing, ["log_loss", "accuracy"]) == pytest.approx(0.1 / 0.6)
    assert worsening(over_fitted, {"accuracy": 0.6, "log_loss": 1.98}, ["log_loss", "accuracy"]) == pytest.approx(0.1)
    assert worsening(over_fitted, {"accuracy": 0.9, "log_loss": 0.9}, ["log_loss", "accuracy"]) == pytest.approx(-0.5)


@pytest.mark.parametrize(("plain", "noisy", "expected"), [(0.5, math.nan, math.inf), (0, -0.1, math.inf), (0, 0, 0)])
def test_a_score_without_a_share(plain, noisy, expected):
    assert worsening({"pearson": plain}, {"pearson": noisy}, ["pearson"]) == expected


@pytest.fixture
def run(finished, tmp_path):
    """A copy of a run of a classifier."""
    return Path(shutil.copytree(finished[1].folder, tmp_path / "seed-0"))


def scores_of(folder, draws):
    return evaluate_run(folder, reporter=QUIET, draws=draws)


def test_probabilities_are_the_mean_over_draws(run):
    """Against a loop of one's own over the same draws."""
    found = scores_of(run, Draws(3, sigma=2000.0))
    kept = json.loads((run / "evaluation" / "sets-own-3-draws.json").read_text())
    assert kept["draws"] == {"count": 3, "sigma": 2000.0, "tolerance": None}
    model, tokenizer, recipe, task = load_trained(run)
    splits = task.load(recipe.data)
    rows = task.encode(splits.test, tokenizer)
    with noisy_evaluation(model, GGPOConfig(sigma=2000.0)) as draw:
        parts = []
        for number in range(3):
            draw(number, 1.0)
            parts.append(task.score(model, rows, tokenizer))
    expected = task.measure(np.mean(parts, axis=0), rows)
    for metric in ("log_loss", "brier", "accuracy"):
        assert found["test"][metric]["value"] == pytest.approx(expected[metric].value, rel=1e-6)
    # The noise moves each row's probabilities; over the rows that can cancel, so the log-loss need not show it.
    plain = task.score(model, rows, tokenizer)
    away = [abs(part - plain).max() for part in (*parts, np.mean(parts, axis=0))]
    assert min(away) > 1e-5
    assert len({part.tobytes() for part in parts}) == 3


def test_next_to_no_noise_is_the_model_as_it_is(run):
    plain, noisy = scores_of(run, None), scores_of(run, Draws(2, sigma=1e-7))
    for name, metrics in plain.items():
        assert noisy[name]["log_loss"]["value"] == pytest.approx(metrics["log_loss"]["value"], rel=1e-5)


def test_the_tolerated_noise_costs_the_validation_scores_what_it_may(run):
    def validation(draws):
        return [scores_of(run, draws)["validation"][metric]["value"] for metric in ("log_loss", "accuracy")]

    loss, accuracy = validation(None)
    scores_of(run, Draws(4, tolerance=0.02))
    sigma = json.loads((run / "evaluation" / "sets-own-4-draws.json").read_text())["draws"]["sigma"]
    at, above = (validation(Draws(4, sigma=s)) for s in (sigma, 1.05 * sigma))
    assert at[0] <= loss * 1.02 * (1 + 1e-6)
    assert at[1] >= accuracy * 0.98
    assert sigma == 1 or above[0] > loss * 1.02 or above[1] < accuracy * 0.98


def test_what_cannot_be_averaged(run, whole):
    with pytest.raises(UserError, match="Predictions of task sft cannot be averaged"):
        scores_of(whole[1], Draws(2, sigma=0.1))


def test_options_that_say_nothing(run):
    refused(invoke("eval", run, "--noise", 0.1), "--noise and --tolerate are for --draws")
    refused(invoke("eval", run, "--draws", 2, "--noise", 0.1, "--tolerate", 0.1), "leave out one of them")
