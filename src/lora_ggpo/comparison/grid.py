"""What a comparison, a study or the demo runs: settings, methods, tuning trials and seeds, as recipes."""

from __future__ import annotations

import copy
import itertools
import random
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from lora_ggpo.comparison.axes import (
    FIXED,
    NO_ADAPTER,
    Values,
    parse_axes,
    recipe_values,
    refuse_dropped,
    refuse_fixed,
    settings_of,
)
from lora_ggpo.errors import UserError
from lora_ggpo.methods.table import PLAIN, RECIPE, Method, each, find_method
from lora_ggpo.recipe.fields import ADAPTER_DEFAULT, TRAINING_DEFAULTS
from lora_ggpo.recipe.recipe import Recipe, check_recipe
from lora_ggpo.recipe.source import Source, parse_source, set_value

RATE = "training.learning_rate"

RATE_FACTORS = (1.0, 2.0, 0.5, 4.0, 0.25)
"""Learning rates to try, in units of the method's usual one; trial i takes the i-th, so every method gets the same."""

FACTOR_OF = "factor of "
"""Before a method's `factors`, where they stand among the values of a run."""

TUNING_SEED = 1000
"""Seed of tuning runs: not one of the seeds that are reported."""


@dataclass(frozen=True)
class PlannedRun:
    """A recipe with one seed, and the folder of its run.

    Attributes:
        setting: Name of its values of the varied settings; "" where none is varied.
        values: What is tuned, by dotted key; factors on the recipe's own settings behind `FACTOR_OF`.
        trial: Number of the tuning trial; None is a final run.
        folder: Where the run's files lie.
    """

    setting: str
    method: Method
    seed: int
    values: Values
    trial: int | None
    folder: Path
    recipe: Recipe


@dataclass(frozen=True)
class Grid:
    """Methods in all settings: a comparison, or a study of what the settings do.

    Attributes:
        source: The recipe that all runs share.
        methods: The first is the baseline.
        seeds: Seeds of the final runs.
        trials: Tuning trials of each method in each setting; 1 takes the usual values untested.
        settings: Values of the varied settings, by the name that tables give them.
        metric: Methods are compared by it on the test set, and trials are chosen by it on the validation set.
        output: Folder of everything.
        study: A study leaves the test sets alone where its recipe does, and settings may be added to it later.
    """

    source: Source
    methods: tuple[Method, ...]
    seeds: tuple[int, ...]
    trials: int
    settings: Mapping[str, Values]
    metric: str
    output: Path
    study: bool = False

    def tuning(self) -> list[PlannedRun]:
        """The tuning runs; none where there is nothing to choose from."""
        if self.trials == 1:
            return []
        return [
            self._run(setting, method, TUNING_SEED, self.candidates(method)[trial], trial)
            for trial in range(self.trials)
            for setting in self.settings
            for method in self.methods
        ]

    def final(self, chosen: Mapping[tuple[str, str], Values] | None = None) -> list[PlannedRun]:
        """The runs to report, given the chosen values by (setting, method name); the usual ones by default.

        Seed by seed: what is there early is paired, and a machine that grows slow slows every method.
        """
        if chosen is None:
            chosen = {(s, method.name): self.candidates(method)[0] for s in self.settings for method in self.methods}
        return [
            self._run(setting, method, seed, chosen[setting, method.name])
            for seed in self.seeds
            for setting in self.settings
            for method in self.methods
        ]

    def candidates(self, method: Method) -> list[Values]:
        """The values that the trials of a method take: the same number, and the same learning rates, for each.

        Trial 0 takes the usual values; later ones other learning rates and, where a method has more to tune, the other
        choices of these in random order, each before any comes again.
        """
        training = self.source.values.get("training") or {}
        base = float(training.get("learning_rate", TRAINING_DEFAULTS["learning_rate"]))
        tuned = {**method.tuned, **{f"{FACTOR_OF}{key}": factors for key, factors in method.factors.items()}}
        usual, *others = itertools.product(*tuned.values())
        random.Random(f"candidates of {method.name}").shuffle(others)
        options = [dict(zip(tuned, option, strict=True)) for option in (usual, *others)]
        found: list[Values] = []
        for trial in range(self.trials):
            factor = method.learning_rate * RATE_FACTORS[trial % len(RATE_FACTORS)]
            rate = base if factor == 1 else float(f"{base * factor:.3g}")
            first = trial % len(options)
            turns = [{RATE: rate, **option} for option in (*options[first:], *options[:first])]
            fresh = next((values for values in turns if values not in found), None)
            if fresh is None:
                raise UserError(
                    f"{method.title} has no {self.trials} different settings to try; use --trials {trial} or fewer."
                )
            found.append(fresh)
        return found

    def _run(self, setting: str, method: Method, seed: int, values: Values, trial: int | None = None) -> PlannedRun:
        place = ["runs", method.name] if trial is None else ["tuning", method.name, f"trial-{trial}"]
        folder = self.output / "/".join(filter(None, [re.sub(r"[^\w.=-]+", "_", setting), *place]))
        varied = recipe_values(self.settings[setting])
        values = {key: varied.get(key, value) for key, value in values.items()}
        fixed: Values = {"seeds": [seed], "output": folder.as_posix()}
        tested: Values = {} if self.study else {"score_test": trial is None}
        recipe = self._recipe(method, {**varied, **values, **fixed, **tested})
        if varied.items() >= NO_ADAPTER.items() and not recipe.freeze_head:
            raise UserError(
                "--axis adapter.r=0 is the model without an adapter, and nothing of it may be trained; "
                "set freeze_head: true, or leave 0 out."
            )
        return PlannedRun(setting, method, seed, values, trial, folder / f"seed-{seed}", recipe)

    def _recipe(self, method: Method, values: Values) -> Recipe:
        """The shared recipe with a method's settings and `values`.

        Raises:
            UserError: the method cannot be had with this recipe, with the reason.
        """
        changed = copy.deepcopy(self.source.values)
        if method.plain:
            changed["adapter"] = changed.get("adapter") or dict(ADAPTER_DEFAULT)
        plain = {
            key: value for key, value in PLAIN.items() if method.plain and (value is not None or _has(changed, key))
        }
        factors = {key.removeprefix(FACTOR_OF): value for key, value in values.items() if key.startswith(FACTOR_OF)}
        settings = {key: value for key, value in values.items() if not key.startswith(FACTOR_OF)}
        for key, value in {**plain, **method.settings, **settings}.items():
            set_value(changed, key.split("."), copy.deepcopy(value), f"{key}={value}")
        source = Source(self.source.name, changed, self.source.lines, self.source.overrides)
        try:
            recipe = check_recipe(source)
            if not factors:
                return recipe
            for key, value in _multiplied(recipe, factors).items():
                set_value(changed, key.split("."), value, f"{key}={value}")
            return check_recipe(source)
        except UserError as error:
            raise UserError(f"Method {method.name!r} cannot be run here: {error}") from error


def _multiplied(recipe: Recipe, factors: Mapping[str, float]) -> Values:
    """The recipe's settings times their `factors`; without those that are not in force, such as max_steps -1."""
    found: dict[str, Any] = {}
    for key, factor in each(factors).items():
        section, _, name = key.partition(".")
        fields = getattr(recipe, section)
        value, count = getattr(fields, name), isinstance(type(fields).model_fields[name].default, int)
        if value > 0:
            found[key] = max(1, round(value * factor)) if count else value * factor
    return found


def _has(values: Any, key: str) -> bool:
    """Whether a recipe says anything of a setting; what it leaves unsaid is not recorded as null."""
    for name in key.split("."):
        values = values.get(name) if isinstance(values, Mapping) else None
    return values is not None


def plan_comparison(
    source: Source,
    methods: Sequence[str],
    seeds: int,
    trials: int,
    vary: Iterable[str],
    metric: str | None,
    output: Path,
) -> Grid:
    """The grid of a comparison, checked before anything is run.

    Args:
        methods: Names of `lora_ggpo.methods.table`, several joined by "+", or ``recipe``; the first is the baseline.
        seeds: Number of final runs of each method and setting, with seeds 0, 1, ...
        vary: ``key=value,value`` of data settings; all combinations are run.
        metric: None is the task's first.

    Raises:
        UserError: one sentence about the first thing that is wrong.
    """
    rows = _methods(methods)  # a name that is none is told first
    if len(set(methods)) < max(len(methods), 2):
        raise UserError("A comparison needs at least two different methods, the baseline first.")
    settings = settings_of(parse_axes(vary, "--vary", within="data."))
    return _grid(source, rows, seeds, trials, settings, output, metric)


def plan_study(source: Source, methods: Sequence[str], seeds: int, axes: Iterable[str], output: Path) -> Grid:
    """The grid of a study, checked as by `plan_comparison`.

    Args:
        methods: One is enough.
        axes: ``key=value,value`` of any settings that the methods leave open; all combinations are run.
    """
    if not methods or len(set(methods)) < len(methods):
        raise UserError("A study needs one method or several different ones.")
    rows, values = _methods(methods), parse_axes(axes, "--axis")
    for method in rows:
        refuse_fixed(method, values, "--axis")
    return _grid(source, rows, seeds, 1, settings_of(values), output, study=True)


def plan_demo(seeds: int, output: Path, overrides: Iterable[str] = ()) -> Grid:
    """LoRA against LoRA-GGPO, on bundled reviews of which a quarter has the wrong label, without tuning.

    Args:
        overrides: Settings to change for both methods, ``key=value``.
    """
    text = (files("lora_ggpo.comparison") / "demo.yaml").read_text(encoding="utf-8")
    source = parse_source(text, "the demo's recipe", overrides)
    methods = (
        Method("lora", "LoRA", "2106.09685", {"ggpo": None}, plain=False),
        Method("ggpo", "LoRA-GGPO", "2502.14538", plain=False),
    )
    return _grid(source, methods, seeds, 1, settings_of({}), output)


def _methods(names: Iterable[str]) -> tuple[Method, ...]:
    recipe = Method(RECIPE, "the recipe", "", plain=False)
    return tuple(recipe if name == RECIPE else find_method(name) for name in names)


def _metric(source: Source, metric: str | None) -> str:
    """`metric` if the task has it; for None the task's own."""
    task = check_recipe(source).task
    known = task.type.metrics
    if metric is not None and metric not in known:
        raise UserError(f"--metric {metric} is not measured for task {task.kind}; choose one of {', '.join(known)}.")
    return metric or known[0]


def _grid(
    source: Source,
    methods: tuple[Method, ...],
    seeds: int,
    trials: int,
    settings: Mapping[str, Values],
    output: Path,
    metric: str | None = None,
    *,
    study: bool = False,
) -> Grid:
    """A grid, after a check of every recipe, so that none fails when others have run."""
    for key, instead in FIXED.items():
        if (key,) in source.overrides and not (study and key == "score_test"):
            raise UserError(f"{source.where((key,))}: {key} is decided by the command; {instead}.")
    refuse_dropped(source, methods)
    grid = Grid(source, methods, tuple(range(seeds)), trials, settings, _metric(source, metric), output, study)
    grid.tuning()
    grid.final()
    return grid
