"""What each metric is: how it is shown, and which way is better."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from lora_ggpo.statistics.intervals import Interval


@dataclass(frozen=True)
class Metric:
    """How a metric is shown: as `shown_as`, values times `scale`; `unit` is that of differences.

    `beside` names the metric to show with it.
    """

    label: str
    shown_as: str
    higher_is_better: bool
    scale: float
    unit: str
    digits: int
    beside: str | None = None

    @property
    def heading(self) -> str:
        """``accuracy, % ↑``: the arrow points to what is better."""
        return f"{self.shown_as} {'↑' if self.higher_is_better else '↓'}"

    def scaled(self, interval: Interval) -> Interval:
        """`interval` as it is shown."""
        return replace(interval, mean=interval.mean * self.scale, half=interval.half * self.scale)

    def amount(self, value: float, *, sign: bool = False) -> str:
        """A value with its unit: ``+1.25 points``."""
        return f"{value * self.scale:{'+' if sign else ''}.{self.digits}f}{self.unit}"


METRICS: Mapping[str, Metric] = {
    "accuracy": Metric("accuracy", "accuracy, %", True, 100.0, " points", 2, "log_loss"),
    "accuracy_norm": Metric("accuracy by character", "accuracy by character, %", True, 100.0, " points", 2, "accuracy"),
    "margin": Metric("reward margin", "reward margin", True, 1.0, "", 4, "accuracy"),
    "f1": Metric("F1", "F1, %", True, 100.0, " points", 2, "log_loss"),
    "mcc": Metric("MCC", "100 × MCC", True, 100.0, " points", 2, "log_loss"),
    "log_loss": Metric("log-loss", "log-loss", False, 1.0, "", 4, "accuracy"),
    "brier": Metric("Brier score", "Brier score", False, 1.0, "", 4, "accuracy"),
    "ece": Metric("calibration error", "calibration error, %", False, 100.0, " points", 2, "log_loss"),
    "scaled_log_loss": Metric("log-loss, scaled", "log-loss, scaled", False, 1.0, "", 4),
    "scaled_brier": Metric("Brier score, scaled", "Brier score, scaled", False, 1.0, "", 4),
    "scaled_ece": Metric("calibration error, scaled", "calibration error, scaled, %", False, 100.0, " points", 2),
    "pearson": Metric("Pearson", "100 × Pearson", True, 100.0, " points", 2, "mse"),
    "spearman": Metric("Spearman", "100 × Spearman", True, 100.0, " points", 2, "mse"),
    "mse": Metric("MSE", "mean squared error", False, 1.0, "", 4, "pearson"),
    "loss": Metric("loss", "loss", False, 1.0, "", 4),
    "token_accuracy": Metric("token accuracy", "token accuracy, %", True, 100.0, " points", 2, "loss"),
    "token_brier": Metric("token Brier score", "token Brier score", False, 1.0, "", 4, "loss"),
    "token_ece": Metric("token calibration error", "token calibration error, %", False, 100.0, " points", 2, "loss"),
    "scaled_loss": Metric("loss, scaled", "loss, scaled", False, 1.0, "", 4),
    "scaled_token_brier": Metric("token Brier score, scaled", "token Brier score, scaled", False, 1.0, "", 4),
    "scaled_token_ece": Metric(
        "token calibration error, scaled", "token calibration error, scaled, %", False, 100.0, " points", 2
    ),
    "forgetting": Metric("forgetting", "rise of the loss", False, 1.0, "", 4),
    "base_loss": Metric("loss before training", "loss before training", False, 1.0, "", 4),
    "perplexity": Metric("perplexity", "perplexity", False, 1.0, "", 3),
}

_PROBABILITIES = ("ece", "brier", "log_loss", "token_ece", "token_brier", "loss")
CALIBRATION = tuple(name for metric in _PROBABILITIES for name in (metric, f"scaled_{metric}"))
"""About probabilities; those that are scaled, after temperature scaling on the validation set."""

FORGETTING = ("forgetting", "loss", "base_loss")
"""Of general text: the rise of the loss by training, and the losses after and before it."""


def is_scaled(metric: str) -> bool:
    """Whether it is of a model with a temperature, which the weights alone do not have."""
    return metric == "temperature" or metric.startswith("scaled_")
