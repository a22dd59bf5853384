"""The report of a comparison: tables, figures, and one page that needs nothing else."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.markup import escape
from rich.table import Table

from lora_ggpo.report.analysis import (
    METRICS,
    MethodResult,
    Metric,
    Results,
    SettingResult,
    analyse,
    rank_methods,
    read_results,
)
from lora_ggpo.report.page import NOTHING, Grid, render_page, write_figures
from lora_ggpo.report.plots import (
    COLOURS,
    Tradeoff,
    draw_forest,
    draw_learning_curves,
    draw_tradeoffs,
)
from lora_ggpo.report.tables import escape_markdown, format_interval, rows_table
from lora_ggpo.statistics.intervals import Interval
from lora_ggpo.workspace.files import write_text


@dataclass(frozen=True)
class Comparison:
    """What a comparison found.

    Attributes:
        settings: In the order of the runs.
        ranks: {method title: mean rank over all settings and their sets}, the best first.
        verdicts: One line for each setting and set.
        table: The scores on the test set, for the terminal.
    """

    settings: tuple[SettingResult, ...]
    ranks: Mapping[str, float]
    verdicts: list[str]
    table: Table


def write_report(folder: Path) -> Comparison:
    """Write table.md, table.tex, report.html and figures/ from the results in `folder`.

    The same results always give the same bytes, and every file is whole at any time.

    Raises:
        UserError: a results file is missing or damaged, or there is no run.
    """
    results = read_results(folder)
    settings, metric = analyse(results), results.facts["metric"]
    ranks = rank_methods(settings, metric)
    verdicts = [
        f"{f'{setting.name}, ' if setting.name else ''}{name}: {words}"
        for setting in settings
        for name, words in setting.verdicts.items()
    ]
    comparison = Comparison(settings, ranks, verdicts, _terminal_table(settings, metric))
    figures = _figures(comparison, results)
    write_figures(folder, figures)
    write_text(folder / "table.md", _markdown(comparison, results))
    write_text(folder / "table.tex", _latex(comparison, metric))
    write_text(folder / "report.html", _page(comparison, results, figures))
    return comparison


def _score_grid(setting: SettingResult, name: str, metric: str) -> Grid:
    """The methods of a setting on one set: the metric, its difference, p, the verdict, and the metric beside it."""
    shown = METRICS[metric]
    beside = [shown.beside] if shown.beside else []
    header = ["method", _heading(shown), "difference", "p", "verdict"]
    for other in beside:
        header += [_heading(METRICS[other]), f"difference in {METRICS[other].label}", f"p of {METRICS[other].label}"]
    rows = tuple(
        (
            method.title,
            *_score_cells(method, (name, metric)),
            method.verdicts[name],
            *(cell for other in beside for cell in _score_cells(method, (name, other))),
        )
        for method in setting.methods
    )
    return Grid(name, tuple(header), rows)


def _score_cells(method: MethodResult, key: tuple[str, str]) -> tuple[str, str, str]:
    score, metric = method.scores.get(key), METRICS[key[1]]
    if score is None:
        return NOTHING, NOTHING, NOTHING
    difference = NOTHING if score.difference is None else _cell(score.difference, metric, sign=True)
    p = NOTHING if math.isnan(score.p) else "<0.001" if score.p < 0.001 else f"{score.p:.3f}"
    return _cell(score.mean, metric), difference, p


def _cost_grid(setting: SettingResult) -> Grid:
    rows = tuple(
        (
            method.title,
            NOTHING if method.trainable is None else f"{method.trainable:,}",
            _times(method.time_ratio),
            _times(method.memory_ratio),
            NOTHING if method.steps_to_level is None else str(method.steps_to_level),
            _values(method.chosen),
        )
        for method in setting.methods
    )
    return Grid(
        "costs", ("method", "trained parameters", "time of a step", "peak memory", "steps to level", "values"), rows
    )


def _rank_grid(comparison: Comparison) -> Grid:
    tasks = sum(len(setting.sets) for setting in comparison.settings)
    rows = tuple((title, f"{rank:.2f}") for title, rank in comparison.ranks.items())
    return Grid(f"mean rank over {tasks} {'set' if tasks == 1 else 'sets'}", ("method", "mean rank"), rows)


def _failure_grid(settings: Sequence[SettingResult]) -> Grid:
    rows = tuple(
        (setting.name or NOTHING, method.title, str(seed), why)
        for setting in settings
        for method in setting.methods
        for seed, why in method.failed.items()
    )
    return Grid("failed runs", ("setting", "method", "seed", "why"), rows)


def _tuning_grid(comparison: Comparison, results: Results) -> Grid:
    chosen = {(s.name, method.name): method.chosen for s in comparison.settings for method in s.methods}
    metric = METRICS[results.facts["metric"]]
    rows = tuple(
        (
            trial["setting"] or NOTHING,
            trial["title"],
            str(trial["trial"]),
            _values(trial["values"]),
            trial["failed"]
            or (NOTHING if trial["score"] is None else f"{trial['score'] * metric.scale:.{metric.digits}f}"),
            "chosen" if chosen.get((trial["setting"], trial["method"])) == trial["values"] else "",
        )
        for trial in results.tuning
    )
    return Grid("tuning", ("setting", "method", "trial", "values", f"validation {_heading(metric)}", "chosen"), rows)


def _terminal_table(settings: Sequence[SettingResult], metric: str) -> Table:
    rows = []
    for setting in settings:
        rows += [[f"[bold]{escape(setting.name)}[/bold]", "", "", ""]] if setting.name else []
        for method in setting.methods:
            mean, difference, _ = _score_cells(method, ("test", metric))
            rows.append([escape(method.title), mean, difference, escape(method.verdicts["test"])])
    header = ["method", f"test {_heading(METRICS[metric])}", "difference", "verdict"]
    return rows_table(header, rows, "mean ± 95 % t interval over seeds; differences are paired by seed")


def _heading(metric: Metric) -> str:
    return f"{metric.shown_as} {'↑' if metric.higher_is_better else '↓'}"


def _scaled(interval: Interval, metric: Metric) -> Interval:
    return Interval(interval.mean * metric.scale, interval.half * metric.scale, interval.n)


def _cell(interval: Interval, metric: Metric, *, sign: bool = False) -> str:
    return format_interval(_scaled(interval, metric), sign=sign, digits=metric.digits)


def _times(ratio: float | None) -> str:
    return NOTHING if ratio is None else f"{ratio:.2f}×"


def _values(values: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{key}={value:g}" if isinstance(value, float) else f"{key}={value}" for key, value in values.items()
    )


def _grids(setting: SettingResult, metric: str) -> list[Grid]:
    return [*(_score_grid(setting, name, metric) for name in setting.sets), _cost_grid(setting)]


def _markdown(comparison: Comparison, results: Results) -> str:
    parts = ["# Comparison\n\n", *(f"- {escape_markdown(line)}\n" for line in comparison.verdicts), "\n"]
    for setting in comparison.settings:
        parts += [f"## {escape_markdown(setting.name)}\n\n"] if setting.name else []
        parts += [grid.markdown("###") for grid in _grids(setting, results.facts["metric"])]
    failures = _failure_grid(comparison.settings)
    parts += [grid.markdown("##") for grid in (_rank_grid(comparison), failures) if grid.rows]
    return "".join(parts) + _NOTES + "\n"


def _latex(comparison: Comparison, metric: str) -> str:
    tables = [grid.latex(setting.name) for setting in comparison.settings for grid in _grids(setting, metric)]
    tables.append(_rank_grid(comparison).latex())
    return "% \\usepackage{booktabs}\n" + "\n".join(tables)


_NOTES = (
    "Means over seeds ± half the 95 % t interval. A difference is the method minus the baseline, paired by seed; p is "
    "that of the paired t test, adjusted by Holm over the methods of a setting, and a verdict is given where p < 0.05."
)


def _figures(comparison: Comparison, results: Results) -> dict[str, Figure]:
    name = results.facts["metric"]
    metric, settings = METRICS[name], comparison.settings
    highlighted = _highlighted(comparison, results.facts["baseline"])
    side = "right" if metric.higher_is_better else "left"
    axis = f"difference in {metric.label}{metric.unit and ','}{metric.unit}; {side} is better"
    differences = {
        setting.name: {
            method.title: {
                one: _scaled(score.difference, metric)
                for (one, of), score in method.scores.items()
                if of == name and score.difference
            }
            for method in setting.methods
            if method.name != results.facts["baseline"]
        }
        for setting in settings
    }
    logs = {setting.name: {method.title: method.logs for method in setting.methods} for setting in settings}
    points = {
        setting.name: {
            method.title: Tradeoff(_scaled(score.mean, metric), method.time_ratio, method.memory_ratio)
            for method in setting.methods
            for score in [method.scores.get(("test", name))]
            if score
        }
        for setting in settings
    }
    return {
        "differences": draw_forest(differences, axis),
        "curves": draw_learning_curves(logs, highlighted),
        "tradeoffs": draw_tradeoffs(
            points, highlighted, f"test {metric.shown_as}", higher_is_better=metric.higher_is_better
        ),
    }


def _highlighted(comparison: Comparison, baseline: str) -> list[str]:
    """The baseline and the best by mean rank, as many as there are colours."""
    first = [m.title for setting in comparison.settings for m in setting.methods if m.name == baseline]
    return list(dict.fromkeys([*first, *comparison.ranks]))[: len(COLOURS)]


_CAPTIONS = {
    "differences": (
        "Difference to the baseline on each set: mean and 95 % t interval over seeds, not adjusted for the number of "
        "methods."
    ),
    "curves": (
        "Mean loss over seeds; bands reach from the lowest seed to the highest. Training loss is as the method has "
        "it: one that adds noise to the weights has it under its noise."
    ),
    "tradeoffs": (
        "Test score with its 95 % t interval against cost. The Pareto front joins the methods that no cheaper one "
        "beats in the mean; it is not a test."
    ),
}


def _page(comparison: Comparison, results: Results, figures: Mapping[str, Figure]) -> str:
    metric = results.facts["metric"]
    titles = {method.name: method.title for setting in comparison.settings for method in setting.methods}
    baseline = results.facts["baseline"]
    return render_page(
        "comparison.html.j2",
        figures,
        _CAPTIONS,
        comparison=comparison,
        facts=results.facts,
        metric=METRICS[metric],
        methods=list(titles.values()),
        baseline=titles.get(baseline, baseline),
        grids={setting.name: _grids(setting, metric) for setting in comparison.settings},
        ranks=_rank_grid(comparison),
        tuning=_tuning_grid(comparison, results),
        failures=_failure_grid(comparison.settings),
    )
