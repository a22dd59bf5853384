"""Double descent of a curve: how far it rises between two descents, and whether that is more than noise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy
from numpy.typing import NDArray

from lora_ggpo.statistics.intervals import Interval, mean_interval, vary

FITTED_ERROR = 0.01
"""Training error at or below which the training labels count as interpolated."""

FITTED_LOSS = 0.05
"""Training loss that stands for it where no training error is known."""

WINDOWS = 20
"""Windows that the training loss of a run is averaged in."""

Array = NDArray[np.float64]
Positions = tuple[int, int, int, int]


@dataclass(frozen=True)
class Descent:
    """How much of a double descent a curve has.

    Attributes:
        score: The largest min(y_h - y_i, y_j - y_i, y_j - y_k) of the mean curve over positions h < i < j < k, in the
            unit of the curve: how far it rises from i to j, no further than it fell before and falls after. 0 where
            no rise lies between two descents.
        positions: These h, i, j, k; None where the score is 0.
        relative: The score in units of the spread over seeds (`spread`); None with one seed, or where seeds do not
            differ.
        checked: The same minimum on seeds that had no part in choosing the positions: mean and interval over all seeds
            but the first. It does not profit from the choice as `score` does, and can be negative. None with one seed
            or fewer than four points.
        p: One-sided p-value of `checked`; None with fewer than three seeds, or where it is the same for all.
    """

    score: float
    positions: Positions | None
    relative: float | None
    checked: Interval | None
    p: float | None


def double_descent(values: Array) -> Descent:
    """Score the curves of several seeds, and test the score.

    The positions that score best are biased by the noise they were chosen in, so the test chooses them on some seeds
    and measures on others: for each seed but the first, the positions are those of the mean curve of the seeds before
    it, and the minimum of the three differences is measured on the seed itself. Without a double descent at least one
    of the three true differences is not positive, whatever the positions, so the expectation of each measured minimum
    is not positive either, and the t test of their mean is one of double descent.

    "The seeds before it" (A. P. Dawid's prequential principle, 1984) rather than "all other seeds": with the latter
    each seed has a part in choosing what the others are measured at, which makes the measured values positively
    dependent; on a flat stretch between two descents that test is wrong three times as often as it says. Testing the
    minimum, rather than each difference, keeps it valid where seeds differ in which of the three is not positive.

    Args:
        values: (seeds, points), in the order of the axis, lower is better.

    Raises:
        ValueError: `values` is not a table of finite numbers with at least one row.
    """
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 2 or not len(values) or not np.isfinite(values).all():
        raise ValueError("double_descent needs a table of finite numbers, one row for each seed")
    if values.shape[1] < 4:
        return Descent(0.0, None, None, None, None)
    positions = _best(values.mean(axis=0))
    score = max(0.0, _score(values.mean(axis=0), positions))
    noise = spread(values)
    checked = [_score(values[n], _best(values[:n].mean(axis=0))) for n in range(1, len(values))]
    return Descent(
        score=score,
        positions=positions if score > 0 else None,
        relative=score / noise if noise > 0 else None,
        checked=mean_interval(checked) if checked else None,
        p=float(scipy.stats.ttest_1samp(checked, 0.0, alternative="greater").pvalue) if vary(checked) else None,
    )


def spread(values: Array) -> float:
    """Standard deviation over seeds about the mean curve, pooled over the points; 0 with one seed.

    What moves a seed's whole curve up or down does not count: differences along a curve do not see it.

    Args:
        values: (seeds, points).
    """
    residuals = values - values.mean(axis=0) - values.mean(axis=1, keepdims=True) + values.mean()
    freedom = (len(values) - 1) * (values.shape[1] - 1)
    found = math.sqrt(float(np.square(residuals).sum()) / freedom) if freedom else 0.0
    return found if found > 1e-9 * float(np.abs(values).max(initial=0.0)) else 0.0


def average_windows(steps: Sequence[float], values: Array) -> tuple[tuple[float, ...], Array]:
    """Means of neighbours, in at most `WINDOWS` windows of as equal a number of steps as can be.

    Args:
        steps: Growing.
        values: (seeds, steps).

    Returns:
        The mean step of each window, and the values: (seeds, windows).
    """
    parts = np.array_split(np.arange(len(steps)), min(WINDOWS, len(steps)) or 1)
    places = np.asarray(steps, dtype=np.float64)
    centres = tuple(float(places[part].mean()) for part in parts if len(part))
    means = [values[:, part].mean(axis=1) for part in parts if len(part)]
    return centres, np.stack(means, axis=1) if means else np.empty((len(values), 0))


def interpolation_threshold(places: Sequence[float], values: Array, level: float = FITTED_ERROR) -> float | None:
    """The place from which the training data is fitted, or up to which, where larger places are harder to fit.

    Args:
        places: Growing, such as ranks.
        values: (seeds, places): training error on the labels as given, or a training loss.
        level: The mean over seeds counts as fitted at or below it; a loss needs `FITTED_LOSS`.

    Returns:
        The first fitted place; where the first one is fitted already, the last before one that is not. None where no
        place is fitted.
    """
    fitted = np.asarray(values, dtype=np.float64).mean(axis=0) <= level
    if not fitted.any():
        return None
    unfitted_later = fitted[0] and not fitted.all()
    return float(places[int(np.argmin(fitted)) - 1 if unfitted_later else int(np.argmax(fitted))])


def _best(curve: Array) -> Positions:
    """The positions of the highest score on one curve of at least four points; the first of several that tie."""
    highest_before = np.maximum.accumulate(curve)  # of the points up to each, so the point before i decides for i
    lowest_after = np.minimum.accumulate(curve[::-1])[::-1]
    inner = curve[1:-1]
    fall, fall_again = highest_before[:-2] - inner, inner - lowest_after[2:]
    rise = inner[None, :] - inner[:, None]
    scores = np.minimum(np.minimum(fall[:, None], rise), fall_again[None, :])
    scores[np.tril_indices(len(inner))] = -np.inf
    i, j = (int(index) + 1 for index in np.unravel_index(int(scores.argmax()), scores.shape))
    return int(curve[:i].argmax()), i, j, j + 1 + int(curve[j + 1 :].argmin())


def _score(curve: Array, positions: Positions) -> float:
    h, i, j, k = positions
    return float(min(curve[h] - curve[i], curve[j] - curve[i], curve[j] - curve[k]))
