"""How far the probabilities of each method can be trusted, before and after temperature scaling."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from lora_ggpo.report.analysis import Key, MethodResult, SettingResult
from lora_ggpo.report.plots import Line, draw_lines, render
from lora_ggpo.report.tables import NOTHING, TextTable, format_p, format_score
from lora_ggpo.statistics.calibration import SHARES, Curves, calibration_curves
from lora_ggpo.statistics.metrics import CALIBRATION, METRICS
from lora_ggpo.training.calibrated import read_predictions
from lora_ggpo.training.folder import Run, finished_metrics
from lora_ggpo.workspace.files import write_bytes

CALIBRATION_CAPTIONS = {
    "reliability": (
        "Reliability on the test set: how often the most probable class is right, by its probability, in bins that "
        "hold equally many examples. On the line of right probabilities, neither is larger."
    ),
    "coverage": "Accuracy on the share of the test set of which the model is most confident.",
}
_RIGHT = "right probabilities"


def save_calibration_plot(run: Run, path: Path) -> None:
    """Draw reliability and accuracy by coverage of a finished run, a line a set; nothing without probabilities."""
    predictions = read_predictions(run.folder, finished_metrics(run)["evaluation"])
    curves = {name: [calibration_curves(*of)] for name, of in predictions.items()}
    if curves:
        reliability = {**{name: _reliability(of) for name, of in curves.items()}, _RIGHT: _diagonal(curves)}
        coverage = {name: _coverage(of) for name, of in curves.items()}
        panels = {"accuracy by confidence": reliability, "accuracy on the surest share of the examples": coverage}
        write_bytes(path, render(draw_lines(panels, "confidence, or share", "accuracy", columns=2), "png"))


def score_cells(method: MethodResult, key: Key) -> tuple[str, str, str]:
    """A score, its difference to the baseline, and the p-value of that."""
    score, metric = method.scores.get(key), METRICS[key[1]]
    if score is None:
        return NOTHING, NOTHING, NOTHING
    return format_score(score.mean, metric), format_score(score.difference, metric, sign=True), format_p(score.p)


def calibration_tables(setting: SettingResult) -> Iterator[TextTable]:
    """One for each set on which methods gave probabilities."""
    for name in setting.sets:
        found = [metric for metric in CALIBRATION if any((name, metric) in one.scores for one in setting.methods)]
        if {"ece", "token_ece"} & set(found):
            header = [cell for metric in found for cell in (METRICS[metric].heading, "difference", "p")]
            rows = tuple(
                (method.title, *(cell for metric in found for cell in score_cells(method, (name, metric))))
                for method in setting.methods
            )
            yield TextTable(f"{name}: calibration", ("method", *header), rows)


def draw_calibration(settings: Sequence[SettingResult], highlighted: Sequence[str]) -> dict[str, Figure]:
    """Reliability and accuracy by coverage on the test set; nothing where no method gave probabilities."""
    known = {
        setting.name: {one.title: one.calibration for one in setting.methods if one.calibration} for setting in settings
    }
    if not any(known.values()):
        return {}
    order = [*highlighted, _RIGHT]
    reliability = {
        name: {**{title: _reliability(of) for title, of in methods.items()}, _RIGHT: _diagonal(methods)}
        for name, methods in known.items()
    }
    coverage = {name: {title: _coverage(of) for title, of in methods.items()} for name, methods in known.items()}
    return {
        "reliability": draw_lines(reliability, "confidence", "accuracy", highlighted=order),
        "coverage": draw_lines(coverage, "share of the examples", "accuracy", highlighted=highlighted),
    }


def _reliability(curves: Sequence[Curves]) -> Line:
    """Of several seeds, whose bins need not be at the same places: each has that of their mean."""
    confidence = np.mean([one.bins.confidence for one in curves], axis=0)
    return Line(confidence.tolist(), np.stack([one.bins.accuracy for one in curves]))


def _diagonal(methods: Mapping[str, Sequence[Curves]]) -> Line:
    lowest = min((float(one.bins.confidence.min()) for of in methods.values() for one in of), default=0.0)
    return Line([lowest, 1.0], np.array([[lowest, 1.0]]))


def _coverage(curves: Sequence[Curves]) -> Line:
    return Line(SHARES.tolist(), np.stack([one.accuracies for one in curves]))
