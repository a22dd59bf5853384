"""Means over seeds with their intervals, paired differences and their tests, ranks, and Pareto fronts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy  # whose parts are imported as they are used: stats alone takes a second
from numpy.typing import NDArray

CONFIDENCE = 0.95
LEVEL = 0.05
POWER = 0.8
_ROUNDING = 1e-9


@dataclass(frozen=True)
class Interval:
    """A mean and half the width of its two-sided 95 % Student t interval (nan for fewer than two values)."""

    mean: float
    half: float
    n: int


def mean_interval(values: Sequence[float]) -> Interval:
    """The mean of independent `values`, at least one, with its interval."""
    array = np.asarray(values, dtype=np.float64)
    n = len(array)
    if n < 2:
        return Interval(float(array.mean()), math.nan, n)
    half = scipy.special.stdtrit(n - 1, (1 + CONFIDENCE) / 2) * array.std(ddof=1) / math.sqrt(n)
    return Interval(float(array.mean()), float(half), n)


def p_value(differences: Sequence[float]) -> float:
    """The two-sided p-value of the paired t test, from the differences of the pairs.

    nan where that test says nothing: fewer than two pairs, or pairs that all differ by the same amount, which a small
    test set makes likely and which is no proof. Pairs that do not differ at all have 1.
    """
    if not vary(differences):
        return math.nan if len(differences) < 2 or any(differences) else 1.0
    return float(scipy.stats.ttest_1samp(differences, 0.0).pvalue)


def verdict(difference: Interval, p: float, more: str, less: str) -> str:
    """In plain words, what a paired difference says whose p-value is `p`: `more`, `less`, or that it says neither."""
    if difference.n < 2:
        return "one seed cannot tell"
    if math.isnan(p):
        return "cannot tell: every seed differs by the same amount"
    if p >= LEVEL:
        return "no difference found"
    return more if difference.mean > 0 else less


def vary(values: Sequence[float]) -> bool:
    """Whether `values` differ among themselves by more than rounding."""
    return len(values) > 1 and max(values) - min(values) > _ROUNDING * max(map(abs, values))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjustment of the p-values of one family of tests, in their order; nan is no test and stays nan."""
    adjusted = [math.nan] * len(p_values)
    tests = sorted((p, index) for index, p in enumerate(p_values) if not math.isnan(p))
    largest = 0.0
    for place, (p, index) in enumerate(tests):
        largest = max(largest, min(1.0, (len(tests) - place) * p))
        adjusted[index] = largest
    return adjusted


def pooled_sd(samples: Sequence[Sequence[float]]) -> float:
    """The standard deviation that the `samples` share; those of one value do not count, nan if none counts."""
    counted = [np.asarray(sample, dtype=np.float64) for sample in samples if len(sample) > 1]
    freedom = sum(len(sample) - 1 for sample in counted)
    return math.sqrt(sum(np.square(one - one.mean()).sum() for one in counted) / freedom) if freedom else math.nan


def detectable_difference(differences_sd: float, n: int, power: float = POWER, level: float = LEVEL) -> float:
    """The smallest true mean difference that a two-sided paired t test at `level` finds with probability `power`.

    Args:
        differences_sd: Standard deviation of the paired differences.
        n: Number of pairs; nan is returned for fewer than two.
    """
    if n < 2 or not math.isfinite(differences_sd):
        return math.nan
    # The power as a mean over the sample variance's distribution: scipy.stats.nct gives nan for some of these values.
    quantiles = scipy.stats.chi2.ppf((np.arange(20_000) + 0.5) / 20_000, n - 1)
    critical = scipy.stats.t.isf(level / 2, n - 1) * np.sqrt(quantiles / (n - 1))
    ndtr = scipy.special.ndtr

    def excess(shift: float) -> float:
        return float(np.mean(ndtr(shift - critical) + ndtr(-shift - critical))) - power

    return float(scipy.optimize.brentq(excess, 0.0, critical.max() + 10.0)) * differences_sd / math.sqrt(n)


def pareto_front(costs: Sequence[float], scores: Sequence[float]) -> list[int]:
    """Indices, by growing cost, of the points that score more (higher is better) than every cheaper one."""
    front: list[int] = []
    for index in sorted(range(len(costs)), key=lambda i: (costs[i], -scores[i])):
        if not front or scores[index] > scores[front[-1]]:
            front.append(index)
    return front


def is_finite(value: float | None) -> bool:
    """Whether there is a value, and it is finite."""
    return value is not None and math.isfinite(value)


def seed_curves(logs: Sequence[Sequence[Mapping[str, Any]]], key: str) -> tuple[list[int], NDArray[np.float64]]:
    """The finite values of several seeds' logs under `key`, at the steps that all have: steps and (seeds, steps)."""
    curves = [{row["step"]: row[key] for row in log if is_finite(row.get(key))} for log in logs]
    steps = sorted(set.intersection(*map(set, curves))) if curves else []
    return steps, np.array([[one[step] for step in steps] for one in curves], dtype=np.float64)
