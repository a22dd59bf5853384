"""Means over seeds with their intervals, and paired differences."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean and half the width of its two-sided 95 % Student t interval (nan for fewer than two values)."""

    mean: float
    half: float
    n: int

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval lies on one side of zero; never with an unknown width."""
        return abs(self.mean) > self.half if math.isfinite(self.half) else False


def mean_interval(values: Sequence[float]) -> Interval:
    """The mean of independent `values`, at least one, with its interval."""
    array = np.asarray(values, dtype=np.float64)
    n = len(array)
    if n < 2:
        return Interval(float(array.mean()), math.nan, n)
    half = stats.t.ppf((1 + CONFIDENCE) / 2, n - 1) * array.std(ddof=1) / math.sqrt(n)
    return Interval(float(array.mean()), float(half), n)


def paired_difference(first: Sequence[float], second: Sequence[float]) -> Interval:
    """The mean of second - first, pair by pair (the same seed in both), with its interval."""
    return mean_interval(np.subtract(second, first).tolist())


def verdict(difference: Interval, second: str, *, higher_is_better: bool) -> str:
    """In plain words, what the paired difference to `second` says."""
    if difference.n < 2:
        return "one seed cannot tell"
    if not difference.excludes_zero:
        return "no difference found"
    better = (difference.mean > 0) == higher_is_better
    return f"{second} is {'better' if better else 'worse'}"
