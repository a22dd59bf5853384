"""Preferences: two answers to a prompt, of which one was chosen."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence
from itertools import takewhile
from typing import Any

import datasets

from lora_ggpo.data.completion import CompletionReader, Notes, is_given
from lora_ggpo.data.load import Columns
from lora_ggpo.data.messages import Message
from lora_ggpo.data.table import Table
from lora_ggpo.errors import UserError

SIDES = ("chosen", "rejected")


class PreferenceReader(CompletionReader):
    """Reads "id", "chosen" and "rejected" with their "prompt", all texts; or all lists of messages, with the "messages"
    before them and perhaps "template".

    What stands beside them in the source is read as it is beside a prompt and a completion. The messages of both sides
    may begin with the prompt, as in UltraFeedback and HH-RLHF.
    """

    def read(self, table: Table) -> Columns:
        table = self._with_prompts(table.without(self.config.ignore))
        chosen, rejected = (self._side(side) for side in SIDES)
        names = self._names
        read = (
            chosen.read(table.without([names["rejected"]])),
            rejected.read(table.without([names["chosen"]])),
        )
        self.notes.forms |= chosen.notes.forms | rejected.notes.forms
        origin = table.origin
        self.notes.unused[origin] += chosen.notes.unused[origin] | rejected.notes.unused[origin]
        columns, same = _paired(*read)
        self.notes.same[origin] += same
        return columns

    def report(self, table: Table, rows: datasets.Dataset) -> None:
        super().report(table, rows)
        same = self.notes.same[table.origin]
        if same:
            warnings.warn(
                f"{table.origin}: in {same:,} of {len(table):,} rows both answers are the same, which teaches nothing.",
                stacklevel=3,
            )

    @property
    def _names(self) -> dict[str, str]:
        """The columns of the two sides."""
        return {side: getattr(self.config, side) or side for side in SIDES}

    def _side(self, side: str) -> CompletionReader:
        """Reads prompts and the answers of one side, as prompts and completions are read."""
        settings = {"prompt": self._prompt, "completion": self._names[side], "ignore": []}
        reader = CompletionReader(self.config.model_copy(update=settings))
        reader.notes = Notes(self.notes.as_chats)
        return reader

    @property
    def _prompt(self) -> str:
        return self.config.prompt or "prompt"

    def _with_prompts(self, table: Table) -> Table:
        """The table with lists of messages in the column of the prompt, where the answers are such lists."""
        answers = {name: table.column(name, side) for side, name in self._names.items()}
        if not isinstance(next(iter(answers.values()))[0], list):
            return table
        asked = table.values(self._prompt) if self._prompt in table.columns else [None] * len(table)
        prompts: list[Any] = []
        for row, (prompt, *pair) in enumerate(zip(asked, *answers.values(), strict=True)):
            if not all(isinstance(answer, list) and answer for answer in pair):
                raise UserError(f"{table.where(row)}: {' and '.join(answers)} must both be lists of messages here.")
            shared = _shared(pair)
            prompts.append(_before(prompt, shared, table, row))
            for name, answer in zip(answers, pair, strict=True):
                answers[name][row] = answer[len(shared) :]
        return dataclasses.replace(table, columns={**table.columns, self._prompt: prompts, **answers})


def _shared(pair: Sequence[list[Message]]) -> list[Message]:
    """The messages that both conversations begin with; each has one behind them."""
    most = min(map(len, pair)) - 1
    return [turn for turn, _ in takewhile(lambda turns: turns[0] == turns[1], zip(*pair, strict=False))][:most]


def _before(prompt: object, shared: list[Message], table: Table, row: int) -> list[Message]:
    """The messages before the answers: the prompt, and those that both answers begin with, which may hold it."""
    if isinstance(prompt, list):
        turns = prompt
    else:
        turns = [{"role": "user", "content": prompt}] if is_given(prompt) else []
        if any(isinstance(turn, dict) and turn.get("content") == prompt for turn in shared):
            return shared
        if turns and any(isinstance(turn, dict) and turn.get("role") != "assistant" for turn in shared[:1]):
            raise UserError(
                f"{table.where(row)}: the prompt is not in the messages that both answers begin with; leave it out, or "
                "write it as it is there."
            )
    return shared if shared[: len(turns)] == turns else [*turns, *shared]


def _paired(chosen: Columns, rejected: Columns) -> tuple[Columns, int]:
    """The columns of both sides together, and how many pairs of answers are the same."""
    name = "messages" if "messages" in chosen else "completion"
    common: Columns = {column: chosen[column] for column in ("id", "prompt", "template") if column in chosen}
    pairs = [list(pair) for pair in zip(chosen[name], rejected[name], strict=True)]
    same = sum(one == other for one, other in pairs)
    if name == "messages":
        shared = [_shared(pair) for pair in pairs]
        common["messages"] = [[_unlearnt(turn) for turn in one] for one in shared]
        pairs = [[answer[len(turns) :] for answer in pair] for pair, turns in zip(pairs, shared, strict=True)]
    return {**common, "chosen": [pair[0] for pair in pairs], "rejected": [pair[1] for pair in pairs]}, same


def _unlearnt(turn: Message) -> Message:
    return {**turn, "weight": 0} if turn["role"] == "assistant" else turn
