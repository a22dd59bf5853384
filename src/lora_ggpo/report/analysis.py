"""What the results of a comparison say: scores, paired differences, their tests, costs, and verdicts in words."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median, median_low

from lora_ggpo.comparison.results import Results, Row
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
from lora_ggpo.statistics.metrics import METRICS

TEST = "test"
TRAINED: Mapping[str, str] = {"train": "training rows", "train-clean": "right labels", "train-noisy": "wrong labels"}
"""The sets that a run was trained on, and how tables name them."""

Values = Mapping[str, Mapping[int, float]]
"""A metric on a set: by method and seed."""


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
    """One setting: its methods in the order of the runs, and what they say on each set, in plain words.

    Attributes:
        trained: The sets of training rows that have scores.
    """

    name: str
    methods: tuple[MethodResult, ...]
    verdicts: Mapping[str, str]
    trained: tuple[str, ...]

    @property
    def sets(self) -> tuple[str, ...]:
        """The sets that methods are compared on: test, then those out of domain."""
        return tuple(self.verdicts)


def analyse(results: Results) -> tuple[SettingResult, ...]:
    """Compare the methods of every setting with the baseline."""
    names = dict.fromkeys(run["setting"] for run in results.runs)
    return tuple(_setting(name, results) for name in names)


def compared_sets(runs: Sequence[Row]) -> list[str]:
    """The sets that `runs` were scored on, but those that they were trained or chosen on."""
    found = dict.fromkeys(name for run in runs for name in run["evaluation"])
    return [name for name in found if name != "validation" and name not in TRAINED]


def rank_methods(settings: Sequence[SettingResult], metric: str) -> dict[str, float]:
    """Mean rank of each title by its mean score, over all settings and their sets, the best first."""
    scores: dict[str, list[float]] = {method.title: [] for setting in settings for method in setting.methods}
    for setting in settings:
        own = {method.title: method.scores for method in setting.methods}
        for key in ((name, metric) for name in setting.sets):
            for title, of_all in scores.items():
                of_all.append(own[title][key].mean.mean if key in own.get(title, {}) else math.nan)
    ranks = mean_ranks(scores, higher_is_better=METRICS[metric].higher_is_better)
    return dict(sorted(ranks.items(), key=lambda entry: entry[1]))


def _setting(name: str, results: Results) -> SettingResult:
    groups: dict[str, list[Row]] = {}
    for run in results.runs:
        if run["setting"] == name:
            groups.setdefault(run["method"], []).append(run)
    baseline, metric = results.facts["baseline"], results.facts["metric"]
    reference = groups.get(baseline, [])
    title = reference[0]["title"] if reference else baseline
    runs = [run for of_method in groups.values() for run in of_method]
    sets = [TEST, *(one for one in compared_sets(runs) if one != TEST)]
    trained = tuple(one for one in TRAINED if any(one in run["evaluation"] for run in runs))
    shown = list(filter(None, [metric, METRICS[metric].beside]))
    values: dict[tuple[str, str], Values] = {
        (one, of): {method: _values(runs, one, of) for method, runs in groups.items()}
        for one in (*sets, *trained)
        for of in shown
    }
    scores = {key: _scores(of_methods, baseline) for key, of_methods in values.items()}
    logs = {method: list(results.logs(name, method).values()) for method in groups}
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
            trainable=next((run["training"]["trainable_parameters"] for run in runs if not run["failed"]), None),
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
    return SettingResult(name, methods, verdicts, trained)


def _values(runs: Sequence[Row], name: str, metric: str) -> dict[int, float]:
    """Values by seed; a value that is not finite is none."""
    found = {run["seed"]: run["evaluation"].get(name, {}).get(metric, {}).get("value") for run in runs}
    return {seed: value for seed, value in found.items() if value is not None and math.isfinite(value)}


def _pairs(first: Mapping[int, float], second: Mapping[int, float]) -> tuple[list[float], list[float]]:
    seeds = sorted(first.keys() & second.keys())
    return [first[seed] for seed in seeds], [second[seed] for seed in seeds]


def _scores(values: Values, baseline: str) -> dict[str, Score]:
    pairs = {method: _pairs(values.get(baseline, {}), own) for method, own in values.items() if method != baseline}
    adjusted = dict(zip(pairs, holm([paired_p_value(*pair) for pair in pairs.values()]), strict=True))
    differences = {method: paired_difference(*pair) for method, pair in pairs.items() if pair[0]}
    return {
        method: Score(mean_interval(list(own.values())), differences.get(method), adjusted.get(method, math.nan))
        for method, own in values.items()
        if own
    }


def _detectable(values: Values, baseline: str) -> float:
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
        names = [f"{one} ({metric.amount(d.mean, sign=True)})" for one, d, said in compared if d and said == words]
        found += [f"{words}: {', '.join(names)}"] if names else []
    if not found:
        said = list(dict.fromkeys(words for _, _, words in compared))
        found = ["no difference found" if "no difference found" in said else said[0]]
    missing = [method.title for method in methods if key not in method.scores]
    found += [f"no result of {', '.join(missing)}"] if missing else []
    if math.isfinite(detectable):
        amount = metric.amount(detectable)
        found.append(f"this grid could have detected {amount} ({100 * POWER:.0f} % power)")
    return "; ".join(found)


def _ratio(reference: Sequence[Row], runs: Sequence[Row], key: str) -> float | None:
    first, second = (
        {run["seed"]: run["training"].get(key) for run in side if not run["failed"]} for side in (reference, runs)
    )
    ratios = [second[seed] / first[seed] for seed in second if second[seed] is not None and first.get(seed)]
    return median(ratios) if ratios else None


def _level(logs: Sequence[Sequence[Row]]) -> float:
    """The mean training loss of `logs` at half of their steps; nan if there is none."""
    steps, values = seed_curves(logs, "loss")
    half = sum(step <= steps[-1] / 2 for step in steps)
    return float(values.mean(axis=0)[max(half, 1) - 1]) if steps else math.nan


def _steps_to(level: float, logs: Sequence[Sequence[Row]]) -> int | None:
    steps, values = seed_curves(logs, "loss")
    means = values.mean(axis=0) if steps else ()
    return next((step for step, mean in zip(steps, means, strict=True) if mean <= level), None)
