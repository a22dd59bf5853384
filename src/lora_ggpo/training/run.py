"""Carry out a recipe: one run folder for each seed.

OUTPUT/seed-0/  recipe.yaml    the recipe as resolved; itself a recipe
                versions.json  of Python and the libraries; the day the run was begun
                data.json      digest and size of each split, and the labels
                model.json     digests of the base model's files
                log.jsonl      one line for each logged step
                training.json  steps, time, memory, parameters: written when training has ended
                checkpoints/   what an unfinished run resumes from
                adapter/       stock PEFT (model/ with full fine-tuning)
                predictions/   one file for each set: a line for each row
                 metrics.json   written last: a run that has it is finished
               training.png   the log as curves, which `lora-ggpo train` draws
"""

from __future__ import annotations

import logging
import math
import platform
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import date
from functools import cache, partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from types import UnionType
from typing import Any

import datasets
import torch
import transformers
from datasets import Dataset
from peft import PeftModel
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import SaveStrategy

from lora_ggpo.data import DataConfig, Splits, load_classification, load_completion, load_regression
from lora_ggpo.errors import DivergedError, UserError, rejected
from lora_ggpo.integrations.callback import GGPOCallback
from lora_ggpo.methods.adalora import AdaLoraCallback
from lora_ggpo.methods.ascent import MGPO, SAM
from lora_ggpo.methods.initialise import save_difference, save_start
from lora_ggpo.methods.optimizers import OPTIMIZERS
from lora_ggpo.models.adapters import add_adapter, count_parameters, freeze_body, load_adapter
from lora_ggpo.models.load import check_tokens, load_model
from lora_ggpo.models.quantise import Quantisation
from lora_ggpo.models.saving import save_ends, save_model, save_tokenizer
from lora_ggpo.recipe.recipe import Recipe, dump_yaml, load_recipe
from lora_ggpo.recipe.source import KeyPath, flatten, read_source
from lora_ggpo.tasks import TaskConfig, collator, encode
from lora_ggpo.tasks.pack import check_packing, pack
from lora_ggpo.tasks.regression import start_at_mean
from lora_ggpo.training.callbacks import RunCallback
from lora_ggpo.training.checkpoints import last_whole, refused, remove_broken, remove_unsealed, step_of
from lora_ggpo.training.identity import check_model, keep_day, record, recorded_day
from lora_ggpo.training.memory import memory_errors
from lora_ggpo.training.scorer import Scorer, evaluation_sets, file_name, fixed_sample, plain
from lora_ggpo.training.trainer import MakeAscent, NonFiniteLossError, RunTrainer, check_checkpointing
from lora_ggpo.workspace.files import (
    digests,
    disk_errors,
    locked,
    new_folder,
    read_json,
    read_json_lines,
    settle,
    write_json,
    write_text,
)
from lora_ggpo.workspace.interrupt import Interrupted, StopRequest, two_stage_interrupt
from lora_ggpo.workspace.progress import Reporter
from lora_ggpo.workspace.ranks import is_first, wait_for_all

VALIDATION_ROWS = 500
_STOPPING = "Stopping after this step; press Ctrl-C again, or send SIGTERM again, to stop at once."
_SECTIONS: dict[str, type | UnionType] = {
    "model": str,
    "task": dict,
    "data": dict,
    "adapter": dict | None,
    "ggpo": dict | None,
    "training": dict,
}
_OTHERS = ("sam", "mgpo", "optimizer")
# What a run that was begun may change: where it lies, and what decides its memory and speed alone.
_FREE: tuple[KeyPath, ...] = (
    ("output",),
    ("seeds",),
    ("training", "per_device_eval_batch_size"),
    ("training", "dataloader_num_workers"),
)
_LIBRARIES = ("lora-ggpo", "torch", "transformers", "peft", "accelerate", "datasets", "safetensors", "numpy", "scipy")


@dataclass(frozen=True)
class Run:
    """A run folder as it is on disk; `metrics` is None until the run is finished."""

    folder: Path
    recipe: dict[str, Any]
    log: list[dict[str, Any]]
    metrics: dict[str, Any] | None


def train(recipe: Recipe, reporter: Reporter | None = None) -> list[Run]:
    """Run `recipe` once for each of its seeds.

    A finished run is not run again; an unfinished one goes on from its last whole checkpoint.

    Under torchrun (or whatever sets RANK and WORLD_SIZE) the processes share the batches as Trainer has them do; the
    first one writes, and scores the trained model.

    Raises:
        UserError: bad input, a loss that is not finite, a full disk, or a folder that holds a run of another recipe or
            is in use.
        Interrupted: Ctrl-C or SIGTERM; a checkpoint has been saved.
    """
    reporter = reporter or Reporter(quiet=not is_first())
    quiet_libraries()
    splits = cache(lambda: load_splits(recipe.task, recipe.data))
    with recipe.located():
        return [_run_seed(recipe, seed, splits, reporter) for seed in recipe.seeds]


def read_run(folder: Path) -> Run:
    """Read one run folder (``.../seed-0``).

    Raises:
        UserError: it is no run folder, or its files are damaged.
    """
    if not (folder / "recipe.yaml").is_file():
        raise UserError(f"{folder} is not a run: it has no recipe.yaml; give a folder that `lora-ggpo train` made.")
    if not folder.absolute().name.startswith("seed-") and not (folder / "versions.json").is_file():
        raise UserError(
            f"{folder / 'recipe.yaml'} is a recipe and no run; give the folder that `lora-ggpo train` made."
        )
    recipe = read_source(folder / "recipe.yaml").values
    damaged = next((name for name, kind in _SECTIONS.items() if not isinstance(recipe.get(name, ...), kind)), None)
    if damaged:
        raise UserError(f"{folder / 'recipe.yaml'} is damaged: it has no {damaged}.")
    metrics = read_json(folder / "metrics.json") if (folder / "metrics.json").is_file() else None
    if metrics is not None and not (isinstance(metrics, dict) and {"evaluation", "training"} <= metrics.keys()):
        raise UserError(f"{folder / 'metrics.json'} is damaged: it holds no metrics.")
    return Run(folder, recipe, read_json_lines(folder / "log.jsonl"), metrics)


def finished_metrics(run: Run) -> dict[str, Any]:
    """What the run ended with.

    Raises:
        UserError: it is unfinished.
    """
    if run.metrics is None:
        raise UserError(f"{run.folder} is not finished; give its `lora-ggpo train` command again to finish it.")
    return run.metrics


def find_runs(path: Path) -> list[Run]:
    """The runs at `path`: itself, or the seeds below it, in the order of the seeds.

    A seed's folder without files is none: a run that was killed as it began leaves it.

    Raises:
        UserError: there is none, or the seeds are of different recipes.
    """
    seeds = [
        folder
        for folder in path.glob("seed-*")
        if folder.name.removeprefix("seed-").isdecimal() and any(folder.glob("[!.]*"))
    ]
    if not seeds and not (path / "recipe.yaml").is_file():
        raise UserError(f"There is no run in {path}; give a folder that `lora-ggpo train` made.")
    seeds.sort(key=lambda folder: int(folder.name.removeprefix("seed-")))
    runs = [read_run(folder) for folder in seeds or [path]]
    _refuse_different(runs)
    return runs


def _refuse_different(runs: Sequence[Run]) -> None:
    """Refuse seeds of different recipes, whose mean would be of none of them."""
    first, *others = [run.folder for run in runs]
    wanted = _defaults_filled_in(first / "recipe.yaml") if others else {}
    for other in others:
        there = _defaults_filled_in(other / "recipe.yaml")
        for name, one, another in _differences(wanted, there, apart_from=(*_FREE, ("ggpo", "seed"))):
            raise UserError(
                f"{first} and {other} are runs of different recipes: {name} is {one} in {first.name} and {another} in "
                f"{other.name}; choose one of them."
            )


def load_splits(task: TaskConfig, data: DataConfig) -> Splits:
    """The data of a task."""
    if task.kind == "sft":
        return load_completion(data)
    return load_regression(data) if task.kind == "regression" else load_classification(data)


def load_trained(
    folder: Path, *, quantised: bool = True, base: str | None = None
) -> tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerBase, Recipe, list[str] | None]:
    """Load the trained model of a finished run, its tokenizer, recipe and labels.

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
    labels = data["labels"]
    _check_weights(folder / _weights_name(recipe), metrics)
    if base and recipe.adapter is None:
        raise UserError(f"{folder} is full fine-tuning, whose model lies in it; leave out --model.")
    if base:
        recipe = recipe.model_copy(update={"model": base})
    if recipe.adapter is not None:
        check_model(folder, recipe.model, chosen=base is not None)
    model, tokenizer = _load_weights(recipe, labels, folder, quantised)
    return model, tokenizer, recipe, labels


def scorer(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    task: TaskConfig,
    args: TrainingArguments,
    reporter: Reporter,
) -> Scorer:
    """Scores `model` on the device and in the precision of `args`."""
    autocast = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
    model.to(args.device)
    batch_size = args.per_device_eval_batch_size
    return Scorer(model, tokenizer, task, batch_size=batch_size, autocast=autocast, reporter=reporter)


def training_arguments(recipe: Recipe, folder: Path, seed: int) -> TrainingArguments:
    """transformers' arguments for a run in `folder`.

    Raises:
        UserError: transformers rejects a value.
    """
    with rejected("training", recipe.training.model_fields_set):
        return TrainingArguments(
            # transformers refuses bf16 on a machine without an accelerator unless it is told to use the CPU.
            **{"use_cpu": not torch.accelerator.is_available()} | recipe.training_fields,
            output_dir=str((folder / "checkpoints").absolute()),  # transformers would expand a ~ at its beginning
            seed=seed,
            data_seed=seed,
            report_to="none",
            disable_tqdm=True,
            logging_nan_inf_filter=False,
            remove_unused_columns=False,
        )


def scored_sets(recipe: Recipe, splits: Splits) -> dict[str, Dataset]:
    """The sets that a run is scored on after training."""
    return evaluation_sets(splits) if recipe.score_test else {"validation": splits.validation}


def optimizer_steps(args: TrainingArguments, rows: int) -> int:
    """Optimizer steps of a run over `rows` training rows, in as many processes as there are."""
    if args.max_steps > 0:
        return args.max_steps
    batches = rows / (args.per_device_train_batch_size * args.world_size)
    whole = math.floor(batches) if args.dataloader_drop_last else math.ceil(batches)
    return math.ceil(args.num_train_epochs * math.ceil(whole / args.gradient_accumulation_steps))


def summary(recipe: dict[str, Any]) -> str:
    """The recipe of a run in a few lines."""
    data, adapter, ggpo, training = recipe["data"], recipe["adapter"], recipe["ggpo"], recipe["training"]
    lines = {
        "model": recipe["model"] + (f" in {recipe['quantise']}" if recipe.get("quantise") else ""),
        "task": recipe["task"].get("kind"),
        "data": _short(data, ("source", "train_size", "label_noise", "out_of_domain")),
        "adapter": _short(adapter, tuple(adapter)) if adapter else "none (full fine-tuning)",
        "ggpo": _short(ggpo, tuple(ggpo)) if ggpo else "none",
        **{name: _short(recipe[name], tuple(recipe[name])) for name in _OTHERS if recipe.get(name)},
        "training": _short(training, tuple(training)),
    }
    return "\n".join(f"{name:10}{value}" for name, value in lines.items())


def _short(values: dict[str, Any], keys: tuple[str, ...]) -> str:
    return ", ".join(f"{key} {values[key]}" for key in keys if values.get(key) not in (None, [], 0.0))


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that decide what a run computes."""
    return {"python": platform.python_version()} | {name: version(name) for name in _LIBRARIES}


def device_name() -> str:
    """The accelerator that runs are on, or "CPU"."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


def quiet_libraries() -> None:
    """Keep the libraries' progress bars and notes out of ours."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it notes each cast of each 8-bit layer


# --- one run -------------------------------------------------------------------------------------------------------


def _run_seed(recipe: Recipe, seed: int, splits: Callable[[], Splits], reporter: Reporter) -> Run:
    folder = Path(recipe.output) / f"seed-{seed}"
    args = training_arguments(recipe, folder, seed)
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder) if is_first() else nullcontext():
            if is_first():
                begun = _is_begun(folder)
                _claim(folder, recipe.resolved(seed), begun=begun)
                record(folder, recipe.model, splits(), begun=begun)
            wait_for_all()
            if (folder / "metrics.json").is_file():
                reporter.say(f"{folder} is finished already; it is not run again.")
            else:
                _train_and_score(recipe, args, folder, splits(), reporter)
    return read_run(folder)


def _claim(folder: Path, resolved: dict[str, Any], *, begun: bool) -> None:
    """Write the recipe into `folder`, or check that the one that was begun there is the same."""
    file = folder / "recipe.yaml"
    if not file.exists() or not begun:
        write_text(file, dump_yaml(resolved))
        return
    changed = _changed(file, resolved)
    if changed:
        raise UserError(f"{folder} holds a run of another recipe: {changed}; choose another output.")
    if not (folder / "metrics.json").is_file():
        write_text(file, dump_yaml(resolved))


def _check_checkpoint(checkpoint: Path, resolved: dict[str, Any]) -> None:
    """Refuse a checkpoint of another recipe (those of an earlier release do not say which one they are of)."""
    file = checkpoint / "recipe.yaml"
    changed = _changed(file, resolved) if file.is_file() else ""
    if changed:
        raise UserError(f"{checkpoint} is of another recipe: {changed}; delete it, or choose another output.")


def _changed(file: Path, resolved: dict[str, Any]) -> str:
    """What the recipe in `file` sets otherwise; "" if nothing that is not free."""
    changed = list(_differences(_defaults_filled_in(file), resolved, apart_from=_FREE))
    shown = "; ".join(f"{name} is {there} there and {here} here" for name, there, here in changed[:5])
    return shown + (f"; and {len(changed) - 5} more" if len(changed) > 5 else "")


def _differences(
    one: dict[str, Any], other: dict[str, Any], *, apart_from: Collection[KeyPath]
) -> Iterator[tuple[str, Hashable, Hashable]]:
    """The settings that two recipes do not share: name, value in the one, value in the other."""
    left, right = flatten(one), flatten(other)
    for path in {**left, **right}:
        if path not in apart_from and left.get(path) != right.get(path):
            yield ".".join(map(str, path)), left.get(path, "not set"), right.get(path, "not set")


def _is_begun(folder: Path) -> bool:
    """Whether there is anything that a correction of recipe or data would spoil."""
    names = ("adapter", "model", "metrics.json")
    logged = read_json_lines(folder / "log.jsonl")
    return bool(logged) or any((folder / n).exists() for n in names) or any(folder.glob("checkpoints/checkpoint-*"))


def _defaults_filled_in(file: Path) -> dict[str, Any]:
    """The recipe of a run; an earlier release did not know all the settings, whose defaults it then had."""
    recipe = load_recipe(file)
    return recipe.resolved(recipe.seeds[0])


def _train_and_score(recipe: Recipe, args: TrainingArguments, folder: Path, splits: Splits, reporter: Reporter) -> None:
    if is_first():
        _record_versions(recipe, folder)
    task = recipe.task.for_labels(splits.labels)
    weights = folder / _weights_name(recipe)
    if weights.is_dir():
        model, tokenizer = _load_weights(recipe, splits.labels, folder, quantised=True)
        score = scorer(model, tokenizer, task, args, reporter)
    else:
        with memory_errors(recipe, "per_device_train_batch_size"):
            score = _trained(recipe, args, folder, splits, task, reporter)
    if not is_first():
        return
    with memory_errors(recipe, "per_device_eval_batch_size"):
        scores = score.score(scored_sets(recipe, splits), _subfolder(folder, "predictions"))
    write_json(
        folder / "metrics.json",
        {
            "evaluation": plain(scores),
            "training": read_json(folder / "training.json"),
            "weights": digests(_weight_files(weights), weights),
        },
    )


def untrained(
    recipe: Recipe, args: TrainingArguments, splits: Splits, task: TaskConfig, folder: Path | None = None
) -> tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerBase, Dataset]:
    """The model that a run begins with, on its device; its tokenizer, and the encoded training rows.

    Args:
        folder: Of the run, which says the day that a chat template writes; today's without.

    Raises:
        UserError: the model, the adapter or the task does not fit the recipe.
    """
    set_seed(args.seed)  # decides the new head and the adapter's starting values
    base, tokenizer = load_model(
        recipe.model, recipe.task.kind, splits.labels, recipe.dtype, _quantisation(recipe, args)
    )
    if folder:
        keep_day(tokenizer, folder)
    rows = encode(task.kind, splits.train, tokenizer, task, "train")
    check_tokens(base, tokenizer, rows["input_ids"])
    if task.kind == "regression":
        start_at_mean(base, rows["labels"][:])
    if task.packing:
        check_packing(base)
        rows = pack(rows, task.max_length)
    _check_steps(recipe, args, len(rows))
    return _trainable(recipe, args, base, rows, collator(task.kind, tokenizer)), tokenizer, rows


def _trained(
    recipe: Recipe,
    args: TrainingArguments,
    folder: Path,
    splits: Splits,
    task: TaskConfig,
    reporter: Reporter,
) -> Scorer:
    """Train, and save what was trained; return what scores it."""
    checkpoints = folder / "checkpoints"
    checkpoint = remove_broken(checkpoints) if is_first() else None
    wait_for_all()
    if not is_first():
        checkpoint = last_whole(checkpoints)
    if checkpoint:
        _check_checkpoint(checkpoint, recipe.resolved(args.seed))
    model, tokenizer, rows = untrained(recipe, args, splits, task, folder)
    start = folder / "start"
    moved = model if isinstance(model, PeftModel) and is_first() and save_start(model, start) else None
    if moved:
        settle(start)
    score = prepared_scorer(recipe, splits, model, tokenizer, args, reporter)
    trainer = make_trainer(recipe, model, tokenizer, args, rows)
    state = read_json(checkpoint / "trainer_state.json") if checkpoint else {}
    enough = partial(_enough, recipe)
    log = read_json_lines(folder / "log.jsonl")
    stop = StopRequest()
    if checkpoint and (
        state["global_step"] >= state["max_steps"]
        or any(enough(row) for row in log if row["step"] == state["global_step"])
    ):
        with refused(checkpoint):
            trainer._load_from_checkpoint(str(checkpoint))  # all steps are done; train() would not know where to stop
    else:
        if checkpoint:
            reporter.say(f"{folder}: going on from step {step_of(checkpoint)}.")
        with reporter.task(f"train {folder}") as shown, two_stage_interrupt(partial(reporter.say, _STOPPING)) as stop:
            callback = RunCallback(
                folder / "log.jsonl",
                first_step=step_of(checkpoint) if checkpoint else 0,
                task=shown,
                stop=stop,
                validate=_validation(recipe, splits, score),
                validate_every=recipe.validate_every,
                enough=enough,
                keep=recipe.training_fields["save_total_limit"],
            )
            _fit(trainer, callback, checkpoint, stop, checkpoints)
    if is_first():
        took = _training_summary(read_json_lines(folder / "log.jsonl"), model, args)
        write_json(folder / "training.json", took)
        with new_folder(folder / _weights_name(recipe)) as target:
            if moved:
                save_difference(moved, target, start)
            else:
                save_model(model, target)
            save_ends(model, target)
            save_tokenizer(tokenizer, target)
    if stop.made:
        text = f"{folder} is trained but not scored; give the same command again to score it."
        raise Interrupted(text) from stop.reason
    return score


def prepared_scorer(
    recipe: Recipe,
    splits: Splits,
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    args: TrainingArguments,
    reporter: Reporter,
) -> Scorer:
    """`scorer` with every set of the run encoded: what cannot be scored is found before hours of training.

    Raises:
        UserError: a set cannot be encoded, or two could not be kept apart.
    """
    sets, files = scored_sets(recipe, splits), dict[str, str]()
    for name in sets:
        other = files.setdefault(file_name(name), name)
        if other != name:
            raise UserError(f"The predictions on {other} and {name} would have one file name; rename one of them.")
    score = scorer(model, tokenizer, recipe.task.for_labels(splits.labels), args, reporter)
    score.prepare(sets)
    return score


def _validation(recipe: Recipe, splits: Splits, score: Scorer) -> Callable[[], dict[str, float]]:
    """What measures the model during training, at most `VALIDATION_ROWS` rows of each set."""
    encoded: dict[str, Dataset] = {}
    if recipe.validate_every and len(splits.validation):
        encoded["validation"] = fixed_sample(score.encoded["validation"], VALIDATION_ROWS)
    if recipe.stop_loss:
        encoded["train"] = score.encode(fixed_sample(splits.train, VALIDATION_ROWS), "train")

    def validate() -> dict[str, float]:
        measured = {name: score.quick(rows) for name, rows in encoded.items()}
        return {f"{name}/{metric}": value for name, of in measured.items() for metric, value in of.items()}

    return validate


def _enough(recipe: Recipe, logged: Mapping[str, float]) -> bool:
    """Whether the training loss that was logged is down at the recipe's stop_loss."""
    loss = next((logged[key] for key in ("train/loss", "train/log_loss", "train/mse") if key in logged), None)
    return recipe.stop_loss is not None and loss is not None and loss <= recipe.stop_loss


def _trainable(
    recipe: Recipe, args: TrainingArguments, base: PreTrainedModel, rows: Dataset, collate: Callable[[Any], Any]
) -> PreTrainedModel | PeftModel:
    """`base` with what the recipe trains: an adapter, its head, or all of it."""
    if recipe.freeze_body:
        return freeze_body(base)

    def batches() -> Iterator[dict[str, torch.Tensor]]:
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(args.seed)).tolist()
        size = args.per_device_train_batch_size
        for begin in range(0, len(rows), size):
            batch = collate(rows.select(order[begin : begin + size]).to_list())
            yield {name: tensor.to(args.device) for name, tensor in batch.items()}

    base.to(args.device)  # type: ignore[arg-type]
    steps = optimizer_steps(args, len(rows))
    return add_adapter(base, recipe.adapter_fields, recipe.task.kind, total_steps=steps, batches=batches)


def _check_steps(recipe: Recipe, args: TrainingArguments, rows: int) -> None:
    """Refuse a run that would take no step, or never look at what ends it."""
    batch = args.per_device_train_batch_size * args.world_size
    if args.dataloader_drop_last and rows < batch:
        of = f"{args.world_size} processes x {args.per_device_train_batch_size}" if args.world_size > 1 else str(batch)
        raise UserError(
            f"training.dataloader_drop_last leaves out every batch that is not full, and {rows} training rows do not "
            f"fill one of {of}, so there is no step to take; lower training.per_device_train_batch_size to {rows} or "
            "less, or leave dataloader_drop_last out."
        )
    steps = optimizer_steps(args, rows)
    if recipe.stop_loss and recipe.validate_every and recipe.validate_every > steps:
        raise UserError(
            f"validate_every is {recipe.validate_every}, but the run has {steps} steps, in which stop_loss is never "
            "looked at; lower it."
        )


def make_trainer(
    recipe: Recipe,
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    args: TrainingArguments,
    rows: Dataset,
) -> RunTrainer:
    """The Trainer that trains `model` on encoded `rows` by the recipe's method; it keeps no log of its own."""
    ggpo, optimizer = recipe.ggpo_config(args.seed), recipe.optimizer
    callbacks: list[TrainerCallback] = [GGPOCallback(ggpo)] if ggpo else []
    args.save_total_limit = None  # RunCallback deletes old checkpoints, once the new one is known to be whole
    if recipe.adalora:
        callbacks.append(AdaLoraCallback())
        args.save_strategy = SaveStrategy.NO  # peft does not keep the allocator's state, so such a run cannot resume
    if args.gradient_checkpointing:
        check_checkpointing(args)
    with rejected("training", recipe.training.model_fields_set):
        trainer = RunTrainer(
            lengths=list(rows["length"]),
            settings=recipe.training.model_fields_set,
            make_optimizer=partial(OPTIMIZERS[optimizer.kind], optimizer.lr_ratio) if optimizer else None,
            make_ascent=_ascent(recipe),
            model=model,
            args=args,
            train_dataset=rows,
            data_collator=collator(recipe.task.kind, tokenizer),
            processing_class=tokenizer,
            callbacks=callbacks,
        )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _ascent(recipe: Recipe) -> MakeAscent | None:
    sam, mgpo = recipe.sam, recipe.mgpo
    if sam:
        return lambda model, optimizer: SAM(model, sam.rho, sam.space)
    if mgpo:
        return lambda model, optimizer: MGPO(model, optimizer, mgpo.rho)
    return None


def _fit(
    trainer: RunTrainer, callback: RunCallback, checkpoint: Path | None, stop: StopRequest, checkpoints: Path
) -> None:
    """Train; go on behind the last step even if a stop was asked for in it: what is trained is to be saved."""
    trainer.add_callback(callback)
    try:
        with refused(checkpoint):
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except NonFiniteLossError as error:
        good = last_whole(checkpoints)
        kept = f"the last good checkpoint is {good}" if good else "there is no checkpoint yet"
        raise DivergedError(
            f"{error}; {kept}. Try a lower learning rate, gradient clipping (training.max_grad_norm), or dtype float32."
        ) from error
    except BaseException:
        if is_first():
            remove_unsealed(checkpoints)
        raise
    state = trainer.state
    if stop.made and state.global_step < state.max_steps:
        anew = trainer.args.save_strategy == SaveStrategy.NO
        raise Interrupted(
            f"Stopped after step {state.global_step} of {state.max_steps}; give the same command again "
            + ("to begin anew: peft does not keep AdaLoRA's state." if anew else "to go on from there.")
        ) from stop.reason


def _weights_name(recipe: Recipe) -> str:
    return "model" if recipe.adapter is None else "adapter"


def _load_weights(
    recipe: Recipe, labels: list[str] | None, folder: Path, quantised: bool
) -> tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerBase]:
    weights = folder / _weights_name(recipe)
    if recipe.adapter is None:
        model, tokenizer = load_model(str(weights), recipe.task.kind, labels, recipe.dtype)
        keep_day(tokenizer, folder)
        return model, tokenizer
    if not (weights / "adapter_model.safetensors").is_file():
        raise UserError(f"{weights} has no adapter_model.safetensors file; other weight formats are not read.")
    quantisation = _quantisation(recipe, training_arguments(recipe, folder, recipe.seeds[0])) if quantised else None
    model, tokenizer = load_model(recipe.model, recipe.task.kind, labels, recipe.dtype, quantisation)
    keep_day(tokenizer, folder)
    return load_adapter(model, weights), tokenizer


def _weight_files(weights: Path) -> list[Path]:
    """What decides the trained model; the other files in the folder are for readers, and for a hub."""
    return sorted(path for path in weights.iterdir() if path.suffix in (".safetensors", ".json"))


def _check_weights(weights: Path, metrics: dict[str, Any]) -> None:
    """Check that the weights are those the metrics were measured with (an earlier release did not write it down)."""
    for name, digest_then in metrics.get("weights", {}).items():
        file = weights / name
        if not file.is_file():
            raise UserError(f"{file} is missing; the run ended with it, and other weight formats are not read.")
        if digests([file], weights)[name] != digest_then:
            raise UserError(f"{file} is damaged: it is not what the run ended with.")


def _quantisation(recipe: Recipe, args: TrainingArguments) -> Quantisation | None:
    if recipe.quantise is None:
        return None
    compute = torch.bfloat16 if args.bf16 else torch.float32
    return Quantisation(recipe.quantise, compute, args.device, bool(args.gradient_checkpointing))


def _subfolder(folder: Path, name: str) -> Path:
    (folder / name).mkdir(exist_ok=True)
    return folder / name


def _record_versions(recipe: Recipe, folder: Path) -> None:
    quantiser = {"bitsandbytes": version("bitsandbytes")} if recipe.quantise and find_spec("bitsandbytes") else {}
    machine = {"platform": platform.platform(), "threads": torch.get_num_threads()}
    begun = {"begun": (recorded_day(folder) or date.today()).isoformat()}
    write_json(folder / "versions.json", {**begun, **versions(), **quantiser, **machine})


def _training_summary(log: list[dict[str, Any]], model: torch.nn.Module, args: TrainingArguments) -> dict[str, Any]:
    last = max(log, key=lambda row: row["step"], default={"step": 0, "seconds": 0.0})
    trained, parameters = count_parameters(model)
    return {
        "steps": last["step"],
        "processes": args.world_size,
        "seconds": last["seconds"],
        "seconds_per_step": round(last["seconds"] / max(last["step"], 1), 5),
        "peak_memory_bytes": max((row.get("peak_memory_bytes") or 0 for row in log), default=0) or None,
        "trainable_parameters": trained,
        "parameters": parameters,
    }
