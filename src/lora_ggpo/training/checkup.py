"""Try a recipe, or the recipe of a run, for one step: does the noise reach each adapted layer?"""

from __future__ import annotations

import tempfile
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from lora_ggpo.integrations.callback import GGPOCallback
from lora_ggpo.integrations.doctor import Checkup, chosen
from lora_ggpo.perturbation.reach import Reach, reach
from lora_ggpo.recipe.fields import GGPOFields
from lora_ggpo.recipe.recipe import Recipe, load_recipe
from lora_ggpo.training.build import build_model, build_trainer, training_arguments
from lora_ggpo.training.folder import describe_precision, find_runs, recorded_precision
from lora_ggpo.training.memory import memory_errors
from lora_ggpo.training.precision import precision_of
from lora_ggpo.workspace.environment import environment, installed, shown
from lora_ggpo.workspace.files import read_json
from lora_ggpo.workspace.libraries import quiet_libraries

ROWS = 4
"""Training rows that are tried, at most."""


def examine_run(folder: Path) -> Checkup:
    """As `examine_recipe`, for a run's recipe in the precision that it was begun with.

    Raises:
        UserError: there is no run, or as for a recipe.
    """
    run = find_runs(folder)[0].folder
    recipe = load_recipe(run / "recipe.yaml").model_copy(update={"precision": recorded_precision(run) or "fp32"})
    then = read_json(run / "versions.json") if (run / "versions.json").is_file() else {}
    others = [f"{name} {then[name]}" for name, now in installed().items() if then.get(name, now) != now]
    return examine_recipe(recipe, {"run made with": ", ".join(others) or "the same versions"})


def examine_recipe(recipe: Recipe, facts: dict[str, str] | None = None) -> Checkup:
    """Take one optimizer step as a run of `recipe` would, on a few rows, and leave nothing on disk.

    Args:
        facts: Others that the report is to have.

    Raises:
        UserError: bad input, as `train` finds it, or not enough memory.
    """
    quiet_libraries()
    with (
        tempfile.TemporaryDirectory(prefix="lora-ggpo-") as folder,
        recipe.locate_errors(),
        memory_errors(recipe, "per_device_train_batch_size"),
    ):
        args = training_arguments(recipe, Path(folder), recipe.seeds[0])
        of_recipe = {
            **(facts or {}),
            "model": shown(recipe.model) + (f" in {recipe.quantise}" if recipe.quantise else ""),
            "task": recipe.task.kind,
            "adapter": _short(recipe.adapter_fields),
            "precision": describe_precision(recipe.asked_precision, precision_of(args)),
        }
        if recipe.adapter is None:
            nothing = {"ggpo": "nothing to perturb: full fine-tuning has no adapter"}
            return Checkup(environment() | of_recipe | nothing)
        settings, layers = _tried(_with_noise(recipe), args)
        tried = {} if _is_noisy(recipe) else {"ggpo": "none in the recipe; tried with the defaults"}
        return Checkup(environment() | of_recipe | settings | tried, layers)


def _with_noise(recipe: Recipe) -> Recipe:
    """The recipe, if it has noise, without its `strict`; else with the defaults in place of its own method."""
    if recipe.ggpo and _is_noisy(recipe):
        return recipe.model_copy(update={"ggpo": recipe.ggpo.model_copy(update={"strict": False})})
    others = dict.fromkeys(("sam", "mgpo", "bi_lora", "optimizer"))
    return recipe.model_copy(update={"ggpo": GGPOFields(), **others})


def _is_noisy(recipe: Recipe) -> bool:
    config = recipe.ggpo_config(0)
    return config is not None and config.sigma > 0


def _tried(recipe: Recipe, args: TrainingArguments) -> tuple[dict[str, str], list[Reach]]:
    """What the settings come to, and all adapted layers after a step."""
    splits = recipe.task.type.load(recipe.data)
    few = splits.train.select(range(min(len(splits.train), args.per_device_train_batch_size, ROWS)))
    args.per_device_train_batch_size, args.gradient_accumulation_steps, args.max_steps = len(few), 1, 1
    args.save_strategy, args.logging_strategy, args.report_to = SaveStrategy.NO, IntervalStrategy.NO, []
    model, tokenizer, rows = build_model(recipe, args, replace(splits, train=few))
    trainer = build_trainer(recipe, args, model, tokenizer, rows)
    method = next(one for one in trainer.callback_handler.callbacks if isinstance(one, GGPOCallback))
    look = _Look(method)
    trainer.add_callback(look)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*GGPO")  # the report says it
        trainer.train()
    assert method.ggpo is not None
    return chosen(method.ggpo), look.layers


class _Look(TrainerCallback):
    """Looks at the layers while their gradients are there."""

    def __init__(self, method: GGPOCallback) -> None:
        self._method = method
        self.layers: list[Reach] = []

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        assert self._method.ggpo is not None
        self.layers = reach(self._method.ggpo)


def _short(values: dict[str, Any] | None) -> str:
    return ", ".join(f"{key} {value}" for key, value in values.items()) if values else "none (full fine-tuning)"
