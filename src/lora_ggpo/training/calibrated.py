"""How far the probabilities of a finished run can be trusted, from the predictions that it kept."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from lora_ggpo.statistics.calibration import brier_parts, calibration_metrics, fit_temperature, scale
from lora_ggpo.statistics.measured import Floats, Integers, Measured, Scores
from lora_ggpo.workspace.files import file_name, read_json_lines

Predictions = tuple[Floats, Integers]
"""Class probabilities (n, classes) of the rows of a set, and their labels (n,)."""

_ROUNDED_AWAY = 5e-7  # earlier releases kept six digits behind the point


def read_predictions(folder: Path, sets: Iterable[str]) -> dict[str, Predictions]:
    """Those of the run in `folder` on those of its `sets` on which it kept probabilities."""
    return {name: found for name in sets if (found := _probabilities(folder / "predictions", name))}


def mean_predictions(runs: Sequence[dict[str, Predictions]]) -> dict[str, Predictions]:
    """The mean over `runs` of their probabilities, a deep ensemble (arXiv 1612.01474).

    A set that not all of them have predicted, or of which they have predicted different rows, is left out.
    """
    first, *others = runs
    return {
        name: (np.mean([run[name][0] for run in runs], axis=0), labels)
        for name, (_, labels) in first.items()
        if all(name in run and np.array_equal(run[name][1], labels) for run in others)
    }


def calibration_scores(predictions: dict[str, Predictions]) -> Scores:
    """Of each set log_loss, brier with two of its parts, and ece.

    Where there is a validation set the temperature is fitted on it; the others have each again after temperature
    scaling (``scaled_ece``), and the temperature.
    """
    known = predictions.get("validation")
    temperature = fit_temperature(*known) if known else None
    return {name: _of_set(*found, None if name == "validation" else temperature) for name, found in predictions.items()}


def _of_set(probabilities: Floats, labels: Integers, temperature: float | None) -> dict[str, Measured]:
    parts, n = brier_parts(probabilities, labels), len(labels)
    metrics = {
        **calibration_metrics(probabilities, labels),
        "reliability": Measured(parts.reliability, math.nan, n),
        "resolution": Measured(parts.resolution, math.nan, n),
    }
    if temperature is not None:
        scaled = calibration_metrics(scale(probabilities, temperature), labels)
        metrics |= {f"scaled_{name}": value for name, value in scaled.items()}
        metrics |= {"temperature": Measured(temperature, math.nan, n)}
    return metrics


def _probabilities(folder: Path, name: str) -> Predictions | None:
    rows = read_json_lines(folder / f"{file_name(name)}.jsonl")
    if not rows or "probabilities" not in rows[0]:
        return None
    kept = np.array([row["probabilities"] for row in rows], dtype=np.float64)
    kept = np.where(kept == 0, _ROUNDED_AWAY, kept)
    return kept / kept.sum(axis=1, keepdims=True), np.array([row["label"] for row in rows], dtype=np.int64)
