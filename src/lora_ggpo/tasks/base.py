"""What a task is: one object that loads and encodes its data, scores a model on it, and says what else it needs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
import pyarrow
import torch
from datasets import Dataset, Features, List, Value
from torch import nn
from transformers import DataCollatorForSeq2Seq, DataCollatorWithPadding, PreTrainedModel, PreTrainedTokenizerBase

from lora_ggpo.data.config import DataConfig
from lora_ggpo.data.kept import kept
from lora_ggpo.data.load import Reader, Splits
from lora_ggpo.data.spool import numbers, spooled
from lora_ggpo.errors import DivergedError, UserError
from lora_ggpo.models.architecture import ENCODER_DECODER, Architecture
from lora_ggpo.models.load import load_model
from lora_ggpo.models.quantise import Quantisation
from lora_ggpo.statistics.measured import Floats, Measured
from lora_ggpo.tasks.forward import autocasting, evaluating
from lora_ggpo.tasks.origin import origin
from lora_ggpo.workspace.ranks import merged, share_of

if TYPE_CHECKING:
    from transformers import Trainer, TrainingArguments

    from lora_ggpo.tasks.config import TaskConfig

NO_LOSS = -100
"""The label of a token on which no loss is taken."""

CHUNK = 1000
"""Rows that are encoded at a time."""

FEW = 500
"""Sets of more rows are kept in the user's cache folder when they are encoded."""

Row = dict[str, Any]
Batch = dict[str, torch.Tensor]
# What a batch gives: one row of numbers for each of its examples.
Score = Callable[[Batch], torch.Tensor]
Progress = Callable[[int, int], None]

_MODEL_INPUTS = ("input_ids", "attention_mask", "token_type_ids", "labels")
_TOKENS = List(Value("int32"))
_COLUMNS = {
    "input_ids": _TOKENS,
    "attention_mask": List(Value("int8")),
    "token_type_ids": List(Value("int8")),
    "labels": _TOKENS,
    "position_ids": _TOKENS,
    "length": Value("int32"),
    "sizes": _TOKENS,
    "id": Value("string"),
}


class Task(ABC):
    """What a model learns. A new task is a subclass, and a row of `lora_ggpo.tasks.TASKS`.

    Attributes:
        reader: Reads the columns of its data.
        architecture: The models that can learn it.
        settings, columns: Fields of `TaskConfig` and `DataConfig` that it looks at and others do not.
        metrics: Names of what is measured; trials are chosen by the first.
        loss: The metric that is the loss of training.
        features: Arrow types of the columns in which its encoded rows differ from those of other tasks.
        default_template, default_length: Of its settings.
        scores_every_token: Whether scoring takes logits of every token, and so about the memory of training.
        has_reference: Whether it compares a model with itself without its adapter, so that the loss is not the model's.
        averages: Whether a mean over models of their scores is the score of a prediction.
        answers: Whether a model that has learnt it can be asked something.
        temperature: After which the probabilities of tokens are measured as well, where the task measures them; None
            is not known.
    """

    reader: ClassVar[type[Reader]]
    architecture: ClassVar[Architecture]
    settings: ClassVar[frozenset[str]] = frozenset()
    columns: ClassVar[frozenset[str]]
    metrics: ClassVar[tuple[str, ...]]
    loss: ClassVar[str]
    features: ClassVar[dict[str, Any]] = {}
    default_template: ClassVar[str] = "{text}\nSentiment:"
    default_length: ClassVar[int] = 128
    scores_every_token: ClassVar[bool] = False
    has_reference: ClassVar[bool] = False
    averages: ClassVar[bool] = False
    answers: ClassVar[bool] = False

    def __init__(self, config: TaskConfig, labels: list[str] | None = None) -> None:
        self.config, self.labels = config, labels
        self.temperature: float | None = None

    # --- what a task must say ---

    @abstractmethod
    def rows(self, dataset: Dataset, tokenizer: PreTrainedTokenizerBase, name: str) -> Iterator[list[Row]]:
        """Encoded rows of the set `name`, in chunks; rows may be dropped. `encoded_row` makes one."""

    @abstractmethod
    def scorer(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> Score:
        """What gives numbers for each row of a batch."""

    @abstractmethod
    def measure(self, scores: Floats, rows: Dataset) -> dict[str, Measured]:
        """The metrics of the `scores` of encoded rows."""

    # --- what a task may say ---

    @property
    def head(self) -> dict[str, Any]:
        """Settings of the model's config that its new head needs."""
        return {}

    def check(self, dataset: Dataset, tokenizer: PreTrainedTokenizerBase) -> None:
        """Raise a UserError if the settings do not fit the columns or the tokenizer."""
        return

    def finish(self, scores: Floats) -> Floats:
        """The scores of all rows as they are kept, from those that `scorer` gives."""
        return scores

    def fitted(self, scores: Floats) -> Self:
        """The task with the temperature that is best for the `scores` of a validation set, if it takes one."""
        return self

    def lines(self, scores: Floats, rows: Dataset) -> list[dict[str, Any]]:
        """What is kept of each prediction; nothing if there is none."""
        return []

    def learnt(self, rows: Dataset) -> Dataset:
        """Of encoded `rows`, what is trained on."""
        return rows

    def begin(self, model: PreTrainedModel, rows: Dataset) -> Dataset:
        """Prepare a new model for its training on `rows`; return them as they are trained on."""
        return rows

    def trainer(self, args: TrainingArguments) -> tuple[type[Trainer], TrainingArguments]:
        """The Trainer whose loss it is, and the arguments as that takes them."""
        from transformers import Trainer  # slow to import, and recipes are read without it

        return Trainer, args

    @classmethod
    def items(cls, batch: Batch) -> int | torch.Tensor:
        """How many items the loss on `batch` is the mean of: rows where a row has one label, else tokens with one."""
        labels = batch["labels"]
        if labels.dim() == 1:
            return len(labels)
        return (labels if cls.architecture is ENCODER_DECODER else labels[:, 1:]).ne(NO_LOSS).sum()

    def user_turn(self, text: str) -> str:
        """What a user asks of a model that answers, as it stands in the training data."""
        return text

    # --- what all tasks do alike ---

    @classmethod
    def load(cls, data: DataConfig) -> Splits:
        """Load the data of the task."""
        return cls.reader.load(data)

    def load_model(
        self,
        name: str,
        dtype: str = "float32",
        quantisation: Quantisation | None = None,
        dropout: float | None = None,
        attention: str | None = None,
    ) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """`lora_ggpo.models.load.load_model` for this task."""
        return load_model(name, self.architecture, self.head, dtype, quantisation, dropout, attention)

    def encode(self, dataset: Dataset, tokenizer: PreTrainedTokenizerBase, name: str = "") -> Dataset:
        """Tokenise the rows of `dataset`, in their order, unless what the same ones became lies in the cache folder.

        Their columns are `input_ids`, `attention_mask`, `labels` and `length` (tokens of `input_ids`), and what the
        task adds. They are not padded.

        Args:
            dataset: Columns as the task's reader makes them.
            name: Of the set, which warnings and errors about its rows begin with.
        """

        def pieces() -> Iterator[pyarrow.Table]:
            self.check(dataset, tokenizer)
            return (arrow(rows, self.features) for rows in self.rows(dataset, tokenizer, name) if rows)

        if self.config.max_length > tokenizer.model_max_length:
            raise UserError(
                f"task.max_length = {self.config.max_length} is more than the {tokenizer.model_max_length} tokens "
                "the model can read; lower it."
            )
        try:
            made_from = origin(self, dataset, tokenizer, name) if len(dataset) > FEW else None
            return kept(made_from, pieces) if made_from else spooled(pieces())
        except UserError as error:
            if not name or str(error).startswith("task."):  # a setting of the recipe: its line is named
                raise
            raise UserError(f"{name}: {error}") from error

    @classmethod
    def collator(cls, tokenizer: PreTrainedTokenizerBase) -> Callable[[Sequence[Row]], Batch]:
        """Return a function that pads encoded rows on the right, to the longest of the batch, for the model's forward.

        It gives `input_ids`, `attention_mask` and `labels`, in which tokens are padded with `NO_LOSS`. Columns that
        are no input of a model are left out. Rows that `pack` made have `position_ids` instead of `attention_mask`:
        where they begin again at 0, so does an example, and none sees another.
        """
        if cls.architecture.new_head:
            return partial(_collate, DataCollatorWithPadding(tokenizer))
        return partial(_collate, DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=NO_LOSS))

    def score(
        self,
        model: nn.Module,
        rows: Dataset,
        tokenizer: PreTrainedTokenizerBase,
        *,
        batch_size: int = 32,
        progress: Progress | None = None,
        autocast: torch.dtype | None = None,
        device: torch.device | None = None,
        batches: Callable[[Sequence[int]], Batch] | None = None,
    ) -> Floats:
        """Scores (rows, k) of encoded rows, in their order; where a batch has fewer numbers a row, 0 follows.

        Of several processes each takes its share of the batches; every one must call this.

        Args:
            batch_size: Rows in a forward pass; batches hold rows of like length, the longest first.
            progress: Called as progress(rows done, rows in all) after each batch.
            autocast: Run the forward passes under autocast to this type (for instance torch.bfloat16).
            device: Where they run; None is where the model's weights are.
            batches: Makes a batch of rows by their numbers; None pads and collates them.

        The model is put in eval mode and its modules' modes are restored at the end; no gradient is kept.

        Raises:
            DivergedError: values that are not finite.
        """
        collate, score = self.collator(tokenizer), self.scorer(model, tokenizer)
        batches = batches or (lambda chosen: collate(rows.select(chosen).to_list()))
        device = device or next(model.parameters()).device
        order = np.argsort(-numbers(rows, "length"), kind="stable")
        parts: dict[int, Floats] = {}
        with evaluating(model):
            for begin in share_of(range(0, len(order), batch_size)):
                made = batches(order[begin : begin + batch_size].tolist())
                batch = {name: tensor.to(device) for name, tensor in made.items()}
                with autocasting(device, autocast):
                    parts[begin] = score(batch).double().cpu().numpy()
                if progress:
                    progress(min(begin + batch_size, len(order)), len(order))
        found = merged(parts)
        scores = np.zeros((len(order), max(part.shape[1] for part in found.values())))
        for begin, part in found.items():
            scores[order[begin : begin + batch_size], : part.shape[1]] = part
        broken = int((~np.isfinite(scores).all(axis=1)).sum())
        if broken:
            raise DivergedError(
                f"The model's outputs are not finite on {broken} of {len(scores)} examples: training has diverged; "
                "lower the learning rate or use dtype float32."
            )
        return self.finish(scores)


def encoded_row(ids: list[int], labels: float | list[int], **further: Any) -> Row:
    """A row of tokens, the labels that the model gets, and what the task adds."""
    return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels, "length": len(ids), **further}


def several_row(sequences: Sequence[tuple[list[int], list[int]]], **further: Any) -> Row:
    """A row of several sequences (input_ids, labels), one behind the other, and what the task adds."""
    ids, labels = ([token for part in parts for token in part] for parts in zip(*sequences, strict=True))
    return encoded_row(ids, labels, sizes=[len(part) for part, _ in sequences], **further)


def split_row(row: Mapping[str, Any]) -> list[Row]:
    """The sequences of a row that `several_row` made."""
    ends = np.cumsum(row["sizes"]).tolist()
    places = [slice(end - size, end) for end, size in zip(ends, row["sizes"], strict=True)]
    return [encoded_row(row["input_ids"][place], row["labels"][place]) for place in places]


def arrow(rows: list[Row], features: Mapping[str, Any] = MappingProxyType({})) -> pyarrow.Table:
    """Encoded rows in the types of their columns, with `features` of columns that are not in all tasks alike."""
    types = {name: type_ for name, type_ in {**_COLUMNS, **features}.items() if name in rows[0]}
    columns = {name: [row[name] for row in rows] for name in types}
    return pyarrow.Table.from_pydict(columns, Features(types).arrow_schema)


def _collate(pad: Callable[[list[Row]], Batch], rows: Sequence[Row]) -> Batch:
    batch = dict(pad([{name: row[name] for name in _MODEL_INPUTS if name in row} for row in rows]))
    if "position_ids" in rows[0]:
        del batch["attention_mask"]  # transformers looks at the positions only where there is none
        width = batch["input_ids"].shape[1]
        positions = [row["position_ids"] for row in rows]
        batch["position_ids"] = torch.tensor([[*row, *[0] * (width - len(row))] for row in positions])
    return batch
