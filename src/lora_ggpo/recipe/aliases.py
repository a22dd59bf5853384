"""Settings of transformers' TrainingArguments that a recipe has under other names: what they say is taken over."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from lora_ggpo.statistics.metrics import METRICS

Values = Mapping[str, Any]


def translate(values: Any) -> Any:
    """The `values` of a recipe with the aliases in ``training`` as the settings that they stand for.

    Raises:
        ValueError: one has no such meaning here, or contradicts the recipe; it comes first in the message.
    """
    training = values.get("training") if isinstance(values, Mapping) else None
    if not isinstance(training, Mapping) or not training.keys() & ALIASES.keys():
        return values
    found, training = dict(values), {"eval_steps": values.get("validate_every"), **training}
    for alias, (setting, read) in ALIASES.items():
        if training.get(alias) is None:
            continue
        value = read(training)
        if setting is None or value is None:
            continue
        if found.setdefault(setting, value) != value:
            given = found[setting]
            raise ValueError(f"training.{alias} makes {setting} {value}, which is {given} here; leave one of them out")
    found["training"] = {name: value for name, value in training.items() if name not in ALIASES}
    return found


def _steps_strategy(alias: str, instead: str) -> Callable[[Values], None]:
    def read(training: Values) -> None:
        if training[alias] != "steps":
            raise ValueError(f"training.{alias} {training[alias]} cannot be had: {instead}")

    return read


_LOG = "the log has a line every logging_steps steps"
_SAVE = "checkpoints come every save_steps steps"
_VALIDATE = "validations come every validate_every steps"


def _every(training: Values) -> int | None:
    strategy, steps = training.get("eval_strategy"), training.get("eval_steps")
    if strategy in (False, "no"):  # which YAML 1.1 takes for false
        return None
    if strategy not in (None, "steps"):
        raise ValueError(f"training.eval_strategy {strategy} cannot be had: {_VALIDATE}")
    if steps is None:
        raise ValueError("training.eval_strategy steps needs their number: set validate_every")
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"training.eval_steps must be a whole number of steps, at least 1, not {steps!r}")
    return steps


def _keep(training: Values) -> str | None:
    best = training["load_best_model_at_end"]
    if not isinstance(best, bool):
        raise ValueError(f"training.load_best_model_at_end must be true or false, not {best!r}")
    return "best" if best else None


def _metric(training: Values) -> str | None:
    name = str(training.get("metric_for_best_model") or "loss").removeprefix("eval_")
    better = training.get("greater_is_better")
    higher = name in METRICS and METRICS[name].higher_is_better
    if better is not None and better != higher:
        raise ValueError(f"training.greater_is_better is {str(higher).lower()} for {name} in any case; leave it out")
    return None if name == "loss" else name  # which is the task's, whatever its name


ALIASES: Mapping[str, tuple[str | None, Callable[[Values], Any]]] = {
    "eval_strategy": ("validate_every", _every),
    "eval_steps": ("validate_every", _every),
    "load_best_model_at_end": ("keep", _keep),
    "metric_for_best_model": ("keep_metric", _metric),
    "greater_is_better": ("keep_metric", _metric),
    "logging_strategy": (None, _steps_strategy("logging_strategy", _LOG)),
    "save_strategy": (None, _steps_strategy("save_strategy", _SAVE)),
}
"""By field: the setting that it stands for (none if it may only say what holds anyway), and what it makes of that."""


def describe() -> dict[str, dict[str, str]]:
    """The aliases as properties of a JSON schema, which take what transformers takes."""
    return {
        alias: {"description": f"transformers' name for {setting}." if setting else "It may only say steps."}
        for alias, (setting, _) in ALIASES.items()
    }
