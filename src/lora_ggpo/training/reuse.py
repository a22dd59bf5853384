"""Use a finished run: load what it trained, and score it again or on other data."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from lora_ggpo.data import digest
from lora_ggpo.data.bundled import GENERAL_TEXT
from lora_ggpo.errors import UserError
from lora_ggpo.recipe.recipe import Recipe, load_recipe
from lora_ggpo.statistics.measured import plain
from lora_ggpo.tasks import Task
from lora_ggpo.training.build import AnyModel, load_weights, training_arguments
from lora_ggpo.training.draws import Draws, predicting
from lora_ggpo.training.folder import finished_metrics, kept_temperature, read_run, weights_folder
from lora_ggpo.training.forgetting import forgetting_of
from lora_ggpo.training.identity import check_data, check_model, check_weights
from lora_ggpo.training.memory import memory_errors
from lora_ggpo.training.scorer import Scorer, evaluation_sets
from lora_ggpo.workspace.files import file_name, read_json, write_json
from lora_ggpo.workspace.libraries import quiet_libraries, versions
from lora_ggpo.workspace.progress import Reporter


def load_trained(
    folder: Path, *, quantised: bool = True, base: str | None = None
) -> tuple[AnyModel, PreTrainedTokenizerBase, Recipe, Task]:
    """Load the trained model of a finished run, its tokenizer, recipe and task.

    Args:
        quantised: Quantise the base model as the run did; False loads it in the recipe's dtype, under the same adapter.
        base: Where the base model lies now, if it has moved.

    Raises:
        UserError: the run is unfinished, or its weights or its base model are missing or not those that it ended with.
    """
    metrics = finished_metrics(read_run(folder))
    recipe = load_recipe(folder / "recipe.yaml")
    data = read_json(folder / "data.json")
    if not isinstance(data, dict) or "labels" not in data:
        raise UserError(f"{folder / 'data.json'} is damaged: it names no labels.")
    check_weights(weights_folder(folder, recipe), metrics)
    if base and recipe.adapter is None:
        raise UserError(f"{folder} is full fine-tuning, whose model lies in it; leave out --model.")
    if base:
        recipe = recipe.model_copy(update={"model": base})
    if recipe.adapter is not None:
        check_model(folder, recipe.model, chosen=base is not None)
    task = recipe.task.for_labels(data["labels"])
    args = training_arguments(recipe, folder, recipe.seeds[0]) if quantised else None
    model, tokenizer = load_weights(recipe, task, folder, args)
    return model, tokenizer, recipe, task


def evaluate_run(
    folder: Path,
    on: str | None = None,
    reporter: Reporter | None = None,
    base: str | None = None,
    draws: Draws | None = None,
) -> dict[str, dict[str, Any]]:
    """Score the finished run in `folder`; keep the scores in ``folder/evaluation/sets-*.json`` if that can be written.

    Args:
        on: Data to score on (a bundled name, file, folder or hub id, with the run's columns or default ones); None is
            all sets of the run.
        base: Where the run's base model lies now, if it has moved.
        draws: Average predictions over draws of noise; None predicts with the weights as they are.

    Returns:
        {set: {metric: {"value", "se", "n"}}}.

    Raises:
        UserError: the run is unfinished, the data does not fit it or is no longer that of the run, or does not fit
            into memory.
    """
    quiet_libraries()
    reporter = reporter or Reporter()
    model, tokenizer, recipe, task = load_trained(folder, base=base)
    data = recipe.data if on is None else recipe.data.model_copy(update={"out_of_domain": [on]})
    splits = task.load(data)
    if on is None:
        check_data(folder, splits)
    elif splits.labels != task.labels:
        raise UserError(f"The labels of {recipe.data.source} have changed since {folder} was trained on them.")
    else:
        task.temperature = kept_temperature(read_run(folder))
    args = training_arguments(recipe, folder, recipe.seeds[0])
    sets = evaluation_sets(splits, recipe.score_rows) if on is None else splits.out_of_domain
    score = Scorer(args, model, tokenizer, task, reporter)
    noise = predicting(draws, score, model, recipe, task, splits.validation) if draws else nullcontext(0.0)
    with memory_errors(recipe, "per_device_eval_batch_size"), noise as sigma:
        if draws:
            reporter.say(f"{folder}: {draws.count} draws at sigma {sigma:.4g}")
        found = score.score(sets, None)
        forgetting = forgetting_of(recipe, folder, score) if on is None and not draws else None
        scores = plain({**found, **({GENERAL_TEXT: forgetting.measure()} if forgetting else {})})
    under = f"-{draws.count}-draws" if draws else ""
    kept = folder / "evaluation" / f"sets-{file_name(on) if on else 'own'}{under}.json"
    facts: dict[str, Any] = {"draws": {**asdict(draws), "sigma": sigma}} if draws else {}
    facts |= {"on": on, "data": {name: digest(rows) for name, rows in sets.items()}, "versions": versions()}
    try:
        kept.parent.mkdir(exist_ok=True)
        write_json(kept, {"evaluation": scores, **facts})
    except OSError as error:
        reporter.say(f"{kept} cannot be written ({error.strerror}); the scores are not kept.")
    return scores
