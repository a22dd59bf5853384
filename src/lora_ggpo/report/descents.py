"""What the results of a study say: curves over its axes and over training steps, and the double descent of each."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from lora_ggpo.comparison.axes import axes_of, setting_name, short_names
from lora_ggpo.comparison.results import Results, Row
from lora_ggpo.report.analysis import TRAINED, compared_sets
from lora_ggpo.statistics.descent import (
    FITTED_ERROR,
    FITTED_LOSS,
    Descent,
    average_windows,
    double_descent,
    interpolation_threshold,
)
from lora_ggpo.statistics.intervals import LEVEL, holm, seed_curves
from lora_ggpo.statistics.metrics import METRICS, Metric

STEP = "step"
"""The axis that needs no runs of its own."""

TRAIN, VALIDATION = "train", "validation"

QUANTITIES: Mapping[str, Metric] = {
    "error": Metric("error", "error, %", False, 100.0, " points", 2),
    "loss": METRICS["loss"],
}
"""What curves show, and how."""

_QUANTITIES: Mapping[str, Mapping[str, str]] = {"loss": {"loss": "loss"}, "pearson": {"loss": "mse"}}
"""The metrics behind them, for tasks without classes by the metric that these are compared by."""

Array = NDArray[np.float64]
Group = tuple[str, str]
"""Setting and title of a method."""


@dataclass(frozen=True)
class Curve:
    """A quantity of one method over one axis, all else being the same.

    Attributes:
        axis: Dotted key of a setting, or `STEP`.
        method: Title.
        fixed: The values of the other axes.
        others: These as a name.
        data: Name of the set; `TRAIN` over steps is the loss that training logged, in windows.
        quantity: ``loss``, or ``error``: the share of rows with a wrong prediction.
        places: Values of the axis, growing.
        seeds: Those that have a value at all places.
        values: (seeds, places).
        threshold: Where the training data begins, or ceases, to be fitted; None where it never is, or is not known.
        descent: None for the scores of training rows, which are no curve to look for one in.
        p: The descent's p-value, Holm-adjusted over the curves of its axis, set and quantity; nan where there is none.
    """

    axis: str
    method: str
    fixed: Mapping[str, Any]
    others: str
    data: str
    quantity: str
    places: tuple[float, ...]
    seeds: tuple[int, ...]
    values: Array
    threshold: float | None = None
    descent: Descent | None = None
    p: float = math.nan

    @property
    def metric(self) -> Metric:
        """How its quantity is shown."""
        return QUANTITIES[self.quantity]

    @property
    def rises(self) -> tuple[float, float] | None:
        """From which place to which the mean rises between two descents; None where it does not."""
        if self.descent is None or self.descent.positions is None:
            return None
        _, start, end, _ = self.descent.positions
        return self.places[start], self.places[end]

    @property
    def verdict(self) -> str:
        """Whether there is a double descent: the mean has one, and the seeds confirm it."""
        if len(self.places) < 4:
            return "too few points"
        if not self.rises:
            return "none"
        if math.isnan(self.p):
            return "untested"
        return "double descent" if self.found else "not shown"

    @property
    def found(self) -> bool:
        """Whether the mean rises between two descents, and the seeds confirm it."""
        return self.rises is not None and self.p < LEVEL


@dataclass(frozen=True)
class StudyResult:
    """A study.

    Attributes:
        axes: The values of each axis, as they were given, by its key.
        numeric: The axes of two numbers or more, which have curves.
        settings: Names of all combinations of the values.
        methods: Titles.
        sets: What methods are scored on: the test sets, or the validation set where these were left alone.
        quantities: The metric of run folders behind each of `QUANTITIES`; ``error`` where the task has labels.
        curves: Over `numeric` and `STEP`.
        scores: Values over the seeds of each (setting, method), by (set, metric), `TRAIN` being all of its rows.
        failed: {seed: why} of the runs that failed, by (setting, method).
        steps_per_epoch: None where settings differ in it.
    """

    axes: Mapping[str, Sequence[Any]]
    numeric: tuple[str, ...]
    settings: Mapping[str, Mapping[str, Any]]
    methods: tuple[str, ...]
    sets: tuple[str, ...]
    quantities: Mapping[str, str]
    curves: tuple[Curve, ...]
    scores: Mapping[Group, Mapping[tuple[str, str], list[float]]]
    failed: Mapping[Group, Mapping[int, str]]
    steps_per_epoch: float | None

    @property
    def best(self) -> str:
        """The quantity to show where there is room for one."""
        return next(iter(self.quantities))

    def axis_name(self, axis: str) -> str:
        """An axis as reports name it."""
        return "training steps" if axis == STEP else short_names(self.axes)[axis]


def set_name(data: str) -> str:
    """A set as reports name it."""
    return "training" if data == TRAIN else data


def study_results(results: Results) -> StudyResult:
    """Find the curves of a study and score them."""
    settings: Mapping[str, Mapping[str, Any]] = results.facts["settings"]
    axes = axes_of(settings.values())
    numeric = tuple(key for key, values in axes.items() if len(values) > 1 and all(map(_is_number, values)))
    quantities = _QUANTITIES.get(results.facts["metric"], {"error": "accuracy", "loss": "log_loss"})
    titles = {run["method"]: run["title"] for run in results.runs}
    runs: dict[Group, list[Row]] = {}
    for run in results.runs:
        runs.setdefault((run["setting"], run["title"]), []).append(run)
    sets = tuple(compared_sets(results.runs)) or (VALIDATION,)
    curves: list[Curve] = []
    for key in numeric:
        for others, title in itertools.product(_others(settings, key), titles.values()):
            curves += _over_axis(key, others, title, settings, runs, sets, quantities)
    for setting, method in itertools.product(settings, titles):
        logs = results.logs(setting, method)
        curves += _over_steps((setting, titles[method]), settings[setting], logs, quantities)
    trained = any(name in run["evaluation"] for name in TRAINED for run in results.runs)
    scored = [*(name for name in sets if any(name in run["evaluation"] for run in results.runs)), *[TRAIN] * trained]
    return StudyResult(
        axes=axes,
        numeric=numeric,
        settings=settings,
        methods=tuple(titles.values()),
        sets=sets,
        quantities=quantities,
        curves=tuple(_adjust_p_values(curves)),
        scores={
            group: {
                (name, metric): list(_by_seed(of_group, name, metric).values())
                for name in scored
                for metric in quantities.values()
            }
            for group, of_group in runs.items()
        },
        failed={group: {run["seed"]: run["failed"] for run in of if run["failed"]} for group, of in runs.items()},
        steps_per_epoch=_steps_per_epoch(results.curves),
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _others(settings: Mapping[str, Mapping[str, Any]], key: str) -> list[dict[str, Any]]:
    """The different combinations of the values of all axes but `key`."""
    found = [{other: value for other, value in values.items() if other != key} for values in settings.values()]
    return [values for index, values in enumerate(found) if values not in found[:index]]


def _over_axis(
    key: str,
    others: Mapping[str, Any],
    method: str,
    settings: Mapping[str, Mapping[str, Any]],
    runs: Mapping[Group, Sequence[Row]],
    sets: Sequence[str],
    quantities: Mapping[str, str],
) -> list[Curve]:
    """The final scores of one method over one axis; they share the interpolation threshold of the training error."""
    chosen = {name: values for name, values in settings.items() if {**values, **others} == values}
    columns = {float(values[key]): runs.get((name, method), ()) for name, values in chosen.items()}
    name = setting_name(others, next(iter(settings.values())))
    found = []
    for data, (quantity, metric) in itertools.product((TRAIN, *sets), quantities.items()):
        by_place = {place: _by_seed(columns[place], data, metric) for place in sorted(columns)}
        table = pd.DataFrame({place: pd.Series(of) for place, of in by_place.items() if of}).dropna().sort_index()
        if table.empty:
            continue
        values = 1 - table.to_numpy() if quantity == "error" else table.to_numpy()
        descent = None if data == TRAIN else double_descent(values)
        places, seeds = tuple(table.columns), tuple(table.index)
        found.append(Curve(key, method, others, name, data, quantity, places, seeds, values, descent=descent))
    fitted = [curve for curve in found if curve.data == TRAIN]
    threshold = _threshold(fitted[0]) if fitted else None  # the error where there is one
    return [replace(curve, threshold=threshold) for curve in found]


def _over_steps(
    group: Group, fixed: Mapping[str, Any], logs: Mapping[int, Sequence[Row]], quantities: Mapping[str, str]
) -> list[Curve]:
    """Training loss and validation scores of one method in one setting, at the steps that all seeds logged."""
    name, method = group
    keys = {(TRAIN, "loss"): "loss"} | {(VALIDATION, of): f"validation/{metric}" for of, metric in quantities.items()}
    found = []
    for (data, quantity), key in keys.items():
        steps, values = seed_curves(list(logs.values()), key)
        if not steps:
            continue
        places, values = average_windows(steps, values) if data == TRAIN else (tuple(map(float, steps)), values)
        values, seeds = 1 - values if quantity == "error" else values, tuple(logs)
        descent = double_descent(values)
        found.append(Curve(STEP, method, fixed, name, data, quantity, places, seeds, values, descent=descent))
    threshold = _threshold(found[0]) if found and found[0].data == TRAIN else None
    return [replace(curve, threshold=threshold) for curve in found]


def _threshold(fitted: Curve) -> float | None:
    level = FITTED_ERROR if fitted.quantity == "error" else FITTED_LOSS
    return interpolation_threshold(fitted.places, fitted.values, level)


def _by_seed(runs: Sequence[Row], name: str, metric: str) -> dict[int, float]:
    """Values of a metric that is a mean over rows; for `TRAIN`, over clean and noisy ones together."""
    found = {}
    for run in runs:
        parts = [run["evaluation"].get(part, {}).get(metric) for part in (TRAINED if name == TRAIN else (name,))]
        parts = [part for part in parts if part and part["value"] is not None]
        rows = sum(part["n"] for part in parts)
        value = sum(part["value"] * part["n"] for part in parts) / rows if rows else math.nan
        if math.isfinite(value):
            found[run["seed"]] = value
    return found


def _adjust_p_values(curves: Sequence[Curve]) -> list[Curve]:
    p_values = pd.Series([math.nan if one.descent is None else one.descent.p for one in curves], dtype=float)
    families = pd.Series([f"{curve.axis}/{curve.data}/{curve.quantity}" for curve in curves], dtype=str)
    adjusted = p_values.groupby(families).transform(lambda of: np.array(holm(of.tolist())))
    return [replace(curve, p=p) for curve, p in zip(curves, adjusted, strict=True)]


def _steps_per_epoch(curves: Sequence[Row]) -> float | None:
    last = [max(row["rows"], key=lambda logged: logged["step"]) for row in curves if row["rows"]]
    found = {round(row["step"] / row["epoch"], 1) for row in last if row.get("epoch")}
    return found.pop() if len(found) == 1 else None
