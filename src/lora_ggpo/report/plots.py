"""Figures. They are drawn without pyplot, so no display is needed and no global state is touched."""

from __future__ import annotations

import io
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from lora_ggpo.statistics.intervals import Interval, mean_interval, pareto_front, seed_curves
from lora_ggpo.workspace.files import write_bytes

Log = Sequence[Mapping[str, Any]]
"""Lines of log.jsonl."""

LOSS, SHARE = "loss", "ggpo/gradient_share"
_VALIDATION_KEYS = ("validation/log_loss", "validation/loss", "validation/mse")
_STYLE = Path(__file__).with_name("figures.mplstyle")
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # those of the style
_GREY = "#9a9a9a"
_LINES = tuple(itertools.product(("-", "--", ":"), COLOURS))
_NO_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))


# --- lines ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Line:
    """A curve of several seeds, (seeds, places), and places to mark by dashed and by dotted vertical lines."""

    places: Sequence[float]
    values: NDArray[np.float64]
    dashed: Sequence[float] = ()
    dotted: Sequence[float] = ()


Panels = Mapping[str, Mapping[str, Line]]
"""Lines by the title of their panel and by label; a label has one style in all panels."""


@rc_context(fname=_STYLE)
def draw_lines(
    panels: Panels,
    x_label: str,
    y_label: str = "",
    *,
    columns: int = 3,
    highlighted: Sequence[str] = (),
    ticks: Sequence[float] = (),
    log_x: bool = False,
    log_y: bool = False,
) -> Figure:
    """One panel for each title: means over seeds with their 95 % t intervals.

    Args:
        columns: Panels side by side.
        highlighted: Labels in colour, the others are thin and grey; none is all of them.
        ticks: Values of the x axis, none below 0; those of very different sizes are put on a logarithmic one, with 0
            at its left end.
        log_y: Logarithmic y axis, from a millionth of the highest value on.
    """
    figure, axes = _panels(len(panels), columns, (4.4, 2.7))
    labels = dict.fromkeys(label for lines in panels.values() for label in lines)
    styles = dict(zip(highlighted or labels, itertools.cycle(_LINES), strict=False))
    above = min((tick for tick in ticks if tick > 0), default=0.0)
    log_x = log_x or bool(above and min(ticks) >= 0 and max(ticks) >= 8 * above)
    for panel, (title, lines) in zip(axes, panels.items(), strict=True):
        for label, line in lines.items():
            _draw_line(panel, line, label, styles.get(label))
        if log_x and 0 in ticks:
            panel.set_xscale("symlog", linthresh=above)
        elif log_x:
            panel.set_xscale("log")
        if ticks:
            panel.set_xticks(ticks, [f"{tick:g}" for tick in ticks], minor=False)
            panel.set_xticks([], minor=True)
        if log_y:
            highest = max((float(line.values.max()) for line in lines.values()), default=1.0)
            panel.set_yscale("log")
            panel.set_ylim(1e-6 * highest, 2 * highest)
        panel.set(title=title, xlabel=x_label, ylabel=y_label)
    _legend(figure, order=highlighted)
    return figure


def _draw_line(panel: Axes, line: Line, label: str, style: tuple[str, str] | None) -> None:
    means = line.values.mean(axis=0)
    if style is None:
        panel.plot(line.places, means, color=_GREY, linewidth=0.8, alpha=0.7, zorder=1, label="other methods")
        return
    dashes, colour = style
    marker = "o" if len(line.places) < 30 else ""
    panel.plot(line.places, means, color=colour, linestyle=dashes, marker=marker, label=label)
    if len(line.values) > 1:
        halves = np.array([mean_interval(of_place.tolist()).half for of_place in line.values.T])
        panel.fill_between(line.places, means - halves, means + halves, color=colour, alpha=0.15, linewidth=0)
    for form, marks in (("--", line.dashed), (":", line.dotted)):
        for place in marks:
            panel.axvline(place, color=colour, linestyle=form, linewidth=1.0)


def save_training_plot(log: Log, path: Path) -> None:
    """Draw the loss of a run, with validation if it was measured, and the noise's gradient share if there is one."""
    panels = {"loss": _curves({"training": [log]}, LOSS)}
    for key in _VALIDATION_KEYS:
        panels["loss"] |= _curves({"validation": [log]}, key)
    share = _curves({"gradient share": [log]}, SHARE)
    if share:
        panels["share of the gradient term in the noise variance"] = share
    figure = draw_lines(panels, "optimizer step", columns=2)
    for line in share.values():
        positive = line.values[line.values > 0]
        if len(positive) and positive.max() > 10 * positive.min():
            figure.axes[1].set_yscale("log", nonpositive="mask")
        else:
            figure.axes[1].set_ylim(0, 1)
    write_bytes(path, render(figure, "png"))


def draw_learning_curves(logs: Mapping[str, Mapping[str, Sequence[Log]]], highlighted: Sequence[str]) -> Figure:
    """Training and validation loss over steps, one row of panels a setting.

    Args:
        logs: {setting: {method: logs of its seeds}}.
        highlighted: Methods in colour, at most as many as there are colours.
    """
    panels: dict[str, dict[str, Line]] = {}
    for setting, methods in logs.items():
        for title, keys in (("training", (LOSS,)), ("validation", _VALIDATION_KEYS)):
            lines = panels.setdefault(f"{title} loss{f', {setting}' if setting else ''}", {})
            for key in keys:
                lines |= _curves(methods, key)
    return draw_lines(panels, "optimizer step", columns=2, highlighted=highlighted)


def _curves(logs: Mapping[str, Sequence[Log]], key: str) -> dict[str, Line]:
    """By label what the logs of its seeds have under `key`; without those that have nothing."""
    found = {label: seed_curves(of_label, key) for label, of_label in logs.items()}
    marked = {label: _kept(of_label) if key in _VALIDATION_KEYS else () for label, of_label in logs.items()}
    return {label: Line(steps, values, marked[label]) for label, (steps, values) in found.items() if steps}


def _kept(logs: Sequence[Log]) -> Sequence[float]:
    """The step of which the weights were kept, in the median over the seeds; none where the last ones were."""
    best = [[row["step"] for row in log if row.get("best")] for log in logs]
    return [float(np.median([steps[-1] for steps in best if steps]))] if any(best) else []


# --- a comparison --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tradeoff:
    """What a method scores at what cost; the costs, in units of the baseline's, are None where not measured."""

    score: Interval
    time: float | None
    memory: float | None


@rc_context(fname=_STYLE)
def draw_forest(differences: Mapping[str, Mapping[str, Mapping[str, Interval]]], axis: str) -> Figure:
    """Differences to the baseline with their intervals, one panel a setting.

    Args:
        differences: {setting: {method: {set: difference}}}, in the unit that `axis` names.
    """
    rows = [max(len(methods), 1) for methods in differences.values()]
    sets = list(dict.fromkeys(name for of in differences.values() for found in of.values() for name in found))
    figure = Figure(figsize=(7.2, 1.1 + sum(0.45 + 0.3 * count for count in rows)))
    panels = figure.subplots(len(rows), 1, sharex=True, squeeze=False, height_ratios=[1 + count for count in rows])
    for panel, (setting, methods) in zip(panels[:, 0], differences.items(), strict=True):
        panel.axvline(0, color="black", linewidth=0.8)
        for place, name in enumerate(sets):
            shift = (place - (len(sets) - 1) / 2) * 0.18
            points = [(row + shift, found[name]) for row, found in enumerate(methods.values()) if name in found]
            means, halves = [d.mean for _, d in points], [_known(d.half) for _, d in points]
            style: Any = {"color": f"C{place}", "fmt": "o", "ms": 4, "lw": 1.4, "label": name}
            panel.errorbar(means, [y for y, _ in points], xerr=halves, **style)
        panel.set_yticks(range(len(methods)), list(methods))
        panel.set(title=setting, ylim=(max(len(methods), 1) - 0.5, -0.5))
        panel.grid(axis="y", visible=False)
        panel.grid(axis="x", visible=True)
    panels[-1, 0].set_xlabel(axis)
    _legend(figure)
    return figure


@rc_context(fname=_STYLE)
def draw_tradeoffs(
    points: Mapping[str, Mapping[str, Tradeoff]], highlighted: Sequence[str], axis: str, *, higher_is_better: bool
) -> Figure:
    """Score over step time and, where it was measured, over peak memory, with the Pareto fronts of the mean scores.

    Args:
        points: {setting: {method: ...}}, scores in the unit that `axis` names.
        highlighted: Methods in colour.
    """
    costs = {"time": "time of a step, baseline = 1", "memory": "peak memory, baseline = 1"}
    if not any(point.memory for methods in points.values() for point in methods.values()):
        del costs["memory"]
    figure, axes = _panels(len(costs) * len(points), len(costs), (4.6, 3.2))
    for panel, ((setting, methods), cost) in zip(axes, itertools.product(points.items(), costs), strict=True):
        known = {name: (getattr(point, cost), point.score) for name, point in methods.items()}
        found = {name: (Interval(x, math.nan, 1), score) for name, (x, score) in known.items() if x}
        _front(panel, found, highlighted, higher_is_better)
        panel.set(title=setting, xlabel=costs[cost], ylabel=axis if cost == "time" else "")
    _legend(figure, order=highlighted)
    return figure


@rc_context(fname=_STYLE)
def draw_prices(
    points: Mapping[str, Mapping[str, tuple[Interval, Interval]]],
    highlighted: Sequence[str],
    x_label: str,
    y_label: str,
    *,
    higher_is_better: bool,
) -> Figure:
    """Score over what it costs, both with their intervals, and the Pareto front of the means, one panel a setting.

    Args:
        points: {setting: {method: (cost, score)}}.
        highlighted: Methods in colour.
    """
    figure, axes = _panels(len(points), 2, (4.6, 3.2))
    for panel, (setting, methods) in zip(axes, points.items(), strict=True):
        _front(panel, methods, highlighted, higher_is_better)
        panel.set(title=setting, xlabel=x_label, ylabel=y_label)
    _legend(figure, order=highlighted)
    return figure


def _front(
    axes: Axes, points: Mapping[str, tuple[Interval, Interval]], highlighted: Sequence[str], higher_is_better: bool
) -> None:
    sign, names = 1 if higher_is_better else -1, list(points)
    costs, scores = [x.mean for x, _ in points.values()], [score.mean for _, score in points.values()]
    front = pareto_front(costs, [sign * score for score in scores])
    line = [costs[i] for i in front], [scores[i] for i in front]
    axes.step(*line, where="post", color="black", linewidth=0.9, linestyle=":", label="Pareto front", zorder=1)
    for name, (x, score) in points.items():
        colour = COLOURS[highlighted.index(name)] if name in highlighted else _GREY
        label = name if name in highlighted else "other methods"
        halves: Any = {"xerr": [_known(x.half)] if math.isfinite(x.half) else None, "yerr": [_known(score.half)]}
        axes.errorbar([x.mean], [score.mean], **halves, fmt="o", color=colour, ms=5, lw=1, alpha=0.9, label=label)
        if label != name and names.index(name) in front:
            far = x.mean > (min(costs) + max(costs)) / 2
            place: Any = {"xytext": (-5 if far else 5, 4), "ha": "right" if far else "left"}
            axes.annotate(name, (x.mean, score.mean), textcoords="offset points", fontsize=7.5, **place)


def _known(half: float) -> float:
    return half if math.isfinite(half) else 0.0


# --- surfaces ------------------------------------------------------------------------------------------------------


Cells = Mapping[tuple[float, float], tuple[float, bool]]
"""Values by row and column, and whether to mark them by a dot."""


@rc_context(fname=_STYLE)
def draw_heat_maps(maps: Mapping[str, Cells], x_label: str, y_label: str, colour_label: str) -> Figure:
    """One heat map for each title, with the colours of all on one scale; cells are of one size, whatever the values."""
    tables = {title: pd.Series({at: value for at, (value, _) in of.items()}).unstack() for title, of in maps.items()}
    rows, columns = (max(table.shape[side] for table in tables.values()) for side in (0, 1))
    size = (min(max(3.4, 0.6 + 0.3 * columns), 9.0), min(max(2.0, 0.9 + 0.3 * rows), 6.0))
    figure, axes = _panels(len(maps), max(1, round(9.0 / size[0])), size)
    values = [value for of in maps.values() for value, _ in of.values()]
    for panel, (title, table) in zip(axes, tables.items(), strict=True):
        mesh = panel.pcolormesh(np.ma.masked_invalid(table), vmin=min(values), vmax=max(values))
        marked = [
            (table.columns.get_loc(x), table.index.get_loc(y)) for (y, x), (_, mark) in maps[title].items() if mark
        ]
        dots = [x + 0.5 for x, _ in marked], [y + 0.5 for _, y in marked]
        panel.plot(*dots, "o", color="white", mec="black", mew=0.5)
        every = -(-len(table.columns) // 12)
        panel.set_xticks(np.arange(len(table.columns))[::every] + 0.5, [f"{x:g}" for x in table.columns[::every]])
        panel.set_yticks(np.arange(len(table)) + 0.5, [f"{y:g}" for y in table.index])
        panel.set(title=title, xlabel=x_label, ylabel=y_label)
        panel.grid(visible=False)
    bar = figure.colorbar(mesh, ax=axes, label=colour_label, shrink=0.9)
    for solid in bar.ax.collections:  # an image in an SVG would be an address, which pages forbid
        solid.set(rasterized=False, edgecolor="face")
    return figure


@rc_context(fname=_STYLE)
def draw_planes(planes: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Two-dimensional slices of the loss as contours, one panel each, with the colours of all in one scale.

    Args:
        planes: {title: {"at": places on both axes, "loss": one row for each place on the second}}.
    """
    figure, axes = _panels(len(planes), 4, (3.0, 2.9))
    losses = [np.asarray(one["loss"], dtype=np.float64) for one in planes.values()]
    highest = max(float(loss.max()) for loss in losses) or 1.0  # a loss of zero has no place on a logarithmic scale
    lowest = max(min(float(loss.min()) for loss in losses), 1e-6 * highest)
    levels = np.geomspace(lowest, max(highest, 1.001 * lowest), 16)
    for panel, (title, one), loss in zip(axes, planes.items(), losses, strict=True):
        loss = np.maximum(loss, lowest)
        filled = panel.contourf(one["at"], one["at"], loss, levels=levels, norm="log")
        panel.contour(one["at"], one["at"], loss, levels=levels, colors="white", linewidths=0.3)
        panel.set(title=title, aspect="equal")
    figure.colorbar(filled, ax=axes, label="loss", shrink=0.8, format="%.2g")
    return figure


# --- files ---------------------------------------------------------------------------------------------------------


@rc_context(fname=_STYLE)
def render(figure: Figure, kind: str) -> bytes:
    """The figure as a ``png`` or ``svg`` file; the same figure is always the same bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind, metadata=_NO_METADATA if kind == "svg" else None)
    figure.set_layout_engine("none")  # laid out once: the next kind has the same places
    return buffer.getvalue()


def inline_svg(file: bytes) -> str:
    """An ``svg`` file as an element for an HTML page, without a background."""
    text = file.decode().replace('style="fill: #ffffff"', 'style="fill: none"')
    return re.sub(r'<g id="[^"]*"', "<g", text[text.index("<svg") :])  # figures would share their ids


def _panels(count: int, columns: int, size: tuple[float, float]) -> tuple[Figure, list[Axes]]:
    """`count` panels of a size in inches, at most `columns` side by side."""
    columns = min(count, columns)
    rows = -(-count // columns)
    figure = Figure(figsize=(0.6 + size[0] * columns, 0.6 + size[1] * rows))
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for unused in axes[count:]:
        unused.set_axis_off()
    return figure, axes[:count]


def _legend(figure: Figure, order: Sequence[str] = ()) -> None:
    """One legend above all panels, with each label of any of them once, those of `order` first."""
    found: dict[str, Any] = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    names = [name for name in order if name in found] + [name for name in found if name not in order]
    if len(names) > 1:
        figure.legend([found[name] for name in names], names, loc="outside upper center", ncols=4)
