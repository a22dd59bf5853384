"""What the results of a comparison say: scores, paired differences, their tests, costs, and verdicts in words."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median, median_low

import pandas as pd

from lora_ggpo.comparison.results import Results, Row
from lora_ggpo.data.bundled import GENERAL_TEXT
from lora_ggpo.statistics.calibration import Curves
from lora_ggpo.statistics.intervals import (
    LEVEL,
    POWER,
    Interval,
    detectable_difference,
    holm,
    is_finite,
    mean_interval,
    p_value,
    pooled_sd,
    seed_curves,
    vary,
    verdict,
)
from lora_ggpo.statistics.metrics import CALIBRATION, FORGETTING, METRICS

TEST = "test"
TRAINED: Mapping[str, str] = {"train": "training rows", "train-clean": "right labels", "train-noisy": "wrong labels"}
"""The sets that a run was trained on, and how tables name them."""

Key = tuple[str, str]
"""A set and a metric."""

Values = Mapping[str, Mapping[int, float]]
"""A metric on a set: by method and seed."""


@dataclass(frozen=True)
class Score:
    """A metric of one method on one set.

    Attributes:
        mean: Over the method's seeds.
        difference: The method minus the baseline, paired by seed; None for the baseline, or without a common seed.
        p: Of that difference, Holm-adjusted over the methods of the setting; nan where there is no test.
        verdict: In plain words, what the difference says.
    """

    mean: Interval
    difference: Interval | None
    p: float
    verdict: str


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
        calibration: What is drawn of its probabilities on the test set, one a seed; none where it has no probabilities.
    """

    name: str
    title: str
    chosen: Row
    scores: Mapping[Key, Score]
    verdicts: Mapping[str, str]
    failed: Mapping[int, str]
    trainable: int | None
    time_ratio: float | None
    memory_ratio: float | None
    steps_to_level: int | None
    logs: Sequence[Sequence[Row]]
    calibration: Sequence[Curves]


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
    return [name for name in found if name not in ("validation", GENERAL_TEXT, *TRAINED)]


def rank_methods(settings: Sequence[SettingResult], metric: str) -> dict[str, float]:
    """Mean rank of each title by its mean score, over all settings and their sets, the best first.

    1 is the best; a method without a score ranks last, and ties share the mean of their ranks.
    """
    titles = dict.fromkeys(method.title for setting in settings for method in setting.methods)
    scores = [
        {one.title: one.scores[name, metric].mean.mean for one in setting.methods if (name, metric) in one.scores}
        for setting in settings
        for name in setting.sets
    ]
    ascending = not METRICS[metric].higher_is_better
    ranks = pd.DataFrame(scores, columns=list(titles)).rank(axis=1, ascending=ascending, na_option="bottom").mean()
    return {str(title): float(rank) for title, rank in ranks.sort_values(kind="stable").items()}


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
    measured = dict.fromkeys(filter(None, [metric, METRICS[metric].beside, *CALIBRATION]))
    keys = [*itertools.product((*sets, *trained), measured), *itertools.product([GENERAL_TEXT], FORGETTING)]
    values: dict[Key, Values] = {
        (one, of): {method: _values(runs, one, of) for method, runs in groups.items()} for one, of in keys
    }
    scores = {key: _scores(of_methods, baseline, title, key[1]) for key, of_methods in values.items()}
    logs = {method: list(results.logs(name, method).values()) for method in groups}
    level = _level(logs.get(baseline, []))
    methods = tuple(
        MethodResult(
            name=method,
            title=runs[0]["title"],
            chosen=runs[0]["chosen"],
            scores={key: of_methods[method] for key, of_methods in scores.items() if method in of_methods},
            verdicts={one: _method_verdict(runs, scores[one, metric].get(method)) for one in sets},
            failed={run["seed"]: run["failed"] for run in runs if run["failed"]},
            trainable=next((run["training"]["trainable_parameters"] for run in runs if not run["failed"]), None),
            time_ratio=_ratio(reference, runs, "seconds_per_step"),
            memory_ratio=_ratio(reference, runs, "peak_memory_bytes"),
            steps_to_level=_steps_to(level, logs[method]),
            logs=logs[method],
            calibration=[Curves.read(run["calibration"][TEST]) for run in runs if TEST in run.get("calibration", {})],
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
    return {seed: value for seed, value in found.items() if is_finite(value)}


def _differences(values: Values, baseline: str) -> dict[str, list[float]]:
    """Each other method minus the baseline, at the seeds that both have."""
    reference = values.get(baseline, {})
    return {
        method: [own[seed] - reference[seed] for seed in sorted(own.keys() & reference.keys())]
        for method, own in values.items()
        if method != baseline
    }


def _scores(values: Values, baseline: str, title: str, metric: str) -> dict[str, Score]:
    differences = _differences(values, baseline)
    adjusted = dict(zip(differences, holm([p_value(of) for of in differences.values()]), strict=True))
    words = (f"better than {title}", f"worse than {title}")
    more, less = words if METRICS[metric].higher_is_better else reversed(words)
    found = {}
    for method, own in values.items():
        difference = mean_interval(differences[method]) if differences.get(method) else None
        p = adjusted.get(method, math.nan)
        said = verdict(difference, p, more, less) if difference else f"no seed in common with {title}"
        if own:
            said = "baseline" if method == baseline else said
            found[method] = Score(mean_interval(list(own.values())), difference, p, said)
    return found


def _detectable(values: Values, baseline: str) -> float:
    """What a typical comparison of the setting could have found after Holm's correction; nan with one seed.

    Methods whose differences do not vary say nothing about the spread of those that do.
    """
    samples = [sample for sample in _differences(values, baseline).values() if vary(sample)]
    if not samples:
        return math.nan
    n = median_low(len(sample) for sample in samples)
    return detectable_difference(pooled_sd(samples), n, level=LEVEL / len(samples))


def _method_verdict(runs: Sequence[Row], score: Score | None) -> str:
    failures = [run["failed"] for run in runs if run["failed"]]
    if len(failures) == len(runs):
        return f"failed: {failures[0]}"
    words = score.verdict if score else "not measured"
    return f"{words}; {len(failures)} of {len(runs)} runs failed" if failures else words


def _set_verdict(methods: Sequence[MethodResult], key: Key, title: str, detectable: float) -> str:
    """One sentence on one set, which claims no more than the tests do."""
    metric, scores = METRICS[key[1]], {one.title: one.scores[key] for one in methods if key in one.scores}
    compared = {one: (score.verdict, score.difference.mean) for one, score in scores.items() if score.difference}
    if not compared:
        return f"nothing can be compared: no method has a seed in common with {title}"
    found = []
    for words in (f"better than {title}", f"worse than {title}"):
        names = [f"{one} ({metric.amount(mean, sign=True)})" for one, (said, mean) in compared.items() if said == words]
        found += [f"{words}: {', '.join(names)}"] if names else []
    if not found:
        said = [words for words, _ in compared.values()]
        found = ["no difference found" if "no difference found" in said else said[0]]
    missing = [method.title for method in methods if method.title not in scores]
    found += [f"no result of {', '.join(missing)}"] if missing else []
    if math.isfinite(detectable):
        found.append(f"this grid could have detected {metric.amount(detectable)} ({100 * POWER:.0f} % power)")
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
