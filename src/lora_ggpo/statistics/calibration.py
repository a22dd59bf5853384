"""Whether probabilities are right: calibration error, Brier score and its parts, and the temperature that mends them.

All functions take the class probabilities (n, classes) of n examples, whose rows sum to 1, and their labels (n,).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from lora_ggpo.statistics.measured import RESAMPLES, SEED, Floats, Integers, Measured, measure_mean

BINS = 15
SHARES = np.arange(1, 21) / 20
"""Of the most confident predictions, on which accuracies are drawn."""

SMALLEST_PROBABILITY = 1e-15
"""A probability below this counts as this much in a logarithm: one confident mistake costs at most 34.5."""

_LARGEST_TEMPERATURE = 100.0
_HALVINGS = 40
_DRAWN_AT_A_TIME = 2_000_000


@dataclass(frozen=True)
class Bins:
    """Examples in bins of growing confidence, which hold equally many: mean confidence, accuracy and count of each."""

    confidence: Floats
    accuracy: Floats
    count: Integers

    def error(self) -> float:
        """The expected calibration error: the mean gap between confidence and accuracy over the examples."""
        return float((self.count * np.abs(self.confidence - self.accuracy)).sum() / self.count.sum())


@dataclass(frozen=True)
class Curves:
    """What is drawn of the probabilities of one set.

    Attributes:
        bins: In which confidence is compared with accuracy.
        accuracies: On each of the `SHARES`.
    """

    bins: Bins
    accuracies: Floats

    @classmethod
    def read(cls, row: Mapping[str, Any]) -> Self:
        """The curves that `to_dict` gave."""
        return cls(Bins(**{name: np.asarray(of) for name, of in row["bins"].items()}), np.asarray(row["accuracies"]))

    def to_dict(self) -> dict[str, Any]:
        """Return {"bins": {"confidence", "accuracy", "count"}, "accuracies"}, fit for JSON."""
        bins = {name: np.round(of, 5).tolist() for name, of in vars(self.bins).items()}
        return {"bins": bins, "accuracies": np.round(self.accuracies, 5).tolist()}


@dataclass(frozen=True)
class BrierParts:
    """Murphy's parts (1973) of the Brier score: score = reliability - resolution + uncertainty + the rest.

    Attributes:
        reliability: How far the probabilities are from how often they come true; 0 is best.
        resolution: How far from the mean that is; the more, the better.
        uncertainty: Of the labels alone.
        rest: The spread of probabilities within a bin, which the parts leave out.
    """

    score: float
    reliability: float
    resolution: float
    uncertainty: float
    rest: float


def calibration_metrics(probabilities: Floats, labels: Integers) -> dict[str, Measured]:
    """log_loss (nats), brier and ece.

    Standard errors: s / sqrt(n), and `calibration_error_spread` for the calibration error.
    """
    spread = calibration_error_spread(probabilities, labels)
    return {
        "log_loss": measure_mean(log_losses(probabilities, labels)),
        "brier": measure_mean(brier_scores(probabilities, labels)),
        "ece": Measured(calibration_error(probabilities, labels), spread, len(labels)),
    }


def calibration_curves(probabilities: Floats, labels: Integers) -> Curves:
    """Accuracy by confidence and by coverage."""
    return Curves(reliability(probabilities, labels), accuracy_by_coverage(probabilities, labels, SHARES))


def log_losses(probabilities: Floats, labels: Integers) -> Floats:
    """-log p of each example's class (n,), in nats."""
    return -np.log(np.clip(probabilities[np.arange(len(labels)), labels], SMALLEST_PROBABILITY, 1.0))


def brier_scores(probabilities: Floats, labels: Integers) -> Floats:
    """The squared distance of each example's probabilities to its label (n,), over all classes: 0 to 2."""
    return ((probabilities - np.eye(probabilities.shape[1])[labels]) ** 2).sum(axis=1)


def reliability(probabilities: Floats, labels: Integers, bins: int = BINS) -> Bins:
    """The most probable class, right or wrong, in at most `bins` bins of equal mass."""
    confidence, right = _top(probabilities, labels)
    return _binned(confidence, right, bins)


def calibration_error(probabilities: Floats, labels: Integers, bins: int = BINS) -> float:
    """The expected calibration error of the most probable class, with bins of equal mass (arXiv 1909.10155).

    Of finitely many examples it is more than 0 even for right probabilities.
    """
    return reliability(probabilities, labels, bins).error()


def calibration_error_spread(
    probabilities: Floats, labels: Integers, bins: int = BINS, resamples: int = RESAMPLES, seed: int = SEED
) -> float:
    """The standard deviation of the calibration error over bootstrap resamples of the examples; nan for a single one.

    Resampled examples stay in the bins that they are in.
    """
    if len(labels) < 2:
        return math.nan
    confidence, right = _top(probabilities, labels)
    order = np.argsort(confidence, kind="stable")
    gaps = (confidence - right)[order]
    bin_of = np.repeat(np.arange(len(starts := _starts(len(gaps), bins))), np.diff([*starts, len(gaps)]))
    random, n = np.random.default_rng(seed), len(gaps)
    errors: list[Floats] = []
    for drawn in _chunks(resamples, n):
        chosen = random.integers(n, size=(drawn, n))
        places = (bin_of[chosen] + len(starts) * np.arange(drawn)[:, None]).ravel()
        sums = np.bincount(places, gaps[chosen].ravel(), len(starts) * drawn)
        errors.append(np.abs(sums.reshape(drawn, -1)).sum(axis=1) / n)
    return float(np.concatenate(errors).std(ddof=1))


def grouped_error(
    confidence: Floats, right: Floats, groups: Integers, bins: int = BINS, resamples: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """The calibration error of predictions that belong together, and how far chance has a part in it.

    Args:
        confidence: (n,), of each prediction.
        right: (n,), 1 where it is right, else 0.
        groups: (n,), its group, from 0 on; every group has one at least.

    Returns:
        The error, and its standard deviation over bootstrap resamples of whole groups (nan for a single one).
        Predictions stay in the bins that they are in.
    """
    order, starts, n = np.argsort(confidence, kind="stable"), _starts(len(confidence), bins), int(groups.max()) + 1
    bin_of = np.empty(len(order), dtype=np.int64)
    bin_of[order] = np.repeat(np.arange(len(starts)), np.diff([*starts, len(order)]))
    gaps = np.bincount(groups * len(starts) + bin_of, confidence - right, n * len(starts)).reshape(n, -1)
    sizes = np.bincount(groups, minlength=n)

    def errors(weights: Integers) -> Floats:
        """With each group so many times over: of `weights` (resamples, groups)."""
        return np.asarray(np.abs(weights @ gaps).sum(axis=1) / (weights @ sizes), dtype=np.float64)

    random = np.random.default_rng(seed)
    found = [errors(_times_drawn(random.integers(n, size=(drawn, n)))) for drawn in _chunks(resamples, n)]
    spread = float(np.concatenate(found).std(ddof=1)) if n > 1 else math.nan
    return float(errors(np.ones((1, n), dtype=np.int64))[0]), spread


def brier_parts(probabilities: Floats, labels: Integers, bins: int = BINS) -> BrierParts:
    """The parts of the Brier score, each class against all others in bins of equal mass, summed over the classes."""
    n, classes = probabilities.shape
    truth = np.eye(classes)[labels]
    parts = np.zeros(3)
    for of_class, true in zip(probabilities.T, truth.T, strict=True):
        binned, mean = _binned(of_class, true, bins), true.mean()
        share = binned.count / n
        parts += (
            (share * (binned.confidence - binned.accuracy) ** 2).sum(),
            (share * (binned.accuracy - mean) ** 2).sum(),
            mean * (1 - mean),
        )
    score, (reliable, resolved, uncertain) = float(brier_scores(probabilities, labels).mean()), parts.tolist()
    return BrierParts(score, reliable, resolved, uncertain, score - (reliable - resolved + uncertain))


def accuracy_by_coverage(probabilities: Floats, labels: Integers, shares: Floats) -> Floats:
    """The accuracy on the most confident of the examples, for each of the `shares` of them in (0, 1]."""
    confidence, right = _top(probabilities, labels)
    means = right[np.argsort(-confidence, kind="stable")].cumsum() / np.arange(1, len(right) + 1)
    counts = np.maximum(np.ceil(shares * len(right) - 1e-9).astype(int), 1)
    return np.asarray(means[counts - 1], dtype=np.float64)


def softmax(logits: Floats) -> Floats:
    """Probabilities of the classes (n, classes) from their logits."""
    raised = np.exp(logits - logits.max(axis=1, keepdims=True))
    return np.asarray(raised / raised.sum(axis=1, keepdims=True), dtype=np.float64)


def scale(probabilities: Floats, temperature: float) -> Floats:
    """Softmax of the logits over the temperature, from the probabilities that the logits have at 1."""
    return softmax(np.log(np.clip(probabilities, SMALLEST_PROBABILITY, 1.0)) / temperature)


def fit_temperature(probabilities: Floats, labels: Integers) -> float:
    """The temperature of the least log-loss (arXiv 1706.04599), between 1/100 and 100.

    Fit it on examples that were not trained on; what it is used on must be others again.

    In 1 / T the log-loss is convex, and its slope is how far the expected logit is above that of the right class: the
    range in which that changes its sign is halved. Importing scipy.optimize takes longer than all else that shows a
    run.
    """
    logits = np.log(np.clip(probabilities, SMALLEST_PROBABILITY, 1.0))
    of_label = logits[np.arange(len(labels)), labels].mean()
    low, high = 1 / _LARGEST_TEMPERATURE, _LARGEST_TEMPERATURE
    for _ in range(_HALVINGS):
        middle = math.sqrt(low * high)
        too_sure = (softmax(logits / middle) * logits).sum(axis=1).mean() > of_label
        low, high = (middle, high) if too_sure else (low, middle)
    return math.sqrt(low * high)


def least_between(temperatures: Sequence[float], losses: Floats) -> float:
    """The temperature of the least loss, between those at which the `losses` are known.

    It is where the polynomial in log T that goes through all of them is least. As smooth as a log-loss is, that is
    within one percent unless the loss hardly depends on it.
    """
    logarithms = np.log(temperatures)
    through = np.polynomial.Polynomial.fit(logarithms, losses, len(losses) - 1)
    between = np.linspace(logarithms.min(), logarithms.max(), 10_001)
    return float(np.exp(between[through(between).argmin()]))


def _top(probabilities: Floats, labels: Integers) -> tuple[Floats, Floats]:
    """The probability of the most probable class, and whether it is the right one."""
    predicted = probabilities.argmax(axis=1)
    return probabilities[np.arange(len(labels)), predicted], (predicted == labels).astype(np.float64)


def _binned(confidence: Floats, right: Floats, bins: int) -> Bins:
    order, starts = np.argsort(confidence, kind="stable"), _starts(len(confidence), bins)
    count = np.diff([*starts, len(confidence)])
    means = [np.add.reduceat(values[order], starts) / count for values in (confidence, right)]
    return Bins(means[0], means[1], count.astype(np.int64))


def _starts(n: int, bins: int) -> Integers:
    """Where the bins of `n` sorted examples begin."""
    used = min(bins, n)
    return (np.arange(used) * n // used).astype(np.int64)


def _times_drawn(chosen: Integers) -> Integers:
    """How often each of n is among its row of `chosen` (resamples, n)."""
    resamples, n = chosen.shape
    places = chosen + n * np.arange(resamples)[:, None]
    return np.bincount(places.ravel(), minlength=resamples * n).reshape(resamples, n).astype(np.int64)


def _chunks(resamples: int, n: int) -> list[int]:
    size = max(1, min(resamples, _DRAWN_AT_A_TIME // n))
    return [min(size, resamples - begin) for begin in range(0, resamples, size)]
