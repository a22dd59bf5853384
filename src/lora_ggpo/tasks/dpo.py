"""Preferences: of two answers to a prompt the chosen one is to become likelier, against the model as it was.

Direct preference optimisation (arXiv 2305.18290): an answer's reward is beta (log p - log p_ref), from the probability
of the whole answer by the model, and by the model with its adapter switched off. The loss of a pair is
-log sigmoid(reward of the chosen answer - reward of the rejected one); TRL's DPOTrainer takes it.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lora_ggpo.data.preference import SIDES, PreferenceReader
from lora_ggpo.errors import UserError
from lora_ggpo.statistics.measured import Floats, Measured, measure_mean, measure_share
from lora_ggpo.tasks.base import Batch, Row, Score, Task, several_row, split_row
from lora_ggpo.tasks.completions import completion_losses
from lora_ggpo.tasks.sft import SFT, Tokens

if TYPE_CHECKING:
    from transformers import Trainer, TrainingArguments


class DPO(SFT):
    """Encoded rows hold both answers, each behind the prompt, the chosen one first; in a batch all chosen ones are."""

    reader = PreferenceReader
    settings = frozenset({"template", "chat_template", "too_long", "beta"})
    columns = frozenset({"prompt", "chosen", "rejected", "ignore"})
    metrics = ("accuracy", "margin", "loss")
    has_reference = True

    def answered(self, row: Row) -> list[Row]:
        if "messages" in row:
            return [{**row, "messages": row["messages"] + row[side]} for side in SIDES]
        return [{**row, "completion": row[side]} for side in SIDES]

    def encoded(self, sequences: list[Tokens], row: Row) -> Row:
        return several_row(sequences, id=row["id"])

    def begin(self, model: PreTrainedModel, rows: Dataset) -> Dataset:
        if importlib.util.find_spec("trl") is None:
            raise UserError("Task dpo trains with TRL; install it with: pip install 'lora-ggpo[dpo]'")
        return rows

    def trainer(self, args: TrainingArguments) -> tuple[type[Trainer], TrainingArguments]:
        from lora_ggpo.tasks.dpo_trainer import PreferenceTrainer, dpo_arguments  # TRL is optional, and slow to import

        return PreferenceTrainer, dpo_arguments(args, self.config.beta)

    @classmethod
    def items(cls, batch: Batch) -> int:
        return len(batch["labels"]) // 2

    @classmethod
    def collator(cls, tokenizer: PreTrainedTokenizerBase) -> Callable[[Sequence[Row]], Batch]:
        pad = super().collator(tokenizer)

        def collate(rows: Sequence[Row]) -> Batch:
            chosen, rejected = zip(*map(split_row, rows), strict=True)
            return pad([*chosen, *rejected])

        return collate

    def scorer(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> Score:
        """Log-probabilities of the chosen and the rejected answer by the model and by its reference, (pairs, 4)."""
        adapted: Any = model

        def score(batch: Batch) -> Tensor:
            found = [completion_losses(model, batch)[:, 0]]
            with adapted.disable_adapter():
                found.append(completion_losses(model, batch)[:, 0])
            return -torch.cat(found).view(4, -1).T

        return score

    fitted = Task.fitted  # whole answers are scored, not their tokens

    def measure(self, scores: Floats, rows: Dataset) -> dict[str, Measured]:
        return preference_metrics(self._rewards(scores))

    def lines(self, scores: Floats, rows: Dataset) -> list[dict[str, Any]]:
        rewards = zip(rows["id"], *self._rewards(scores).round(6).T.tolist(), strict=True)
        return [dict(zip(("id", *SIDES), row, strict=True)) for row in rewards]

    def _rewards(self, scores: Floats) -> Floats:
        """Of the chosen and the rejected answers, (pairs, 2)."""
        return self.config.beta * (scores[:, :2] - scores[:, 2:])


def preference_metrics(rewards: Floats) -> dict[str, Measured]:
    """The share of pairs whose chosen answer has the larger reward, the mean margin of rewards, and the loss.

    Args:
        rewards: (n, 2), of the chosen and the rejected answers.

    Standard errors: binomial for the share, s / sqrt(n) for the means.
    """
    margins = rewards[:, 0] - rewards[:, 1]
    return {
        "accuracy": measure_share(margins > 0),
        "margin": measure_mean(margins),
        "loss": measure_mean(np.logaddexp(0, -margins)),
    }
