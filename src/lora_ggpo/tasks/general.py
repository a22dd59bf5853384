"""General text: a causal language model's loss on text that nobody taught it here."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np
from datasets import Dataset
from torch import nn
from transformers import PreTrainedTokenizerBase

from lora_ggpo.models.architecture import CAUSAL
from lora_ggpo.statistics.measured import Floats, Measured, measure_ratio
from lora_ggpo.tasks.base import CHUNK, Row, Score, Task, encoded_row
from lora_ggpo.tasks.completions import completion_losses


class GeneralText(Task):
    """Every token but the first of a text is scored. It is no task of recipes: nothing is trained on it."""

    architecture = CAUSAL
    metrics = ("loss",)
    loss = "loss"

    def rows(self, dataset: Dataset, tokenizer: PreTrainedTokenizerBase, name: str) -> Iterator[list[Row]]:
        """The texts as the tokenizer begins and ends them, cut at `max_length`; one of a single token has no loss."""
        for batch in dataset.iter(CHUNK):
            texts = tokenizer(batch["text"], truncation=True, max_length=self.config.max_length)["input_ids"]
            yield [encoded_row(ids, ids) for ids in texts if len(ids) > 1]

    def scorer(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> Score:
        """Summed loss and number of scored tokens of each text, (batch, 2)."""
        return partial(completion_losses, model)

    def measure(self, scores: Floats, rows: Dataset) -> dict[str, Measured]:
        return {"loss": measure_ratio(scores[:, 0], scores[:, 1].astype(np.int64))}
