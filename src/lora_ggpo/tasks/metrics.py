"""Figures of merit with their standard errors, from plain arrays."""

from __future__ import annotations

import math
import warnings

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

from lora_ggpo.tasks.config import Metric

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

# A probability below this counts as this much in log_loss: one confident mistake costs at most 34.5.
_SMALLEST_PROBABILITY = 1e-15
RESAMPLES = 1000
SEED = 0


def classification_metrics(probabilities: Floats, labels: Integers) -> dict[str, Metric]:
    """Accuracy, macro F1, Matthews correlation and log loss (nats) of predicted class probabilities.

    Args:
        probabilities: (n, classes), rows sum to 1. The most probable class is the prediction.
        labels: (n,) indices of the right classes.

    Standard errors: binomial for accuracy; for F1 and the correlation the standard deviation over 1000 bootstrap
    resamples of the examples (seeded, so the same data give the same figure); s / sqrt(n) for log loss.
    Macro F1 averages over the classes that occur in the labels or the predictions.
    """
    n = len(labels)
    predicted = probabilities.argmax(axis=1)
    accuracy = float(accuracy_score(labels, predicted))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="A single label was found")  # the correlation is then 0
        mcc = float(matthews_corrcoef(labels, predicted))
    f1_se, mcc_se = _bootstrap_f1_mcc(labels, predicted)
    return {
        "accuracy": Metric(accuracy, math.sqrt(accuracy * (1 - accuracy) / n), n),
        "f1": Metric(float(f1_score(labels, predicted, average="macro", zero_division=0)), f1_se, n),
        "mcc": Metric(mcc, mcc_se, n),
        "log_loss": mean_metric(-np.log(np.clip(probabilities[np.arange(n), labels], _SMALLEST_PROBABILITY, 1.0))),
    }


def completion_metrics(losses: Floats, tokens: Integers) -> dict[str, Metric]:
    """Loss per completion token (nats) and perplexity, over all tokens of all examples.

    Args:
        losses: (n,) summed loss of each example's completion.
        tokens: (n,) completion tokens of each example, at least 1.

    Examples, not tokens, are the independent draws: the standard error of the ratio sum(losses) / sum(tokens) is
    linearised over examples (it is s / sqrt(n) where all completions are equally long), and that of the perplexity
    exp(loss) follows by the delta method.
    """
    n, total = len(losses), float(tokens.sum())
    loss = float(losses.sum()) / total
    residuals = losses - loss * tokens
    se = math.sqrt(n / (n - 1) * float(residuals @ residuals)) / total if n > 1 else math.nan
    perplexity = math.exp(loss) if loss < 700 else math.inf
    return {"loss": Metric(loss, se, n), "perplexity": Metric(perplexity, perplexity * se, n)}


def mean_metric(values: Floats) -> Metric:
    """The mean of independent `values` (n,), n at least 1, and its standard error s / sqrt(n)."""
    n = len(values)
    return Metric(float(values.mean()), float(values.std(ddof=1)) / math.sqrt(n) if n > 1 else math.nan, n)


def _bootstrap_f1_mcc(labels: Integers, predicted: Integers) -> tuple[float, float]:
    """Standard errors of macro F1 and Matthews correlation.

    Both depend on the data through the confusion counts alone, and drawing n examples with replacement draws those
    counts from a multinomial: that is the bootstrap at a fraction of its cost.
    """
    classes = int(max(labels.max(), predicted.max())) + 1
    cells, counts = np.unique(labels * classes + predicted, return_counts=True)
    rows, columns = cells // classes, cells % classes
    draws = np.random.default_rng(SEED).multinomial(len(labels), counts / counts.sum(), size=RESAMPLES)
    scores = np.array([_f1_mcc(rows, columns, draw, classes) for draw in draws])
    f1_se, mcc_se = scores.std(axis=0, ddof=1)
    return float(f1_se), float(mcc_se)


def _f1_mcc(rows: Integers, columns: Integers, counts: Integers, classes: int) -> tuple[float, float]:
    """Macro F1 and Matthews correlation of a confusion table given as its filled cells."""
    right = np.bincount(rows, weights=counts * (rows == columns), minlength=classes)
    true = np.bincount(rows, weights=counts, minlength=classes)
    said = np.bincount(columns, weights=counts, minlength=classes)
    occurs = true + said > 0
    f1 = float(np.mean(2 * right[occurs] / (true + said)[occurs]))
    n = float(counts.sum())
    spread = (n * n - float(true @ true)) * (n * n - float(said @ said))
    return f1, (n * float(right.sum()) - float(true @ said)) / math.sqrt(spread) if spread > 0 else 0.0
