"""What the results of a comparison say: scores, paired differences, their tests, costs, and verdicts in words."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median, median_low
from typing import Any

from lora_ggpo.errors import UserError
from lora_ggpo.statistics.intervals import (
    LEVEL,
    POWER,
    Interval,
    detectable_difference,
    holm,
    mean_interval,
    mean_ranks,
    paired_difference,
    paired_p_value,
    pooled_sd,
    seed_curves,
    vary,
)

Row = Mapping[str, Any]
"""A line of runs.jsonl, tuning.jsonl or curves.jsonl."""


@dataclass(frozen=True)
class Metric:
    """How a metric is shown: as `shown_as`, values times `scale`; `unit` is that of differences.

    `beside` names the metric to show with it.
    """

    label: str
    shown_as: str
    higher_is_better: bool
    scale: float
    unit: str
    digits: int
    beside: str | None


METRICS: Mapping[str, Metric] = {
    "accuracy": Metric("accuracy", "accuracy, %", True, 100.0, " points", 2, "log_loss"),
    "f1": Metric("F1", "F1, %", True, 100.0, " points", 2, "log_loss"),
    "mcc": Metric("MCC", "100 × MCC", True, 100.0, " points", 2, "log_loss"),
    "log_loss": Metric("log-loss", "log-loss", False, 1.0, "", 4, "accuracy"),
    "pearson": Metric("Pearson", "100 × Pearson", True, 100.0, " points", 2, "mse"),
    "spearman": Metric("Spearman", "100 × Spearman", True, 100.0, " points", 2, "mse"),
    "mse": Metric("MSE", "mean squared error", False, 1.0, "", 4, "pearson"),
    "loss": Metric("loss", "loss", False, 1.0, "", 4, None),
    "perplexity": Metric("perplexity", "perplexity", False, 1.0, "", 3, None),
}
_TEST = "test"
NOT_COMPARED = ("validation", "train", "train-clean", "train-noisy")


@dataclass(frozen=True)
class Results:
    """The four files of a results folder; `facts` says with what and how they were made."""

    runs: Sequence[Row]
    tuning: Sequence[Row]
    curves: Sequence[Row]
    facts: Row


@dataclass(frozen=True)
class Score:
    """A metric of one method on one set.

    Attributes:
        mean: Over the method's seeds.
        difference: The method minus the baseline, paired by seed; None for the baseline, or without a common seed.
        p: Of that difference, Holm-adjusted over the methods of the setting; nan where there is no test.
    """

    mean: Interval
    difference: Interval | None
    p: float


@dataclass(frozen=True)
class MethodResult:
    """One method in one setting.

    Attributes:
        chosen: The tuned values that its final runs took.
        scores: By (set, metric); without those of which no run has a value.
        verdicts: By set, in plain words.
        failed: {seed: why} of runs that failed.
        trainable: Trained parameters; None if no run finished, as are the ratios.
        time_ratio: Seconds per step over the baseline's: median over seeds of the ratio at the same seed.
        memory_ratio: Peak memory likewise; None where it was not measured.
        steps_to_level: First logged step at which its mean training loss is at or below the setting's level.
        logs: Rows of log.jsonl, one list a seed.
    """

    name: str
    title: str
    chosen: Row
    scores: Mapping[tuple[str, str], Score]
    verdicts: Mapping[str, str]
    failed: Mapping[int, str]
    trainable: int | None
    time_ratio: float | None
    memory_ratio: float | None
    steps_to_level: int | None
    logs: Sequence[Sequence[Row]]


@dataclass(frozen=True)
class SettingResult:
    """One setting: its methods in the order of the runs, and what they say on each set, in plain words."""

    name: str
    methods: tuple[MethodResult, ...]
    verdicts: Mapping[str, str]

    @property
    def sets(self) -> tuple[str, ...]:
        """The sets that methods are compared on: test, then those out of domain."""
        return tuple(self.verdicts)


def read_results(folder: Path) -> Results:
    """Read runs.jsonl, tuning.jsonl, curves.jsonl and facts.json.

    Raises:
        UserError: one of them is missing or damaged, or there is no run.
    """
    files = [_read(folder / f"{name}.jsonl").split("\n") for name in ("runs", "tuning", "curves")]
    try:
        runs, tuning, curves = ([json.loads(line) for line in lines if line] for lines in files)
        facts = json.loads(_read(folder / "facts.json"))
    except ValueError as error:
        raise UserError(f"The results in {folder} are damaged: {error}.") from error
    if not runs:
        raise UserError(f"{folder} holds no run to report.")
    return Results(runs, tuning, curves, facts)


def analyse(results: Results) -> tuple[SettingResult, ...]:
    """Compare the methods of every setting with the baseline."""
    names = dict.fromkeys(run["setting"] for run in results.runs)
    return tuple(_setting(name, results) for name in names)


def rank_methods(settings: Sequence[SettingResult], metric: str) -> dict[str, float]:
    """Mean rank of each title by its mean score, over all settings and their sets, the best first."""
    methods = dict.fromkeys(method.title for setting in settings for method in setting.methods)
    found = {
        (setting.name, name, method.title): method.scores[name, metric].mean.mean
        for setting in settings
        for method in setting.methods
        for name in setting.sets
        if (name, metric) in method.scores
    }
    tasks = [(setting.name, name) for setting in settings for name in setting.sets]
    scores = {method: [found.get((*task, method), math.nan) for task in tasks] for method in methods}
    ranks = mean_ranks(scores, higher_is_better=METRICS[metric].higher_is_better)
    return dict(sorted(ranks.items(), key=lambda entry: entry[1]))


def format_amount(value: float, metric: Metric, *, sign: bool = False) -> str:
    """A value of a metric with its unit: ``+1.25 points``."""
    return f"{value * metric.scale:{'+' if sign else ''}.{metric.digits}f}{metric.unit}"


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from error


def _setting(name: str, results: Results) -> SettingResult:
    groups: dict[str, list[Row]] = {}
    for run in results.runs:
        if run["setting"] == name:
            groups.setdefault(run["method"], []).append(run)
    baseline, metric = results.facts["baseline"], results.facts["metric"]
    reference = groups.get(baseline, [])
    title = reference[0]["title"] if reference else baseline
    found = dict.fromkeys(name for runs in groups.values() for run in runs for name in run["evaluation"])
    sets = [_TEST, *(name for name in found if name not in (_TEST, *NOT_COMPARED))]
    shown = [metric] + [beside for beside in [METRICS[metric].beside] if beside]
    values = {
        (name, one): {method: _values(runs, name, one) for method, runs in groups.items()}
        for name in sets
        for one in shown
    }
    scores = {key: _scores(of_methods, baseline) for key, of_methods in values.items()}
    logs = {method: _logs(runs, results.curves) for method, runs in groups.items()}
    level = _level(logs.get(baseline, []))
    methods = tuple(
        MethodResult(
            name=method,
            title=runs[0]["title"],
            chosen=runs[0]["chosen"],
            scores={key: of_methods[method] for key, of_methods in scores.items() if method in of_methods},
            verdicts={
                one: _method_verdict(runs, scores[one, metric].get(method), metric, baseline, title) for one in sets
            },
            failed={run["seed"]: run["failed"] for run in runs if run["failed"]},
            trainable=next((run["training"]["trainable_parameters"] for run in _finished(runs)), None),
            time_ratio=_ratio(reference, runs, "seconds_per_step"),
            memory_ratio=_ratio(reference, runs, "peak_memory_bytes"),
            steps_to_level=_steps_to(level, logs[method]),
            logs=logs[method],
        )
        for method, runs in groups.items()
    )
    verdicts = {
        one: _set_verdict(methods, (one, metric), title, _detectable(values[one, metric], baseline)) for one in sets
    }
    return SettingResult(name, methods, verdicts)


def _finished(runs: Sequence[Row]) -> list[Row]:
    return [run for run in runs if not run["failed"]]


def _values(runs: Sequence[Row], name: str, metric: str) -> dict[int, float]:
    """Values by seed; a value that is not finite is none."""
    found = {run["seed"]: run["evaluation"].get(name, {}).get(metric, {}).get("value") for run in runs}
    return {seed: value for seed, value in found.items() if value is not None and math.isfinite(value)}


def _pairs(first: Mapping[int, float], second: Mapping[int, float]) -> tuple[list[float], list[float]]:
    seeds = sorted(first.keys() & second.keys())
    return [first[seed] for seed in seeds], [second[seed] for seed in seeds]


def _scores(values: Mapping[str, Mapping[int, float]], baseline: str) -> dict[str, Score]:
    pairs = {method: _pairs(values.get(baseline, {}), own) for method, own in values.items() if method != baseline}
    adjusted = dict(zip(pairs, holm([paired_p_value(*pair) for pair in pairs.values()]), strict=True))
    differences = {method: paired_difference(*pair) for method, pair in pairs.items() if pair[0]}
    return {
        method: Score(mean_interval(list(own.values())), differences.get(method), adjusted.get(method, math.nan))
        for method, own in values.items()
        if own
    }


def _detectable(values: Mapping[str, Mapping[int, float]], baseline: str) -> float:
    """What a typical comparison of the setting could have found after Holm's correction; nan with one seed.

    Methods whose differences do not vary say nothing about the spread of those that do.
    """
    pairs = [_pairs(values.get(baseline, {}), own) for method, own in values.items() if method != baseline]
    samples = [[b - a for a, b in zip(*pair, strict=True)] for pair in pairs]
    samples = [sample for sample in samples if vary(sample)]
    if not samples:
        return math.nan
    n = median_low(len(sample) for sample in samples)
    return detectable_difference(pooled_sd(samples), n, level=LEVEL / len(samples))


def _method_verdict(runs: Sequence[Row], score: Score | None, metric: str, baseline: str, title: str) -> str:
    failures = [run["failed"] for run in runs if run["failed"]]
    if len(failures) == len(runs):
        return f"failed: {failures[0]}"
    words = "baseline" if runs[0]["method"] == baseline else _difference_verdict(score, metric, title)
    return f"{words}; {len(failures)} of {len(runs)} runs failed" if failures else words


def _difference_verdict(score: Score | None, metric: str, title: str) -> str:
    if score is None:
        return "not measured"
    if score.difference is None:
        return f"no seed in common with {title}"
    if score.difference.n < 2:
        return "one seed cannot tell"
    if math.isnan(score.p):
        return "cannot tell: every seed differs by the same amount"
    if score.p >= LEVEL:
        return "no difference found"
    better = (score.difference.mean > 0) == METRICS[metric].higher_is_better
    return f"{'better' if better else 'worse'} than {title}"


def _set_verdict(methods: Sequence[MethodResult], key: tuple[str, str], title: str, detectable: float) -> str:
    """One sentence on one set, which claims no more than the tests do."""
    metric = METRICS[key[1]]
    compared = [
        (method.title, method.scores[key].difference, _difference_verdict(method.scores[key], key[1], title))
        for method in methods
        if key in method.scores and method.scores[key].difference
    ]
    if not compared:
        return f"nothing can be compared: no method has a seed in common with {title}"
    found = []
    for words in (f"better than {title}", f"worse than {title}"):
        names = [
            f"{one} ({format_amount(d.mean, metric, sign=True)})" for one, d, said in compared if d and said == words
        ]
        found += [f"{words}: {', '.join(names)}"] if names else []
    if not found:
        said = list(dict.fromkeys(words for _, _, words in compared))
        found = ["no difference found" if "no difference found" in said else said[0]]
    missing = [method.title for method in methods if key not in method.scores]
    found += [f"no result of {', '.join(missing)}"] if missing else []
    if math.isfinite(detectable):
        amount = format_amount(detectable, metric)
        found.append(f"this grid could have detected {amount} ({100 * POWER:.0f} % power)")
    return "; ".join(found)


def _ratio(reference: Sequence[Row], runs: Sequence[Row], key: str) -> float | None:
    first, second = ({run["seed"]: run["training"].get(key) for run in _finished(side)} for side in (reference, runs))
    ratios = [second[seed] / first[seed] for seed in second if second[seed] is not None and first.get(seed)]
    return median(ratios) if ratios else None


def _logs(runs: Sequence[Row], curves: Sequence[Row]) -> list[Sequence[Row]]:
    finished = {(run["setting"], run["method"], run["seed"]) for run in _finished(runs)}
    return [row["rows"] for row in curves if (row["setting"], row["method"], row["seed"]) in finished]


def _level(logs: Sequence[Sequence[Row]]) -> float:
    """The mean training loss of `logs` at half of their steps; nan if there is none."""
    steps, values = seed_curves(logs, "loss")
    half = sum(step <= steps[-1] / 2 for step in steps)
    return float(values.mean(axis=0)[max(half, 1) - 1]) if steps else math.nan


def _steps_to(level: float, logs: Sequence[Sequence[Row]]) -> int | None:
    steps, values = seed_curves(logs, "loss")
    means = values.mean(axis=0) if steps else ()
    return next((step for step, mean in zip(steps, means, strict=True) if mean <= level), None)
