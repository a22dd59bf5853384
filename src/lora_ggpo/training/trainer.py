"""transformers' Trainer with a data order that resumes exactly, one mean loss over all of an optimizer step, a stop at
the first loss that is not finite, and the optimizers and gradients of other methods."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from peft.helpers import MontecloraTrainerMixin
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import Sampler
from transformers import Trainer, TrainingArguments

from lora_ggpo.errors import DivergedError, explain_rejection
from lora_ggpo.methods.ascent import Ascent
from lora_ggpo.training.drawn import random_order, section_size
from lora_ggpo.training.head_loss import HeadLoss, takes_head_loss
from lora_ggpo.training.sharding import cuts_weights, place, shard_on_cpu, whole_weights

MakeOptimizer = Callable[[Any, TrainingArguments], Optimizer]
MakeAscent = Callable[[nn.Module, Optimizer], Ascent]

_EPOCH_STRIDE = 1_000_003


class NonFiniteLossError(DivergedError):
    """The loss is no longer a finite number."""


class EpochSampler(Sampler[int]):
    """A random order of row indices that is a function of (seed, epoch) alone.

    Trainer's own samplers draw from torch's global generator, so their order in later epochs changes with the method
    and is lost when a run resumes.

    Args:
        lengths: Tokens of each row.
        seed: Seed of the order.
        group_size: Rows of like length come together in groups of this size; None mixes all lengths.
        drawn_of: The rows are the first of a random order of so many, and nothing draws more than these; None has all.
    """

    def __init__(
        self, lengths: ArrayLike, seed: int, group_size: int | None = None, drawn_of: int | None = None
    ) -> None:
        self.lengths, self.seed, self.group_size = np.asarray(lengths), seed, group_size
        self.drawn_of, self.epoch = drawn_of, 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order; the Trainer calls it as each epoch begins."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.drawn_of or len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        rows, seed = len(self.lengths), self.seed + _EPOCH_STRIDE * self.epoch
        order = np.arange(rows) if self.drawn_of else random_order(rows, seed)
        if self.group_size is not None:
            self._group(order, self.group_size)
        return map(int, order)

    def _group(self, order: NDArray[np.int64], size: int) -> None:
        """Bring rows of like length together, as transformers' get_length_grouped_indices does with lists: `order` is
        sorted by length in sections of up to 50 groups, and the longest row of all comes first."""
        section = section_size(len(self), size)
        for begin in range(0, len(order), section):
            rows = order[begin : begin + section]
            rows[:] = rows[np.argsort(-self.lengths[rows], kind="stable")]
        longest = section * int(self.lengths[order[::section]].argmax())
        order[[0, longest]] = order[[longest, 0]]


class RunTrainer(MontecloraTrainerMixin, Trainer):
    """The Trainer of a run.

    The loss of an optimizer step is the mean over all its items, however they are spread over micro-batches and
    processes: rows where a row has one label, else tokens with a label. Trainer leaves that mean to the models, but
    few divide by the ``num_items_in_batch`` that it hands them: those with a classification head, encoder-decoders and
    AdaLoRA's regularisation do not, and their micro-batches would add up. So each model gives the mean of its own
    micro-batch, which counts by its share of the items. MonteCLoRA's divergence is added to it by peft.

    Args:
        lengths: Tokens of each training row.
        drawn_of: How many rows there are in all, if the steps draw but these, in their order; None if they are all.
        items: How many items the model's loss on a batch is the mean of.
        settings: The fields of the recipe's ``training``, for what a library says of one.
        make_optimizer: Makes the optimizer; None is the one that the arguments name.
        make_ascent: Makes what moves the weights for the gradient; None is nothing.
        from_labels: Whether the loss is the one that the model takes of the labels.
    """

    loss_is_scaled_for_ga = True

    def __init__(
        self,
        *,
        lengths: ArrayLike,
        drawn_of: int | None = None,
        items: Callable[[dict[str, Tensor]], int | Tensor],
        settings: Collection[str] = (),
        make_optimizer: MakeOptimizer | None = None,
        make_ascent: MakeAscent | None = None,
        from_labels: bool = True,
        **arguments: Any,
    ) -> None:
        super().__init__(**arguments)
        self._lengths, self._drawn_of, self._items, self._settings = lengths, drawn_of, items, settings
        self._make_optimizer, self._make_ascent = make_optimizer, make_ascent
        self._ascent: Ascent | None = None
        self._head_loss: HeadLoss | None = None
        inner: Any = self.model
        if from_labels and not self.args.use_liger_kernel and takes_head_loss(inner):  # liger has one of its own
            self._head_loss = HeadLoss(inner, self.args.label_smoothing_factor)
            self.label_smoother = None
        self.model_accepts_loss_kwargs = True  # Trainer then knows that compute_loss sees the whole optimizer step

    def create_accelerator_and_postprocess(self) -> None:
        """As Trainer's, which knows FSDP on accelerators alone."""
        super().create_accelerator_and_postprocess()
        shard_on_cpu(self)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As Trainer's, which of a model that is shared out would put frozen weights together too."""
        if not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            super().save_model(output_dir, _internal_call)
        else:
            inner: Any = self.model
            self._save(output_dir, state_dict=whole_weights(inner) if cuts_weights(self.args) else None)

    def take_up(self, checkpoint: str) -> None:
        """Load what was trained, to be scored."""
        if self.is_fsdp_enabled:
            place(self)  # FSDP reads pieces, DeepSpeed cuts what was read
            self._load_from_checkpoint(checkpoint)
        else:
            self._load_from_checkpoint(checkpoint)
            place(self)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        strategy = self.args.train_sampling_strategy
        if strategy not in ("random", "group_by_length") and not self._drawn_of:
            return super()._get_train_sampler(train_dataset)
        rows_a_step = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        group_size = rows_a_step if strategy == "group_by_length" else None
        return EpochSampler(self._lengths, self.args.seed, group_size, self._drawn_of)

    def create_optimizer(self, model: Any = None) -> Optimizer:
        """As Trainer's, or what `make_optimizer` makes."""
        if self.optimizer is None and self._make_optimizer:
            self.optimizer = self._make_optimizer(model or self.model, self.args)
        optimizer = super().create_optimizer(model)
        if self._make_ascent and self._ascent is None:
            inner: Any = self.model  # before DDP wraps it, and before the optimizer gets its schedule and its past
            self._ascent = self._make_ascent(inner, optimizer)
        return optimizer

    def train(self, resume_from_checkpoint: str | bool | None = None, *arguments: Any, **options: Any) -> Any:
        """As Trainer's.

        Raises:
            UserError: what the libraries find in the settings as they make the optimizer, the schedule and the batches,
                and take the first step.
            DivergedError: GGPO finds weights whose squares are not finite.
        """
        try:
            return super().train(resume_from_checkpoint, *arguments, **options)
        except FloatingPointError as error:
            raise DivergedError(f"{error}.") from error
        except Exception:
            if resume_from_checkpoint or self.state.global_step:
                raise
            with explain_rejection("training", self._settings):
                raise

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Tensor]], device: torch.device) -> Tensor:
        """Items of an optimizer step, given this process's micro-batches: the mean over the processes."""
        items = sum((torch.as_tensor(self._items(batch)) for batch in batch_samples), torch.tensor(0)).to(device)
        if self.args.world_size > 1 and self.args.average_tokens_across_devices:
            items = self.accelerator.gather(items)
        return items.float().mean()

    def _encodes_and_decodes(self) -> bool:
        model: Any = self.model
        return bool(model.config.is_encoder_decoder)

    def compute_loss(  # type: ignore[override]
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """As Trainer's; the losses of an optimizer step's micro-batches sum to the mean over the step."""
        share = 1.0 if num_items_in_batch is None else self._items(inputs) / num_items_in_batch
        if self.label_smoother and self._encodes_and_decodes():  # which takes the labels from the model
            base = self.accelerator.unwrap_model(model)
            made = base.prepare_decoder_input_ids_from_labels(labels=inputs["labels"])
            inputs = {**inputs, "decoder_input_ids": made}
        with self._head_loss.over(inputs["labels"]) if self._head_loss else nullcontext():
            found: Any = super().compute_loss(model, inputs, return_outputs=return_outputs)
        return (found[0] * share, found[1]) if return_outputs else found * share

    def training_step(self, model: nn.Module, *arguments: Any, **options: Any) -> Tensor:
        """As Trainer's, with the gradient where the run's method takes it.

        Raises:
            NonFiniteLossError: before the optimizer can take a step along such a loss.
        """

        def backward() -> Tensor:
            return super(RunTrainer, self).training_step(model, *arguments, **options)

        loss = self._ascent.backward(backward) if self._ascent else backward()
        if not torch.isfinite(loss):
            step = self.state.global_step + 1
            raise NonFiniteLossError(f"The loss is {loss.item():g} at step {step}")
        return loss
