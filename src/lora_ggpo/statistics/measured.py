"""Measured values and their standard errors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

RESAMPLES = 1000
SEED = 0
"""Of bootstraps: the same data give the same standard error."""


@dataclass(frozen=True)
class Measured:
    """A measured value, its standard error (nan where n is too small to tell) and the number of examples."""

    value: float
    se: float
    n: int

    def to_dict(self) -> dict[str, float | int | None]:
        """Return {"value", "se", "n"}, fit for JSON: what is not finite becomes None."""
        finite = {"value": self.value, "se": self.se}
        return {**{key: x if math.isfinite(x) else None for key, x in finite.items()}, "n": self.n}


Scores = dict[str, dict[str, Measured]]
"""Of each set, by the names of the metrics."""


def plain(scores: Mapping[str, Mapping[str, Measured]]) -> dict[str, dict[str, Any]]:
    """`scores` as JSON holds them."""
    return {name: {key: metric.to_dict() for key, metric in metrics.items()} for name, metrics in scores.items()}


def measure_mean(values: Floats) -> Measured:
    """The mean of independent `values` (n,), n at least 1, and its standard error s / sqrt(n)."""
    n = len(values)
    return Measured(float(values.mean()), float(values.std(ddof=1)) / math.sqrt(n) if n > 1 else math.nan, n)


def measure_share(hits: NDArray[np.bool_]) -> Measured:
    """The share of `hits` (n,), n at least 1, and its binomial standard error."""
    n, share = len(hits), float(hits.mean())
    return Measured(share, math.sqrt(share * (1 - share) / n), n)


def measure_ratio(sums: Floats, counts: Integers) -> Measured:
    """The mean of what n examples have several of each: sum(sums) / sum(counts), of (n,) sums and their `counts`.

    The examples are the independent draws, so the standard error of the ratio is linearised over them; it is
    s / sqrt(n) where all have equally many.
    """
    n, total = len(sums), float(counts.sum())
    ratio = float(sums.sum()) / total
    residuals = sums - ratio * counts
    return Measured(ratio, math.sqrt(n / (n - 1) * float(residuals @ residuals)) / total if n > 1 else math.nan, n)
