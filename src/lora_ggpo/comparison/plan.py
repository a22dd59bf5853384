"""What a comparison or a study runs: settings, methods, tuning trials and seeds, as recipes."""

from __future__ import annotations

import copy
import itertools
import random
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_ggpo.comparison.axes import Values, parse_axes, refuse_fixed, settings_of
from lora_ggpo.errors import UserError
from lora_ggpo.methods.table import PLAIN, RECIPE, Method, find_method
from lora_ggpo.recipe.fields import ADAPTER_DEFAULT, TRAINING_DEFAULTS
from lora_ggpo.recipe.recipe import Recipe, check_recipe
from lora_ggpo.recipe.source import Source, set_value

RATE = "training.learning_rate"

RATE_FACTORS = (1.0, 2.0, 0.5, 4.0, 0.25)
"""Learning rates to try, in units of the method's usual one; trial i takes the i-th, so every method gets the same."""

TUNING_SEED = 1000
"""Seed of tuning runs: not one of the seeds that are reported."""


@dataclass(frozen=True)
class Job:
    """One run: a recipe with one seed, in a folder of its own.

    Attributes:
        setting: Name of its values of the varied settings; "" where none is varied.
        seed: Its seed.
        values: What is tuned, by dotted key.
        trial: Number of the tuning trial; None is a final run.
        folder: OUTPUT/... below which the run folder ``seed-N`` lies.
    """

    setting: str
    method: Method
    seed: int
    values: Values
    trial: int | None
    folder: Path
    recipe: Recipe

    @property
    def run_folder(self) -> Path:
        """Where the run's files lie."""
        return self.folder / f"seed-{self.seed}"


@dataclass(frozen=True)
class Plan:
    """A comparison, or a study: methods in all settings, for what the settings do rather than for a winner.

    Attributes:
        source: The recipe that all runs share.
        methods: The first is the baseline.
        seeds: Seeds of the final runs.
        trials: Tuning trials of each method in each setting; 1 takes the usual values untested.
        settings: Values of the varied settings, by the name that tables give them.
        metric: Of the test set, what methods are compared by; of the validation set, what trials are chosen by.
        output: Folder of everything.
        study: A study leaves the test sets alone where its recipe does; its settings do not depend on each other, so
            more may be added later.
    """

    source: Source
    methods: tuple[Method, ...]
    seeds: tuple[int, ...]
    trials: int
    settings: Mapping[str, Values]
    metric: str
    output: Path
    study: bool = False

    def tuning(self) -> list[Job]:
        """The tuning runs; none where there is nothing to choose from."""
        if self.trials == 1:
            return []
        return [
            self._job(setting, method, TUNING_SEED, values, trial)
            for trial in range(self.trials)
            for setting in self.settings
            for method in self.methods
            for values in [self.candidates(method)[trial]]
        ]

    def final(self, chosen: Mapping[tuple[str, str], Values]) -> list[Job]:
        """The runs to report, given the chosen values by (setting, method name).

        Seed by seed: what is there early is paired, and a machine that grows slow slows every method.
        """
        return [
            self._job(setting, method, seed, chosen[setting, method.name], None)
            for seed in self.seeds
            for setting in self.settings
            for method in self.methods
            if (setting, method.name) in chosen
        ]

    def candidates(self, method: Method) -> list[Values]:
        """The values that the trials of a method take: the same number, and the same learning rates, for each.

        Trial 0 takes the usual values; later ones other learning rates and, where a method has more to tune, random
        choices of these that do not repeat.
        """
        base = self._learning_rate()
        draw = random.Random(f"candidates of {method.name}")
        found: list[dict[str, Any]] = []
        for trial in range(self.trials):
            factor = method.learning_rate * RATE_FACTORS[trial % len(RATE_FACTORS)]
            rate = base if factor == 1 else float(f"{base * factor:.3g}")
            fresh = [
                {RATE: rate, **dict(zip(method.tuned, options, strict=True))}
                for options in itertools.product(*method.tuned.values())
            ]
            fresh = [values for values in fresh if values not in found]
            if not fresh:
                raise UserError(
                    f"{method.title} has no {self.trials} different settings to try; use --trials {trial} or fewer."
                )
            found.append(fresh[0] if trial == 0 else draw.choice(fresh))
        return [dict(values) for values in found]

    def _learning_rate(self) -> float:
        training = self.source.values.get("training") or {}
        return float(training.get("learning_rate", TRAINING_DEFAULTS["learning_rate"]))

    def _job(self, setting: str, method: Method, seed: int, values: Values, trial: int | None) -> Job:
        place = ["tuning", method.name, f"trial-{trial}"] if trial is not None else ["runs", method.name]
        folder = self.output / "/".join(filter(None, [folder_name(setting), *place]))
        varied = self.settings[setting]
        values = {key: varied.get(key, value) for key, value in values.items()}
        fixed: Values = {"seeds": [seed], "output": folder.as_posix()}
        tested: Values = {} if self.study else {"score_test": trial is None}
        recipe = self._recipe(method, {**varied, **values, **fixed, **tested})
        return Job(setting, method, seed, values, trial, folder, recipe)

    def _recipe(self, method: Method, values: Values) -> Recipe:
        """The shared recipe with a method's settings and `values`.

        Raises:
            UserError: the method cannot be had with this recipe, with the reason.
        """
        changed = copy.deepcopy(self.source.values)
        if method.name != RECIPE:
            changed["adapter"] = changed.get("adapter") or dict(ADAPTER_DEFAULT)
            values = {**PLAIN, **method.settings, **values}
        for key, value in values.items():
            set_value(changed, key.split("."), copy.deepcopy(value), f"{key}={value}")
        source = Source(self.source.name, changed, self.source.lines, self.source.overrides)
        try:
            return check_recipe(source)
        except UserError as error:
            raise UserError(f"Method {method.name!r} cannot be run here: {error}") from error


def make_plan(
    source: Source,
    methods: Sequence[str],
    seeds: int,
    trials: int,
    vary: Iterable[str],
    metric: str | None,
    output: Path,
) -> Plan:
    """Check what was asked for.

    Args:
        methods: Names of `lora_ggpo.methods.table`, several joined by "+", or ``recipe``; the first is the baseline.
        seeds: Number of final runs of each method and setting, with seeds 0, 1, ...
        vary: ``key=value,value`` of data settings; all combinations are run.
        metric: None is accuracy for classification, Pearson's correlation for regression and loss for fine-tuning on
            completions.

    Raises:
        UserError: one sentence about the first thing that is wrong, before anything is run.
    """
    if len(set(methods)) < max(len(methods), 2):
        raise UserError("A comparison needs at least two different methods, the baseline first.")
    settings = settings_of(parse_axes(vary, "--vary", within="data."))
    rows, metric = _methods(methods), _metric(source, metric)
    return _checked(Plan(source, rows, tuple(range(seeds)), trials, settings, metric, output))


def make_study(source: Source, methods: Sequence[str], seeds: int, axes: Iterable[str], output: Path) -> Plan:
    """Check what was asked for.

    Args:
        methods: As `make_plan` takes them; one is enough.
        seeds: Number of runs of each method and setting, with seeds 0, 1, ...
        axes: ``key=value,value`` of any settings of the recipe; all combinations are run.

    Raises:
        UserError: as `make_plan`; or a method leaves no choice of a setting that is to vary.
    """
    if not methods or len(set(methods)) < len(methods):
        raise UserError("A study needs one method or several different ones.")
    rows, values = _methods(methods), parse_axes(axes, "--axis")
    for method in rows:
        refuse_fixed(method, values, "--axis")
    metric = _metric(source, None)
    return _checked(Plan(source, rows, tuple(range(seeds)), 1, settings_of(values), metric, output, study=True))


def _methods(names: Iterable[str]) -> tuple[Method, ...]:
    return tuple(Method(RECIPE, "the recipe", "") if name == RECIPE else find_method(name) for name in names)


def _metric(source: Source, metric: str | None) -> str:
    """`metric` if the task has it; for None the task's own."""
    task = check_recipe(source).task
    known = task.type.metrics
    if metric is not None and metric not in known:
        raise UserError(f"--metric {metric} is not measured for task {task.kind}; choose one of {', '.join(known)}.")
    return metric or known[0]


def _checked(plan: Plan) -> Plan:
    """`plan`, after a check of every recipe, so that none fails when others have run."""
    plan.tuning()
    plan.final({(s, m.name): plan.candidates(m)[0] for s in plan.settings for m in plan.methods})
    return plan


def folder_name(setting: str) -> str:
    """A setting's name as a folder."""
    return re.sub(r"[^\w.=-]+", "_", setting)
