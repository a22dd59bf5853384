"""What a run will take, from a few of its steps: parameters, memory, time, disk, and the largest batch that fits."""

from __future__ import annotations

import copy
import gc
import math
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import peft
import torch
from datasets import Dataset
from peft import PeftModel
from torch import nn
from torch.utils._pytree import tree_leaves
from transformers import (
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from lora_ggpo.data.spool import numbers
from lora_ggpo.integrations.callback import GGPOCallback
from lora_ggpo.methods.initialise import moves_base
from lora_ggpo.models.adapters import count_parameters
from lora_ggpo.models.quantise import stored_bytes
from lora_ggpo.models.saving import save_tokenizer
from lora_ggpo.recipe.recipe import Recipe
from lora_ggpo.training.advice import warn_of
from lora_ggpo.training.build import (
    AnyModel,
    build_model,
    build_trainer,
    optimizer_steps,
    scored_sets,
    training_arguments,
)
from lora_ggpo.training.drawn import rows_of_epoch
from lora_ggpo.training.folder import describe_precision
from lora_ggpo.training.memory import available, in_use, memory_errors, peak, reset_peak
from lora_ggpo.training.precision import precision_of
from lora_ggpo.training.prefix import expected_prefix
from lora_ggpo.training.scorer import Scorer, fixed_sample
from lora_ggpo.training.trainer import EpochSampler, RunTrainer
from lora_ggpo.training.validation import VALIDATION_ROWS
from lora_ggpo.workspace.libraries import quiet_libraries
from lora_ggpo.workspace.progress import Reporter, Task

WARM_UP = 2
"""Steps on the longest rows that come first: the second finds the peak of memory, with the optimizer's state there."""

PROBE_SECONDS = 45.0
"""Time after which no further step is begun, once one has been timed."""

SCORED_ROWS = 64
"""Rows that are scored to find how long scoring takes."""

LEFT_FREE = 0.1
"""Share of the memory that is left free: allocators cannot use all of it."""

_SMALLEST_DIFFERENCE = 2**20  # bytes; peaks may differ by as much by chance


@dataclass(frozen=True)
class Forecast:
    """What a run will take; times are in seconds, sizes in bytes.

    Attributes:
        parameters: Of the model and its adapter; of quantised weights those that they stand for.
        trained: Those that are trained.
        perturbed: Layers with noise; None without GGPO.
        precision: As the recipe asks, and what was chosen where that is auto.
        memory: The measured peak by parts, which sum to it; None where the system does not tell.
        processes: How many the run is to have.
        of_each: The same parts of each of these, where they share the model out; else None.
        step_seconds: Of each timed optimizer step.
        tokens_a_second: Tokens of the timed steps, without padding.
        steps: Optimizer steps of the whole run.
        rows: Training rows (packed rows with task.packing).
        seeds: Number of such runs in the recipe.
        validations: Number of validations during training.
        validation_seconds: Of all of these.
        scoring_seconds: Of what is scored in the end.
        weights_size: Of the saved adapter (model with full fine-tuning) and its tokenizer.
        checkpoint_size: Of one checkpoint.
        checkpoints: How many are there in the end.
        batch: Rows of a batch in the recipe.
        obtainable: Memory that the run could have.
        largest_batch: Rows that are expected to fit in it; None if the probes do not tell.
    """

    parameters: int
    trained: int
    perturbed: int | None
    precision: str
    memory: dict[str, int] | None
    processes: int
    of_each: dict[str, int] | None
    step_seconds: list[float]
    tokens_a_second: float
    steps: int
    rows: int
    seeds: int
    validations: int
    validation_seconds: float
    scoring_seconds: float
    weights_size: int
    checkpoint_size: int
    checkpoints: int
    batch: int
    obtainable: int | None
    largest_batch: int | None

    @property
    def training_seconds(self) -> float:
        """Of all optimizer steps; each timed one stands for an equal share of them."""
        return statistics.mean(self.step_seconds) * self.steps


def forecast(recipe: Recipe, steps: int, reporter: Reporter, processes: int = 1) -> Forecast:
    """Take a few optimizer steps as a run of `recipe` with its first seed would, and leave nothing on disk.

    Args:
        steps: Steps to time, after `WARM_UP` others.
        processes: How many the run is to have. What one needs alone is measured, what each needs is reckoned from it.

    Raises:
        UserError: bad input, as `train` finds it, or not enough memory.
    """
    quiet_libraries()
    with (
        tempfile.TemporaryDirectory(prefix="lora-ggpo-") as folder,
        recipe.locate_errors(),
        memory_errors(recipe, "per_device_train_batch_size"),
    ):
        return _forecast(recipe, Path(folder), steps, reporter, processes)


def _forecast(recipe: Recipe, folder: Path, steps: int, reporter: Reporter, processes: int) -> Forecast:
    args = training_arguments(recipe, folder, recipe.seeds[0])
    splits = recipe.task.type.load(recipe.data)
    limit, before = available(args.device), in_use(args.device)
    model, tokenizer, rows = build_model(recipe, args, splits)
    warn_of(recipe, args, splits, rows)
    if left_out := expected_prefix(recipe, args, model):
        reporter.say(left_out)
    score = Scorer(args, model, tokenizer, recipe.task.for_labels(splits.labels), Reporter(quiet=True))
    scored = scored_sets(recipe, splits)
    score.prepare(scored)
    probe = _Probe(recipe, args, model, tokenizer, rows)
    full = probe.measure(args.per_device_train_batch_size, steps, reporter)
    other = probe.measure(full.batch // 2 if full.batch > 1 else 2, 0, reporter)  # half needs no more memory
    total, (trained, parameters) = optimizer_steps(args, rows_of_epoch(rows), processes), count_parameters(model)
    memory = _by_parts(full, before)
    weights_size = _weights_size(model, tokenizer, folder / "tokenizer")
    best, row_seconds, validated = recipe.keep == "best", _row_seconds(score), len(scored.get("validation", ()))
    rows_each = min(validated, VALIDATION_ROWS) + (min(len(splits.train), VALIDATION_ROWS) if recipe.stop_loss else 0)
    every = recipe.validate_every if rows_each else None
    validations = (-(-total // every) if best else total // every) if every else 0
    # The scores of a last validation are those of the end, unless it is an earlier one that is kept.
    known = validated if every and total % every == 0 and not best and validated <= VALIDATION_ROWS else 0
    return Forecast(
        parameters=parameters,
        trained=trained,
        perturbed=full.perturbed,
        precision=describe_precision(recipe.asked_precision, precision_of(args)),
        memory=memory,
        processes=processes,
        of_each=share_of_memory(memory, recipe.shards, processes, at_once(model)) if memory and recipe.shards else None,
        step_seconds=full.seconds,
        tokens_a_second=full.tokens / sum(full.seconds),
        steps=total,
        rows=rows_of_epoch(rows),
        seeds=len(recipe.seeds),
        validations=validations,
        validation_seconds=validations * row_seconds * rows_each,
        scoring_seconds=row_seconds * (sum(map(len, scored.values())) - known),
        weights_size=weights_size,
        checkpoint_size=weights_size + full.parts["optimizer state"] + full.parts["trained parameters"] * best,
        checkpoints=_checkpoints(recipe, args, total),
        batch=full.batch,
        obtainable=limit,
        largest_batch=largest_batch({one.batch: one.peak for one in (full, other)}, limit),
    )


# --- steps ---------------------------------------------------------------------------------------------------------


class _Measured(NamedTuple):
    """One series of steps: `parts` are the bytes that can be counted, `tokens` are those of the timed steps."""

    batch: int
    peak: int | None
    seconds: list[float]
    tokens: int
    parts: dict[str, int]
    perturbed: int | None


@dataclass(frozen=True)
class _Probe:
    """Takes optimizer steps with batches of any size on one model."""

    recipe: Recipe
    args: TrainingArguments
    model: AnyModel
    tokenizer: PreTrainedTokenizerBase
    rows: Dataset

    def measure(self, batch: int, steps: int, reporter: Reporter) -> _Measured:
        """Take `WARM_UP` steps on the longest rows and `steps` on rows of all lengths, of `batch` rows at a time."""
        args, lengths = copy.copy(self.args), numbers(self.rows, "length").tolist()
        batch = args.per_device_train_batch_size = min(batch, len(lengths))
        args.gradient_accumulation_steps = min(args.gradient_accumulation_steps, -(-len(lengths) // batch))
        args.max_steps = WARM_UP + steps
        args.save_strategy, args.logging_strategy, args.report_to = SaveStrategy.NO, IntervalStrategy.NO, []
        args.train_sampling_strategy = "sequential"
        size = batch * args.gradient_accumulation_steps
        chosen = [longest_rows(lengths, size)] * WARM_UP + self._typical(lengths, size, steps)
        rows = self.rows.select([row for step in chosen for row in step])
        trainer = build_trainer(self.recipe, args, self.model, self.tokenizer, rows)
        with reporter.task(f"probe with {batch} rows a batch") as shown:
            clock = _Clock(shown)
            trainer.add_callback(clock)
            trainer.train()
        timed = clock.seconds[WARM_UP:]
        tokens = sum(lengths[row] for step in chosen[WARM_UP : WARM_UP + len(timed)] for row in step)
        ggpo = next((one.ggpo for one in trainer.callback_handler.callbacks if isinstance(one, GGPOCallback)), None)
        parts = _parts(trainer) | ({f"GGPO: {name}": size for name, size in ggpo.memory().items()} if ggpo else {})
        trainer.accelerator.free_memory()
        self.model.zero_grad(set_to_none=True)
        del trainer
        gc.collect()
        return _Measured(batch, clock.peak, timed, tokens, parts, len(ggpo.layers) if ggpo else None)

    def _typical(self, lengths: list[int], size: int, steps: int) -> list[list[int]]:
        """Rows of `steps` steps, one from each equal share of an epoch ordered by length; middle lengths come first."""
        grouped = self.args.train_sampling_strategy == "group_by_length"
        order = list(EpochSampler(lengths, self.args.seed, size if grouped else None))
        whole = [order[start : start + size] for start in range(0, len(order) - size + 1, size)]
        whole = whole or [[order[index % len(order)] for index in range(size)]]
        whole.sort(key=lambda step: sum(lengths[row] for row in step))
        shares = sorted(((index + 0.5) / steps for index in range(steps)), key=lambda share: abs(share - 0.5))
        return [whole[int(share * len(whole))] for share in shares]


def longest_rows(lengths: list[int], size: int) -> list[int]:
    """The `size` longest rows; where there are fewer, they are repeated."""
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    return [order[index % len(order)] for index in range(size)]


class _Clock(TrainerCallback):
    """Times optimizer steps and the loading of their rows; ends the training when it has taken long enough."""

    def __init__(self, task: Task) -> None:
        self._task, self._last, self._deadline = task, 0.0, 0.0
        self.seconds: list[float] = []
        self.peak: int | None = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._task.begin(0)
        reset_peak(args.device)
        self._last = time.perf_counter()
        self._deadline = self._last + PROBE_SECONDS

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if args.device.type != "cpu":
            torch.accelerator.synchronize()
        now = time.perf_counter()
        self.seconds.append(now - self._last)
        self._last = now
        self._task.update(state.global_step, state.max_steps)
        control.should_training_stop |= now > self._deadline and state.global_step > WARM_UP

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.peak = peak(args.device)


# --- memory and disk -----------------------------------------------------------------------------------------------


def _parts(trainer: RunTrainer) -> dict[str, int]:
    """Bytes that can be counted of what a training step needs; a gradient has the type of its parameter."""
    model: Any = trainer.model
    frozen = sum(stored_bytes(p) for p in model.parameters() if not p.requires_grad)
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    optimizer: Any = trainer.optimizer
    groups = [{name: of for name, of in group.items() if name != "params"} for group in optimizer.param_groups]
    kept = tree_leaves([dict(optimizer.state), groups])
    state = {id(t): t for t in kept if isinstance(t, torch.Tensor) and t.dim() > 0}
    return {
        "frozen weights": frozen + sum(buffer.nbytes for buffer in model.buffers()),
        "trained parameters": trained,
        "gradients": trained,
        "optimizer state": sum(tensor.nbytes for tensor in state.values()),
    }


def _by_parts(measured: _Measured, before: int | None) -> dict[str, int] | None:
    """The peak by parts; `before` is what was in use before the model was loaded."""
    if measured.peak is None or before is None:
        return None
    known = {**measured.parts, "Python, libraries and data": before}
    return {**known, "activations and the rest": measured.peak - sum(known.values())}


_SHARED = {
    "zero1": ("optimizer state",),
    "zero2": ("optimizer state", "gradients"),
    **dict.fromkeys(("zero3", "fsdp2"), ("optimizer state", "gradients", "trained parameters", "frozen weights")),
}


def share_of_memory(memory: dict[str, int], shards: str, processes: int, whole: int) -> dict[str, int]:
    """The parts of `memory` that each of `processes` has which share the model out.

    Args:
        whole: Bytes of the weights that are put together at a time where all of them are cut.
    """
    shared = _SHARED.get(shards, ())
    parts = {name: -(-size // processes) if name in shared else size for name, size in memory.items()}
    return {**parts, "weights put together": whole} if "frozen weights" in shared and processes > 1 else parts


def at_once(model: nn.Module) -> int:
    """Bytes of what is put together of a cut model: a block, the next one, and all that is in no block."""
    blocks = [block for part in model.modules() if isinstance(part, nn.ModuleList) for block in part]
    sizes = sorted(sum(map(stored_bytes, block.parameters())) for block in blocks)
    inside = {id(p) for block in blocks for p in block.parameters()}
    return sum(sizes[-2:]) + sum(stored_bytes(p) for p in model.parameters() if id(p) not in inside)


def largest_batch(peaks: dict[int, int | None], limit: int | None) -> int | None:
    """Rows of a batch that are expected to fit, from the peaks of two batches: peak = fixed + rows x slope.

    Args:
        peaks: Bytes by rows of a batch.
        limit: Bytes that there are; `LEFT_FREE` of them are left free.

    Returns:
        0 if not one row is expected to fit; None if it cannot be told.
    """
    (few, low), (many, high) = min(peaks.items()), max(peaks.items())
    if limit is None or low is None or high is None or few == many or high - low < _SMALLEST_DIFFERENCE:
        return None
    slope = (high - low) / (many - few)
    return max(0, math.floor((limit * (1 - LEFT_FREE) - high) / slope + many))


def _weights_size(model: AnyModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> int:
    """Bytes of a saved adapter, or model, with its tokenizer."""
    save_tokenizer(tokenizer, folder)
    files = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    if not isinstance(model, PeftModel):
        return files + sum(p.nbytes for p in model.parameters())
    saved = peft.get_peft_model_state_dict(model)
    twice = moves_base(model)  # saved as a difference of two products
    return files + sum(t.nbytes * (2 if twice and "lora_" in name else 1) for name, t in saved.items())


def _checkpoints(recipe: Recipe, args: TrainingArguments, steps: int) -> int:
    """Checkpoints that are left when a run ends."""
    if recipe.adalora:
        return 0
    every = args.save_steps if args.save_steps >= 1 else math.ceil(steps * args.save_steps)
    keep = recipe.training_fields["save_total_limit"]
    made = math.ceil(steps / every) if every else 1  # 0 saves at the end of the run alone
    return min(made, keep) if keep else made


def _row_seconds(score: Scorer) -> float:
    """Seconds to score a row, from a sample."""
    sample = fixed_sample(next(iter(score.encoded.values())), SCORED_ROWS)
    start = time.perf_counter()
    score.quick(sample)
    return (time.perf_counter() - start) / len(sample)
