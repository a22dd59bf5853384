"""Forgetting: how far training raises a causal language model's loss on general text.

Defined as PEFT's method_comparison defines it (MetaMathQA/run.py): the mean loss over all tokens of all texts, of the
model as it is trained less that of the model before. Both are measured in one way, so where training changes nothing
the rise is exactly 0.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from datasets import Dataset
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lora_ggpo.data import digest
from lora_ggpo.data.general import GeneralTextConfig, read_general_text
from lora_ggpo.errors import UserError
from lora_ggpo.methods.initialise import writes_base
from lora_ggpo.methods.subspace import ROWS
from lora_ggpo.models.load import check_tokens
from lora_ggpo.recipe.recipe import Recipe
from lora_ggpo.statistics.measured import Floats, Measured, measure_ratio
from lora_ggpo.tasks import TaskConfig
from lora_ggpo.tasks.forward import evaluating
from lora_ggpo.tasks.general import GeneralText
from lora_ggpo.training.scorer import Scorer, fixed_sample, further_sample
from lora_ggpo.workspace.files import read_json, write_json
from lora_ggpo.workspace.ranks import is_first

BEFORE = "forgetting.json"
"""In a run's folder: the loss of each general text before training, so that a run that resumes knows it."""

TEXTS_AT_ONCE = 4
"""As few as PEFT takes: the logits of all their tokens are held at once."""


@dataclass(frozen=True)
class Forgetting:
    """That of the run in `folder`, whose model `score` scores."""

    config: GeneralTextConfig
    folder: Path
    score: Scorer

    def look_before(self, model: nn.Module) -> None:
        """Keep the loss of `model`, which is not trained yet, in the run's folder; once, however often a run resumes.

        Every process must call this.
        """
        file = self.folder / BEFORE
        if file.is_file():
            return
        with _untouched(model):
            scores, of = self._scores()
        if is_first():
            losses, tokens = scores.T.tolist()
            write_json(file, {"text": of, "losses": losses, "tokens": tokens})

    def measure(self) -> dict[str, Measured]:
        """The rise, and the losses after and before training: nats a token, with standard errors over the texts.

        Every process must call this; the first one has the result, the others have nothing.

        Raises:
            UserError: the text is not that of the beginning.
        """
        scores, of = self._scores()
        if not is_first():
            return {}
        before = read_json(self.folder / BEFORE)
        if before["text"] != of:
            raise UserError(
                f"The text of forgetting has changed since {self.folder} was begun; put it back, or choose another "
                "output."
            )
        then, tokens = np.array(before["losses"]), scores[:, 1].astype(np.int64)
        found = {"forgetting": scores[:, 0] - then, "loss": scores[:, 0], "base_loss": then}
        return {name: measure_ratio(losses, tokens) for name, losses in found.items()}

    def _scores(self) -> tuple[Floats, str]:
        """Summed loss and number of tokens of each text, and the digest of all."""
        texts = fixed_sample(read_general_text(self.config), self.config.rows)
        config = TaskConfig.model_validate({"kind": "sft", "max_length": self.config.max_length})
        try:
            scores = self.score.score_by(GeneralText(config), texts, self.config.source, TEXTS_AT_ONCE)
        except UserError as error:
            raise UserError(str(error).replace("task.max_length", "forgetting.max_length")) from error
        return scores, digest(texts)


def forgetting_of(recipe: Recipe, folder: Path, score: Scorer) -> Forgetting | None:
    """What measures it in the run in `folder`; None if its recipe does not ask for it, or is a trial of settings."""
    text = recipe.forgetting if recipe.score_test else None
    return Forgetting(text, folder, score) if text else None


def text_to_keep(recipe: Recipe, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """Encoded general text that an adapter is to leave alone: of the recipe's `forgetting`, or what is bundled.

    Texts that forgetting is measured on are among it only if its source has no others.

    Raises:
        UserError: there is none, or the model does not know its tokens.
    """
    config = recipe.forgetting or GeneralTextConfig.model_validate({})
    texts = further_sample(read_general_text(config), config.rows if recipe.forgetting else 0, ROWS)
    length = min(config.max_length, tokenizer.model_max_length)
    task = GeneralText(TaskConfig.model_validate({"kind": "sft", "max_length": length}))
    encoded = task.encode(texts, tokenizer, config.source)
    check_tokens(model, tokenizer, encoded["input_ids"], f"{config.source}: Row")
    return encoded


@contextmanager
def _untouched(model: nn.Module) -> Iterator[None]:
    """The model as it came, though an adapter may begin with s B A != 0.

    Where that is taken off W0 (PiSSA and others), the two together are what came, and the adapter stays on.
    """
    if not isinstance(model, PeftModel) or writes_base(model):
        yield
        return
    with evaluating(model), model.disable_adapter():
        yield
