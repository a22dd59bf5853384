"""Figures. They are drawn without pyplot, so no display is needed and no global state is touched."""

from __future__ import annotations

import io
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
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
# Okabe and Ito's colours, which colour-blind readers can tell apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_GREY = "#9a9a9a"
_LINES = tuple(itertools.product(("-", "--", ":"), COLOURS))
# Names are anybody's text, so "$" starts no formula; SVG names its parts by a hash that must not change.
_STYLE: Any = {"text.parse_math": False, "svg.fonttype": "none", "svg.hashsalt": "lora-ggpo"}
_NO_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))


def save_training_plot(log: Log, path: Path) -> None:
    """Draw the loss of a run, with validation if it was measured, and the noise's gradient share if there is one."""
    shares = curve(log, SHARE)[1]
    figure, panels = _panels(2 if shares else 1, 2, (5.8, 3.2))
    _line(panels[0], *curve(log, LOSS), COLOURS[0], "training")
    for key in _VALIDATION_KEYS:
        _line(panels[0], *curve(log, key), COLOURS[1], "validation")
    _finish(panels[0], "loss", "optimizer step")
    if shares:
        _line(panels[1], *curve(log, SHARE), COLOURS[2], None)
        _finish(panels[1], "share of the gradient term in the noise variance", "optimizer step")
        positive = [share for share in shares if share > 0]
        if positive and max(positive) > 10 * min(positive):
            panels[1].set_yscale("log", nonpositive="mask")
        else:
            panels[1].set_ylim(0, 1)
    _legend(figure)
    write_bytes(path, render(figure, "png"))


@dataclass(frozen=True)
class Tradeoff:
    """What a method scores at what cost; the costs, in units of the baseline's, are None where not measured."""

    score: Interval
    time: float | None
    memory: float | None


@rc_context(_STYLE)
def draw_forest(differences: Mapping[str, Mapping[str, Mapping[str, Interval]]], axis: str) -> Figure:
    """Differences to the baseline with their intervals, one panel a setting.

    Args:
        differences: {setting: {method: {set: difference}}}, in the unit that `axis` names.
    """
    rows = [max(len(methods), 1) for methods in differences.values()]
    sets = list(dict.fromkeys(name for of in differences.values() for found in of.values() for name in found))
    figure = Figure(figsize=(7.2, 1.1 + sum(0.45 + 0.3 * count for count in rows)), layout="constrained")
    panels = figure.subplots(len(rows), 1, sharex=True, squeeze=False, height_ratios=[1 + count for count in rows])
    for panel, (setting, methods) in zip(panels[:, 0], differences.items(), strict=True):
        panel.axvline(0, color="black", linewidth=0.8)
        for place, (name, colour) in enumerate(zip(sets, itertools.cycle(COLOURS), strict=False)):
            shift = (place - (len(sets) - 1) / 2) * 0.18
            points = [(row + shift, found[name]) for row, found in enumerate(methods.values()) if name in found]
            means, halves = [d.mean for _, d in points], [d.half if math.isfinite(d.half) else 0 for _, d in points]
            style: Any = {"color": colour, "fmt": "o", "ms": 4, "lw": 1.4, "label": name}
            panel.errorbar(means, [y for y, _ in points], xerr=halves, **style)
        panel.set_yticks(range(len(methods)), list(methods))
        panel.set_ylim(max(len(methods), 1) - 0.5, -0.5)
        _finish(panel, setting, grid="x")
    panels[-1, 0].set_xlabel(axis, fontsize=9)
    _legend(figure)
    return figure


@rc_context(_STYLE)
def draw_learning_curves(logs: Mapping[str, Mapping[str, Sequence[Log]]], highlighted: Sequence[str]) -> Figure:
    """Training and validation loss over steps, one row of panels a setting.

    Args:
        logs: {setting: {method: logs of its seeds}}. Lines are means, bands reach from the lowest seed to the highest.
        highlighted: Methods in colour, at most as many as there are colours; the others are thin and grey.
    """
    figure = Figure(figsize=(9.6, 0.5 + 2.9 * len(logs)), layout="constrained")
    panels = figure.subplots(len(logs), 2, squeeze=False)
    for row, (setting, methods) in zip(panels, logs.items(), strict=True):
        for panel, keys, title in zip(row, [(LOSS,), _VALIDATION_KEYS], ["training", "validation"], strict=True):
            for method in sorted(methods, key=lambda name: name in highlighted):
                for key in keys:
                    _highlighted_curve(panel, methods[method], key, method, highlighted)
            _finish(panel, f"{title} loss{f', {setting}' if setting else ''}", "optimizer step")
    _legend(figure, order=highlighted)
    return figure


@rc_context(_STYLE)
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
    figure = Figure(figsize=(0.4 + 4.6 * len(costs), 0.5 + 3.2 * len(points)), layout="constrained")
    panels = figure.subplots(len(points), len(costs), squeeze=False)
    for row, (setting, methods) in zip(panels, points.items(), strict=True):
        for panel, (cost, title) in zip(row, costs.items(), strict=True):
            known = {name: (getattr(point, cost), point.score) for name, point in methods.items()}
            _front(panel, {name: one for name, one in known.items() if one[0]}, highlighted, higher_is_better)
            _finish(panel, setting, title)
        row[0].set_ylabel(axis, fontsize=8)
    _legend(figure, order=highlighted)
    return figure


@dataclass(frozen=True)
class Line:
    """A curve of several seeds, (seeds, places), and places to mark by dashed and by dotted vertical lines."""

    places: Sequence[float]
    values: NDArray[np.float64]
    dashed: Sequence[float] = ()
    dotted: Sequence[float] = ()


Panels = Mapping[str, Mapping[str, Line]]
"""Lines by the title of their panel and by label; a label has one style in all panels."""


@rc_context(_STYLE)
def draw_lines(
    panels: Panels,
    x_label: str,
    y_label: str = "",
    *,
    columns: int = 3,
    ticks: Sequence[float] = (),
    log_x: bool = False,
    log_y: bool = False,
) -> Figure:
    """One panel for each title: means over seeds with their 95 % t intervals.

    Args:
        columns: Panels side by side.
        ticks: Values of the x axis; those of very different sizes are put on a logarithmic one.
        log_y: Logarithmic y axis, from a millionth of the highest value on.
    """
    figure, axes = _panels(len(panels), columns, (4.4, 2.7))
    labels = dict.fromkeys(label for lines in panels.values() for label in lines)
    styles = dict(zip(labels, itertools.cycle(_LINES), strict=False))
    log_x = log_x or bool(ticks and min(ticks) > 0 and max(ticks) >= 8 * min(ticks))
    for panel, (title, lines) in zip(axes, panels.items(), strict=True):
        for label, line in lines.items():
            _draw_line(panel, line, label, *styles[label])
        if log_x:
            panel.set_xscale("log")
        if ticks:
            panel.set_xticks(ticks, [f"{tick:g}" for tick in ticks], minor=False)
            panel.set_xticks([], minor=True)
        if log_y:
            highest = max((float(line.values.max()) for line in lines.values()), default=1.0)
            panel.set_yscale("log")
            panel.set_ylim(1e-6 * highest, 2 * highest)
        _finish(panel, title, x_label, y_label)
    _legend(figure)
    return figure


def _draw_line(panel: Axes, line: Line, label: str, dashes: str, colour: str) -> None:
    means = line.values.mean(axis=0)
    _line(panel, line.places, means.tolist(), colour, label, dashes)
    if len(line.values) > 1:
        halves = np.array([mean_interval(of_place.tolist()).half for of_place in line.values.T])
        panel.fill_between(line.places, means - halves, means + halves, color=colour, alpha=0.15, linewidth=0)
    for style, marks in (("--", line.dashed), (":", line.dotted)):
        for place in marks:
            panel.axvline(place, color=colour, linestyle=style, linewidth=1.0)


@dataclass(frozen=True)
class HeatMap:
    """Values by row and column, nan where there is none; `fitted` are the cells to mark by a dot."""

    rows: Sequence[float]
    columns: Sequence[float]
    values: NDArray[np.float64]
    fitted: NDArray[np.bool_]


@rc_context(_STYLE)
def draw_heat_maps(maps: Mapping[str, HeatMap], x_label: str, y_label: str, colour_label: str) -> Figure:
    """One heat map for each title, with the colours of all on one scale; cells are of one size, whatever the values."""
    columns, rows = (max(len(getattr(one, side)) for one in maps.values()) for side in ("columns", "rows"))
    size = (min(max(3.4, 0.6 + 0.3 * columns), 9.0), min(max(2.0, 0.9 + 0.3 * rows), 6.0))
    figure, axes = _panels(len(maps), max(1, round(9.0 / size[0])), size)
    finite = np.concatenate([one.values[np.isfinite(one.values)] for one in maps.values()])
    for panel, (title, one) in zip(axes, maps.items(), strict=True):
        mesh = panel.pcolormesh(np.ma.masked_invalid(one.values), cmap="viridis", vmin=finite.min(), vmax=finite.max())
        dots = np.argwhere(one.fitted)
        panel.plot(dots[:, 1] + 0.5, dots[:, 0] + 0.5, "o", color="white", mec="black", mew=0.5, ms=3)
        every = -(-len(one.columns) // 12)
        panel.set_xticks(np.arange(len(one.columns))[::every] + 0.5, [f"{value:g}" for value in one.columns[::every]])
        panel.set_yticks(np.arange(len(one.rows)) + 0.5, [f"{value:g}" for value in one.rows])
        _finish(panel, title, x_label, y_label)
        panel.grid(visible=False)
    bar = figure.colorbar(mesh, ax=axes, label=colour_label, shrink=0.9)
    for solid in bar.ax.collections:  # an image in an SVG would be an address, which pages forbid
        solid.set(rasterized=False, edgecolor="face")
    return figure


@rc_context(_STYLE)
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
        filled = panel.contourf(one["at"], one["at"], loss, levels=levels, norm="log", cmap="viridis")
        panel.contour(one["at"], one["at"], loss, levels=levels, colors="white", linewidths=0.3)
        panel.set_aspect("equal")
        _finish(panel, title)
    figure.colorbar(filled, ax=axes, label="loss", shrink=0.8, format="%.2g")
    return figure


@rc_context(_STYLE)
def render(figure: Figure, kind: str, *, transparent: bool = False) -> bytes:
    """The figure as a ``png`` or ``svg`` file; the same figure is always the same bytes."""
    buffer = io.BytesIO()
    metadata = _NO_METADATA if kind == "svg" else None
    figure.savefig(buffer, format=kind, dpi=150, metadata=metadata, transparent=transparent)
    return buffer.getvalue()


def inline_svg(figure: Figure) -> str:
    """The figure as an ``<svg>`` element for an HTML page, without a background."""
    text = render(figure, "svg", transparent=True).decode()
    return re.sub(r'<g id="[^"]*"', "<g", text[text.index("<svg") :])  # figures would share their ids


def curve(log: Log, key: str) -> tuple[list[int], list[float]]:
    """Steps and values of the lines of a log that have `key`."""
    points = [(row["step"], row[key]) for row in log if row.get(key) is not None]
    return [step for step, _ in points], [value for _, value in points]


def _panels(count: int, columns: int, size: tuple[float, float]) -> tuple[Figure, list[Axes]]:
    """`count` panels of a size in inches, at most `columns` side by side."""
    columns = min(count, columns)
    rows = -(-count // columns)
    figure = Figure(figsize=(0.6 + size[0] * columns, 0.6 + size[1] * rows), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for unused in axes[count:]:
        unused.set_axis_off()
    return figure, axes[:count]


def _line(
    axes: Axes, places: Sequence[float], values: Sequence[float], colour: str, label: str | None, dashes: str = "-"
) -> None:
    if len(places):
        style: Any = {"linestyle": dashes, "linewidth": 1.6, "marker": "o" if len(places) < 30 else "", "ms": 3}
        axes.plot(places, values, color=colour, label=label, **style)


def _highlighted_curve(axes: Axes, logs: Sequence[Log], key: str, method: str, highlighted: Sequence[str]) -> None:
    steps, values = seed_curves(logs, key)
    if not steps:
        return
    mean = values.mean(axis=0).tolist()
    if method not in highlighted:
        axes.plot(steps, mean, color=_GREY, linewidth=0.8, alpha=0.7, label="other methods")
        return
    colour = COLOURS[highlighted.index(method)]
    _line(axes, steps, mean, colour, method)
    axes.fill_between(steps, values.min(axis=0), values.max(axis=0), color=colour, alpha=0.18, linewidth=0)


def _front(
    axes: Axes, points: Mapping[str, tuple[float, Interval]], highlighted: Sequence[str], higher_is_better: bool
) -> None:
    sign, names = 1 if higher_is_better else -1, list(points)
    costs, scores = [x for x, _ in points.values()], [score.mean for _, score in points.values()]
    front = pareto_front(costs, [sign * score for score in scores])
    line = [costs[i] for i in front], [scores[i] for i in front]
    axes.step(*line, where="post", color="black", linewidth=0.9, linestyle=":", label="Pareto front", zorder=1)
    for name, (x, score) in points.items():
        colour = COLOURS[highlighted.index(name)] if name in highlighted else _GREY
        label = name if name in highlighted else "other methods"
        half = score.half if math.isfinite(score.half) else 0
        axes.errorbar([x], [score.mean], yerr=[half], fmt="o", color=colour, ms=5, lw=1, alpha=0.9, label=label)
        if label != name and names.index(name) in front:
            far = x > (min(costs) + max(costs)) / 2
            place: Any = {"xytext": (-5 if far else 5, 4), "ha": "right" if far else "left"}
            axes.annotate(name, (x, score.mean), textcoords="offset points", fontsize=7.5, **place)


def _legend(figure: Figure, order: Sequence[str] = ()) -> None:
    """One legend above all panels, with each label of any of them once, those of `order` first."""
    found: dict[str, Any] = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    names = [name for name in order if name in found] + [name for name in found if name not in order]
    if len(names) > 1:
        figure.legend(
            [found[name] for name in names], names, loc="outside upper center", ncols=4, frameon=False, fontsize=8
        )


def _finish(axes: Axes, title: str, x_label: str = "", y_label: str = "", *, grid: Literal["x", "y"] = "y") -> None:
    axes.set_title(title, loc="left", fontsize=10)
    axes.set_xlabel(x_label, fontsize=8)
    axes.set_ylabel(y_label, fontsize=8)
    axes.grid(axis=grid, alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
