"""Supervised fine-tuning: completions of prompts, or the assistant's turns of conversations."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import accumulate, chain, islice
from typing import TYPE_CHECKING, ClassVar, Self

from datasets import Dataset
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lora_ggpo.data.completion import CompletionReader
from lora_ggpo.data.load import Reader
from lora_ggpo.data.messages import Message
from lora_ggpo.errors import UserError
from lora_ggpo.models.architecture import CAUSAL
from lora_ggpo.models.chat_template import Ending, end_of_turn
from lora_ggpo.statistics.measured import Floats, Measured
from lora_ggpo.tasks.base import CHUNK, NO_LOSS, Row, Score, Task, encoded_row
from lora_ggpo.tasks.completions import best_temperature, token_metrics, token_scores
from lora_ggpo.tasks.pack import check_packing, pack
from lora_ggpo.tasks.text import UnusedFields, appended, check_chat_template, conversation, learnt_turns, start

if TYPE_CHECKING:
    from lora_ggpo.tasks.config import TaskConfig

Segments = list[tuple[str, bool]]
"""Pieces of a row's text, and whether they are learnt."""

Tokens = tuple[list[int], list[int]]
"""The input_ids and labels of a sequence."""


class SFT(Task):
    """Completions are learnt, prompts are not; the loss is that of a completion's tokens, its end included."""

    reader: ClassVar[type[Reader]] = CompletionReader
    architecture = CAUSAL
    settings = frozenset({"template", "chat_template", "too_long", "packing"})
    columns = frozenset({"prompt", "completion", "single_turn", "ignore"})
    metrics: ClassVar[tuple[str, ...]] = ("loss", "perplexity", "token_accuracy", "token_brier", "token_ece")
    loss = "loss"
    default_template = "{text}"
    default_length = 1024  # a prompt with its answer takes more room than a text with a label; a cut one teaches no end
    scores_every_token = True
    answers = True

    def check(self, dataset: Dataset, tokenizer: PreTrainedTokenizerBase) -> None:
        messages = "messages" in dataset.column_names
        if messages and self.config.template != self.default_template:
            raise UserError(
                "task.template is for prompts and completions, but the data has messages (as rows with a system "
                "prompt, a history or tools are); leave it out, or name those columns in data.ignore."
            )
        if messages or self.config.chat_template:
            check_chat_template(tokenizer)
        elif tokenizer.eos_token is None:
            raise UserError("The tokenizer has no end-of-text token, so a completion could not be taught to end.")

    def rows(self, dataset: Dataset, tokenizer: PreTrainedTokenizerBase, name: str) -> Iterator[list[Row]]:
        """Rows as they stand in one sequence.

        Those whose prompt alone fills `max_length` are dropped, and with `too_long: drop` all that are longer. One
        warning counts the rows that are left out or cut, and the tokens that are lost.
        """
        chat = self.config.chat_template or "messages" in dataset.column_names
        end, first = (end_of_turn(tokenizer), []) if chat else (None, start(tokenizer))
        room, unused = Room(self.config, name), UnusedFields(name)
        for begin in range(0, len(dataset), CHUNK):
            rows = dataset.select(range(begin, min(begin + CHUNK, len(dataset)))).to_list()
            segments = [
                [self._segments(tokenizer, answer, index, end, unused) for answer in self.answered(row)]
                for index, row in enumerate(rows, begin)
            ]
            sequences = _joined(tokenizer, chain.from_iterable(segments), first)
            fitted = [room.fit(*islice(sequences, len(answers))) for answers in segments]
            yield [self.encoded(kept, row) for kept, row in zip(fitted, rows, strict=True) if kept]
        unused.report()
        room.report()

    def answered(self, row: Row) -> list[Row]:
        """A row of the data as one or several prompts with a completion, or conversations."""
        return [row]

    def encoded(self, sequences: list[Tokens], row: Row) -> Row:
        """The sequences of `answered` as one row."""
        return encoded_row(*sequences[0])

    def begin(self, model: PreTrainedModel, rows: Dataset) -> Dataset:
        if not self.config.packing:
            return rows
        check_packing(model)
        return pack(rows, self.config.max_length)

    def scorer(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> Score:
        """What `token_scores` gives of each example's completion, (batch, k + longest)."""
        return partial(token_scores, model, temperature=self.temperature)

    def measure(self, scores: Floats, rows: Dataset) -> dict[str, Measured]:
        return token_metrics(scores, self.temperature)

    def fitted(self, scores: Floats) -> Self:
        other = copy.copy(self)
        other.temperature = best_temperature(scores)
        return other

    def user_turn(self, text: str) -> str:
        return self._filled(text)[0]

    def _filled(self, prompt: str) -> tuple[str, str]:
        """The template with the prompt, and the spaces at the template's end, which belong to the completion."""
        spaces = len(self.config.template) - len(self.config.template.rstrip(" "))
        filled = self.config.fill({"text": prompt})
        return filled[: len(filled) - spaces], " " * spaces

    def _segments(
        self, tokenizer: PreTrainedTokenizerBase, row: Row, index: int, end: Ending | None, unused: UnusedFields
    ) -> Segments:
        """The pieces of a row; `end` is of a turn in the chat template, None without one."""
        if end is None:
            prompt, space = self._filled(row["prompt"])
            return [(prompt, False), (space + row["completion"] + str(tokenizer.eos_token), True)]
        try:
            messages, arguments = conversation(row) if "messages" in row else (self._exchange(row), {})
            unused.look(tokenizer, messages, arguments)
            return learnt_turns(tokenizer, messages, arguments, end)
        except UserError as error:
            place = f"Row {index} ({row['id']})" if "id" in row else f"Row {index}"  # an id is file:line by default
            raise UserError(f"{place}: {error}") from error

    def _exchange(self, row: Row) -> list[Message]:
        return [
            {"role": "user", "content": self._filled(row["prompt"])[0]},
            {"role": "assistant", "content": row["completion"]},
        ]


class Room:
    """Fits the rows of one set into `task.max_length`, and keeps account of what that takes from them.

    Args:
        name: The set, as the warning names it; "" for none.
    """

    def __init__(self, config: TaskConfig, name: str) -> None:
        self._config, self._name = config, name
        self._rows = self._longest = 0
        self._learnt = self._lost = 0  # tokens to learn
        self._cut = self._left_out = 0  # rows

    def fit(self, *sequences: Tokens) -> list[Tokens] | None:
        """Return a row's sequences as they are trained on, or None if nothing is left to learn in one of them."""
        limit, drop = self._config.max_length, self._config.too_long == "drop"
        whole = [_count_learnt(labels) for _, labels in sequences]
        kept = [_count_learnt(labels[:limit]) for _, labels in sequences]
        left_out = not all(kept) or (kept != whole and drop)
        self._rows += 1
        self._longest = max(self._longest, *(len(ids) for ids, _ in sequences))
        self._learnt += sum(whole)
        self._lost += sum(whole) if left_out else sum(whole) - sum(kept)
        self._left_out += left_out
        self._cut += kept != whole and not left_out
        return None if left_out else [(ids[:limit], labels[:limit]) for ids, labels in sequences]

    def report(self) -> None:
        """Say what was lost, in one warning."""
        way, rows = self._config.too_long, f"of {self._rows:,} rows"
        length, needed = f"task.max_length = {self._config.max_length} tokens", f"the longest row has {self._longest:,}"
        if self._left_out == self._rows:
            each = "row is longer than" if way == "drop" else "prompt fills"
            raise UserError(f"No row is left: every {each} {length}; raise it ({needed}).")
        if not self._lost:
            return
        lost = f"{self._lost:,} of {self._learnt:,} tokens to learn are lost; {needed}"
        if way == "refuse":
            raise UserError(
                f"{self._cut + self._left_out:,} {rows} are longer than {length}: {lost}; raise it, or set "
                "task.too_long to cut or drop."
            )
        why = "they are longer than" if way == "drop" else "their prompt fills"
        cut = f"{self._cut:,} {rows} are cut at {length}, so what they teach has no end"
        left_out = f"{self._left_out:,} {rows} are left out: {why} {length}"
        said = "; ".join([cut] * bool(self._cut) + [left_out] * bool(self._left_out))
        advice = "raise task.max_length" if way == "drop" else "raise task.max_length, or set task.too_long: drop"
        warnings.warn(f"{self._name}: {said}. In all {lost}; {advice}.".removeprefix(": "), stacklevel=4)


def _count_learnt(labels: list[int]) -> int:
    predicted = labels[1:]  # nothing predicts the first token
    return len(predicted) - predicted.count(NO_LOSS)


def _joined(tokenizer: PreTrainedTokenizerBase, sequences: Iterable[Segments], first: list[int]) -> Iterator[Tokens]:
    """Tokenise the segments of each sequence one behind the other, as `continuation` does.

    All texts in one call: a call takes longer than the text in it.
    """
    held = list(sequences)
    texts = [text for segments in held for text in accumulate(segment for segment, _ in segments)]
    joint = iter(tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"])
    for segments in held:
        ids: list[int] = []
        labels = [NO_LOSS] * len(first)
        for segment, learnt in segments:
            added = appended(tokenizer, ids, next(joint), segment)
            ids += added
            labels += added if learnt else [NO_LOSS] * len(added)
        yield first + ids, labels
