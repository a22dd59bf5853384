"""The figures of a study: curves over its axes and over training steps, and heat maps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from lora_ggpo.comparison.axes import setting_name
from lora_ggpo.report.descents import QUANTITIES, STEP, TRAIN, VALIDATION, Curve, StudyResult, set_name
from lora_ggpo.report.plots import COLOURS, Cells, Line, draw_heat_maps, draw_lines
from lora_ggpo.statistics.descent import FITTED_ERROR, FITTED_LOSS

_LINES = len(COLOURS) + 2
"""Lines that a panel can hold and still be read."""


def study_figures(found: StudyResult) -> dict[str, Figure]:
    """The figures by name: curves over each axis and over training steps, and heat maps."""
    figures = {}
    for axis in (*found.numeric, STEP):
        curves = [curve for curve in found.curves if curve.axis == axis]
        if curves:
            figures["steps" if axis == STEP else f"axis-{found.axis_name(axis)}"] = _draw_curves(axis, curves, found)
    for name, make, data, axes in (
        ("heat-steps", _step_maps, VALIDATION, (*found.numeric[:1], STEP)),
        ("heat-axes", _axis_maps, found.sets[0], found.numeric[:2]),
    ):
        maps = make(found) if len(axes) == 2 else {}
        if maps:
            rows, columns = (_axis_label(axis, found) for axis in axes)
            figures[name] = draw_heat_maps(maps, columns, rows, f"{data} {QUANTITIES[found.best].shown_as}")
    return figures


def _axis_label(axis: str, found: StudyResult) -> str:
    if axis != STEP:
        return found.axis_name(axis)
    epochs = f" ({found.steps_per_epoch:g} to an epoch)" if found.steps_per_epoch else ""
    return f"optimizer step{epochs}"


def _draw_curves(axis: str, curves: Sequence[Curve], found: StudyResult) -> Figure:
    """A row of panels for each group of lines and, over an axis of settings, each quantity."""
    kinds = list(dict.fromkeys((curve.data, curve.quantity) for curve in curves))
    if axis != STEP:
        kinds.sort(key=lambda kind: kind[1])  # a row for each quantity, one set beside the other
    columns = len(kinds) if axis == STEP else len({data for data, _ in kinds})
    panels: dict[str, dict[str, Line]] = {}
    for group, lines in _groups(curves, found).items():
        for data, quantity in kinds:
            of_kind = {label: one for label, one in lines if (one.data, one.quantity) == (data, quantity)}
            title = f"{set_name(data)} {QUANTITIES[quantity].shown_as}{f', {group}' if group else ''}"
            panels[title] = {label: _line(one) for label, one in of_kind.items()}
    ticks = () if axis == STEP else tuple(sorted({place for curve in curves for place in curve.places}))
    return draw_lines(panels, _axis_label(axis, found), columns=columns, ticks=ticks)


def _line(curve: Curve) -> Line:
    fitted = () if curve.threshold is None else (curve.threshold,)
    turns = curve.rises if curve.found and curve.rises else ()
    return Line(curve.places, curve.values * curve.metric.scale, fitted, turns)


def _groups(curves: Sequence[Curve], found: StudyResult) -> dict[str, list[tuple[str, Curve]]]:
    """Labelled lines by the panels they share: all of them if they are few.

    Otherwise what tells the lines of a panel apart is the method or one axis: the one of the most values that a panel
    can hold.
    """
    factors = [{"": curve.method, **curve.fixed} for curve in curves]
    counts = {key: len({factor[key] for factor in factors}) for key in factors[0]}
    varied = [key for key, count in counts.items() if count > 1]
    of_lines = varied
    if math.prod(counts.values()) > _LINES:
        fitting = [key for key in varied if counts[key] <= _LINES]
        of_lines = [max(fitting, key=counts.__getitem__) if fitting else min(varied, key=counts.__getitem__)]

    groups: dict[str, list[tuple[str, Curve]]] = {}
    for curve, factor in zip(curves, factors, strict=True):
        label, group = (
            _title(factor[""] if "" in keys else "", {key: factor[key] for key in keys if key}, found)
            for keys in (of_lines or [""], [key for key in varied if key not in of_lines])
        )
        groups.setdefault(group, []).append((label, curve))
    return groups


def _step_maps(found: StudyResult) -> dict[str, Cells]:
    """The first numeric axis over training steps, one map for each method and the values of the other axes."""
    axis, maps = found.numeric[0], dict[str, dict[tuple[float, float], tuple[float, bool]]]()
    for curve in found.curves:
        if (curve.axis, curve.data, curve.quantity) == (STEP, VALIDATION, found.best):
            cells = maps.setdefault(_title(curve.method, curve.fixed, found, (axis,)), {})
            means = (curve.values.mean(axis=0) * curve.metric.scale).tolist()
            for step, mean in zip(curve.places, means, strict=True):
                fitted = curve.threshold is not None and step >= curve.threshold
                cells[curve.fixed[axis], step] = mean, fitted
    return dict(maps)


def _axis_maps(found: StudyResult) -> dict[str, Cells]:
    """The final scores over the first two numeric axes."""
    first, second = found.numeric[:2]
    limit = FITTED_ERROR if found.best == "error" else FITTED_LOSS
    maps = dict[str, dict[tuple[float, float], tuple[float, bool]]]()
    for (setting, method), scores in found.scores.items():
        chosen = found.settings[setting]
        value, train = (_mean_quantity(scores, data, found) for data in (found.sets[0], TRAIN))
        if value is not None:
            cells = maps.setdefault(_title(method, chosen, found, (first, second)), {})
            fitted = train is not None and train <= limit
            cells[chosen[first], chosen[second]] = value * QUANTITIES[found.best].scale, fitted
    return dict(maps)


def _mean_quantity(scores: Mapping[tuple[str, str], list[float]], data: str, found: StudyResult) -> float | None:
    quantity = found.best
    values = scores.get((data, found.quantities[quantity]))
    if not values:
        return None
    mean = sum(values) / len(values)
    return 1 - mean if quantity == "error" else mean


def _title(method: str, values: Mapping[str, Any], found: StudyResult, without: Sequence[str] = ()) -> str:
    rest = {key: value for key, value in values.items() if key not in without}
    return ", ".join(filter(None, [method, setting_name(rest, found.axes)]))


def caption(name: str) -> str:
    """What the figure of this name shows."""
    if name.startswith("heat"):
        where = "during training, on at most 500 validation rows" if name == "heat-steps" else "after training"
        return f"Mean over seeds, {where}. A dot: the training data is fitted."
    lines = (
        "Mean over seeds with its 95 % t interval. A dashed line marks where the training data begins, or ceases, to "
        "be fitted; dotted lines where a double descent that the seeds confirm begins and ends to rise."
    )
    if name != "steps":
        return f"After training, over {name.removeprefix('axis-')}. {lines}"
    return f"Over training steps; the training loss, in windows, is as the method has it: under its noise. {lines}"
