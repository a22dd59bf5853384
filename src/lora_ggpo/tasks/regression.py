"""Regression: a number for each text or pair of texts, such as their similarity.

The model has a head of one output, trained by the mean squared error over the rows; it starts at their mean.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata
from torch import nn

from lora_ggpo.tasks.config import Metric
from lora_ggpo.tasks.metrics import RESAMPLES, SEED, Floats, mean_metric

_BLOCK = 1_000_000


def start_at_mean(model: nn.Module, targets: Sequence[float]) -> None:
    """Let a new head predict the mean of the training targets, as far as it has a bias.

    From zero the first hundreds of steps would go into finding the mean, which bends the body as well.
    """
    heads = [part for part in model.modules() if isinstance(part, nn.Linear) and part.out_features == 1]
    if heads and heads[-1].bias is not None:
        nn.init.constant_(heads[-1].bias, float(np.mean(targets)))


def regression_metrics(predicted: Floats, targets: Floats) -> dict[str, Metric]:
    """Pearson's and Spearman's correlation and the mean squared error.

    Args:
        predicted: (n,).
        targets: (n,), in the unit of the predictions.

    Standard errors: of the correlations the standard deviation over 1000 bootstrap resamples of the rows (seeded, so
    the same data give the same figure); s / sqrt(n) of the squared error. Spearman's correlation is Pearson's of the
    ranks, where ties share their mean rank. A correlation with what does not vary is nan.
    """
    n = len(targets)
    pearson, spearman = _correlations(predicted[None], targets[None])[:, 0]
    pearson_se, spearman_se = _bootstrap(predicted, targets)
    return {
        "pearson": Metric(float(pearson), pearson_se, n),
        "spearman": Metric(float(spearman), spearman_se, n),
        "mse": mean_metric((predicted - targets) ** 2),
    }


def regression_rows(ids: list[str], targets: list[float], predicted: Floats) -> list[dict[str, Any]]:
    """What is kept of each prediction."""
    columns = zip(ids, targets, predicted, strict=True)
    return [{"id": id_, "target": target, "predicted": round(float(value), 6)} for id_, target, value in columns]


def _correlations(one: Floats, other: Floats) -> Floats:
    """Pearson's and Spearman's correlation of each row of two arrays (rows, n): (2, rows)."""
    return np.stack([_pearson(one, other), _pearson(rankdata(one, axis=1), rankdata(other, axis=1))])


def _pearson(one: Floats, other: Floats) -> Floats:
    one, other = (x - x.mean(axis=1, keepdims=True) for x in (one, other))
    spread = np.sqrt(np.square(one).sum(axis=1) * np.square(other).sum(axis=1))
    flat = (np.ptp(one, axis=1) == 0) | (np.ptp(other, axis=1) == 0)
    found: Floats = (one * other).sum(axis=1) / np.where(flat | (spread == 0), np.nan, spread)
    return found


def _bootstrap(predicted: Floats, targets: Floats) -> tuple[float, float]:
    """Standard errors of the two correlations; nan where resamples do not vary."""
    n, rng = len(targets), np.random.default_rng(SEED)
    sizes = [len(part) for part in np.array_split(np.arange(RESAMPLES), max(1, RESAMPLES * n // _BLOCK))]
    found = np.concatenate([_resampled(predicted, targets, rng.integers(n, size=(size, n))) for size in sizes], axis=1)
    kept = found[:, np.isfinite(found).all(axis=0)]
    if kept.shape[1] < RESAMPLES / 2:
        return math.nan, math.nan
    pearson, spearman = kept.std(axis=1, ddof=1)
    return float(pearson), float(spearman)


def _resampled(predicted: Floats, targets: Floats, rows: NDArray[np.int64]) -> Floats:
    return _correlations(predicted[rows], targets[rows])
