"""Calibration against closed forms, direct sums and scikit-learn."""

import numpy as np
import pytest
from scipy.special import log_softmax, softmax
from sklearn.calibration import calibration_curve
from sklearn.metrics import brier_score_loss, log_loss

from lora_ggpo.statistics import calibration as of


def drawn(n=4000, classes=3, temperature=1.0, seed=0):
    """Probabilities and labels drawn from them; a temperature below 1 makes the probabilities too confident."""
    random = np.random.default_rng(seed)
    logits = random.normal(size=(n, classes)) * 1.5
    labels = (softmax(logits, axis=1).cumsum(axis=1) > random.random((n, 1))).argmax(axis=1)
    return softmax(logits / temperature, axis=1), labels


def test_error_of_hand_made_bins():
    """Four sure predictions of which one is right, and four of 0.6 of which two are: (4 * 0.75 + 4 * 0.1) / 8."""
    sure, less = np.array([1.0, 0.0]), np.array([0.6, 0.4])
    probabilities = np.array([sure, less] * 4)
    labels = np.array([0, 0, 1, 1, 1, 0, 1, 1])
    assert of.calibration_error(probabilities, labels, bins=2) == pytest.approx((3 + 0.4) / 8)
    assert of.calibration_error(probabilities, labels, bins=1) == pytest.approx(0.8 - 3 / 8)


def test_bins_are_those_of_scikit_learn():
    probabilities, labels = drawn()
    confidence, right = probabilities.max(axis=1), probabilities.argmax(axis=1) == labels
    accuracy, mean = calibration_curve(right, confidence, n_bins=10, strategy="quantile")
    bins = of.reliability(probabilities, labels, bins=10)
    np.testing.assert_allclose(bins.confidence, mean, rtol=1e-3)
    np.testing.assert_allclose(bins.accuracy, accuracy, atol=5e-3)
    assert (bins.count == 400).all()


def test_fewer_examples_than_bins():
    bins = of.reliability(np.array([[0.9, 0.1], [0.3, 0.7]]), np.array([0, 0]))
    assert bins.count.tolist() == [1, 1]
    assert bins.error() == pytest.approx((0.7 + 0.1) / 2)


def test_right_probabilities_have_a_small_error_and_those_too_sure_a_large_one():
    assert of.calibration_error(*drawn(20_000)) < 0.015
    assert of.calibration_error(*drawn(20_000, temperature=0.4)) > 0.1


def test_spread_is_that_of_fresh_samples():
    errors = [of.calibration_error(*drawn(1000, temperature=0.4, seed=seed)) for seed in range(60)]
    spread = of.calibration_error_spread(*drawn(1000, temperature=0.4))
    assert spread == pytest.approx(np.std(errors, ddof=1), rel=0.35)


def test_groups_of_one_are_plain_examples():
    probabilities, labels = drawn(500, temperature=0.4)
    confidence, right = probabilities.max(axis=1), (probabilities.argmax(axis=1) == labels).astype(float)
    error, spread = of.grouped_error(confidence, right, np.arange(500))
    assert error == pytest.approx(of.calibration_error(probabilities, labels))
    assert spread == pytest.approx(of.calibration_error_spread(probabilities, labels), rel=0.1)


def test_the_same_examples_twice_are_no_more_of_them():
    probabilities, labels = drawn(500, temperature=0.4)
    confidence, right = probabilities.max(axis=1), (probabilities.argmax(axis=1) == labels).astype(float)
    twice = of.grouped_error(confidence.repeat(2), right.repeat(2), np.arange(500).repeat(2))
    assert twice == pytest.approx(of.grouped_error(confidence, right, np.arange(500)), rel=0.1)


def test_brier_score_is_that_of_scikit_learn():
    probabilities, labels = drawn()
    mine = of.brier_scores(probabilities, labels).mean()
    assert mine == pytest.approx(brier_score_loss(labels, probabilities, scale_by_half=False))
    assert mine == pytest.approx(
        np.mean([((p - np.eye(3)[y]) ** 2).sum() for p, y in zip(probabilities, labels, strict=True)])
    )


def test_brier_parts_are_exact_where_bins_hold_one_probability():
    """Two classes and two probabilities: each bin holds one of them, so nothing is left over."""
    p = np.repeat([0.2, 0.7], 50)
    labels = np.concatenate([np.repeat([1, 0], [15, 35]), np.repeat([1, 0], [30, 20])])
    parts = of.brier_parts(np.stack([1 - p, p], axis=1), labels, bins=2)
    mean = 0.45
    assert parts.reliability == pytest.approx(2 * (0.5 * 0.1**2 + 0.5 * 0.1**2))
    assert parts.resolution == pytest.approx(2 * (0.5 * (0.3 - mean) ** 2 + 0.5 * (0.6 - mean) ** 2))
    assert parts.uncertainty == pytest.approx(2 * mean * (1 - mean))
    assert parts.rest == pytest.approx(0, abs=1e-12)


def test_brier_parts_add_up_to_the_score():
    parts = of.brier_parts(*drawn(temperature=0.5))
    assert parts.reliability > 0.01
    assert abs(parts.rest) < 0.1 * parts.score
    assert parts.score == pytest.approx(parts.reliability - parts.resolution + parts.uncertainty + parts.rest)


def test_log_loss_is_that_of_scikit_learn():
    probabilities, labels = drawn()
    assert of.log_losses(probabilities, labels).mean() == pytest.approx(log_loss(labels, probabilities))


def test_accuracy_by_coverage():
    probabilities = np.array([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3], [0.6, 0.4]])
    accuracies = of.accuracy_by_coverage(probabilities, np.array([0, 0, 1, 1]), np.array([0.25, 0.5, 0.7, 1.0]))
    assert accuracies.tolist() == pytest.approx([1, 1, 2 / 3, 1 / 2])


@pytest.mark.parametrize("temperature", [0.3, 1.0, 4.0])
def test_temperature_is_found_again(temperature):
    probabilities, labels = drawn(20_000, temperature=temperature)
    assert of.fit_temperature(probabilities, labels) == pytest.approx(1 / temperature, rel=0.05)


@pytest.mark.parametrize(("labels", "temperature"), [([0, 0, 1], 1 / 100), ([1, 1, 0], 100)])
def test_the_temperature_of_what_is_always_right_or_always_wrong_is_an_end_of_its_range(labels, temperature):
    probabilities = np.array([[0.9, 0.1], [0.6, 0.4], [0.3, 0.7]])
    assert of.fit_temperature(probabilities, np.array(labels)) == pytest.approx(temperature)


def test_temperature_is_the_least_of_a_grid():
    probabilities, labels = drawn(500, temperature=0.5)
    grid = np.geomspace(0.2, 10, 2000)
    losses = [of.log_losses(of.scale(probabilities, t), labels).mean() for t in grid]
    assert of.fit_temperature(probabilities, labels) == pytest.approx(grid[np.argmin(losses)], rel=3e-3)


def test_scaling_is_that_of_the_logits():
    logits = np.random.default_rng(0).normal(size=(50, 4))
    np.testing.assert_allclose(of.scale(softmax(logits, axis=1), 2.5), softmax(logits / 2.5, axis=1), rtol=1e-12)
    np.testing.assert_allclose(of.scale(softmax(logits, axis=1), 1.0), np.exp(log_softmax(logits, axis=1)), rtol=1e-12)
