import math

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import f1_score, log_loss, matthews_corrcoef

from lora_ggpo.tasks.classification import _f1_mcc, classification_metrics
from lora_ggpo.tasks.completions import completion_metrics


def softmax_data(rng, n, classes):
    """Probabilities that are informative but not certain, and labels."""
    labels = rng.integers(classes, size=n)
    scores = rng.normal(size=(n, classes)) + 1.5 * np.eye(classes)[labels]
    probabilities = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
    return probabilities, labels


def test_by_hand():
    # predicted 0 0 1 1, right 0 1 1 1
    probabilities = np.array([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8], [0.5 - 1e-9, 0.5 + 1e-9]])
    metrics = classification_metrics(probabilities, np.array([0, 1, 1, 1]))
    assert metrics["accuracy"].value == 0.75
    assert metrics["accuracy"].se == pytest.approx(math.sqrt(0.75 * 0.25 / 4))
    assert metrics["f1"].value == pytest.approx((2 / 3 + 4 / 5) / 2)
    assert metrics["mcc"].value == pytest.approx(2 / math.sqrt(2 * 2 * 3 * 1))
    losses = -np.log([0.9, 0.4, 0.8, 0.5])
    assert metrics["log_loss"].value == pytest.approx(losses.mean(), abs=1e-8)
    assert metrics["log_loss"].se == pytest.approx(stats.sem(losses), abs=1e-8)
    assert {metric.n for metric in metrics.values()} == {4}


@pytest.mark.parametrize("classes", [2, 5])
def test_values_are_sklearns(classes):
    probabilities, labels = softmax_data(np.random.default_rng(1), 300, classes)
    metrics = classification_metrics(probabilities, labels)
    predicted = probabilities.argmax(axis=1)
    assert metrics["f1"].value == pytest.approx(f1_score(labels, predicted, average="macro"))
    assert metrics["mcc"].value == pytest.approx(matthews_corrcoef(labels, predicted))
    assert metrics["log_loss"].value == pytest.approx(log_loss(labels, probabilities))


@pytest.mark.parametrize("seed", range(20))
def test_counts_give_sklearns_f1_and_mcc(seed):
    rng = np.random.default_rng(seed)
    labels, predicted = rng.integers(6, size=12), rng.integers(4, size=12)  # some classes are absent
    cells, counts = np.unique(labels * 6 + predicted, return_counts=True)
    f1, mcc = _f1_mcc(cells // 6, cells % 6, np.stack([counts[::-1], counts]), 6)[1]
    assert f1 == pytest.approx(f1_score(labels, predicted, average="macro"))
    assert mcc == pytest.approx(matthews_corrcoef(labels, predicted))


def test_bootstrap_errors_are_those_of_resampling_rows():
    probabilities, labels = softmax_data(np.random.default_rng(2), 150, 3)
    predicted = probabilities.argmax(axis=1)
    metrics = classification_metrics(probabilities, labels)
    rng = np.random.default_rng(99)
    scores = []
    for _ in range(400):
        rows = rng.integers(150, size=150)
        scores.append(
            (
                f1_score(labels[rows], predicted[rows], average="macro"),
                matthews_corrcoef(labels[rows], predicted[rows]),
            )
        )
    f1_se, mcc_se = np.std(scores, axis=0, ddof=1)
    # 400 draws know a standard deviation to 1 / sqrt(2 * 400) = 3.5 %, 1000 draws to 2.2 %: four sigma is 17 %.
    assert metrics["f1"].se == pytest.approx(f1_se, rel=0.17)
    assert metrics["mcc"].se == pytest.approx(mcc_se, rel=0.17)
    again = classification_metrics(probabilities, labels)
    assert again == metrics


def test_errors_are_the_spread_over_fresh_samples():
    rng = np.random.default_rng(3)
    values, errors = [], []
    for _ in range(150):
        metrics = classification_metrics(*softmax_data(rng, 200, 2))
        values.append([metric.value for metric in metrics.values()])
        errors.append([metric.se for metric in metrics.values()])
    # the spread of 150 values is known to 6 %: four sigma is a quarter
    np.testing.assert_allclose(np.mean(errors, axis=0), np.std(values, axis=0, ddof=1), rtol=0.25)


def test_log_loss_is_clipped_and_one_class_is_no_accident():
    metrics = classification_metrics(np.array([[1.0, 0.0], [1.0, 0.0]]), np.array([1, 1]))
    assert metrics["log_loss"].value == pytest.approx(-math.log(1e-15))
    assert metrics["accuracy"].value == metrics["mcc"].value == metrics["f1"].value == 0
    assert math.isnan(classification_metrics(np.array([[0.7, 0.3]]), np.array([0]))["log_loss"].se)


def test_equally_long_completions_give_the_plain_mean_and_error():
    per_token = np.array([1.0, 2.0, 4.0, 5.0])
    metrics = completion_metrics(per_token * 3, np.array([3, 3, 3, 3]))
    assert metrics["loss"].value == pytest.approx(3.0)
    assert metrics["loss"].se == pytest.approx(stats.sem(per_token))
    assert metrics["perplexity"].value == pytest.approx(math.exp(3))
    assert metrics["perplexity"].se == pytest.approx(math.exp(3) * stats.sem(per_token))


def test_ratio_error_is_the_spread_over_resamples():
    rng = np.random.default_rng(4)
    tokens = rng.integers(1, 40, size=400)
    losses = tokens * rng.gamma(4.0, 0.5, size=400)
    metrics = completion_metrics(losses, tokens)
    rows = rng.integers(400, size=(2000, 400))
    ratios = losses[rows].sum(axis=1) / tokens[rows].sum(axis=1)
    assert metrics["loss"].se == pytest.approx(ratios.std(ddof=1), rel=0.1)
    assert metrics["perplexity"].se == pytest.approx(np.exp(ratios).std(ddof=1), rel=0.1)
    assert metrics["loss"].value == pytest.approx(losses.sum() / tokens.sum())
