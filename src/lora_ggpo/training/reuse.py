"""What is done with a finished run: score it on other data, or merge its adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lora_ggpo.data import digest
from lora_ggpo.errors import UserError
from lora_ggpo.training.evaluation import evaluation_sets, file_name, plain
from lora_ggpo.training.files import disk_errors, new_folder, write_json
from lora_ggpo.training.identity import check_data
from lora_ggpo.training.memory import memory_errors
from lora_ggpo.training.progress import Reporter
from lora_ggpo.training.run import (
    find_runs,
    load_splits,
    load_trained,
    quiet_libraries,
    scorer,
    training_arguments,
    versions,
)

MERGE_TOLERANCE = {torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 2e-1}
"""Allowed difference of merged and unmerged logits, relative to the largest logit: rounding of the merged weights."""


class Merged(NamedTuple):
    """What merging did to the logits of a few probe texts.

    Attributes:
        difference: Largest difference of the merged model to the adapter on the same weights: rounding.
        largest: Largest logit.
        quantised: Of a run with a quantised model, its kind ("nf4", "int8") and the largest difference of the merged
            model to the run itself: the merged model's weights are not quantised. None for other runs.
    """

    difference: float
    largest: float
    quantised: tuple[str, float] | None


_PROBES = ["The film was a delight from start to finish.", "A dull, overlong mess.", "Two plus two is"]


def evaluate_run(folder: Path, on: str | None = None, reporter: Reporter | None = None) -> dict[str, dict[str, Any]]:
    """Score the finished run in `folder`; keep the scores in ``folder/evaluation/sets-*.json`` if that can be written.

    Args:
        on: Data to score on (a bundled name, file, folder or hub id, with the run's columns or default ones); None is
            all sets of the run.

    Returns:
        {set: {metric: {"value", "se", "n"}}}.

    Raises:
        UserError: the run is unfinished, the data does not fit it or is no longer that of the run, or does not fit
            into memory.
    """
    quiet_libraries()
    reporter = reporter or Reporter()
    model, tokenizer, recipe, labels = load_trained(folder)
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


def merge_run(path: Path, out: Path) -> Merged:
    """Merge the adapter of the run at `path` into its model and save model and tokenizer in `out`.

    The model of a run that quantised it is loaded as it is without, in the recipe's dtype.

    Raises:
        UserError: several seeds and none chosen, full fine-tuning, `out` is in use, or the merged model computes
            something else; then nothing is written.
    """
    quiet_libraries()
    out = out.resolve()
    runs = find_runs(path)
    if len(runs) > 1:
        raise UserError(f"{path} holds {len(runs)} runs; choose one, such as {runs[0].folder}.")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists already; choose a new folder.")
    model, tokenizer, recipe, _ = load_trained(runs[0].folder, quantised=False)
    if recipe.adapter is None:
        raise UserError(
            f"{runs[0].folder} is full fine-tuning: its model folder is complete, there is nothing to merge."
        )
    before = _logits(model, tokenizer)
    merged: PreTrainedModel = model.merge_and_unload()  # type: ignore[operator]
    after = _logits(merged, tokenizer)
    difference = float((after - before).abs().max())
    largest = float(before.abs().max())
    if not difference <= MERGE_TOLERANCE[merged.dtype] * max(largest, 1.0):
        raise UserError(
            f"The merged model's logits differ by {difference:.1e} (logits reach {largest:.2g}); nothing is saved. "
            "Merge in float32 by training with dtype: float32."
        )
    with disk_errors(out), new_folder(out) as target:
        merged.save_pretrained(target)
        tokenizer.save_pretrained(target)
    if recipe.quantise is None:
        return Merged(difference, largest, None)
    del model, merged  # the quantised model is loaded beside nothing else
    trained = _logits(load_trained(runs[0].folder)[0], tokenizer)
    return Merged(difference, largest, (recipe.quantise, float((after - trained).abs().max())))


def _logits(model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    batch = tokenizer(_PROBES, padding=True, return_tensors="pt").to(next(model.parameters()).device)
    mask = batch["attention_mask"]
    inputs = {"input_ids": batch["input_ids"], "attention_mask": mask}
    if model.config.is_encoder_decoder:  # type: ignore[union-attr]
        inputs["decoder_input_ids"] = batch["input_ids"]  # the decoder reads the probes as well
    with torch.no_grad():
        logits = model.eval()(**inputs).logits.float().cpu()
    mask = mask.cpu()
    return logits * mask[..., None] if logits.dim() == 3 else logits  # what stands on padding does not matter
