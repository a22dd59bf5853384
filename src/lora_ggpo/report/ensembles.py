"""Averages of predictions, over seeds and over draws of noise, beside single runs and temperature scaling."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lora_ggpo.comparison.results import Results, Row
from lora_ggpo.report.analysis import MethodResult, SettingResult
from lora_ggpo.report.tables import NOTHING, TextTable, format_score
from lora_ggpo.statistics.intervals import Interval, is_finite, mean_interval
from lora_ggpo.statistics.metrics import METRICS

_METRICS = ("accuracy", "ece", "brier", "log_loss")
_SCALED = ("accuracy", *(f"scaled_{metric}" for metric in _METRICS[1:]))
"""Scaling changes no prediction, and so not the accuracy."""

Evaluation = Mapping[str, Mapping[str, Any]]
"""{metric: {"value", "se", "n"}} on one set."""


def ensemble_tables(setting: SettingResult, results: Results) -> Iterator[TextTable]:
    """One for each set on which seeds of a method were averaged: by whom, by what, and how good that is."""
    for name in setting.sets:
        together = {
            row["method"]: row
            for row in results.ensembles
            if row["setting"] == setting.name and name in row["evaluation"]
        }
        if together:
            header = ("method", "predicted by", *(METRICS[metric].heading for metric in _METRICS))
            rows = [
                (method.title, *row)
                for method in setting.methods
                for row in _rows(_runs(method, setting, results), name, together.get(method.name))
            ]
            title = f"{name}: averages of predictions (± of an ensemble: standard error over the examples)"
            yield TextTable(title, header, tuple(rows))


def _runs(method: MethodResult, setting: SettingResult, results: Results) -> list[Row]:
    return [run for run in results.runs if (run["setting"], run["method"]) == (setting.name, method.name)]


def _rows(runs: Sequence[Row], name: str, together: Row | None) -> Iterator[tuple[str, ...]]:
    single = [run["evaluation"][name] for run in runs if name in run["evaluation"]]
    yield ("single runs", *_means(single, _METRICS))
    yield ("single runs, scaled", *_means(single, _SCALED))
    draws: dict[str, list[Evaluation]] = {}
    for run in runs:
        for drawn in run.get("draws", ()):
            if name in drawn["evaluation"]:
                draws.setdefault(_noise(drawn["draws"]), []).append(drawn["evaluation"][name])
    for label, found in draws.items():
        yield (label, *_means(found, _METRICS))
    if together:
        seeds = f"ensemble of {len(together['seeds'])} seeds"
        yield (seeds, *_values(together["evaluation"][name], _METRICS))
        yield (f"{seeds}, scaled", *_values(together["evaluation"][name], _SCALED))


def _noise(how: Row) -> str:
    """``10 draws at sigma 0.1``; a tolerated noise has a sigma of its own in every run."""
    tolerance = how["tolerance"]
    size = (
        f"at sigma {how['sigma']:.3g}"
        if tolerance is None
        else f"that make nothing worse by more than {tolerance:g} of it"
    )
    return f"{how['count']} draws {size}"


def _means(evaluations: Sequence[Evaluation], metrics: Sequence[str]) -> list[str]:
    """Over seeds, with t intervals."""
    found = {metric: [of[metric]["value"] for of in evaluations if metric in of] for metric in metrics}
    known = {metric: [value for value in values if is_finite(value)] for metric, values in found.items()}
    return [
        format_score(mean_interval(values), METRICS[metric]) if values else NOTHING for metric, values in known.items()
    ]


def _values(evaluation: Evaluation, metrics: Sequence[str]) -> list[str]:
    """Of one prediction, with standard errors over the examples."""

    def cell(metric: str, found: Mapping[str, Any]) -> str:
        se = found["se"]
        return format_score(Interval(found["value"], math.nan if se is None else se, 1), METRICS[metric])

    return [cell(metric, evaluation[metric]) if metric in evaluation else NOTHING for metric in metrics]
