"""Score a finished run again, or on other data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lora_ggpo.data import digest
from lora_ggpo.errors import UserError
from lora_ggpo.training.identity import check_data
from lora_ggpo.training.memory import memory_errors
from lora_ggpo.training.run import (
    load_splits,
    load_trained,
    quiet_libraries,
    scorer,
    training_arguments,
    versions,
)
from lora_ggpo.training.scorer import evaluation_sets, file_name, plain
from lora_ggpo.workspace.files import write_json
from lora_ggpo.workspace.progress import Reporter


def evaluate_run(
    folder: Path, on: str | None = None, reporter: Reporter | None = None, base: str | None = None
) -> dict[str, dict[str, Any]]:
    """Score the finished run in `folder`; keep the scores in ``folder/evaluation/sets-*.json`` if that can be written.

    Args:
        on: Data to score on (a bundled name, file, folder or hub id, with the run's columns or default ones); None is
            all sets of the run.
        base: Where the run's base model lies now, if it has moved.

    Returns:
        {set: {metric: {"value", "se", "n"}}}.

    Raises:
        UserError: the run is unfinished, the data does not fit it or is no longer that of the run, or does not fit
            into memory.
    """
    quiet_libraries()
    reporter = reporter or Reporter()
    model, tokenizer, recipe, labels = load_trained(folder, base=base)
    data = recipe.data if on is None else recipe.data.model_copy(update={"out_of_domain": [on]})
    splits = load_splits(recipe.task, data)
    if on is None:
        check_data(folder, splits)
    elif splits.labels != labels:
        raise UserError(f"The labels of {recipe.data.source} have changed since {folder} was trained on them.")
    args = training_arguments(recipe, folder, recipe.seeds[0])
    sets = evaluation_sets(splits) if on is None else splits.out_of_domain
    with memory_errors(recipe, "per_device_eval_batch_size"):
        scores = plain(scorer(model, tokenizer, recipe.task.for_labels(labels), args, reporter).score(sets, None))
    kept = folder / "evaluation" / f"sets-{file_name(on) if on else 'own'}.json"
    facts = {"on": on, "data": {name: digest(rows) for name, rows in sets.items()}, "versions": versions()}
    try:
        kept.parent.mkdir(exist_ok=True)
        write_json(kept, {"evaluation": scores, **facts})
    except OSError as error:
        reporter.say(f"{kept} cannot be written ({error.strerror}); the scores are not kept.")
    return scores
