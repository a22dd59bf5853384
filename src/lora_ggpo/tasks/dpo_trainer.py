"""TRL's DPOTrainer on rows that are encoded already, with the reference taken before anything moves the weights."""

from __future__ import annotations

from typing import Any

from datasets import Dataset
from torch import Tensor, nn
from transformers import TrainingArguments
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer

from lora_ggpo.tasks.base import NO_LOSS, Batch
from lora_ggpo.tasks.forward import evaluating

_REFERENCE = "ref"  # the copy of the adapter that TRL makes


def dpo_arguments(args: TrainingArguments, beta: float) -> DPOConfig:
    """`args` as TRL takes them; what they do not set is as in transformers, not as in TRL."""
    made = DPOConfig(str(args.output_dir), use_cpu=True, bf16=False, beta=beta, max_length=None, disable_dropout=False)
    vars(made).update(vars(args))
    return made


class PreferenceTrainer(DPOTrainer):
    """The reference is the model with its adapter switched off, without dropout and without noise.

    It is taken as a batch arrives: methods that move the weights for the gradient would move those of the reference.
    """

    def __init__(self, **arguments: Any) -> None:
        trained = {name: p.data for name, p in arguments["model"].named_parameters() if p.requires_grad}
        super().__init__(**arguments)
        model: Any = self.model
        model.delete_adapter(_REFERENCE)
        for name, parameter in model.named_parameters():
            if name in trained:  # TRL rounds the adapter of a quantised model to bfloat16
                parameter.data = trained[name]
        self.precompute_ref_logps = True  # the loss finds them in its batch

    def get_batch_samples(self, *arguments: Any, **options: Any) -> Any:
        """As Trainer's, with the reference's log-probabilities in each batch."""
        batches, items = super().get_batch_samples(*arguments, **options)
        return [self._with_reference(self._prepare_inputs(batch)) for batch in batches], items

    def _with_reference(self, batch: Batch) -> Batch:
        model: Any = self.model
        with evaluating(model):
            chosen, rejected = self.compute_ref_log_probs(model, _masked(batch))
        return {**batch, "ref_chosen_logps": chosen, "ref_rejected_logps": rejected}

    def compute_loss(self, model: nn.Module, inputs: Batch, *arguments: Any, **options: Any) -> Any:
        """As TRL's, of batches with labels."""
        return super().compute_loss(model, _masked(inputs), *arguments, **options)

    def log(self, logs: dict[str, float], *arguments: Any, **options: Any) -> None:
        """As TRL's, without its count of tokens, which begins anew when a run resumes."""
        self._metrics["train"].pop("num_tokens", None)
        super().log(logs, *arguments, **options)

    def _prepare_dataset(self, dataset: Dataset, *_: Any) -> Dataset:
        return dataset

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """None: peft writes one beside the adapter."""

    def _send_telemetry(self) -> None:
        """Nothing is sent."""


def _masked(batch: Batch) -> dict[str, Tensor]:
    """A batch as TRL takes it: a mask of the answers instead of labels."""
    others = {name: tensor for name, tensor in batch.items() if name != "labels"}
    return {**others, "completion_mask": batch["labels"].ne(NO_LOSS).long()}
