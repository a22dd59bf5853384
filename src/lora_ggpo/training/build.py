"""Build what a recipe asks for: transformers' arguments, the model, the trainer and the scorer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import SaveStrategy

from lora_ggpo.data import Splits
from lora_ggpo.data.spool import numbers
from lora_ggpo.errors import UserError, explain_rejection
from lora_ggpo.integrations.callback import GGPOCallback
from lora_ggpo.methods.ascent import SAM
from lora_ggpo.methods.optimizers import OPTIMIZERS, AdaLoraCallback, Posterior
from lora_ggpo.methods.thin import MGPO, BiLoRA
from lora_ggpo.models.adapters import add_adapter, freeze_body, freeze_head, load_adapter
from lora_ggpo.models.architecture import CAUSAL
from lora_ggpo.models.load import check_tokens
from lora_ggpo.models.quantise import Quantisation
from lora_ggpo.recipe.recipe import Recipe
from lora_ggpo.tasks import Task
from lora_ggpo.tasks.base import Batch, Row
from lora_ggpo.tasks.general import GeneralText
from lora_ggpo.tasks.pack import attend_apart, flatten
from lora_ggpo.training.callbacks import FuseCallback
from lora_ggpo.training.drawn import Drawn, encode_drawn, random_order
from lora_ggpo.training.folder import weights_folder
from lora_ggpo.training.forgetting import TEXTS_AT_ONCE, text_to_keep
from lora_ggpo.training.identity import keep_day
from lora_ggpo.training.precision import choose_precision
from lora_ggpo.training.prefix import FrozenPrefix, Places
from lora_ggpo.training.scorer import evaluation_sets, fixed_sample
from lora_ggpo.training.sharding import cuts_weights, is_fsdp, sharding_arguments
from lora_ggpo.training.trackers import check_trackers
from lora_ggpo.training.trainer import MakeAscent, RunTrainer
from lora_ggpo.training.validation import check_validation

AnyModel = PreTrainedModel | PeftModel
Collate = Callable[[Sequence[Row]], Batch]


def scored_sets(recipe: Recipe, splits: Splits) -> dict[str, Dataset]:
    """The sets that a run is scored on after training."""
    if recipe.score_test:
        return evaluation_sets(splits, recipe.score_rows)
    return {"validation": fixed_sample(splits.validation, recipe.score_rows or len(splits.validation))}


def training_arguments(recipe: Recipe, folder: Path, seed: int) -> TrainingArguments:
    """transformers' arguments for a run in `folder`.

    Raises:
        UserError: transformers rejects a value, or the precision cannot be had here.
    """
    precision = choose_precision(recipe, folder)
    name = f"{recipe.training_fields.get('run_name') or folder.absolute().parent.name}-seed-{seed}"
    with explain_rejection("training", recipe.training.model_fields_set):
        return TrainingArguments(
            # transformers refuses bf16 on a machine without an accelerator unless it is told to use the CPU.
            **{"use_cpu": not torch.accelerator.is_available()}
            | recipe.training_fields
            | sharding_arguments(recipe)
            | {"run_name": name},
            bf16=precision == "bf16",
            fp16=precision == "fp16",
            output_dir=str((folder / "checkpoints").absolute()),  # transformers would expand a ~ at its beginning
            seed=seed,
            data_seed=seed,
            disable_tqdm=True,
            logging_nan_inf_filter=False,
            remove_unused_columns=False,
        )


def optimizer_steps(args: TrainingArguments, rows: int, processes: int | None = None) -> int:
    """Optimizer steps of a run over `rows` training rows, shared by all its `processes` (None is those of now)."""
    if args.max_steps > 0:
        return args.max_steps
    batches = rows / (args.per_device_train_batch_size * (processes or args.world_size))
    whole = math.floor(batches) if args.dataloader_drop_last else math.ceil(batches)
    return math.ceil(args.num_train_epochs * math.ceil(whole / args.gradient_accumulation_steps))


# --- the model -----------------------------------------------------------------------------------------------------


def build_model(
    recipe: Recipe, args: TrainingArguments, splits: Splits, folder: Path | None = None
) -> tuple[AnyModel, PreTrainedTokenizerBase, Dataset]:
    """The model that a run begins with, on its device; its tokenizer, and the encoded rows that it is trained on.

    Args:
        folder: Of the run, which says the day that a chat template writes; today's without.

    Raises:
        UserError: the model, the adapter or the task does not fit the recipe.
    """
    check_validation(recipe, splits)
    check_trackers(args)
    set_seed(args.seed)  # decides the new head and the adapter's starting values
    task = recipe.task.for_labels(splits.labels)
    how = recipe.dtype, _quantisation(recipe, args), recipe.model_dropout, recipe.attn_implementation
    base, tokenizer = task.load_model(recipe.model, *how)
    if folder:
        keep_day(tokenizer, folder)

    def encode(chosen: Dataset, name: str) -> Dataset:
        encoded = task.encode(chosen, tokenizer, name)
        check_tokens(base, tokenizer, encoded["input_ids"], f"{name}: Row")
        return task.begin(base, task.learnt(encoded))

    rows = encode_drawn(splits.train, args, encode, packed=recipe.task.packing)
    _check_steps(args, len(rows))
    return _make_trainable(recipe, args, base, rows, tokenizer), tokenizer, rows


def _make_trainable(
    recipe: Recipe, args: TrainingArguments, base: PreTrainedModel, rows: Dataset, tokenizer: PreTrainedTokenizerBase
) -> AnyModel:
    """`base` with what the recipe trains: an adapter, its head, or all of it."""
    if recipe.freeze_body:
        return freeze_body(base)

    def batches() -> Iterator[Batch]:
        order = range(len(rows)) if isinstance(rows, Drawn) else random_order(len(rows), args.seed).tolist()
        collate = recipe.task.type.collator(tokenizer)
        return _batches(rows, order, args.per_device_train_batch_size, collate, args.device)

    def general() -> Iterator[Batch]:
        text = text_to_keep(recipe, base, tokenizer)
        return _batches(text, range(len(text)), TEXTS_AT_ONCE, GeneralText.collator(tokenizer), args.device)

    if not cuts_weights(args):
        base.to(args.device)  # type: ignore[arg-type]
    base.config.use_cache = args.use_cache  # as Trainer will: with a cache, examples of a packed row see one another
    steps = optimizer_steps(args, len(rows))
    architecture = recipe.task.type.architecture
    model = add_adapter(base, recipe.adapter_fields, architecture, total_steps=steps, batches=batches, general=general)
    if recipe.freeze_head:
        freeze_head(model)
    return model


def _batches(rows: Dataset, order: Sequence[int], size: int, collate: Collate, device: torch.device) -> Iterator[Batch]:
    for begin in range(0, len(order), size):
        batch = collate(rows.select(order[begin : begin + size]).to_list())
        yield {name: tensor.to(device) for name, tensor in batch.items()}


def _check_steps(args: TrainingArguments, rows: int) -> None:
    """Refuse a run that would take no step."""
    batch = args.per_device_train_batch_size * args.world_size
    if args.dataloader_drop_last and rows < batch:
        of = f"{args.world_size} processes x {args.per_device_train_batch_size}" if args.world_size > 1 else str(batch)
        raise UserError(
            f"training.dataloader_drop_last leaves out every batch that is not full, and {rows} training rows do not "
            f"fill one of {of}, so there is no step to take; lower training.per_device_train_batch_size to {rows} or "
            "less, or leave dataloader_drop_last out."
        )


def load_weights(
    recipe: Recipe, task: Task, folder: Path, args: TrainingArguments | None = None
) -> tuple[AnyModel, PreTrainedTokenizerBase]:
    """The model that the run in `folder` has trained, and its tokenizer.

    Args:
        args: Say how a model is quantised and where; None leaves it as it is.

    Raises:
        UserError: the weights are missing or damaged.
    """
    weights = weights_folder(folder, recipe)
    if recipe.adapter is None:
        model, tokenizer = task.load_model(str(weights), recipe.dtype)
        keep_day(tokenizer, folder)
        return freeze_body(model) if recipe.freeze_body else model, tokenizer
    if not (weights / "adapter_model.safetensors").is_file():
        raise UserError(f"{weights} has no adapter_model.safetensors file; other weight formats are not read.")
    model, tokenizer = task.load_model(recipe.model, recipe.dtype, _quantisation(recipe, args) if args else None)
    keep_day(tokenizer, folder)
    adapted = load_adapter(model, weights)
    if recipe.freeze_head:
        freeze_head(adapted)
    return adapted, tokenizer


def _quantisation(recipe: Recipe, args: TrainingArguments) -> Quantisation | None:
    if recipe.quantise is None:
        return None
    compute, cut = torch.bfloat16 if args.bf16 else torch.float32, is_fsdp(args)
    device = torch.device("cpu") if cut else args.device  # FSDP moves the pieces
    return Quantisation(recipe.quantise, compute, device, bool(args.gradient_checkpointing), cut)


# --- what trains it ------------------------------------------------------------------------------------------------


def build_trainer(
    recipe: Recipe,
    args: TrainingArguments,
    model: AnyModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset,
    prefix: FrozenPrefix | None = None,
) -> RunTrainer:
    """The Trainer that trains `model` on encoded `rows` by the recipe's method, above its `prefix`. It keeps no log."""
    ggpo, optimizer, task = recipe.ggpo_config(args.seed), recipe.optimizer, recipe.task.for_labels(None)
    callbacks: list[TrainerCallback] = [GGPOCallback(ggpo)] if ggpo else []
    if recipe.adapter and not (ggpo and ggpo.sigma) and not cuts_weights(args):  # without noise GGPO attaches nothing
        callbacks.append(FuseCallback())
    args.save_total_limit = None  # RunCallback deletes old checkpoints, once the new one is known to be whole
    if recipe.adalora:
        callbacks.append(AdaLoraCallback())
        args.save_strategy = SaveStrategy.NO  # peft does not keep the allocator's state, so such a run cannot resume
    batches = prefix.batches(rows) if prefix else None
    with explain_rejection("training", recipe.training.model_fields_set):
        base, args = task.trainer(args)
        trainer: RunTrainer = type("RunTrainer", (RunTrainer, base), {})(
            lengths=numbers(rows, "length"),
            drawn_of=rows.epoch if isinstance(rows, Drawn) else None,
            items=task.items,
            settings=recipe.training.model_fields_set,
            make_optimizer=partial(OPTIMIZERS[optimizer.kind], **optimizer.options) if optimizer else None,
            make_ascent=_ascent(recipe, args.seed),
            from_labels=base is Trainer,
            model=model,
            args=args,
            train_dataset=Places(len(rows)) if batches else rows,
            data_collator=batches or _collator(recipe, args, model, task.collator(tokenizer)),
            processing_class=tokenizer,
            callbacks=callbacks,
        )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _collator(recipe: Recipe, args: TrainingArguments, model: AnyModel, padded: Collate) -> Collate:
    """What makes a batch of rows: without padding on a processor, where that takes as much time as other tokens."""
    task = recipe.task.type
    own_rows = task.architecture is not CAUSAL or "collator" in vars(task)
    own_forward = args.torch_compile or (recipe.adapter_fields or {}).get("alora_invocation_tokens")
    whole = not cuts_weights(args)
    flat = args.device.type == "cpu" and whole and not own_rows and not own_forward and attend_apart(model)
    return flatten if flat else padded


def _ascent(recipe: Recipe, seed: int) -> MakeAscent | None:
    sam, mgpo, bi_lora = recipe.sam, recipe.mgpo, recipe.bi_lora
    if sam:
        return lambda model, optimizer: SAM(model, sam.rho, sam.space)
    if mgpo:
        return lambda model, optimizer: MGPO(model, optimizer, mgpo.rho, mgpo.beta)
    if bi_lora:
        return lambda model, optimizer: BiLoRA(model, optimizer, bi_lora.rho, bi_lora.rank)
    if recipe.optimizer and recipe.optimizer.kind == "ivon":
        return lambda model, optimizer: Posterior(optimizer, seed)
    return None
