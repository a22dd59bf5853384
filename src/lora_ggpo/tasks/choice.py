"""Multiple choice: of a question's options, the model gives the right one the largest likelihood.

The right option is learnt as a completion is in task sft. A model is scored as lm-evaluation-harness does it: by the
log-likelihood of each option behind the question, its end left out, as it is ("acc") and by character ("acc_norm").
"""

from __future__ import annotations

import reprlib
import string
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain, zip_longest
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from datasets import Dataset, List, Value
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from lora_ggpo.data.load import STRING, Columns, TextReader
from lora_ggpo.data.table import Table
from lora_ggpo.errors import UserError
from lora_ggpo.statistics.measured import Floats, Integers, Measured, measure_share
from lora_ggpo.tasks.base import NO_LOSS, Batch, Row, Score, Task, several_row, split_row
from lora_ggpo.tasks.completions import completion_losses, completion_metrics
from lora_ggpo.tasks.sft import SFT, Tokens

if TYPE_CHECKING:
    from lora_ggpo.tasks.config import TaskConfig

QUESTIONS = ("question", "question_stem", "ctx", "goal", "text")
"""Columns of the question: ARC's and MMLU's, OpenBookQA's, HellaSwag's, PIQA's."""

CHOICES: tuple[tuple[str, ...], ...] = (("choices",), ("endings",), ("sol1", "sol2"))
"""Columns of the options: ARC's, OpenBookQA's and MMLU's, HellaSwag's, PIQA's."""


LETTERS = string.ascii_uppercase
"""Labels of options that have none."""

Options = tuple[list[str], list[str]]
"""The texts of a question's options, and their labels."""


class ChoiceReader(TextReader):
    """Reads "text" (the question), "choices" (the texts of its options) and "answer" (the index of the right one).

    The source gives the right option by its label (as ARC does), number from 0 on, letter, or text.
    """

    value = "answer"
    defaults = ("answerKey", "answer", "label")
    features: ClassVar = {"id": STRING, "text": STRING, "choices": [STRING], "answer": Value("int64")}
    known = ()

    def study(self, table: Table, column: str) -> None:
        self._question = next((name for name in QUESTIONS if name in table.columns), QUESTIONS[0])

    def values(self, table: Table, column: str) -> list[int]:
        rows = zip(table.column(column, "label"), self._options(table), strict=True)
        return [_index(answer, options, table, column, row) for row, (answer, options) in enumerate(rows)]

    @property
    def _texts(self) -> dict[str, str]:
        return {"text": self.config.text or self._question}

    def _read(self, table: Table, texts: Mapping[str, str], column: str) -> Columns:
        options = [texts for texts, _ in self._options(table)]
        return {**super()._read(table, texts, column), "choices": options}

    def _options(self, table: Table) -> list[Options]:
        given = self.config.choices
        named = [given] if isinstance(given, str) else given
        names = named or next((names for names in CHOICES if names[0] in table.columns), CHOICES[0])
        columns = [table.column(name, "choices") for name in names]
        rows: Iterable[Any] = columns[0] if len(columns) == 1 else map(list, zip(*columns, strict=True))
        return [_options(value, table, names[0], row) for row, value in enumerate(rows)]


def _options(value: Any, table: Table, column: str, row: int) -> Options:
    """The options of a row: a list of texts or of {"text", "label"}, or {"text": [...], "label": [...]}."""
    parts = [value] if isinstance(value, dict) else value if isinstance(value, list) else []
    labels = [str(label) for part in parts if isinstance(part, dict) for label in _listed(part.get("label", []))]
    found = [text for part in parts for text in _listed(part.get("text") if isinstance(part, dict) else part)]
    texts = [table.require_text(text, column, row) for text in found]
    if len(texts) < 2 or (labels and len(labels) != len(texts)):
        raise UserError(
            f"{table.where(row)}: column {column!r} must hold the options, two at least, as a list of texts."
        )
    return texts, labels


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _index(answer: Any, options: Options, table: Table, column: str, row: int) -> int:
    """The place of the right option, whichever way `answer` names it."""
    texts, labels = options
    said = str(answer).strip()
    number = int(said) if said.isdecimal() else -1
    ways = {labels.index(said)} if said in labels else {LETTERS.find(said)} if len(said) == 1 else set()
    if not labels:
        ways |= {number, texts.index(said) if said in texts else -1}
    found = {way for way in ways if 0 <= way < len(texts)}
    if len(found) != 1:
        problem = "may be the number of one option and the text of another" if found else "names none of the options"
        names = ", ".join(labels or texts)
        raise UserError(f"{table.where(row)}: {reprlib.repr(answer)} in column {column!r} {problem} ({names}).")
    return found.pop()


class Choice(SFT):
    """Encoded rows hold all options, each behind the question and with its end; of these the right one is learnt."""

    reader = ChoiceReader
    settings = frozenset({"template", "chat_template", "packing"})
    columns = frozenset({"text", "choices", "label"})
    metrics = ("accuracy", "accuracy_norm", "loss")
    features: ClassVar = {"answer": Value("int64"), "characters": List(Value("int32"))}
    default_template = "Question: {text}\nAnswer: "

    def __init__(self, config: TaskConfig, labels: list[str] | None = None) -> None:
        # Options that are cut could not be compared: such a question is left out.
        super().__init__(config.model_copy(update={"too_long": "drop"}), labels)

    def answered(self, row: Row) -> list[Row]:
        return [{"prompt": row["text"], "completion": option} for option in row["choices"]]

    def encoded(self, sequences: list[Tokens], row: Row) -> Row:
        characters = [len(option) for option in row["choices"]]
        return several_row(sequences, id=row["id"], answer=row["answer"], characters=characters)

    def learnt(self, rows: Dataset) -> Dataset:
        def right(row: Row) -> Row:
            return split_row(row)[row["answer"]]

        return rows.map(right, remove_columns=["sizes", "id", *self.features], keep_in_memory=True)

    @classmethod
    def collator(cls, tokenizer: PreTrainedTokenizerBase) -> Callable[[Sequence[Row]], Batch]:
        """Rows to train on as in task sft; of others all options, without their ends, and "options", their number."""
        pad = super().collator(tokenizer)

        def collate(rows: Sequence[Row]) -> Batch:
            if "sizes" not in rows[0]:
                return pad(rows)
            options = [split_row(row) for row in rows]
            for option in chain.from_iterable(options):
                option["labels"] = [*option["labels"][:-1], NO_LOSS]
            return {**pad(list(chain.from_iterable(options))), "options": torch.tensor([len(one) for one in options])}

        return collate

    def scorer(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> Score:
        """Summed loss and number of tokens of each option in turn, (questions, 2 x options); 0 where there is none."""

        def score(batch: Batch) -> Tensor:
            found = completion_losses(model, batch).split(batch["options"].tolist())
            return pad_sequence(list(found), batch_first=True).flatten(1)

        return score

    fitted = Task.fitted  # whole answers are scored, not their tokens

    def measure(self, scores: Floats, rows: Dataset) -> dict[str, Measured]:
        return choice_metrics(scores.reshape(len(rows), -1, 2), _padded(rows["characters"]), np.asarray(rows["answer"]))

    def lines(self, scores: Floats, rows: Dataset) -> list[dict[str, Any]]:
        columns = zip(rows["id"], rows["answer"], rows["sizes"], scores.reshape(len(rows), -1, 2)[..., 0], strict=True)
        return [
            {"id": id_, "answer": answer, "log_likelihoods": [round(-float(one), 6) for one in losses[: len(sizes)]]}
            for id_, answer, sizes, losses in columns
        ]


def choice_metrics(options: Floats, characters: Floats, answers: Integers) -> dict[str, Measured]:
    """Accuracy by log-likelihood, by log-likelihood a character, and the right option's loss a token.

    Args:
        options: (n, options, 2), summed loss and number of tokens of each option; no tokens where there is no option.
        characters: (n, options), of each option's text.
        answers: (n,), indices of the right options.

    Standard errors: binomial for accuracies, over questions for the loss.
    """
    losses, tokens = options[..., 0], options[..., 1]
    likelihoods = np.where(tokens > 0, -losses, -np.inf)
    right = np.arange(len(answers)), answers
    return {
        "accuracy": measure_share(likelihoods.argmax(axis=1) == answers),
        "accuracy_norm": measure_share((likelihoods / characters).argmax(axis=1) == answers),
        "loss": completion_metrics(losses[right], tokens[right].astype(np.int64))["loss"],
    }


def _padded(rows: Iterable[list[int]]) -> Floats:
    """Rows of numbers as an array, with 1 where a row has none."""
    return np.array(list(zip_longest(*rows, fillvalue=1)), dtype=np.float64).T
