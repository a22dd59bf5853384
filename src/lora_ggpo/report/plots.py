"""Figures. They are drawn without pyplot, so no display is needed and no global state is touched."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

Log = Sequence[Mapping[str, Any]]
"""Lines of log.jsonl."""

LOSS, VALIDATION, SHARE = "loss", "validation/log_loss", "ggpo/gradient_share"
_VALIDATION_KEYS = (VALIDATION, "validation/loss")
# Okabe and Ito's colours, which colour-blind readers can tell apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")


def save_training_plot(log: Log, path: Path) -> None:
    """Draw the loss of a run, with validation if it was measured, and the noise's gradient share if there is one."""
    guided = bool(curve(log, SHARE)[0])
    figure, panels = _figure(1 + guided, width=6.4)
    _line(panels[0], *curve(log, LOSS), COLOURS[0], "training")
    for key in _VALIDATION_KEYS:
        _line(panels[0], *curve(log, key), COLOURS[1], "validation")
    _label(panels[0], "loss")
    if guided:
        _line(panels[1], *curve(log, SHARE), COLOURS[2], None)
        _label(panels[1], "share of the gradient term in the noise variance")
        shares = [share for share in curve(log, SHARE)[1] if share > 0]
        if shares and max(shares) > 10 * min(shares):
            panels[1].set_yscale("log", nonpositive="mask")
        else:
            panels[1].set_ylim(0, 1)
    _save(figure, path)


def save_comparison_plot(
    logs: Mapping[str, Sequence[Log]], scores: Mapping[str, Mapping[str, Sequence[float]]], path: Path
) -> None:
    """Compare methods: training loss and validation loss over steps, and final scores.

    Args:
        logs: For each method, the logs of its seeds. Lines are means, bands reach from the lowest seed to the highest.
        scores: For each method, {score: one value for each seed}; dots are seeds, the bar is their mean.
        path: The PNG to write.
    """
    figure, panels = _figure(3, width=12.8)
    for colour, (method, of_seeds) in zip(COLOURS, logs.items(), strict=False):
        _band(panels[0], of_seeds, LOSS, colour, method)
        _band(panels[1], of_seeds, VALIDATION, colour, method)
    _label(panels[0], "training loss")
    _label(panels[1], "validation log-loss")
    _dots(panels[2], scores)
    _save(figure, path)


def curve(log: Log, key: str) -> tuple[list[int], list[float]]:
    """Steps and values of the lines of a log that have `key`."""
    points = [(row["step"], row[key]) for row in log if row.get(key) is not None]
    return [step for step, _ in points], [value for _, value in points]


def _figure(panels: int, width: float) -> tuple[Figure, Sequence[Axes]]:
    figure = Figure(figsize=(width if panels != 2 else 1.6 * width, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(np.atleast_1d(figure.subplots(1, panels)))


def _line(axes: Axes, steps: Sequence[int], values: Sequence[float], colour: str, label: str | None) -> None:
    if steps:
        axes.plot(steps, values, color=colour, label=label, linewidth=1.6, marker="o" if len(steps) < 30 else "", ms=3)


def _band(axes: Axes, logs: Sequence[Log], key: str, colour: str, label: str) -> None:
    curves = [dict(zip(*curve(log, key), strict=True)) for log in logs]
    steps = sorted(set.intersection(*map(set, curves))) if curves else []
    if not steps:
        return
    values = np.array([[one[step] for step in steps] for one in curves])
    _line(axes, steps, values.mean(axis=0).tolist(), colour, label)
    axes.fill_between(steps, values.min(axis=0), values.max(axis=0), color=colour, alpha=0.18, linewidth=0)


def _dots(axes: Axes, scores: Mapping[str, Mapping[str, Sequence[float]]]) -> None:
    names = list(dict.fromkeys(name for of_method in scores.values() for name in of_method))
    for index, (colour, (method, of_method)) in enumerate(zip(COLOURS, scores.items(), strict=False)):
        shift = (index - (len(scores) - 1) / 2) * 0.3
        for position, name in enumerate(names):
            values = of_method.get(name, ())
            axes.plot([position + shift] * len(values), values, "o", color=colour, alpha=0.55, ms=5)
            if len(values):
                mean = float(np.mean(values))
                label = method if position == 0 else None
                axes.plot(
                    [position + shift - 0.1, position + shift + 0.1], [mean, mean], color=colour, lw=2.4, label=label
                )
    axes.set_xticks(range(len(names)), [name.replace(" ", "\n") for name in names])
    axes.set_xlim(-0.6, len(names) - 0.4)
    _finish(axes, "accuracy")


def _label(axes: Axes, title: str) -> None:
    axes.set_xlabel("optimizer step")
    _finish(axes, title)


def _finish(axes: Axes, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=10)
    axes.grid(axis="y", alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=8)


def _save(figure: Figure, path: Path) -> None:
    temporary = path.with_name(f".{path.stem}.partial.png")
    figure.savefig(temporary, dpi=150)
    temporary.replace(path)
