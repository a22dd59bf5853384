"""The report of a comparison."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.table import Table

from lora_ggpo.comparison.results import Results, read_results
from lora_ggpo.errors import count
from lora_ggpo.report.analysis import TEST, TRAINED, SettingResult, analyse, rank_methods
from lora_ggpo.report.calibration import CALIBRATION_CAPTIONS, calibration_tables, draw_calibration, score_cells
from lora_ggpo.report.ensembles import ensemble_tables
from lora_ggpo.report.forgetting import FORGETTING_CAPTION, draw_forgetting, forgetting_tables
from lora_ggpo.report.method_comparison import peft_tables
from lora_ggpo.report.page import Report, Section, provenance
from lora_ggpo.report.plots import COLOURS, Tradeoff, draw_forest, draw_learning_curves, draw_tradeoffs
from lora_ggpo.report.tables import NOTHING, TextTable, rows_table
from lora_ggpo.statistics.metrics import METRICS

_NOTES = (
    "Means over seeds ± half the 95 % t interval. A difference is the method minus the baseline, paired by seed; p is "
    "that of the paired t test, adjusted by Holm over the methods of a setting, and a verdict is given where p < 0.05."
)
_CAPTIONS = {
    "differences": (
        "Difference to the baseline on each set: mean and 95 % t interval over seeds, not adjusted for the number of "
        "methods."
    ),
    "curves": (
        "Mean loss over seeds with its 95 % t interval. Training loss is as the method has it: one that adds noise to "
        "the weights has it under its noise. A dashed line marks the step whose weights were kept, where these are "
        "the best ones (the median over seeds)."
    ),
    **CALIBRATION_CAPTIONS,
    **FORGETTING_CAPTION,
    "tradeoffs": (
        "Test score with its 95 % t interval against cost. The Pareto front joins the methods that no cheaper one "
        "beats in the mean; it is not a test."
    ),
}


def write_report(folder: Path) -> Report:
    """Write table.md, table.tex, report.html and figures/ from the results in `folder`.

    Raises:
        UserError: a results file is missing or damaged, or there is no run.
    """
    results = read_results(folder)
    settings, metric, facts = analyse(results), results.facts["metric"], results.facts
    ranks = rank_methods(settings, metric)
    titles = {method.name: method.title for setting in settings for method in setting.methods}
    baseline = str(titles.get(facts["baseline"], facts["baseline"]))
    tuned = f"{facts['trials']} tuning runs" if results.tuning else "no tuning run"
    report = Report(
        title=f"Comparison: {', '.join(titles.values())}",
        lead=f"{len(titles)} methods by {METRICS[metric].label}, against the baseline {baseline}; "
        f"{count(len(facts['seeds']), 'seed')}, {tuned} of each method in each setting",
        findings={
            ", ".join(filter(None, [setting.name, name])): words
            for setting in settings
            for name, words in setting.verdicts.items()
        },
        table=_terminal_table(settings, metric),
        sections=_sections(settings, ranks, results),
        figures=_figures(settings, metric, facts["baseline"], list(dict.fromkeys([baseline, *ranks]))[: len(COLOURS)]),
        captions=_CAPTIONS,
        notes=_NOTES,
        made=provenance(facts),
    )
    report.write(folder, markdown="table.md", latex="table.tex", template="comparison.html.j2")
    return report


# --- tables --------------------------------------------------------------------------------------------------------


def _sections(settings: Sequence[SettingResult], ranks: Mapping[str, float], results: Results) -> list[Section]:
    metric = results.facts["metric"]
    sections = []
    for setting in settings:
        tables = [_score_table(setting, name, metric) for name in setting.sets]
        tables += [*calibration_tables(setting), *ensemble_tables(setting, results), *forgetting_tables(setting)]
        tables += [_training_table(setting, metric)] if setting.trained else []
        sections.append(Section(setting.name or "Results", [*tables, _cost_table(setting)]))
    tasks = count(sum(len(setting.sets) for setting in settings), "set")
    ranked = tuple((title, f"{rank:.2f}") for title, rank in ranks.items())
    sections.append(Section("", [TextTable(f"Mean rank over {tasks}", ("method", "mean rank"), ranked)]))
    failures = failure_table((one.name, method.title, method.failed) for one in settings for method in one.methods)
    sections += [Section("", [failures])] if failures.rows else []
    sections += [Section("", [table]) for table in peft_tables(settings, results)]
    if results.tuning:
        tuning = _tuning_table(settings, results)
        sections.append(Section("Tuning", [tuning], folded=True))
    return sections


def _score_table(setting: SettingResult, name: str, metric: str) -> TextTable:
    """The methods of a setting on one set: the metric, its difference, p, the verdict, and the metric beside it."""
    shown = METRICS[metric]
    header = ["method", shown.heading, "difference", "p", "verdict"]
    if shown.beside:
        label = METRICS[shown.beside].label
        header += [METRICS[shown.beside].heading, f"difference in {label}", f"p of {label}"]
    rows = tuple(
        (
            method.title,
            *score_cells(method, (name, metric)),
            method.verdicts[name],
            *(score_cells(method, (name, shown.beside)) if shown.beside else ()),
        )
        for method in setting.methods
    )
    return TextTable(name, tuple(header), rows)


def _training_table(setting: SettingResult, metric: str) -> TextTable:
    """The metric on the rows that were trained on: on wrong labels it says how many of them are known by heart."""
    shown = METRICS[metric].shown_as
    header = [f"{TRAINED[name]}: {column}" for name in setting.trained for column in (shown, "difference")]
    rows = tuple(
        (method.title, *(cell for name in setting.trained for cell in score_cells(method, (name, metric))[:2]))
        for method in setting.methods
    )
    return TextTable("rows trained on", ("method", *header), rows)


def _cost_table(setting: SettingResult) -> TextTable:
    rows = tuple(
        (
            method.title,
            NOTHING if method.trainable is None else f"{method.trainable:,}",
            *(NOTHING if ratio is None else f"{ratio:.2f}×" for ratio in (method.time_ratio, method.memory_ratio)),
            NOTHING if method.steps_to_level is None else str(method.steps_to_level),
            _values(method.chosen),
        )
        for method in setting.methods
    )
    header = ("method", "trained parameters", "time of a step", "peak memory", "steps to level", "values")
    return TextTable("costs", header, rows)


def failure_table(failed: Iterable[tuple[str, str, Mapping[int, str]]]) -> TextTable:
    """The runs that failed: for each setting and method, why by seed."""
    rows = tuple(
        (setting or NOTHING, title, str(seed), why) for setting, title, whys in failed for seed, why in whys.items()
    )
    return TextTable("Failed runs", ("setting", "method", "seed", "why"), rows)


def _tuning_table(settings: Sequence[SettingResult], results: Results) -> TextTable:
    chosen = {(setting.name, method.name): method.chosen for setting in settings for method in setting.methods}
    metric = METRICS[results.facts["metric"]]
    rows = []
    for trial in results.tuning:
        score = NOTHING if trial["score"] is None else f"{trial['score'] * metric.scale:.{metric.digits}f}"
        taken = "chosen" if chosen.get((trial["setting"], trial["method"])) == trial["values"] else ""
        place = (trial["setting"] or NOTHING, trial["title"], str(trial["trial"]))
        rows.append((*place, _values(trial["values"]), trial["failed"] or score, taken))
    header = ("setting", "method", "trial", "values", f"validation {metric.heading}", "chosen")
    return TextTable(f"{count(len(rows), 'tuning run')}, scored on the validation set", header, tuple(rows))


def _values(values: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{key}={value:g}" if isinstance(value, float) else f"{key}={value}" for key, value in values.items()
    )


def _terminal_table(settings: Sequence[SettingResult], metric: str) -> Table:
    rows = []
    for setting in settings:
        rows += [[setting.name]] if setting.name else []
        for method in setting.methods:
            mean, difference, _ = score_cells(method, (TEST, metric))
            rows.append([method.title, mean, difference, method.verdicts[TEST]])
    header = ["method", f"{TEST} {METRICS[metric].heading}", "difference", "verdict"]
    return rows_table(header, rows, "mean ± 95 % t interval over seeds; differences are paired by seed")


# --- figures -------------------------------------------------------------------------------------------------------


def _figures(
    settings: Sequence[SettingResult], name: str, baseline: str, highlighted: Sequence[str]
) -> dict[str, Figure]:
    metric = METRICS[name]
    side = "right" if metric.higher_is_better else "left"
    axis = f"difference in {metric.label}{metric.unit and ','}{metric.unit}; {side} is better"
    differences = {
        setting.name: {
            method.title: {
                one: metric.scaled(score.difference)
                for one in setting.sets
                if (score := method.scores.get((one, name))) and score.difference
            }
            for method in setting.methods
            if method.name != baseline
        }
        for setting in settings
    }
    logs = {setting.name: {method.title: method.logs for method in setting.methods} for setting in settings}
    points = {
        setting.name: {
            method.title: Tradeoff(metric.scaled(score.mean), method.time_ratio, method.memory_ratio)
            for method in setting.methods
            if (score := method.scores.get((TEST, name)))
        }
        for setting in settings
    }
    shown = f"{TEST} {metric.shown_as}"
    return {
        "differences": draw_forest(differences, axis),
        "curves": draw_learning_curves(logs, highlighted),
        "tradeoffs": draw_tradeoffs(points, highlighted, shown, higher_is_better=metric.higher_is_better),
        **draw_forgetting(settings, name, highlighted),
        **draw_calibration(settings, highlighted),
    }
