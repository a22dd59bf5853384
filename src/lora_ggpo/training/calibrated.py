"""How far the probabilities of a finished run can be trusted, from the predictions that it kept."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lora_ggpo.statistics import calibration
from lora_ggpo.statistics.calibration import Floats, Integers
from lora_ggpo.tasks.classification import calibration_metrics
from lora_ggpo.tasks.metrics import Measured
from lora_ggpo.training.scorer import file_name
from lora_ggpo.workspace.files import read_json_lines

SHARES = np.arange(1, 21) / 20
"""Of the most confident predictions, on which accuracies are given."""

_ROUNDED_AWAY = 5e-7  # earlier releases kept six digits behind the point


@dataclass(frozen=True)
class Calibration:
    """Of one set.

    Attributes:
        metrics: log_loss, brier with two of its parts, and ece; after temperature scaling each again (``scaled_ece``),
            and the temperature, which is fitted on the validation set.
        bins: Mean confidence, accuracy and count of bins of growing confidence.
        accuracies: On each of the `SHARES`.
    """

    metrics: dict[str, Measured]
    bins: calibration.Bins
    accuracies: Floats

    def curves(self) -> dict[str, Any]:
        """What is drawn, as JSON holds it."""
        bins = {key: np.round(values, 5).tolist() for key, values in vars(self.bins).items()}
        return {"bins": bins, "accuracies": np.round(self.accuracies, 5).tolist()}


def run_calibration(folder: Path, sets: Mapping[str, Any]) -> dict[str, Calibration]:
    """That of the run in `folder` on those of its `sets` whose predictions have probabilities."""
    predictions = {name: found for name in sets if (found := _probabilities(folder, name))}
    known = predictions.get("validation")
    temperature = calibration.fit_temperature(*known) if known else None
    return {name: _of_set(*found, None if name == "validation" else temperature) for name, found in predictions.items()}


def _of_set(probabilities: Floats, labels: Integers, temperature: float | None) -> Calibration:
    parts, n = calibration.brier_parts(probabilities, labels), len(labels)
    metrics = {
        **calibration_metrics(probabilities, labels),
        "reliability": Measured(parts.reliability, math.nan, n),
        "resolution": Measured(parts.resolution, math.nan, n),
    }
    if temperature is not None:
        scaled = calibration_metrics(calibration.scale(probabilities, temperature), labels)
        metrics |= {f"scaled_{name}": value for name, value in scaled.items()}
        metrics |= {"temperature": Measured(temperature, math.nan, n)}
    return Calibration(
        metrics,
        calibration.reliability(probabilities, labels),
        calibration.accuracy_by_coverage(probabilities, labels, SHARES),
    )


def _probabilities(folder: Path, name: str) -> tuple[Floats, Integers] | None:
    rows = read_json_lines(folder / "predictions" / f"{file_name(name)}.jsonl")
    if not rows or "probabilities" not in rows[0]:
        return None
    kept = np.array([row["probabilities"] for row in rows], dtype=np.float64)
    kept = np.where(kept == 0, _ROUNDED_AWAY, kept)
    return kept / kept.sum(axis=1, keepdims=True), np.array([row["label"] for row in rows], dtype=np.int64)
